//! Histories: what guests do to a disk, as data, so that a failing one can be replayed and shortened.
//!
//! A history is a list of rounds. In a round several guests work at once, perhaps alongside the recycler; between
//! rounds everything rests, the whole disk is compared, and the image may be resized or opened anew.

use std::time::{Duration, Instant};

use rand::Rng;
use rand::rngs::SmallRng;

use super::config::Config;

/// One request of a guest. Positions and counts are in sectors; a request past the end of the disk is cut or skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Write {
        first: u64,
        count: u64,
    },
    WriteZeroes {
        first: u64,
        count: u64,
        may_unmap: bool,
    },
    /// Written compressed: the clusters that the range touches, whole.
    Pack {
        first: u64,
        count: u64,
    },
    Discard {
        first: u64,
        count: u64,
    },
    Read {
        first: u64,
        count: u64,
    },
    Flush,
    Compact,
    /// Everything is compressed that is not.
    Compress,
    /// A compaction that is cancelled when it reports for the so many-th time.
    CompactPart(u32),
    /// An internal snapshot is made.
    Snapshot,
    /// The so many-th of the internal snapshots, or one after it, is deleted.
    Forget(usize),
    /// Milliseconds.
    Sleep(u64),
    /// The next request is dropped if it has not ended after so many polls.
    DropNext(u32),
}

impl Op {
    /// The sectors it concerns: first and count.
    pub fn range(self) -> Option<(u64, u64)> {
        match self {
            Op::Write { first, count }
            | Op::Pack { first, count }
            | Op::WriteZeroes { first, count, .. }
            | Op::Discard { first, count }
            | Op::Read { first, count } => Some((first, count)),
            Op::Flush
            | Op::Compact
            | Op::Compress
            | Op::CompactPart(_)
            | Op::Snapshot
            | Op::Forget(_)
            | Op::Sleep(_)
            | Op::DropNext(_) => None,
        }
    }
}

/// What happens when a round is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    Nothing,
    /// Close and open again; in between the file is checked.
    Reopen,
    /// A new size in sectors.
    Resize(u64),
    /// The disk becomes what it was when the so many-th of the internal snapshots, or one after it, was made.
    GoBack(usize),
}

/// Guests that work at the same time.
#[derive(Clone, Debug)]
pub struct Round {
    pub recycler: bool,
    pub guests: Vec<Vec<Op>>,
    pub after: After,
}

impl Round {
    /// One guest, alone.
    pub fn of(ops: &[Op]) -> Round {
        Round { recycler: false, guests: vec![ops.to_vec()], after: After::Nothing }
    }
}

/// A whole history.
#[derive(Clone, Debug)]
pub struct History {
    pub config: Config,
    /// Compare the whole disk after every round (which reads everything, and checks the open image).
    pub compare: bool,
    pub rounds: Vec<Round>,
}

/// How much is to happen.
#[derive(Clone, Copy, Debug)]
pub struct Length {
    pub rounds: usize,
    pub guests: usize,
    pub ops: usize,
}

impl History {
    /// A random history.
    pub fn random(config: Config, length: Length, rng: &mut SmallRng) -> History {
        let sectors = config.image.sectors;
        let rounds = (0..rng.random_range(1..=length.rounds))
            .map(|_| {
                let guests = rng.random_range(1..=length.guests);
                let ops = rng.random_range(1..=length.ops);
                // Whole phases of filling and of freeing make holes worth compacting.
                let freeing = [0.15, 0.5, 0.8][rng.random_range(0..3)];
                Round {
                    recycler: rng.random_bool(0.7),
                    guests: (0..guests).map(|_| (0..ops).map(|_| random_op(&config, freeing, rng)).collect()).collect(),
                    after: match rng.random_range(0..10) {
                        0..=2 => After::Reopen,
                        3 => After::Resize(rng.random_range(1..=sectors + sectors / 2)),
                        4 => After::GoBack(rng.random_range(0..4)),
                        _ => After::Nothing,
                    },
                }
            })
            .collect();
        History { config, compare: true, rounds }
    }

