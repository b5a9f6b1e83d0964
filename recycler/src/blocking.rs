//! The synchronous face of the library, for C, Python and plain Rust threads.
//!
//! Calls run on the caller's thread. With a device whose operations complete at once (a host file), a call is nothing
//! but its own system calls; otherwise the thread sleeps until the device answers. The recycler has a thread
//! of its own.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;

use parking_lot::Mutex;
use tokio::runtime::{Builder, Handle};

use crate::buf::{IoBuf, IoBufMut};
use crate::check::CheckReport;
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::image::{BitmapInfo, Extent, Image, Info, SnapshotInfo};
use crate::options::{LogLevel, Options};
use crate::recycler::{CompactReport, CompressReport, Control, Progress};
use crate::stats::Stats;

/// What drives the timers of all recyclers in the process, on a thread of its own; each recycler has one, too, so that one image's
/// slow device never holds up another's. Beside it the ID of the process: a child has no threads of its parent's.
static TIMERS: Mutex<Option<(u32, Handle)>> = Mutex::new(None);

fn timers() -> Result<Handle> {
    let mut timers = TIMERS.lock();
    let here = std::process::id();
    if let Some((process, handle)) = &*timers
        && *process == here
    {
        return Ok(handle.clone());
    }
    let runtime = Builder::new_current_thread().enable_time().build().map_err(no_thread)?;
    let handle = runtime.handle().clone();
    spawn(move || runtime.block_on(std::future::pending::<()>())).map_err(no_thread)?;
    // The parent's locks may be held for ever.
    std::mem::forget(timers.replace((here, handle.clone())));
    Ok(handle)
}

fn spawn(work: impl FnOnce() + Send + 'static) -> std::io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name("qcowrecycle".to_owned()).spawn(work)
}

fn no_thread(source: std::io::Error) -> Error {
    Error::Io { action: "starting the recycler's thread", offset: 0, source }
}

/// Runs a future on this thread: at once if it is ready, sleeping between wake-ups otherwise.
pub fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    // The common case: no waker is needed, so none is made.
    if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        return output;
    }
    pollster::block_on(future)
}

/// An open image with its recycler; shared by any number of threads.
pub struct Disk<D: BlockDevice> {
    image: Arc<Image<D>>,
    worker: Mutex<Option<Worker>>,
}

struct Worker {
    control: Control,
    thread: JoinHandle<()>,
}

impl<D: BlockDevice> Disk<D> {
    /// Opens the image on `device`. The recycler is not running yet: see [`start`](Self::start).
    ///
    /// # Errors
    /// See [`Image::open`].
    pub fn open(device: D, options: Options) -> Result<Self> {
        block_on(Image::open(device, options)).map(Disk::from)
    }

    /// Opens the image on `device` whose external data file is on `data`.
    ///
    /// # Errors
    /// See [`Image::open_with_data`].
    pub fn open_with_data(device: D, data: D, options: Options) -> Result<Self> {
        block_on(Image::open_with_data(device, data, options)).map(Disk::from)
    }

    /// The image itself, for its asynchronous calls.
    #[must_use]
    pub fn image(&self) -> &Arc<Image<D>> {
        &self.image
    }

    /// What the image is.
    #[must_use]
    pub fn info(&self) -> Info {
        self.image.info()
    }

    /// Fills `buf` from byte `offset` of the virtual disk.
    ///
    /// # Errors
    /// See [`Image::read`].
    #[inline]
    pub fn read(&self, offset: u64, buf: IoBufMut<'_>) -> Result<()> {
        self.image.read_blocking(offset, buf)
    }

    /// Stores `buf` at byte `offset` of the virtual disk.
    ///
    /// # Errors
    /// See [`Image::write`].
    #[inline]
    pub fn write(&self, offset: u64, buf: IoBuf<'_>) -> Result<()> {
        self.image.write_blocking(offset, buf)
    }

    /// Stores whole clusters compressed.
    ///
    /// # Errors
    /// See [`Image::write_compressed`].
    pub fn write_compressed(&self, offset: u64, buf: IoBuf<'_>) -> Result<()> {
        block_on(self.image.write_compressed(offset, buf))
    }

    /// Frees a range of the virtual disk.
    ///
    /// # Errors
    /// See [`Image::discard`].
    pub fn discard(&self, offset: u64, length: u64) -> Result<()> {
        self.image.discard_blocking(offset, length)
    }

    /// Makes a range of the virtual disk read as zeroes.
    ///
    /// # Errors
    /// See [`Image::write_zeroes`].
    pub fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> Result<()> {
        block_on(self.image.write_zeroes(offset, length, may_unmap))
    }

    /// Makes every completed write durable.
    ///
    /// # Errors
    /// See [`Image::flush`].
    pub fn flush(&self) -> Result<()> {
        block_on(self.image.flush())
    }

    /// Changes the size of the virtual disk, in bytes.
    ///
    /// # Errors
    /// See [`Image::resize`].
    pub fn resize(&self, size: u64, shrink: bool) -> Result<()> {
        block_on(self.image.resize(size, shrink))
    }

    /// How the bytes from `offset` on are stored: see [`Image::extent`].
    ///
    /// # Errors
    /// See [`Image::extent`].
    pub fn extent(&self, offset: u64, length: u64) -> Result<Extent> {
        block_on(self.image.extent(offset, length))
    }

    /// The persistent bitmaps.
    ///
    /// # Errors
    /// See [`Image::bitmaps`].
    pub fn bitmaps(&self) -> Result<Vec<BitmapInfo>> {
        block_on(self.image.bitmaps())
    }

