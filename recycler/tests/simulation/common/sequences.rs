//! Short sequences of steps on tiny images: few enough to try all of them, with a cut at every moment.

use std::time::{Duration, Instant};

use rand::SeedableRng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;

use super::chain::Behind;
use super::config::{Config, ImageKind};
use super::crash::Effort;
use super::cuts::{self, Budget, Counts, Made, Start};
use super::encryption::Encryption;
use super::guests::Failure;
use super::history::{After, History, Op, Round};
use super::sim::{Delay, Settings};
use super::slice;

/// An image that sequences are played on.
#[derive(Clone, Copy, Debug)]
pub struct Variant {
    pub name: &'static str,
    pub cluster_bits: u32,
    pub refcount_bits: u32,
    pub version: u32,
    pub lazy_refcounts: bool,
    pub extended_l2: bool,
    pub zstd: bool,
    pub encryption: Encryption,
    pub backing: Behind,
    /// Of the disk.
    pub sectors: u64,
    pub l2_cache_size: u64,
    /// How the disk is made.
    pub made: Made,
    /// Clusters of garbage after the image, on a device that cannot be resized.
    pub room: u64,
}

/// With clusters of 512 bytes every table is one sector, and there are two L2 tables.
pub const PLAIN: Variant = Variant {
    name: "plain",
    cluster_bits: 9,
    refcount_bits: 16,
    version: 3,
    lazy_refcounts: false,
    extended_l2: false,
    zstd: false,
    encryption: Encryption::None,
    backing: Behind::Nothing,
    sectors: 70,
    l2_cache_size: 4 << 20,
    made: Made::Plain,
    room: 0,
};

/// What a sequence is made of. The prefilled disk holds data in sectors 0..8, 12..14 and 64..66, and at the start of every
/// further L2 table; the file has holes where 8..12 were.
pub fn steps(variant: &Variant) -> Vec<(&'static str, Round)> {
    let round = |ops: &[Op], recycler, after| Round { recycler, guests: vec![ops.to_vec()], after };
    let op = |op| round(&[op], false, After::Nothing);
    // Where there are many tables, all of them.
    let all_tables: Vec<Op> = (20..variant.sectors).step_by(64).map(|first| Op::Write { first, count: 2 }).collect();
    let mut steps = vec![
        ("write", round(&all_tables, false, After::Nothing)),
        ("write much", op(Op::Write { first: 16, count: 48 })),
        ("overwrite", op(Op::Write { first: 1, count: 2 })),
        ("partial write", op(Op::Write { first: 27, count: 1 })),
        ("write across", op(Op::Write { first: 63, count: 2 })),
        ("discard", op(Op::Discard { first: 1, count: 3 })),
        ("discard table", op(Op::Discard { first: 64, count: 6 })),
        ("zeroes", op(Op::WriteZeroes { first: 2, count: 2, may_unmap: false })),
        ("unmap", op(Op::WriteZeroes { first: 3, count: 2, may_unmap: true })),
        ("flush", op(Op::Flush)),
        ("compact", op(Op::Compact)),
        ("move", op(Op::CompactPart(3))),
        // Not long enough for a flush, nor for a compaction.
        ("erase", round(&[Op::Sleep(3)], true, After::Nothing)),
        ("recycle", round(&[Op::Sleep(100)], true, After::Nothing)),
        ("snapshot", op(Op::Snapshot)),
        ("forget", op(Op::Forget(0))),
        ("go back", round(&[], false, After::GoBack(0))),
        // To a size that ends inside a cluster, if it can.
        ("shrink", round(&[], false, After::Resize(13))),
        ("grow", round(&[], false, After::Resize(variant.sectors * 2))),
        ("reopen", round(&[], false, After::Reopen)),
    ];
    if variant.backing.exists() {
        // Where nothing was written before.
        steps.push(("hide", op(Op::Discard { first: 31, count: 6 })));
        steps.push(("zero part", op(Op::WriteZeroes { first: 45, count: 1, may_unmap: true })));
        let beside = [Op::Write { first: 33, count: 1 }, Op::Write { first: 32, count: 1 }];
        steps.push(("write beside", round(&beside, false, After::Nothing)));
    }
    if variant.made == Made::Compressed {
        steps.push(("compress", op(Op::Compress)));
        steps.push(("pack", op(Op::Pack { first: 2, count: 9 })));
    }
    steps
}

