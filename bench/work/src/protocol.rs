//! What the conductor and a contender say to one another.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::offsets::Offsets;

/// How an image is to be opened.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Opening {
    pub path: String,
    /// One disk for each thread; those that can be shared are.
    pub threads: usize,
    /// Bypass the page cache.
    pub direct: bool,
    /// In the contender's own words; only the library knows any.
    pub config: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    Read,
    Write,
    Discard,
}

/// One round: operations of one kind and size, one after the other (or `depth` at once), on each thread.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Work {
    pub kind: Kind,
    pub size: usize,
    pub offsets: Offsets,
    /// Of each thread.
    pub count: u64,
    /// Operations before the clock starts, of the same kind, on the offsets that follow those that are measured.
    pub warm: u64,
    /// In flight at once on each thread; 0 and 1: the synchronous calls.
    pub depth: usize,
    /// A flush after every so many operations; 0: none.
    pub flush_every: u64,
    /// A flush inside the measured time, at its end.
    pub flush_at_end: bool,
    /// Read the clock around each operation.
    pub latencies: bool,
}

impl Work {
    pub fn new(kind: Kind, size: usize, offsets: Offsets, count: u64) -> Self {
        Self { kind, size, offsets, count, warm: 0, depth: 1, flush_every: 0, flush_at_end: false, latencies: false }
    }

    pub fn warm(mut self, warm: u64) -> Self {
        self.warm = warm;
        self
    }

    pub fn depth(mut self, depth: usize) -> Self {
        self.depth = depth;
        self
    }

    pub fn flush_every(mut self, operations: u64) -> Self {
        self.flush_every = operations;
        self
    }

    pub fn flush_at_end(mut self) -> Self {
        self.flush_at_end = true;
        self
    }

    pub fn latencies(mut self) -> Self {
        self.latencies = true;
        self
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Command {
    Open(Opening),
    Run(Work),
    /// Flush, on the first thread's disk.
    Flush,
    /// Something that not every contender can do, on the first thread's disk.
    Extra(Extra),
    Memory,
    Close,
}

/// What the recycler's own calls do, and the lower bound of it on the raw file.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Extra {
    Start,
    Pause,
    Resume,
    Stop,
    Stats,
    /// The library: `qcr_compact`. The raw file: the transfers of [`Bound`].
    Compact(Option<Bound>),
    /// Sleeps, and tells how often the process's threads were woken meanwhile.
    Idle {
        milliseconds: u64,
    },
}

/// The least that a compaction must do: these copies in this order, one flush, one truncation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Bound {
    /// From, to, length.
    pub copies: Vec<(u64, u64, u64)>,
    pub length: u64,
    /// By `copy_file_range`, which shares extents where the filesystem can.
    pub share: bool,
}

/// What a round took.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Done {
    /// Of the slowest thread.
    pub nanoseconds: u64,
    /// Operations of all threads.
    pub operations: u64,
    pub user_microseconds: u64,
    pub system_microseconds: u64,
    /// How often the threads lost their core to somebody else meanwhile: such a round tells little.
    pub preempted: u64,
    /// Heap allocations, where they are counted.
    pub allocations: Option<u64>,
    pub latency: Option<Latency>,
}

/// In nanoseconds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Latency {
    pub median: u64,
    pub p99: u64,
    pub p999: u64,
    pub worst: u64,
}

/// In bytes.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Memory {
    pub resident: u64,
    pub peak: u64,
    /// Resident, and not a file's.
    pub anonymous: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Answer {
    Opened { nanoseconds: u64 },
    Done(Done),
    Value(Value),
    Memory(Memory),
    Ok,
    Failed(String),
}
