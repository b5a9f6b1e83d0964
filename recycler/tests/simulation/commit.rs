//! Commits of an overlay into its backing file, under power cuts: at every moment each of the two may have lost any part of what
//! was written to it since its own last flush, and the disk reads as before.
//!
//! `QCR_SEED=n cargo test --test simulation commit::` replays a seed.

use std::sync::Arc;

use crate::common::chain::{self, Behind};
use crate::common::config::ImageKind;
use crate::common::content::{self, SECTOR};
use crate::common::crash;
use crate::common::encryption::Encryption;
use crate::common::memory::MemoryDevice;
use crate::common::sim::{self, Delay, Fault, Settings, SimDevice};
use crate::common::slice::{self, Slice};
use crate::common::verify::{self, Tolerance, in_paused_time};
use parking_lot::Mutex;
use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::image::{CommitReport, commit_into};
use qcow_recycler::{BackingFile, BlockDevice, Error, Image, Options};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// What a commit is played on.
#[derive(Clone, Copy, Debug)]
struct Scene {
    seed: u64,
    overlay: ImageKind,
    /// `None`: a raw file.
    base: Option<ImageKind>,
}

impl Scene {
    fn new(seed: u64, rng: &mut SmallRng) -> Scene {
        let sectors = rng.random_range(20..70);
        let kind = |sectors, rng: &mut SmallRng| {
            let version = if rng.random_bool(0.2) { 2 } else { 3 };
            let extended_l2 = version == 3 && rng.random_bool(0.2);
            ImageKind {
                cluster_bits: if extended_l2 { 14 } else { rng.random_range(9..=11) },
                refcount_bits: if version == 2 { 16 } else { 1 << rng.random_range(0..=6) },
                version,
                lazy_refcounts: false,
                extended_l2,
                preallocated: false,
                zstd: false,
                encryption: Encryption::None,
                backing: Behind::Nothing,
                sectors,
            }
        };
        // Shorter than the overlay, longer, or as long.
        let beneath = [sectors - 13, sectors, sectors + 9][rng.random_range(0..3)];
        let base = rng.random_bool(0.7).then(|| {
            let base = kind(beneath, rng);
            // What is behind it is neither asked nor changed.
            let behind = [Behind::Nothing, Behind::Raw(beneath), Behind::Image(beneath / 2)][rng.random_range(0..3)];
            // An image of version 2 cannot grow over what is behind it.
            base.over(if base.version == 2 { Behind::Raw(beneath.min(sectors)) } else { behind })
        });
        let overlay =
            kind(sectors, rng).over(if base.is_some() { Behind::Image(beneath) } else { Behind::Raw(beneath) });
        Scene { seed, overlay, base }
    }

    /// The overlay over a base of the program's.
    async fn open<O: BlockDevice, B: BlockDevice>(
        &self,
        overlay: O,
        base: B,
        options: Options,
    ) -> Result<Image<O>, Error> {
        let read_only = Options { read_only: true, ..Options::default() };
        Image::open_with_backing(overlay, self.beneath(base, read_only).await?, options).await
    }

    /// The base, with what is behind it.
    async fn beneath<B: BlockDevice>(&self, base: B, options: Options) -> Result<BackingFile<B>, Error> {
        let Some(kind) = self.base else { return Ok(BackingFile::Raw(base)) };
        Ok(BackingFile::Image(Box::new(match kind.backing.open(Delay::None).await {
            Some(behind) => Image::open_with_backing(base, behind, options).await?,
            None => Image::open(base, options).await?,
        })))
    }

    /// Fills both with data, zeroes and holes: the bytes of both files.
    fn make(&self, rng: &mut SmallRng) -> (Vec<u8>, Vec<u8>) {
        let base = match self.base {
            Some(kind) => {
                let device = MemoryDevice::new(kind.create());
                block_on(async {
                    let BackingFile::Image(image) = self.beneath(device.clone(), options()).await.unwrap() else {
                        unreachable!("the base is an image")
                    };
                    scatter(&image, 1, rng).await;
                    image.close().await.unwrap();
                });
                device.contents()
            }
            None => content::data(0, self.overlay.backing.sectors(), 1),
        };
        let device = MemoryDevice::new(self.overlay.create());
        block_on(async {
            let image = self.open(device.clone(), MemoryDevice::new(base.clone()), options()).await.unwrap();
            scatter(&image, 2, rng).await;
            if self.overlay.refcount_bits >= 4 && rng.random_bool(0.3) {
                image.create_snapshot("before").await.unwrap();
                scatter(&image, 3, rng).await;
            }
            image.close().await.unwrap();
        });
        (device.contents(), base)
    }

