//! Can the simulation see? The library can be told to break one step of its own crash or concurrency argument; each such
//! mistake must be found by histories that find nothing without it.
//!
//! `cargo test -p qcow-recycler --test simulation mutations:: -- --ignored --nocapture` prints by what, and after how many runs;
//! `QCR_MUTATION=name` tries one only, `QCR_SEED=n` begins with another seed.

use std::fmt;
use std::panic::{RefUnwindSafe, catch_unwind};
use std::time::Instant;

use crate::commit;
use crate::common::chain::Behind;
use crate::common::crash::Effort;
use crate::common::cuts::{self, Budget, Counts, Made, Start};
use crate::common::directed;
use crate::common::disturb;
use crate::common::encryption::Encryption;
use crate::common::guests::Failure;
use crate::common::history::History;
use crate::common::sequences::{PLAIN, Variant, steps};
use crate::common::sim::Kind;
use crate::common::slice;
use crate::data_file;
use parking_lot::Mutex;
use qcow_recycler::mutation::{Mutation, activate};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Only one hunt at a time: it breaks the library for the whole process.
static ALONE: Mutex<()> = Mutex::new(());

/// Within so many runs every mistake must be found. Most are in one to ten; the rest is margin, and what a run costs that
/// has stopped seeing.
const RUNS: u64 = 200;

/// Where a mistake is looked for.
#[derive(Clone, Copy)]
enum Sort {
    /// Four random steps, on one kind of image, with power cuts at every moment.
    Steps(Variant),
    /// These steps.
    Named(Variant, &'static [&'static str]),
    /// Histories with power cuts at many moments.
    Cut(&'static str, fn(u64) -> (History, Start)),
    /// Histories without: what other guests see is the harm.
    Race(&'static str, fn(u64) -> (History, Start)),
    /// A random history in which the device fails, if asked for in an operation of one kind.
    Faults(Option<Kind>),
}

impl fmt::Display for Sort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Sort::Steps(variant) => write!(f, "random steps on {}", variant.name),
            Sort::Named(variant, steps) => write!(f, "the steps \"{}\" on {}", steps.join(", "), variant.name),
            Sort::Cut(name, _) => write!(f, "{name}, with power cuts"),
            Sort::Race(name, _) => f.write_str(name),
            Sort::Faults(None) => f.write_str("random faults"),
            Sort::Faults(Some(kind)) => write!(f, "random faults of {kind:?}"),
        }
    }
}

const SNAPSHOT: Variant = Variant { name: "snapshot", made: Made::WithSnapshot, ..PLAIN };
const COMPRESSED: Variant =
    Variant { name: "compressed", cluster_bits: 11, sectors: 96, made: Made::Compressed, ..PLAIN };
const ENCRYPTED: Variant = Variant { name: "encrypted", cluster_bits: 10, encryption: Encryption::Luks, ..PLAIN };
const OVER_A_FILE: Variant = Variant { name: "over a file", cluster_bits: 11, backing: Behind::Raw(70), ..PLAIN };
const PARTIAL: Variant = Variant { name: "partial clusters", cluster_bits: 10, ..PLAIN };
const MANY_BLOCKS: Variant = Variant { name: "many refcount blocks", refcount_bits: 64, ..PLAIN };

