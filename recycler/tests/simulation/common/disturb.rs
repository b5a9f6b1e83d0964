//! Histories in which the device fails.

use std::sync::Arc;
use std::time::Duration;

use qcow_recycler::buf::IoBuf;
use qcow_recycler::{Error, Image};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::config::Config;
use super::content::{self, Content, SECTOR};
use super::crash::Effort;
use super::cuts::{self, Budget, Counts, Start, Watch};
use super::guests::{Clock, Errors, Failure, Shared};
use super::history::Op;
use super::play;
use super::sim::{Fault, Kind, SimDevice};
use super::slice;
use super::verify::{self, Depth, Tolerance};

/// What one run with a fault came to.
#[derive(Default)]
pub struct Outcome {
    /// Something did fail.
    pub fired: bool,
    /// The handle took no changes any more.
    pub read_only: bool,
    pub crash_images: u64,
}

/// Opens the image, works, lets the fault pass, tries the handle, and closes it. Whether it closed well.
async fn live(
    config: Config,
    device: &SimDevice,
    shared: &Arc<Shared>,
    guests: &[Vec<Op>],
    outcome: &mut Outcome,
) -> Result<bool, Failure> {
    let image = match config.open(device.clone()).await {
        Ok(image) => Arc::new(image),
        Err(e) => {
            outcome.fired = !device.disarm().is_empty();
            let expected = outcome.fired && matches!(e, Error::Io { .. });
            return if expected { Ok(false) } else { Err(shared.failure(format!("opening: {e}"))) };
        }
    };
    play::work(&image, shared, guests, Some(Duration::ZERO)).await?;
    let size = shared.model.lock().size();
    shared.resize(&image, size - size.min(4) + 1).await?;

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

    outcome.read_only = try_handle(&image, shared).await?;
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
async fn try_handle(image: &Image<SimDevice>, shared: &Shared) -> Result<bool, Failure> {
    let size = shared.model.lock().size();
    for first in [0, size / 8, size - 1] {
        let (request, version) = {
            let mut model = shared.model.lock();
            let version = model.next_version();
            let allowed = |sector, _: &_| vec![Content::Data { sector, version }];
            (model.begin(first, 1, allowed), version)
        };
        let data = content::data(first, 1, version);
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

/// How many crash images a run with a fault is worth, at moments before, while and after it happens.
fn budget() -> Budget {
    let effort = Effort { exhaustive: 2, random: 3, singles: 1 };
    Budget { moments: if slice::soak_minutes().is_some() { 8 } else { 1 }, effort, qemu: 0, twice: 0 }
}

/// One run with one fault. Also returns how many operations the device was asked for.
///
/// # Errors
/// What is wrong.
pub fn with_fault(
    config: Config,
    start: &Start,
    guests: &[Vec<Op>],
    fault: Option<Fault>,
) -> Result<(Outcome, u64), Failure> {
    let shared = Shared::new(config, Clock::Tokio, Errors::Collected);
    *shared.model.lock() = start.model.clone();
    let device = SimDevice::new(start.image.clone(), config.device(true));
    device.limit_operations(500_000);
    let watch = Watch::new(&device, &shared, budget().moments);
    if let Some(fault) = fault {
        device.arm(fault);
    }
    let (mut outcome, mut closed) = (Outcome::default(), false);
    let lived = play::in_paused_time(&shared, async {
        closed = live(config, &device, &shared, guests, &mut outcome).await?;
        Ok(())
    });
    let moments = watch.end(&device, &shared);
    lived?;
    let mut counts = Counts::default();
    cuts::cut(&config, &moments, budget(), &mut counts)
        .map_err(|(order, e)| shared.failure(format!("moment {order}: {e}")))?;
    outcome.crash_images += counts.images;
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
            let image = config.open(device.clone()).await.map_err(|e| e.to_string())?;
            verify::whole_disk(&image, &mut model.clone(), config.image.backing).await?;
            image.close().await.map_err(|e| e.to_string())
        });
        let reopened = reopened.unwrap_or_else(|hangs| Err(hangs.to_owned()));
        reopened.map_err(|e| error(format!("reopening: {e}")))?;
    }
    verify::crash_image(&file, &model, &config, Depth { qemu: false, compact: true })
        .map_err(|e| error(format!("the file as it was left: {e}")))?;
    let epoch = device.epoch("after the fault");
    let mut rng = SmallRng::seed_from_u64(config.seed);
    let (_, selections) = epoch.selections(Effort { exhaustive: 3, random: 3, singles: 1 }, &mut rng);
    for selection in selections {
        outcome.crash_images += 1;
        verify::crash_image(&epoch.image(&selection), &model, &config, Depth { qemu: false, compact: false })
            .map_err(|e| error(format!("power cut after the fault, selection {selection:?}: {e}")))?;
    }
    Ok((outcome, operations))
}

/// A random history in which something fails at a random moment, if asked for an operation of one kind; `None` if that would
/// show nothing.
///
/// # Errors
/// What is wrong.
pub fn random_fault(seed: u64, only: Option<Kind>) -> Result<Option<Outcome>, Failure> {
    let (history, start) = if seed.is_multiple_of(3) { cuts::racing_history(seed) } else { cuts::random_history(seed) };
    let config = history.config;
    // A device that cannot grow runs full when what was freed cannot be reused any more. Snapshots are QEMU's to judge, which
    // is too slow here, and a version 2 image that has one cannot be resized.
    if !config.features.resize || !start.model.taken.is_empty() || start.model.size() < 8 {
        return Ok(None);
    }
    // Nobody hears of what befalls a request that is dropped.
    let heard = |ops: Vec<Op>| ops.into_iter().filter(|op| !matches!(op, Op::DropNext(_))).collect::<Vec<_>>();
    let guests: Vec<Vec<Op>> = history.rounds.into_iter().take(1).flat_map(|r| r.guests).map(heard).collect();
    let mut rng = SmallRng::seed_from_u64(seed ^ 0x6661_756c);
    let errno = [libc::EIO, libc::EIO, libc::ENOSPC, libc::EAGAIN][rng.random_range(0..4)];
    let (_, operations) = with_fault(config, &start, &guests, None)?;
    let fault = Fault { after: rng.random_range(0..operations), errno, lasting: rng.random_bool(0.3), only };
    with_fault(config, &start, &guests, Some(fault)).map(|(outcome, _)| Some(outcome))
}
