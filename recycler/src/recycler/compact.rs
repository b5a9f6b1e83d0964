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

use tokio::time::{Duration, Instant};

use super::pacing::{Paced, Pacer};
use super::place::place;
use super::plan::{floor, in_use, plan};
use super::punch::punch_from;
use crate::clusters::moves::{Batch, Copying, Move, Reference};
use crate::clusters::scan::{Limits, scan};
use crate::clusters::set::ClusterSet;
use crate::device::BlockDevice;
use crate::device::volume::Copier;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::encryption::Contents;
use crate::image::relocate::{Holes, Purpose};
use crate::metadata::commit::FlushToken;
use crate::mutation::{Mutation, broken};
use crate::options::LogLevel;
use crate::sync::AsyncMutexGuard;
use crate::sync::atomic::Ordering;
use crate::units::HostCluster;

/// A batch moves at most this many bytes and clusters, which bounds memory, what a guest flush may have to wait for, and the
/// room that a compaction needs: it takes one flush, and what it moved is in the file twice until the next one has ended.
const BATCH_BYTES: u64 = 48 << 20;
const BATCH_CLUSTERS: u64 = 16384;
/// The same where the holes occupy no space: then what is in the file twice takes space that it did not take before, of which the
/// host may have little.
const SPARSE_BATCH_BYTES: u64 = 4 << 20;
/// And then it is moved in parts, each with a flush of its own: of this many bytes, or as many as could be copied while what a
/// flush takes goes by.
const SPARSE_PART_BYTES: u64 = 256 << 10;
const COPIED_PER_SECOND: u64 = 1 << 30;
/// So many of the next holes, which lie among so many times as many, tell whether they do.
const SAMPLE: usize = 8;
const SPREAD: usize = 64;
/// A copy is made of at most this many bytes before guests and the rate limit get a look in.
pub(super) const COPY_BYTES: u64 = 1 << 20;
/// The device is told what will be read at least this much in advance.
const AHEAD_BYTES: u64 = 8 << 20;
/// A batch chooses, for runs of clusters that are to stay whole, among so many times the holes that it fills. The others are there
/// for the batches that follow.
const CHOICE: u64 = 2;
/// After so many rounds that knew all that was to move, and in which guests were at work, what they have freed meanwhile is left.
const DISTURBED_ROUNDS: usize = 4;
/// A scan remembers at most this many clusters; what does not fit is found by the next one.
const SCAN_CLUSTERS: usize = 1 << 18;

/// How far a compaction is. Counts are of clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Clusters handled so far: moved, or found in use by the guest and left.
    pub done: u64,
    /// Clusters that are to be handled, as far as is known: while the tables are searched, one more than are done.
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

/// Compacts the image now, while guests go on. `progress` is called at least once for each MiB that is
/// copied, and for each table that is searched; returning `false` cancels the rest, which leaves a consistent image.
///
/// Waits while the background recycler erases or compacts. Needs tokio's timers.
///
/// # Errors
/// [`Error::Cancelled`]; [`Error::ReadOnly`]; [`Error::Closed`]; [`Error::Io`] and [`Error::Invalid`] as they come: the
/// image is consistent, and the compaction can be asked for again.
pub async fn compact<D: BlockDevice>(
    image: &Image<D>,
    progress: &mut (dyn FnMut(Progress) -> bool + Send),
) -> Result<CompactReport> {
    image.ensure_writable()?;
    let turn = image.recycler_turn().await?;
    let mut compaction = Compaction {
        image,
        turn: Some(turn),
        pacer: Pacer::new(image.options.rate_limit, &image.epochs),
        progress: Progress::default(),
        copier: Copier::default(),
        moved: 0,
        is_complete: true,
        crowded: false,
        part: SPARSE_PART_BYTES,
        gives_back: true,
        roomy: false,
        gathered: false,
    };
    compaction.run(progress).await
}

