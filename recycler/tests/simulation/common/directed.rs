//! Histories for mistakes that random ones seldom meet: few clusters, all of them in use at once, on a device that holds
//! back just what others must not overtake.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::chain::Behind;
use super::config::Config;
use super::cuts::{Made, Start, full_of_holes};
use super::history::{After, History, Op, Round};
use super::sequences::{PLAIN, Variant};
use super::sim::Delay;

/// Any of these.
pub fn any(seed: u64) -> (History, Start) {
    match seed / 8 % 9 {
        0 => held_writes(seed),
        1 => held_writes_under_moves(seed),
        2 => writes_under_slow_moves(seed),
        3 => late_work(seed),
        4 => held_writes_under_snapshots(seed),
        5 => first_writes(seed),
        6 => writes_under_truncations(seed),
        7 => moves_in_parts(seed),
        _ => moving_tables(seed),
    }
}

/// Writes in place are held by the device while their clusters are discarded, and the discards flushed; the recycler wants
/// every cluster that is free for its pool, and other guests write to what it hands out. What reuses a cluster before the
/// writes that were there first have ended, gets their data.
pub fn held_writes(seed: u64) -> (History, Start) {
    let (mut config, mut rng) = set_up(seed ^ 0x0068_656c_6400, 24);
    config.delay = Delay::SlowGuests { millis: 60 };
    let start = full(config);
    let mut guests = vec![Vec::new(); 5];
    for _ in 0..15 {
        for writer in &mut guests[0..3] {
            writer.push(Op::Write { first: rng.random_range(0..config.image.sectors), count: 1 });
        }
        guests[3].extend([discard(&config, 3, &mut rng), Op::Flush, Op::Sleep(rng.random_range(12..30))]);
        guests[4].push(Op::Write { first: rng.random_range(0..config.image.sectors), count: 3 });
    }
    (concurrently(config, guests, After::Nothing), start)
}

/// Writes in place are held by the device while a compaction moves their clusters.
pub fn held_writes_under_moves(seed: u64) -> (History, Start) {
    under_moves(seed ^ 0x006d_6f76_6531, Delay::SlowGuests { millis: 60 })
}

/// Writes in place are held by the device while snapshots come and go, and others write to the rest of their clusters: which are
/// a snapshot's by then, if nobody awaited the first ones, and copied without their data.
pub fn held_writes_under_snapshots(seed: u64) -> (History, Start) {
    let mut rng = SmallRng::seed_from_u64(seed ^ 0x736e_6170);
    let config = Variant { cluster_bits: 11, sectors: 24, ..PLAIN }.config(seed);
    let start = full(config);
    let config = Config { delay: Delay::SlowGuests { millis: 60 }, ..config };
    let mut guests = vec![Vec::new(); 5];
    for _ in 0..10 {
        for writer in &mut guests[0..4] {
            let first = rng.random_range(0..config.image.sectors);
            writer.extend([Op::Write { first, count: 1 }, Op::Sleep(rng.random_range(1..30))]);
        }
        guests[4].extend([Op::Sleep(rng.random_range(1..50)), Op::Snapshot, Op::Sleep(rng.random_range(1..50))]);
        guests[4].push(Op::Forget(0));
    }
    (concurrently(config, guests, After::Nothing), start)
}

/// Guests write to the same clusters for the first time, all at once and none to the sectors of another: what is around them is a
/// backing file's, and must not come back over what another has just written.
pub fn first_writes(seed: u64) -> (History, Start) {
    let mut rng = SmallRng::seed_from_u64(seed ^ 0x6669_7273);
    let backing = [Behind::Raw(90), Behind::Image(100), Behind::Two(96)][rng.random_range(0..3)];
    let subclusters = rng.random_bool(0.3);
    let cluster_bits = if subclusters { 14 } else { 12 };
    let variant = Variant { cluster_bits, extended_l2: subclusters, sectors: 96, backing, ..PLAIN };
    let config = Config { delay: Delay::Sleeps { yields: 3, millis: 4 }, ..variant.config(seed) };
    let mut guests = vec![Vec::new(); 4];
    for first in (0..96).step_by(8) {
        for (guest, at) in guests.iter_mut().zip([0, 2, 4, 6]) {
            let (first, count) = (first + at + rng.random_range(0..2), 1);
            guest.push(match rng.random_range(0..8) {
                0 => Op::Discard { first, count },
                1 => Op::WriteZeroes { first, count, may_unmap: rng.random() },
                _ => Op::Write { first, count },
            });
            if rng.random_bool(0.2) {
                guest.push(Op::Flush);
            }
        }
    }
    (concurrently(config, guests, After::Nothing), Start::empty(&config))
}

