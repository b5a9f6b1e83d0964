//! The recycler's life.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::{Duration, Instant, sleep_until};

use super::compact::compact;
use super::erase::erase;
use super::pacing::{Paced, Pacer};
use super::policy::{self, Rules, View, Work};
use super::punch::punch;
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::image::Image;
use crate::options::LogLevel;

/// After a failure the recycler waits this long, then twice as long, up to the maximum.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LAST: Duration = Duration::from_secs(60);
/// News of guests' work is looked at this often at most.
const NEWS_INTERVAL: Duration = Duration::from_millis(10);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Run,
    Pause,
    Stop,
}

/// The remote control of a recycler; clones control the same one. All calls return at once.
#[derive(Clone, Debug)]
pub struct Control(Arc<watch::Sender<Wanted>>);

impl Default for Control {
    fn default() -> Self {
        Control(Arc::new(watch::Sender::new(Wanted::Run)))
    }
}

impl Control {
    /// For a recycler that is to run.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets the recycler finish the step it is at, then rest. A compaction under way ends early.
    pub fn pause(&self) {
        self.0.send_if_modified(|w| {
            *w == Wanted::Run && {
                *w = Wanted::Pause;
                true
            }
        });
    }

    /// Lets a paused recycler go on.
    pub fn resume(&self) {
        self.0.send_if_modified(|w| {
            *w == Wanted::Pause && {
                *w = Wanted::Run;
                true
            }
        });
    }

    /// Lets the recycler end when it has finished the step it is at.
    pub fn stop(&self) {
        self.0.send_replace(Wanted::Stop);
    }

    /// Waits until it is paused or stopped.
    async fn interrupted(&self) {
        // The sender is here, so there is no error.
        let _ = self.0.subscribe().wait_for(|w| *w != Wanted::Run).await;
    }

    /// Whether it is neither paused nor stopped.
    #[must_use]
    pub fn is_running(&self) -> bool {
        *self.0.borrow() == Wanted::Run
    }
}

/// The recycler's life: erases, flushes, compacts and truncates as the image's options say, until it is stopped or the
/// image is closed. Errors are logged and counted, and the work is tried again later; only a failed device flush, after
/// which the image takes no changes, ends it.
///
/// Needs tokio's timers.
pub async fn run<D: BlockDevice>(image: Arc<Image<D>>, control: Control) {
    let mut worker = Worker::new(&image, &control);
    let mut wanted = control.0.subscribe();
    loop {
        let now = *wanted.borrow_and_update();
        if now == Wanted::Stop || image.is_closed() {
            return;
        }
        if now == Wanted::Pause {
            tokio::select! {
                _ = wanted.changed() => {}
                () = image.work.notified() => {}
            }
            continue;
        }
        let until = match worker.step().await {
            Step::Again => {
                // Others on this thread get their turn, however much there is to do.
                tokio::task::yield_now().await;
                continue;
            }
            Step::Ended => return,
            Step::WaitUntil(at) => Some(at),
            Step::Wait => None,
        };
        tokio::select! {
            _ = wanted.changed() => {}
            () = image.work.notified() => tokio::select! {
                // Guests make news all the time: take it in portions.
                _ = wanted.changed() => {}
                () = tokio::time::sleep(NEWS_INTERVAL) => {}
            },
            () = async { sleep_until(until.unwrap_or_else(Instant::now)).await }, if until.is_some() => {}
        }
    }
}

enum Step {
    Again,
    WaitUntil(Instant),
    Wait,
    Ended,
}

struct Worker<'a, D: BlockDevice> {
    image: &'a Image<D>,
    control: &'a Control,
    rules: Rules,
    pacer: Pacer<'a>,
    began: Instant,
    view: View,
    retry: Duration,
}

impl<'a, D: BlockDevice> Worker<'a, D> {
    fn new(image: &'a Image<D>, control: &'a Control) -> Self {
        let options = &image.options;
        Worker {
            image,
            control,
            rules: Rules {
                keep_erased: options.keep_erased,
                compact_after_unmaps: options.compact_after_unmaps,
                settle_time: options.settle_time,
                flush_after: options.flush_after,
                cluster_size: image.meta.geometry.cluster_size(),
            },
            pacer: Pacer::new(options.rate_limit, &image.epochs),
            began: Instant::now(),
            view: View::default(),
            retry: RETRY_FIRST,
        }
    }

