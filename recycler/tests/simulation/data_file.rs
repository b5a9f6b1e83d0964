//! Images whose guest data is in an external data file, under power cuts: at every moment each of the two files may have lost
//! any part of what was written to it since its own last flush.
//!
//! `QCR_SEED=n cargo test --test simulation data_file::` replays a seed.

use std::sync::Arc;

use crate::common::content::{self, Content, SECTOR};
use crate::common::crash;
use crate::common::encryption::Encryption;
use crate::common::memory::MemoryDevice;
use crate::common::model::Model;
use crate::common::sim::{self, Delay, Fault, Settings, SimDevice};
use crate::common::slice;
use crate::common::verify::{self, Tolerance, in_paused_time};
use parking_lot::Mutex;
use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::device::Features;
use qcow_recycler::image::{DataFileOptions, create_with_data};
use qcow_recycler::{BlockDevice, CreateOptions, Error, ExtentKind, Image, Options};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Size of the disk in sectors at first, without subclusters.
const SECTORS: u64 = 61;
/// The number of the write that the data file's stale contents look like.
const STALE: u64 = 1 << 40;

/// What a history is played on.
#[derive(Clone, Copy, Debug)]
struct Config {
    seed: u64,
    raw: bool,
    cluster_size: u64,
    extended_l2: bool,
    encryption: Encryption,
    /// What the data file's device can do.
    data: Features,
}

impl Config {
    fn new(seed: u64, rng: &mut SmallRng) -> Config {
        let punch = rng.random_bool(0.7);
        let extended_l2 = rng.random_bool(0.4);
        // Subclusters of one, two or four sectors.
        let cluster_sizes = if extended_l2 { [16384, 32768, 32768, 65536] } else { [512, 1024, 2048, 4096] };
        Config {
            seed,
            raw: rng.random_bool(0.4),
            cluster_size: cluster_sizes[rng.random_range(0..4)],
            extended_l2,
            encryption: match rng.random_range(0..10) {
                0..6 => Encryption::None,
                6..8 => Encryption::Aes,
                _ => Encryption::Luks,
            },
            data: Features { resize: rng.random_bool(0.8), punch_hole: punch, write_zeroes: punch, copy_range: false },
        }
    }

    /// Size of the disk in sectors at first.
    fn sectors(&self) -> u64 {
        if self.extended_l2 { 4 * SECTORS } else { SECTORS }
    }

    /// The most sectors that one request is for, but for those that are for much more.
    fn longest(&self, rng: &mut SmallRng) -> u64 {
        let cluster = self.cluster_size / SECTOR as u64;
        if self.extended_l2 && rng.random_bool(0.2) { 2 * cluster } else { 13 }
    }
}

fn options(config: Config) -> Options {
    Options {
        keep_erased: 4096,
        runtime_asserts: true,
        compact_after_unmaps: None,
        passphrase: config.encryption.passphrase(),
        ..Options::default()
    }
}

/// The bytes of a new image, and of a data file full of what somebody else left there, or empty if it is raw.
fn made(config: Config) -> (Vec<u8>, Vec<u8>) {
    let name = "data.raw".to_owned();
    let wanted = CreateOptions {
        cluster_size: config.cluster_size,
        extended_l2: config.extended_l2,
        data_file: Some(DataFileOptions { name, raw: config.raw }),
        ..CreateOptions::new(config.sectors() * SECTOR as u64)
    };
    let (image, data) = (MemoryDevice::new(Vec::new()), MemoryDevice::new(Vec::new()));
    block_on(create_with_data(&image, &data, &wanted)).unwrap();
    assert_eq!(data.contents().len(), config.sectors() as usize * SECTOR);
    // A file of fixed length has room for a larger disk.
    let sectors = if config.data.resize { config.sectors() } else { config.sectors() * 2 };
    let data = if config.raw { vec![0; sectors as usize * SECTOR] } else { content::data(0, sectors, STALE) };
    (config.encryption.apply(image.contents()), data)
}

async fn open<D: BlockDevice>(config: Config, image: D, data: D) -> Result<Image<D>, Error> {
    Image::open_with_data(image, data, options(config)).await
}

