//! Compaction: clusters move from the end of the file into the holes near its start, while guests go on.
//!
//! Durable steps of a batch: copy the data and count the destinations → **flush** → rewrite the references → **flush** →
//! uncount the sources. The second flush of one batch is the first of the next.
//!
//! - Cut before the first flush: the destinations are leaks at worst; every reference is the old one.
//! - Cut between: each reference, as written back or not, names the source, which nobody has touched, or the destination,
//!   whose copy is durable. A guest write cancels the move until the reference is rewritten and goes to the destination
//!   afterwards; it is durable once a later flush has made the new reference durable too.
//! - Cut after the second: nothing refers to the sources; until they are uncounted they are leaks.

use std::sync::atomic::Ordering;

use super::pacing::Pacer;
use super::plan::{floor, plan};
use crate::clusters::moves::{Batch, Copying, Move, Reference};
use crate::clusters::scan::{find_junk, scan};
use crate::clusters::set::ClusterSet;
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::relocate::Hole;
use crate::metadata::commit::FlushToken;
use crate::mutation::{Mutation, broken};
use crate::options::LogLevel;
use crate::units::HostCluster;

/// A batch moves at most this many bytes and clusters, which bounds memory and what a guest flush may have to wait for.
const BATCH_BYTES: u64 = 64 << 20;
const BATCH_CLUSTERS: u64 = 16384;
/// A copy is made of at most this many bytes before guests and the rate limit get a look in.
const COPY_BYTES: u64 = 1 << 20;
/// A scan remembers at most this many clusters; what does not fit is found by the next one.
const SCAN_CLUSTERS: usize = 1 << 18;

/// How far a compaction is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Clusters handled so far: moved, or found in use by the guest and left.
    pub done: u64,
    /// Clusters that are to be handled, as far as is known.
    pub total: u64,
    /// Length of the file now, in bytes.
    pub file_size: u64,
}

/// What a compaction did. Sizes are in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CompactReport {
    /// Length of the file before.
    pub file_size_before: u64,
    /// Length of the file after. On a device that cannot be resized, the length it could be cut to.
    pub file_size_after: u64,
    /// Bytes of clusters moved.
    pub moved: u64,
    /// Moves that a guest write or discard cancelled.
    pub cancelled: u64,
}

/// Compacts the image now, while guests go on. `progress` is called between batches of at most 64 MiB; returning `false`
/// cancels the rest, which leaves a consistent image.
///
/// Waits while the background recycler erases or compacts. Needs tokio's timers if the options have a rate limit.
///
/// # Errors
/// [`Error::Cancelled`]; [`Error::ReadOnly`]; [`Error::Closed`]; [`Error::Io`] and [`Error::Invalid`] as they come: the
/// image is consistent, and the compaction can be asked for again.
pub async fn compact<D: BlockDevice>(
    image: &Image<D>,
    progress: &mut (dyn FnMut(Progress) -> bool + Send),
) -> Result<CompactReport> {
    image.ensure_writable()?;
    let _turn = image.compaction.lock().await;
    // It may have been closed while we waited.
    image.ensure_writable()?;
    let mut compaction = Compaction {
        image,
        pacer: Pacer::new(image.options.rate_limit),
        progress: Progress::default(),
        scratch: Vec::new(),
        moved: 0,
    };
    compaction.run(progress).await
}

struct Compaction<'a, D: BlockDevice> {
    image: &'a Image<D>,
    pacer: Pacer,
    progress: Progress,
    scratch: Vec<u8>,
    /// Clusters moved.
    moved: u64,
}