/// The histories that show a mistake, by what it breaks.
fn sort(mutation: Mutation) -> Sort {
    use Mutation as M;
    match mutation {
        M::CommitCancelledMove => Sort::Race("writes under slow moves", directed::writes_under_slow_moves),
        M::CopyWithoutGrace => Sort::Race("held writes under moves", directed::held_writes_under_moves),
        M::ReuseWithoutGrace => Sort::Race("held writes", directed::held_writes),
        M::SnapshotUnderWrites => Sort::Race("held writes under snapshots", directed::held_writes_under_snapshots),
        M::KeepCutOff => Sort::Race("writes under truncations", directed::writes_under_truncations),
        M::WriteOnePlace => Sort::Race("moving tables", directed::moving_tables),
        M::PromoteLateWork => Sort::Cut("late work", directed::late_work),
        M::HeaderBeforeTable => Sort::Cut("outgrowing", cuts::outgrowing_history),
        M::RewriteSharedBeforeFlush | M::SkipBarrier | M::LinkTableCopyEarly | M::LinkBeforeData => {
            Sort::Steps(SNAPSHOT)
        }
        M::LinkBeforeCopyUp => Sort::Steps(OVER_A_FILE),
        M::LinkBeforeEncrypted => Sort::Steps(ENCRYPTED),
        M::RewritePackedBeforeFlush => Sort::Steps(COMPRESSED),
        M::EntryBeforeBlock | M::ReferenceBeforeEntry | M::TablesBeforeCounts => Sort::Steps(MANY_BLOCKS),
        M::GrowBeforeClearing => Sort::Named(PARTIAL, &["shrink", "grow"]),
        M::ShowBeforeZeroes => Sort::Named(PARTIAL, &["zeroes", "flush", "overwrite", "flush"]),
        M::HeaderBeforeL1 => Sort::Named(PLAIN, &["grow"]),
        M::HeaderBeforeSnapshot => Sort::Named(PLAIN, &["snapshot"]),
        M::ForgiveFailedFlush => Sort::Faults(Some(Kind::Flush)),
        M::ForgetFailedCommit => Sort::Faults(None),
        M::RewriteBeforeFlush
        | M::ReuseFreedAtOnce
        | M::UncountSourceEarly
        | M::TruncateBeforeDurable
        | M::ChangeBeforeMark
        | M::UnmarkEarly
        | M::ErasedAsAvailable
        | M::ForgetBeforeSize => Sort::Steps(PLAIN),
        other => panic!("{other:?} is not for histories: the models look for it"),
    }
}

/// What a seed makes of steps.
fn history_of_steps(variant: Variant, names: Option<&[&str]>, seed: u64) -> (History, Start) {
    let (config, mut rng) = (variant.config(seed), SmallRng::seed_from_u64(seed));
    let all = steps(&variant);
    let chosen: Vec<_> = match names {
        Some(names) => names.iter().map(|name| all.iter().find(|s| s.0 == *name).expect("a step's name")).collect(),
        None => (0..4).map(|_| &all[rng.random_range(0..all.len())]).collect(),
    };
    let rounds = chosen.into_iter().map(|(_, round)| round.clone()).collect();
    (History { config, compare: true, rounds }, variant.start(config))
}

/// One run of a sort, from its seed, with or without a mistake. The library makes none while the disk is filled, nor while it
/// recovers what a power cut has left.
fn run(sort: Sort, seed: u64, mutation: Option<Mutation>, counts: &mut Counts) -> Result<(), Failure> {
    let effort = Effort { exhaustive: 7, random: 24, singles: 8 };
    let ((history, start), moments) = match sort {
        Sort::Steps(variant) => (history_of_steps(variant, None, seed), 1000),
        Sort::Named(variant, names) => (history_of_steps(variant, Some(names), seed), 1000),
        Sort::Cut(_, history) => (history(seed), 40),
        Sort::Race(_, history) => (history(seed), 0),
        Sort::Faults(only) => {
            // These two do nothing unless the device fails.
            activate(mutation);
            let done = disturb::random_fault(seed, only);
            activate(None);
            counts.images += done?.map_or(0, |o| o.crash_images);
            return Ok(());
        }
    };
    activate(mutation);
    let result =
        cuts::play_then(&history, &start, Budget { moments, effort, qemu: 0, twice: 0 }, counts, || activate(None));
    activate(None);
    result
}

