//! Faults: in a fixed history every device operation fails once, for a while, with an I/O error or a full disk. The
//! error must reach a caller or the statistics; nothing may hang; what was flushed stays; the handle goes on or says
//! that it is read-only; and the image opens again, sound, with contents that the model allows, also after a power
//! cut. The same with random histories and faults, and with faults while a crashed image is being recovered. And requests
//! that are dropped at every await, while others free, reuse and move their clusters.
//!
//! `QCR_SEED=n cargo test --test simulation faults::` replays a seed, or shifts the delays and outcomes of the fixed histories by it;
//! `QCR_SOAK_MINUTES=n` makes the run longer.

use std::time::Duration;

use crate::common::chain::Behind;
use crate::common::config::{Config, ImageKind};
use crate::common::content::SECTOR;
use crate::common::crash::Effort;
use crate::common::cuts::{self, Budget, Counts, Made, Start, Watch};
use crate::common::disturb::{random_fault, with_fault};
use crate::common::encryption::Encryption;
use crate::common::guests::{Clock, Errors, Failure, Shared};
use crate::common::history::{After, History, Op, Round};
use crate::common::play;
use crate::common::sim::{Delay, Fault, Settings, SimDevice};
use crate::common::slice;
use crate::common::verify::{self, Depth};
use qcow_recycler::Error;
use qcow_recycler::device::Features;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

fn config(cluster_bits: u32, lazy_refcounts: bool, l2_cache_size: u64, features: Features) -> Config {
    let cluster = 1u64 << cluster_bits;
    let image = ImageKind {
        cluster_bits,
        refcount_bits: 16,
        version: 3,
        lazy_refcounts,
        extended_l2: false,
        preallocated: false,
        zstd: false,
        encryption: Encryption::None,
        backing: Behind::Nothing,
        sectors: 160 * cluster / SECTOR as u64,
    };
    Config {
        seed: slice::replay_seed().unwrap_or(1),
        image,
        l2_cache_size,
        keep_erased: 2 * cluster,
        compact_after_unmaps: Some(2 * cluster),
        rate_limit: None,
        settle: Duration::from_millis(5),
        flush_after: Duration::from_millis(20),
        features,
        delay: Delay::Yields(1),
        overlap: false,
        sparse: false,
        room: 0,
    }
}

/// Where clusters are large, the history touches so many times fewer of them.
const FEWER: u64 = 3;

/// Every kind of request, on fresh, shared and freed clusters of `c` sectors; between two of them the recycler gets its turn.
fn requests(c: u64, fewer: u64) -> Vec<Op> {
    let half = (c / 2).max(1);
    let n = |clusters: u64| clusters.div_ceil(fewer) * c;
    vec![
        Op::Write { first: 0, count: n(30) },
        Op::Write { first: n(70), count: n(20) },
        Op::Flush,
        Op::Write { first: n(31), count: half },
        Op::Discard { first: 0, count: n(10) },
        Op::WriteZeroes { first: n(12), count: n(3), may_unmap: false },
        Op::WriteZeroes { first: n(16), count: n(3) + half, may_unmap: true },
        Op::Flush,
        Op::Compact,
        Op::Pack { first: n(4), count: n(2) },
        Op::Compress,
        Op::Snapshot,
        Op::Write { first: n(5), count: n(2) },
        Op::Write { first: n(72) + half, count: n(2) },
        Op::Discard { first: n(20), count: n(8) },
        Op::Sleep(60),
        Op::Write { first: n(140), count: n(3) },
        Op::Discard { first: n(71), count: n(6) },
        Op::Flush,
        Op::Forget(0),
        Op::Sleep(60),
        Op::Read { first: 0, count: n(100) },
        Op::Flush,
    ]
}

/// Every operation of the history fails, one run each.
fn every_operation(name: &str, config: Config) {
    let guests = [requests(config.image.cluster_sectors(), if config.image.extended_l2 { FEWER } else { 1 })];
    let start = Start::empty(&config);
    let play = |fault| with_fault(config, &start, &guests, fault);
    let (_, operations) = play(None).unwrap_or_else(|f| panic!("{name}, without a fault\n{f}"));
    let (mut faults, mut read_only, mut crash_images) = (0, 0, 0);
    let mut failures = Vec::new();
    let kinds =
        [(libc::EIO, false), (libc::ENOSPC, false), (libc::EAGAIN, false), (libc::EIO, true), (libc::ENOSPC, true)];
    for (errno, lasting) in kinds {
        // A history may grow longer by a fault; of lasting ones a share shows what there is to see.
        let step = if lasting || errno == libc::EAGAIN { 3 } else { 1 };
        for after in (0..operations).step_by(step) {
            let fault = Fault { after, errno, lasting, only: None };
            let result = std::panic::catch_unwind(|| play(Some(fault)));
            match result {
                Ok(Ok((outcome, _))) => {
                    faults += u64::from(outcome.fired);
                    read_only += u64::from(outcome.read_only);
                    crash_images += outcome.crash_images;
                }
                Ok(Err(failure)) => failures.push(format!("{fault:?}\n{failure}")),
                Err(_) => failures.push(format!("{fault:?}: panicked (see above)")),
            }
        }
    }
    println!(
        "{name}: {operations} operations, {faults} faults, after {read_only} the handle was read-only, \
        {crash_images} crash \
         images, {} failures",
        failures.len()
    );
    slice::tell(&[("faults", faults), ("crash_images", crash_images)]);
    // Each kind of failure once, by its last line.
    let mut kinds = std::collections::BTreeMap::new();
    for failure in &failures {
        let last = failure.lines().last().unwrap_or_default();
        kinds.entry(last.split(['0', '1', '2', '3', '4', '5', '6', '7', '8', '9']).next()).or_insert(failure);
    }
    let shown: Vec<_> = kinds.values().map(|f| f.as_str()).collect();
    assert!(
        failures.is_empty(),
        "{name}: {} failures, of each kind the first:\n{}",
        failures.len(),
        shown.join("\n\n")
    );
}

