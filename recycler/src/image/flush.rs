//! Making things durable: the one place where a flush promotes what waited for it.

use super::Image;
use crate::clusters::set::ClusterSet;
use crate::clusters::{FreedBatch, States};
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::header::{self, incompatible};
use crate::metadata::commit::{CommitTurn, FlushToken, L1Move};
use crate::mutation::{Mutation, broken};
use crate::options::LogLevel;
use crate::sync::atomic::Ordering;

/// So many runs of clusters are looked for at once when they become Junk.
const FREED_AT_ONCE: usize = 64;

impl<D: BlockDevice> Image<D> {
    /// Makes every write, discard and resize that completed before this call durable.
    ///
    /// # Errors
    /// [`Error::Closed`]; [`Error::Io`] if writing tables back failed: they stay in memory and a later flush tries again;
    /// [`Error::Failed`] if the device's flush failed, now or before: what was written since the last good flush may be
    /// lost, and the handle stays read-only.
    pub async fn flush(&self) -> Result<()> {
        if self.is_closed() {
            return Err(Error::Closed);
        }
        self.counters.guest_flushes.fetch_add(1, Ordering::Relaxed);
        if self.options.read_only {
            return Ok(());
        }
        self.replenish().await;
        self.commit().await.map(|_| ())
    }

    /// Lets the flush that follows make clusters Available that guests will soon need: see [`Clusters::replenish`].
    ///
    /// [`Clusters::replenish`]: crate::clusters::Clusters::replenish
    async fn replenish(&self) {
        // Neither while somebody needs the mapping, and with it the pool, to stand still, nor after the pool was given back.
        let Some(_unfrozen) = self.structure.try_share() else { return };
        if self.is_closed() {
            return;
        }
        if let Err(e) = self.clusters.replenish(&self.volume, &self.meta).await {
            self.background_error("making the file longer ahead of the guests", &e);
        }
    }

    /// Writes metadata back and flushes the device; what waited for that is promoted.
    pub(crate) async fn commit(&self) -> Result<FlushToken> {
        let token = match self.meta.commit_turn().await {
            // Somebody else's commit began after this call did: it covers us.
            Err(token) => token,
            Ok(mut turn) => self.commit_in_turn(&mut turn, None).await?,
        };
        self.reap().await;
        self.punch_vacated().await;
        self.work.notify_one();
        Ok(token)
    }

    /// The same, in a turn that the caller has.
    pub(crate) async fn commit_in_turn(
        &self,
        turn: &mut CommitTurn<'_>,
        l1_move: Option<L1Move<'_>>,
    ) -> Result<FlushToken> {
        // Taken note of before the tables are copied, so that the unlinking of what is freed is in the copy. A commit that
        // failed leaves its part in `committing`.
        {
            let mut states = self.clusters.lock();
            let unlinked = std::mem::take(&mut states.unlinked);
            states.committing.merge(unlinked);
            states.promotion_begins();
        }
        self.vacated.lock().commit_begins();
        if broken(Mutation::PunchBeforeEntry) {
            self.punch_vacated().await;
        }
        if broken(Mutation::UncountSourceEarly) {
            self.uncount(|states| &mut states.committing).await?;
        }
        let committed = turn.write_back(&self.volume, self.data.volume(), l1_move).await?;
        // Referenced → done: the new references are durable.
        for m in self.moves.promote(&committed.token) {
            self.finish_move(&m);
        }
        self.vacated.lock().committed(self.epochs.now());
        let mut states = self.clusters.lock();
        let late = broken(Mutation::PromoteLateWork);
        if late {
            states.promotion_begins();
        }
        states.promote();
        // Freed: the unlinking is durable. Requests that began before now may still use the clusters.
        let mut batch = std::mem::take(&mut states.committing);
        if late {
            batch.merge(std::mem::take(&mut states.unlinked));
        }
        let uncounted = std::mem::take(&mut batch.uncounted);
        states.junk.add_all(&uncounted);
        if !batch.is_empty() {
            states.grace.push((self.epochs.now(), batch));
        }
        for old in committed.old_tables {
            let old = self.undisputed(ClusterSet::from(old));
            self.meta.tables.lock().remove_all(&old);
            states.unlinked.clusters.add_all(&old);
        }
        if self.options.runtime_asserts
            && let Some(violation) = states.violation()
        {
            drop(states);
            self.volume.fail(|| format!("the cluster sets are inconsistent: {violation}"));
            return Err(Error::Failed { reason: violation });
        }
        Ok(committed.token)
    }

