//! Deliberate faults. With the feature `mutations`, which only tests turn on, each of these breaks one step of the crash
//! or concurrency argument, to show that the simulation would find such a mistake. Without it they are constants.

/// A step to be broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Mutation {
    /// References are rewritten without a flush after the copy.
    RewriteBeforeFlush = 1,
    /// Clusters are Junk as soon as they are unlinked.
    ReuseFreedAtOnce,
    /// The sources of a move are uncounted in the commit that rewrites the references.
    UncountSourceEarly,
    /// The file is cut before the rewritten references are durable.
    TruncateBeforeDurable,
    /// A move that a guest write cancelled is committed.
    CommitCancelledMove,
    /// Sources are copied while earlier writers may still be writing to them.
    CopyWithoutGrace,
    /// Freed clusters become Junk while older requests may still use them.
    ReuseWithoutGrace,
    /// L2 tables are written before the counts and data that they need.
    TablesBeforeCounts,
    /// A flush promotes what was done after it began.
    PromoteLateWork,
    /// New references are written without the flush that their data needs.
    SkipBarrier,
    /// References to what snapshots use are rewritten without a flush after the copy.
    RewriteSharedBeforeFlush,
    /// The same for compressed data.
    RewritePackedBeforeFlush,
    /// Tables are changed before the mark that says so is durable.
    ChangeBeforeMark,
    /// The mark is taken back before the image is closed.
    UnmarkEarly,
    /// The refcount table names a new block that is not durable.
    EntryBeforeBlock,
    /// References are written whose counts are in a block that the table does not durably name.
    ReferenceBeforeEntry,
    /// The header names a new refcount table that is not durable.
    HeaderBeforeTable,
    /// The header names a new L1 table that is not durable.
    HeaderBeforeL1,
    /// A copied L2 table is linked before it is durable.
    LinkTableCopyEarly,
    /// Clusters that replace others are linked before their data is durable.
    LinkBeforeData,
    /// Clusters that hide a backing file's are linked before their data is durable.
    LinkBeforeCopyUp,
    /// A commit empties the overlay before the backing file durably has what it held.
    EmptyBeforeBase,
    /// Encrypted clusters are linked before all that they show is durable.
    LinkBeforeEncrypted,
    /// A zeroed cluster that kept its host cluster is shown before what it holds is durable.
    ShowBeforeZeroes,
    /// Erased clusters are handed out as if zeroes and counts were durable.
    ErasedAsAvailable,
    /// A file that grows keeps what is left of what was being cut off.
    KeepCutOff,
    /// A table that moves is written at one of its two places.
    WriteOnePlace,
    /// A larger disk shows before what is new on it has been cleared.
    GrowBeforeClearing,
    /// What a smaller disk loses is unmapped before its size is durable.
    ForgetBeforeSize,
    /// The header names tables that make a snapshot, or take one away, and are not durable.
    HeaderBeforeSnapshot,
    /// Guests write on while tables are exchanged for a snapshot.
    SnapshotUnderWrites,
    /// A failed flush of the device has no consequences.
    ForgiveFailedFlush,
    /// What a failed commit did not write counts as written.
    ForgetFailedCommit,
    /// L2 entries are written before what they show in an external data file is durable.
    EntryBeforeDataFile,
    /// A cluster of an external data file is taken into use with what it held before around the data.
    KeepStaleAround,
    /// What is discarded in an encrypted data file is punched before its entry is durable.
    PunchBeforeEntry,
    /// A request does not look whether the epoch advanced while it entered.
    EnterUnchecked,
    /// A request leaves its epoch without waking up who waits for that.
    LeaveUnnoticed,
    /// Who waits for a turn asks to be woken up only after the turns were looked at.
    WaitForTurnUnregistered,
    /// Who freezes the mapping does not wait for those who are just changing it.
    FreezeUnlocked,
    /// A slice's place in memory is filled anew before the look-ups are told that it is another slice's.
    TagAfterEntries,
    /// Who has frozen the mapping waits for those who wait for that to end.
    TurnWhileFrozen,
    /// A slice's place in memory is filled anew while somebody has locked the slice.
    FillLocked,
    /// Runs of a slice are looked for while somebody is changing it.
    RunsWithoutLock,
    /// Who makes the file longer does not look whether somebody else has done so meanwhile.
    ExtendUnlooked,
    /// A writer asks what is being moved only after it has looked its cluster up.
    BoundsAfterEntry,
    /// A commit takes a slice for clean at some moment after it has copied it.
    CleanAfterCopy,
}

