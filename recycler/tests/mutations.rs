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
use common::play;
use qcow_recycler::mutation::{Mutation, activate};

/// Within so many histories of each sort every mistake must be found.
const HISTORIES: u64 = 300;
/// And within so much time.
const PATIENCE: Duration = Duration::from_secs(120);

const BUDGET: Budget = Budget { moments: 60, effort: Effort { exhaustive: 6, random: 24, singles: 8 }, qemu: u64::MAX };

/// Runs histories until one fails: how many were run, how many crash images were looked at, and what was found.
fn hunt(mutation: Mutation) -> (u64, u64, Option<String>) {
    let (start, mut counts) = (Instant::now(), Counts::default());
    for seed in 1..=HISTORIES {
        if start.elapsed() > PATIENCE {
            return (seed, counts.images, None);
        }
        // The disk is filled by the library as it should be.
        let (history, from) = cuts::random_history(seed);
        activate(Some(mutation));
        let found = cuts::play(&history, &from, BUDGET, &mut counts).err();
        let found = found.or_else(|| play::against_model(&play::random_history(seed), false).err());
        activate(None);
        if let Some(failure) = found {
            return (seed, counts.images, Some(failure.message));
        }
    }
    (HISTORIES, counts.images, None)
}

#[test]
fn every_mutation_is_found() {
    // A mutation may well end in a panic of the runtime asserts; that is found, too, and not worth a backtrace.
    std::panic::set_hook(Box::new(|_| {}));
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