    /// Freed → Junk, for clusters whose unlinking is durable and whose older requests have ended. Never waits for them.
    pub(crate) async fn reap(&self) {
        if broken(Mutation::ReuseFreedAtOnce) {
            let mut states = self.clusters.lock();
            let unlinked = std::mem::take(&mut states.unlinked);
            states.grace.push((self.epochs.now(), unlinked));
        }
        while !self.next_freed(1).is_empty() {
            let mut refcounts = self.meta.refcounts.lock().await;
            // Only who has the refcounts takes from what is to be freed, so it is now as it is looked at.
            for work in self.next_freed(FREED_AT_ONCE) {
                let range = match &work {
                    Freed::Run(range) => range.clone(),
                    Freed::Shared(c) => c.0..c.0 + 1,
                };
                let free = match refcounts.release(&self.volume, range).await {
                    Ok(free) => free,
                    Err(e @ Error::Io { .. } | e @ Error::Failed { .. }) => {
                        // It stays Freed; the next commit tries again.
                        self.background_error("counting freed clusters", &e);
                        return;
                    }
                    Err(e) => {
                        // The image contradicts itself: what we believed to be counted was not. Leave the clusters alone.
                        self.background_error("counting freed clusters", &e);
                        Vec::new()
                    }
                };
                // No await from here on: the counts and the sets change together.
                let mut states = self.clusters.lock();
                match work {
                    Freed::Run(range) => {
                        for (_, batch) in &mut states.grace {
                            batch.clusters.remove_range(range.clone());
                        }
                    }
                    Freed::Shared(c) => {
                        for (_, batch) in &mut states.grace {
                            if let Some(at) = batch.shared.iter().rposition(|&s| s == c) {
                                batch.shared.swap_remove(at);
                                break;
                            }
                        }
                    }
                }
                states.grace.retain(|(_, batch)| !batch.is_empty());
                free.into_iter().for_each(|run| states.freed(run));
            }
        }
    }

    /// What may be Junk now, at most so many runs of clusters.
    fn next_freed(&self, most: usize) -> Vec<Freed> {
        let states = self.clusters.lock();
        for (ticket, batch) in &states.grace {
            let empty = batch.clusters.is_empty() && batch.shared.is_empty();
            if !empty && (self.epochs.elapsed(*ticket) || broken(Mutation::ReuseWithoutGrace)) {
                let runs = batch.clusters.runs().map(|run| Freed::Run(run.start..run.end.min(run.start + 65536)));
                return runs.chain(batch.shared.iter().rev().map(|&c| Freed::Shared(c))).take(most).collect();
            }
        }
        Vec::new()
    }

    /// What mutations do: counts are lowered that other references than those in memory still need.
    pub(super) async fn uncount(&self, freed: fn(&mut States) -> &mut FreedBatch) -> Result<()> {
        let clusters = freed(&mut self.clusters.lock()).clusters.clone();
        let mut refcounts = self.meta.refcounts.lock().await;
        for run in clusters.runs() {
            let free = refcounts.release(&self.volume, run.clone()).await?;
            let mut states = self.clusters.lock();
            freed(&mut states).clusters.remove_range(run);
            free.into_iter().for_each(|r| states.freed(r));
        }
        Ok(())
    }

    /// Commits if so much has changed since the last time that memory would grow.
    pub(crate) async fn commit_if_due(&self) -> Result<()> {
        if self.meta.l2.wants_commit() {
            self.commit().await?;
        }
        Ok(())
    }

    /// To be called before the first change of any table: marks the image, durably, so that whoever opens it after a
    /// crash knows that clusters may have leaked.
    ///
    /// In version 3 the mark is the dirty bit (also without lazy refcounts: it only says that refcounts *may* be
    /// inconsistent). Version 2 has none, so there every opening looks for leaks. The flush also makes durable what was
    /// in the file when it was opened, so that clusters that were free then may be reused.
    pub(crate) async fn prepare_changes(&self) -> Result<()> {
        if self.prepared.load(Ordering::Acquire) {
            return Ok(());
        }
        let turn = self.meta.exclusive_turn().await;
        if !self.prepared.load(Ordering::Acquire) {
            let features = self.incompatible | incompatible::DIRTY;
            let mark = |sector: &mut [u8; 512]| header::patch_incompatible(sector, features);
            if broken(Mutation::ChangeBeforeMark) {
                self.meta.write_header(&self.volume, mark).await?;
            } else {
                turn.rewrite_header(&self.volume, mark).await?;
            }
            self.prepared.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// A thread of the library's own panicked: the image takes no changes from now on.
    pub(crate) fn panicked(&self, who: &'static str) {
        self.panicked.store(true, Ordering::SeqCst);
        self.volume.fail(|| format!("{who} panicked"));
        self.background_error(who, &Error::Failed { reason: "it panicked".to_owned() });
    }

    /// Whether a thread of the library's own panicked.
    pub fn has_panicked(&self) -> bool {
        self.panicked.load(Ordering::SeqCst)
    }

    /// Reports a failure of work that no caller waits for.
    pub(crate) fn background_error(&self, doing: &str, error: &Error) {
        self.counters.background_errors.fetch_add(1, Ordering::Relaxed);
        self.options.logger.log(LogLevel::Error, || format!("{}: {doing} failed: {error}", self.options.id));
    }
}

/// One step from Freed to Junk.
enum Freed {
    Run(std::ops::Range<u64>),
    Shared(crate::units::HostCluster),
}
