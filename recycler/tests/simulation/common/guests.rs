//! Guests: they carry out the requests of a history against an image, keep the model up to date and read back what they
//! wrote.

use std::fmt;
use std::ops::{AddAssign, Range};
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use parking_lot::Mutex;
use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::recycler::{compact, compress};
use qcow_recycler::{BlockDevice, Error, Image, Stats};
use tokio::sync::Notify;

use super::config::Config;
use super::content::{self, Content, SECTOR};
use super::history::Op;
use super::model::{Model, Request};
use super::verify::{self, Tolerance};

/// Polls a future so many times at most; then it is dropped, and there is no result.
async fn at_most<F: Future>(polls: u32, future: F) -> Option<F::Output> {
    let (mut future, mut left) = (std::pin::pin!(future), polls);
    std::future::poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        match future.as_mut().poll(context) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending if left == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// Why a history failed.
#[derive(Debug)]
pub struct Failure {
    pub message: String,
    /// What was going on, oldest first.
    pub trace: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let skip = self.trace.len().saturating_sub(60);
        for line in &self.trace[skip..] {
            writeln!(f, "    {line}")?;
        }
        write!(f, "{}", self.message)
    }
}

/// Who lets time pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// Tokio, in a task.
    Tokio,
    /// The operating system, in a thread; milliseconds are shortened to microseconds.
    Threads,
}

/// What is expected of requests that fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Errors {
    /// None may.
    None,
    /// They may fail as the device does; the errors are collected.
    Collected,
}

/// What the recycler did, to tell a test that proves something from one in which nothing happened. In bytes, or times.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    pub moved: u64,
    pub cancelled: u64,
    pub erased: u64,
    pub truncated: u64,
    /// Images used on a device of fixed length.
    pub fixed: u64,
}

impl AddAssign for Work {
    fn add_assign(&mut self, other: Work) {
        self.moved += other.moved;
        self.cancelled += other.cancelled;
        self.erased += other.erased;
        self.truncated += other.truncated;
        self.fixed += other.fixed;
    }
}

impl fmt::Display for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Work { moved, cancelled, erased, truncated, fixed } = self;
        write!(
            f,
            "{moved} bytes moved, {cancelled} moves cancelled, {erased} bytes erased, {truncated} cut off, {fixed} images of fixed length"
        )
    }
}

/// What guests and observers share.
pub struct Shared {
    pub config: Config,
    pub model: Mutex<Model>,
    pub errors: Mutex<Vec<(String, Error)>>,
    /// Called when a guest's flush or resize has completed and the model knows.
    pub after_flush: Mutex<Option<Arc<dyn Fn() + Send + Sync>>>,
    /// What the recycler did in images that are closed again.
    pub work: Mutex<Work>,
    pub policy: Errors,
    clock: Clock,
    trace: Mutex<Vec<String>>,
    busy: Mutex<Vec<Range<u64>>>,
    /// One at a time makes or deletes snapshots; how many were made.
    snapshots: tokio::sync::Mutex<u32>,
    freed: Notify,
}

/// Keeps other guests off some sectors.
struct Exclusive<'a> {
    shared: &'a Shared,
    range: Range<u64>,
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        let mut busy = self.shared.busy.lock();
        if let Some(at) = busy.iter().position(|r| *r == self.range) {
            busy.swap_remove(at);
        }
        drop(busy);
        self.shared.freed.notify_waiters();
    }
}

impl Shared {
    /// A new disk that holds zeroes.
    pub fn new(config: Config, clock: Clock, policy: Errors) -> Arc<Shared> {
        Arc::new(Shared {
            config,
            model: Mutex::new(Model::over(config.image.backing, config.image.sectors)),
            errors: Mutex::default(),
            after_flush: Mutex::default(),
            work: Mutex::default(),
            policy,
            clock,
            trace: Mutex::default(),
            busy: Mutex::default(),
            snapshots: tokio::sync::Mutex::default(),
            freed: Notify::new(),
        })
    }

    /// Counts what the recycler did in an image that is about to be dropped.
    pub fn count(&self, stats: &Stats) {
        *self.work.lock() += Work {
            moved: stats.moved_bytes,
            cancelled: stats.moves_cancelled,
            erased: stats.erased_bytes,
            truncated: stats.truncated_bytes,
            fixed: u64::from(!self.config.features.resize),
        };
    }

    /// Notes what goes on, for reports.
    pub fn note(&self, text: impl Into<String>) {
        self.trace.lock().push(text.into());
    }

