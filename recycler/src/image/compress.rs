//! Writing compressed clusters: one after the other into room that is kept for them.
//!
//! The room is a run of new clusters. Each is counted once from the start, which is the room's own hold on it, and once more
//! for every extent that touches it; the room lets go of a cluster when it has gone past it. So a cluster that is being filled
//! is not given to anybody else, even if all that was put into it is unlinked meanwhile.
//!
//! Steps: `data`, `counts` → **B** → `L2 entry`. Cut before **B**: the entry is the old one, what it names is untouched, and the
//! room's clusters are leaks. Cut after: data and counts are durable, so the entry may be. The room's own hold is a leak after a
//! cut, as the pool is.

use flate2::{Compress, Compression, FlushCompress, Status};

use super::Image;
use super::discard::Access;
use super::mapping::Purpose;
use crate::buf::IoBuf;
use crate::clusters::Clusters;
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::l2::{self, Entry, Mapping};
use crate::metadata::slice::Entries as _;
use crate::units::{GuestCluster, GuestOffset, HostCluster};

const SECTOR: u64 = 512;
/// Room is taken for so many bytes at once, one cluster at least.
const ROOM_BYTES: u64 = 1 << 20;
/// QEMU inflates with a window of 4 KiB.
const WINDOW_BITS: u8 = 12;

/// Clusters for compressed data, from byte `next` to byte `end` of the file. If `next` is within a cluster, that one is in use;
/// those after it are Roots.
#[derive(Debug, Default)]
pub(crate) struct Room {
    next: u64,
    end: u64,
}

/// Room in the file that was taken for one extent, and counted. What is dropped is uncounted again.
#[must_use]
pub(crate) struct Placed<'a> {
    clusters: &'a Clusters,
    first: u64,
    count: u64,
    /// What the L2 entry is to say.
    pub(crate) descriptor: u64,
    pub(crate) offset: u64,
}

impl Placed<'_> {
    /// An entry refers to it now.
    pub(crate) fn linked(mut self) {
        self.count = 0;
    }
}

impl Drop for Placed<'_> {
    fn drop(&mut self) {
        if self.count > 0 {
            let mut states = self.clusters.lock();
            (self.first..self.first + self.count).for_each(|c| states.unlink(HostCluster(c), false));
        }
    }
}

impl<D: BlockDevice> Image<D> {
    /// Stores whole clusters, compressed as far as that saves room; for the writers of images rather than for guests. `offset`
    /// is a multiple of the cluster size, and so is the length, unless the disk ends there. Otherwise as
    /// [`write`](Self::write).
    ///
    /// # Errors
    /// As [`write`](Self::write); [`Error::BadOption`] for pieces of clusters.
    pub async fn write_compressed(&self, offset: u64, buf: IoBuf<'_>) -> Result<()> {
        let length = buf.len() as u64;
        let cluster_size = self.meta.geometry.cluster_size();
        let request = self.begin_waiting(offset, length, Purpose::Write).await?;
        let whole = (offset + length).is_multiple_of(cluster_size) || offset + length == self.virtual_size();
        if !offset.is_multiple_of(cluster_size) || !whole {
            let reason = format!("{length} bytes at {offset:#x} are not whole clusters of {cluster_size} bytes");
            return Err(Error::BadOption { name: "offset".to_owned(), reason });
        }
        let mut done = 0;
        while done < length {
            let end = length.min(done + cluster_size);
            let piece = buf.slice(done as usize..end as usize);
            let mut cluster = vec![0; cluster_size as usize];
            piece.copy_to(cluster.get_mut(..(end - done) as usize).unwrap_or_default());
            match self.compressed(&cluster) {
                Some(packed) => self.write_packed(GuestOffset(offset + done), &packed).await?,
                None => self.write_range(offset + done, piece, Access::Shared).await?,
            }
            done = end;
        }
        self.end(request, length, Purpose::Write);
        self.work.notify_one();
        self.commit_if_due().await
    }

    /// A cluster's contents compressed, in whole sectors; `None` if that saves none, or refcounts are too narrow for shared
    /// clusters.
    pub(crate) fn compressed(&self, cluster: &[u8]) -> Option<Vec<u8>> {
        let mut packed = match self.compression_type {
            0 => {
                let mut deflate = Compress::new_with_window_bits(Compression::default(), false, WINDOW_BITS);
                // What has no room saves none.
                let mut packed = Vec::with_capacity(cluster.len());
                let status = deflate.compress_vec(cluster, &mut packed, FlushCompress::Finish).ok()?;
                (status == Status::StreamEnd).then_some(packed)?
            }
            _ => ruzstd::encoding::compress_to_vec(cluster, ruzstd::encoding::CompressionLevel::Fastest),
        };
        packed.resize(packed.len().next_multiple_of(SECTOR as usize), 0);
        let saves = packed.len() < cluster.len();
        let plain = !self.meta.external && !self.encryption.is_on();
        (saves && plain && self.meta.geometry.refcount_max() > 1).then_some(packed)
    }

