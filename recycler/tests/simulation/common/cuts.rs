//! Cutting the power: plays a history on a device that forgets, keeps the moments at which something new is in doubt or
//! less is allowed than before, and looks at the images that a power cut would leave at each.

use std::collections::HashSet;
use std::collections::hash_map::DefaultHasher;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::ops::AddAssign;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use parking_lot::Mutex;
use qcow_recycler::device::Features;
use qcow_recycler::recycler::compact;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::chain::Behind;
use super::config::{Config, ImageKind, Scale};
use super::content::{Content, SECTOR, recognise};
use super::crash::{Atom, Effort, Epoch};
use super::encryption::Encryption;
use super::guests::{Clock, Errors, Failure, Shared, Work};
use super::history::{History, Length, Op, Round};
use super::model::Model;
use super::play;
use super::sim::{Delay, Settings, SimDevice};
use super::slice;
use super::verify::{self, Depth};

/// What a history starts from.
#[derive(Clone)]
pub struct Start {
    /// The image file.
    pub image: Vec<u8>,
    /// What its disk, and its internal snapshot, hold.
    pub model: Model,
}

/// What QEMU does to an image before anything else happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Made {
    Plain,
    /// What it holds is in an internal snapshot, too.
    WithSnapshot,
    /// Its clusters are compressed, those that compress at all.
    Compressed,
}

impl Start {
    /// A new image.
    pub fn empty(config: &Config) -> Start {
        Start { image: config.create(), model: Model::over(config.image.backing, config.image.sectors) }
    }

    /// What a history leaves after it was closed.
    pub fn after(history: &History, made: Made) -> Result<Start, Failure> {
        let shared = Shared::new(history.config, Clock::Tokio, Errors::None);
        let device = SimDevice::new(history.config.create(), history.config.device(false));
        play::in_paused_time(&shared, async { play::play(history, &device, &shared, |_| Ok(())).await })?;
        let image = device.contents();
        let disk = verify::disk_contents(&image, &history.config).map_err(|e| shared.failure(e))?;
        let mut model = shared.model.lock().clone();
        model.settle(&disk);
        let image = match made {
            Made::Plain => image,
            Made::WithSnapshot => verify::with_snapshot(&image),
            Made::Compressed => verify::compressed(&image, &history.config.image),
        };
        if made == Made::WithSnapshot {
            model.taken.insert(verify::SNAPSHOT, &disk);
        }
        Ok(Start { image, model })
    }
}

/// A random history, and what it starts from: a new image, or one full of holes, so that the recycler has work from the
/// start.
pub fn random_history(seed: u64) -> (History, Start) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let config = Config::random(seed, Scale::Tiny, &mut rng);
    let compare = rng.random_bool(0.3);
    let history = History::random(config, Length { rounds: 3, guests: 3, ops: 12 }, &mut rng);
    let start = if rng.random_bool(0.3) { Start::empty(&config) } else { full_of_holes(config, &mut rng) };
    (History { compare, ..history }, start)
}

/// Guests and compactions on the same sectors at the same time, on a device with long delays.
pub fn racing_history(seed: u64) -> (History, Start) {
    let mut rng = SmallRng::seed_from_u64(seed ^ 0x7261_6365);
    let mut config = Config::random(seed, Scale::Tiny, &mut rng);
    config.delay = Delay::Sleeps { yields: 2, millis: rng.random_range(2..8) };
    config.overlap = true;
    config.compact_after_unmaps = Some(1 << config.image.cluster_bits);
    config.settle = Duration::from_millis(1);
    let start = full_of_holes(config, &mut rng);
    (History::racing(config, &mut rng), start)
}

/// Clusters are reused under slow requests: the recycler keeps a large pool, so that what is freed is soon handed out.
pub fn reusing_history(seed: u64) -> (History, Start) {
    let mut rng = SmallRng::seed_from_u64(seed ^ 0x7265_7573);
    let mut config = Config::random(seed, Scale::Tiny, &mut rng);
    config.delay = Delay::Sleeps { yields: 1, millis: rng.random_range(2..6) };
    config.overlap = true;
    config.keep_erased = 64 << config.image.cluster_bits;
    config.compact_after_unmaps = None;
    let start = full_of_holes(config, &mut rng);
    (History::reusing(config, &mut rng), start)
}

