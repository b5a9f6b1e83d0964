//! Moves in progress and their states.
//!
//! | state | becomes the next when |
//! |---|---|
//! | [`Copying`] | the copy is written |
//! | [`Copied`] | a flush that began after the copy ended succeeds |
//! | [`Flushed`] | the reference is rewritten |
//! | [`Referenced`] | a flush makes the new reference durable |
//!
//! The state is the batch's type, and the two steps that only a flush can allow take its token. A guest write or discard
//! of a source cancels its move, up to the moment when the reference is rewritten: the writer marks it under the lock of
//! the L2 slice that it read the reference from, and the rewriting looks for the mark under the same lock.

use std::collections::HashMap;

use crate::format::l2;
use crate::metadata::commit::{FlushToken, Stamp};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::units::{Geometry, GuestCluster, HostCluster, HostOffset};

/// The one place that refers to a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Reference {
    /// The L2 entry of a guest cluster.
    L2Entry(GuestCluster),
    /// An L1 entry: the cluster is an L2 table.
    L1Entry(u64),
    /// A refcount table entry: the cluster is a refcount block.
    RefcountTable(u64),
}

/// What the entries that refer to a cluster map, in whatever table they stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    /// They are L2 entries of this guest cluster (or of VM state past the end of the disk).
    Data(GuestCluster),
    /// They are L1 entries with this index.
    Table(u64),
}

impl Place {
    /// The index of the L1 entry that the entries are reached by, or are.
    pub(crate) fn l1_index(self, geometry: Geometry) -> u64 {
        match self {
            Place::Data(guest) => guest.0 / geometry.l2_entries(),
            Place::Table(index) => index,
        }
    }
}

/// An entry of a table that a snapshot refers to: nobody but the recycler changes it while there is the snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SnapshotEntry {
    /// Where it is in the file.
    pub(crate) at: u64,
    /// For an L2 entry: how many entries of the snapshots' L1 tables refer to its table, which is as often as it counts.
    /// For an L1 entry: 1.
    pub(crate) paths: u32,
    /// What it says besides the cluster.
    pub(crate) zero: bool,
    pub(crate) copied: bool,
    /// Whether the disk referred to the same cluster when this was looked at. It may have ceased to since, and cannot
    /// have begun to.
    pub(crate) active: bool,
}

impl SnapshotEntry {
    /// The entry that refers to `to` instead.
    pub(crate) fn naming(&self, to: HostOffset) -> u64 {
        to.0 | if self.zero { l2::ZERO } else { 0 } | if self.copied { l2::COPIED } else { 0 }
    }
}

/// One of the references to a cluster that a snapshot uses. All references to one cluster have the same place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SharedSource {
    pub(crate) cluster: HostCluster,
    pub(crate) place: Place,
    pub(crate) entry: SnapshotEntry,
}

/// A cluster on its way to another place in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Move {
    pub(crate) src: HostCluster,
    pub(crate) dst: HostCluster,
    pub(crate) reference: Reference,
}

/// Being copied.
#[derive(Debug)]
pub(crate) struct Copying;
/// Copied at the moment of the stamp.
#[derive(Debug)]
pub(crate) struct Copied(Stamp);
/// The copy is durable.
#[derive(Debug)]
pub(crate) struct Flushed;
/// The reference was rewritten before the moment of the stamp.
#[derive(Debug)]
pub(crate) struct Referenced(Stamp);

/// Moves that go through the states together.
#[derive(Debug)]
pub(crate) struct Batch<S> {
    pub(crate) moves: Vec<Move>,
    state: S,
}

impl Batch<Copying> {
    pub(crate) fn new(moves: Vec<Move>) -> Self {
        Batch { moves, state: Copying }
    }

    /// Those of the moves whose copies are written now.
    pub(crate) fn copied(moves: Vec<Move>, now: Stamp) -> Batch<Copied> {
        Batch { moves, state: Copied(now) }
    }
}

impl Batch<Copied> {
    /// The copies are durable, if the flush began late enough.
    pub(crate) fn flushed(self, token: &FlushToken) -> Result<Batch<Flushed>, Self> {
        if token.covers(self.state.0) { Ok(Batch { moves: self.moves, state: Flushed }) } else { Err(self) }
    }
}

