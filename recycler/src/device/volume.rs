//! An open device as the engine sees it: its length is known, its errors have a place, a failed flush is remembered.

use std::ops::Range;

use super::{BlockDevice, Features};
use crate::buf::{IoBuf, IoBufMut};
use crate::error::{Error, Result};
use crate::mutation::{Mutation, broken};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{AsyncMutex, Mutex};

/// Zeroes are written, and clusters copied, in pieces of at most this many bytes.
pub(crate) const PIECE: usize = 1 << 20;

static ZEROES: [u8; PIECE] = [0; PIECE];

/// What copies are made with.
#[derive(Debug, Default)]
pub(crate) struct Copier {
    /// Memory for what the device does not copy.
    pub(crate) scratch: Vec<u8>,
    /// What comes from several places is written in one call, as long as the device copies no faster: the writes of guests wait
    /// for each of ours.
    pub(crate) in_one: bool,
}

/// A device with what the engine knows about it.
pub(crate) struct Volume<D> {
    device: D,
    features: Features,
    /// Its length in bytes, kept here so that requests need not ask.
    length: AtomicU64,
    /// Who changes the length, which has to happen there and here; taken after every other lock.
    resizing: AsyncMutex<()>,
    /// Cleared for good when the device says that it cannot after all (a file system without the call).
    can_punch: AtomicBool,
    can_zero: AtomicBool,
    can_copy: AtomicBool,
    /// Set for good by a failed flush. What was written since the last good one may be lost, and a later flush that
    /// succeeds says nothing about it, so nothing may be built on it.
    failed: AtomicBool,
    failure: Mutex<String>,
    /// Flushes of the device, for the statistics.
    pub(crate) flushes: AtomicU64,
}

impl<D: BlockDevice> Volume<D> {
    pub(crate) async fn new(device: D) -> Result<Self> {
        let features = device.features();
        let length = device.length().await.map_err(Error::io("asking for the length", 0))?;
        Ok(Volume {
            device,
            features,
            length: AtomicU64::new(length),
            resizing: AsyncMutex::new(()),
            can_punch: AtomicBool::new(features.punch_hole),
            can_zero: AtomicBool::new(features.write_zeroes),
            can_copy: AtomicBool::new(features.copy_range),
            failed: AtomicBool::new(false),
            failure: Mutex::new(String::new()),
            flushes: AtomicU64::new(0),
        })
    }

    pub(crate) fn device(&self) -> &D {
        &self.device
    }

    pub(crate) fn length(&self) -> u64 {
        self.length.load(Ordering::Acquire)
    }

    /// Asks the device again: somebody else may have changed its length.
    pub(crate) async fn refresh_length(&self) -> Result<()> {
        let _resizing = self.resizing.lock().await;
        let length = self.device.length().await.map_err(Error::io("asking for the length", 0))?;
        self.length.store(length, Ordering::Release);
        Ok(())
    }

    pub(crate) fn can_resize(&self) -> bool {
        self.features.resize
    }

    #[inline]
    pub(crate) fn is_sound(&self) -> bool {
        !self.failed.load(Ordering::Acquire)
    }

    /// Fails when an earlier flush did.
    pub(crate) fn ensure_sound(&self) -> Result<()> {
        if !self.is_sound() {
            return Err(Error::Failed { reason: self.failure.lock().clone() });
        }
        Ok(())
    }

    /// Makes every later change fail with [`Error::Failed`]; the first reason stays.
    pub(crate) fn fail(&self, reason: impl FnOnce() -> String) {
        let mut failure = self.failure.lock();
        if failure.is_empty() {
            *failure = reason();
        }
        self.failed.store(true, Ordering::Release);
    }

    /// Reads; what lies past the end of the file reads as zeroes, since the last cluster may be cut short.
    pub(crate) async fn read(&self, action: &'static str, offset: u64, mut buf: IoBufMut<'_>) -> Result<()> {
        let length = self.length();
        let wanted = buf.len();
        if offset.checked_add(wanted as u64).is_some_and(|end| end <= length) {
            return self.device.read(offset, buf).await.map_err(Error::io(action, offset));
        }
        let there = length.saturating_sub(offset).min(wanted as u64) as usize;
        if there > 0 {
            self.device.read(offset, buf.slice(0..there)).await.map_err(Error::io(action, offset))?;
        }
        buf.slice(there..wanted).fill_zero();
        Ok(())
    }

