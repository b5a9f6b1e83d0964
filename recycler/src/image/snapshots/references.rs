//! Which clusters tables refer to, and how often: what counts, since refcounts count paths from L1 tables.

use std::collections::BTreeSet;
use std::ops::Range;

use super::super::Image;
use crate::clusters::counts::{Counts, Walk};
use crate::clusters::set::ClusterSet;
use crate::clusters::snapshots::{L1Place, read_l1, read_table};
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::l2::{self, Mapping};
use crate::metadata::l1::L2Ref;
use crate::units::{Geometry, HostCluster, HostOffset};

/// References, by what they refer to.
#[derive(Clone, Debug)]
pub(super) struct References {
    counts: Counts,
    /// The L2 tables among it.
    pub(super) tables: ClusterSet,
}

impl References {
    pub(super) fn new() -> Self {
        // Counters as wide as can be: the image's refcounts are compared with their limit later.
        References { counts: Counts::new(6), tables: ClusterSet::default() }
    }

    /// How often a cluster is referred to.
    pub(super) fn to(&self, c: HostCluster) -> u64 {
        self.counts.get(c.0)
    }

    /// The clusters of a range that are referred to, each with how often.
    pub(super) fn within(&self, range: Range<u64>) -> Walk<'_> {
        self.counts.range(range.start, range.end)
    }

    /// The blocks that count what is referred to.
    pub(super) fn blocks(&self, geometry: Geometry) -> BTreeSet<u64> {
        let (mut found, mut at) = (BTreeSet::new(), 0);
        while let Some((c, _)) = self.counts.range(at, u64::MAX).next() {
            let index = c / geometry.refcounts_per_block();
            found.insert(index);
            at = (index + 1) * geometry.refcounts_per_block();
        }
        found
    }

    pub(super) fn add_table(&mut self, c: HostCluster) {
        self.counts.add(c.0, 1);
        self.tables.insert(c);
    }

    /// What the entries of an L2 table name.
    fn add_entries(&mut self, hosts: impl Iterator<Item = Range<u64>>) {
        // Clusters that follow one another are counted at once.
        let mut run = 0..0;
        for hosts in hosts {
            if hosts.start == run.end {
                run.end = hosts.end;
            } else {
                self.counts.add_run(run.start, run.end - run.start, 1);
                run = hosts;
            }
        }
        self.counts.add_run(run.start, run.end - run.start, 1);
    }
}

/// The entries of an L1 table.
#[derive(Clone)]
pub(super) struct L1 {
    /// Where the first of them is in the file.
    pub(super) offset: HostOffset,
    pub(super) entries: Vec<u64>,
}

impl L1 {
    /// Where an entry is in the file.
    pub(super) fn place_of(&self, index: u64) -> HostOffset {
        HostOffset(self.offset.0 + index * 8)
    }

    /// Each entry's index, the entry, and where it is in the file.
    pub(super) fn each(&self) -> impl Iterator<Item = (u64, u64, HostOffset)> + '_ {
        (0..).zip(&self.entries).map(|(index, &entry)| (index, entry, self.place_of(index)))
    }
}

/// A whole L2 table, and where an L1 table refers to it.
pub(super) struct Table<'a> {
    /// The index of the L1 entry.
    pub(super) index: u64,
    /// Its words.
    pub(super) words: &'a [u64],
}

impl<D: BlockDevice> Image<D> {
    /// The L1 table of the disk, which has one entry at least.
    pub(super) fn disk_l1(&self) -> L1 {
        let mut entries = self.meta.l1.entries();
        entries.resize(entries.len().max(1), 0);
        L1 { offset: HostOffset(self.meta.l1.offset_of(0)), entries }
    }

    /// The L1 table of a snapshot.
    pub(super) async fn snapshot_l1(&self, place: L1Place) -> Result<L1> {
        let entries = read_l1(&self.volume, &self.meta, place).await?;
        Ok(L1 { offset: place.offset, entries })
    }

