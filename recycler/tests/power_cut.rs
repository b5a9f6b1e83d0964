//! Power cuts: random histories on a device that forgets. Whenever something new is in doubt, and after every guest
//! flush, the images that a power cut would leave at that instant are made and looked at: all of them if few sectors
//! are in doubt, a telling sample otherwise. Each must be sound, hold what the model allows, and recover.
//!
//! `QCR_SEED=n cargo test --test power_cut` replays a seed; `QCR_SOAK_MINUTES=n` makes the run longer.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/sim_tests.rs"]
mod sim_tests;

use std::collections::HashSet;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Instant;

use common::config::{Config, Scale};
use common::crash::{Effort, Epoch};
use common::history::{self, Clock, Errors, Failure, History, Length, Shared};
use common::model::Model;
use common::sim::SimDevice;
use common::slice::{self, Slice};
use common::verify::{self, Depth};
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// One instant at which the power may fail.
struct Moment {
    order: usize,
    epoch: Epoch,
    model: Model,
}

/// How much one history may cost.
#[derive(Clone, Copy)]
struct Budget {
    moments: usize,
    effort: Effort,
    /// One crash image in so many is shown to QEMU.
    qemu: u64,
}

#[derive(Default)]
struct Counts {
    histories: u64,
    moments: u64,
    exhaustive: u64,
    images: u64,
    qemu: u64,
}

fn random_history(seed: u64) -> History {
    let mut rng = SmallRng::seed_from_u64(seed);
    let config = Config::random(seed, Scale::Tiny, &mut rng);
    History::random(config, Length { rounds: 3, guests: 3, ops: 12 }, &mut rng)
}

/// Plays a history and keeps the moments at which to cut the power: an even, seeded share of all if they are too many.
fn moments(history: &History, budget: Budget) -> (Vec<Moment>, Result<(), Failure>) {
    struct Reservoir {
        kept: Vec<Moment>,
        seen: usize,
        rng: SmallRng,
    }
    let config = history.config;
    let shared = Shared::new(config, Clock::Tokio, Errors::None);
    let device = SimDevice::new(config.image.create(), config.device(true));
    device.limit_operations(200_000);
    let rng = SmallRng::seed_from_u64(config.seed ^ 0x6d6f_6d65);
    let reservoir = Arc::new(Mutex::new(Reservoir { kept: Vec::new(), seen: 0, rng }));
    let keep = {
        let (reservoir, shared) = (reservoir.clone(), Arc::downgrade(&shared));
        Arc::new(move |device: &SimDevice, event: &str| {
            let Some(shared) = shared.upgrade() else { return };
            let mut reservoir = reservoir.lock();
            reservoir.seen += 1;
            let seen = reservoir.seen;
            let slot = if seen <= budget.moments { seen - 1 } else { reservoir.rng.random_range(0..seen) };
            if slot < budget.moments {
                shared.note(format!("moment {seen}: {event}"));
                let moment = Moment { order: seen, epoch: device.epoch(event), model: shared.model.lock().clone() };
                if slot < reservoir.kept.len() { reservoir.kept[slot] = moment } else { reservoir.kept.push(moment) }
            }
        })
    };
    // The end of an operation adds nothing to what a power cut may leave; its beginning does, and the end of a guest's
    // flush narrows what the guest may find.
    let on_event = keep.clone();
    device.observe(move |device, event| {
        if event.ends_with("in flight") {
            on_event(device, event);
        }
    });
    let after_flush = device.clone();
    *shared.after_flush.lock() = Some(Arc::new(move || keep(&after_flush, "a guest's flush has completed")));
    let result = history::in_paused_time(&shared, async { history::play(history, &device, &shared, |_| Ok(())).await });
    device.ignore();
    *shared.after_flush.lock() = None;
    let mut kept = std::mem::take(&mut reservoir.lock().kept);
    kept.sort_by_key(|m| m.order);
    let broken = device.violations();
    let result = if broken.is_empty() { result } else { Err(shared.failure(broken.join("; "))) };
    (kept, result)
}

/// Cuts the power at each moment.
fn cut(config: &Config, moments: &[Moment], budget: Budget, counts: &mut Counts) -> Result<(), String> {
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
            // Seen under a model at least as strict.
            if !seen.insert(hasher.finish()) {
                continue;
            }
            counts.images += 1;
            let depth = Depth { qemu: counts.images % budget.qemu == 1, compact: counts.images % 7 == 3 };
            counts.qemu += u64::from(depth.qemu);
            let looked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                verify::crash_image(&image, &moment.model, config, depth)
            }));
            let result = looked.unwrap_or_else(|_| Err("panicked (see above)".into()));
            if let Err(message) = result {
                let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("cut-{}.qcow2", config.seed));
                let _ = std::fs::write(&path, &image);
                let happened: Vec<_> = moment.epoch.atoms.iter().zip(&selection).map(describe).collect();
                return Err(format!(
                    "power cut at {:?}, in doubt: {}\n{message}\nthe image is kept in {}",
                    moment.epoch.event,
                    happened.join(", "),
                    path.display()
                ));
            }
        }
    }
    Ok(())
}

fn describe((atom, happened): (&common::crash::Atom, &bool)) -> String {
    let sign = if *happened { "+" } else { "-" };
    match atom {
        common::crash::Atom::Length(length) => format!("{sign}length {length:#x}"),
        common::crash::Atom::Sector { index, bytes } => {
            let kind = match common::content::recognise(&bytes[..]) {
                common::content::Content::Garbage { .. } => "metadata".to_owned(),
                guest => guest.to_string(),
            };
            format!("{sign}{:#x} ({kind})", index * common::content::SECTOR as u64)
        }
    }
}

fn play(history: &History, budget: Budget, counts: &mut Counts) -> Result<(), String> {
    counts.histories += 1;
    let (moments, result) = moments(history, budget);
    result.map_err(|f| f.to_string())?;
    cut(&history.config, &moments, budget, counts)
}

#[test]
fn random_histories() {
    let soak = slice::soak_minutes().is_some();
    let budget = Budget {
        moments: if soak { 120 } else { 40 },
        effort: Effort { exhaustive: if soak { 10 } else { 7 }, random: 24, singles: 8 },
        qemu: if soak { 400 } else { 150 },
    };
    let (mut counts, start) = (Counts::default(), Instant::now());
    for seed in Slice::new(50, 10, 0.4) {
        let history = random_history(seed);
        if let Err(first) = play(&history, budget, &mut counts) {
            let short = history::shrink(history, 100, |h| play(h, budget, &mut Counts::default()).is_err());
            let last = play(&short, budget, &mut Counts::default()).err().unwrap_or(first);
            panic!(
                "seed {seed}, {}\nshortened to {:#?}\n{last}\nreplay: QCR_SEED={seed} cargo test --test power_cut",
                short.config, short.rounds
            );
        }
    }
    let Counts { histories, moments, exhaustive, images, qemu } = counts;
    println!(
        "power cuts: {histories} histories, {moments} moments ({exhaustive} exhaustively), {images} distinct \
        crash images, \
         {qemu} of them checked by QEMU, in {:?}",
        start.elapsed()
    );
}