    /// Reads what lies within the file, if the device does so at once. `None`: nothing was done.
    #[inline]
    pub(crate) fn read_now(&self, action: &'static str, offset: u64, buf: IoBufMut<'_>) -> Option<Result<()>> {
        match self.device.read_now(offset, buf)? {
            Ok(()) => Some(Ok(())),
            Err(e) => Some(Err(Error::io(action, offset)(e))),
        }
    }

    /// Writes what lies within the file, if the device does so at once. `None`: nothing was done. The caller has seen that
    /// the volume is sound.
    #[inline]
    pub(crate) fn write_now(&self, action: &'static str, offset: u64, buf: IoBuf<'_>) -> Option<Result<()>> {
        match self.device.write_now(offset, buf)? {
            Ok(()) => Some(Ok(())),
            Err(e) => Some(Err(Error::io(action, offset)(e))),
        }
    }

    /// Writes. The file must be long enough, but for a cut-short last cluster, which is completed.
    pub(crate) async fn write(&self, action: &'static str, offset: u64, buf: IoBuf<'_>) -> Result<()> {
        self.ensure_sound()?;
        let end = offset.saturating_add(buf.len() as u64);
        if end > self.length() {
            let _resizing = self.resizing.lock().await;
            // Another write may have completed more of the cluster, or the file may have grown: it must not become shorter.
            if end > self.length() || broken(Mutation::ExtendUnlooked) {
                self.resize(end).await?;
            }
        }
        self.device.write(offset, buf).await.map_err(Error::io(action, offset))
    }

    /// Makes everything durable that completed before the call.
    pub(crate) async fn flush(&self) -> Result<()> {
        self.ensure_sound()?;
        self.flushes.fetch_add(1, Ordering::Relaxed);
        self.device.flush().await.map_err(|source| {
            if !broken(Mutation::ForgiveFailedFlush) {
                self.fail(|| format!("a flush of the device failed: {source}"));
            }
            Error::Io { action: "a flush", offset: 0, source }
        })
    }

    /// Makes the file `length` bytes long; a device of fixed length can only be asked for what it has.
    pub(crate) async fn truncate(&self, length: u64) -> Result<()> {
        self.ensure_sound()?;
        let _resizing = self.resizing.lock().await;
        self.resize(length).await
    }

    /// The same, by who has the turn.
    async fn resize(&self, length: u64) -> Result<()> {
        if !self.features.resize {
            if length <= self.length() {
                return Ok(());
            }
            let source = std::io::Error::from_raw_os_error(libc::ENOSPC);
            return Err(Error::Io { action: "extending past the end of the device", offset: length, source });
        }
        let done = self.device.truncate(length).await.map_err(Error::io("changing the length", length));
        // One that failed may have been done all the same: nobody may look for what is not there any more.
        let now = if done.is_ok() { Ok(length) } else { self.device.length().await };
        if let Ok(now) = now {
            self.length.store(now, Ordering::Release);
        }
        done
    }

    /// Whether space can be given back, as far as is known.
    pub(crate) fn can_punch(&self) -> bool {
        self.can_punch.load(Ordering::Relaxed)
    }

    /// Gives the space of a range of the file back, if the device can do that; what it reads as then is not said.
    pub(crate) async fn punch(&self, offset: u64, length: u64) -> Result<()> {
        self.ensure_sound()?;
        let length = length.min(self.length().saturating_sub(offset));
        if length == 0 || !self.can_punch() {
            return Ok(());
        }
        match self.device.punch_hole(offset, length).await {
            Err(e) if e.kind() == std::io::ErrorKind::Unsupported => self.can_punch.store(false, Ordering::Relaxed),
            other => other.map_err(Error::io("punching a hole", offset))?,
        }
        Ok(())
    }