    /// The L2 table that an L1 entry refers to, which is at this place in the file.
    pub(super) fn table_of(&self, entry: u64, at: HostOffset) -> Result<Option<L2Ref>> {
        let cluster_size = self.meta.geometry.cluster_size();
        let invalid = |reason: &str| Error::invalid("L1 table entry", at.0, format!("{entry:#x}: {reason}"));
        let Some((host, copied)) = l2::decode_l1(entry, cluster_size).map_err(invalid)? else { return Ok(None) };
        if host.0 + cluster_size > self.volume.length().next_multiple_of(cluster_size) {
            return Err(invalid("the L2 table lies outside the file"));
        }
        Ok(Some(L2Ref { host, copied }))
    }

    /// Counts what the tables refer to that an L1 table refers to. `counts` says of each whether it is counted itself. What
    /// the L2 tables on disk say must be what they are to say. Each must have one index, or a damaged L1 table would have one of
    /// them read as often as it has entries.
    pub(super) async fn count_references(
        &self,
        l1: &L1,
        references: &mut References,
        mut counts: impl FnMut(&Table<'_>) -> bool,
    ) -> Result<()> {
        let geometry = self.meta.geometry;
        let (mut met, mut words) = (ClusterSet::default(), Vec::new());
        for (index, entry, place) in l1.each() {
            let Some(at) = self.table_of(entry, place)? else { continue };
            if !met.insert(geometry.host_cluster(at.host)) {
                let reason = format!("{entry:#x}: another entry names the same L2 table");
                return Err(Error::invalid("L1 table entry", place.0, reason));
            }
            read_table(&self.volume, &self.meta, at.host, &mut words).await?;
            if counts(&Table { index, words: &words }) {
                references.add_table(geometry.host_cluster(at.host));
            }
            for (i, entry) in l2::entries(&words, geometry).enumerate().filter(|(_, e)| !e.is_empty()) {
                if let Err(reason) = Mapping::of(entry, self.meta.version, geometry) {
                    let place = at.host.0 + (i * geometry.l2_entry_words() * 8) as u64;
                    return Err(Error::invalid("L2 table entry", place, format!("{:#x}: {reason}", entry.word)));
                }
            }
            references.add_entries(self.hosts_named(&words));
            // A walk through a large image must not keep other work from this thread.
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    /// The clusters that the entries of an L2 table name.
    fn hosts_named<'a>(&self, words: &'a [u64]) -> impl Iterator<Item = Range<u64>> + use<'a, D> {
        let geometry = self.meta.geometry;
        l2::mappings(words, self.meta.version, geometry).filter_map(move |m| m.host_clusters(geometry))
    }

    /// Every cluster that one of these L1 tables leads to. Tables that several share are read once.
    pub(super) async fn all_reached(&self, l1_tables: &[L1Place]) -> Result<ClusterSet> {
        let geometry = self.meta.geometry;
        let (mut all, mut tables, mut words) = (ClusterSet::default(), ClusterSet::default(), Vec::new());
        for &place in l1_tables {
            for (_, entry, place) in self.snapshot_l1(place).await?.each() {
                // What cannot be is for whoever uses that snapshot to be told of.
                let Ok(Some(at)) = self.table_of(entry, place) else { continue };
                if !tables.insert(geometry.host_cluster(at.host)) {
                    continue;
                }
                read_table(&self.volume, &self.meta, at.host, &mut words).await?;
                self.hosts_named(&words).for_each(|hosts| all.insert_range(hosts));
                tokio::task::yield_now().await;
            }
        }
        all.add_all(&tables);
        Ok(all)
    }
}

/// The cluster that an entry, or the first word of one, names whose COPIED flag says something, and that flag.
pub(super) fn flagged(entry: u64, geometry: Geometry) -> Option<(HostCluster, bool)> {
    let offset = entry & l2::OFFSET;
    (entry & l2::COMPRESSED == 0 && offset != 0)
        .then(|| (geometry.host_cluster(HostOffset(offset)), entry & l2::COPIED != 0))
}