    /// Does the next piece of work.
    async fn step(&mut self) -> Step {
        self.look();
        let work = policy::next(&self.view, &self.rules);
        match work {
            Work::Wait => return Step::Wait,
            // Or for so long that there is no such time.
            Work::WaitUntil(at) => return self.began.checked_add(at).map_or(Step::Wait, Step::WaitUntil),
            _ => {}
        }
        match self.perform(work).await {
            Ok(()) => self.retry = RETRY_FIRST,
            // Not a failure: somebody paused, stopped or closed.
            Err(Error::Cancelled | Error::Closed) => {}
            Err(e) => {
                self.image.background_error("the recycler's work", &e);
                if matches!(e, Error::Failed { .. } | Error::ReadOnly) || self.image.volume.ensure_sound().is_err() {
                    let id = &self.image.options.id;
                    self.image.logger().log(LogLevel::Error, || format!("{id}: the recycler has ended: {e}"));
                    return Step::Ended;
                }
                self.view.not_before = self.began.elapsed() + self.retry;
                self.retry = (self.retry * 2).min(RETRY_LAST);
            }
        }
        Step::Again
    }

    /// Looks at the image.
    fn look(&mut self) {
        let image = self.image;
        let dirty = image.meta.l2.is_dirty() || !image.vacated.lock().is_empty();
        let states = image.clusters.lock();
        let bits = image.meta.geometry.cluster_bits;
        let now = self.began.elapsed();
        let junk = states.junk.len() << bits;
        let view = &mut self.view;
        // It becomes less as guests take from the pool: that is no reason to wait.
        if junk > view.junk {
            view.junk_stands_since = now;
        }
        view.junk_waits_since = if self.rules.is_much(junk) { view.junk_waits_since.or(Some(now)) } else { None };
        view.now = now;
        view.junk_is_complete = states.junk_is_complete;
        view.junk = junk;
        view.erased = states.erased.len() << bits;
        view.available = states.available.len() << bits;
        let punch = image.options.punch_junk && image.volume.can_punch();
        view.occupied = if punch { states.occupied.intersection(&states.junk).len() << bits } else { 0 };
        view.free_tail = (states.end - states.last_needed()) << bits;
        let waiting =
            dirty || !states.erased.is_empty() || states.freed_len() > 0 || !states.unlinked.shared.is_empty();
        view.unflushed_since = if waiting { view.unflushed_since.or(Some(now)) } else { None };
    }

    /// Waits until the rate lets work begin, and says how much of so many bytes to do: not more than a second's, since others may
    /// be waiting for the recycler's turn then.
    async fn a_second(&mut self, bytes: u64) -> Result<u64> {
        tokio::select! {
            () = self.pacer.due() => Ok(self.pacer.a_second(bytes).max(self.rules.cluster_size)),
            () = self.control.interrupted() => Err(Error::Cancelled),
        }
    }

    async fn perform(&mut self, work: Work) -> Result<()> {
        let image = self.image;
        match work {
            Work::FindJunk => {
                let _turn = image.recycler_turn().await?;
                let control = self.control;
                let is_wanted = &mut || control.is_running();
                image.find_junk(&mut Paced { image, pacer: &mut self.pacer, is_wanted }).await
            }
            Work::Erase(bytes) => {
                let bytes = self.a_second(bytes).await?;
                if erase(image, bytes, &mut self.pacer).await? == 0 {
                    self.view.junk_unerasable = self.view.junk;
                }
                Ok(())
            }
            Work::Flush => {
                image.ensure_writable()?;
                image.commit().await?;
                image.epochs.grace().await;
                image.reap().await;
                image.punch_vacated().await;
                self.view.unflushed_since = None;
                Ok(())
            }
            Work::Compact => {
                let before = image.file_size();
                let control = self.control;
                self.view.junk_waits_since = None;
                let report = compact(image, &mut |_| control.is_running()).await?;
                if report.file_size_after >= before {
                    self.look();
                    self.view.junk_useless = self.view.junk;
                }
                Ok(())
            }
            Work::Shorten => {
                let _turn = image.recycler_turn().await?;
                image.shorten().await
            }
            Work::Punch(bytes) => {
                let bytes = self.a_second(bytes).await?;
                punch(image, bytes, &mut self.pacer).await
            }
            Work::Wait | Work::WaitUntil(_) => Ok(()),
        }
    }
}

/// Hypervisors spawn these on runtimes with several threads.
#[cfg(test)]
#[allow(dead_code)]
fn futures_are_send(image: &Image<crate::device::host::HostFile>, shared: Arc<Image<crate::device::host::HostFile>>) {
    fn send<T: Send>(_: T) {}
    send(run(shared, Control::new()));
    send(compact(image, &mut |_| true));
    send(image.read(0, crate::buf::IoBufMut::new(&mut [])));
    send(image.write(0, crate::buf::IoBuf::new(&[])));
    send(image.discard(0, 0));
    send(image.flush());
    send(image.resize(0, true));
    send(image.check());
    send(image.close());
}
