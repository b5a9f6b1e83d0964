//! The library meets an image: it is checked, opened, read, written, compacted, compressed and closed, and must keep its promises.

use std::sync::Arc;
use std::time::Duration;

use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::check::check;
use qcow_recycler::device::Features;
use qcow_recycler::recycler::{Control, compact, compress, run};
use qcow_recycler::{BackingPolicy, Error, Image, Options, Repair};

use super::anatomy::Anatomy;
use super::choices::Choices;
use super::device::Sparse;
use super::known::{Disk, MOST_BYTES, SECTOR, bystanders, is_accounted_for, is_shared_with_itself, passphrase, stamp};
use super::meter;
use super::mutate::File;

/// More operations of the device than any request sequence here can need.
const MOST_OPERATIONS: u64 = 400_000;
/// The most memory that an image may cost, beyond what is in proportion to its file.
const MOST_MEMORY: u64 = 40 << 20;

/// What happened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Met {
    /// It could be opened for reading.
    pub readable: bool,
    /// It could be opened for writing.
    pub writable: bool,
    /// Its refcounts account for every reference, so all the guest's data was followed to the end.
    pub followed: bool,
    /// Requests that were carried out, and those that failed.
    pub requests: u64,
    pub failed: u64,
    /// Most memory in use at once, in bytes: 0 unless it is metered.
    pub peak: u64,
}

/// Lets the library meet a file. `disk` is what must be seen in it. The error says which promise was broken.
pub fn meet(file: &File, disk: Disk, choices: &mut Choices) -> Result<Met, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.map_err(|e| e.to_string())?;
    let mut met = Met::default();
    meter::start();
    let result = runtime.block_on(async {
        let all = async {
            look(&Sparse::new(file, Features::default(), MOST_OPERATIONS), &disk, &mut met).await?;
            work(file, disk, choices, &mut met).await
        };
        // Time stands still unless everything waits: whoever waits for an hour waits for ever.
        tokio::time::timeout(Duration::from_secs(3600), all).await.unwrap_or_else(|_| Err("it hangs".to_owned()))
    });
    met.peak = meter::peak();
    result?;
    let most = MOST_MEMORY + 4 * file.bytes.len() as u64 + file.length / 64;
    if met.peak > most {
        return Err(format!("{} bytes of memory in use, for a file of {}", met.peak, file.length));
    }
    Ok(met)
}

/// An error that an image may cause: it names what is wrong.
fn acceptable(what: &str, error: &Error) -> Result<(), String> {
    match error {
        Error::Invalid { field, reason, .. } if !field.is_empty() && !reason.is_empty() => Ok(()),
        Error::Unsupported { what } if !what.is_empty() => Ok(()),
        Error::BackingNotAllowed { .. } | Error::DataFileNotAllowed { .. } | Error::PassphraseNeeded => Ok(()),
        other => Err(format!("{what}: {other:?}")),
    }
}

fn unbroken(device: &Sparse) -> Result<(), String> {
    device.broken().map_or(Ok(()), Err)
}

fn unchanged(what: &str, device: &Sparse) -> Result<(), String> {
    unbroken(device)?;
    match device.changes() {
        0 => Ok(()),
        n => Err(format!("{what} changed the file {n} times")),
    }
}

/// Checks and reads, which changes nothing and shows all that is not damaged.
async fn look(device: &Sparse, disk: &Disk, met: &mut Met) -> Result<(), String> {
    if let Err(e) = check(device, Repair::No).await {
        acceptable("check", &e)?;
    }
    unchanged("a check", device)?;

    let passphrase = passphrase(&device.contents(512).bytes);
    let options = Options { read_only: true, backing: BackingPolicy::Skip, passphrase, ..Options::default() };
    match Image::open(device.clone(), options).await {
        Ok(image) => {
            met.readable = true;
            let info = image.info();
            let size = info.virtual_size.min(MOST_BYTES);
            read_all(&image, disk, info.cluster_size).await?;
            walk(&image, size).await?;
            image.write(0, IoBuf::new(&[])).await.err().ok_or("a write to a read-only image is no error")?;
            image.check().await.map(drop).or_else(|e| acceptable("checking an open image", &e))?;
            let _ = (image.stats(), image.flush().await);
            image.close().await.map_err(|e| format!("closing what was only read: {e}"))?;
        }
        Err(e) => acceptable("opening to read", &e)?,
    }
    unchanged("reading", device)
}

