//! Histories: what guests do to a disk, as data, so that a failing one can be replayed and shortened; and the driver
//! that carries one out against an image and a model.
//!
//! A history is a list of rounds. In a round several guests work at once, perhaps alongside the recycler; between
//! rounds everything rests, the whole disk is compared, and the image may be resized, checked or opened anew.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::recycler::{Control, compact, run};
use qcow_recycler::{BlockDevice, Error, Image};
use rand::Rng;
use rand::rngs::SmallRng;
use tokio::sync::Notify;

use super::config::Config;
use super::content::{self, Content, SECTOR};
use super::model::{Model, Request};
use super::verify::{self, Tolerance};

/// One request of a guest. Positions and counts are in sectors; a request past the end of the disk is cut or skipped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Write {
        first: u64,
        count: u64,
    },
    WriteZeroes {
        first: u64,
        count: u64,
        may_unmap: bool,
    },
    Discard {
        first: u64,
        count: u64,
    },
    Read {
        first: u64,
        count: u64,
    },
    Flush,
    Compact,
    /// Milliseconds.
    Sleep(u64),
}

impl Op {
    /// The sectors it concerns: first and count.
    fn range(self) -> Option<(u64, u64)> {
        match self {
            Op::Write { first, count }
            | Op::WriteZeroes { first, count, .. }
            | Op::Discard { first, count }
            | Op::Read { first, count } => Some((first, count)),
            Op::Flush | Op::Compact | Op::Sleep(_) => None,
        }
    }
}

/// What happens when a round is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    Nothing,
    /// Close and open again; in between the file is checked.
    Reopen,
    /// A new size in sectors.
    Resize(u64),
}

/// Guests that work at the same time.
#[derive(Clone, Debug)]
pub struct Round {
    pub recycler: bool,
    pub guests: Vec<Vec<Op>>,
    pub after: After,
}

/// A whole history.
#[derive(Clone, Debug)]
pub struct History {
    pub config: Config,
    pub rounds: Vec<Round>,
}

/// How much is to happen.
#[derive(Clone, Copy, Debug)]
pub struct Length {
    pub rounds: usize,
    pub guests: usize,
    pub ops: usize,
}

impl History {
    /// A random history.
    pub fn random(config: Config, length: Length, rng: &mut SmallRng) -> History {
        let sectors = config.image.sectors;
        let rounds = (0..rng.random_range(1..=length.rounds))
            .map(|_| {
                let guests = rng.random_range(1..=length.guests);
                let ops = rng.random_range(1..=length.ops);
                // Whole phases of filling and of freeing make holes worth compacting.
                let freeing = [0.15, 0.5, 0.8][rng.random_range(0..3)];
                Round {
                    recycler: rng.random_bool(0.7),
                    guests: (0..guests).map(|_| (0..ops).map(|_| random_op(&config, freeing, rng)).collect()).collect(),
                    after: match rng.random_range(0..10) {
                        0..=2 => After::Reopen,
                        3 => After::Resize(rng.random_range(1..=sectors + sectors / 2)),
                        _ => After::Nothing,
                    },
                }
            })
            .collect();
        History { config, rounds }
    }

    /// How many requests it has.
    pub fn len(&self) -> usize {
        self.rounds.iter().flat_map(|r| &r.guests).map(Vec::len).sum()
    }

    /// Shorter histories to try when this one fails: without a round, a guest, a run of requests, one request, the
    /// recycler, or what follows a round.
    pub fn shorter(&self) -> Vec<History> {
        let mut out = Vec::new();
        let mut push = |change: &dyn Fn(&mut Vec<Round>)| {
            let mut rounds = self.rounds.clone();
            change(&mut rounds);
            out.push(History { config: self.config, rounds });
        };
        for r in 0..self.rounds.len() {
            push(&|rounds| drop(rounds.remove(r)));
        }
        for (r, round) in self.rounds.iter().enumerate() {
            if round.guests.len() > 1 {
                (0..round.guests.len()).for_each(|g| push(&|rounds| drop(rounds[r].guests.remove(g))));
            }
            if round.recycler {
                push(&|rounds| rounds[r].recycler = false);
            }
            if round.after != After::Nothing {
                push(&|rounds| rounds[r].after = After::Nothing);
            }
            for (g, ops) in round.guests.iter().enumerate() {
                let mut step = ops.len() / 2;
                while step > 0 {
                    for start in (0..ops.len()).step_by(step) {
                        let end = (start + step).min(ops.len());
                        push(&|rounds| drop(rounds[r].guests[g].drain(start..end)));
                    }
                    step /= 2;
                }
            }
        }
        out
    }
}

