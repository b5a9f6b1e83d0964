//! Where on the disk a round works: computed before the clock starts, the same for every contender.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Offsets {
    /// Independent random units of `unit` bytes out of the first `units`, each at `within`.
    Random { units: u64, unit: u64, within: u64, seed: u64 },
    /// Every unit once, in an order that `seed` decides, from the `skip`th on; over again when all had their turn.
    Shuffled { units: u64, unit: u64, within: u64, seed: u64, skip: u64 },
    /// Independent random units out of those that `Shuffled` with `order` has from the `skip`th on.
    AmongLast { units: u64, unit: u64, within: u64, order: u64, skip: u64, seed: u64 },
    /// Every unit in order, from the `skip`th on; over again from the first when all had their turn.
    Sequential { units: u64, unit: u64, skip: u64 },
}

impl Offsets {
    /// The offsets of thread `thread` out of `threads`: `count` of them. Threads work on different offsets; those
    /// of `Shuffled` and `Sequential` on different shares of the disk.
    pub fn of_thread(&self, thread: usize, threads: usize, count: u64) -> Vec<u64> {
        match *self {
            Self::Random { units, unit, within, seed } => {
                let mut random = Random::new(seed ^ (thread as u64) << 32);
                (0..count).map(|_| random.below(units) * unit + within).collect()
            }
            Self::Shuffled { units, unit, within, seed, skip } => {
                let (first, share) = share_of(units, thread, threads);
                let order = shuffled(first, share, seed);
                (skip..skip + count).map(|i| order[(i % share) as usize] * unit + within).collect()
            }
            Self::AmongLast { units, unit, within, order, skip, seed } => {
                let order = shuffled(0, units, order);
                let mut random = Random::new(seed ^ (thread as u64) << 32);
                (0..count).map(|_| order[(skip + random.below(units - skip)) as usize] * unit + within).collect()
            }
            Self::Sequential { units, unit, skip } => {
                let (first, share) = share_of(units, thread, threads);
                (skip..skip + count).map(|i| (first + i % share) * unit).collect()
            }
        }
    }
}

fn shuffled(first: u64, count: u64, seed: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (first..first + count).collect();
    let mut random = Random::new(seed);
    for last in (1..order.len()).rev() {
        order.swap(last, random.below(last as u64 + 1) as usize);
    }
    order
}

fn share_of(units: u64, thread: usize, threads: usize) -> (u64, u64) {
    let share = units / threads as u64;
    (share * thread as u64, share)
}

/// SplitMix64: good enough to scatter offsets, and repeatable.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(bound)) >> 64) as u64
    }
}