    /// Guests that overwrite, read and discard while others compact, on the same sectors: for what goes wrong when a
    /// request is still under way. Best played on a disk full of holes and a device with long delays.
    pub fn racing(config: Config, rng: &mut SmallRng) -> History {
        let (cluster, sectors) = (config.image.cluster_sectors(), config.image.sectors);
        let mut guest = |compacts: bool| -> Vec<Op> {
            (0..25)
                .map(|_| {
                    let (first, count) = random_range(sectors, cluster, rng);
                    match rng.random_range(0..20) {
                        0..=3 if compacts => match rng.random_range(0..8) {
                            0 => Op::Snapshot,
                            1 => Op::Forget(rng.random_range(0..4)),
                            _ => Op::Compact,
                        },
                        0..=9 => Op::Write { first, count: count.min(4) },
                        10..=13 => Op::Read { first, count },
                        14..=15 => Op::Discard { first: first / cluster * cluster, count: cluster },
                        16 => Op::Flush,
                        _ => Op::Sleep(rng.random_range(1..20)),
                    }
                })
                .map(|op| match op {
                    // Cut to whole clusters only where the disk has them.
                    Op::Discard { first, count } => Op::Discard { first, count: count.min(sectors - first) },
                    op => op,
                })
                .collect()
        };
        let guests = vec![guest(false), guest(false), guest(true), guest(true)];
        History { config, compare: true, rounds: vec![Round { recycler: true, guests, after: After::Nothing }] }
    }

    /// Slow writes to clusters that are discarded, made durable, erased and handed out again meanwhile: for what goes
    /// wrong when a freed cluster is reused under a request that is still using it.
    pub fn reusing(config: Config, rng: &mut SmallRng) -> History {
        let (cluster, sectors) = (config.image.cluster_sectors(), config.image.sectors);
        let mut pick = |count: u64| {
            let first = rng.random_range(0..sectors) / cluster * cluster;
            (first, count.min(sectors - first))
        };
        let mut guests = vec![Vec::new(); 4];
        for _ in 0..30 {
            let (first, count) = pick(1);
            guests[0].push(Op::Write { first, count });
            let (first, count) = pick(1);
            guests[1].push(Op::Write { first, count });
            // Freed, durable, and time to be erased.
            let (first, count) = pick(4 * cluster);
            guests[2].extend([Op::Discard { first, count }, Op::Flush, Op::Sleep(3)]);
            let (first, count) = pick(3 * cluster);
            guests[3].push(Op::Write { first, count });
        }
        History { config, compare: true, rounds: vec![Round { recycler: true, guests, after: After::Nothing }] }
    }

    /// Writes that are overtaken by compactions, and by discards whose clusters are handed out again.
    pub fn overtaken(config: Config, rng: &mut SmallRng) -> History {
        let (cluster, sectors) = (config.image.cluster_sectors(), config.image.sectors);
        let mut guests = vec![Vec::new(); 6];
        for _ in 0..12 {
            let mut pick = |clusters: u64, from: u64| {
                let first = rng.random_range(from..sectors) / cluster * cluster;
                (first, (clusters * cluster).min(sectors - first))
            };
            // Moves begin at the end of the file, which is likely the end of the disk.
            for guest in &mut guests[0..3] {
                let (first, count) = pick(1, sectors / 2);
                guest.extend([Op::Sleep(20 + first % 20), Op::Write { first, count: count.min(2) }]);
            }
            let (first, count) = pick(3, sectors / 2);
            guests[3].extend([Op::Sleep(10), Op::Discard { first, count }, Op::Flush, Op::Sleep(20)]);
            let (first, count) = pick(2, 0);
            guests[4].extend([Op::Sleep(25), Op::Write { first, count }]);
            guests[5].extend([Op::Sleep(5), Op::Compact, Op::Sleep(60)]);
        }
        History { config, compare: true, rounds: vec![Round { recycler: true, guests, after: After::Nothing }] }
    }