fn random_op(config: &Config, freeing: f64, rng: &mut SmallRng) -> Op {
    let cluster = config.image.cluster_sectors();
    let sectors = config.image.sectors;
    let (first, count) = random_range(sectors, cluster, rng);
    match rng.random_range(0..100) {
        0..=54 => {
            if rng.random_bool(freeing) {
                let (first, count) = if rng.random_bool(0.4) {
                    let first = rng.random_range(0..sectors);
                    (first, rng.random_range(1..=(sectors - first).min(cluster * 40)))
                } else {
                    (first, count)
                };
                if rng.random_bool(0.75) {
                    Op::Discard { first, count }
                } else {
                    Op::WriteZeroes { first, count, may_unmap: rng.random_bool(0.7) }
                }
            } else {
                Op::Write { first, count }
            }
        }
        55..=74 => Op::Write { first, count },
        75..=79 => Op::Read { first, count },
        80..=89 => Op::Flush,
        90..=91 => Op::Compact,
        _ => Op::Sleep(rng.random_range(1..60)),
    }
}

/// Part of a cluster, some whole clusters, or any range.
fn random_range(sectors: u64, cluster: u64, rng: &mut SmallRng) -> (u64, u64) {
    let first = rng.random_range(0..sectors);
    let (first, count) = match rng.random_range(0..4) {
        0 => (first, rng.random_range(1..=8)),
        1 | 2 => (first / cluster * cluster, rng.random_range(1..=6) * cluster),
        _ => (first, rng.random_range(1..=4 * cluster)),
    };
    (first, count.min(sectors - first))
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

/// What guests and observers share.
pub struct Shared {
    pub config: Config,
    pub model: Mutex<Model>,
    pub errors: Mutex<Vec<(String, Error)>>,
    /// Called when a guest's flush has completed and the model knows.
    pub after_flush: Mutex<Option<Arc<dyn Fn() + Send + Sync>>>,
    policy: Errors,
    clock: Clock,
    trace: Mutex<Vec<String>>,
    busy: Mutex<Vec<Range<u64>>>,
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
            model: Mutex::new(Model::new(config.image.sectors)),
            errors: Mutex::default(),
            after_flush: Mutex::default(),
            policy,
            clock,
            trace: Mutex::default(),
            busy: Mutex::default(),
            freed: Notify::new(),
        })
    }

    /// Notes what goes on, for reports.
    pub fn note(&self, text: impl Into<String>) {
        self.trace.lock().push(text.into());
    }

    /// A failure with what led to it.
    pub fn failure(&self, message: impl Into<String>) -> Failure {
        Failure { message: message.into(), trace: self.trace.lock().clone() }
    }

    async fn exclude(&self, range: Range<u64>) -> Exclusive<'_> {
        loop {
            let freed = self.freed.notified();
            let mut freed = std::pin::pin!(freed);
            // Registered before looking, so that no wake-up is missed.
            freed.as_mut().enable();
            {
                let mut busy = self.busy.lock();
                if !busy.iter().any(|r| r.start < range.end && range.start < r.end) {
                    busy.push(range.clone());
                    return Exclusive { shared: self, range };
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
        for op in ops {
            self.step(name, image, *op).await?;
        }
        Ok(())
    }

    async fn step<D: BlockDevice>(&self, name: &str, image: &Image<D>, op: Op) -> Result<(), Failure> {
        let what = format!("{name} {op:?}");
        let size = self.model.lock().size();
        let cut = |first: u64, count: u64| first..(first + count).min(size).max(first);
        if op.range().is_some_and(|(first, count)| cut(first, count).is_empty()) {
            return Ok(());
        }
        match op {
            Op::Sleep(millis) => self.sleep(millis).await,
            Op::Flush => {
                let began = self.model.lock().flush_begins();
                match image.flush().await {
                    Ok(()) => self.flushed(began),
                    Err(e) => self.failed(&what, e)?,
                }
                self.note(what);
            }
            Op::Compact => match compact(image, &mut |_| true).await {
                Ok(report) => self.note(format!("{what}: {report:?}")),
                Err(Error::Busy { .. }) => {}
                Err(e) => self.failed(&what, e)?,
            },
            Op::Read { first, count } => {
                let range = cut(first, count);
                let _guard = self.exclude(range.clone()).await;
                self.read_back(&what, image, range).await?;
            }
            Op::Write { first, count } => {
                let range = cut(first, count);
                let _guard = self.exclude(range.clone()).await;
                let length = range.end - range.start;
                let (request, version) = {
                    let mut model = self.model.lock();
                    let version = model.next_version();
                    (model.begin(range.start, length, |sector, _| vec![Content::Data { sector, version }]), version)
                };
                self.note(format!("{what} as {version} begins"));
                let data = content::data(range.start, length, version);
                let result = image.write(range.start * SECTOR as u64, IoBuf::new(&data)).await;
                self.finish(&what, image, request, range, result).await?;
            }
            Op::Discard { first, count } => {
                let range = cut(first, count);
                let _guard = self.exclude(range.clone()).await;
                let whole =
                    Model::whole_clusters(range.start, range.end - range.start, self.config.image.cluster_sectors());
                let request = self.model.lock().begin(range.start, range.end - range.start, |sector, now| {
                    let mut allowed = vec![Content::Zero];
                    if !whole.contains(&sector) {
                        allowed.extend(now);
                    }
                    allowed
                });
                self.note(format!("{what} begins"));
                let result =
                    image.discard(range.start * SECTOR as u64, (range.end - range.start) * SECTOR as u64).await;
                self.finish(&what, image, request, range, result).await?;
            }
            Op::WriteZeroes { first, count, may_unmap } => {
                let range = cut(first, count);
                let _guard = self.exclude(range.clone()).await;
                let length = range.end - range.start;
                let request = self.model.lock().begin(range.start, length, |_, _| vec![Content::Zero]);
                self.note(format!("{what} begins"));
                let (offset, bytes) = (range.start * SECTOR as u64, length * SECTOR as u64);
                let result = image.write_zeroes(offset, bytes, may_unmap).await;
                self.finish(&what, image, request, range, result).await?;
            }
        }
        Ok(())
    }

    fn flushed(&self, began: u64) {
        self.model.lock().flushed(began);
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
        result: Result<(), Error>,
    ) -> Result<(), Failure> {
        self.note(format!("{what} ends"));
        match result {
            Ok(()) => {
                self.model.lock().end(request);
                self.read_back(what, image, range).await
            }
            Err(e) => {
                self.model.lock().fail(request);
                self.failed(what, e)
            }
        }
    }

    async fn read_back<D: BlockDevice>(&self, what: &str, image: &Image<D>, range: Range<u64>) -> Result<(), Failure> {
        let mut bytes = vec![0xaa; (range.end - range.start) as usize * SECTOR];
        match image.read(range.start * SECTOR as u64, IoBufMut::new(&mut bytes)).await {
            Ok(()) => {
                let mut model = self.model.lock();
                model
                    .read(range.start, &bytes)
                    .map_err(|m| self.failure(format!("read back after {what}: {m}; {}", model.explain(m.sector))))
            }
            Err(e) => self.failed(&format!("read back after {what}"), e),
        }
    }

    /// Changes the disk's size, with no guest at work, and flushes.
    ///
    /// # Errors
    /// The resize or the flush fails although no error is expected.
    pub async fn resize<D: BlockDevice>(&self, image: &Image<D>, sectors: u64) -> Result<(), Failure> {
        let before = self.model.lock().size();
        self.note(format!("resize from {before} to {sectors} sectors"));
        self.model.lock().resize(sectors);
        if let Err(e) = image.resize(sectors * SECTOR as u64, sectors < before).await {
            self.model.lock().resize_failed(image.info().virtual_size / SECTOR as u64);
            return self.failed("resize", e);
        }
        let began = self.model.lock().flush_begins();
        match image.flush().await {
            Ok(()) => {
                self.model.lock().size_flushed();
                self.flushed(began);
                Ok(())
            }
            Err(e) => self.failed("flush after resize", e),
        }
    }

    /// Compares the whole disk and checks the open image, with no guest at work.
    ///
    /// # Errors
    /// Something differs.
    pub async fn compare<D: BlockDevice>(&self, image: &Image<D>) -> Result<(), Failure> {
        // The copy is compared, so that the model's lock is not held while the device works.
        let mut model = self.model.lock().clone();
        verify::whole_disk(image, &mut model).await.map_err(|e| self.failure(format!("whole disk: {e}")))?;
        let report = image.check().await.map_err(|e| self.failure(format!("check of the open image: {e}")))?;
        verify::judge(&report, Tolerance::Clean).map_err(|e| self.failure(format!("check of the open image: {e}")))
    }
}

/// Runs a history on a device in tokio tasks; afterwards the image is closed. `closed` looks at the file after each
/// close.
///
/// # Errors
/// The first thing that is wrong, broken device rules and a failed `closed` included.
pub async fn play<D: BlockDevice + Clone>(
    history: &History,
    device: &D,
    shared: &Arc<Shared>,
    closed: impl Fn(&D) -> Result<(), String>,
) -> Result<(), Failure> {
    let open = || async {
        let image = Image::open(device.clone(), history.config.options()).await;
        image.map(Arc::new).map_err(|e| shared.failure(format!("opening: {e}")))
    };
    let closed = &closed;
    let close = |image: Arc<Image<D>>| async move {
        shared.note("close");
        let began = shared.model.lock().flush_begins();
        image.close().await.map_err(|e| shared.failure(format!("closing: {e}")))?;
        shared.flushed(began);
        closed(device).map_err(|e| shared.failure(format!("after closing: {e}")))
    };
    let mut image = open().await?;
    for (number, round) in history.rounds.iter().enumerate() {
        shared.note(format!("round {number}{}", if round.recycler { " with the recycler" } else { "" }));
        let control = Control::new();
        let worker = round.recycler.then(|| tokio::spawn(run(image.clone(), control.clone())));
        let guests: Vec<_> = round
            .guests
            .iter()
            .cloned()
            .enumerate()
            .map(|(g, ops)| {
                let (shared, image) = (shared.clone(), image.clone());
                tokio::spawn(async move { shared.guest(&format!("guest {g}"), &image, &ops).await })
            })
            .collect();
        for guest in guests {
            guest.await.map_err(|e| shared.failure(format!("a guest panicked: {e}")))??;
        }
        if round.recycler && number % 2 == 0 {
            // Time for the recycler to settle and compact what the guests left.
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        control.stop();
        if let Some(worker) = worker {
            worker.await.map_err(|e| shared.failure(format!("the recycler panicked: {e}")))?;
        }
        let errors = image.stats().background_errors;
        if errors > 0 && shared.policy == Errors::None {
            return Err(shared.failure(format!("{errors} background errors")));
        }
        shared.compare(&image).await?;
        match round.after {
            After::Nothing => {}
            After::Resize(sectors) => shared.resize(&image, sectors).await?,
            After::Reopen => {
                close(image).await?;
                image = open().await?;
                shared.compare(&image).await?;
            }
        }
    }
    shared.compare(&image).await?;
    close(image).await
}

/// Runs `future` on a runtime of its own whose time stands still unless everything waits for it; a history that makes
/// no progress for an hour of that time hangs.
///
/// # Errors
/// The future's own, or that it hangs.
pub fn in_paused_time(shared: &Shared, future: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let run = || {
        runtime.block_on(async {
            match tokio::time::timeout(Duration::from_secs(3600), future).await {
                Ok(result) => result,
                Err(_) => Err(shared.failure("it hangs")),
            }
        })
    };
    // Nothing of the history is used after a panic but what locks guard.
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default();
        Err(shared.failure(format!("panicked: {text}")))
    })
}

/// Shortens a failing history as long as `fails` still fails, within `attempts`.
pub fn shrink(history: History, attempts: usize, fails: impl Fn(&History) -> bool) -> History {
    let (mut best, mut left) = (history, attempts);
    'again: loop {
        for candidate in best.shorter() {
            if left == 0 {
                return best;
            }
            left -= 1;
            if fails(&candidate) {
                best = candidate;
                continue 'again;
            }
        }
        return best;
    }
}