async fn contents<D: BlockDevice>(image: &Image<D>) -> Result<Vec<u8>, Error> {
    let mut bytes = vec![0; image.virtual_size() as usize];
    image.read(0, IoBufMut::new(&mut bytes)).await?;
    Ok(bytes)
}

/// Everything that a power cut leaves is right, and what is recovered reads as the model allows, also after a clean close.
fn judge(config: Config, image: Vec<u8>, data: Vec<u8>, model: &Model) -> Result<(), String> {
    verify::our_check(&image, Tolerance::Leaks)?;
    let raw = data.clone();
    let (image, data) = (MemoryDevice::new(image), MemoryDevice::new(data));
    // The runtime that this is called in would have a task that has done so much rest before it goes on.
    let found = verify::at_once(tokio::task::unconstrained(async {
        let opened = open(config, image.clone(), data.clone()).await?;
        let found = contents(&opened).await?;
        opened.close().await?;
        Ok(found)
    }));
    let found = found?.map_err(|e: Error| format!("it does not open: {e}"))?;
    if !model.size_may_survive((found.len() / SECTOR) as u64) {
        return Err(format!("the disk has {} bytes", found.len()));
    }
    model.survived(&found).map_err(|m| format!("{m}; {}", model.explain(m.sector)))?;
    verify::our_check(&image.contents(), Tolerance::Clean)?;
    if config.raw && config.encryption == Encryption::None {
        // As long as the disk, or longer where a change of the size was cut off.
        let there = &raw[..raw.len().min(found.len())];
        let same = there == &found[..there.len()] && found[there.len()..].iter().all(|&b| b == 0);
        return if same { Ok(()) } else { Err("the raw data file does not read as the disk does".into()) };
    }
    Ok(())
}

/// The two devices, and a judge who looks at what a power cut could leave whenever anything happens on either.
struct Scene {
    config: Config,
    image: SimDevice,
    data: SimDevice,
    model: Arc<Mutex<Model>>,
    failure: Arc<Mutex<Option<String>>>,
    looked_at: Arc<Mutex<u64>>,
}

impl Scene {
    fn new(config: Config) -> Scene {
        let (image, data) = made(config);
        let delay = if config.seed.is_multiple_of(2) { Delay::Yields(2) } else { Delay::None };
        let settings = Settings { delay, ..Settings::new(config.seed) };
        let data_settings = Settings { features: config.data, ..settings };
        Scene {
            config,
            image: SimDevice::new(image, settings),
            data: SimDevice::new(data, data_settings),
            model: Arc::new(Mutex::new(Model::new(config.sectors()))),
            failure: Arc::default(),
            looked_at: Arc::default(),
        }
    }

    fn watch(&self) {
        for device in [&self.image, &self.data] {
            let (image, data, model) = (self.image.clone(), self.data.clone(), self.model.clone());
            let (failure, looked_at, config) = (self.failure.clone(), self.looked_at.clone(), self.config);
            let rng = Mutex::new(SmallRng::seed_from_u64(config.seed));
            device.observe(move |_, event| {
                if failure.lock().is_some() {
                    return;
                }
                let (image, data) = (image.epoch(event), data.epoch(event));
                let model = model.lock();
                for (image, data) in crash::pairs([&image, &data], 3, &mut rng.lock()) {
                    *looked_at.lock() += 1;
                    if let Err(found) = judge(config, image, data, &model) {
                        *failure.lock() = Some(format!("{config:?}, cut at: {event}: {found}"));
                        return;
                    }
                }
            });
        }
    }

    fn end(&self) -> Result<u64, String> {
        sim::end([&self.image, &self.data]).map_err(|violation| format!("{:?}: {violation}", self.config))?;
        match self.failure.lock().take() {
            Some(found) => Err(found),
            None => Ok(*self.looked_at.lock()),
        }
    }
}

/// A write, discard or zeroing of a range.
#[derive(Clone, Copy, Debug)]
enum Change {
    Write,
    Discard,
    Zeroes { may_unmap: bool },
}