/// Guest writes that take long while everything else is quick, so that moves and the reuse of clusters overtake them; or
/// flushes that do, so that guests write to what is being moved.
pub fn overtaken_history(seed: u64) -> (History, Start) {
    let mut rng = SmallRng::seed_from_u64(seed ^ 0x6f76_6572);
    let mut config = Config::random(seed, Scale::Tiny, &mut rng);
    config.delay =
        if seed.is_multiple_of(2) { Delay::SlowFlushes { millis: 80 } } else { Delay::SlowGuests { millis: 200 } };
    config.overlap = true;
    // Copying must not be as slow as the guest.
    config.features = Features { copy_range: true, ..config.features };
    config.keep_erased = 16 << config.image.cluster_bits;
    config.compact_after_unmaps = Some(1 << config.image.cluster_bits);
    config.settle = Duration::from_millis(1);
    config.flush_after = Duration::from_millis(1);
    let start = full_of_holes(config, &mut rng);
    (History::overtaken(config, &mut rng), start)
}

/// A file that is about to outgrow what its refcount table can name: the next growth needs a larger table, and a new place
/// for it. In every other one a snapshot has what is there, so that what is discarded stays counted.
pub fn outgrowing_history(seed: u64) -> (History, Start) {
    fn filled(made: Made) -> Start {
        let config = outgrowing_config(1);
        let history =
            History { config, compare: false, rounds: vec![Round::of(&[Op::Write { first: 0, count: 3620 }])] };
        Start::after(&history, made).unwrap_or_else(|failure| panic!("filling: {failure}"))
    }
    static MADE: LazyLock<Start> = LazyLock::new(|| filled(Made::Plain));
    static SNAPSHOT: LazyLock<Start> = LazyLock::new(|| filled(Made::WithSnapshot));
    let start = if (seed / 16).is_multiple_of(2) { &MADE } else { &SNAPSHOT };
    let (config, mut rng) = (outgrowing_config(seed), SmallRng::seed_from_u64(seed));
    let mut ops = Vec::new();
    for first in [3630, 3640] {
        ops.extend([Op::Write { first, count: rng.random_range(1..5) }, Op::Flush]);
        ops.push(Op::Discard { first: rng.random_range(0..3600), count: 3 });
    }
    (History { config, compare: false, rounds: vec![Round::of(&ops)] }, Start::clone(start))
}

fn outgrowing_config(seed: u64) -> Config {
    // Blocks that count few clusters, and a table of one cluster that names few blocks.
    let image = ImageKind {
        cluster_bits: 9,
        refcount_bits: 64,
        version: 3,
        lazy_refcounts: false,
        extended_l2: false,
        preallocated: false,
        zstd: false,
        encryption: Encryption::None,
        backing: Behind::Nothing,
        sectors: 3700,
    };
    let config = Config::random(seed, Scale::Tiny, &mut SmallRng::seed_from_u64(seed));
    let features = Settings::new(0).features;
    Config { image, features, delay: Delay::None, l2_cache_size: 4 << 20, room: 0, ..config }
}

/// A disk that was written whole, or in places if something is behind it, and then discarded in places.
pub fn full_of_holes(config: Config, rng: &mut SmallRng) -> Start {
    let (sectors, cluster) = (config.image.sectors, config.image.cluster_sectors());
    let mut ops = if config.image.backing.exists() {
        // Something shows of what is behind it, in pieces of clusters, too.
        let written = |_: &u64| rng.random_bool(0.6);
        let starts = (0..sectors).step_by(cluster.div_ceil(2) as usize).filter(written);
        starts.map(|first| Op::Write { first, count: cluster.div_ceil(2).min(sectors - first) }).collect()
    } else {
        vec![Op::Write { first: 0, count: sectors }]
    };
    for first in (0..sectors).step_by(cluster as usize) {
        if rng.random_bool(0.4) {
            ops.push(Op::Discard { first, count: cluster.min(sectors - first) });
        }
    }
    let history = History { config, compare: false, rounds: vec![Round::of(&ops)] };
    // A version 2 image with a snapshot cannot be resized.
    let snapshot = config.image.version > 2 && config.image.refcount_bits > 1 && rng.random_bool(0.2);
    let made = match (snapshot, config.seed % 8) {
        (true, _) => Made::WithSnapshot,
        // On a device of fixed length there must be room after the image, which QEMU does not leave.
        (false, 5) if config.features.resize => Made::Compressed,
        _ => Made::Plain,
    };
    Start::after(&history, made).unwrap_or_else(|failure| panic!("seed {}, filling: {failure}", config.seed))
}

