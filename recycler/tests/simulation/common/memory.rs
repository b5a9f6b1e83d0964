//! A device in memory that does everything at once and loses nothing.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::device::{BlockDevice, Features};

/// Bytes in memory; clones share them.
#[derive(Clone)]
pub struct MemoryDevice {
    bytes: Arc<Mutex<Vec<u8>>>,
    features: Features,
}

impl MemoryDevice {
    /// A device that holds `bytes` and can do everything.
    pub fn new(bytes: Vec<u8>) -> Self {
        Self::with(bytes, Features { resize: true, punch_hole: true, write_zeroes: true, copy_range: true })
    }

    /// A device that holds `bytes` and says that it has these features.
    pub fn with(bytes: Vec<u8>, features: Features) -> Self {
        MemoryDevice { bytes: Arc::new(Mutex::new(bytes)), features }
    }

    /// What the device holds.
    pub fn contents(&self) -> Vec<u8> {
        self.bytes.lock().clone()
    }

    fn load(&self, offset: u64, mut buf: IoBufMut<'_>) -> io::Result<()> {
        let bytes = self.bytes.lock();
        let range = within(bytes.len(), offset, buf.len())?;
        buf.copy_from(&bytes[range]);
        Ok(())
    }

    fn store(&self, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
        let mut bytes = self.bytes.lock();
        let range = within(bytes.len(), offset, buf.len())?;
        buf.copy_to(&mut bytes[range]);
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let mut bytes = self.bytes.lock();
        let range = within(bytes.len(), offset, length as usize)?;
        bytes[range].fill(0);
        Ok(())
    }
}

fn within(end: usize, offset: u64, length: usize) -> io::Result<std::ops::Range<usize>> {
    let start = usize::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    match start.checked_add(length) {
        Some(stop) if stop <= end => Ok(start..stop),
        _ => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("{length} bytes at {offset:#x} reach past the device's end {end:#x}"),
        )),
    }
}

impl BlockDevice for MemoryDevice {
    fn features(&self) -> Features {
        self.features
    }

    async fn length(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().len() as u64)
    }

    async fn read(&self, offset: u64, buf: IoBufMut<'_>) -> io::Result<()> {
        self.load(offset, buf)
    }

    async fn write(&self, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
        self.store(offset, buf)
    }

    fn read_now(&self, offset: u64, buf: IoBufMut<'_>) -> Option<io::Result<()>> {
        Some(self.load(offset, buf))
    }

    fn write_now(&self, offset: u64, buf: IoBuf<'_>) -> Option<io::Result<()>> {
        Some(self.store(offset, buf))
    }

    async fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    async fn truncate(&self, length: u64) -> io::Result<()> {
        self.bytes.lock().resize(length as usize, 0);
        Ok(())
    }

    async fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length)
    }

    async fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.zero(offset, length)
    }

    async fn copy_range(&self, from: u64, to: u64, length: u64) -> io::Result<()> {
        let mut bytes = self.bytes.lock();
        let source = within(bytes.len(), from, length as usize)?;
        let target = within(bytes.len(), to, length as usize)?;
        bytes.copy_within(source, target.start);
        Ok(())
    }
}
