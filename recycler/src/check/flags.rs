//! The repair of COPIED flags.

use roaring::RoaringTreemap;

use super::findings::Findings;
use super::mapping::{Layout, RUN, Tables, Target};
use super::regions::L1;
use super::source::{Source, entries, set_entry};
use crate::clusters::counts::Counts;
use crate::device::BlockDevice;
use crate::error::Result;
use crate::format::l2::{COPIED, OFFSET};
use crate::units::Geometry;

/// Which flags may be changed, and what they must say.
pub(super) struct Flags<'a> {
    pub(super) layout: Layout,
    /// Clusters whose refcount is one, or will be when the repair is complete.
    pub(super) ones: &'a RoaringTreemap,
    /// References found.
    pub(super) counts: &'a Counts,
    /// Only flags of references to these clusters are changed; `None`: all.
    pub(super) only: Option<&'a RoaringTreemap>,
}

impl Flags<'_> {
    /// What the flag of a reference to this cluster is to be, and whether it may be changed to that.
    ///
    /// COPIED lets a guest write in place, so it is never set where more than one reference was found, whatever the
    /// refcount on disk says.
    fn wanted(&self, cluster: u64, counted: bool) -> (bool, bool) {
        let wanted = !counted || self.ones.contains(cluster);
        let allowed = self.only.is_none_or(|only| only.contains(cluster));
        (wanted, allowed && (!wanted || !counted || self.counts.get(cluster) == 1))
    }

    /// Repairs the entries of the active L1 table and of its L2 tables. Returns how many wrong flags are left.
    pub(super) async fn repair<D: BlockDevice>(
        &self,
        source: &Source<'_, D>,
        l1: Option<&L1>,
        tables: &Tables,
        findings: &Findings,
    ) -> Result<u64> {
        let mut left = 0u64;
        if let Some(l1) = l1 {
            left += self.l1_table(source, l1, findings).await?;
        }
        let bits = source.geometry.cluster_bits;
        let mut old = vec![0; source.geometry.cluster_size() as usize];
        for (cluster, shares) in tables.active.range(0, u64::MAX) {
            let offset = cluster << bits;
            source.read("reading an L2 table", offset, &mut old).await?;
            let mut new = old.clone();
            let wrong = self.l2_table(&old, &mut new, !findings.overlaps.contains(cluster));
            left = left.saturating_add(wrong.saturating_mul(shares));
            source.write_changes("writing COPIED flags of an L2 table", offset, &old, &new).await?;
        }
        Ok(left)
    }

    async fn l1_table<D: BlockDevice>(&self, source: &Source<'_, D>, l1: &L1, findings: &Findings) -> Result<u64> {
        let bits = source.geometry.cluster_bits;
        let end = l1.offset + l1.entries * 8;
        let shared = findings.overlaps.range_cardinality(l1.offset >> bits..end.div_ceil(1 << bits)) > 0;
        let mut left = 0;
        let mut at = l1.offset;
        let mut old = Vec::new();
        while at < end {
            old.resize(RUN.min(end - at) as usize, 0);
            source.read("reading the L1 table", at, &mut old).await?;
            let mut new = old.clone();
            left += self.l1_entries(source.geometry, &old, &mut new, !shared);
            source.write_changes("writing COPIED flags of the L1 table", at, &old, &new).await?;
            at += old.len() as u64;
        }
        Ok(left)
    }

    /// Returns how many flags stay wrong.
    pub(super) fn l1_entries(&self, geometry: Geometry, old: &[u8], new: &mut [u8], writable: bool) -> u64 {
        let mut left = 0;
        for (index, entry) in entries(old).enumerate() {
            let offset = entry & OFFSET;
            if offset == 0 || offset & (geometry.cluster_size() - 1) != 0 {
                continue;
            }
            let (wanted, allowed) = self.wanted(offset >> geometry.cluster_bits, true);
            left += u64::from(!change(new, index, entry, wanted, allowed && writable));
        }
        left
    }

    /// The same for an L2 table.
    pub(super) fn l2_table(&self, old: &[u8], new: &mut [u8], writable: bool) -> u64 {
        let step = self.layout.entry_size() / 8;
        let mut left = 0;
        for (index, entry) in entries(old).enumerate().step_by(step) {
            let (wanted, allowed) = match self.layout.target(entry) {
                Target::None => continue,
                Target::Compressed { .. } => (false, self.only.is_none()),
                Target::Standard(offset) => self.wanted(offset >> self.layout.cluster_bits, !self.layout.data_file),
            };
            left += u64::from(!change(new, index, entry, wanted, allowed && writable));
        }
        left
    }
}

/// Makes the flag of an entry right if that is allowed; returns whether it is right now.
fn change(table: &mut [u8], index: usize, entry: u64, wanted: bool, allowed: bool) -> bool {
    let right = (entry & COPIED != 0) == wanted;
    if !right && allowed {
        set_entry(table, index, entry ^ COPIED);
    }
    right || allowed
}