    /// Adds an empty bitmap.
    ///
    /// # Errors
    /// See [`Image::add_bitmap`].
    pub fn add_bitmap(&self, name: &str, granularity: u64, recording: bool) -> Result<()> {
        block_on(self.image.add_bitmap(name, granularity, recording))
    }

    /// Takes all marks off a bitmap.
    ///
    /// # Errors
    /// See [`Image::clear_bitmap`].
    pub fn clear_bitmap(&self, name: &str) -> Result<()> {
        block_on(self.image.clear_bitmap(name))
    }

    /// Lets a bitmap record writes, or stop to.
    ///
    /// # Errors
    /// See [`Image::record_bitmap`].
    pub fn record_bitmap(&self, name: &str, recording: bool) -> Result<()> {
        block_on(self.image.record_bitmap(name, recording))
    }

    /// The internal snapshots.
    ///
    /// # Errors
    /// See [`Image::snapshots`].
    pub fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        self.image.snapshots()
    }

    /// Makes a snapshot of the disk.
    ///
    /// # Errors
    /// See [`Image::create_snapshot`].
    pub fn create_snapshot(&self, name: &str) -> Result<SnapshotInfo> {
        block_on(self.image.create_snapshot(name))
    }

    /// Deletes a snapshot, told by its ID or name.
    ///
    /// # Errors
    /// See [`Image::delete_snapshot`].
    pub fn delete_snapshot(&self, id_or_name: &str) -> Result<()> {
        block_on(self.image.delete_snapshot(id_or_name))
    }

    /// Lets the disk be what it was when a snapshot was made, told by its ID or name.
    ///
    /// # Errors
    /// See [`Image::apply_snapshot`].
    pub fn apply_snapshot(&self, id_or_name: &str) -> Result<()> {
        block_on(self.image.apply_snapshot(id_or_name))
    }

    /// Checks the image while it is open.
    ///
    /// # Errors
    /// See [`Image::check`].
    pub fn check(&self) -> Result<CheckReport> {
        block_on(self.image.check())
    }

    /// What the image and its recycler are doing.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let mut stats = self.image.stats();
        stats.recycler_running = u64::from(self.worker.lock().as_ref().is_some_and(|w| w.control.is_running()));
        stats
    }

    /// Starts the recycler; does nothing if it runs already.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::Closed`], or no thread could be started.
    pub fn start(&self) -> Result<()> {
        self.image.ensure_writable()?;
        let timers = timers()?;
        let mut worker = self.worker.lock();
        if worker.is_none() {
            let control = Control::new();
            let (image, remote) = (self.image.clone(), control.clone());
            let thread = spawn(move || {
                let work = crate::recycler::run(image.clone(), remote.clone());
                if std::panic::catch_unwind(AssertUnwindSafe(|| timers.block_on(work))).is_err() {
                    // What the recycler was changing is in doubt: nothing more may be written.
                    image.panicked("the recycler");
                }
                remote.stop();
            });
            *worker = Some(Worker { control, thread: thread.map_err(no_thread)? });
        }
        Ok(())
    }

    /// Lets the recycler finish the step it is at, then rest. Does nothing if it is not running.
    pub fn pause(&self) {
        if let Some(worker) = &*self.worker.lock() {
            worker.control.pause();
        }
    }

    /// Lets a paused recycler go on.
    pub fn resume(&self) {
        if let Some(worker) = &*self.worker.lock() {
            worker.control.resume();
        }
    }

    /// Stops the recycler and waits until it has ended; what it was moving stays where it was.
    pub fn stop(&self) {
        let worker = self.worker.lock().take();
        if let Some(worker) = worker {
            worker.control.stop();
            if worker.thread.join().is_err() {
                self.image.logger().log(LogLevel::Error, || "the recycler ended abnormally".to_owned());
            }
        }
    }

    /// Compacts the image now, on this thread, while guests go on; `progress` is called for each table that is searched and each
    /// MiB that is copied, and cancels the work by returning `false`, which leaves a consistent image and gives
    /// [`Error::Cancelled`].
    ///
    /// # Errors
    /// See [`crate::recycler::compact`].
    pub fn compact(&self, mut progress: impl FnMut(Progress) -> bool + Send) -> Result<CompactReport> {
        let timers = timers()?;
        let _timers = timers.enter();
        block_on(crate::recycler::compact(&self.image, &mut progress))
    }

    /// Compresses what the disk holds, on this thread, while guests go on; `progress` is called between batches and cancels the
    /// work by returning `false`, which leaves a consistent image and gives [`Error::Cancelled`].
    ///
    /// # Errors
    /// See [`crate::recycler::compress`].
    pub fn compress(&self, mut progress: impl FnMut(Progress) -> bool + Send) -> Result<CompressReport> {
        let timers = timers()?;
        let _timers = timers.enter();
        block_on(crate::recycler::compress(&self.image, &mut progress))
    }

    /// Stops the recycler, writes everything back and closes the image. Later calls fail with [`Error::Closed`]; closing
    /// twice does nothing.
    ///
    /// # Errors
    /// See [`Image::close`]. The handle is closed even then.
    pub fn close(&self) -> Result<()> {
        self.stop();
        block_on(self.image.close())
    }
}

impl<D: BlockDevice> From<Image<D>> for Disk<D> {
    /// An image that is open, however it was opened. Its recycler is not running.
    fn from(image: Image<D>) -> Self {
        Disk { image: Arc::new(image), worker: Mutex::new(None) }
    }
}

impl<D: BlockDevice> Drop for Disk<D> {
    /// Closes the image; an error can only be logged here, so call [`close`](Disk::close) to see it.
    fn drop(&mut self) {
        if let Err(e) = self.close() {
            self.image.logger().log(LogLevel::Error, || format!("closing the image failed: {e}"));
        }
    }
}