/// A batch whose moves are active. When it is dropped, for whatever reason, none of them is any more: those that were not
/// rewritten are given up, the others wait for a flush.
struct Active<'a, D: BlockDevice> {
    image: &'a Image<D>,
    /// Copied, and not rewritten.
    standing: Vec<Move>,
    rewritten: Vec<Move>,
}

impl<D: BlockDevice> Active<'_, D> {
    /// For the statistics: all are in this state.
    fn gauge(&self, state: usize, count: usize) {
        for (n, gauge) in self.image.moves.gauges[..3].iter().enumerate() {
            gauge.store(if n == state { count as u64 } else { 0 }, Ordering::Relaxed);
        }
    }
}

impl<D: BlockDevice> Drop for Active<'_, D> {
    fn drop(&mut self) {
        let image = self.image;
        self.standing.iter().for_each(|m| image.give_up(m));
        image.moves.withdraw_all();
        image.moves.await_flush(Batch::referenced(std::mem::take(&mut self.rewritten), image.meta.stamp()));
        self.gauge(0, 0);
    }
}

/// The length of a batch of about `count` of these sources, which are in descending order: it ends where no run of clusters
/// that follow one another, for the guest, too, is cut, if there is such a place not long before.
fn whole_runs(sources: &[(HostCluster, Reference)], count: usize) -> usize {
    let cut = |at: &usize| match sources.get(at - 1..at + 1) {
        Some(&[(high, Reference::L2Entry(late)), (low, Reference::L2Entry(early))]) => {
            low.0 + 1 != high.0 || early.0 + 1 != late.0
        }
        _ => true,
    };
    let count = count.min(sources.len());
    (count - count / 4..=count).rev().filter(|&at| at > 0).find(cut).unwrap_or(count)
}

/// How many bytes to move at once, if the holes occupy no space, after a part of `last` bytes in which what does not depend on that
/// took so long: a device may be slow for once.
fn sparse_part(last: u64, taken: Duration) -> u64 {
    let meanwhile = taken.as_secs_f64() * COPIED_PER_SECOND as f64;
    (meanwhile as u64).min(last * 2).clamp(SPARSE_PART_BYTES, SPARSE_BATCH_BYTES)
}

/// Which holes below `limit` the first `count` of the clusters that are left to move go to; and those holes, taken.
async fn choose_holes<'a, D: BlockDevice>(
    image: &'a Image<D>,
    left: &[(HostCluster, Reference)],
    count: usize,
    limit: u64,
) -> Result<(Vec<Move>, Holes<'a>)> {
    let group = (COPY_BYTES >> image.meta.geometry.cluster_bits).max(1) as usize;
    let sources = left.get(..count).unwrap_or(left);
    let count = sources.len() as u64;
    let offered = image.offer_holes(count * CHOICE, limit).await;
    let room: u64 = offered.iter().map(|run| run.end - run.start).sum();
    if room < count {
        let holes = image.take_holes(count, limit, Purpose::Copy).await?;
        let sources = sources.iter().take(holes.set.len() as usize).copied().collect();
        let moves = place(sources, &holes.set.runs().collect::<Vec<_>>(), group);
        return Ok((moves, holes));
    }
    // Towards the end, what is left of holes is to do for the batches that follow, too.
    let is_last_choice = room < count * CHOICE && left.len() as u64 <= room;
    let mut moves = place(if is_last_choice { left } else { sources }.to_vec(), &offered, group);
    if is_last_choice {
        let these: ClusterSet = sources.iter().map(|&(src, _)| src).collect();
        moves.retain(|m| these.contains(m.src));
    }
    let holes = image.take_chosen(&moves.iter().map(|m| m.dst).collect()).await?;
    moves.retain(|m| holes.set.contains(m.dst));
    Ok((moves, holes))
}

/// How a batch ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    Whole,
    /// There was no hole left to move to.
    NoHoles,
    /// The caller cancelled; what had been copied was moved.
    Cancelled,
}

