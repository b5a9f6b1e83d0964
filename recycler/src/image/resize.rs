//! Changing the size of the virtual disk.

use super::Image;
use super::discard::{Access, Clear};
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::header;
use crate::metadata::commit::L1Move;
use crate::mutation::{Mutation, broken};
use crate::sync::atomic::{AtomicU64, Ordering};

/// An L1 table may take this many bytes.
const MAX_L1_BYTES: u64 = 32 << 20;

/// The disk looks smaller than the header says: when this is dropped, it has its old size again.
struct Shown<'a> {
    size: &'a AtomicU64,
    /// `None`: the header says so, too.
    old: Option<u64>,
}

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if let Some(old) = self.old {
            self.size.store(old, Ordering::SeqCst);
        }
    }
}

impl<D: BlockDevice> Image<D> {
    /// Makes the virtual disk `size` bytes long, a multiple of 512; durable on return. What is new reads as zeroes. Making
    /// the disk smaller loses what is past its new end, and must be asked for with `shrink`.
    ///
    /// Requests that allocate wait meanwhile, and for a moment all that change the disk; so does a compaction, when it is
    /// through with the batch it is at.
    ///
    /// A call that is dropped half-way has left the disk as large as it was, or made it as large as was asked. What is past a
    /// smaller disk's end may be in the file then: asking for the same size again gives it back. If the call is dropped while the
    /// header is being written, nobody knows which, and the image takes no changes any more until it is opened again.
    ///
    /// # Errors
    /// [`Error::BadOption`] for an unusable size; [`Error::Unsupported`] for a version 2 image with snapshots, and if a bitmap's
    /// granularity is too fine for so large a disk; as [`write`](Self::write) otherwise.
    pub async fn resize(&self, size: u64, shrink: bool) -> Result<()> {
        let bad = |reason: String| Error::BadOption { name: "size".to_owned(), reason };
        if self.is_closed() {
            return Err(Error::Closed);
        }
        self.ensure_writable()?;
        self.ensure_data()?;
        if !size.is_multiple_of(512) {
            return Err(bad(format!("{size} is not a multiple of 512 bytes")));
        }
        let geometry = self.meta.geometry;
        let entries = geometry.clusters_for(size).div_ceil(geometry.l2_entries());
        if entries * 8 > MAX_L1_BYTES || size > i64::MAX as u64 {
            return Err(bad(format!("{size} bytes need an L1 table of more than 32 MiB at this cluster size")));
        }
        if self.meta.version < 3 && self.snapshot_count() > 0 {
            return Err(Error::unsupported("resizing a version 2 image with internal snapshots"));
        }
        let _turn = self.recycler_turn_soon().await?;
        let old = self.virtual_size();
        if size < old {
            if !shrink {
                return Err(bad(format!(
                    "{size} is less than the present {old} bytes, and shrinking was not asked for"
                )));
            }
            self.prepare_changes().await?;
            self.shrink(size, old).await?;
        } else if size > old {
            let _fits = self.bitmaps.will_reach(size, geometry)?;
            self.prepare_changes().await?;
            self.grow_disk(size, old, entries).await?;
        } else {
            // A call that made the disk smaller may have been given up when the header said so already.
            self.prepare_changes().await?;
            let _frozen = self.freeze().await;
            self.forget_past(size).await?;
            self.commit().await?;
        }
        Ok(())
    }

    async fn shrink(&self, size: u64, old: u64) -> Result<()> {
        // A request that ends with the disk clears or fills its last cluster whole, and the disk may yet stay as large as it is:
        // so nobody changes it while it only looks smaller.
        let closed = self.gate.close(&self.obstacles);
        self.epochs.grace().await;
        // From here on nobody reads past the new end; those who do, end.
        let mut shown = Shown { size: &self.virtual_size, old: Some(old) };
        self.virtual_size.store(size, Ordering::SeqCst);
        self.epochs.grace().await;
        let _frozen = self.freeze().await;
        if broken(Mutation::ForgetBeforeSize) {
            self.forget_past(size).await?;
        }
        self.publish_size(size).await?;
        // The header says so, and nothing was awaited since.
        shown.old = None;
        self.bitmaps.resized(size);
        drop(closed);
        self.forget_past(size).await?;
        self.commit().await?;
        self.cut_data(size, old).await
    }

    /// Makes a smaller size durable.
    ///
    /// The size first. Cut before: the disk is as it was. Cut after: what is past the end is still mapped; growing the disk
    /// again clears it before it can be seen.
    async fn publish_size(&self, size: u64) -> Result<()> {
        let mut turn = self.meta.exclusive_turn().await;
        self.commit_in_turn(&mut turn, None).await?;
        turn.switch_header(&self.volume, |sector| header::patch_virtual_size(sector, size)).await
    }

