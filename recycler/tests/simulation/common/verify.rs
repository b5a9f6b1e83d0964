//! What must be true of an image: its structure by our own check and by qemu-img's, its contents by a model.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use qcow_recycler::buf::IoBufMut;
use qcow_recycler::check::check;
use qcow_recycler::format::header::{Header, incompatible};
use qcow_recycler::{BlockDevice, CheckReport, ExtentKind, Image, Options, Repair};

use super::chain::{self, Behind};
use super::config::{Config, ImageKind};
use super::content::SECTOR;
use super::encryption::{Encryption, PASSPHRASE};
use super::memory::MemoryDevice;
use super::model::Model;
use super::sim::Delay;
use super::snapshots;
use super::taken::TakenAll;

/// A file for qemu-img, removed when dropped.
struct Scratch(PathBuf);

impl Scratch {
    fn new(bytes: &[u8]) -> Scratch {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = chain::directory().join(format!("{}.img", NEXT.fetch_add(1, Ordering::Relaxed)));
        std::fs::write(&path, bytes).unwrap();
        Scratch(path)
    }

    /// The image in the file as an argument, with its passphrase if it needs one.
    fn named(&self) -> Vec<String> {
        let path = self.0.display();
        let encrypted = std::fs::read(&self.0).unwrap().get(32..36).is_some_and(|method| method != [0; 4]);
        if !encrypted {
            return vec!["-f".into(), "qcow2".into(), path.to_string()];
        }
        let object = format!("secret,id=s,data={PASSPHRASE}");
        let image = format!("driver=qcow2,encrypt.key-secret=s,file.filename={path}");
        vec!["--object".into(), object, "--image-opts".into(), image]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// How bad an image may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tolerance {
    /// Neither leaks nor corruptions.
    Clean,
    /// Leaks.
    Leaks,
    /// Wrong refcounts too, as long as the dirty bit announces them.
    DirtyRefcounts,
}

/// Runs `qemu-img check` on a copy of `image`.
///
/// # Errors
/// It finds more than `tolerance` allows; its output.
pub fn qemu_check(image: &[u8], tolerance: Tolerance) -> Result<(), String> {
    let file = Scratch::new(image);
    let run = |repair: bool| {
        let mut command = Command::new("qemu-img");
        command.arg("check");
        if repair {
            command.args(["-r", "all"]);
        }
        let output = command.args(file.named()).output().expect("these tests need qemu-img");
        let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        (output.status.code(), text)
    };
    if tolerance == Tolerance::DirtyRefcounts {
        run(true);
    }
    let (code, text) = run(false);
    match (code, tolerance) {
        (Some(0), _) | (Some(3), Tolerance::Leaks) => Ok(()),
        _ => Err(format!("qemu-img check: {code:?}, allowed is {tolerance:?}: {text}")),
    }
}

/// The virtual disk as QEMU reads it.
///
/// # Errors
/// qemu-img's message.
pub fn qemu_contents(image: &[u8]) -> Result<Vec<u8>, String> {
    let file = Scratch::new(image);
    let raw = Scratch::new(&[]);
    let output = Command::new("qemu-img")
        .args(["convert", "-O", "raw"])
        .args(file.named())
        .arg(&raw.0)
        .output()
        .expect("these tests need qemu-img");
    if !output.status.success() {
        return Err(format!("qemu-img convert: {}", String::from_utf8_lossy(&output.stderr)));
    }
    std::fs::read(&raw.0).map_err(|e| e.to_string())
}

/// The virtual disk as QEMU reads it, or the library if QEMU cannot.
///
/// # Errors
/// It cannot be read.
pub fn disk_contents(image: &[u8], config: &Config) -> Result<Vec<u8>, String> {
    if config.image.encryption != Encryption::Luks {
        return qemu_contents(image);
    }
    let device = MemoryDevice::new(image.to_vec());
    let options = Options { read_only: true, ..config.options() };
    at_once(async {
        let image = config.open_as(device, options, Delay::None).await.map_err(|e| e.to_string())?;
        contents(&image).await
    })?
}

/// The image after QEMU has gone back to a snapshot, told by its ID or name.
///
/// # Errors
/// qemu-img's message.
pub fn gone_back(image: &[u8], snapshot: &str) -> Result<Vec<u8>, String> {
    let file = Scratch::new(image);
    let output = Command::new("qemu-img").args(["snapshot", "-a", snapshot]).arg(&file.0).output();
    let output = output.expect("these tests need qemu-img");
    if !output.status.success() {
        return Err(format!("qemu-img snapshot -a: {}", String::from_utf8_lossy(&output.stderr)));
    }
    std::fs::read(&file.0).map_err(|e| e.to_string())
}

/// Whether the image's internal snapshots hold what they may: QEMU goes back to each, since what it reads of a snapshot ends
/// where the disk ends now.
fn snapshots_stand(image: &[u8], taken: &TakenAll, config: &Config) -> Result<(), String> {
    let names = snapshots::names(image)?;
    if config.image.encryption != Encryption::None {
        // It needs the key for that, and is asked about the disk.
        return Ok(());
    }
    if config.image.refcount_bits < 4 && names.len() > 1 {
        // It counts what comes before what goes, and has no bits for that.
        return Ok(());
    }
    for (id, name) in names {
        taken.survived(&name, &qemu_contents(&gone_back(image, &id)?)?).map_err(|e| format!("read by QEMU: {e}"))?;
    }
    Ok(())
}

/// The same, as the tables say, or, where those lead to encrypted data, as the library goes back to each.
fn snapshots_held(image: &[u8], taken: &TakenAll, config: &Config) -> Result<(), String> {
    if config.image.encryption == Encryption::None {
        return snapshots::stand(image, taken, config.image.backing);
    }
    let names = snapshots::names(image)?;
    taken.all_there(&names.iter().map(|(_, name)| name.clone()).collect::<Vec<_>>())?;
    for (id, name) in names {
        let device = MemoryDevice::with(image.to_vec(), config.features);
        // Wherever this is called from, nobody else's turn is waited for.
        let disk = at_once(tokio::task::unconstrained(async {
            let image = config.open(device).await.map_err(|e| e.to_string())?;
            match image.apply_snapshot(&id).await {
                Ok(()) => contents(&image).await.map(Some),
                // No room in the refcounts.
                Err(qcow_recycler::Error::Unsupported { .. }) => Ok(None),
                Err(e) => Err(format!("going back to {name:?}: {e}")),
            }
        }))??;
        if let Some(disk) = disk {
            taken.survived(&name, &disk)?;
        }
    }
    Ok(())
}

/// The name of the internal snapshot that [`with_snapshot`] makes.
pub const SNAPSHOT: &str = "before";

/// The image with an internal snapshot of what it holds now.
pub fn with_snapshot(image: &[u8]) -> Vec<u8> {
    let file = Scratch::new(image);
    let output = Command::new("qemu-img").args(["snapshot", "-c", SNAPSHOT]).arg(&file.0).output();
    let output = output.expect("these tests need qemu-img");
    assert!(output.status.success(), "qemu-img snapshot: {}", String::from_utf8_lossy(&output.stderr));
    std::fs::read(&file.0).unwrap()
}

/// The image again, with everything in it compressed.
pub fn compressed(image: &[u8], kind: &ImageKind) -> Vec<u8> {
    let (from, to) = (Scratch::new(image), Scratch::new(&[]));
    let options = kind.options();
    let mut convert = vec!["convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", &options];
    let chain = kind.backing.chain();
    if let Some(chain) = &chain {
        // What is behind it stays behind it.
        convert.extend(["-B", &chain.name, "-F", chain.format]);
    }
    let mut command = Command::new("qemu-img");
    let output = command.current_dir(chain::directory()).args(convert).args([&from.0, &to.0]).output();
    let output = output.expect("these tests need qemu-img");
    assert!(output.status.success(), "qemu-img convert -c: {}", String::from_utf8_lossy(&output.stderr));
    std::fs::read(&to.0).unwrap()
}

/// Whether the dirty bit is set.
pub fn is_dirty(image: &[u8]) -> bool {
    Header::parse(image, image.len() as u64).is_ok_and(|h| h.incompatible & incompatible::DIRTY != 0)
}

/// Checks an image nobody uses with our own check.
///
/// # Errors
/// It finds more than `tolerance` allows.
pub fn our_check(image: &[u8], tolerance: Tolerance) -> Result<CheckReport, String> {
    let device = MemoryDevice::new(image.to_vec());
    let report = at_once(check(&device, Repair::No))?.map_err(|e| format!("check: {e}"))?;
    judge(&report, tolerance).map_err(|e| format!("check: {e}"))?;
    Ok(report)
}

/// Whether a report is as good as `tolerance` asks.
///
/// # Errors
/// It is not: the report in words.
pub fn judge(report: &CheckReport, tolerance: Tolerance) -> Result<(), String> {
    let good = match tolerance {
        Tolerance::Clean => report.corruptions == 0 && report.leaks == 0,
        Tolerance::Leaks => report.corruptions == 0,
        Tolerance::DirtyRefcounts => true,
    };
    if good {
        return Ok(());
    }
    let (corruptions, leaks) = (report.corruptions, report.leaks);
    Err(format!("{corruptions} corruptions, {leaks} leaks, allowed is {tolerance:?}: {}", report.messages.join("; ")))
}

/// The whole virtual disk.
///
/// # Errors
/// A read fails.
pub async fn contents<D: BlockDevice>(image: &Image<D>) -> Result<Vec<u8>, String> {
    let size = image.info().virtual_size;
    let mut bytes = vec![0xaa; size as usize];
    let step = 64 << 10;
    for offset in (0..size).step_by(step) {
        let end = (offset as usize + step).min(bytes.len());
        let buf = IoBufMut::new(&mut bytes[offset as usize..end]);
        image.read(offset, buf).await.map_err(|e| format!("reading at {offset:#x}: {e}"))?;
    }
    Ok(bytes)
}

/// Compares the whole disk, and what `extent` says of it, with the model. Nothing else may be using the disk.
///
/// # Errors
/// What differs.
pub async fn whole_disk<D: BlockDevice>(image: &Image<D>, model: &mut Model, behind: Behind) -> Result<(), String> {
    let size = image.info().virtual_size;
    if size != model.size() * SECTOR as u64 {
        return Err(format!("the disk has {size} bytes, {} sectors are right", model.size()));
    }
    let bytes = contents(image).await?;
    model.read(0, &bytes).map_err(|m| format!("{m}; {}", model.explain(m.sector)))?;
    let backing = behind.bytes(model.size());
    let (mut offset, mut ranges) = (0, Vec::new());
    while offset < size {
        let extent = image.extent(offset, size - offset).await.map_err(|e| format!("extent at {offset:#x}: {e}"))?;
        if extent.length == 0 || extent.length > size - offset {
            return Err(format!("extent at {offset:#x} has a length of {}", extent.length));
        }
        let end = offset + extent.length;
        match extent.kind {
            ExtentKind::Data { host_offset } => ranges.push((host_offset, host_offset + extent.length)),
            ExtentKind::Zero => {
                if bytes[offset as usize..end as usize].iter().any(|&b| b != 0) {
                    return Err(format!("extent {offset:#x}..{end:#x} is zero but holds data"));
                }
            }
            ExtentKind::Unallocated => {
                let range = offset as usize..end as usize;
                if bytes[range.clone()] != backing[range] {
                    return Err(format!("extent {offset:#x}..{end:#x} is unallocated but holds other data"));
                }
            }
            // Its place is for the checks to judge; that it is read was seen above.
            ExtentKind::Compressed => {}
        }
        offset = end;
    }
    ranges.sort_unstable();
    match ranges.windows(2).find(|w| w[0].1 > w[1].0) {
        Some(w) => Err(format!("two extents share a cluster of the file: {:x?} and {:x?}", w[0], w[1])),
        None => Ok(()),
    }
}

/// Runs a future that waits for nobody; also within a runtime. It may give way to others as often as it likes, within
/// reason.
///
/// # Errors
/// It waits.
pub fn at_once<T>(future: impl Future<Output = T>) -> Result<T, &'static str> {
    let mut future = std::pin::pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    for _ in 0..1_000_000 {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return Ok(output);
        }
    }
    Err("it hangs")
}