/// How much one history may cost.
#[derive(Clone, Copy, Debug)]
pub struct Budget {
    /// Moments kept: an even, seeded share if there are more.
    pub moments: usize,
    pub effort: Effort,
    /// One crash image in so many is shown to QEMU; with 0 none.
    pub qemu: u64,
    /// One in so many loses the power again while it is recovered; with 0 none.
    pub twice: u64,
}

/// One in so many; with 0 none.
fn one_in(share: u64, number: u64) -> bool {
    share > 0 && number.is_multiple_of(share)
}

/// What was done.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub histories: u64,
    pub moments: u64,
    /// Moments of which every possible image was looked at.
    pub exhaustive: u64,
    /// Crash images that differ.
    pub images: u64,
    pub qemu: u64,
    /// Images that a second power cut would leave while the first one's is recovered (they are among `images`).
    pub twice: u64,
    pub work: Work,
}

impl Counts {
    /// Tells what was done.
    pub fn tell(&self) {
        let Counts { histories, images, qemu, twice, .. } = *self;
        slice::tell(&[("histories", histories), ("crash_images", images), ("crash_images_qemu", qemu)]);
        slice::tell(&[("second_power_cuts", twice)]);
    }
}

impl AddAssign for Counts {
    fn add_assign(&mut self, other: Counts) {
        self.histories += other.histories;
        self.moments += other.moments;
        self.exhaustive += other.exhaustive;
        self.images += other.images;
        self.qemu += other.qemu;
        self.twice += other.twice;
        self.work += other.work;
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Counts { histories, moments, exhaustive, images, qemu, twice, work } = self;
        write!(f, "{histories} histories, {moments} moments ({exhaustive} exhaustively), ")?;
        write!(f, "{images} distinct crash images, {qemu} of them checked by QEMU, {twice} after a second cut; {work}")
    }
}

/// An instant at which the power may be cut, and what must be on the disk then.
pub struct Moment {
    order: usize,
    epoch: Epoch,
    model: Model,
}

impl Moment {
    /// One of the images that a power cut could leave, and what must be in it.
    pub fn image(&self, rng: &mut SmallRng) -> (Vec<u8>, Model) {
        let selection: Vec<bool> = self.epoch.atoms.iter().map(|_| rng.random_bool(0.5)).collect();
        (self.epoch.image(&selection), self.model.clone())
    }
}

/// An even share of moments.
pub struct Reservoir {
    kept: Vec<Moment>,
    seen: usize,
    room: usize,
    rng: SmallRng,
}

impl Reservoir {
    /// Where the next moment goes, if it is to be kept: each of all has the same chance.
    fn slot(&mut self) -> Option<usize> {
        self.seen += 1;
        let slot = if self.seen <= self.room { self.seen - 1 } else { self.rng.random_range(0..self.seen) };
        (slot < self.room).then_some(slot)
    }
}

/// Plays a history and cuts the power at its moments.
///
/// # Errors
/// What is wrong with the history itself or with the first bad crash image.
pub fn play(history: &History, start: &Start, budget: Budget, counts: &mut Counts) -> Result<(), Failure> {
    play_then(history, start, budget, counts, || {})
}