const EVERYTHING: Features = Features { resize: true, punch_hole: true, write_zeroes: true, copy_range: true };
const LEAST: Features = Features { resize: true, punch_hole: false, write_zeroes: false, copy_range: false };

#[test]
fn every_operation_fails_with_small_clusters() {
    every_operation("512-byte clusters, everything supported", config(9, false, 4 << 20, EVERYTHING));
}

#[test]
fn every_operation_fails_with_a_cache_that_evicts() {
    every_operation("512-byte clusters, tiny cache, few features", config(9, false, 512, LEAST));
}

#[test]
fn every_operation_fails_with_lazy_refcounts() {
    every_operation("lazy refcounts", config(9, true, 4 << 20, LEAST));
}

#[test]
fn every_operation_fails_with_larger_clusters() {
    every_operation("4096-byte clusters", config(12, false, 4 << 20, EVERYTHING));
}

#[test]
fn every_operation_fails_with_subclusters() {
    let config = config(14, false, 4 << 20, EVERYTHING);
    let image = ImageKind { extended_l2: true, sectors: config.image.sectors / FEWER, ..config.image };
    every_operation("16 KiB clusters of 32 subclusters", Config { image, ..config });
}

#[test]
fn every_operation_fails_over_a_backing_file() {
    let config = config(11, false, 4 << 20, EVERYTHING);
    let image = config.image.over(Behind::Two(config.image.sectors - 3));
    every_operation("2048-byte clusters over two backing files", Config { image, ..config });
}

/// A truncation is done, and reported as failed; then a compaction copies what another one has moved away and cut off.
#[test]
fn a_truncation_that_fails_may_have_been_done() {
    if let Err(failure) = random_fault(120_518_646_744_221_502, None) {
        panic!("{failure}");
    }
}

#[test]
fn random_histories_with_faults() {
    let (mut histories, mut faults, mut crash_images) = (0, 0, 0);
    for seed in slice::Slice::new(15, 10, 0.5) {
        match random_fault(seed, None) {
            Ok(Some(outcome)) => {
                histories += 2;
                faults += u64::from(outcome.fired);
                crash_images += outcome.crash_images;
            }
            Ok(None) => {}
            Err(failure) => {
                panic!("seed {seed}\n{failure}\nreplay: QCR_SEED={seed} cargo test --test simulation faults::random")
            }
        }
    }
    println!("random histories with faults: {histories} histories, {faults} faults, {crash_images} crash images");
    slice::tell(&[("histories", histories), ("faults", faults), ("crash_images", crash_images)]);
}

/// Opens and closes the image on the device, as far as it goes.
async fn recover(config: &Config, device: &SimDevice) -> Result<(), Error> {
    let image = config.open(device.clone()).await?;
    image.close().await
}

