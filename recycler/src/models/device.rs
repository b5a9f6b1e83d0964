//! The device of the scenes: memory, and at each call anybody may go on first.

use std::io;

use super::memory::MemoryDevice;
use crate::buf::{IoBuf, IoBufMut};
use crate::device::{BlockDevice, Features};
use crate::sync::atomic::{AtomicU64, Ordering};

/// Bytes in memory; clones share them.
#[derive(Clone)]
pub(super) struct SceneDevice(MemoryDevice);

impl SceneDevice {
    pub(super) fn new() -> Self {
        SceneDevice(MemoryDevice::new(Vec::new()))
    }
}

/// Where the model checker may go on with another thread. (Its own `yield_now` would ask it to, which not every
/// schedule should.)
fn point() {
    AtomicU64::new(0).load(Ordering::SeqCst);
}

impl BlockDevice for SceneDevice {
    fn features(&self) -> Features {
        self.0.features()
    }

    async fn length(&self) -> io::Result<u64> {
        self.0.length().await
    }

    async fn read(&self, offset: u64, buf: IoBufMut<'_>) -> io::Result<()> {
        point();
        self.0.read(offset, buf).await
    }

    async fn write(&self, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
        point();
        self.0.write(offset, buf).await
    }

    fn read_now(&self, offset: u64, buf: IoBufMut<'_>) -> Option<io::Result<()>> {
        point();
        self.0.read_now(offset, buf)
    }

    fn write_now(&self, offset: u64, buf: IoBuf<'_>) -> Option<io::Result<()>> {
        point();
        self.0.write_now(offset, buf)
    }

    async fn flush(&self) -> io::Result<()> {
        point();
        self.0.flush().await
    }

    async fn truncate(&self, length: u64) -> io::Result<()> {
        point();
        self.0.truncate(length).await
    }

    async fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        point();
        self.0.punch_hole(offset, length).await
    }

    async fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        point();
        self.0.write_zeroes(offset, length).await
    }

    async fn copy_range(&self, from: u64, to: u64, length: u64) -> io::Result<()> {
        point();
        self.0.copy_range(from, to, length).await
    }
}