/// Guests write to what is being moved while the copies are being flushed, which takes long.
pub fn writes_under_slow_moves(seed: u64) -> (History, Start) {
    under_moves(seed ^ 0x006d_6f76_6532, Delay::SlowFlushes { millis: 60 })
}

fn under_moves(seed: u64, delay: Delay) -> (History, Start) {
    let (mut config, mut rng) = set_up(seed, 32);
    config.keep_erased = 0;
    let start = full_of_holes(config, &mut rng);
    config.delay = delay;
    let mut guests = vec![Vec::new(); 4];
    for _ in 0..6 {
        for writer in &mut guests[0..3] {
            for _ in 0..3 {
                let first = rng.random_range(0..config.image.sectors);
                writer.extend([Op::Write { first, count: 1 }, Op::Sleep(rng.random_range(1..20))]);
            }
        }
        guests[3].extend([Op::Sleep(rng.random_range(10..40)), discard(&config, 3, &mut rng), Op::Flush, Op::Compact]);
    }
    (concurrently(config, guests, After::Nothing), start)
}

/// The end of a full disk's file is cut off, in several steps, while guests write to a few sectors of clusters that are not
/// there any more: what they take of what is still there holds what it held.
pub fn writes_under_truncations(seed: u64) -> (History, Start) {
    let mut rng = SmallRng::seed_from_u64(seed ^ 0x7472_756e);
    let (config, start) = large_clusters(seed, 24);
    let (cluster, sectors) = (config.image.cluster_sectors(), config.image.sectors);
    let mut guests = vec![Vec::new(); 3];
    for _ in 0..4 {
        let first = rng.random_range(1..4) * cluster;
        guests[0].extend([Op::Discard { first, count: sectors - first }, Op::Flush, Op::Compact]);
        for writer in &mut guests[1..] {
            for _ in 0..4 {
                let first = rng.random_range(0..sectors);
                writer.extend([Op::Sleep(rng.random_range(1..12)), Op::Write { first, count: 3.min(sectors - first) }]);
            }
            writer.push(Op::Read { first: 0, count: sectors });
        }
    }
    (History { compare: true, ..concurrently(config, guests, After::Nothing) }, start)
}

/// Clusters move into holes that occupy no space: in parts, each with flushes of its own, after which the end of the file is cut
/// off, while guests change what is moved.
pub fn moves_in_parts(seed: u64) -> (History, Start) {
    let mut rng = SmallRng::seed_from_u64(seed ^ 0x7061_7274);
    let (config, start) = large_clusters(seed, 16);
    let config = Config { sparse: true, ..config };
    let (cluster, sectors) = (config.image.cluster_sectors(), config.image.sectors);
    let mut guests = vec![vec![Op::Discard { first: 0, count: 7 * cluster }, Op::Flush, Op::Compact, Op::Flush]];
    guests.push(
        (0..8)
            .flat_map(|_| {
                let first = rng.random_range(8 * cluster..sectors);
                let change =
                    if rng.random_bool(0.3) { discard(&config, 1, &mut rng) } else { Op::Write { first, count: 1 } };
                [Op::Sleep(rng.random_range(1..30)), change]
            })
            .collect(),
    );
    (concurrently(config, guests, After::Nothing), start)
}