/// The same; `played` is called in between.
///
/// # Errors
/// As there.
pub fn play_then(
    history: &History,
    start: &Start,
    budget: Budget,
    counts: &mut Counts,
    played: impl FnOnce(),
) -> Result<(), Failure> {
    counts.histories += 1;
    let config = history.config;
    let shared = Shared::new(config, Clock::Tokio, Errors::None);
    *shared.model.lock() = start.model.clone();
    let moments = moments(history, start, budget, &shared)?;
    played();
    counts.work += *shared.work.lock();
    // What led to the moment is told by the trace up to it, not by what came later.
    cut(&config, &moments, budget, counts).map_err(|(order, message)| {
        let mut failure = shared.failure(message);
        let marker = format!("moment {order}:");
        if let Some(at) = failure.trace.iter().position(|line| line.starts_with(&marker)) {
            failure.trace.truncate(at + 1);
        }
        failure
    })
}

fn moments(history: &History, start: &Start, budget: Budget, shared: &Arc<Shared>) -> Result<Vec<Moment>, Failure> {
    let config = history.config;
    let device = SimDevice::new(start.image.clone(), config.device(true));
    device.limit_operations(200_000);
    let watch = Watch::new(&device, shared, budget.moments);
    let result = play::in_paused_time(shared, async { play::play(history, &device, shared, |_| Ok(())).await });
    let kept = watch.end(&device, shared);
    result?;
    let broken = device.violations();
    if !broken.is_empty() {
        return Err(shared.failure(format!("rules of the device trait broken: {}", broken.join("; "))));
    }
    Ok(kept)
}

/// Keeps moments of what goes on on a device.
pub struct Watch(Arc<Mutex<Reservoir>>);

impl Watch {
    /// Keeps so many moments from now on.
    pub fn new(device: &SimDevice, shared: &Arc<Shared>, moments: usize) -> Watch {
        let rng = SmallRng::seed_from_u64(shared.config.seed ^ 0x6d6f_6d65);
        let reservoir = Arc::new(Mutex::new(Reservoir { kept: Vec::new(), seen: 0, room: moments, rng }));
        let keep = Self::keeper(reservoir.clone(), shared);
        // The end of an operation adds nothing to what a power cut may leave; its beginning does, and the end of a
        // guest's flush narrows what the guest may find.
        let on_event = keep.clone();
        device.observe(move |device, event| {
            if event.ends_with("in flight") {
                on_event(device, event);
            }
        });
        let flushed = device.clone();
        *shared.after_flush.lock() = Some(Arc::new(move || keep(&flushed, "a guest's flush or resize has completed")));
        Watch(reservoir)
    }

    /// Stops; the moments in their order.
    pub fn end(self, device: &SimDevice, shared: &Shared) -> Vec<Moment> {
        device.ignore();
        *shared.after_flush.lock() = None;
        let mut kept = std::mem::take(&mut self.0.lock().kept);
        kept.sort_by_key(|m| m.order);
        kept
    }

    fn keeper(
        reservoir: Arc<Mutex<Reservoir>>,
        shared: &Arc<Shared>,
    ) -> Arc<impl Fn(&SimDevice, &str) + Send + Sync + use<>> {
        let shared = Arc::downgrade(shared);
        Arc::new(move |device: &SimDevice, event: &str| {
            let Some(shared) = shared.upgrade() else { return };
            let mut reservoir = reservoir.lock();
            let Some(slot) = reservoir.slot() else { return };
            let order = reservoir.seen;
            shared.note(format!("moment {order}: {event}"));
            let moment = Moment { order, epoch: device.epoch(event), model: shared.model.lock().clone() };
            if slot < reservoir.kept.len() { reservoir.kept[slot] = moment } else { reservoir.kept.push(moment) }
        })
    }
}

