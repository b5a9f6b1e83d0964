//! Pacing: background work gives way to guests, and is held to a rate.

use tokio::time::{Duration, Instant};

use crate::clusters::epochs::Epochs;
use crate::clusters::scan::Manners;
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::image::Image;

/// After so many bytes the pacer looks whether guests are at work.
const SLICE: u64 = 256 << 10;
/// While they are, it rests this many times as long as the slice took, within these bounds.
const REST: u32 = 31;
const REST_LEAST: Duration = Duration::from_millis(1);
const REST_MOST: Duration = Duration::from_millis(100);

/// Lets work pass in slices: at full speed while guests do nothing, about a thirtieth of the time while they do (less time
/// than they take from one another), and never more than so many bytes a second.
///
/// It is asked, and sets no timer, only while there is work.
pub(crate) struct Pacer<'a> {
    guests: &'a Epochs,
    /// Requests that guests had made when it last looked.
    seen: u64,
    busy: bool,
    /// Bytes that passed since, and since when.
    passed: u64,
    began: Instant,
    /// Rests are put off, and how long they would have been.
    exposed: bool,
    owed: Duration,
    limit: Option<u64>,
    next: Instant,
}

impl<'a> Pacer<'a> {
    /// `limit` in bytes per second; `None`: no limit.
    pub(crate) fn new(limit: Option<u64>, guests: &'a Epochs) -> Self {
        let now = Instant::now();
        let limit = limit.filter(|&l| l > 0);
        let seen = guests.requests();
        let owed = Duration::ZERO;
        Pacer { guests, seen, busy: false, passed: 0, began: now, exposed: false, owed, limit, next: now }
    }

    /// The most work that should be under way at once, of `most` bytes: little while guests are at work, since they may have
    /// to wait for its flush, and not more than a second's at the limited rate.
    pub(crate) fn portion(&mut self, most: u64) -> u64 {
        self.busy |= self.guests.requests() != self.seen;
        self.a_second(if self.busy { most / 32 } else { most })
    }

    /// Not more than a second's work at the limited rate.
    pub(crate) fn a_second(&self, most: u64) -> u64 {
        self.limit.map_or(most, |l| most.min(l))
    }

    /// Waits until the limited rate lets the next work begin.
    pub(crate) async fn due(&self) {
        if self.limit.is_some() {
            tokio::time::sleep_until(self.next).await;
        }
    }

    /// Whether guests were at work when it last looked.
    pub(crate) fn is_busy(&self) -> bool {
        self.busy
    }

    /// The most that should be copied in one call, of `most` bytes: guests' writes may have to wait for it.
    pub(crate) fn piece(&self, most: u64) -> u64 {
        if self.busy { most.min(SLICE) } else { most }
    }

    /// Gives way if there was much. What only looks is not held to the rate.
    async fn look(&mut self, bytes: u64) {
        if self.passed >= SLICE {
            self.give_way().await;
        }
        self.passed += bytes;
    }

    /// Waits until work on `bytes` bytes may begin.
    pub(crate) async fn spend(&mut self, bytes: u64) {
        self.look(bytes).await;
        let Some(limit) = self.limit else { return };
        let now = Instant::now();
        if self.next > now {
            tokio::time::sleep_until(self.next).await;
        }
        // Time not used is not saved up: that would allow a burst.
        self.next = self.next.max(now) + Duration::from_secs_f64(bytes as f64 / limit as f64);
    }

    /// From now on a guest's write cancels work under way, so rests are put off: the sooner it ends the less is in vain.
    pub(crate) fn expose(&mut self) {
        self.exposed = true;
    }

    /// No more: rests as long as was put off.
    pub(crate) async fn repay(&mut self) {
        self.exposed = false;
        let owed = std::mem::take(&mut self.owed);
        if !owed.is_zero() {
            tokio::time::sleep(owed).await;
            self.began = Instant::now();
        }
    }

