//! The rows of the table: what each measures, and what is to be reached.

mod allocating;
mod compaction;
mod discards;
mod huge;
mod mapped;
mod queues;
mod recycling;
mod uncached;

use anyhow::Result;
use serde::{Deserialize, Serialize};

use crate::figures::Line;
use crate::place::Place;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scale {
    /// For the test that all of it works; the figures mean nothing.
    Tiny,
    /// Minutes for all rows.
    Quick,
    Full,
}

impl Scale {
    /// Picks a number: for quick runs, and for full ones.
    pub fn pick(self, quick: u64, full: u64) -> u64 {
        match self {
            Self::Tiny => quick.div_ceil(10).max(2),
            Self::Quick => quick,
            Self::Full => full,
        }
    }

    /// Rounds that each contender does. Many short ones: so some are not disturbed by what else the machine does.
    pub fn rounds(self) -> u64 {
        match self {
            Self::Tiny => 2,
            Self::Quick => 25,
            Self::Full => 100,
        }
    }

    /// Times that files are made anew and opened anew for one row. Where in memory, or on the device, a file happens to lie
    /// makes random requests to it up to a tenth faster or slower, as long as it lies there.
    pub fn sets(self) -> u64 {
        if self == Self::Full { 3 } else { 1 }
    }

    /// Sizes of files: smaller ones for the tiny scale.
    pub fn size(self, size: u64) -> u64 {
        if self == Self::Tiny { size / 32 } else { size }
    }
}

pub struct Bench {
    /// Memory: what the software costs.
    pub tmpfs: Place,
    /// A filesystem on a disk.
    pub disk: Place,
    pub scale: Scale,
}

pub struct Row {
    pub name: &'static str,
    pub title: &'static str,
    pub measure: fn(&mut Bench) -> Result<Vec<Line>>,
}

pub const ROWS: [Row; 13] = [
    Row { name: "read", title: "random 4 KiB reads of mapped clusters, tables in memory", measure: mapped::read },
    Row {
        name: "overwrite",
        title: "random 4 KiB writes to mapped clusters, tables in memory",
        measure: mapped::overwrite,
    },
    Row { name: "threads", title: "the same, two threads on one handle", measure: mapped::threads },
    Row { name: "sequential", title: "sequential reads and writes of mapped clusters", measure: mapped::sequential },
    Row { name: "allocate", title: "writes into clusters that are not allocated", measure: allocating::allocate },
    Row { name: "flush", title: "a flush after each 4 KiB write", measure: allocating::flush },
    Row {
        name: "uncached",
        title: "random 4 KiB reads of a disk of 1 TiB, tables not in memory",
        measure: uncached::uncached,
    },
    Row { name: "discard", title: "discards of single clusters in random order", measure: discards::discard },
    Row { name: "queue", title: "random 4 KiB requests, 32 at once", measure: queues::queue },
    Row { name: "recycler", title: "the guest while the recycler moves clusters", measure: recycling::recycler },
    Row { name: "compact", title: "compaction of a file half free", measure: compaction::compact },
    Row { name: "huge", title: "a disk of 1 TiB", measure: huge::huge },
    Row { name: "idle", title: "nothing to do", measure: huge::idle },
];
