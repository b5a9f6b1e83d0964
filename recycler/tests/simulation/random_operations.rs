//! Random guests against a model, after the manner of ocaml-qcow's `compact_random`: writes, partial writes, discards,
//! zeroes, flushes, compactions, resizes and reopenings, several guests at once, with the recycler at work; on paused
//! time, where a seed decides the order of everything, and on real threads.
//!
//! `QCR_SEED=n cargo test --test simulation random_operations::` replays a seed; `QCR_SOAK_MINUTES=n` makes the run longer.

use std::sync::Arc;
use std::time::Duration;

use crate::common::config::{Config, Scale};
use crate::common::guests::{Clock, Errors, Failure, Shared, Work};
use crate::common::history::{self, History, Length, Op};
use crate::common::play as player;
use crate::common::sim::{Delay, SimDevice};
use crate::common::slice::{Slice, replay_seed, tell};

use qcow_recycler::blocking::block_on;
use qcow_recycler::{Disk, Error};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// One history in so many is checked and read by QEMU whenever it closes the image.
const QEMU_SHARE: u64 = 10;

#[test]
fn on_paused_time() {
    let (mut histories, mut requests, mut work) = (0, 0, Work::default());
    for seed in Slice::new(35, 30, 0.7) {
        let history = player::random_history(seed);
        let qemu = seed.is_multiple_of(QEMU_SHARE);
        histories += 1;
        requests += history.len();
        let first = match player::against_model(&history, qemu) {
            Ok(done) => {
                work += done;
                continue;
            }
            Err(first) => first,
        };
        println!("seed {seed} fails: {}; shortening it", first.message);
        let short = history::shrink(history, |h| player::against_model(h, qemu).is_err());
        let last = player::against_model(&short, qemu).err().unwrap_or(first);
        panic!(
            "seed {seed}, {}\nshortened to {:#?}\n{last}\nreplay: QCR_SEED={seed} cargo test --test simulation \
             on_paused_time",
            short.config, short.rounds
        );
    }
    println!("paused time: {histories} histories, {requests} requests; {work}");
    tell(&[("histories", histories)]);
    assert!(
        replay_seed().is_some() || work.moved > 0 && work.cancelled > 0 && work.truncated > 0 && work.fixed > 0,
        "{work}"
    );
}

/// One history in which guests are threads and the recycler runs on the library's own runtime.
fn play_on_threads(seed: u64) -> Result<(usize, Work), Failure> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut config = Config::random(seed, Scale::Small, &mut rng);
    config.delay = if rng.random_bool(0.5) { Delay::None } else { Delay::Yields(2) };
    config.settle = Duration::from_millis(1);
    config.flush_after = Duration::from_millis(2);
    config.compact_after_unmaps = Some(1 << config.image.cluster_bits);
    let history = History::random(config, Length { rounds: 3, guests: 4, ops: 60 }, &mut rng);
    let shared = Shared::new(config, Clock::Threads, Errors::None);
    let device = SimDevice::new(config.create(), config.device(false));
    for round in &history.rounds {
        let opened = block_on(config.open(device.clone()));
        let disk = opened.map(Disk::from).map_err(|e| shared.failure(format!("opening: {e}")))?;
        if round.recycler {
            disk.start().map_err(|e| shared.failure(format!("starting: {e}")))?;
        }
        std::thread::scope(|scope| {
            let guests: Vec<_> = round
                .guests
                .iter()
                .enumerate()
                .map(|(g, ops)| {
                    let (disk, shared) = (&disk, &shared);
                    scope.spawn(move || guest_thread(&format!("guest {g}"), disk, shared, ops))
                })
                .collect();
            guests
                .into_iter()
                .try_for_each(|guest| guest.join().unwrap_or_else(|_| Err(shared.failure("a guest panicked"))))
        })?;
        if round.recycler {
            std::thread::sleep(Duration::from_millis(5));
            disk.pause();
            disk.resume();
        }
        block_on(shared.compare(disk.image()))?;
        let errors = disk.stats().background_errors;
        if errors > 0 {
            return Err(shared.failure(format!("{errors} background errors")));
        }
        shared.count(&disk.stats());
        disk.close().map_err(|e| shared.failure(format!("closing: {e}")))?;
        player::look_at_file(&device.contents(), &shared, seed.is_multiple_of(QEMU_SHARE))
            .map_err(|e| shared.failure(format!("after closing: {e}")))?;
    }
    match device.violations() {
        broken if broken.is_empty() => Ok((history.len(), *shared.work.lock())),
        broken => Err(shared.failure(format!("rules of the device trait broken: {}", broken.join("; ")))),
    }
}

fn guest_thread(name: &str, disk: &Disk<SimDevice>, shared: &Arc<Shared>, ops: &[Op]) -> Result<(), Failure> {
    for op in ops {
        if matches!(op, Op::Compact | Op::CompactPart(_)) {
            // Through the blocking call, which brings the timers that a compaction needs.
            disk.compact(|_| true).map_err(|e| shared.failure(format!("{name} compacting: {e}")))?;
        } else if *op == Op::Compress {
            match disk.compress(|_| true) {
                Ok(_) | Err(Error::Unsupported { .. }) => {}
                Err(e) => return Err(shared.failure(format!("{name} compressing: {e}"))),
            }
        } else {
            block_on(shared.guest(name, disk.image(), std::slice::from_ref(op)))?;
        }
    }
    Ok(())
}

#[test]
fn on_threads() {
    let (mut histories, mut requests, mut work) = (0, 0, Work::default());
    for seed in Slice::new(15, 20, 0.28) {
        match play_on_threads(seed) {
            Ok((count, done)) => {
                requests += count;
                work += done;
            }
            Err(failure) => panic!("seed {seed} (threads: may need several tries)\n{failure}"),
        }
        histories += 1;
    }
    println!("threads: {histories} histories, {requests} requests; {work}");
    tell(&[("histories", histories)]);
}