/// Cuts the power at each moment; the error says at which. Some of the images lose the power again while they are being
/// recovered.
///
/// # Errors
/// The first bad crash image.
pub fn cut(config: &Config, moments: &[Moment], budget: Budget, counts: &mut Counts) -> Result<(), (usize, String)> {
    let mut rng = SmallRng::seed_from_u64(config.seed ^ 0x0063_7574);
    let mut seen = HashSet::new();
    for moment in moments {
        let (exhaustive, selections) = moment.epoch.selections(budget.effort, &mut rng);
        counts.moments += 1;
        counts.exhaustive += u64::from(exhaustive);
        for selection in selections {
            let image = moment.epoch.image(&selection);
            let mut hasher = DefaultHasher::new();
            (&image, moment.model.tightened).hash(&mut hasher);
            // Until a flush completes, more and more is allowed: what was good at an earlier moment still is.
            if !seen.insert(hasher.finish()) {
                continue;
            }
            counts.images += 1;
            let depth = Depth { qemu: one_in(budget.qemu, counts.images), compact: counts.images % 7 == 3 };
            counts.qemu += u64::from(depth.qemu);
            let twice = one_in(budget.twice, counts.images);
            let look = || {
                verify::crash_image(&image, &moment.model, config, depth)?;
                if twice { cut_again(&image, &moment.model, config) } else { Ok(0) }
            };
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(look));
            match result.unwrap_or_else(|_| Err("panicked (see above)".into())) {
                Ok(more) => {
                    counts.images += more;
                    counts.twice += more;
                }
                Err(message) => {
                    return Err((moment.order, report(config, moment, &selection, &image, &message)));
                }
            }
        }
    }
    Ok(())
}

/// Opens what a power cut left, compacts and closes it, and cuts the power meanwhile. Returns how many images were looked
/// at.
fn cut_again(image: &[u8], model: &Model, config: &Config) -> Result<u64, String> {
    let device = SimDevice::new(image.to_vec(), Settings { features: config.features, ..Settings::new(config.seed) });
    let epochs = Arc::new(Mutex::new(Vec::new()));
    let kept = epochs.clone();
    device.observe(move |device, event| {
        if event.ends_with("in flight") {
            kept.lock().push(device.epoch(event));
        }
    });
    verify::in_paused_time(async {
        let disk = config.open(device.clone()).await.map_err(|e| format!("opening again: {e}"))?;
        compact(&disk, &mut |_| true).await.map_err(|e| format!("compacting after recovery: {e}"))?;
        disk.close().await.map_err(|e| format!("closing after recovery: {e}"))
    })??;
    device.ignore();
    if let Some(broken) = device.violations().first() {
        return Err(format!("recovering, a rule of the device trait was broken: {broken}"));
    }
    let epochs = std::mem::take(&mut *epochs.lock());
    let mut rng = SmallRng::seed_from_u64(config.seed ^ epochs.len() as u64);
    let mut seen = HashSet::new();
    for epoch in epochs.iter().step_by(epochs.len().div_ceil(8).max(1)) {
        let (_, selections) = epoch.selections(Effort { exhaustive: 3, random: 2, singles: 1 }, &mut rng);
        for selection in selections {
            let twice = epoch.image(&selection);
            if seen.insert(twice.clone()) {
                verify::crash_image(&twice, model, config, Depth { qemu: false, compact: false })
                    .map_err(|e| format!("after a second power cut at {:?}, during recovery: {e}", epoch.event))?;
            }
        }
    }
    Ok(seen.len() as u64)
}

fn report(config: &Config, moment: &Moment, selection: &[bool], image: &[u8], message: &str) -> String {
    let mut hasher = DefaultHasher::new();
    image.hash(&mut hasher);
    let name = format!("cut-{}-{:08x}.qcow2", config.seed, hasher.finish() as u32);
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::write(&path, image);
    let happened: Vec<_> = moment.epoch.atoms.iter().zip(selection).map(describe).collect();
    format!(
        "power cut at {:?} (moment {}), in doubt: {}\n{message}\nthe image is kept in {}",
        moment.epoch.event,
        moment.order,
        happened.join(", "),
        path.display()
    )
}

fn describe((atom, happened): (&Atom, &bool)) -> String {
    let sign = if *happened { "+" } else { "-" };
    match atom {
        Atom::Length(length) => format!("{sign}length {length:#x}"),
        Atom::Sector { index, bytes } => {
            let kind = match recognise(&bytes[..]) {
                Content::Garbage { .. } => "metadata".to_owned(),
                guest => guest.to_string(),
            };
            format!("{sign}{:#x} ({kind})", index * SECTOR as u64)
        }
    }
}