/// Reads the disk, cluster by cluster so that one bad entry does not hide the rest, and at its end.
async fn read_all(image: &Image<Sparse>, disk: &Disk, cluster_size: u64) -> Result<(), String> {
    let size = image.virtual_size();
    let most = size.min(MOST_BYTES);
    let last = (size.saturating_sub(SECTOR), size);
    let clusters = (0..most).step_by(cluster_size as usize).map(|at| (at, most.min(at + cluster_size)));
    for (start, end) in clusters.chain(std::iter::once(last)) {
        let mut bytes = vec![0xa5; (end - start) as usize];
        match image.read(start, IoBufMut::new(&mut bytes)).await {
            Ok(()) => disk.compare(start, &bytes)?,
            Err(Error::PassphraseNeeded) => {}
            Err(e) => {
                acceptable("read", &e)?;
                if start < end && end <= disk.size() && disk.is_known(start..end) {
                    return Err(format!("what is not damaged cannot be read, at {start:#x}: {e}"));
                }
            }
        }
    }
    Ok(())
}

/// Asks how the disk is stored.
async fn walk(image: &Image<Sparse>, size: u64) -> Result<(), String> {
    let mut at = 0;
    while at < size {
        match image.extent(at, size - at).await {
            Ok(extent) if extent.length == 0 || extent.length > size - at => {
                return Err(format!("an extent of {} bytes at {at:#x} of {size}", extent.length));
            }
            Ok(extent) => at += extent.length,
            Err(e) => {
                acceptable("extent", &e)?;
                at += SECTOR;
            }
        }
    }
    Ok(())
}

/// Opens to write, makes requests, closes, and looks at what that left.
async fn work(file: &File, disk: Disk, choices: &mut Choices, met: &mut Met) -> Result<(), String> {
    let all = Features { resize: true, punch_hole: true, write_zeroes: true, copy_range: true };
    let keep_erased = choices.below(8) << (9 + choices.below(13));
    let few = Features { resize: true, ..Features::default() };
    let device = Sparse::new(file, if choices.chance(50) { all } else { few }, MOST_OPERATIONS);
    let options = Options {
        backing: BackingPolicy::Skip,
        keep_erased,
        compact_after_unmaps: choices.chance(60).then_some(4096),
        l2_cache_size: choices.below(2) << 22,
        check_on_connect: choices.chance(10),
        runtime_asserts: true,
        passphrase: passphrase(&file.bytes),
        ..Options::default()
    };
    let image = match Image::open(device.clone(), options).await {
        Ok(image) => Arc::new(image),
        Err(e) => {
            acceptable("opening to write", &e)?;
            return refused(file, &device, &disk).await;
        }
    };
    met.writable = true;
    // Opening may have repaired the image.
    let opened = Opened::of(&device);
    met.followed = is_accounted_for(&opened.file);
    // One of the two may be gone already: what is past the end of the disk, an opening that repairs forgets.
    let is_shared = is_shared_with_itself(file) || is_shared_with_itself(&opened.file);
    let sound = met.followed && !is_shared && is_sound(&device).await;
    let trust = match met.followed {
        true => Trust::All,
        false if choices.chance(60) => Trust::Part(bystanders(&opened.file, image.virtual_size().min(MOST_BYTES))),
        false => Trust::Nothing,
    };
    drop(opened);
    let mut guest = Guest { image: &image, disk, trust, version: 0, met };
    guest.disk_follows_size();
    if let Trust::Part(bystanders) = &guest.trust {
        guest.disk.forget_unknown(bystanders);
    }
    guest.compare().await?;

    let control = Control::new();
    let recycler = choices.chance(30).then(|| tokio::spawn(run(image.clone(), control.clone())));
    if choices.chance(30) {
        // The recycler is alone with the image as it was.
        tokio::time::sleep(Duration::from_secs(10)).await;
        guest.compare().await?;
    }
    for _ in 0..3 + choices.below(10) {
        guest.request(choices).await?;
        unbroken(&device)?;
    }
    if let Some(recycler) = recycler {
        tokio::time::sleep(Duration::from_secs(30)).await;
        control.stop();
        recycler.await.map_err(|e| format!("the recycler panicked: {e}"))?;
    }
    guest.compare().await?;
    let watched = guest.is_watched();
    let Guest { disk, .. } = guest;
    match image.close().await {
        Ok(()) => {}
        Err(e) if met.followed => return Err(format!("close: {e}")),
        Err(e) => return acceptable_after_work("close", &e),
    }
    unbroken(&device)?;
    if watched {
        reopen(&device, &disk, sound).await?;
    }
    unbroken(&device)
}