    /// Unmaps every whole cluster past byte `size` of the disk, and drops L2 tables that map nothing else. The caller has
    /// frozen the mapping.
    pub(super) async fn forget_past(&self, size: u64) -> Result<()> {
        let geometry = self.meta.geometry;
        let per_table = geometry.l2_entries();
        let first = geometry.clusters_for(size);
        for l1_index in first / per_table..self.meta.l1.len() {
            let Some(table) = self.meta.l1.get(l1_index, &self.volume)? else { continue };
            self.note_snapshot_tables().await?;
            self.check_undisputed(l1_index)?;
            let start = first.max(l1_index * per_table);
            let end = (l1_index + 1) * per_table;
            self.clear_clusters(start..end, Clear::Forget, Access::Frozen).await?;
            if start == l1_index * per_table {
                let table = self.meta.l1.get(l1_index, &self.volume)?.unwrap_or(table);
                self.meta.l1.set(l1_index, None);
                self.meta.l2.forget(start..end);
                let c = geometry.host_cluster(table.host);
                if table.copied {
                    self.meta.tables.lock().remove(c);
                }
                self.clusters.lock().unlink(c, table.copied);
            }
        }
        Ok(())
    }

    async fn grow_disk(&self, size: u64, old: u64, entries: u64) -> Result<()> {
        self.prepare_larger(size, old, entries).await?;
        // A request that reaches to the old end may be about to clear the last cluster whole, or to fill it. None is under way any
        // more when the first one comes that reaches past it: they have ended before the size changes, and none begins.
        let _closed = self.gate.close(&self.obstacles);
        self.epochs.grace().await;
        self.publish_larger(size, old).await
    }

    /// Makes room for the entries of a larger disk, and lets what is new read as zeroes.
    async fn prepare_larger(&self, size: u64, old: u64, entries: u64) -> Result<()> {
        let geometry = self.meta.geometry;
        let _frozen = self.freeze().await;
        if self.meta.version < 3 && self.backing.size() > old {
            return Err(Error::unsupported("growing a version 2 image over the end of a longer backing file"));
        }
        if entries > self.meta.l1.len() {
            // At the end of the file; a compaction brings it down again.
            let clusters = geometry.clusters_for(entries * 8);
            let old_clusters = self.meta.l1.clusters();
            let allocation = self.clusters.allocate_at_end(&self.volume, &self.meta, clusters).await?;
            let first = allocation.first();
            let mut turn = self.meta.exclusive_turn().await;
            let l1_move = L1Move { to: geometry.host_offset(first), entries, patch: &|_| {} };
            self.commit_in_turn(&mut turn, Some(l1_move)).await?;
            self.table_moved(old_clusters, first.0..first.0 + clusters);
            allocation.linked();
        }
        // What becomes part of the disk must read as zeroes before it does: the rest of the last cluster, clusters left by
        // an interrupted shrink, and a backing file that is longer than the disk was.
        if broken(Mutation::GrowBeforeClearing) {
            let turn = self.meta.exclusive_turn().await;
            turn.rewrite_header(&self.volume, |sector| header::patch_virtual_size(sector, size)).await?;
        }
        self.grow_data(size, old).await?;
        self.clear_new(old, size, size.next_multiple_of(geometry.cluster_size())).await?;
        // So that little is left to be written while all changes wait.
        let mut turn = self.meta.exclusive_turn().await;
        self.commit_in_turn(&mut turn, None).await.map(|_| ())
    }

    /// Makes a larger size durable, and shows it. Nobody changes the disk.
    async fn publish_larger(&self, size: u64, old: u64) -> Result<()> {
        let _frozen = self.freeze().await;
        // Since what is new was cleared, requests within the old disk may have filled its last cluster whole, and no other.
        let rest = old.next_multiple_of(self.meta.geometry.cluster_size());
        self.clear_new(old, size, rest).await?;
        let mut turn = self.meta.exclusive_turn().await;
        self.commit_in_turn(&mut turn, None).await?;
        // Cut before: the disk has its old size. After: its new one, and everything new is zero.
        turn.switch_header(&self.volume, |sector| header::patch_virtual_size(sector, size)).await?;
        // Nothing is awaited in between: whoever drops this finds the size that the header has.
        self.virtual_size.store(size, Ordering::SeqCst);
        self.bitmaps.resized(size);
        Ok(())
    }

    /// Makes `from..to` read as zeroes, skipping what has no L2 table unless a backing file shows there. The disk will end at
    /// `size`, in the last of these clusters.
    async fn clear_new(&self, from: u64, size: u64, to: u64) -> Result<()> {
        if self.data_is_disk() {
            // What is new in the data file is zero, and so is what reads as zeroes by its entry.
            return Ok(());
        }
        let geometry = self.meta.geometry;
        let table_bytes = geometry.l2_entries() << geometry.cluster_bits;
        let mut at = from;
        while at < to {
            let end = to.min((at / table_bytes + 1) * table_bytes);
            let mapped = self.meta.l1.get(at / table_bytes, &self.volume)?.is_some();
            if mapped || !self.backing.is_zero_from(at) {
                // An external data file ends with the disk, wherever in a cluster that is.
                let visible = if self.meta.external { end.min(size) } else { end };
                self.clear_range(at, visible, end, Clear::Unmap, Access::Frozen).await?;
            }
            at = end;
        }
        Ok(())
    }
}
