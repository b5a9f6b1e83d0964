//! Can the simulation see? With the feature `mutations` the library can be told to break one step of its own crash or
//! concurrency argument; each such mistake must be found by the same histories that find nothing without it.
//!
//! `cargo test --features mutations --test mutations -- --nocapture` prints after how many runs.
#![cfg(feature = "mutations")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::time::{Duration, Instant};

use common::crash::Effort;
use common::cuts::{self, Budget, Counts};
use common::guests::Failure;
use common::play;
use qcow_recycler::mutation::{Mutation, activate};

/// Within so many histories of each sort every mistake must be found.
const HISTORIES: u64 = 400;
/// And within so much time.
const PATIENCE: Duration = Duration::from_secs(120);

const BUDGET: Budget =
    Budget { moments: 24, effort: Effort { exhaustive: 6, random: 24, singles: 8 }, qemu: 0, twice: 0 };

/// One history of each sort, with or without a mistake: the first failure.
fn run(seed: u64, mutation: Option<Mutation>, without_recycler: bool, counts: &mut Counts) -> Option<Failure> {
    // The disks are filled by the library as it should be.
    let mut disks = [cuts::random_history(seed), cuts::racing_history(seed), cuts::reusing_history(seed)];
    let mut calm = play::random_history(seed);
    if without_recycler {
        let rounds = disks.iter_mut().flat_map(|(history, _)| &mut history.rounds).chain(&mut calm.rounds);
        rounds.for_each(|round| round.recycler = false);
    }
    activate(mutation);
    let mut found = disks.iter().find_map(|(history, from)| cuts::play(history, from, BUDGET, counts).err());
    if found.is_none() {
        found = play::against_model(&calm, false).err();
    }
    activate(None);
    found
}

/// Runs histories until one fails: how many were run, how many crash images were looked at, and what was found.
fn hunt(mutation: Mutation) -> (u64, u64, Option<String>) {
    // This one makes the background recycler spin, and to notice that is not to see what it does to an image: only
    // compactions that guests ask for are played.
    let spins = mutation == Mutation::TruncateBeforeDurable;
    let (start, mut counts) = (Instant::now(), Counts::default());
    for seed in 1..=HISTORIES {
        if start.elapsed() > PATIENCE {
            return (seed, counts.images, None);
        }
        if let Some(failure) = run(seed, Some(mutation), spins, &mut counts) {
            // It must be the mutation that was found.
            if let Some(real) = run(seed, None, spins, &mut Counts::default()) {
                panic!("seed {seed} fails without a mutation: {real}");
            }
            return (seed, counts.images, Some(failure.message));
        }
    }
    (HISTORIES, counts.images, None)
}

#[test]
fn every_mutation_is_found() {
    // A mutation may well end in a panic of the runtime asserts; that is found, too, and not worth a backtrace.
    std::panic::set_hook(Box::new(|info| {
        if info.to_string().contains("without a mutation") {
            eprintln!("{info}");
        }
    }));
    let mut missed = Vec::new();
    for mutation in Mutation::ALL {
        let (histories, images, found) = hunt(mutation);
        let how = found.as_deref().map_or("NOT FOUND", |m| m.lines().nth(1).unwrap_or(m));
        println!("{mutation:?}: {histories} histories of each sort, {images} crash images: {how:.160}");
        if found.is_none() {
            missed.push(mutation);
        }
    }
    let _ = std::panic::take_hook();
    assert!(missed.is_empty(), "not found: {missed:?}");
}
