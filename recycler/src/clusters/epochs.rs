//! Requests in flight, counted in two alternating epochs, so that the recycler can await the end of every request that
//! began before now (a grace period) while requests never wait for it.
//!
//! A request enters the current epoch and leaves it when it ends. The epoch may advance from `e` to `e + 1` only when
//! nobody is left in epoch `e - 1`; the counters of `e - 1` are then used for `e + 1`. So when the epoch has advanced
//! twice, every request that began before has ended.
//!
//! The counters are spread over slots, so that threads do not write one another's cache lines; a request enters and
//! leaves in one slot. All but the last belong to one thread each, but a request may end on another thread than it began on.
//! The same slots count the guest's requests for the statistics.

use tokio::time::{Duration, Instant};

use super::stragglers::Stragglers;
use crate::mutation::{Mutation, broken};
use crate::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use crate::sync::{Mutex, Notify, thread_place};

/// One where a model checker looks at each.
const SLOTS: usize = if cfg!(all(test, feature = "models")) { 1 } else { 16 };
/// Stragglers are looked at this often while a grace period is awaited.
const STRAGGLERS: Duration = Duration::from_micros(500);

/// What one slot counts. Aligned so that two slots never share a cache line (or an adjacent pair of them).
#[repr(align(128))]
#[derive(Default)]
struct Slot {
    inside: [AtomicU32; 2],
    counts: [AtomicU64; Counter::ALL],
    /// The same, changed only by the thread that the slot belongs to.
    own: [AtomicU64; Counter::ALL],
}

/// What guests did, counted per slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub(crate) enum Counter {
    Reads,
    ReadBytes,
    Writes,
    WriteBytes,
    Discards,
    DiscardBytes,
}

impl Counter {
    const ALL: usize = 6;
}

/// The epochs of one image.
#[derive(Default)]
pub(crate) struct Epochs {
    epoch: AtomicU64,
    slots: [Slot; SLOTS],
    /// Whether somebody awaits a grace period; then leaving wakes them up.
    awaited: AtomicBool,
    /// Requests that leave only when somebody looks at them.
    pub(crate) stragglers: Stragglers,
    left: Notify,
    /// Requests that had been made when somebody looked last, and since when it has been so many, as far as is known.
    heard: Mutex<Option<(u64, Instant)>>,
}

/// A request in flight; it ends when this is dropped.
pub(crate) struct InFlight<'a> {
    epochs: &'a Epochs,
    slot: &'a Slot,
    side: usize,
}

/// A request in flight whose guard was taken apart, to be kept where no reference can be: see [`InFlight::detach`].
#[derive(Debug)]
#[must_use = "a request that is never attached again never ends, and no grace period either"]
pub(crate) struct Detached {
    slot: u8,
    side: u8,
}

/// A moment: passed to [`Epochs::elapsed`], tells whether every request that began before it has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Ticket(u64);

impl Epochs {
    #[inline]
    fn slot(&self) -> &Slot {
        &self.slots[thread_place(SLOTS)]
    }