    /// Everything that a power cut leaves is right, and the disk reads as it must.
    fn judge(&self, overlay: &[u8], base: &[u8], disk: &[u8], qemu: bool) -> Result<(), String> {
        verify::our_check(overlay, Tolerance::Leaks).map_err(|e| format!("the overlay: {e}"))?;
        if self.base.is_some() {
            verify::our_check(base, Tolerance::Leaks).map_err(|e| format!("the base: {e}"))?;
        }
        if qemu {
            self.judge_with_qemu(overlay, base, disk)?;
        }
        let device = MemoryDevice::new(overlay.to_vec());
        let found = verify::at_once(tokio::task::unconstrained(async {
            let image = self.open(device.clone(), MemoryDevice::new(base.to_vec()), options()).await?;
            let found = contents(&image).await?;
            image.close().await?;
            Ok(found)
        }));
        let found = found?.map_err(|e: Error| format!("it does not open: {e}"))?;
        compare(&found, disk)?;
        verify::our_check(&device.contents(), Tolerance::Clean)
            .map(|_| ())
            .map_err(|e| format!("after opening and closing: {e}"))
    }

    fn judge_with_qemu(&self, overlay: &[u8], base: &[u8], disk: &[u8]) -> Result<(), String> {
        verify::qemu_check(overlay, Tolerance::Leaks).map_err(|e| format!("the overlay: {e}"))?;
        if self.base.is_some() {
            verify::qemu_check(base, Tolerance::Leaks).map_err(|e| format!("the base: {e}"))?;
        }
        // Under the name that the overlay knows, which was another file's when the overlay was made.
        let name = self.overlay.backing.chain().unwrap().name.clone();
        let before = std::fs::read(chain::directory().join(&name)).unwrap();
        std::fs::write(chain::directory().join(&name), base).unwrap();
        let found = verify::qemu_contents(overlay);
        std::fs::write(chain::directory().join(&name), before).unwrap();
        compare(&found?, disk).map_err(|e| format!("read by QEMU: {e}"))
    }
}

fn options() -> Options {
    Options { keep_erased: 2048, runtime_asserts: true, compact_after_unmaps: None, ..Options::default() }
}

fn compare(found: &[u8], disk: &[u8]) -> Result<(), String> {
    if found.len() != disk.len() {
        return Err(format!("the disk has {} bytes, {} are right", found.len(), disk.len()));
    }
    let sectors = found.chunks(SECTOR).zip(disk.chunks(SECTOR)).enumerate();
    match sectors.into_iter().find(|(_, (found, right))| found != right) {
        Some((sector, (found, right))) => {
            let (found, right) = (content::recognise(found), content::recognise(right));
            Err(format!("sector {sector} holds {found}, {right} is right"))
        }
        None => Ok(()),
    }
}

async fn contents<D: BlockDevice>(image: &Image<D>) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; image.virtual_size() as usize];
    image.read(0, IoBufMut::new(&mut bytes)).await?;
    Ok(bytes)
}

/// Data, zeroes and holes, of any lengths.
async fn scatter<D: BlockDevice>(image: &Image<D>, version: u64, rng: &mut SmallRng) {
    let sectors = image.virtual_size() / SECTOR as u64;
    let mut first = 0;
    while first < sectors {
        let count = rng.random_range(1..=9).min(sectors - first);
        let (at, length) = (first * SECTOR as u64, count * SECTOR as u64);
        match rng.random_range(0..5) {
            0 | 1 => image.write(at, IoBuf::new(&content::data(first, count, version))).await.unwrap(),
            2 => image.write_zeroes(at, length, rng.random()).await.unwrap(),
            _ => {}
        }
        first += count;
    }
}