/// A disk of so many clusters of 64 KiB, written whole: steps of the work on a file's end, and parts of a batch, are of several.
fn large_clusters(seed: u64, clusters: u64) -> (Config, Start) {
    let config = Variant { cluster_bits: 16, sectors: clusters * 128, ..PLAIN }.config(seed);
    let start = full(config);
    let delay = Delay::Sleeps { yields: 2, millis: 4 };
    (Config { overlap: true, keep_erased: 0, compact_after_unmaps: None, delay, ..config }, start)
}

/// Guests flush a slow device, often one while the other does, and others discard and write all the time: what happens
/// while one flush is under way is durable with the next one only.
pub fn late_work(seed: u64) -> (History, Start) {
    let (mut config, mut rng) = set_up(seed ^ 0x6c61_7465, 24);
    config.delay = Delay::SlowFlushes { millis: 40 };
    let start = full(config);
    let mut guests = vec![Vec::new(); 4];
    for _ in 0..8 {
        for flusher in &mut guests[0..2] {
            flusher.extend([Op::Flush, Op::Sleep(rng.random_range(1..60))]);
        }
        guests[2].extend([discard(&config, 2, &mut rng), Op::Sleep(rng.random_range(10..50))]);
        let first = rng.random_range(0..config.image.sectors);
        guests[3].extend([Op::Write { first, count: 3 }, Op::Sleep(rng.random_range(10..50))]);
    }
    (concurrently(config, guests, After::Nothing), start)
}

/// Guests change what L2 tables and refcount blocks say while a compaction moves these: the tables stand at the end of a file
/// full of holes, more of them than the cache holds. Afterwards the image is opened anew, and so the tables are read.
pub fn moving_tables(seed: u64) -> (History, Start) {
    let (mut config, mut rng) = set_up(seed ^ 0x7461_626c, 700);
    config.l2_cache_size = 0;
    config.keep_erased = 0;
    let start = full_of_holes(config, &mut rng);
    config.delay = Delay::Sleeps { yields: 2, millis: 4 };
    let mut guests = vec![vec![Op::Compact]; 1];
    for _ in 0..3 {
        let mut ops = Vec::new();
        for _ in 0..20 {
            let change = match rng.random_range(0..3) {
                0 => Op::Write { first: rng.random_range(0..config.image.sectors), count: 2 },
                _ => discard(&config, 2, &mut rng),
            };
            ops.extend([change, Op::Sleep(rng.random_range(1..30))]);
        }
        guests.push(ops);
    }
    (History { compare: true, ..concurrently(config, guests, After::Reopen) }, start)
}

/// A recycler that erases whatever is free, and does nothing else of its own accord.
fn set_up(seed: u64, sectors: u64) -> (Config, SmallRng) {
    let mut rng = SmallRng::seed_from_u64(seed);
    let cluster_bits = if sectors < 100 { rng.random_range(9..=10) } else { 9 };
    let config = Variant { cluster_bits, sectors, ..PLAIN }.config(seed);
    let flush_after = Duration::from_secs(10);
    let keep_erased = 1024 << cluster_bits;
    (Config { overlap: true, keep_erased, compact_after_unmaps: None, flush_after, ..config }, rng)
}

/// A disk that was written whole.
fn full(config: Config) -> Start {
    let ops = [Op::Write { first: 0, count: config.image.sectors }];
    let history =
        History { config: Config { delay: Delay::None, ..config }, compare: false, rounds: vec![Round::of(&ops)] };
    Start::after(&history, Made::Plain).unwrap_or_else(|failure| panic!("seed {}, filling: {failure}", config.seed))
}

/// Discards up to so many whole clusters.
fn discard(config: &Config, clusters: u64, rng: &mut SmallRng) -> Op {
    let (cluster, sectors) = (config.image.cluster_sectors(), config.image.sectors);
    let first = rng.random_range(0..sectors) / cluster * cluster;
    Op::Discard { first, count: (clusters * cluster).min(sectors - first) }
}

fn concurrently(config: Config, guests: Vec<Vec<Op>>, after: After) -> History {
    History { config, compare: false, rounds: vec![Round { recycler: true, guests, after }] }
}
