//! Moving compressed data: the steps that touch the image.
//!
//! Compressed data is never written in place, so its copy is exact whenever it is made, and nobody has to be awaited before
//! that. A host cluster is counted once for each extent that touches it.
//!
//! 1. The data is copied into holes, and each hole counted for all extents that are to touch it; **flush**. Cut before: every
//!    entry names the old place, and the holes are leaks, whatever their counts.
//! 2. The entries are rewritten, each in one sector. Cut in between: each names the old place or the new one. Both hold the
//!    same, and both are counted for it. Then **flush**.
//! 3. The old places are uncounted, once for each entry that was rewritten, and the new ones for each that was not, because a
//!    guest had written or discarded the cluster meanwhile. Cut before: leaks. Cut after: nothing.
//!
//! A guest that reads an entry before it is rewritten may still be reading the old place; it is a cluster that lost a
//! reference, like any other, and is reused only after a grace period.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::Image;
use super::relocate::Holes;
use super::turns::Turn;
use crate::clusters::packed::{self, Extent, Packed};
use crate::clusters::scan::Manners;
use crate::clusters::set::ClusterSet;
use crate::clusters::snapshots::{L1Tables, read_table};
use crate::device::BlockDevice;
use crate::device::volume::Copier;
use crate::error::Result;
use crate::format::l2::{self, Entry, Mapping};
use crate::metadata::slice::{Entries as _, Slice};
use crate::units::{Geometry, GuestCluster, HostCluster, HostOffset};

/// How often a hole is counted, and how many entries name data in it.
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    counted: u64,
    named: u64,
}

/// Extents on their way into holes. What the holes are counted too often when this is dropped, for whatever reason, is
/// uncounted after the next commit.
pub(crate) struct Repack<'a, D: BlockDevice> {
    image: &'a Image<D>,
    holes: Holes<'a>,
    counts: BTreeMap<HostCluster, Counted>,
    /// Not rewritten yet.
    pub(crate) extents: Vec<Extent>,
}

/// The host clusters that an extent touches where it goes.
fn touched(e: &Extent, geometry: Geometry) -> Range<u64> {
    let (_, length) = l2::compressed_extent(e.descriptor, geometry);
    let cluster = |at| geometry.host_cluster(HostOffset(at)).0;
    cluster(e.to)..cluster(e.to + length - 1) + 1
}

impl<'a, D: BlockDevice> Repack<'a, D> {
    /// As many of the extents as have room in the holes, which are counted once, in order.
    pub(crate) async fn new(image: &'a Image<D>, holes: Holes<'a>, extents: &[Extent]) -> Result<Self> {
        let geometry = image.meta.geometry;
        let runs: Vec<_> = holes.set.runs().collect();
        let extents = packed::place(extents, &runs, geometry.refcount_max(), geometry);
        let mut wanted = BTreeMap::<u64, u64>::new();
        for c in extents.iter().flat_map(|e| touched(e, geometry)) {
            *wanted.entry(c).or_default() += 1;
        }
        let mut repack = Repack { image, holes, counts: BTreeMap::new(), extents };
        let mut refcounts = image.meta.refcounts.lock().await;
        for (c, count) in wanted {
            if count > 1 {
                refcounts.add(&image.volume, c..c + 1, (count - 1) as i64).await?;
            }
            repack.counts.insert(HostCluster(c), Counted { counted: count, named: 0 });
        }
        Ok(repack)
    }

    /// An entry names the data at its new place now.
    fn rewritten(&mut self, e: &Extent) {
        for c in touched(e, self.image.meta.geometry) {
            if let Some(count) = self.counts.get_mut(&HostCluster(c)) {
                count.named += 1;
            }
        }
    }

    /// Rewrites the entries, whose data is durable at the new places. Returns how many.
    pub(crate) async fn rewrite(&mut self) -> Result<u64> {
        let image = self.image;
        let mut done = 0;
        while let Some(e) = self.extents.pop() {
            if image.rewrite_packed(&e).await? {
                // No await since: one that is dropped must not forget an entry.
                self.rewritten(&e);
                done += 1;
            }
        }
        Ok(done)
    }
}

impl<D: BlockDevice> Drop for Repack<'_, D> {
    fn drop(&mut self) {
        for (&c, count) in &self.counts {
            if count.named > 0 {
                self.holes.used(c);
            }
            // A hole that is not used stays in `holes`, which uncounts it once.
            let mut states = self.image.clusters.lock();
            (count.named.max(1)..count.counted).for_each(|_| states.unlink(c, false));
        }
    }
}

