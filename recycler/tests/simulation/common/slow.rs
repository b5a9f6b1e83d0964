//! A device in memory with one slow read.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::device::{BlockDevice, Features};

use super::memory::MemoryDevice;

/// A device in memory whose one slow read goes on when it is told to, or during a flush, which waits until the reader has its data.
#[derive(Clone)]
pub struct SlowRead {
    memory: MemoryDevice,
    pub state: Arc<Slow>,
}

/// What its threads tell one another.
#[derive(Default)]
pub struct Slow {
    /// The next read waits.
    pub armed: AtomicBool,
    /// During which flush from now on it goes on.
    pub flushes: AtomicU32,
    at: Mutex<At>,
    changed: Condvar,
}

/// Where the slow read is.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub enum At {
    #[default]
    Nothing,
    Waiting,
    GoesOn,
    Ended,
}

impl Slow {
    /// Where it is now.
    pub fn at(&self) -> At {
        *self.at.lock().unwrap()
    }

    /// Tells everybody.
    pub fn set(&self, at: At) {
        *self.at.lock().unwrap() = at;
        self.changed.notify_all();
    }

    /// Waits until this is told.
    pub fn wait_for(&self, at: At) {
        drop(self.changed.wait_while(self.at.lock().unwrap(), |now| *now != at).unwrap());
    }
}

impl SlowRead {
    /// An empty one.
    pub fn new() -> Self {
        SlowRead { memory: MemoryDevice::new(Vec::new()), state: Arc::default() }
    }
}

impl BlockDevice for SlowRead {
    fn features(&self) -> Features {
        self.memory.features()
    }

    async fn length(&self) -> io::Result<u64> {
        self.memory.length().await
    }

    async fn read(&self, offset: u64, buf: IoBufMut<'_>) -> io::Result<()> {
        if self.state.armed.swap(false, Ordering::SeqCst) {
            self.state.set(At::Waiting);
            self.state.wait_for(At::GoesOn);
        }
        self.memory.read(offset, buf).await
    }

    async fn write(&self, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
        self.memory.write(offset, buf).await
    }

    async fn flush(&self) -> io::Result<()> {
        if self.state.flushes.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.state.set(At::GoesOn);
            self.state.wait_for(At::Ended);
        }
        Ok(())
    }

    async fn truncate(&self, length: u64) -> io::Result<()> {
        self.memory.truncate(length).await
    }
}
