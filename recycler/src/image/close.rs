//! Closing: everything durable, no cluster leaked, the file as short as it can be.

use super::Image;
use super::obstacles::Obstacle;
use crate::device::BlockDevice;
use crate::error::Result;
use crate::format::header::{self, incompatible};
use crate::mutation::{Mutation, broken};
use crate::sync::atomic::Ordering;

impl<D: BlockDevice> Image<D> {
    /// Waits for the requests under way, writes everything back and closes the image. Later calls fail with
    /// [`Error::Closed`](crate::Error::Closed); closing twice does nothing.
    ///
    /// # Errors
    /// As [`flush`](Self::flush). The image is closed even then; if it could not be written back whole, its next opening
    /// repairs it.
    pub async fn close(&self) -> Result<()> {
        if self.obstacles.put(Obstacle::Closed) {
            return Ok(());
        }
        self.work.notify_waiters();
        self.work.notify_one();
        // Requests first: they must not find the mapping frozen, or they would never end.
        self.epochs.grace().await;
        let _compaction = self.compaction.take_soon().await;
        let _frozen = self.freeze().await;
        if self.options.read_only {
            return Ok(());
        }
        // What fails here fails the bitmaps only: they stay marked as in use. Everything else is completed, but for the
        // mark that something may have leaked.
        let bitmaps = self.store_bitmaps().await;
        if !self.prepared.load(Ordering::Acquire) {
            // No table was changed; data may have been overwritten in place.
            self.flush_data().await?;
            return self.volume.flush().await.and(bitmaps);
        }
        let features = self.incompatible & !incompatible::DIRTY;
        let unmark = |sector: &mut [u8; 512]| header::patch_incompatible(sector, features);
        if broken(Mutation::UnmarkEarly) {
            self.meta.write_header(&self.volume, unmark).await?;
        }
        self.leave_room().await;
        self.settle().await?;
        self.return_pool().await?;
        // The counts, and then the length: cut in between, the file is longer than it need be, which is no error.
        self.shorten().await?;
        self.commit().await?;
        bitmaps?;
        if self.header.incompatible & incompatible::DIRTY != 0 {
            // The recovery at opening had to leave leaks, for want of room: the next one looks for them.
            return Ok(());
        }
        // Everything is durable and counted right: whoever opens the image next need not look for leaks.
        let turn = self.meta.exclusive_turn().await;
        turn.rewrite_header(&self.volume, unmark).await
    }

    /// Commits until nothing is Freed any more. Nobody else is at work.
    pub(crate) async fn settle(&self) -> Result<()> {
        // Each round takes a cluster one step further: unlinked, durable, Junk; the old refcount table adds one round.
        for _ in 0..8 {
            self.commit().await?;
            self.epochs.grace().await;
            self.reap().await;
            self.punch_vacated().await;
            let vacated = !self.vacated.lock().is_empty();
            let states = self.clusters.lock();
            if states.unlinked.is_empty() && states.grace.is_empty() && !vacated {
                break;
            }
        }
        Ok(())
    }

    /// Makes the pool Junk again: its clusters are counted ahead, which must not outlast the handle.
    async fn return_pool(&self) -> Result<()> {
        let mut refcounts = self.meta.refcounts.lock().await;
        loop {
            let run = {
                let states = self.clusters.lock();
                [&states.available, &states.erased].into_iter().find_map(|s| s.runs().next())
            };
            let Some(run) = run else { return Ok(()) };
            let free = refcounts.release(&self.volume, run.clone()).await?;
            let states = &mut *self.clusters.lock();
            states.available.remove_range(run.clone());
            states.erased.remove_range(run);
            for run in free {
                states.junk.insert_range(run);
            }
        }
    }
}