impl Batch<Flushed> {
    /// Those of the moves whose references have been rewritten.
    pub(crate) fn referenced(moves: Vec<Move>, now: Stamp) -> Batch<Referenced> {
        Batch { moves, state: Referenced(now) }
    }
}

impl Batch<Referenced> {
    /// The new references are durable, if the flush began late enough: nothing refers to the sources any more.
    pub(crate) fn durable(self, token: &FlushToken) -> Result<Vec<Move>, Self> {
        if token.covers(self.state.0) { Ok(self.moves) } else { Err(self) }
    }
}

/// What writers need to know of the moves whose references have not been rewritten yet.
#[derive(Debug)]
pub(crate) struct ActiveMoves {
    /// All sources are within these bounds, so that a writer elsewhere takes no lock; `low > high` if there are none.
    low: AtomicU64,
    high: AtomicU64,
    /// Sources, and whether their move is cancelled.
    sources: Mutex<HashMap<HostCluster, bool>>,
    /// Clusters by state, for the statistics: copying, copied, flushed, referenced.
    pub(crate) gauges: [AtomicU64; 4],
    pub(crate) cancelled: AtomicU64,
    pub(crate) completed: AtomicU64,
    /// Batches that wait for a flush to make their new references durable.
    referenced: Mutex<Vec<Batch<Referenced>>>,
}

/// Where the sources of active moves were, at a moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    low: u64,
    high: u64,
}

impl Bounds {
    /// Whether `count` clusters from `first` on may be sources.
    #[inline]
    pub(crate) fn touch(&self, first: HostCluster, count: u64) -> bool {
        first.0 <= self.high && first.0 + count > self.low
    }
}

impl Default for ActiveMoves {
    fn default() -> Self {
        ActiveMoves {
            low: AtomicU64::new(u64::MAX),
            high: AtomicU64::new(0),
            sources: Mutex::default(),
            gauges: Default::default(),
            cancelled: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            referenced: Mutex::default(),
        }
    }
}

impl ActiveMoves {
    /// From now on writers cancel these moves. Writers that looked their cluster up earlier may still be writing: await a
    /// grace period before copying.
    pub(crate) fn publish(&self, moves: &[Move]) {
        let mut sources = self.sources.lock();
        for m in moves {
            sources.insert(m.src, false);
            self.low.fetch_min(m.src.0, Ordering::SeqCst);
            self.high.fetch_max(m.src.0, Ordering::SeqCst);
        }
    }

    /// The bounds now, for a writer that is going to write a cluster in place without taking a lock: it may, if the bounds
    /// do not [touch](Bounds::touch) what it finds in the entry. It must be in flight already, and load the entry
    /// *afterwards*. Take a batch of moves that has the cluster among its sources:
    ///
    /// - Published after the bounds were loaded, or while: the grace period that begins when the batch is published waits for
    ///   the writer, which was in flight before. So the copy is made after the write.
    /// - Published before: then the bounds touch the cluster, unless the batch had been withdrawn already. In that case the
    ///   references had been rewritten before, or the moves given up, and the writer, which loads the entry after the bounds,
    ///   finds the reference as it is now: another cluster, or this one, which nobody is going to move.
    ///
    /// The two bounds are not loaded at one moment, but each of them alone says which of the cases holds for a batch that it
    /// includes or not. If the entry were loaded first, the batch could be rewritten and withdrawn between the two: the
    /// write would go to a cluster that nobody reads any more.
    #[inline]
    pub(crate) fn bounds(&self) -> Bounds {
        // In one order with entering the epoch and with the look that ends a grace period, so sequentially consistent.
        Bounds { low: self.low.load(Ordering::SeqCst), high: self.high.load(Ordering::SeqCst) }
    }

    /// A writer is about to write, or has unlinked, `count` clusters from `first` on. To be called under the lock of the
    /// L2 slice that refers to them.
    #[inline]
    pub(crate) fn cancel(&self, first: HostCluster, count: u64) {
        if self.bounds().touch(first, count) {
            self.cancel_slow(first, count);
        }
    }

