//! Faults: in a fixed history every device operation fails once, for a while, with an I/O error or a full disk. The
//! error must reach a caller or the statistics; nothing may hang; what was flushed stays; the handle goes on or says
//! that it is read-only; and the image opens again, sound, with contents that the model allows, also after a power
//! cut.
//!
//! `QCR_SEED=n cargo test --test faults` shifts delays and outcomes by a seed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::config::{Config, ImageKind};
use common::content::SECTOR;
use common::crash::Effort;
use common::guests::{Clock, Errors, Failure, Shared};
use common::history::Op;
use common::play;
use common::sim::{Delay, Fault, Kind, Settings, SimDevice};
use common::slice;
use common::verify::{self, Depth, Tolerance};
use qcow_recycler::buf::IoBuf;
use qcow_recycler::device::Features;
use qcow_recycler::recycler::{Control, run};
use qcow_recycler::{Error, Image};
use rand::SeedableRng;
use rand::rngs::SmallRng;

/// What one run with a fault came to.
#[derive(Default)]
struct Outcome {
    fired: bool,
    read_only: bool,
    crash_images: u64,
}

fn config(cluster_bits: u32, lazy_refcounts: bool, l2_cache_size: u64, features: Features) -> Config {
    let cluster = 1u64 << cluster_bits;
    let image = ImageKind {
        cluster_bits,
        refcount_bits: 16,
        version: 3,
        lazy_refcounts,
        preallocated: false,
        sectors: 160 * cluster / SECTOR as u64,
    };
    Config {
        seed: slice::replay_seed().unwrap_or(1),
        image,
        l2_cache_size,
        keep_erased: 2 * cluster,
        compact_after_unmaps: Some(2 * cluster),
        settle: Duration::from_millis(5),
        flush_after: Duration::from_millis(20),
        features,
        delay: Delay::Yields(1),
        overlap: false,
        room: 0,
    }
}

/// Every kind of request, on fresh, shared and freed clusters; between two of them the recycler gets its turn.
fn requests(c: u64) -> Vec<Op> {
    let half = (c / 2).max(1);
    vec![
        Op::Write { first: 0, count: 30 * c },
        Op::Write { first: 70 * c, count: 20 * c },
        Op::Flush,
        Op::Write { first: 31 * c, count: half },
        Op::Discard { first: 0, count: 10 * c },
        Op::WriteZeroes { first: 12 * c, count: 3 * c, may_unmap: false },
        Op::WriteZeroes { first: 16 * c, count: 3 * c + half, may_unmap: true },
        Op::Flush,
        Op::Compact,
        Op::Write { first: 5 * c, count: 2 * c },
        Op::Write { first: 72 * c + half, count: 2 * c },
        Op::Discard { first: 20 * c, count: 8 * c },
        Op::Sleep(60),
        Op::Write { first: 140 * c, count: 3 * c },
        Op::Discard { first: 71 * c, count: 6 * c },
        Op::Flush,
        Op::Sleep(60),
        Op::Read { first: 0, count: 100 * c },
        Op::Flush,
    ]
}

/// Opens the image, works, lets the fault pass, tries the handle, and closes it. Whether it closed well.
async fn live(
    config: Config,
    device: &SimDevice,
    shared: &Arc<Shared>,
    outcome: &mut Outcome,
) -> Result<bool, Failure> {
    let image = match Image::open(device.clone(), config.options()).await {
        Ok(image) => Arc::new(image),
        Err(e) => {
            outcome.fired = !device.disarm().is_empty();
            let expected = outcome.fired && matches!(e, Error::Io { .. });
            return if expected { Ok(false) } else { Err(shared.failure(format!("opening: {e}"))) };
        }
    };
    let control = Control::new();
    let worker = tokio::spawn(run(image.clone(), control.clone()));
    shared.guest("guest", &image, &requests(config.image.cluster_sectors())).await?;
    control.stop();
    worker.await.map_err(|e| shared.failure(format!("the recycler panicked: {e}")))?;
    shared.resize(&image, config.image.sectors - 3).await?;

    let fired = device.disarm();
    outcome.fired = !fired.is_empty();
    let heard = !shared.errors.lock().is_empty() || image.stats().background_errors > 0;
    // An operation that only saves work may be done without, and a file that cannot grow by much may grow by little.
    let replaceable = |kind| matches!(kind, Kind::PunchHole | Kind::WriteZeroes | Kind::CopyRange | Kind::Truncate);
    if !heard && fired.iter().any(|f| !replaceable(f.kind)) {
        return Err(shared.failure(format!("nobody heard of {fired:?}")));
    }
    for (what, error) in shared.errors.lock().iter() {
        if !matches!(error, Error::Io { .. } | Error::Failed { .. }) {
            return Err(shared.failure(format!("{what}: {error}")));
        }
    }

    outcome.read_only = try_handle(config, &image, shared).await?;
    let began = shared.model.lock().flush_begins();
    let closed = image.close().await;
    shared.note(format!("closed: {closed:?}"));
    match closed {
        Ok(()) if outcome.read_only => Ok(false),
        Ok(()) => {
            shared.model.lock().flushed(began);
            Ok(true)
        }
        Err(Error::Failed { .. }) if outcome.read_only => Ok(false),
        Err(e) => Err(shared.failure(format!("closing after the fault has passed: {e}"))),
    }
}