/// Runs `future` on a runtime of its own whose time stands still unless everything waits for it: what makes no progress
/// for an hour of that time hangs, and fails at once.
///
/// # Errors
/// It hangs.
pub fn in_paused_time<T>(future: impl Future<Output = T>) -> Result<T, &'static str> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let hour = Duration::from_secs(3600);
    runtime.block_on(async { tokio::time::timeout(hour, future).await.map_err(|_| "it hangs") })
}

/// How thoroughly one crash image is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Depth {
    /// QEMU checks it as well, before and after our repair, and reads it.
    pub qemu: bool,
    /// It is compacted after it was recovered, and must survive that.
    pub compact: bool,
}

/// Checks an image that a power cut may have left: sound before it is opened, recovered by opening it, holding what
/// the model allows, and clean after it was closed.
///
/// # Errors
/// What is wrong.
pub fn crash_image(image: &[u8], model: &Model, config: &Config, depth: Depth) -> Result<(), String> {
    // The dirty bit alone excuses nothing: without lazy refcounts it only announces leaks.
    let excused = config.image.lazy_refcounts && is_dirty(image);
    let tolerance = if excused { Tolerance::DirtyRefcounts } else { Tolerance::Leaks };
    our_check(image, tolerance).map_err(|e| format!("before opening: {e}"))?;
    if depth.qemu {
        qemu_check(image, tolerance).map_err(|e| format!("before opening: {e}"))?;
        let bytes = qemu_contents(image)?;
        model.survived(&bytes).map_err(|m| format!("read by QEMU: {m}; {}", model.explain(m.sector)))?;
        snapshots_stand(image, &model.taken, config)?;
    }
    snapshots_held(image, &model.taken, config)?;
    let device = MemoryDevice::with(image.to_vec(), config.features);
    in_paused_time(async {
        let open = || config.open(device.clone());
        let disk = open().await.map_err(|e| format!("opening: {e}"))?;
        let size = disk.info().virtual_size / SECTOR as u64;
        if !model.size_may_survive(size) {
            return Err(format!("the disk has {size} sectors"));
        }
        let bytes = contents(&disk).await?;
        model.survived(&bytes).map_err(|m| format!("{m}; {}", model.explain(m.sector)))?;
        if depth.compact {
            qcow_recycler::recycler::compact(&disk, &mut |_| true).await.map_err(|e| format!("compacting: {e}"))?;
            if contents(&disk).await? != bytes {
                return Err("compacting the recovered image changed its contents".into());
            }
        }
        disk.close().await.map_err(|e| format!("closing: {e}"))?;
        let after = device.contents();
        our_check(&after, Tolerance::Clean).map_err(|e| format!("after opening and closing: {e}"))?;
        snapshots_held(&after, &model.taken, config).map_err(|e| format!("after opening and closing: {e}"))?;
        if depth.qemu {
            qemu_check(&after, Tolerance::Clean).map_err(|e| format!("after opening and closing: {e}"))?;
            snapshots_stand(&after, &model.taken, config)?;
        }
        Ok(())
    })?
}