impl<D: BlockDevice> Compaction<'_, D> {
    async fn run(&mut self, progress: &mut (dyn FnMut(Progress) -> bool + Send)) -> Result<CompactReport> {
        let image = self.image;
        let bits = image.meta.geometry.cluster_bits;
        let before = image.file_size();
        let cancelled_before = image.moves.cancelled.load(Ordering::Relaxed);
        find_junk(&image.volume, &image.meta, &image.clusters).await?;
        self.settle().await?;
        let mut go_on = true;
        while go_on {
            let moved_before = self.moved;
            go_on = self.round(progress).await?;
            // The last batch's references become durable, and its sources Junk.
            if !broken(Mutation::TruncateBeforeDurable) {
                self.settle().await?;
            }
            if self.moved == moved_before {
                break;
            }
        }
        image.shorten().await?;
        self.progress.file_size = image.file_size();
        let after = image.file_size();
        let report = CompactReport {
            file_size_before: before,
            file_size_after: after,
            moved: self.moved << bits,
            cancelled: image.moves.cancelled.load(Ordering::Relaxed) - cancelled_before,
        };
        if !go_on {
            return Err(Error::Cancelled);
        }
        self.progress.total = self.progress.done;
        let _ = progress(self.progress);
        image.counters.compactions.fetch_add(1, Ordering::Relaxed);
        image.options.logger.log(LogLevel::Info, || {
            let id = &image.options.id;
            format!("{id}: compacted from {before} to {after} bytes, {} bytes moved", report.moved)
        });
        Ok(report)
    }

    /// Freed → Junk, as far as requests under way allow.
    async fn settle(&self) -> Result<()> {
        self.image.commit().await?;
        self.image.epochs.grace().await;
        self.image.reap().await;
        Ok(())
    }

    /// Scans, plans, and moves what the plan says. `false` if the caller cancelled.
    async fn round(&mut self, progress: &mut (dyn FnMut(Progress) -> bool + Send)) -> Result<bool> {
        let image = self.image;
        let geometry = image.meta.geometry;
        let floor = self.floor().await;
        // These stand in consecutive clusters and are not found by the scan: if they stay, they pin.
        image.move_header_tables(floor).await?;
        let scan = scan(&image.volume, &image.meta, floor, SCAN_CLUSTERS).await?;
        let plan = plan(&image.clusters.lock(), &scan, floor, geometry.refcounts_per_block());
        self.progress.total = self.progress.done + plan.sources.len() as u64;
        let batch = (BATCH_BYTES >> geometry.cluster_bits).clamp(1, BATCH_CLUSTERS);
        for sources in plan.sources.chunks(batch as usize) {
            self.progress.file_size = image.file_size();
            if !progress(self.progress) {
                return Ok(false);
            }
            if image.is_closed() {
                return Err(Error::Closed);
            }
            if !self.batch(sources, plan.limit).await? {
                break;
            }
            self.progress.done += sources.len() as u64;
        }
        Ok(true)
    }

    async fn floor(&self) -> u64 {
        let image = self.image;
        let per_block = image.meta.geometry.refcounts_per_block();
        let refcounts = image.meta.refcounts.lock().await;
        let states = image.clusters.lock();
        let lowest = floor(&states, 0);
        let empty = refcounts.blocks().filter(|(index, _)| index * per_block >= lowest).count();
        floor(&states, empty as u64)
    }

    /// Moves a batch of clusters below `limit`. `false` if there was no hole left.
    async fn batch(&mut self, sources: &[(HostCluster, Reference)], limit: u64) -> Result<bool> {
        let image = self.image;
        let mut holes = image.take_holes(sources.len() as u64, limit, Hole::Copy).await?;
        if holes.is_empty() {
            return Ok(false);
        }
        // In the guest's order into ascending holes: what the guest reads in sequence stays in sequence.
        let mut sources: Vec<_> = sources.iter().take(holes.len() as usize).copied().collect();
        sources.sort_by_key(|&(_, reference)| reference);
        let moves: Vec<Move> = holes
            .runs()
            .flatten()
            .zip(sources)
            .map(|(dst, (src, reference))| Move { src, dst: HostCluster(dst), reference })
            .collect();
        let done = self.carry_out(Batch::new(moves), &mut holes).await;
        image.moves.withdraw_all();
        for gauge in &image.moves.gauges[..3] {
            gauge.store(0, Ordering::Relaxed);
        }
        // Destinations that nothing refers to.
        image.return_holes(&holes).await?;
        done.map(|()| true)
    }

    /// Takes a batch through its states. `holes` keeps the destinations that were not used.
    async fn carry_out(&mut self, batch: Batch<Copying>, holes: &mut ClusterSet) -> Result<()> {
        let image = self.image;
        let gauge = |state: usize, count: usize| image.moves.gauges[state].store(count as u64, Ordering::Relaxed);
        image.moves.publish(&batch.moves);
        gauge(0, batch.moves.len());
        // Writers that looked a source up before the moves were published may still be writing to it.
        if !broken(Mutation::CopyWithoutGrace) {
            image.epochs.grace().await;
        }

        let mut standing = Vec::new();
        if let Err(e) = self.copy(&batch.moves, &mut standing).await {
            standing.iter().for_each(|m| image.give_up(m));
            return Err(e);
        }
        let copied = Batch::copied(standing, image.meta.stamp());
        gauge(0, 0);
        gauge(1, copied.moves.len());
        // Also the flush that makes the references of the batch before durable.
        let committed =
            if broken(Mutation::RewriteBeforeFlush) { Ok(FlushToken::unproven()) } else { image.commit().await };
        let flushed = match committed.map(|token| copied.flushed(&token)) {
            Ok(Ok(flushed)) => flushed,
            // Cannot be: the commit began after the stamp was taken. Nothing is rewritten then.
            Ok(Err(copied)) => {
                copied.moves.iter().for_each(|m| image.give_up(m));
                return Ok(());
            }
            Err(e) => {
                batch.moves.iter().for_each(|m| image.give_up(m));
                return Err(e);
            }
        };
        gauge(1, 0);
        gauge(2, flushed.moves.len());
        let mut rewritten = Vec::new();
        let mut error = None;
        for m in flushed.moves {
            match image.rewrite_reference(&m).await {
                Ok(true) => {
                    holes.remove(m.dst);
                    rewritten.push(m);
                }
                Ok(false) => image.give_up(&m),
                Err(e) => {
                    image.give_up(&m);
                    error.get_or_insert(e);
                }
            }
        }
        self.moved += rewritten.len() as u64;
        image.moves.await_flush(Batch::referenced(rewritten, image.meta.stamp()));
        error.map_or(Ok(()), Err)
    }

    /// Copies; `standing` gets the moves whose copies were made.
    async fn copy(&mut self, moves: &[Move], standing: &mut Vec<Move>) -> Result<()> {
        let image = self.image;
        let cluster_size = image.meta.geometry.cluster_size();
        let mut rest = moves;
        while let Some((first, _)) = rest.split_first() {
            if !matches!(first.reference, Reference::L2Entry(_)) {
                self.pacer.spend(cluster_size).await;
                if image.copy_table(first, &mut self.scratch).await? {
                    standing.push(*first);
                }
                rest = &rest[1..];
                continue;
            }
            // Clusters that follow one another at both ends are one copy.
            let follows = |(n, m): (usize, &Move)| {
                matches!(m.reference, Reference::L2Entry(_))
                    && m.src.0 == first.src.0 + n as u64
                    && m.dst.0 == first.dst.0 + n as u64
                    && (n as u64) * cluster_size < COPY_BYTES
            };
            let count = rest.iter().enumerate().take_while(|&x| follows(x)).count().max(1);
            let (run, others) = rest.split_at(count);
            rest = others;
            // A move that is cancelled already is not worth copying.
            if run.iter().all(|m| image.moves.is_cancelled(m.src)) {
                continue;
            }
            self.pacer.spend(count as u64 * cluster_size).await;
            image.copy_run(first, count as u64, &mut self.scratch).await?;
            standing.extend_from_slice(run);
        }
        Ok(())
    }
}