async fn change(
    image: &Image<SimDevice>,
    model: &Mutex<Model>,
    change: Change,
    first: u64,
    count: u64,
) -> Result<(), Error> {
    let (at, length) = (first * SECTOR as u64, count * SECTOR as u64);
    let (request, bytes) = {
        let mut model = model.lock();
        let version = model.next_version();
        let request = model.begin(first, count, |sector, _| {
            vec![if matches!(change, Change::Write) { Content::Data { sector, version } } else { Content::Zero }]
        });
        (request, content::data(first, count, version))
    };
    let result = match change {
        Change::Write => image.write(at, IoBuf::new(&bytes)).await,
        Change::Discard => image.discard(at, length).await,
        Change::Zeroes { may_unmap } => image.write_zeroes(at, length, may_unmap).await,
    };
    let mut model = model.lock();
    if result.is_ok() {
        model.end(request)
    } else {
        model.fail(request)
    }
    result
}

fn some_change(rng: &mut SmallRng) -> Change {
    match rng.random_range(0..10) {
        0..6 => Change::Write,
        6..8 => Change::Discard,
        n => Change::Zeroes { may_unmap: n == 8 },
    }
}

fn range(config: Config, rng: &mut SmallRng, sectors: u64) -> (u64, u64) {
    let first = rng.random_range(0..sectors);
    let longest = config.longest(rng);
    (first, rng.random_range(1..=(sectors - first).min(longest)))
}

/// Two changes at once, of neighbouring ranges, which often share a cluster.
async fn two_at_once(
    config: Config,
    image: &Image<SimDevice>,
    model: &Mutex<Model>,
    rng: &mut SmallRng,
) -> Result<(), Error> {
    let sectors = model.lock().size();
    let (first, count) = range(config, rng, sectors);
    let middle = first + count / 2;
    let (one, two) = (some_change(rng), some_change(rng));
    let left = async { if middle > first { change(image, model, one, first, middle - first).await } else { Ok(()) } };
    let right = change(image, model, two, middle, first + count - middle);
    let (left, right) = tokio::join!(left, right);
    left.and(right)
}

async fn resize(image: &Image<SimDevice>, model: &Mutex<Model>, sectors: u64) -> Result<(), Error> {
    let before = model.lock().size();
    model.lock().resize(sectors);
    let result = image.resize(sectors * SECTOR as u64, true).await;
    let mut model = model.lock();
    if result.is_ok() {
        model.size_flushed()
    } else {
        model.resize_failed(before)
    }
    result
}

/// A random step; whether the image was closed by it.
async fn step(
    config: Config,
    image: &Image<SimDevice>,
    model: &Mutex<Model>,
    rng: &mut SmallRng,
) -> Result<bool, Error> {
    match rng.random_range(0..20) {
        0..9 => {
            let (first, count) = range(config, rng, model.lock().size());
            change(image, model, some_change(rng), first, count).await?;
        }
        9..12 => two_at_once(config, image, model, rng).await?,
        12..16 => {
            let began = model.lock().flush_begins();
            image.flush().await?;
            model.lock().flushed(began);
        }
        16 => {
            let sectors = rng.random_range(20..config.sectors() * 2);
            resize(image, model, sectors).await?;
        }
        17 => {
            qcow_recycler::recycler::compact(image, &mut |_| true).await?;
        }
        18 => {
            let bytes = contents(image).await?;
            let mut model = model.lock();
            if let Err(m) = model.read(0, &bytes) {
                panic!("{m}; {}", model.explain(m.sector));
            }
        }
        _ => {
            let began = model.lock().flush_begins();
            image.close().await?;
            model.lock().flushed(began);
            return Ok(true);
        }
    }
    Ok(false)
}