    async fn give_way(&mut self) {
        // Since the last look, rest included: a guest that waits for its disk makes few requests.
        let requests = self.guests.requests();
        self.busy = requests != self.seen;
        self.seen = requests;
        let rest = (self.began.elapsed() * REST).clamp(REST_LEAST, REST_MOST);
        if self.busy && self.exposed && self.owed < REST_MOST {
            // Not for long: guests that wait for the device meanwhile wait for no more than a few copies.
            self.owed += rest;
            tokio::task::yield_now().await;
        } else if self.busy {
            tokio::time::sleep(rest).await;
        } else {
            // Still a chance for other tasks on this thread.
            tokio::task::yield_now().await;
        }
        self.passed = 0;
        self.began = Instant::now();
    }
}

/// How the recycler searches: as slowly as its other work while guests are at work, unless somebody waits for the turn that it has,
/// and no longer than it is wanted.
pub(crate) struct Paced<'p, 'a, D: BlockDevice> {
    pub(crate) image: &'a Image<D>,
    pub(crate) pacer: &'p mut Pacer<'a>,
    pub(crate) is_wanted: &'p mut (dyn FnMut() -> bool + Send),
}

impl<D: BlockDevice> Manners for Paced<'_, '_, D> {
    async fn looked_at(&mut self, bytes: u64) -> Result<()> {
        if !(self.is_wanted)() {
            return Err(Error::Cancelled);
        }
        if self.image.is_closed() {
            return Err(Error::Closed);
        }
        if self.image.compaction.is_wanted() {
            tokio::task::yield_now().await;
        } else {
            self.pacer.look(bytes).await;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clusters::epochs::Counter;

    #[tokio::test(start_paused = true)]
    async fn the_rate_is_kept_without_bursts() {
        let epochs = Epochs::default();
        let start = Instant::now();
        let mut pacer = Pacer::new(Some(1000), &epochs);
        for _ in 0..5 {
            pacer.spend(500).await;
        }
        assert_eq!(start.elapsed().as_millis(), 2000);
        tokio::time::sleep(Duration::from_secs(100)).await;
        let idle = Instant::now();
        pacer.spend(500).await;
        pacer.spend(500).await;
        assert_eq!(idle.elapsed().as_millis(), 500);
        assert_eq!(pacer.portion(64 << 20), 1000);
    }

    #[tokio::test(start_paused = true)]
    async fn rests_are_put_off_while_work_can_be_cancelled() {
        let epochs = Epochs::default();
        let mut pacer = Pacer::new(None, &epochs);
        pacer.expose();
        let start = Instant::now();
        for _ in 0..3 {
            epochs.enter().count(Counter::Writes, 1);
            pacer.spend(SLICE).await;
            tokio::time::advance(Duration::from_millis(2)).await;
        }
        assert_eq!(start.elapsed().as_millis(), 6);
        pacer.repay().await;
        assert_eq!(start.elapsed().as_millis(), 6 + 2 * 2 * u128::from(REST));
    }

    /// What passes 100 slices that take 2 ms each: how long it rests.
    async fn rest(guests: impl Fn(&Epochs)) -> Duration {
        let epochs = Epochs::default();
        let mut pacer = Pacer::new(None, &epochs);
        let start = Instant::now();
        for _ in 0..100 {
            pacer.spend(SLICE).await;
            guests(&epochs);
            tokio::time::advance(Duration::from_millis(2)).await;
        }
        start.elapsed() - Duration::from_millis(200)
    }

    #[tokio::test(start_paused = true)]
    async fn it_rests_while_guests_are_at_work_and_only_then() {
        assert_eq!(rest(|_| ()).await, Duration::ZERO);
        // (Nothing passed yet before the first slice.)
        let busy = rest(|epochs| epochs.enter().count(Counter::Writes, 1)).await;
        assert!((99 * 62..=100 * 64).contains(&(busy.as_millis() as u64)), "{busy:?}");
    }
}