/// What a crash left, recovered while every device operation fails in turn; then the power goes as well.
fn recovery_with_faults(seed: u64) -> Result<(u64, u64), Failure> {
    let (history, start) = cuts::random_history(seed);
    let config = history.config;
    let shared = Shared::new(config, Clock::Tokio, Errors::None);
    *shared.model.lock() = start.model.clone();
    let device = SimDevice::new(start.image.clone(), config.device(true));
    let watch = Watch::new(&device, &shared, 2);
    play::in_paused_time(&shared, play::play(&history, &device, &shared, |_| Ok(())))?;
    let moments = watch.end(&device, &shared);
    let mut rng = SmallRng::seed_from_u64(seed);
    let (mut faults, mut crash_images) = (0, 0);
    let bad = |what: String| Err(shared.failure(what));
    for moment in &moments {
        let (image, model) = moment.image(&mut rng);
        let settings = Settings { features: config.features, ..Settings::new(seed) };
        let untouched = SimDevice::new(image.clone(), settings);
        if let Err(e) = verify::in_paused_time(recover(&config, &untouched)).unwrap_or(Err(Error::Closed)) {
            return bad(format!("recovering: {e}"));
        }
        for after in 0..untouched.operations() {
            let errno = if after % 2 == 0 { libc::EIO } else { libc::ENOSPC };
            let device = SimDevice::new(image.clone(), settings);
            device.arm(Fault { after, errno, lasting: rng.random_bool(0.3), only: None });
            let recovered = verify::in_paused_time(recover(&config, &device));
            let fired = device.disarm();
            faults += u64::from(!fired.is_empty());
            match recovered {
                Ok(Ok(()) | Err(Error::Io { .. } | Error::Failed { .. })) => {}
                Ok(Err(e)) => return bad(format!("operation {after} of the recovery fails: {e}")),
                Err(hangs) => return bad(format!("operation {after} of the recovery fails: {hangs}")),
            }
            let epoch = device.epoch("a fault during recovery");
            let (_, selections) = epoch.selections(Effort { exhaustive: 1, random: 1, singles: 1 }, &mut rng);
            let mut left: Vec<_> = selections.iter().take(4).map(|s| epoch.image(s)).collect();
            left.push(device.contents());
            for image in left {
                crash_images += 1;
                verify::crash_image(&image, &model, &config, Depth { qemu: false, compact: false })
                    .map_err(|e| shared.failure(format!("after {fired:?} during recovery: {e}")))?;
            }
        }
    }
    Ok((faults, crash_images))
}

#[test]
fn recovery_survives_faults_and_power_cuts() {
    let (mut faults, mut crash_images) = (0, 0);
    // A disk that is full when a recovery has begun.
    for seed in std::iter::once(116).chain(slice::Slice::new(10, 10, 0.15)) {
        match recovery_with_faults(seed) {
            Ok((fired, images)) => {
                faults += fired;
                crash_images += images;
            }
            Err(failure) => {
                panic!("seed {seed}\n{failure}\nreplay: QCR_SEED={seed} cargo test --test simulation faults::recovery")
            }
        }
    }
    println!("faults during recovery: {faults} faults, {crash_images} crash images");
    slice::tell(&[("faults", faults), ("crash_images", crash_images)]);
}

/// Each kind of request is dropped after every number of polls, while others discard the same clusters, make that durable,
/// hand them out again, and move what is there.
#[test]
fn requests_are_dropped_at_every_await() {
    let most = if slice::soak_minutes().is_some() { 40 } else { 16 };
    let mut counts = Counts::default();
    for cluster_bits in [9, 12] {
        let c = (1u64 << cluster_bits) / SECTOR as u64;
        let config = config(cluster_bits, false, 4 << 20, EVERYTHING);
        let image = ImageKind { sectors: 40 * c, ..config.image };
        let config = Config { image, overlap: true, keep_erased: 8 << cluster_bits, delay: Delay::Yields(2), ..config };
        let filling = [Op::Write { first: 0, count: 30 * c }, Op::Discard { first: 4 * c, count: 6 * c }];
        let filling = History { config, compare: false, rounds: vec![Round::of(&filling)] };
        let start = Start::after(&filling, Made::Plain).unwrap_or_else(|f| panic!("filling the disk: {f}"));
        let dropped = [
            ("overwrite", Op::Write { first: 20 * c, count: 2 * c }),
            ("write", Op::Write { first: 34 * c, count: 2 * c }),
            ("write into a hole", Op::Write { first: 5 * c, count: c }),
            ("discard", Op::Discard { first: 20 * c, count: 3 * c }),
            ("discard of a part", Op::Discard { first: 20 * c, count: c.div_ceil(2) }),
            ("zeroes", Op::WriteZeroes { first: 20 * c, count: 2 * c, may_unmap: false }),
            ("flush", Op::Flush),
            ("compact", Op::Compact),
            ("read", Op::Read { first: 18 * c, count: 6 * c }),
        ];
        for (name, op) in dropped {
            for polls in 1..=most {
                let (first, count) = op.range().unwrap_or((20 * c, 2 * c));
                let guests = vec![
                    vec![Op::DropNext(polls), op, Op::Flush, Op::Write { first: 36 * c, count: c }],
                    vec![
                        Op::Discard { first, count },
                        Op::Flush,
                        Op::Sleep(2),
                        Op::Write { first: 30 * c, count: 4 * c },
                    ],
                    vec![Op::Compact, Op::Write { first: 38 * c, count: c }, Op::Flush],
                ];
                let rounds = vec![Round { recycler: true, guests, after: After::Nothing }];
                let history = History { config, compare: true, rounds };
                let effort = Effort { exhaustive: 4, random: 4, singles: 2 };
                let budget = Budget { moments: 5, effort, qemu: 0, twice: 0 };
                cuts::play(&history, &start, budget, &mut counts)
                    .unwrap_or_else(|f| panic!("{name} dropped after {polls} polls, {config}\n{f}"));
            }
        }
    }
    println!("requests dropped at every await: {counts}");
    counts.tell();
}