/// A history of random steps, with power cuts at every moment; how many images were looked at.
pub fn play(seed: u64) -> Result<u64, String> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let scene = Scene::new(Config::new(seed, &mut rng));
    scene.watch();
    let failed = in_paused_time(async {
        let mut steps = rng.random_range(3..10);
        while steps > 0 && scene.failure.lock().is_none() {
            let image = open(scene.config, scene.image.clone(), scene.data.clone()).await?;
            let mut closed = false;
            while !closed && steps > 0 && scene.failure.lock().is_none() {
                closed = step(scene.config, &image, &scene.model, &mut rng).await?;
                steps -= 1;
            }
            if !closed {
                let began = scene.model.lock().flush_begins();
                image.close().await?;
                scene.model.lock().flushed(began);
            }
        }
        Ok::<(), Error>(())
    });
    let looked_at = scene.end()?;
    failed?.map_err(|e| format!("{:?}: {e}", scene.config))?;
    judge(scene.config, scene.image.contents(), scene.data.contents(), &scene.model.lock())?;
    let size = scene.model.lock().size() as usize * SECTOR;
    let (length, fixed) = (scene.data.contents().len(), !scene.config.data.resize);
    if length != size && !fixed {
        return Err(format!("{:?}: the data file has {length} bytes, the disk {size}", scene.config));
    }
    Ok(looked_at)
}

#[test]
fn power_cuts_lose_nothing_of_either_file() {
    let (mut histories, mut crash_images) = (0, 0);
    for seed in slice::Slice::new(20, 20, 0.8) {
        crash_images += play(seed).unwrap_or_else(|found| panic!("QCR_SEED={seed}: {found}"));
        histories += 1;
    }
    slice::tell(&[("histories", histories), ("crash_images", crash_images)]);
}

/// Reads under way while what they read is discarded and flushed: the hole in an encrypted data file comes after them.
/// Each sector they find is what it was, or zeroes.
pub fn reads_under_discards(seed: u64) -> Result<(), String> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut config = Config::new(seed, &mut rng);
    config.data.punch_hole = true;
    config.encryption = if rng.random_bool(0.5) { Encryption::Aes } else { Encryption::Luks };
    let (image, data) = made(config);
    let settings = Settings::new(seed);
    let slow = Settings { delay: Delay::Sleeps { yields: 2, millis: 20 }, features: config.data, ..settings };
    let (image, data) = (SimDevice::new(image, settings), SimDevice::new(data, slow));
    let found = in_paused_time(async {
        let image = open(config, image, data).await?;
        let sectors = config.sectors() & !1;
        image.write(0, IoBuf::new(&content::data(0, sectors, 1))).await?;
        image.flush().await?;
        let mut bytes = vec![0; sectors as usize * SECTOR];
        let read = image.read(0, IoBufMut::new(&mut bytes));
        let lost = async {
            image.discard(0, sectors * SECTOR as u64).await?;
            image.flush().await
        };
        let (read, lost) = tokio::join!(read, lost);
        read.and(lost)?;
        image.close().await?;
        Ok::<_, Error>(bytes)
    });
    let bytes = found.unwrap().unwrap_or_else(|e| panic!("{config:?}: {e}"));
    for (sector, bytes) in (0..).zip(bytes.chunks(SECTOR)) {
        match content::recognise(bytes) {
            Content::Zero => {}
            Content::Data { sector: s, version: 1 } if s == sector => {}
            other => return Err(format!("{config:?}: sector {sector} reads as {other:?}")),
        }
    }
    Ok(())
}

#[test]
fn a_hole_comes_after_the_reads_under_way() {
    for seed in 1..=60 {
        reads_under_discards(seed).unwrap_or_else(|found| panic!("seed {seed}: {found}"));
    }
}

/// Every call of either device fails once: an error comes back, and nothing that was durable is lost.
#[test]
fn failures_lose_nothing() {
    for seed in 1..13 {
        for (on_data, after) in (0..30).flat_map(|n| [(true, n), (false, n)]) {
            let mut rng = SmallRng::seed_from_u64(seed);
            let scene = Scene::new(Config::new(seed, &mut rng));
            let device = if on_data { &scene.data } else { &scene.image };
            let errno = if rng.random_bool(0.5) { libc::EIO } else { libc::ENOSPC };
            in_paused_time(async {
                let image = open(scene.config, scene.image.clone(), scene.data.clone()).await.unwrap();
                for _ in 0..3 {
                    step(scene.config, &image, &scene.model, &mut rng).await.ok();
                }
                device.arm(Fault { after, errno, lasting: false, only: None });
                for _ in 0..6 {
                    // Whatever becomes of it, the next one finds the image usable or closed to changes.
                    step(scene.config, &image, &scene.model, &mut rng).await.ok();
                }
                device.disarm();
            })
            .unwrap();
            for (image, data) in crash::pairs([&scene.image.epoch(""), &scene.data.epoch("")], 3, &mut rng) {
                judge(scene.config, image, data, &scene.model.lock())
                    .unwrap_or_else(|found| panic!("seed {seed}, {on_data} {after}, {:?}: {found}", scene.config));
            }
        }
    }
}