/// Runs histories until one fails: how many were run, how many crash images were looked at, and what was found.
fn hunt(mutation: Mutation, first: u64) -> (u64, u64, Option<String>) {
    let mut counts = Counts::default();
    for number in 1..=RUNS {
        let seed = first + number - 1;
        if let Err(failure) = run(sort(mutation), seed, Some(mutation), &mut counts) {
            // It must be the mutation that was found.
            if let Err(real) = run(sort(mutation), seed, None, &mut Counts::default()) {
                panic!("seed {seed} fails without a mutation: {real}");
            }
            return (number, counts.images, Some(failure.message));
        }
    }
    (RUNS, counts.images, None)
}

/// Hunts for each mutation with the seeds from `first` on; how many were found, and which were not.
fn hunt_all(first: u64) -> (u64, Vec<Mutation>) {
    let wanted = std::env::var("QCR_MUTATION").unwrap_or_default();
    let (mut found_in_all, mut missed) = (0, Vec::new());
    println!("from seed {first}:");
    for mutation in Mutation::ALL {
        if !format!("{mutation:?}").contains(&wanted) {
            continue;
        }
        let began = Instant::now();
        let (runs, images, found) = hunt(mutation, first);
        let how = found.as_deref().map_or("NOT FOUND", |m| m.lines().nth(1).unwrap_or(m));
        let took = began.elapsed();
        println!("{mutation:?}: {}: {runs} runs, {images} crash images, {took:.1?}: {how:.160}", sort(mutation));
        found_in_all += u64::from(found.is_some());
        if found.is_none() {
            missed.push(mutation);
        }
    }
    (found_in_all, missed)
}

#[test]
#[ignore = "breaks the library for the whole process: make rust-test runs it by itself"]
fn in_histories() {
    let _alone = ALONE.lock();
    // A mutation may well end in a panic of the runtime asserts; that is found, too, and not worth a backtrace.
    std::panic::set_hook(Box::new(|info| {
        if info.to_string().contains("without a mutation") {
            eprintln!("{info}");
        }
    }));
    let soak = || slice::soak_minutes().map(|_| slice::soak_seed());
    let mut first = slice::replay_seed().or_else(soak).unwrap_or(1);
    let end = slice::soak_deadline(0.9);
    let missed = loop {
        let (found, missed) = hunt_all(first);
        slice::tell(&[("mutations_found", found)]);
        // A soak goes on with other seeds for as long as it may.
        if !missed.is_empty() || end.is_none_or(|end| Instant::now() > end) {
            break missed;
        }
        first += RUNS;
    };
    let _ = std::panic::take_hook();
    assert!(missed.is_empty(), "not found from seed {first} on: {missed:?}");
}

/// Which of these mistakes a test of its own finds, and within how many of its seeds.
fn hunt_by_seed(mutations: &[Mutation], seeds: u64, play: impl Fn(u64) -> Result<(), String> + RefUnwindSafe) {
    let _alone = ALONE.lock();
    for &mutation in mutations {
        let found = (1..=seeds).find_map(|seed| {
            activate(Some(mutation));
            let result = catch_unwind(|| play(seed));
            activate(None);
            result.map_or(Some((seed, "a panic".to_owned())), |played| played.err().map(|found| (seed, found)))
        });
        let (runs, found) = found.unwrap_or_else(|| panic!("{mutation:?} was not found"));
        println!("{mutation:?}: {runs} runs: {found}");
    }
}

#[test]
#[ignore = "breaks the library for the whole process: make rust-test runs it by itself"]
fn over_a_data_file() {
    hunt_by_seed(&Mutation::DATA_FILE, 200, |seed| data_file::play(seed).map(drop));
    // A hole before the reads under way had ended.
    hunt_by_seed(&[Mutation::ReuseWithoutGrace], 60, data_file::reads_under_discards);
}

#[test]
#[ignore = "breaks the library for the whole process: make rust-test runs it by itself"]
fn in_a_commit() {
    hunt_by_seed(&Mutation::COMMIT, 50, |seed| commit::play(seed).map(drop));
}