    /// A request begins.
    #[inline]
    pub(crate) fn enter(&self) -> InFlight<'_> {
        let slot = self.slot();
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            let side = (epoch & 1) as usize;
            slot.inside[side].fetch_add(1, Ordering::SeqCst);
            // If the epoch advanced in between, the count may have come too late to be seen: count again, there.
            if self.epoch.load(Ordering::SeqCst) == epoch || broken(Mutation::EnterUnchecked) {
                return InFlight { epochs: self, slot, side };
            }
            self.leave(slot, side);
        }
    }

    /// The guard of a request that was [detached](InFlight::detach) from these epochs.
    #[cfg_attr(feature = "models", allow(clippy::modulo_one, reason = "one slot is enough there"))]
    pub(crate) fn attach(&self, detached: Detached) -> InFlight<'_> {
        // Both are what `detach` made of a guard, so the remainder changes nothing.
        InFlight {
            epochs: self,
            slot: &self.slots[usize::from(detached.slot) % SLOTS],
            side: usize::from(detached.side & 1),
        }
    }

    #[inline]
    fn leave(&self, slot: &Slot, side: usize) {
        slot.inside[side].fetch_sub(1, Ordering::SeqCst);
        if self.awaited.load(Ordering::SeqCst) && !broken(Mutation::LeaveUnnoticed) {
            self.left.notify_waiters();
        }
    }

    /// This moment.
    pub(crate) fn now(&self) -> Ticket {
        Ticket(self.epoch.load(Ordering::SeqCst))
    }

    /// Whether every request that began before the ticket has ended. Never waits.
    pub(crate) fn elapsed(&self, ticket: Ticket) -> bool {
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            if epoch >= ticket.0 + 2 {
                return true;
            }
            // Advancing re-uses the side that epoch - 1 counted in: everybody must have left it. Once the epoch is not
            // that one any more, a slot seen empty stays so (but for an entry that is about to count again).
            let other = ((epoch + 1) & 1) as usize;
            if self.slots.iter().any(|s| s.inside[other].load(Ordering::SeqCst) != 0) {
                return false;
            }
            let _ = self.epoch.compare_exchange(epoch, epoch + 1, Ordering::SeqCst, Ordering::SeqCst);
        }
    }

    /// Waits until every request that began before this call has ended. Only the recycler and `close` wait.
    pub(crate) async fn grace(&self) {
        let ticket = self.now();
        loop {
            let left = self.left.notified();
            tokio::pin!(left);
            left.as_mut().enable();
            self.awaited.store(true, Ordering::SeqCst);
            if self.elapsed(ticket) {
                // Another waiter may still be waiting: it sets the mark again at its next turn, which this wakes it for.
                self.awaited.store(false, Ordering::SeqCst);
                self.left.notify_waiters();
                return;
            }
            if self.stragglers.poke() {
                // Transfers, which end soon. This thread is one of the recycler's, or of somebody who closes or resizes.
                std::thread::sleep(STRAGGLERS);
            } else {
                left.await;
            }
        }
    }

    /// Requests that guests have made, of whatever kind: only good for being compared.
    pub(crate) fn requests(&self) -> u64 {
        [Counter::Reads, Counter::Writes, Counter::Discards].into_iter().map(|c| self.total(c)).sum()
    }

    /// For how long guests have been quiet, as far as can be told from the last look: for no time if a request is in flight, or
    /// ended since then.
    pub(crate) fn quiet(&self) -> Duration {
        let is_inside = |s: &Slot| s.inside.iter().any(|count| count.load(Ordering::Relaxed) != 0);
        let mut heard = self.heard.lock();
        let (requests, now) = (self.requests(), Instant::now());
        match *heard {
            Some((seen, since)) if seen == requests && !self.slots.iter().any(is_inside) => now - since,
            _ => {
                *heard = Some((requests, now));
                Duration::ZERO
            }
        }
    }

    /// Sum of a counter over all slots.
    pub(crate) fn total(&self, counter: Counter) -> u64 {
        let counted = |s: &Slot| [&s.counts, &s.own].map(|counts| counts[counter as usize].load(Ordering::Relaxed));
        self.slots.iter().flat_map(counted).sum()
    }
}