/// A commit on two devices, and a judge who looks at what a power cut could leave whenever anything happens on either.
struct Stage {
    scene: Scene,
    overlay: SimDevice,
    base: SimDevice,
    disk: Arc<Vec<u8>>,
    failure: Arc<Mutex<Option<String>>>,
    /// How many images were looked at.
    seen: Arc<Mutex<u64>>,
}

impl Stage {
    fn new(seed: u64) -> Stage {
        let mut rng = SmallRng::seed_from_u64(seed);
        let scene = Scene::new(seed, &mut rng);
        let (overlay, base) = scene.make(&mut rng);
        let disk = block_on(async {
            let read_only = Options { read_only: true, ..options() };
            let (overlay, base) = (MemoryDevice::new(overlay.clone()), MemoryDevice::new(base.clone()));
            contents(&scene.open(overlay, base, read_only).await.unwrap()).await.unwrap()
        });
        let settings = Settings { delay: Delay::None, ..Settings::new(seed) };
        Stage {
            scene,
            overlay: SimDevice::new(overlay, settings),
            base: SimDevice::new(base, settings),
            disk: Arc::new(disk),
            failure: Arc::default(),
            seen: Arc::default(),
        }
    }

    fn watch(&self) {
        for device in [&self.overlay, &self.base] {
            let (overlay, base, disk) = (self.overlay.clone(), self.base.clone(), self.disk.clone());
            let (failure, seen, scene) = (self.failure.clone(), self.seen.clone(), self.scene);
            let rng = Mutex::new(SmallRng::seed_from_u64(scene.seed));
            device.observe(move |_, event| {
                if failure.lock().is_some() || !event.ends_with("in flight") {
                    return;
                }
                for (overlay, base) in crash::pairs([&overlay.epoch(event), &base.epoch(event)], 2, &mut rng.lock()) {
                    *seen.lock() += 1;
                    let qemu = seen.lock().is_multiple_of(97);
                    if let Err(found) = scene.judge(&overlay, &base, &disk, qemu) {
                        *failure.lock() = Some(format!("{scene:?}, cut at: {event}: {found}"));
                        return;
                    }
                }
            });
        }
    }

    async fn commit(&self) -> Result<CommitReport, Error> {
        let base = self.scene.beneath(self.base.clone(), options()).await?;
        commit_into(self.overlay.clone(), base, &options(), &mut |_| true).await
    }

    /// What was wrong while it was watched.
    fn end(&self) -> Result<u64, String> {
        sim::end([&self.overlay, &self.base]).map_err(|violation| format!("{:?}: {violation}", self.scene))?;
        match self.failure.lock().take() {
            Some(found) => Err(found),
            None => Ok(*self.seen.lock()),
        }
    }
}

/// One commit, with power cuts at every moment; how many images were looked at.
pub fn play(seed: u64) -> Result<u64, String> {
    let stage = Stage::new(seed);
    let scene = stage.scene;
    stage.watch();
    let report = in_paused_time(stage.commit());
    let seen = stage.end()?;
    let report = report?.map_err(|e| format!("{scene:?}: {e}"))?;
    let (overlay, base) = (stage.overlay.contents(), stage.base.contents());
    scene.judge(&overlay, &base, &stage.disk, true).map_err(|e| format!("{scene:?}, afterwards: {e}"))?;
    for (image, what) in [(Some(&overlay), "overlay"), (scene.base.map(|_| &base), "base")] {
        let Some(image) = image else { continue };
        verify::our_check(image, Tolerance::Clean).map_err(|e| format!("{scene:?}, the {what} afterwards: {e}"))?;
    }
    if report.done != stage.disk.len() as u64 {
        return Err(format!("{scene:?}: {report:?}"));
    }
    // Alone, the base is the disk now.
    let alone = block_on(async {
        match scene.beneath(MemoryDevice::new(base.clone()), Options { read_only: true, ..options() }).await? {
            BackingFile::Raw(_) => Ok(base),
            BackingFile::Image(image) => contents(&image).await,
        }
    });
    let alone = alone.map_err(|e: Error| format!("{scene:?}: {e}"))?;
    compare(&alone[..stage.disk.len().min(alone.len())], &stage.disk)
        .map_err(|e| format!("{scene:?}, the base: {e}"))?;
    Ok(seen)
}