/// Whether the handle has become read-only; if not, it must work and hold what the model says.
async fn try_handle(config: Config, image: &Image<SimDevice>, shared: &Shared) -> Result<bool, Failure> {
    let cluster = config.image.cluster_sectors();
    // The fault may have left a resize undone; these sectors exist in any case.
    let sectors = [0, 20 * cluster, 150 * cluster];
    for first in sectors {
        let (request, version) = {
            let mut model = shared.model.lock();
            let version = model.next_version();
            let allowed = |sector, _: &_| vec![common::content::Content::Data { sector, version }];
            (model.begin(first, 1, allowed), version)
        };
        let data = common::content::data(first, 1, version);
        match image.write(first * SECTOR as u64, IoBuf::new(&data)).await {
            Ok(()) => shared.model.lock().end(request),
            Err(Error::Failed { .. }) => {
                shared.model.lock().fail(request);
                return Ok(true);
            }
            Err(e) => return Err(shared.failure(format!("writing after the fault has passed: {e}"))),
        }
    }
    let began = shared.model.lock().flush_begins();
    match image.flush().await {
        Ok(()) => shared.model.lock().flushed(began),
        Err(Error::Failed { .. }) => return Ok(true),
        Err(e) => return Err(shared.failure(format!("flushing after the fault has passed: {e}"))),
    }
    let bytes = verify::contents(image).await.map_err(|e| shared.failure(e))?;
    let mut model = shared.model.lock();
    model.read(0, &bytes).map_err(|m| shared.failure(format!("after the fault: {m}; {}", model.explain(m.sector))))?;
    Ok(false)
}

/// One run with one fault.
fn with_fault(config: Config, fault: Option<Fault>) -> Result<(Outcome, u64), Failure> {
    let shared = Shared::new(config, Clock::Tokio, Errors::Collected);
    let settings = Settings { delay: config.delay, features: config.features, ..Settings::new(config.seed) };
    let device = SimDevice::new(config.create(), settings);
    device.limit_operations(500_000);
    if let Some(fault) = fault {
        device.arm(fault);
    }
    let (mut outcome, mut closed) = (Outcome::default(), false);
    play::in_paused_time(&shared, async {
        closed = live(config, &device, &shared, &mut outcome).await?;
        Ok(())
    })?;
    let broken = device.violations();
    if !broken.is_empty() {
        return Err(shared.failure(format!("rules of the device trait broken: {}", broken.join("; "))));
    }
    let operations = device.operations();
    let error = |e: String| shared.failure(e);
    let file = device.contents();
    let model = shared.model.lock().clone();
    if closed {
        verify::our_check(&file, Tolerance::Clean).map_err(|e| error(format!("after closing: {e}")))?;
        let reopened = verify::in_paused_time(async {
            let image = Image::open(device.clone(), config.options()).await.map_err(|e| e.to_string())?;
            verify::whole_disk(&image, &mut model.clone()).await?;
            image.close().await.map_err(|e| e.to_string())
        });
        let reopened = reopened.unwrap_or_else(|hangs| Err(hangs.to_owned()));
        reopened.map_err(|e| error(format!("reopening: {e}")))?;
    }
    verify::crash_image(&file, &model, None, &config, Depth { qemu: false, compact: true })
        .map_err(|e| error(format!("the file as it was left: {e}")))?;
    let epoch = device.epoch("after the fault");
    let mut rng = SmallRng::seed_from_u64(config.seed);
    let (_, selections) = epoch.selections(Effort { exhaustive: 3, random: 3, singles: 1 }, &mut rng);
    for selection in selections {
        outcome.crash_images += 1;
        verify::crash_image(&epoch.image(&selection), &model, None, &config, Depth { qemu: false, compact: false })
            .map_err(|e| error(format!("power cut after the fault, selection {selection:?}: {e}")))?;
    }
    Ok((outcome, operations))
}

/// Every operation of the history fails, one run each.
fn every_operation(name: &str, config: Config) {
    let (_, operations) = with_fault(config, None).unwrap_or_else(|f| panic!("{name}, without a fault\n{f}"));
    let (mut faults, mut read_only, mut crash_images) = (0, 0, 0);
    let mut failures = Vec::new();
    for (errno, lasting) in [(libc::EIO, false), (libc::ENOSPC, false), (libc::EIO, true), (libc::ENOSPC, true)] {
        // A history may grow longer by a fault; of lasting ones a share shows what there is to see.
        let step = if lasting { 3 } else { 1 };
        for after in (0..operations).step_by(step) {
            let fault = Fault { after, errno, lasting };
            let result = std::panic::catch_unwind(|| with_fault(config, Some(fault)));
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