pub(super) struct Compaction<'a, D: BlockDevice> {
    pub(super) image: &'a Image<D>,
    turn: Option<AsyncMutexGuard<'a, ()>>,
    pub(super) pacer: Pacer<'a>,
    pub(super) progress: Progress,
    pub(super) copier: Copier,
    /// Clusters moved.
    pub(super) moved: u64,
    /// The last round knew of all that was to move.
    is_complete: bool,
    /// The last round had no holes left for all that should move. The refcount blocks that will not be needed in the end may be
    /// in the way: they stand among the clusters that stay, and are needed as long as one cluster that they count is not moved.
    crowded: bool,
    /// How many bytes the next part of a batch has.
    part: u64,
    /// Whether holes can be punched, as far as is known.
    gives_back: bool,
    /// So this round leaves them the room that they take: what it moves may be moved once more when they are gone.
    roomy: bool,
    /// Clusters that hold little compressed data have been emptied: that is done once, since what fits nowhere better would be
    /// moved about for ever.
    pub(super) gathered: bool,
}

impl<D: BlockDevice> Compaction<'_, D> {
    async fn run(&mut self, progress: &mut (dyn FnMut(Progress) -> bool + Send)) -> Result<CompactReport> {
        let image = self.image;
        let bits = image.meta.geometry.cluster_bits;
        let before = image.file_size();
        let cancelled_before = image.moves.cancelled.load(Ordering::Relaxed);
        image.leave_room().await;
        let so_far = self.searching();
        let paced = &mut Paced { image, pacer: &mut self.pacer, is_wanted: &mut || progress(so_far) };
        image.find_junk(paced).await?;
        self.settle().await?;
        let mut go_on = true;
        let mut disturbed = 0;
        while go_on {
            let moved_before = self.moved;
            let requests = image.epochs.requests();
            go_on = match self.round(progress).await {
                // In the middle of a search: what was moved before is to be cut off all the same.
                Err(Error::Cancelled) => false,
                other => other?,
            };
            // The last batch's references become durable, and its sources Junk.
            if !broken(Mutation::TruncateBeforeDurable) {
                self.settle().await?;
            }
            // Every move brings a cluster nearer to the file's start, so this ends; but guests may free others all the time. That is the
            // next compaction's affair.
            if self.is_complete && image.epochs.requests() != requests {
                disturbed += 1;
            }
            if disturbed > DISTURBED_ROUNDS {
                break;
            } else if self.moved > moved_before {
                if std::mem::take(&mut self.roomy) && go_on {
                    // The blocks that were in the way count nothing any more: their places are holes for the next round.
                    image.shorten().await?;
                }
            } else if self.crowded && !self.roomy {
                self.roomy = true;
            } else {
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
    pub(super) async fn settle(&self) -> Result<()> {
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
        image.move_snapshot_tables(floor).await?;
        let (generation, mut snapshots) = image.snapshot_l1_tables();
        let in_use_before = in_use(&image.clusters.lock(), floor);
        let limits = Limits { floor, max: SCAN_CLUSTERS, data_moves: image.encryption.lets_data_move() };
        let so_far = self.searching();
        let paced = &mut Paced { image, pacer: &mut self.pacer, is_wanted: &mut || progress(so_far) };
        let scan = scan(&image.volume, &image.meta, &image.clusters, &mut snapshots, limits, paced).await?;
        self.is_complete = scan.complete_from <= floor;
        if scan.doubtful > 0 {
            let reason = format!(
                "{} clusters have references that contradict each other or the counts: check it",
                scan.doubtful
            );
            image.background_error("moving clusters", &Error::invalid("image", 0, reason));
        }
        // What is compressed goes first: it makes room, and no longer pins the file's end.
        if !self.repack(&scan.packed, &mut snapshots, floor, progress).await? {
            return Ok(false);
        }
        let plan = plan(&image.clusters.lock(), &scan, floor, &in_use_before, geometry.refcounts_per_block());
        let shared = plan.shared.chunk_by(|a, b| a.cluster == b.cluster).count();
        self.progress.total = self.progress.done + (plan.sources.len() + shared) as u64;
        self.crowded = false;
        let mut rest = &plan.sources[..];
        while !rest.is_empty() {
            // Before the batch's own holes are none any more.
            let is_sparse = self.takes_space();
            let (left, count) = (rest, whole_runs(rest, self.batch_size(is_sparse)));
            rest = rest.get(count..).unwrap_or_default();
            self.progress.file_size = image.file_size();
            if !progress(self.progress) {
                return Ok(false);
            }
            self.yield_turn().await?;
            match self.batch(left, count, is_sparse, plan.limit, progress).await? {
                Ended::Whole => {}
                Ended::NoHoles => {
                    self.crowded = true;
                    break;
                }
                Ended::Cancelled => return Ok(false),
            }
            // What the batch before left behind needs no more room, so the file never holds more than two of them twice (three
            // while a refcount block among them goes).
            let from = left.get(..count).and_then(<[_]>::last).map_or(plan.limit, |&(lowest, _)| lowest.0);
            self.cut_batch(plan.limit, is_sparse.then_some(from)).await?;
        }
        self.move_shared(&plan, generation, progress).await
    }

    /// How far it is while nobody knows what is to be moved.
    pub(super) fn searching(&self) -> Progress {
        let done = self.progress.done;
        Progress { done, total: done + 1, file_size: self.image.file_size() }
    }

    /// How many clusters to move at once; `is_sparse`: into holes that occupy no space.
    pub(super) fn batch_size(&mut self, is_sparse: bool) -> usize {
        let most = if is_sparse { SPARSE_BATCH_BYTES } else { BATCH_BYTES };
        let bytes = self.pacer.portion(BATCH_BYTES).min(most);
        (bytes >> self.image.meta.geometry.cluster_bits).clamp(1, BATCH_CLUSTERS) as usize
    }

    /// Whether most of the holes that are filled next occupy no space.
    pub(super) fn takes_space(&self) -> bool {
        let bits = self.image.meta.geometry.cluster_bits;
        let next: Vec<u64> = {
            let states = self.image.clusters.lock();
            states.junk.iter().take(SAMPLE * SPREAD).collect()
        };
        let sample = next.iter().step_by(next.len().div_ceil(SAMPLE).max(1));
        let device = self.image.volume.device();
        sample.clone().filter(|&&cluster| device.is_hole(cluster << bits, 1 << bits)).count() * 2 > sample.count()
    }

    /// Cuts off what batches left behind at the end of the file, and gives back what is free from cluster `from` on.
    pub(super) async fn cut_batch(&mut self, limit: u64, from: Option<u64>) -> Result<()> {
        if !broken(Mutation::TruncateBeforeDurable) {
            self.image.cut_junk(limit).await?;
            if let Some(from) = from {
                self.give_back(from).await;
            }
        }
        Ok(())
    }

    /// What is free from cluster `from` on, where all has been moved that can be, and cannot be cut off, since something is in use
    /// behind it (a guest wrote to a cluster, and so cancelled its move; a refcount block counts what has not been moved yet), takes
    /// no space until it can. If that fails (a file system that is full may have no room for a note of one more hole), it takes space
    /// until then.
    pub(super) async fn give_back(&mut self, from: u64) {
        if self.gives_back && self.image.options.punch_junk && self.image.volume.can_punch() {
            let bytes = self.pacer.a_second(SPARSE_BATCH_BYTES);
            let punched = punch_from(self.image, from, bytes, &mut self.pacer).await;
            if let Err(e) = &punched {
                self.image.background_error("giving space back to the host", e);
            }
            self.gives_back = punched.is_ok();
        }
    }

    /// Between batches nothing is half done: whoever waits for the turn (a resize, a check, closing) goes first.
    pub(super) async fn yield_turn(&mut self) -> Result<()> {
        self.turn = None;
        self.turn = Some(self.image.recycler_turn().await?);
        Ok(())
    }

    async fn floor(&self) -> u64 {
        let image = self.image;
        let per_block = image.meta.geometry.refcounts_per_block();
        let refcounts = image.meta.refcounts.lock().await;
        let states = image.clusters.lock();
        let lowest = floor(&states, 0);
        if self.roomy {
            return lowest;
        }
        let empty = refcounts.blocks().filter(|(index, _)| index * per_block >= lowest).count();
        floor(&states, empty as u64)
    }

    /// Moves the first `count` of the clusters that are left to move, a batch of them, below `limit`.
    async fn batch(
        &mut self,
        left: &[(HostCluster, Reference)],
        count: usize,
        is_sparse: bool,
        limit: u64,
        progress: &mut (dyn FnMut(Progress) -> bool + Send),
    ) -> Result<Ended> {
        let image = self.image;
        let bits = image.meta.geometry.cluster_bits;
        let (mut moves, mut holes) = choose_holes(image, left, count, limit).await?;
        if moves.is_empty() {
            return Ok(Ended::NoHoles);
        }
        let done = self.progress.done + count as u64;
        let bytes = (moves.len() as u64) << bits;
        let in_parts = is_sparse && self.part < bytes;
        if in_parts {
            // From the end of the file on, so that each part can be cut off after the next one.
            moves.sort_unstable_by_key(|m| std::cmp::Reverse(m.src));
        }
        while !moves.is_empty() {
            let most = if in_parts { (self.part >> bits).max(1) as usize } else { moves.len() };
            let others = moves.split_off(most.min(moves.len()));
            let mut part = std::mem::replace(&mut moves, others);
            if in_parts {
                part.sort_unstable_by_key(|m| m.dst);
            }
            let moved = part.len() as u64;
            let from = part.iter().map(|m| m.src.0).min().unwrap_or(limit);
            let ended = self.carry_out(Batch::new(part), &mut holes, progress).await;
            self.pacer.repay().await;
            match ended? {
                Ended::Whole => self.progress.done += moved,
                other => return Ok(other),
            }
            if in_parts && !broken(Mutation::TruncateBeforeDurable) {
                image.cut_tail().await?;
                self.give_back(from).await;
            }
        }
        // Also those for which no hole was left.
        self.progress.done = done;
        Ok(Ended::Whole)
    }

    /// Takes a batch through its states. `holes` keeps the destinations that were not used.
    async fn carry_out(
        &mut self,
        batch: Batch<Copying>,
        holes: &mut Holes<'_>,
        progress: &mut (dyn FnMut(Progress) -> bool + Send),
    ) -> Result<Ended> {
        let image = self.image;
        let mut active = Active { image, standing: Vec::new(), rewritten: Vec::new() };
        image.moves.publish(&batch.moves);
        active.gauge(0, batch.moves.len());
        let published = Instant::now();
        // Writers that looked a source up before the moves were published may still be writing to it.
        if !broken(Mutation::CopyWithoutGrace) {
            image.epochs.grace().await;
        }
        self.pacer.expose();
        let began = Instant::now();
        let ended = self.copy(&batch.moves, &mut active.standing, progress).await?;
        let copied = Batch::copied(active.standing.clone(), image.meta.stamp());
        active.gauge(1, copied.moves.len());
        let copied_at = Instant::now();
        // Also the flush that makes the references of the batch before durable.
        let token = if broken(Mutation::RewriteBeforeFlush) { FlushToken::unproven() } else { image.commit().await? };
        self.part = sparse_part(self.part, (began - published) + copied_at.elapsed());
        // The commit began after the stamp was taken; if it had not, nothing would be rewritten.
        let Ok(flushed) = copied.flushed(&token) else { return Ok(ended) };
        active.gauge(2, flushed.moves.len());
        let mut error = None;
        while let Some(m) = active.standing.last().copied() {
            let rewritten = image.rewrite_reference(&m).await;
            // No await from here on: a compaction that is dropped must not forget a move.
            active.standing.pop();
            match rewritten {
                Ok(true) => {
                    holes.used(m.dst);
                    active.rewritten.push(m);
                    self.moved += 1;
                }
                Ok(false) => image.give_up(&m),
                Err(e) => {
                    image.give_up(&m);
                    error.get_or_insert(e);
                }
            }
        }
        error.map_or(Ok(ended), Err)
    }

    /// Copies; `standing` gets the moves whose copies were made.
    async fn copy(
        &mut self,
        moves: &[Move],
        standing: &mut Vec<Move>,
        progress: &mut (dyn FnMut(Progress) -> bool + Send),
    ) -> Result<Ended> {
        let image = self.image;
        let cluster_size = image.meta.geometry.cluster_size();
        let mut rest = moves;
        // The device reads ahead while the copies before are made.
        let window = (AHEAD_BYTES / cluster_size).max(1) as usize;
        let mut announced = 0;
        while let Some((first, _)) = rest.split_first() {
            // What is copied so far is seen through to its end.
            if !progress(Progress { done: self.progress.done + (moves.len() - rest.len()) as u64, ..self.progress }) {
                return Ok(Ended::Cancelled);
            }
            if moves.len() - rest.len() + window > announced {
                let end = (announced + 2 * window).min(moves.len());
                self.announce(moves.get(announced..end).unwrap_or_default());
                announced = end;
            }
            if !matches!(first.reference, Reference::L2Entry(_)) {
                self.spend(cluster_size).await;
                if image.copy_table(first, &mut self.copier).await? {
                    standing.push(*first);
                }
                rest = &rest[1..];
                continue;
            }
            // Clusters that go to one place are one copy.
            let most = self.pacer.piece(COPY_BYTES);
            let follows = |(n, m): (usize, &Move)| {
                matches!(m.reference, Reference::L2Entry(_))
                    && m.dst.0 == first.dst.0 + n as u64
                    && (n as u64) * cluster_size < most
            };
            let count = rest.iter().enumerate().take_while(|&x| follows(x)).count().max(1);
            let (run, others) = rest.split_at(count);
            rest = others;
            // A move that is cancelled already is not worth copying.
            if run.iter().all(|m| image.moves.is_cancelled(m.src)) {
                continue;
            }
            self.spend(count as u64 * cluster_size).await;
            image.copy_moves(run, Contents::Data, &mut self.copier).await?;
            let to = first.dst.0 << image.meta.geometry.cluster_bits;
            image.volume.will_flush(to..to + count as u64 * cluster_size);
            standing.extend_from_slice(run);
        }
        Ok(Ended::Whole)
    }

    /// Waits until a copy of so many bytes may begin, and lets it be made as suits the guests.
    pub(super) async fn spend(&mut self, bytes: u64) {
        self.pacer.spend(bytes).await;
        self.copier.in_one = self.pacer.is_busy();
    }

    /// Tells the device what is going to be read.
    fn announce(&self, moves: &[Move]) {
        let bits = self.image.meta.geometry.cluster_bits;
        let sources: ClusterSet = moves.iter().map(|m| m.src).collect();
        sources.runs().for_each(|run| self.image.volume.will_read(run.start << bits..run.end << bits));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_as_small_as_flushes_are_quick() {
        let (least, second) = (SPARSE_PART_BYTES, Duration::from_secs(1));
        assert_eq!(sparse_part(least, Duration::ZERO), least);
        assert_eq!(sparse_part(1 << 20, second / 1000), COPIED_PER_SECOND / 1000);
        assert_eq!(sparse_part(least, second), 2 * least);
        assert_eq!(sparse_part(SPARSE_BATCH_BYTES, second), SPARSE_BATCH_BYTES);
    }
}
