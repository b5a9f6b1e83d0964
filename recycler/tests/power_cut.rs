//! Power cuts: histories on a device that forgets. Whenever something new is in doubt, and after every guest flush, the
//! images that a power cut would leave at that instant are made and looked at: all of them if few sectors are in doubt,
//! a telling sample otherwise. Each must be sound, hold what the model allows, and recover.
//!
//! `QCR_SEED=n cargo test --test power_cut` replays a seed; `QCR_SOAK_MINUTES=n` makes the run longer.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "common/sim_tests.rs"]
mod sim_tests;

use std::time::{Duration, Instant};

use common::config::{Config, ImageKind};
use common::crash::Effort;
use common::cuts::{self, Budget, Counts, Start};
use common::guests::Failure;
use common::history::{self, After, History, Op, Round};
use common::sim::{Delay, Settings};
use common::slice::{self, Slice};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Reports a failure after shortening what led to it.
fn fail(seed: u64, history: History, first: Failure, play: impl Fn(&History) -> Result<(), Failure>) -> ! {
    println!("seed {seed} fails: {}; shortening it", first.message);
    let short = history::shrink(history, |h| play(h).is_err());
    let last = play(&short).err().unwrap_or(first);
    let History { config, rounds, .. } = short;
    panic!(
        "seed {seed}, {config}\nshortened to {rounds:#?}\n{last}\nreplay: QCR_SEED={seed} cargo test --test power_cut"
    );
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
    for seed in Slice::new(30, 10, 0.5) {
        let (history, from) = match seed % 8 {
            3 | 7 => cuts::racing_history(seed),
            5 => cuts::reusing_history(seed),
            _ => cuts::random_history(seed),
        };
        if let Err(failure) = cuts::play(&history, &from, budget, &mut counts) {
            fail(seed, history, failure, |h| cuts::play(h, &from, budget, &mut Counts::default()));
        }
    }
    println!("power cuts, random histories: {counts}, in {:?}", start.elapsed());
    counts.tell();
}

/// A disk of 70 sectors: with clusters of 512 bytes, every table is one sector, and there are two L2 tables.
fn tiny(cluster_bits: u32, lazy_refcounts: bool, l2_cache_size: u64) -> Config {
    let image =
        ImageKind { cluster_bits, refcount_bits: 16, version: 3, lazy_refcounts, preallocated: false, sectors: 70 };
    Config {
        seed: slice::replay_seed().unwrap_or(1),
        image,
        l2_cache_size,
        keep_erased: 1 << cluster_bits,
        compact_after_unmaps: Some(1 << cluster_bits),
        settle: Duration::from_millis(5),
        flush_after: Duration::from_millis(20),
        features: Settings::new(0).features,
        delay: Delay::None,
        overlap: false,
        room: 0,
    }
}

/// What a sequence is made of. The prefilled disk holds data in sectors 0..8, 12..14 and 64..66; the file has holes
/// where 8..12 were.
fn steps() -> Vec<(&'static str, Round)> {
    let round = |ops: &[Op], recycler, after| Round { recycler, guests: vec![ops.to_vec()], after };
    let op = |op| round(&[op], false, After::Nothing);
    vec![
        ("write", op(Op::Write { first: 20, count: 2 })),
        ("overwrite", op(Op::Write { first: 1, count: 2 })),
        ("write across", op(Op::Write { first: 63, count: 2 })),
        ("discard", op(Op::Discard { first: 1, count: 3 })),
        ("discard table", op(Op::Discard { first: 64, count: 6 })),
        ("zeroes", op(Op::WriteZeroes { first: 2, count: 2, may_unmap: false })),
        ("unmap", op(Op::WriteZeroes { first: 3, count: 2, may_unmap: true })),
        ("flush", op(Op::Flush)),
        ("compact", op(Op::Compact)),
        ("recycle", round(&[Op::Sleep(100)], true, After::Nothing)),
        ("shrink", round(&[], false, After::Resize(30))),
        ("grow", round(&[], false, After::Resize(140))),
        ("reopen", round(&[], false, After::Reopen)),
    ]
}

fn prefilled(config: Config, snapshot: bool) -> Start {
    let ops =
        [Op::Write { first: 0, count: 14 }, Op::Write { first: 64, count: 2 }, Op::Discard { first: 8, count: 4 }];
    let history = History { config, compare: false, rounds: vec![Round::of(&ops)] };
    Start::after(&history, snapshot).unwrap_or_else(|failure| panic!("filling the disk: {failure}"))
}

/// Every sequence of up to `whole` steps and a share of those with one more, with a cut at every moment.
fn sequences(name: &str, config: Config, snapshot: bool, whole: usize, one_more: f64) {
    let (steps, start, mut counts) = (steps(), Instant::now(), Counts::default());
    let prefilled = prefilled(config, snapshot);
    let budget = Budget { moments: 1000, effort: Effort { exhaustive: 8, random: 12, singles: 6 }, qemu: 500 };
    let mut rng = SmallRng::seed_from_u64(config.seed);
    let mut level: Vec<Vec<usize>> = vec![Vec::new()];
    for length in 1..=whole + 1 {
        level = level.iter().flat_map(|s| (0..steps.len()).map(|i| [s.as_slice(), &[i]].concat())).collect();
        for sequence in &level {
            if length > whole && !rng.random_bool(one_more) {
                continue;
            }
            let rounds = sequence.iter().map(|&i| steps[i].1.clone()).collect();
            let history = History { config, compare: false, rounds };
            if let Err(failure) = cuts::play(&history, &prefilled, budget, &mut counts) {
                let names: Vec<_> = sequence.iter().map(|&i| steps[i].0).collect();
                panic!("{name}, sequence {names:?}, {config}\n{failure}");
            }
        }
    }
    println!("power cuts, {name}: {counts}, in {:?}", start.elapsed());
    counts.tell();
}

/// The share of longer sequences: all in a soak.
fn share(slice: f64) -> f64 {
    if slice::soak_minutes().is_some() { 1.0 } else { slice }
}

#[test]
fn short_sequences() {
    sequences("short sequences", tiny(9, false, 4 << 20), false, 2, share(0.2));
}

#[test]
fn short_sequences_with_lazy_refcounts() {
    sequences("short sequences, lazy", tiny(9, true, 4 << 20), false, 2, share(0.03));
}

#[test]
fn short_sequences_with_a_cache_that_evicts() {
    sequences("short sequences, tiny cache", tiny(9, false, 0), false, 2, share(0.03));
}

#[test]
fn short_sequences_with_partial_clusters() {
    sequences("short sequences, partial clusters", tiny(10, false, 4 << 20), false, 2, share(0.03));
}

#[test]
fn short_sequences_over_a_snapshot() {
    sequences("short sequences, snapshot", tiny(9, false, 4 << 20), true, 2, share(0.03));
}