#[test]
fn power_cuts_change_nothing_that_the_disk_holds() {
    let (mut commits, mut crash_images) = (0, 0);
    for seed in Slice::new(30, 30, 0.8) {
        crash_images += play(seed).unwrap_or_else(|found| panic!("QCR_SEED={seed}: {found}"));
        commits += 1;
    }
    println!("{commits} commits, {crash_images} crash images");
    slice::tell(&[("histories", commits), ("crash_images", crash_images)]);
}

/// Every call of either device fails once: an error comes back, the disk reads as before, and another attempt does the work.
#[test]
fn failures_change_nothing_that_the_disk_holds() {
    for seed in 1..16 {
        for (on_base, after) in (0..40).flat_map(|n| [(true, n), (false, n)]) {
            let stage = Stage::new(seed);
            let scene = stage.scene;
            let device = if on_base { &stage.base } else { &stage.overlay };
            let errno = if after % 2 == 0 { libc::EIO } else { libc::ENOSPC };
            device.arm(Fault { after, errno, lasting: false, only: None });
            let done = in_paused_time(stage.commit()).unwrap();
            let fired = device.disarm();
            let at = format!("seed {seed}, {scene:?}, {fired:?}");
            let mut rng = SmallRng::seed_from_u64(seed);
            for (overlay, base) in crash::pairs([&stage.overlay.epoch(""), &stage.base.epoch("")], 2, &mut rng) {
                scene.judge(&overlay, &base, &stage.disk, false).unwrap_or_else(|found| panic!("{at}: {found}"));
            }
            if done.is_err() {
                assert!(!fired.is_empty(), "{at}: {done:?}");
                in_paused_time(stage.commit()).unwrap().unwrap_or_else(|e| panic!("{at}, again: {e}"));
            }
            let (overlay, base) = (stage.overlay.contents(), stage.base.contents());
            scene.judge(&overlay, &base, &stage.disk, false).unwrap_or_else(|found| panic!("{at}, again: {found}"));
        }
    }
}

#[test]
fn what_cannot_be_behind_an_image_is_refused() {
    let stage = Stage::new(1);
    let memory = |device: &SimDevice| MemoryDevice::new(device.contents());
    let bad = |result: Result<(), Error>, part: &str| {
        let error = result.unwrap_err();
        assert!(matches!(&error, Error::BadOption { name, .. } if name == "backing"), "{error}");
        assert!(error.to_string().contains(part), "{error}");
    };
    let scene =
        (1..).map(Stage::new).find(|stage| stage.scene.base.is_some_and(|base| !base.backing.exists())).unwrap();
    block_on(async {
        // One that may change under the overlay's eyes.
        let base = Image::open(memory(&scene.base), options()).await.unwrap();
        let opened =
            Image::open_with_backing(memory(&scene.overlay), BackingFile::Image(Box::new(base)), options()).await;
        bad(opened.map(drop), "open for writing");
        // One that nothing asks for.
        let raw = BackingFile::Raw(memory(&stage.base));
        let opened = Image::open_with_backing(memory(&scene.base), raw, options()).await;
        bad(opened.map(drop), "no backing file");
        let raw = BackingFile::Raw(memory(&stage.base));
        let done = commit_into(memory(&scene.base), raw, &options(), &mut |_| true).await;
        bad(done.map(drop), "no backing file");
        // And one that a commit cannot write to.
        let read_only = Image::open(memory(&scene.base), Options { read_only: true, ..options() }).await.unwrap();
        let base = BackingFile::Image(Box::new(read_only));
        let error = commit_into(memory(&scene.overlay), base, &options(), &mut |_| true).await.unwrap_err();
        assert!(matches!(error, Error::Backing { .. }), "{error}");
    });
    // Nothing of that has changed anything.
    let (overlay, base) = (scene.overlay.contents(), scene.base.contents());
    scene.scene.judge(&overlay, &base, &scene.disk, false).unwrap();
}
