//! Findings while they are gathered.

use roaring::RoaringTreemap;

use super::CheckReport;

/// The report so far, and what repair must know about it.
#[derive(Debug, Default)]
pub(super) struct Findings {
    /// Counts and messages for the caller.
    pub(super) report: CheckReport,
    /// References may exist that were not found: an entry leads nowhere sane, so what it once meant is unknown. A
    /// cluster without a known reference may then hold live data, and is not to be freed.
    pub(super) doubtful: bool,
    /// Clusters of metadata that something else refers to as well. Metadata in them is not written: one of the owners
    /// is wrong, and nothing tells which.
    pub(super) overlaps: RoaringTreemap,
    /// Whether there are L2 entries that could do [without their place](super::mapping::Layout::without_place).
    pub(super) misplaced_zeroes: bool,
    /// Of the corruptions: COPIED flags that disagree with the refcount on disk.
    pub(super) flags: u64,
}

impl Findings {
    /// Puts something in words, unless enough was said already.
    pub(super) fn say(&mut self, message: impl FnOnce() -> String) {
        if self.report.messages.len() < CheckReport::MAX_MESSAGES {
            self.report.messages.push(message());
        }
    }

    /// `n` errors of the same kind (an entry of a shared table is wrong for everybody who shares it).
    pub(super) fn corruption(&mut self, n: u64, message: impl FnOnce() -> String) {
        self.report.corruptions = self.report.corruptions.saturating_add(n);
        self.say(message);
    }

    /// An error that hides references.
    pub(super) fn hiding(&mut self, n: u64, message: impl FnOnce() -> String) {
        self.doubtful = true;
        self.corruption(n, message);
    }

    /// `n` COPIED flags that disagree with the refcount.
    pub(super) fn flag(&mut self, n: u64, message: impl FnOnce() -> String) {
        self.flags = self.flags.saturating_add(n);
        self.corruption(n, message);
    }

    /// A cluster of metadata that somebody else refers to. It is counted as an error when the refcounts are compared,
    /// so that a refcount that does not cover both owners is not counted twice.
    pub(super) fn overlap(&mut self, cluster: u64, message: impl FnOnce() -> String) {
        if self.overlaps.insert(cluster) {
            self.say(message);
        }
        self.doubtful = true;
    }
}
