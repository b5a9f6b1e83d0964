//! Images with extended L2 entries: what is particular about clusters of which only parts are stored.
//!
//! Both words of an entry stand in one 512-byte sector, so a power cut leaves the old entry or the new one. What a subcluster
//! holds that is not stored is nobody's: it may be anything. So an entry that says that one is stored is not written before
//! its data is durable, unless the whole host cluster is known to be zero and so was the subcluster.

use std::ops::Range;
use std::sync::Arc;

use super::Image;
use super::discard::Access;
use super::mapping::{Run, RunKind};
use crate::buf::{IoBuf, IoBufMut};
use crate::device::BlockDevice;
use crate::error::Result;
use crate::format::l2::{Entry, Mapping};
use crate::format::subclusters::{Part, Subclusters, mask};
use crate::metadata::slice::{Entries as _, Slice};
use crate::units::{GuestOffset, HostOffset};

/// What of a cluster is stored, and what reads as zeroes.
fn parts_of(mapping: Mapping) -> Subclusters {
    match mapping {
        Mapping::Unallocated => Subclusters::default(),
        Mapping::Zero { .. } => Subclusters::ZERO,
        Mapping::Data { .. } | Mapping::Compressed { .. } => Subclusters::STORED,
        Mapping::Parts { subclusters, .. } => subclusters,
    }
}

impl<D: BlockDevice> Image<D> {
    fn subcluster_size(&self) -> u64 {
        1 << self.meta.geometry.subcluster_bits()
    }

    /// Of how many bytes an entry says how they are stored.
    pub(super) fn unit_size(&self) -> u64 {
        if self.meta.geometry.extended_l2 { self.subcluster_size() } else { self.meta.geometry.cluster_size() }
    }

    /// What is stored from byte `within` of such a cluster on, up to the next subcluster that is stored in another way.
    pub(super) fn part_of(&self, host: Option<(HostOffset, bool)>, subclusters: Subclusters, within: u64) -> Run {
        let bits = self.meta.geometry.subcluster_bits();
        let index = within >> bits;
        let kind = match (subclusters.part(index), host) {
            (Part::Stored, Some((host, copied))) => RunKind::Data { host: HostOffset(host.0 + within), copied },
            (Part::Zero, _) => RunKind::Zero,
            // Whatever is stored is stored somewhere, as was checked when the entry was decoded.
            (Part::Unallocated | Part::Stored, _) => RunKind::Unallocated,
        };
        Run { kind, length: (subclusters.end_of(index) << bits) - within }
    }

    /// The subclusters of the cluster at byte `start` of the disk that a range of the disk touches.
    fn touched(&self, start: u64, range: &Range<u64>) -> u32 {
        let end = start + self.meta.geometry.cluster_size();
        let (from, to) = (range.start.clamp(start, end) - start, range.end.clamp(start, end) - start);
        if from == to {
            return 0;
        }
        let bits = self.meta.geometry.subcluster_bits();
        mask(from >> bits..to.div_ceil(self.subcluster_size()))
    }

    /// The entry of a new cluster for the one at byte `start` of the disk, which was mapped as `old` says, after `written` of the
    /// disk has been written to: what else was stored is stored there, too.
    pub(super) fn renewed(&self, old: Mapping, start: u64, written: &Range<u64>, host: HostOffset) -> Entry {
        let geometry = self.meta.geometry;
        let mut entry = Entry::data(host, geometry);
        if geometry.extended_l2 {
            let parts = parts_of(old);
            entry.subclusters = parts.with_stored(parts.stored() | self.touched(start, written));
        }
        entry
    }

    /// Whether the subclusters of the cluster at byte `start` of the disk that a range touches are all stored, where it
    /// is mapped as `mapping` says.
    pub(super) fn is_stored(&self, mapping: Mapping, start: u64, range: &Range<u64>) -> bool {
        self.meta.geometry.extended_l2 && self.touched(start, range) & !parts_of(mapping).stored() == 0
    }

    /// What of the cluster at byte `start` of the disk is not stored: ranges of the disk.
    pub(super) fn not_stored(&self, mapping: Mapping, start: u64) -> Vec<Range<u64>> {
        let cluster = start..start + self.meta.geometry.cluster_size();
        let stored = parts_of(mapping).stored();
        if !self.meta.geometry.extended_l2 || stored == 0 {
            return vec![cluster];
        }
        self.ranges_of(!stored, start, &cluster)
    }

