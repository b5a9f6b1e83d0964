//! The internal snapshots of an image: their table, and moving it and the snapshots' L1 tables.

mod calls;
mod exchange;
mod references;
mod room;

pub use calls::SnapshotInfo;

use std::ops::Range;

use super::Image;
use super::encryption::Contents;
use crate::buf::IoBuf;
use crate::clusters::set::ClusterSet;
use crate::clusters::snapshots::{L1Place, L1Tables};
use crate::device::BlockDevice;
use crate::device::volume::{Copier, PIECE};
use crate::error::{Error, Result};
use crate::format::header;
use crate::format::snapshot::Snapshot;
use crate::metadata::l1::L2Ref;
use crate::units::{Geometry, HostCluster, HostOffset};

/// The snapshot table, in memory.
#[derive(Debug)]
pub(crate) struct Snapshots {
    pub(crate) entries: Vec<Snapshot>,
    /// Where it is in the file.
    pub(super) table: HostOffset,
    /// Changes when somebody moves what the snapshots' tables refer to.
    generation: u64,
    /// The image's tables that are no L2 tables, as they were when it was opened: until it is known which of them are disputed.
    others: ClusterSet,
}

impl Snapshots {
    pub(crate) fn new(entries: Vec<Snapshot>, table: HostOffset) -> Self {
        Snapshots { entries, table, generation: 0, others: ClusterSet::default() }
    }

    /// The clusters that the table occupies.
    fn clusters(&self, geometry: Geometry) -> Range<u64> {
        let length: usize = self.entries.iter().map(Snapshot::encoded_len).sum();
        let start = geometry.host_cluster(self.table).0;
        start..start + if length == 0 { 0 } else { geometry.clusters_for(length as u64) }
    }

    /// Another table, at another place.
    fn exchange(&mut self, other: Snapshots) {
        *self = Snapshots { generation: self.generation + 1, ..other };
    }

    /// The table stands at a new place.
    fn moved_to(&mut self, table: HostOffset) {
        self.table = table;
        let mut at = table.0;
        for entry in &mut self.entries {
            entry.at = at;
            at += entry.encoded_len() as u64;
        }
    }
}

impl<D: BlockDevice> Image<D> {
    pub(super) fn snapshot_count(&self) -> u32 {
        self.snapshots.lock().entries.len() as u32
    }

    /// A number that changes whenever the snapshots' tables do. Whoever lets go of the compaction's turn compares it afterwards:
    /// another compaction may have moved what is about to be moved, and the references are not looked at again.
    pub(crate) fn snapshot_generation(&self) -> u64 {
        self.snapshots.lock().generation
    }

    /// The snapshots' tables are about to change; returns the new number.
    pub(crate) fn snapshot_tables_change(&self) -> u64 {
        let mut snapshots = self.snapshots.lock();
        snapshots.generation += 1;
        snapshots.generation
    }

    /// Where the snapshots' L1 tables are, and the generation that they belong to. The caller has the compaction's turn.
    pub(crate) fn snapshot_l1_tables(&self) -> (u64, L1Tables) {
        let snapshots = self.snapshots.lock();
        let place = |s: &Snapshot| L1Place { offset: s.l1_offset, entries: s.l1_entries.into() };
        let places = snapshots.entries.iter().map(place).collect();
        (snapshots.generation, L1Tables::new(places, self.disputed.lock().clone()))
    }

    /// Takes note, once, of the L2 tables that snapshots refer to: guests are kept away from them as from the image's own. Only L1
    /// tables are read.
    ///
    /// The caller needs no turn. Whoever makes or deletes snapshots, or moves what they refer to, has called this before, and from
    /// then on follows what he does in `meta.tables`; so the snapshots' tables stand still until it is done.
    pub(crate) async fn note_snapshot_tables(&self) -> Result<()> {
        let mut noted = self.snapshot_tables_noted.lock().await;
        if *noted {
            return Ok(());
        }
        let geometry = self.meta.geometry;
        let (_, mut snapshots) = self.snapshot_l1_tables();
        let mut found = ClusterSet::default();
        for l1_index in 0..snapshots.len() {
            for table in snapshots.at(&self.volume, &self.meta, l1_index).await? {
                found.insert(geometry.host_cluster(table.host));
            }
            if l1_index % 4096 == 4095 {
                // A large image must not keep other work from this thread.
                tokio::task::yield_now().await;
            }
        }
        // A table that guests have made since is none of these: no snapshot refers to what was free.
        let sole = self.active_tables().filter(|table| table.copied).map(|table| geometry.host_cluster(table.host));
        let mut disputed: ClusterSet = sole.filter(|&c| found.contains(c)).collect();
        disputed.add_all(&found.intersection(&std::mem::take(&mut self.snapshots.lock().others)));
        self.disputed.lock().add_all(&disputed);
        self.meta.tables.lock().add_all(&found);
        *noted = true;
        Ok(())
    }