/// What the file holds, in memory that nobody counts: it may be long.
struct Opened {
    file: File,
}

impl Opened {
    fn of(device: &Sparse) -> Self {
        let _unmetered = meter::pause();
        Opened { file: device.contents(64 << 20) }
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        let _unmetered = meter::pause();
        self.file = File::new(Vec::new());
    }
}

/// Who refuses to open an image to write leaves it as it was. One that was not closed may have been repaired in part,
/// at the cost of nothing.
async fn refused(file: &File, device: &Sparse, disk: &Disk) -> Result<(), String> {
    if !Anatomy::of(&file.bytes).is_some_and(|a| a.is_dirty()) {
        return unchanged("opening to write, which was refused,", device);
    }
    unbroken(device)?;
    let left = device.copied(Features::default(), MOST_OPERATIONS);
    look(&left, disk, &mut Met::default()).await.map_err(|e| format!("after a repair that was given up: {e}"))
}

async fn is_sound(device: &Sparse) -> bool {
    matches!(check(device, Repair::No).await, Ok(report) if report.corruptions == 0)
}

/// A damaged image may turn out to be so when it is too late for a better error.
fn acceptable_after_work(what: &str, error: &Error) -> Result<(), String> {
    match error {
        Error::Failed { .. } => Ok(()),
        other => acceptable(what, other),
    }
}

/// After closing: an image that was sound is sound, and shows what it must.
async fn reopen(device: &Sparse, disk: &Disk, sound: bool) -> Result<(), String> {
    if sound {
        let report = check(device, Repair::No).await.map_err(|e| format!("check after closing: {e}"))?;
        if report.corruptions > 0 {
            return Err(format!("corrupt after closing: {}", report.messages.join("; ")));
        }
    }
    let passphrase = passphrase(&device.contents(512).bytes);
    let options = Options { read_only: true, backing: BackingPolicy::Skip, passphrase, ..Options::default() };
    let image = Image::open(device.clone(), options).await.map_err(|e| format!("opening again: {e}"))?;
    let cluster_size = image.info().cluster_size;
    read_all(&image, disk, cluster_size).await.map_err(|e| format!("after closing: {e}"))?;
    image.close().await.map_err(|e| e.to_string())
}

/// How far the image agrees with itself.
enum Trust {
    /// Its refcounts account for everything: nothing that is known may be lost.
    All,
    /// The clusters known here have nothing to do with what is wrong. Requests keep to them, and as long as no error is
    /// reported none of them may be lost.
    Part(Disk),
    /// Requests go everywhere, and only the library's own life is at stake.
    Nothing,
}

struct Guest<'a> {
    image: &'a Arc<Image<Sparse>>,
    disk: Disk,
    trust: Trust,
    version: u64,
    met: &'a mut Met,
}