impl Variant {
    /// The set-up, which everything follows from.
    pub fn config(&self, seed: u64) -> Config {
        let image = ImageKind {
            cluster_bits: self.cluster_bits,
            refcount_bits: self.refcount_bits,
            version: self.version,
            lazy_refcounts: self.lazy_refcounts,
            extended_l2: self.extended_l2,
            preallocated: false,
            zstd: self.zstd,
            encryption: self.encryption,
            backing: self.backing,
            sectors: self.sectors,
        };
        let features = Settings::new(0).features;
        Config {
            seed,
            image,
            l2_cache_size: self.l2_cache_size,
            keep_erased: 1 << self.cluster_bits,
            compact_after_unmaps: Some(1 << self.cluster_bits),
            rate_limit: None,
            settle: Duration::from_millis(5),
            flush_after: Duration::from_millis(20),
            features: qcow_recycler::device::Features { resize: self.room == 0, ..features },
            delay: Delay::None,
            overlap: false,
            sparse: false,
            room: self.room,
        }
    }

    /// The prefilled disk.
    pub fn start(&self, config: Config) -> Start {
        let mut ops = vec![Op::Write { first: 0, count: 14 }];
        ops.extend((64..self.sectors).step_by(64).map(|first| Op::Write { first, count: 2 }));
        if self.made == Made::Compressed {
            // Clusters that hold little compress well, and there are enough of them for some to lie behind holes later.
            ops.extend(
                (16..self.sectors).step_by(1 << (self.cluster_bits - 9)).map(|first| Op::Write { first, count: 1 }),
            );
        }
        ops.push(Op::Discard { first: 8, count: 4 });
        let history = History { config, compare: false, rounds: vec![Round::of(&ops)] };
        Start::after(&history, self.made).unwrap_or_else(|failure| panic!("filling the disk: {failure}"))
    }

    /// Plays one sequence, with a cut at every moment.
    ///
    /// # Errors
    /// What is wrong.
    pub fn play(&self, config: Config, start: &Start, sequence: &[usize], counts: &mut Counts) -> Result<(), Failure> {
        let steps = steps(self);
        let rounds = sequence.iter().map(|&i| steps[i].1.clone()).collect();
        let effort = Effort { exhaustive: 8, random: 12, singles: 6 };
        // QEMU does not open these.
        let qemu = if self.encryption == Encryption::Luks { 0 } else { 500 };
        let budget = Budget { moments: 1000, effort, qemu, twice: 151 };
        cuts::play(&History { config, compare: false, rounds }, start, budget, counts)
    }

    /// Every sequence of up to two steps, and of those with three: so many in an ordinary run, in a soak as many as its
    /// share of the time allows, in an order that the seed decides.
    pub fn sequences(&self, threes: usize, share: f64) {
        let seed = slice::replay_seed()
            .unwrap_or_else(|| if slice::soak_minutes().is_some() { slice::soak_seed() } else { 1 });
        let config = self.config(seed);
        let (start, began, mut counts) = (self.start(config), Instant::now(), Counts::default());
        let deadline = slice::soak_deadline(share);
        let names: Vec<_> = steps(self).into_iter().map(|(name, _)| name).collect();
        let mut all: Vec<Vec<usize>> = vec![Vec::new()];
        for length in 1..=3 {
            let before = all.split_off(0);
            let longer = |s: &Vec<usize>| (0..names.len()).map(|i| [s.as_slice(), &[i]].concat()).collect::<Vec<_>>();
            let next: Vec<Vec<usize>> = before.iter().filter(|s| s.len() + 1 == length).flat_map(longer).collect();
            all = before;
            all.extend(next);
        }
        // The shorter ones first: what one of them finds needs no shortening.
        let at = all.partition_point(|s| s.len() < 3);
        all[at..].shuffle(&mut SmallRng::seed_from_u64(seed));
        if let Ok(wanted) = std::env::var("QCR_SEQUENCE") {
            all = vec![wanted.split(',').filter_map(|w| names.iter().position(|n| *n == w.trim())).collect()];
        } else if deadline.is_none() {
            all.truncate(at + threes);
        }
        let total = all.len();
        let mut done = 0;
        for sequence in all {
            if deadline.is_some_and(|deadline| Instant::now() > deadline) {
                break;
            }
            done += 1;
            if let Err(failure) = self.play(config, &start, &sequence, &mut counts) {
                let named: Vec<_> = sequence.iter().map(|&i| names[i]).collect();
                panic!(
                    "{}, sequence {named:?}, {config}\n{failure}\nreplay: QCR_SEED={seed} QCR_SEQUENCE='{}' cargo test \
                     --test simulation sequences::{}",
                    self.name,
                    named.join(","),
                    self.name.replace(' ', "_")
                );
            }
        }
        println!("power cuts, {}: {done} of {total} sequences; {counts}, in {:?}", self.name, began.elapsed());
        counts.tell();
    }
}