    /// The subclusters in a mask of the cluster at byte `start` of the disk, as far as they are in `within`: ranges of
    /// the disk.
    fn ranges_of(&self, mask: u32, start: u64, within: &Range<u64>) -> Vec<Range<u64>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        for index in (0..Subclusters::COUNT).filter(|i| mask >> i & 1 != 0) {
            let first = start + index * self.subcluster_size();
            let part = first.max(within.start)..(first + self.subcluster_size()).min(within.end);
            match found.last_mut() {
                _ if part.is_empty() => {}
                Some(before) if before.end == part.start => before.end = part.end,
                _ => found.push(part),
            }
        }
        found
    }

    /// Of `range`, a part of the cluster at byte `start` of the disk, what has to be copied to a [new](Self::renewed) one.
    pub(super) fn to_be_copied(
        &self,
        old: Mapping,
        start: u64,
        written: &Range<u64>,
        range: Range<u64>,
    ) -> Vec<Range<u64>> {
        if range.is_empty() {
            return Vec::new();
        }
        if !self.meta.geometry.extended_l2 {
            return vec![range];
        }
        self.ranges_of(parts_of(old).stored() | self.touched(start, written), start, &range)
    }

    /// Writes to a cluster that has a host cluster of its own, of which not all is stored. Returns how many bytes were written: 0
    /// if the entry has changed meanwhile.
    pub(super) async fn write_parts(
        &self,
        slice: &Arc<Slice>,
        index: usize,
        at: GuestOffset,
        (old, mapping): (Entry, Mapping),
        host: HostOffset,
        buf: IoBuf<'_>,
    ) -> Result<usize> {
        let cluster_size = self.meta.geometry.cluster_size();
        let start = at.0 & !(cluster_size - 1);
        let length = buf.len().min((start + cluster_size - at.0) as usize);
        let written = at.0..at.0 + length as u64;
        let new = self.touched(start, &written) & !parts_of(mapping).stored();
        // The rest of the first and of the last subcluster, if it was not stored, shows what it showed.
        let size = self.subcluster_size();
        for edge in [written.start & !(size - 1)..written.start, written.end..written.end.next_multiple_of(size)] {
            if !edge.is_empty() && self.touched(start, &edge) & new != 0 {
                let mut bytes = vec![0; (edge.end - edge.start) as usize];
                self.read_range(edge.start, IoBufMut::new(&mut bytes)).await?;
                let (to, from) = (HostOffset(host.0 + (edge.start - start)), GuestOffset(edge.start));
                self.write_data("copying old contents", to, from, IoBuf::new(&bytes)).await?;
            }
        }
        let to = HostOffset(host.0 + (at.0 - start));
        self.write_data("writing guest data", to, at, buf.slice(0..length)).await?;
        // Cut before the entry is written: the subclusters are not stored, and show what they showed. After: all that they
        // show is durable.
        let subclusters = parts_of(mapping).with_stored(parts_of(mapping).stored() | new);
        Ok(if self.link_own(slice, index, old, Entry { subclusters, ..old }, host) { length } else { 0 })
    }

    /// Makes a part of the disk read as zeroes that is less than a cluster, or less than two that touch.
    pub(super) async fn zero_parts(&self, range: Range<u64>, access: Access) -> Result<()> {
        let (cluster_size, size) = (self.meta.geometry.cluster_size(), self.subcluster_size());
        let mut at = range.start;
        while at < range.end {
            let end = range.end.min((at / cluster_size + 1) * cluster_size);
            let (first, last) = (at.next_multiple_of(size), end & !(size - 1));
            if first < last {
                self.overwrite_with_zeroes(at..first, access).await?;
                self.clear_parts(first..last, access).await?;
                self.overwrite_with_zeroes(last..end, access).await?;
            } else {
                self.overwrite_with_zeroes(at..end, access).await?;
            }
            at = end;
        }
        Ok(())
    }

    /// Makes whole subclusters of one cluster read as zeroes. If nothing of the cluster is stored any more, its host cluster is
    /// given back.
    async fn clear_parts(&self, range: Range<u64>, access: Access) -> Result<()> {
        let geometry = self.meta.geometry;
        let guest = geometry.guest_cluster(GuestOffset(range.start));
        let start = guest.0 << geometry.cluster_bits;
        let cleared = |entry: Entry, mapping: Mapping| {
            let old = parts_of(mapping);
            let subclusters = old.with_zero(self.touched(start, &range));
            match mapping {
                Mapping::Zero { .. } => entry,
                Mapping::Unallocated if self.backing.is_zero_from(start) => entry,
                _ if subclusters.stored() == 0 && old.stored() != 0 => Entry { word: 0, subclusters },
                _ => Entry { subclusters, ..entry },
            }
        };
        // A look first: a table that says so already is neither made, nor copied, nor written.
        match self.meta.l2.slice(&self.volume, &self.meta.l1, guest).await? {
            None if self.backing.is_zero_from(start) => return Ok(()),
            None => {}
            Some((slice, index)) => {
                let entry = slice.read().get(index);
                let mapping = self.decode(guest, entry)?;
                if matches!(mapping, Mapping::Compressed { .. }) {
                    return self.overwrite_with_zeroes(range, access).await;
                }
                if cleared(entry, mapping) == entry {
                    return Ok(());
                }
            }
        }
        {
            let _unfrozen = self.unfrozen(access).await;
            self.prepare_changes().await?;
            let (slice, index) = self.slice_for_change(guest).await?;
            self.check_targets(&slice, guest, index, 1).await?;
            if self.meta.external && !self.encryption.is_on() {
                // Only what is cleared: others may be writing to subclusters beside it, which no entry shows yet.
                self.data_volume()?.punch(range.start, range.end - range.start).await?;
            }
            let mut entries = self.meta.l2.modify(&slice);
            let entry = entries.get(index);
            let mapping = self.decode(guest, entry)?;
            // Nobody makes a compressed cluster of one that is not.
            if !matches!(mapping, Mapping::Compressed { .. }) {
                let new = cleared(entry, mapping);
                entries.set(index, new);
                if new.word != entry.word {
                    self.unlink(mapping);
                }
                if self.meta.external && self.encryption.is_on() {
                    self.vacate(range);
                }
            }
        }
        Ok(())
    }
}