    /// Makes a range of the file read as zeroes, by the cheapest means that the device has.
    pub(crate) async fn erase(&self, offset: u64, length: u64) -> Result<()> {
        self.ensure_sound()?;
        // What lies past the end of the file is zero already, and must not be made to exist.
        let there = length.min(self.length().saturating_sub(offset));
        if there > 0 && self.can_punch.load(Ordering::Relaxed) {
            match self.device.punch_hole(offset, there).await {
                Err(e) if e.kind() == std::io::ErrorKind::Unsupported => self.can_punch.store(false, Ordering::Relaxed),
                other => return other.map_err(Error::io("punching a hole", offset)),
            }
        }
        self.zero(offset, length).await
    }

    /// The same, keeping its space.
    pub(crate) async fn zero(&self, offset: u64, length: u64) -> Result<()> {
        self.ensure_sound()?;
        let length = length.min(self.length().saturating_sub(offset));
        if length == 0 {
            return Ok(());
        }
        if self.can_zero.load(Ordering::Relaxed) {
            match self.device.write_zeroes(offset, length).await {
                Err(e) if e.kind() == std::io::ErrorKind::Unsupported => self.can_zero.store(false, Ordering::Relaxed),
                other => return other.map_err(Error::io("writing zeroes", offset)),
            }
        }
        let mut at = offset;
        while at < offset + length {
            let piece = (offset + length - at).min(PIECE as u64);
            self.device.write(at, zeroes(piece as usize)).await.map_err(Error::io("writing zeroes", at))?;
            at += piece;
        }
        Ok(())
    }

    /// Copies a range of at most [`PIECE`] bytes inside the file; what lies past its end is zero.
    pub(crate) async fn copy(&self, from: u64, to: u64, length: u64, copier: &mut Copier) -> Result<()> {
        self.gather(std::slice::from_ref(&(from..from + length)), to, copier).await
    }

    /// Copies ranges of the file, at most [`PIECE`] bytes in all, to one place, where they follow one another; what lies past
    /// the end of the file is zero. If the device cannot copy, or the copier wants it so, they are written in one piece.
    pub(crate) async fn gather(&self, sources: &[Range<u64>], to: u64, copier: &mut Copier) -> Result<()> {
        self.ensure_sound()?;
        let length: u64 = sources.iter().map(|s| s.end - s.start).sum();
        let inside = sources.iter().all(|s| s.end <= self.length()) && to + length <= self.length();
        let by_device = self.can_copy.load(Ordering::Relaxed) && !(copier.in_one && self.device.copies_bytes());
        if inside && by_device && self.copy_each(sources, to).await? {
            return Ok(());
        }
        let scratch = &mut copier.scratch;
        scratch.resize(length as usize, 0);
        let mut rest = IoBufMut::new(scratch);
        let mut done = 0;
        for s in sources {
            let next = done + (s.end - s.start) as usize;
            self.read("reading a cluster to move", s.start, rest.slice(done..next)).await?;
            done = next;
        }
        self.write("writing a moved cluster", to, IoBuf::new(scratch)).await
    }

    /// Lets the device copy. `false`: it cannot.
    async fn copy_each(&self, sources: &[Range<u64>], to: u64) -> Result<bool> {
        let mut at = to;
        for s in sources {
            let length = s.end - s.start;
            match self.device.copy_range(s.start, at, length).await {
                Err(e) if e.kind() == std::io::ErrorKind::Unsupported => {
                    self.can_copy.store(false, Ordering::Relaxed);
                    return Ok(false);
                }
                other => other.map_err(Error::io("copying a cluster", s.start))?,
            }
            at += length;
        }
        Ok(true)
    }

    /// A hint: this range was written, and a flush will follow soon.
    pub(crate) fn will_flush(&self, range: Range<u64>) {
        self.device.will_flush(range.start, range.end - range.start);
    }

    /// A hint: this range will be read soon.
    pub(crate) fn will_read(&self, range: Range<u64>) {
        let end = range.end.min(self.length());
        if range.start < end {
            self.device.will_read(range.start, end - range.start);
        }
    }
}

/// A buffer of at most [`PIECE`] zeroes.
pub(crate) fn zeroes(length: usize) -> IoBuf<'static> {
    IoBuf::new(&ZEROES[..length])
}