    /// How many requests it has.
    pub fn len(&self) -> usize {
        self.rounds.iter().flat_map(|r| &r.guests).map(Vec::len).sum()
    }

    /// Shorter histories to try when this one fails: without a round, a guest, a run of requests, one request, the
    /// recycler, or what follows a round.
    pub fn shorter(&self) -> Vec<History> {
        let mut out = Vec::new();
        let mut push = |change: &dyn Fn(&mut Vec<Round>)| {
            let mut rounds = self.rounds.clone();
            change(&mut rounds);
            out.push(History { rounds, ..*self });
        };
        for r in 0..self.rounds.len() {
            push(&|rounds| drop(rounds.remove(r)));
        }
        for (r, round) in self.rounds.iter().enumerate() {
            if round.guests.len() > 1 {
                (0..round.guests.len()).for_each(|g| push(&|rounds| drop(rounds[r].guests.remove(g))));
            }
            if round.recycler {
                push(&|rounds| rounds[r].recycler = false);
            }
            if round.after != After::Nothing {
                push(&|rounds| rounds[r].after = After::Nothing);
            }
            for (g, ops) in round.guests.iter().enumerate() {
                let mut step = ops.len() / 2;
                while step > 0 {
                    for start in (0..ops.len()).step_by(step) {
                        let end = (start + step).min(ops.len());
                        push(&|rounds| drop(rounds[r].guests[g].drain(start..end)));
                    }
                    step /= 2;
                }
            }
        }
        out
    }
}

fn random_op(config: &Config, freeing: f64, rng: &mut SmallRng) -> Op {
    let cluster = config.image.cluster_sectors();
    let sectors = config.image.sectors;
    let (first, count) = random_range(sectors, cluster, rng);
    match rng.random_range(0..100) {
        0..=54 => {
            if rng.random_bool(freeing) {
                let (first, count) = if rng.random_bool(0.4) {
                    let first = rng.random_range(0..sectors);
                    (first, rng.random_range(1..=(sectors - first).min(cluster * 40)))
                } else {
                    (first, count)
                };
                if rng.random_bool(0.75) {
                    Op::Discard { first, count }
                } else {
                    Op::WriteZeroes { first, count, may_unmap: rng.random_bool(0.7) }
                }
            } else {
                Op::Write { first, count }
            }
        }
        55..=74 => Op::Write { first, count },
        75..=79 => Op::Read { first, count },
        80..=87 => Op::Flush,
        88..=89 => Op::DropNext(rng.random_range(1..12)),
        90 => Op::Compact,
        91 => Op::CompactPart(rng.random_range(1..6)),
        92 => Op::Compress,
        93 => Op::Pack { first, count },
        94 => Op::Snapshot,
        95 => Op::Forget(rng.random_range(0..4)),
        _ => Op::Sleep(rng.random_range(1..60)),
    }
}

/// Part of a cluster, some whole clusters, or any range.
fn random_range(sectors: u64, cluster: u64, rng: &mut SmallRng) -> (u64, u64) {
    let first = rng.random_range(0..sectors);
    let (first, count) = match rng.random_range(0..4) {
        0 => (first, rng.random_range(1..=8)),
        1 | 2 => (first / cluster * cluster, rng.random_range(1..=6) * cluster),
        _ => (first, rng.random_range(1..=4 * cluster)),
    };
    (first, count.min(sectors - first))
}
/// Shortens a failing history as long as `fails` still fails, for up to a minute.
pub fn shrink(history: History, fails: impl Fn(&History) -> bool) -> History {
    let (mut best, start) = (history, Instant::now());
    'again: loop {
        for candidate in best.shorter() {
            if start.elapsed() > Duration::from_secs(60) {
                return best;
            }
            if fails(&candidate) {
                best = candidate;
                continue 'again;
            }
        }
        return best;
    }
}