impl Mutation {
    /// Those that power cuts and random histories must find.
    pub const ALL: [Mutation; 32] = [
        Mutation::RewriteBeforeFlush,
        Mutation::ReuseFreedAtOnce,
        Mutation::UncountSourceEarly,
        Mutation::TruncateBeforeDurable,
        Mutation::CommitCancelledMove,
        Mutation::CopyWithoutGrace,
        Mutation::ReuseWithoutGrace,
        Mutation::TablesBeforeCounts,
        Mutation::PromoteLateWork,
        Mutation::SkipBarrier,
        Mutation::RewriteSharedBeforeFlush,
        Mutation::RewritePackedBeforeFlush,
        Mutation::ChangeBeforeMark,
        Mutation::UnmarkEarly,
        Mutation::EntryBeforeBlock,
        Mutation::ReferenceBeforeEntry,
        Mutation::HeaderBeforeTable,
        Mutation::HeaderBeforeL1,
        Mutation::LinkTableCopyEarly,
        Mutation::LinkBeforeData,
        Mutation::LinkBeforeCopyUp,
        Mutation::LinkBeforeEncrypted,
        Mutation::ShowBeforeZeroes,
        Mutation::ErasedAsAvailable,
        Mutation::KeepCutOff,
        Mutation::WriteOnePlace,
        Mutation::GrowBeforeClearing,
        Mutation::ForgetBeforeSize,
        Mutation::HeaderBeforeSnapshot,
        Mutation::SnapshotUnderWrites,
        Mutation::ForgiveFailedFlush,
        Mutation::ForgetFailedCommit,
    ];

    /// Those that power cuts over an image and its external data file must find.
    pub const DATA_FILE: [Mutation; 3] =
        [Mutation::EntryBeforeDataFile, Mutation::KeepStaleAround, Mutation::PunchBeforeEntry];

    /// Those that power cuts over an overlay and its backing file must find.
    pub const COMMIT: [Mutation; 1] = [Mutation::EmptyBeforeBase];

    /// Those that only an interleaving of a few instructions shows: the models (see `src/models`) must find them.
    pub const INTERLEAVINGS: [Mutation; 11] = [
        Mutation::EnterUnchecked,
        Mutation::LeaveUnnoticed,
        Mutation::WaitForTurnUnregistered,
        Mutation::FreezeUnlocked,
        Mutation::TagAfterEntries,
        Mutation::TurnWhileFrozen,
        Mutation::FillLocked,
        Mutation::RunsWithoutLock,
        Mutation::ExtendUnlooked,
        Mutation::BoundsAfterEntry,
        Mutation::CleanAfterCopy,
    ];
}

#[cfg(feature = "mutations")]
static ACTIVE: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);

/// Breaks one step, in the whole process, until the next call.
#[cfg(feature = "mutations")]
pub fn activate(mutation: Option<Mutation>) {
    ACTIVE.store(mutation.map_or(0, |m| m as usize), std::sync::atomic::Ordering::SeqCst);
}

/// Whether this step is broken.
#[cfg(feature = "mutations")]
pub(crate) fn broken(mutation: Mutation) -> bool {
    ACTIVE.load(std::sync::atomic::Ordering::SeqCst) == mutation as usize
}

/// Whether this step is broken: it is not.
#[cfg(not(feature = "mutations"))]
#[inline(always)]
pub(crate) const fn broken(_: Mutation) -> bool {
    false
}