impl Guest<'_> {
    /// The disk of a damaged image may be longer or shorter than the original's.
    fn disk_follows_size(&mut self) {
        let size = self.image.virtual_size().min(MOST_BYTES) as usize;
        self.disk.data.resize(size, 0);
        self.disk.known.resize(size / SECTOR as usize, false);
    }

    /// Whether what is known must be seen.
    fn is_watched(&self) -> bool {
        match self.trust {
            Trust::All => true,
            Trust::Part(_) => self.met.failed == 0 && self.image.stats().background_errors == 0,
            Trust::Nothing => false,
        }
    }

    async fn compare(&self) -> Result<(), String> {
        let cluster_size = self.image.info().cluster_size;
        if self.is_watched() { read_all(self.image, &self.disk, cluster_size).await } else { Ok(()) }
    }

    /// Whether requests may touch a range, and the rest of its clusters with it.
    fn may_touch(&self, start: u64, end: u64) -> bool {
        let Trust::Part(bystanders) = &self.trust else { return true };
        let cluster_size = self.image.info().cluster_size;
        let whole = start / cluster_size * cluster_size..end.next_multiple_of(cluster_size).min(bystanders.size());
        end <= bystanders.size() && bystanders.is_known(whole)
    }

    /// Whether a request was carried out; afterwards `range` holds `contents`, or the old or new ones if it failed.
    fn done(
        &mut self,
        what: &str,
        result: Result<(), Error>,
        range: std::ops::Range<u64>,
        contents: &[u8],
    ) -> Result<(), String> {
        self.met.requests += 1;
        match result {
            Ok(()) => self.disk.set(range, Some(contents)),
            Err(e) => {
                self.met.failed += 1;
                self.disk.set(range, None);
                match self.trust {
                    Trust::All => acceptable(what, &e)?,
                    Trust::Part(_) | Trust::Nothing => acceptable_after_work(what, &e)?,
                }
            }
        }
        Ok(())
    }

    async fn request(&mut self, choices: &mut Choices) -> Result<(), String> {
        let image = self.image;
        let sectors = self.disk.size() / SECTOR;
        let start = choices.below(sectors);
        let most = 1 << choices.below(9);
        let length = (1 + choices.below(most)).min(sectors - start) * SECTOR;
        let (start, end) = (start * SECTOR, start * SECTOR + length);
        if !self.may_touch(start, end) {
            return Ok(());
        }
        let zeroes = vec![0; length as usize];
        match choices.below(100) {
            0..30 => {
                self.version += 1;
                let bytes: Vec<u8> = (start..end).step_by(512).flat_map(|at| stamp(at, self.version)).collect();
                let result = image.write(start, IoBuf::new(&bytes)).await;
                self.done("write", result, start..end, &bytes)
            }
            30..50 => {
                let result = image.discard(start, length).await;
                self.done("discard", result, start..end, &zeroes)
            }
            50..60 => {
                let result = image.write_zeroes(start, length, choices.chance(50)).await;
                self.done("write zeroes", result, start..end, &zeroes)
            }
            60..68 => {
                let result = image.flush().await;
                self.done("flush", result, 0..0, &[])
            }
            68..85 => {
                let mut left = choices.below(20);
                let mut progress = |_| {
                    left = left.saturating_sub(1);
                    left > 0
                };
                let result = compact(image, &mut progress).await.map(drop);
                let result = if matches!(result, Err(Error::Cancelled)) { Ok(()) } else { result };
                self.done("compact", result, 0..0, &[])
            }
            85..90 => {
                let result = image.check().await.map(drop);
                self.done("check", result, 0..0, &[])
            }
            90..95 if matches!(self.trust, Trust::Part(_)) => Ok(()),
            90..95 => self.resize(choices).await,
            95..98 => self.compare().await,
            _ => {
                let result = compress(image, &mut |_| true).await.map(drop);
                // Not every image can hold compressed data.
                let result = if matches!(result, Err(Error::Unsupported { .. })) { Ok(()) } else { result };
                self.done("compress", result, 0..0, &[])
            }
        }
    }

    async fn resize(&mut self, choices: &mut Choices) -> Result<(), String> {
        let old = self.image.virtual_size();
        let size =
            if choices.chance(50) { old.saturating_add(choices.below(64) * SECTOR) } else { (old / 4 * 3) & !511 };
        match self.image.resize(size, true).await {
            Ok(()) => {
                self.disk_follows_size();
                let seen = self.disk.size();
                if size > old && old < seen {
                    self.disk.set(old..seen, Some(&vec![0; (seen - old) as usize]));
                }
                Ok(())
            }
            Err(Error::BadOption { .. }) => Ok(()),
            Err(e) => {
                self.disk_follows_size();
                // What is past the end may be unmapped or not.
                let seen = self.disk.size();
                self.disk.set(size.min(old).min(seen)..seen, None);
                self.done("resize", Err(e), 0..0, &[])
            }
        }
    }
}