    /// The L2 tables of the disk.
    fn active_tables(&self) -> impl Iterator<Item = L2Ref> + '_ {
        (0..self.meta.l1.len()).filter_map(|i| self.meta.l1.get(i, &self.volume).ok().flatten())
    }

    /// Takes note of the tables that are no L2 tables. Nothing has changed since the image was opened.
    pub(super) fn note_other_tables(&self) {
        let mut snapshots = self.snapshots.lock();
        if !snapshots.entries.is_empty() {
            let mut others = self.meta.tables.lock().clone();
            self.active_tables().for_each(|table| _ = others.remove(self.meta.geometry.host_cluster(table.host)));
            snapshots.others = others;
        }
    }

    /// Of clusters that held tables of the image, those that may be freed: what a snapshot of a damaged image names as its L2 table
    /// stays as it is, a leak.
    pub(super) fn undisputed(&self, mut old: ClusterSet) -> ClusterSet {
        old.remove_all(&self.disputed.lock());
        old
    }

    /// Refuses an L2 table that the disk claims for itself, so that guests would change it, and a snapshot refers to.
    pub(super) fn check_undisputed(&self, l1_index: u64) -> Result<()> {
        let Some(table) = self.meta.l1.get(l1_index, &self.volume)? else { return Ok(()) };
        if table.copied && self.disputed.lock().contains(self.meta.geometry.host_cluster(table.host)) {
            let reason = format!("{}: the L2 table is said to be the disk's alone, and a snapshot has it", table.host);
            return Err(Error::invalid("L1 table entry", self.meta.l1.offset_of(l1_index), reason));
        }
        Ok(())
    }

    /// Moves the snapshots' L1 tables, and the snapshot table, into holes below cluster `limit`, as far as they lie past it
    /// and there are holes that are large enough. The caller has the compaction's turn.
    pub(crate) async fn move_snapshot_tables(&self, limit: u64) -> Result<()> {
        if self.snapshot_count() == 0 {
            return Ok(());
        }
        self.prepare_changes().await?;
        if !self.meta.patches.is_empty() {
            // What is copied below must be what is in the file.
            self.commit().await?;
        }
        self.move_snapshot_l1_tables(limit).await?;
        self.move_snapshot_table(limit).await
    }

    /// Copies → **flush** → the entries of the snapshot table → **flush** → the old places are free. Cut before the entries
    /// are durable: the copies are leaks. In between: each entry, whose offset is written atomically, names the old table or
    /// the new one; both are complete, and counted. After it: the old ones are leaks until they are uncounted.
    async fn move_snapshot_l1_tables(&self, limit: u64) -> Result<()> {
        let geometry = self.meta.geometry;
        let clusters = |s: &Snapshot| {
            let first = geometry.host_cluster(s.l1_offset).0;
            first..first + geometry.clusters_for(u64::from(s.l1_entries) * 8)
        };
        let far: Vec<_> = {
            let snapshots = self.snapshots.lock();
            let all = snapshots.entries.iter().map(clusters).enumerate();
            all.filter(|(_, old)| !old.is_empty() && old.end > limit).collect()
        };
        let mut copier = Copier::default();
        let mut copies = Vec::new();
        for (index, old) in far {
            let length = old.end - old.start;
            let Some(hole) = self.clusters.allocate_hole(&self.volume, &self.meta, length, limit).await? else {
                continue;
            };
            let ends = (HostCluster(old.start), hole.first());
            self.copy_clusters(ends, length, Contents::Tables, &mut copier).await?;
            copies.push((index, old, hole));
        }
        if copies.is_empty() {
            return Ok(());
        }
        self.commit().await?;
        let mut snapshots = self.snapshots.lock();
        for (index, old, hole) in copies {
            // Snapshots come and go with the compaction's turn only, which the caller has.
            snapshots.generation += 1;
            let Some(snapshot) = snapshots.entries.get_mut(index) else { continue };
            snapshot.l1_offset = geometry.host_offset(hole.first());
            self.meta.patches.set(snapshot.at, snapshot.l1_offset.0);
            let new = hole.first().0..hole.first().0 + hole.len();
            hole.linked();
            self.table_moved(old, new);
        }
        Ok(())
    }

    /// The whole new table → **flush** → the header's sector → **flush**.
    async fn move_snapshot_table(&self, limit: u64) -> Result<()> {
        let geometry = self.meta.geometry;
        let (old, bytes) = {
            let snapshots = self.snapshots.lock();
            (snapshots.clusters(geometry), encode_table(&snapshots.entries))
        };
        if old.end <= limit {
            return Ok(());
        }
        let length = old.end - old.start;
        let Some(hole) = self.clusters.allocate_hole(&self.volume, &self.meta, length, limit).await? else {
            return Ok(());
        };
        let to = geometry.host_offset(hole.first());
        self.write_snapshot_table(to, &bytes).await?;
        // Entries of the old table that changed are written with this, and none changes afterwards: who changes them has
        // the compaction's turn.
        self.commit().await?;
        let count = self.snapshot_count();
        let turn = self.meta.exclusive_turn().await;
        turn.switch_header(&self.volume, |sector| header::patch_snapshots(sector, to, count)).await?;
        let new = hole.first().0..hole.first().0 + hole.len();
        hole.linked();
        self.snapshots.lock().moved_to(to);
        self.table_moved(old, new);
        Ok(())
    }

    async fn write_snapshot_table(&self, to: HostOffset, bytes: &[u8]) -> Result<()> {
        let mut at = to.0;
        for piece in bytes.chunks(PIECE) {
            self.volume.write("writing the snapshot table", at, IoBuf::new(piece)).await?;
            at += piece.len() as u64;
        }
        Ok(())
    }
}

/// The snapshot table as it is in the file, to the end of a sector.
fn encode_table(entries: &[Snapshot]) -> Vec<u8> {
    let mut bytes: Vec<u8> = entries.iter().flat_map(Snapshot::encode).collect();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}