    /// A failure with what led to it.
    pub fn failure(&self, message: impl Into<String>) -> Failure {
        Failure { message: message.into(), trace: self.trace.lock().clone() }
    }

    /// Waits until no other guest changes the range; not at all if guests may get in one another's way.
    async fn exclude(&self, range: Range<u64>) -> Option<Exclusive<'_>> {
        if self.config.overlap {
            return None;
        }
        loop {
            let freed = self.freed.notified();
            let mut freed = std::pin::pin!(freed);
            // Registered before looking, so that no wake-up is missed.
            freed.as_mut().enable();
            {
                let mut busy = self.busy.lock();
                if !busy.iter().any(|r| r.start < range.end && range.start < r.end) {
                    busy.push(range.clone());
                    return Some(Exclusive { shared: self, range });
                }
            }
            freed.await;
        }
    }

    async fn sleep(&self, millis: u64) {
        match self.clock {
            Clock::Tokio => tokio::time::sleep(Duration::from_millis(millis)).await,
            Clock::Threads => std::thread::sleep(Duration::from_micros(millis)),
        }
    }

    /// Collects an error, or makes it the failure of the history.
    fn failed(&self, what: &str, error: Error) -> Result<(), Failure> {
        self.note(format!("{what}: failed: {error}"));
        if self.policy == Errors::None {
            return Err(self.failure(format!("{what}: {error}")));
        }
        self.errors.lock().push((what.to_owned(), error));
        Ok(())
    }

    /// Carries out one guest's requests.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub async fn guest<D: BlockDevice>(&self, name: &str, image: &Image<D>, ops: &[Op]) -> Result<(), Failure> {
        let mut polls = u32::MAX;
        for op in ops {
            match *op {
                Op::DropNext(n) => polls = n,
                op => {
                    self.step(name, image, op, polls).await?;
                    polls = u32::MAX;
                }
            }
        }
        Ok(())
    }

    /// One request, dropped if it has not ended after `polls` polls.
    async fn step<D: BlockDevice>(&self, name: &str, image: &Image<D>, op: Op, polls: u32) -> Result<(), Failure> {
        let what = format!("{name} {op:?}");
        let size = self.model.lock().size();
        let cut = |first: u64, count: u64| first..(first + count).min(size).max(first);
        if op.range().is_some_and(|(first, count)| cut(first, count).is_empty()) {
            return Ok(());
        }
        match op {
            Op::DropNext(_) => {}
            Op::Sleep(millis) => self.sleep(millis).await,
            Op::Flush => {
                let began = self.model.lock().flush_begins();
                match at_most(polls, image.flush()).await {
                    Some(Ok(())) => self.flushed(began),
                    Some(Err(e)) => self.failed(&what, e)?,
                    None => self.note("the next one is dropped"),
                }
                self.note(what);
            }
            Op::Compact => match at_most(polls, compact(image, &mut |_| true)).await {
                Some(Ok(report)) => self.note(format!("{what}: {report:?}")),
                Some(Err(e)) => self.failed(&what, e)?,
                None => self.note(format!("{what} is dropped")),
            },
            Op::Compress => match at_most(polls, compress(image, &mut |_| true)).await {
                // With refcounts of one bit nothing is compressed.
                Some(Err(Error::Unsupported { .. })) => {}
                Some(Ok(report)) => self.note(format!("{what}: {report:?}")),
                Some(Err(e)) => self.failed(&what, e)?,
                None => self.note(format!("{what} is dropped")),
            },
            Op::CompactPart(calls) => {
                let mut left = calls;
                let mut progress = |_| {
                    left = left.saturating_sub(1);
                    left > 0
                };
                match at_most(polls, compact(image, &mut progress)).await {
                    Some(Ok(_) | Err(Error::Cancelled)) => self.note(what),
                    Some(Err(e)) => self.failed(&what, e)?,
                    None => self.note(format!("{what} is dropped")),
                }
            }
            Op::Snapshot => self.take_snapshot(&what, image, polls).await?,
            Op::Forget(number) => self.forget_snapshot(&what, image, number, polls).await?,
            Op::Read { first, count } => {
                // Alongside whatever else is going on there.
                self.read_back(&what, image, cut(first, count)).await?;
            }
            Op::Write { first, count } | Op::Pack { first, count } => {
                let packed = matches!(op, Op::Pack { .. });
                let range = if packed {
                    let cluster = self.config.image.cluster_sectors();
                    let start = first / cluster * cluster;
                    cut(start, (first + count).next_multiple_of(cluster) - start)
                } else {
                    cut(first, count)
                };
                let _guard = self.exclude(range.clone()).await;
                let length = range.end - range.start;
                let (request, version) = {
                    let mut model = self.model.lock();
                    let version = model.next_version();
                    (model.begin(range.start, length, |sector, _| vec![Content::Data { sector, version }]), version)
                };
                self.note(format!("{what} as {version} begins"));
                let data = content::data(range.start, length, version);
                let (at, buf) = (range.start * SECTOR as u64, IoBuf::new(&data));
                let result = if packed {
                    at_most(polls, image.write_compressed(at, buf)).await
                } else {
                    at_most(polls, image.write(at, buf)).await
                };
                self.finish(&what, image, request, range, result).await?;
            }
            Op::Discard { first, count } => {
                let range = cut(first, count);
                let _guard = self.exclude(range.clone()).await;
                let length = range.end - range.start;
                if self.config.image.version < 3 && self.config.image.backing.exists() {
                    // What is behind it would show.
                    let result = image.discard(range.start * SECTOR as u64, length * SECTOR as u64).await;
                    return match result {
                        Err(Error::Unsupported { .. }) => self.read_back(&what, image, range).await,
                        other => Err(self.failure(format!("{what}: {other:?}, and should be refused"))),
                    };
                }
                let request = self.model.lock().begin(range.start, length, |_, _| vec![Content::Zero]);
                self.note(format!("{what} begins"));
                let result = at_most(polls, image.discard(range.start * SECTOR as u64, length * SECTOR as u64)).await;
                self.finish(&what, image, request, range, result).await?;
            }
            Op::WriteZeroes { first, count, may_unmap } => {
                let range = cut(first, count);
                let _guard = self.exclude(range.clone()).await;
                let length = range.end - range.start;
                let request = self.model.lock().begin(range.start, length, |_, _| vec![Content::Zero]);
                self.note(format!("{what} begins"));
                let (offset, bytes) = (range.start * SECTOR as u64, length * SECTOR as u64);
                let result = at_most(polls, image.write_zeroes(offset, bytes, may_unmap)).await;
                self.finish(&what, image, request, range, result).await?;
            }
        }
        Ok(())
    }

    /// A flush that began at `began` has completed.
    pub fn flushed(&self, began: u64) {
        self.model.lock().flushed(began);
        self.tightened();
    }

    fn tightened(&self) {
        let hook = self.after_flush.lock().clone();
        if let Some(hook) = hook {
            hook();
        }
    }

    async fn finish<D: BlockDevice>(
        &self,
        what: &str,
        image: &Image<D>,
        request: Request,
        range: Range<u64>,
        result: Option<Result<(), Error>>,
    ) -> Result<(), Failure> {
        self.note(format!("{what} ends{}", if result.is_none() { ": dropped" } else { "" }));
        match result {
            None => {
                self.model.lock().fail(request);
                self.read_back(what, image, range).await
            }
            Some(Ok(())) => {
                self.model.lock().end(request);
                self.read_back(what, image, range).await
            }
            Some(Err(e)) => {
                self.model.lock().fail(request);
                self.failed(what, e)
            }
        }
    }

    async fn read_back<D: BlockDevice>(&self, what: &str, image: &Image<D>, range: Range<u64>) -> Result<(), Failure> {
        let mut bytes = vec![0xaa; (range.end - range.start) as usize * SECTOR];
        let read = self.model.lock().read_begins(range.start, range.end - range.start);
        let result = image.read(range.start * SECTOR as u64, IoBufMut::new(&mut bytes)).await;
        let mut model = self.model.lock();
        let compared = model.read_ends(read, result.is_ok().then_some(&bytes));
        match (result, compared) {
            (Ok(()), Ok(())) => Ok(()),
            (Ok(()), Err(m)) => Err(self.failure(format!("read back after {what}: {m}; {}", model.explain(m.sector)))),
            (Err(e), _) => self.failed(&format!("read back after {what}"), e),
        }
    }

    async fn take_snapshot<D: BlockDevice>(&self, what: &str, image: &Image<D>, polls: u32) -> Result<(), Failure> {
        let mut number = self.snapshots.lock().await;
        *number += 1;
        let name = format!("number {number}");
        self.model.lock().snapshot_comes(&name);
        self.note(format!("{what} as {name:?} begins"));
        let result = at_most(polls, image.create_snapshot(&name)).await;
        self.snapshot_settled(what, image, &name, result.map(|r| r.map(|_| ())))
    }

    async fn forget_snapshot<D: BlockDevice>(
        &self,
        what: &str,
        image: &Image<D>,
        number: usize,
        polls: u32,
    ) -> Result<(), Failure> {
        let _one_at_a_time = self.snapshots.lock().await;
        let Some(name) = self.choose(number) else { return Ok(()) };
        self.model.lock().taken.goes(&name);
        self.note(format!("{what}, of {name:?}, begins"));
        let result = at_most(polls, image.delete_snapshot(&name)).await;
        self.snapshot_settled(what, image, &name, result)
    }

    fn choose(&self, number: usize) -> Option<String> {
        let names = self.model.lock().taken.names();
        names.get(number % names.len().max(1)).cloned()
    }

    /// A snapshot was made or deleted, or not.
    fn snapshot_settled<D: BlockDevice>(
        &self,
        what: &str,
        image: &Image<D>,
        name: &str,
        result: Option<Result<(), Error>>,
    ) -> Result<(), Failure> {
        let listed = image.snapshots().is_ok_and(|all| all.iter().any(|s| s.name == name));
        // A handle that takes no changes any more may have been left in the middle.
        let there = image.ensure_writable().is_ok().then_some(listed);
        self.model.lock().taken.settled(name, there);
        self.note(format!("{what} ends: {there:?}"));
        match result {
            Some(Ok(())) => {
                self.model.lock().tightened += 1;
                self.tightened();
                Ok(())
            }
            None => Ok(()),
            // With few bits for a count there may be no room for another reference.
            Some(Err(Error::Unsupported { .. })) if self.config.image.refcount_bits < 4 => Ok(()),
            Some(Err(e)) => self.failed(what, e),
        }
    }

    /// Goes back to a snapshot, with no guest at work; durable when done.
    ///
    /// # Errors
    /// It fails although no error is expected.
    pub async fn go_back<D: BlockDevice>(&self, image: &Image<D>, number: usize) -> Result<(), Failure> {
        let Some(name) = self.choose(number) else { return Ok(()) };
        self.note(format!("going back to {name:?}"));
        let before = self.model.lock().size();
        let request = self.model.lock().snapshot_applies(&name);
        match image.apply_snapshot(&name).await {
            Ok(()) => {
                let mut model = self.model.lock();
                model.end(request);
                let now = model.flush_begins();
                model.flushed(now);
                model.size_flushed();
                drop(model);
                self.tightened();
                Ok(())
            }
            Err(e) => {
                let mut model = self.model.lock();
                model.fail(request);
                model.resize_failed(before);
                drop(model);
                let full = matches!(e, Error::Unsupported { .. }) && self.config.image.refcount_bits < 4;
                if full { Ok(()) } else { self.failed("going back", e) }
            }
        }
    }

    /// Changes the disk's size, with no guest at work; durable when done.
    ///
    /// # Errors
    /// The resize fails although no error is expected.
    pub async fn resize<D: BlockDevice>(&self, image: &Image<D>, sectors: u64) -> Result<(), Failure> {
        let before = self.model.lock().size();
        if self.config.image.version < 3 && !self.model.lock().taken.is_empty() {
            // Version 2 does not do that.
            return Ok(());
        }
        if self.config.image.version < 3 && sectors > before && self.config.image.backing.sectors() > before {
            // What is behind it would show.
            return match image.resize(sectors * SECTOR as u64, false).await {
                Err(Error::Unsupported { .. }) => Ok(()),
                other => Err(self.failure(format!("growing to {sectors} sectors: {other:?}, and should be refused"))),
            };
        }
        self.note(format!("resize from {before} to {sectors} sectors"));
        self.model.lock().resize(sectors);
        if let Err(e) = image.resize(sectors * SECTOR as u64, sectors < before).await {
            self.model.lock().resize_failed(image.info().virtual_size / SECTOR as u64);
            return self.failed("resize", e);
        }
        self.model.lock().size_flushed();
        self.tightened();
        Ok(())
    }

    /// Compares the whole disk and checks the open image, with no guest at work.
    ///
    /// # Errors
    /// Something differs.
    pub async fn compare<D: BlockDevice>(&self, image: &Image<D>) -> Result<(), Failure> {
        // The copy is compared, so that the model's lock is not held while the device works.
        let mut model = self.model.lock().clone();
        verify::whole_disk(image, &mut model, self.config.image.backing)
            .await
            .map_err(|e| self.failure(format!("whole disk: {e}")))?;
        let report = image.check().await.map_err(|e| self.failure(format!("check of the open image: {e}")))?;
        verify::judge(&report, Tolerance::Clean).map_err(|e| self.failure(format!("check of the open image: {e}")))
    }
}