    async fn write_packed(&self, at: GuestOffset, packed: &[u8]) -> Result<()> {
        let guest = self.meta.geometry.guest_cluster(at);
        let _turn = self.allocating.take(guest.0..guest.0 + 1).await;
        loop {
            let _unfrozen = self.unfrozen(Access::Shared).await;
            self.prepare_changes().await?;
            let (slice, index) = self.slice_for_change(guest).await?;
            self.check_targets(&slice, guest, index, 1).await?;
            let old = slice.read().get(index);
            let mapping = self.decode(guest, old)?;
            let placed = self.place_packed(packed.len() as u64).await?;
            self.volume.write("writing compressed data", placed.offset, IoBuf::new(packed)).await?;
            self.meta.require_barrier();
            let mut entries = self.meta.l2.modify(&slice);
            if entries.get(index) == old {
                entries.set(index, Entry { word: l2::COMPRESSED | placed.descriptor, ..Entry::default() });
                self.unlink(mapping);
                placed.linked();
                return Ok(());
            }
        }
    }

    /// Takes room for compressed data of so many bytes, whole sectors and less than a cluster.
    pub(crate) async fn place_packed(&self, length: u64) -> Result<Placed<'_>> {
        let geometry = self.meta.geometry;
        let mut room = self.room.lock().await;
        loop {
            let first = room.next >> geometry.cluster_bits;
            if room.next + length <= room.end {
                let offset = room.next;
                let last = (offset + length - 1) >> geometry.cluster_bits;
                let mut refcounts = self.meta.refcounts.lock().await;
                // Only the cluster that is being filled can be full of counts.
                if refcounts.count(&self.volume, HostCluster(first)).await? < geometry.refcount_max() {
                    refcounts.add(&self.volume, first..last + 1, 1).await?;
                    drop(refcounts);
                    self.advance(&mut room, offset + length);
                    let descriptor = l2::compressed_descriptor(offset, length, geometry);
                    return Ok(Placed { clusters: &self.clusters, first, count: last + 1 - first, descriptor, offset });
                }
                drop(refcounts);
                self.advance(&mut room, (first + 1) << geometry.cluster_bits);
                continue;
            }
            self.leave(&mut room);
            let wanted = geometry.clusters_for(ROOM_BYTES).max(1);
            let range = self.clusters.allocate(&self.volume, &self.meta, wanted).await?.keep();
            *room = Room { next: range.start << geometry.cluster_bits, end: range.end << geometry.cluster_bits };
        }
    }

    /// Lets the entry of a guest cluster name its compressed form, which is durable, if nobody wrote to the cluster meanwhile.
    ///
    /// # Errors
    /// As [`check_targets`](Self::check_targets): what the entry named is freed, and in a damaged image that may be a table.
    pub(crate) async fn name_packed(&self, guest: GuestCluster, src: HostCluster, placed: &Placed<'_>) -> Result<bool> {
        let geometry = self.meta.geometry;
        let Some((_turn, slice, index)) = self.own_slice(guest).await? else { return Ok(false) };
        self.check_targets(&slice, guest, index, 1).await?;
        let mut entries = self.meta.l2.modify(&slice);
        let mapping = self.decode(guest, entries.get(index))?;
        let names_src = matches!(mapping, Mapping::Data { host, copied: true } if geometry.host_cluster(host) == src);
        // The mark is looked for under the lock under which writers set it.
        if !names_src || self.moves.is_cancelled(src) {
            return Ok(false);
        }
        entries.set(index, Entry { word: l2::COMPRESSED | placed.descriptor, ..Entry::default() });
        self.clusters.lock().unlink(src, true);
        Ok(true)
    }

    /// The room is used up to byte `next`: the clusters on the way are in use, and let go if they are full.
    fn advance(&self, room: &mut Room, next: u64) {
        let geometry = self.meta.geometry;
        let held = |at: u64| geometry.clusters_for(at);
        let (before, after) = (held(room.next), held(next));
        let mut states = self.clusters.lock();
        states.roots.remove_range(before..after);
        for c in room.next >> geometry.cluster_bits..next >> geometry.cluster_bits {
            states.unlink(HostCluster(c), false);
        }
        room.next = next;
    }

    /// Gives back what is left of the room.
    fn leave(&self, room: &mut Room) {
        let bits = self.meta.geometry.cluster_bits;
        let unused = self.meta.geometry.clusters_for(room.next)..room.end >> bits;
        let mut states = self.clusters.lock();
        if room.next >> bits < unused.start && room.next < room.end {
            states.unlink(HostCluster(room.next >> bits), false);
        }
        states.roots.remove_range(unused.clone());
        states.unlinked.clusters.insert_range(unused);
        *room = Room::default();
    }

    /// Nobody is going to write compressed data for a while.
    pub(crate) async fn leave_room(&self) {
        let mut room = self.room.lock().await;
        if room.end > 0 {
            self.leave(&mut room);
        }
    }
}