impl InFlight<'_> {
    /// Takes the guard apart without ending the request, for one that is submitted here and completed elsewhere, on any
    /// thread. [`Epochs::attach`] on the same epochs makes the guard again, which must happen.
    pub(crate) fn detach(self) -> Detached {
        let slot = self.epochs.slots.iter().position(|s| std::ptr::eq(s, self.slot)).unwrap_or_default();
        let detached = Detached { slot: slot as u8, side: self.side as u8 };
        std::mem::forget(self);
        detached
    }

    /// Counts something for the statistics.
    #[inline]
    pub(crate) fn count(&self, counter: Counter, amount: u64) {
        self.slot.counts[counter as usize].fetch_add(amount, Ordering::Relaxed);
    }

    /// The same for a request and its bytes, on the thread that the request began on.
    #[inline]
    pub(crate) fn count_here(&self, (requests, bytes): (Counter, Counter), length: u64) {
        if std::ptr::eq(self.slot, &raw const self.epochs.slots[SLOTS - 1]) {
            self.count(requests, 1);
            return self.count(bytes, length);
        }
        // Nobody else writes them, so no locked instruction is needed.
        for (counter, amount) in [(requests, 1), (bytes, length)] {
            let own = &self.slot.own[counter as usize];
            own.store(own.load(Ordering::Relaxed) + amount, Ordering::Relaxed);
        }
    }
}

impl Drop for InFlight<'_> {
    #[inline]
    fn drop(&mut self) {
        self.epochs.leave(self.slot, self.side);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_grace_period_ends_with_the_last_earlier_request() {
        let epochs = Epochs::default();
        let a = epochs.enter();
        let ticket = epochs.now();
        assert!(!epochs.elapsed(ticket));
        // The failed look has advanced the epoch once, so a later request no longer counts against the ticket.
        let later = epochs.enter();
        drop(a);
        assert!(epochs.elapsed(ticket));
        drop(later);
        let c = epochs.enter();
        assert!(epochs.elapsed(ticket));
        assert!(!epochs.elapsed(epochs.now()));
        drop(c);
    }

    #[test]
    fn a_detached_request_is_in_flight_until_it_is_attached_and_dropped() {
        let epochs = Epochs::default();
        let ticket = epochs.now();
        let detached = epochs.enter().detach();
        assert!(!epochs.elapsed(ticket) && !epochs.elapsed(ticket));
        std::thread::scope(|s| s.spawn(|| drop(epochs.attach(detached))).join().unwrap());
        assert!(epochs.elapsed(ticket));
    }

    #[tokio::test(start_paused = true)]
    async fn guests_are_quiet_since_the_last_request_ended() {
        let epochs = Epochs::default();
        let pass = || tokio::time::advance(Duration::from_secs(1));
        assert_eq!(epochs.quiet(), Duration::ZERO);
        pass().await;
        assert_eq!(epochs.quiet(), Duration::from_secs(1));
        let inside = epochs.enter();
        assert_eq!(epochs.quiet(), Duration::ZERO);
        pass().await;
        assert_eq!(epochs.quiet(), Duration::ZERO);
        inside.count_here((Counter::Reads, Counter::ReadBytes), 512);
        drop(inside);
        pass().await;
        assert_eq!(epochs.quiet(), Duration::ZERO);
        pass().await;
        assert_eq!(epochs.quiet(), Duration::from_secs(1));
    }

    /// Threads that come and go, more than have a slot to themselves.
    #[test]
    fn every_thread_counts() {
        let requests = if cfg!(miri) { 20 } else { 1000 };
        let epochs = Epochs::default();
        for _ in 0..3 {
            std::thread::scope(|scope| {
                for _ in 0..2 * SLOTS {
                    scope.spawn(|| {
                        (0..requests)
                            .for_each(|_| epochs.enter().count_here((Counter::Reads, Counter::ReadBytes), 512));
                    });
                }
            });
        }
        assert_eq!(epochs.total(Counter::Reads), 3 * 2 * SLOTS as u64 * requests);
        assert_eq!(epochs.total(Counter::ReadBytes), 3 * 2 * SLOTS as u64 * requests * 512);
    }

    #[tokio::test]
    async fn waiting_is_woken_by_the_last_leaver() {
        let epochs = Arc::new(Epochs::default());
        let inside = epochs.enter();
        let waiting = tokio::spawn({
            let epochs = epochs.clone();
            async move { epochs.grace().await }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(inside);
        waiting.await.unwrap();
    }
}