    #[cold]
    fn cancel_slow(&self, first: HostCluster, count: u64) {
        let mut sources = self.sources.lock();
        for c in first.0..first.0 + count {
            if let Some(cancelled) = sources.get_mut(&HostCluster(c))
                && !*cancelled
            {
                *cancelled = true;
                self.cancelled.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Whether the move of this source is cancelled.
    pub(crate) fn is_cancelled(&self, src: HostCluster) -> bool {
        self.sources.lock().get(&src).copied().unwrap_or(true)
    }

    /// The references of a batch have been rewritten: it waits for a flush now.
    pub(crate) fn await_flush(&self, batch: Batch<Referenced>) {
        self.gauges[3].fetch_add(batch.moves.len() as u64, Ordering::Relaxed);
        self.referenced.lock().push(batch);
    }

    /// The moves whose new references a flush made durable.
    pub(crate) fn promote(&self, token: &FlushToken) -> Vec<Move> {
        let mut done = Vec::new();
        let mut waiting = self.referenced.lock();
        for batch in std::mem::take(&mut *waiting) {
            match batch.durable(token) {
                Ok(moves) => done.extend(moves),
                Err(batch) => waiting.push(batch),
            }
        }
        self.gauges[3].fetch_sub(done.len() as u64, Ordering::Relaxed);
        self.completed.fetch_add(done.len() as u64, Ordering::Relaxed);
        done
    }

    /// No move is active any more.
    pub(crate) fn withdraw_all(&self) {
        let mut sources = self.sources.lock();
        sources.clear();
        self.low.store(u64::MAX, Ordering::SeqCst);
        self.high.store(0, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn a_move(src: u64) -> Move {
        Move { src: HostCluster(src), dst: HostCluster(1), reference: Reference::L1Entry(0) }
    }

    #[test]
    fn only_a_write_to_a_source_cancels() {
        let active = ActiveMoves::default();
        active.cancel(HostCluster(0), 100);
        active.publish(&[a_move(10), a_move(20)]);
        active.cancel(HostCluster(11), 9);
        assert!(!active.is_cancelled(HostCluster(10)) && !active.is_cancelled(HostCluster(20)));
        active.cancel(HostCluster(11), 10);
        assert!(!active.is_cancelled(HostCluster(10)) && active.is_cancelled(HostCluster(20)));
        active.cancel(HostCluster(20), 1);
        assert_eq!(active.cancelled.load(Ordering::Relaxed), 1);
        active.withdraw_all();
        assert!(active.is_cancelled(HostCluster(10)));
    }

    /// One guest cluster, moved again and again between two places while a writer overwrites it: no write is lost, though the
    /// writer takes a lock only when the bounds say so.
    #[test]
    fn writes_in_place_race_moves_and_none_is_lost() {
        use crate::clusters::epochs::Epochs;
        use std::sync::atomic::AtomicBool;
        let (epochs, active, lock) = (Epochs::default(), ActiveMoves::default(), Mutex::new(()));
        let entry = AtomicU64::new(1);
        let places = [const { AtomicU64::new(0) }; 3];
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for value in 1..if cfg!(miri) { 50 } else { 20_000u64 } {
                    let in_flight = epochs.enter();
                    let bounds = active.bounds();
                    let mut at = entry.load(Ordering::Acquire);
                    if bounds.touch(HostCluster(at), 1) {
                        let _locked = lock.lock();
                        at = entry.load(Ordering::Acquire);
                        active.cancel(HostCluster(at), 1);
                    }
                    places[at as usize].store(value, Ordering::SeqCst);
                    drop(in_flight);
                    let _reader = epochs.enter();
                    assert_eq!(places[entry.load(Ordering::Acquire) as usize].load(Ordering::SeqCst), value);
                }
                stop.store(true, Ordering::SeqCst);
            });
            while !stop.load(Ordering::SeqCst) {
                let src = entry.load(Ordering::Acquire);
                let dst = 3 - src;
                active.publish(&[a_move(src)]);
                pollster::block_on(epochs.grace());
                places[dst as usize].store(places[src as usize].load(Ordering::SeqCst), Ordering::SeqCst);
                let locked = lock.lock();
                if !active.is_cancelled(HostCluster(src)) {
                    entry.store(dst, Ordering::Release);
                }
                drop(locked);
                active.withdraw_all();
                // The source is not written again before those who may have looked it up have ended.
                pollster::block_on(epochs.grace());
            }
        });
    }
}
