//! What of an encrypted data file is not in use any more, and is to be given back.
//!
//! A hole reads as garbage there, not as zeroes. So nothing is punched that an entry may show:
//!
//! - Not before the entry that says zeroes is durable. Cut before the hole: the space is not given back, until its
//!   cluster is in use again and is discarded again. Cut after it, or in the middle: no entry shows what is there.
//! - Not before the requests have ended that may have looked at the entry when it showed the data.
//! - Not while somebody may be taking it into use again. Who does has the turn for its cluster, and takes it off these
//!   sets when the entry shows it; who punches takes that turn first, and looks at the sets then.

use std::ops::Range;

use super::Image;
use super::outside::PIECE;
use crate::clusters::epochs::{Epochs, Ticket};
use crate::clusters::set::ClusterSet;
use crate::device::BlockDevice;
use crate::mutation::{Mutation, broken};

/// Clusters of the data file, or subclusters where entries are extended, that no entry shows and that are to be
/// punched.
#[derive(Default)]
pub(crate) struct Vacated {
    /// Taken out of use in memory.
    unlinked: ClusterSet,
    /// The same, and a commit that has this is under way, or failed.
    committing: ClusterSet,
    /// Durably out of use; requests that began before the moment may still be at work there.
    grace: Vec<(Ticket, ClusterSet)>,
}

impl Vacated {
    pub(crate) fn is_empty(&self) -> bool {
        self.unlinked.is_empty() && self.committing.is_empty() && self.grace.is_empty()
    }

    /// A commit is about to copy the tables.
    pub(super) fn commit_begins(&mut self) {
        self.committing.add_all(&std::mem::take(&mut self.unlinked));
    }

    /// It has completed.
    pub(super) fn committed(&mut self, now: Ticket) {
        let durable = std::mem::take(&mut self.committing);
        if !durable.is_empty() {
            self.grace.push((now, durable));
        }
    }

    fn retake(&mut self, range: &Range<u64>) {
        self.unlinked.remove_range(range.clone());
        self.committing.remove_range(range.clone());
        self.grace.iter_mut().for_each(|(_, set)| set.remove_range(range.clone()));
        self.grace.retain(|(_, set)| !set.is_empty());
    }

    /// What may be punched.
    fn ready(&self, epochs: &Epochs) -> ClusterSet {
        let mut ready = ClusterSet::default();
        let early = broken(Mutation::ReuseWithoutGrace);
        let elapsed = self.grace.iter().filter(|(ticket, _)| early || epochs.elapsed(*ticket));
        elapsed.for_each(|(_, set)| ready.add_all(set));
        if broken(Mutation::PunchBeforeEntry) {
            ready.add_all(&self.committing);
        }
        ready
    }

    /// Takes out what is still to be punched of a range.
    fn take(&mut self, range: Range<u64>, epochs: &Epochs) -> Vec<Range<u64>> {
        let ready = self.ready(epochs);
        let within = ready.runs_from(range.start).take_while(|r| r.start < range.end);
        let runs: Vec<_> = within.map(|r| r.start..r.end.min(range.end)).collect();
        runs.iter().for_each(|run| self.retake(run));
        runs
    }
}

impl<D: BlockDevice> Image<D> {
    fn units(&self, range: &Range<u64>) -> Range<u64> {
        let unit = self.unit_size();
        range.start / unit..range.end.div_ceil(unit)
    }

    /// A range of the disk is not in use any more. To be called under the slice's lock, which says so.
    pub(super) fn vacate(&self, range: Range<u64>) {
        self.vacated.lock().unlinked.insert_range(self.units(&range));
    }

    /// A range of the disk is in use again. To be called under the slice's lock, with the turn for its clusters.
    pub(super) fn retake(&self, range: Range<u64>) {
        if self.encryption.is_on() {
            self.vacated.lock().retake(&self.units(&range));
        }
    }

    /// Punches what may be punched. Never waits for requests: what is in somebody's turn is left for the next time.
    pub(crate) async fn punch_vacated(&self) {
        let Some(volume) = self.data.volume() else { return };
        let (unit, cluster_size) = (self.unit_size(), self.meta.geometry.cluster_size());
        let ready = {
            let vacated = self.vacated.lock();
            if vacated.is_empty() {
                return;
            }
            vacated.ready(&self.epochs)
        };
        for run in ready.runs() {
            let mut at = run.start * unit;
            let end = run.end * unit;
            while at < end {
                let piece = at..end.min(at + PIECE);
                at = piece.end;
                let clusters = piece.start / cluster_size..piece.end.div_ceil(cluster_size);
                let Some(_turn) = self.allocating.try_take(self.turn_for(clusters)) else { continue };
                let still = self.vacated.lock().take(self.units(&piece), &self.epochs);
                for hole in still {
                    if let Err(e) = volume.punch(hole.start * unit, (hole.end - hole.start) * unit).await {
                        self.background_error("giving the space of discarded data back", &e);
                        return;
                    }
                }
            }
        }
    }
}