impl<D: BlockDevice> Image<D> {
    /// Of these clusters, and their neighbours, into which their extents may reach, those that nobody but the disk's
    /// compressed clusters uses: they are counted as often as those refer to them, and nothing else does. In a damaged
    /// image the count may be right by chance, one reference too many of one kind and one too few of another, so every
    /// other reference is looked for, in the snapshots' tables, too.
    pub(crate) async fn sole_packed(
        &self,
        packed: &Packed,
        chosen: &ClusterSet,
        snapshots: &mut L1Tables,
        manners: &mut impl Manners,
    ) -> Result<ClusterSet> {
        let mut sole = ClusterSet::default();
        {
            let mut refcounts = self.meta.refcounts.lock().await;
            for (&c, used) in &packed.clusters {
                let near = chosen.meets(&(c.0.saturating_sub(1)..c.0 + 2));
                if near && refcounts.count(&self.volume, c).await? == used.extents {
                    sole.insert(c);
                }
            }
        }
        sole.remove_all(&self.meta.tables.lock());
        // A damaged L1 table may name one table as often as it has entries.
        let (mut met, mut words) = (ClusterSet::default(), Vec::new());
        for l1_index in 0..self.meta.l1.len().max(snapshots.len()) {
            if sole.is_empty() {
                break;
            }
            for table in snapshots.at(&self.volume, &self.meta, l1_index).await? {
                if met.insert(self.meta.geometry.host_cluster(table.host)) {
                    read_table(&self.volume, &self.meta, table.host, &mut words).await?;
                    self.leave_out(&mut sole, table.host, &words, |_| true);
                    manners.looked_at(self.meta.geometry.cluster_size()).await?;
                }
            }
            if let Some(table) = self.meta.l1.get(l1_index, &self.volume)? {
                self.meta.l2.survey(&self.volume, table.host, l1_index, &mut words).await?;
                // The compressed clusters of such a table are what the choice is about.
                let other = |m: &Mapping| !table.copied || !matches!(m, Mapping::Compressed { .. });
                self.leave_out(&mut sole, table.host, &words, other);
                manners.looked_at(self.meta.geometry.cluster_size()).await?;
            }
        }
        Ok(sole)
    }

    /// Takes a table out of `sole`, and what those of its entries name that `other` says.
    fn leave_out(&self, sole: &mut ClusterSet, table: HostOffset, words: &[u64], other: impl Fn(&Mapping) -> bool) {
        let geometry = self.meta.geometry;
        sole.remove(geometry.host_cluster(table));
        let named = l2::mappings(words, self.meta.version, geometry).filter(other);
        named.filter_map(|m| m.host_clusters(geometry)).for_each(|clusters| sole.remove_range(clusters));
    }

    /// The compressed clusters of one L2 table whose data touches one of the clusters `chosen`, and no other than `sole` ones:
    /// all of them lose a reference when it moves.
    pub(crate) async fn packed_in(&self, l1_index: u64, chosen: &ClusterSet, sole: &ClusterSet) -> Result<Vec<Extent>> {
        let geometry = self.meta.geometry;
        let mut found = Vec::new();
        let Some(table) = self.meta.l1.get(l1_index, &self.volume)?.filter(|t| t.copied) else {
            return Ok(found);
        };
        let mut words = Vec::new();
        self.meta.l2.survey(&self.volume, table.host, l1_index, &mut words).await?;
        for (guest, entry) in (l1_index * geometry.l2_entries()..).zip(l2::entries(&words, geometry)) {
            if let Ok(Mapping::Compressed { descriptor }) = Mapping::of(entry, self.meta.version, geometry) {
                let (first, count) = l2::compressed_clusters(descriptor, geometry);
                let touched = first.0..first.0 + count;
                if chosen.meets(&touched) && sole.count_in(touched) == count {
                    found.push(Extent { guest: GuestCluster(guest), descriptor, to: 0 });
                }
            }
        }
        Ok(found)
    }

    /// Copies the data of a compressed cluster. The file may end before the sector does in which the data ends.
    pub(crate) async fn copy_packed(&self, e: &Extent, copier: &mut Copier) -> Result<()> {
        let (offset, length) = l2::compressed_extent(e.descriptor, self.meta.geometry);
        self.volume.copy(offset, e.to, length, copier).await
    }

    /// The slice that maps a guest cluster, if its L2 table is the disk's alone, and the turn for the table: no guest copies it
    /// meanwhile.
    pub(super) async fn own_slice(&self, guest: GuestCluster) -> Result<Option<(Turn<'_>, Arc<Slice>, usize)>> {
        let l1_index = guest.0 / self.meta.geometry.l2_entries();
        let turn = self.table_turns.take(l1_index..l1_index + 1).await;
        let Some((slice, index)) = self.meta.l2.slice(&self.volume, &self.meta.l1, guest).await? else {
            return Ok(None);
        };
        let own = self.meta.l1.get(l1_index, &self.volume)?.is_some_and(|t| t.copied);
        Ok(own.then_some((turn, slice, index)))
    }

    /// Lets the entry of a compressed cluster name the new place of its data, if it still names the old one.
    async fn rewrite_packed(&self, e: &Extent) -> Result<bool> {
        let geometry = self.meta.geometry;
        let Some((_turn, slice, index)) = self.own_slice(e.guest).await? else { return Ok(false) };
        let mut entries = self.meta.l2.modify(&slice);
        let entry = entries.get(index);
        if entry.word != l2::COMPRESSED | e.descriptor {
            return Ok(false);
        }
        let word = l2::COMPRESSED | l2::compressed_at(e.descriptor, e.to, geometry);
        entries.set(index, Entry { word, ..entry });
        self.unlink(Mapping::Compressed { descriptor: e.descriptor });
        Ok(true)
    }
}