fn plain(raw: bool) -> (Image<MemoryDevice>, MemoryDevice, MemoryDevice) {
    let features = Features { resize: true, punch_hole: true, write_zeroes: true, copy_range: false };
    let (encryption, extended_l2) = (Encryption::None, false);
    let config = Config { seed: 1, raw, cluster_size: 4096, extended_l2, encryption, data: features };
    on_memory(config)
}

fn on_memory(config: Config) -> (Image<MemoryDevice>, MemoryDevice, MemoryDevice) {
    let (image, data) = made(config);
    let (image, data) = (MemoryDevice::new(image), MemoryDevice::new(data));
    (block_on(open(config, image.clone(), data.clone())).unwrap(), image, data)
}

#[test]
fn data_lies_where_it_is_on_the_disk() {
    let (image, _, data) = plain(false);
    block_on(image.write(0, IoBuf::new(&[1; 512]))).unwrap();
    block_on(image.write(9 * 512, IoBuf::new(&[2; 512]))).unwrap();
    for (at, kind) in [(0, ExtentKind::Data { host_offset: 0 }), (8192, ExtentKind::Unallocated)] {
        assert_eq!(block_on(image.extent(at, 4096)).unwrap().kind, kind);
    }
    let there = data.contents();
    assert_eq!((there[0], there[512], there[8 * 512], there[9 * 512]), (1, 0, 0, 2), "zeroes around the data");
    // What is not in use is left alone.
    assert_eq!(content::recognise(&there[16 * 512..17 * 512]), Content::Data { sector: 16, version: STALE });
    let info = image.info();
    assert_eq!((info.data_file.as_deref(), info.data_file_raw), (Some("data.raw"), false));
    assert!(info.pinned[0].contains("external data file"), "{:?}", info.pinned);
    block_on(image.close()).unwrap();
}

#[test]
fn a_device_without_a_data_file_is_refused_and_so_is_one_too_many() {
    let (image, bytes, _) = plain(false);
    block_on(image.close()).unwrap();
    let before = bytes.contents();
    let directory = std::path::PathBuf::from("/");
    for (policy, part) in [
        (qcow_recycler::DataFilePolicy::Refuse, "did not allow"),
        (qcow_recycler::DataFilePolicy::Allow { directory }, "data.raw"),
    ] {
        let refused = block_on(Image::open(bytes.clone(), Options { data_file: policy, ..Options::default() }));
        let error = refused.err().unwrap().to_string();
        assert!(error.contains(part), "{error}");
    }
    // Without it everything but the disk's contents is there.
    let skip = Options { data_file: qcow_recycler::DataFilePolicy::Skip, ..Options::default() };
    let image = block_on(Image::open(bytes.clone(), skip)).unwrap();
    let refused = block_on(image.write(0, IoBuf::new(&[1; 512]))).unwrap_err();
    assert!(matches!(refused, Error::DataFileNotAllowed { .. }), "{refused}");
    assert!(block_on(image.discard(0, 4096)).is_err() && block_on(image.resize(1 << 20, false)).is_err());
    assert!(block_on(image.check()).unwrap().is_clean());
    block_on(image.close()).unwrap();

    let plain = MemoryDevice::new(Vec::new());
    block_on(qcow_recycler::image::create(&plain, &CreateOptions::new(1 << 20))).unwrap();
    let error = block_on(Image::open_with_data(plain.clone(), plain, Options::default())).err().unwrap();
    assert!(error.to_string().contains("no external data file"), "{error}");
    let short = MemoryDevice::with(vec![0; 512], Features::default());
    let error = block_on(Image::open_with_data(bytes.clone(), short, Options::default())).err().unwrap();
    assert!(error.to_string().contains("cannot grow"), "{error}");
    verify::our_check(&before, Tolerance::Clean).unwrap();
}
