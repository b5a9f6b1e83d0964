//! What a contender must be able to do.

use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex, Weak};

use serde_json::Value;

use crate::buffer::Buffer;
use crate::protocol::{Extra, Opening, Work};

/// An open virtual disk. Its calls are `async` so that one loop serves all; those of a synchronous library are ready at
/// once, and the compiler leaves nothing of the future.
#[allow(async_fn_in_trait)]
pub trait Disk: Sized {
    /// Runs the loop in whatever the library needs around it.
    fn block_on<T>(future: impl Future<Output = T>) -> T {
        pollster::block_on(future)
    }

    async fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;
    async fn write(&self, buffer: &[u8], offset: u64) -> io::Result<()>;
    async fn flush(&self) -> io::Result<()>;
    async fn discard(&mut self, offset: u64, length: u64) -> io::Result<()>;

    /// `work.depth` operations at once by a queue of the disk's own; `None`: it has none, and futures are joined.
    /// Called to warm up, too.
    fn queue(&self, _work: &Work, _offsets: &[u64], _buffers: &mut [Buffer]) -> Option<io::Result<()>> {
        None
    }

    fn extra(&mut self, extra: &Extra) -> io::Result<Value> {
        Err(io::Error::other(format!("this contender has no {extra:?}")))
    }

    async fn close(self) -> io::Result<()>;
}

/// How a thread gets its disk.
pub trait Open: Sync {
    type Disk: Disk;

    /// Called on the thread that will use the disk, inside its `block_on`.
    #[allow(async_fn_in_trait)]
    async fn open(&self, opening: &Opening) -> io::Result<Self::Disk>;
}

/// One disk that all threads use.
pub struct Shared<D> {
    open: fn(&Opening) -> io::Result<D>,
    disk: Mutex<Weak<D>>,
}

impl<D> Shared<D> {
    pub fn new(open: fn(&Opening) -> io::Result<D>) -> Self {
        Self { open, disk: Mutex::new(Weak::new()) }
    }
}

impl<D: Disk + Send + Sync> Open for Shared<D> {
    type Disk = Arc<D>;

    async fn open(&self, opening: &Opening) -> io::Result<Arc<D>> {
        let mut shared = self.disk.lock().map_err(|_| io::Error::other("another thread failed to open"))?;
        if let Some(disk) = shared.upgrade() {
            return Ok(disk);
        }
        let disk = Arc::new((self.open)(opening)?);
        if opening.threads > 1 {
            *shared = Arc::downgrade(&disk);
        }
        Ok(disk)
    }
}

impl<D: Disk> Disk for Arc<D> {
    fn block_on<T>(future: impl Future<Output = T>) -> T {
        D::block_on(future)
    }

    #[inline]
    async fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        D::read(self, buffer, offset).await
    }

    #[inline]
    async fn write(&self, buffer: &[u8], offset: u64) -> io::Result<()> {
        D::write(self, buffer, offset).await
    }

    async fn flush(&self) -> io::Result<()> {
        D::flush(self).await
    }

    #[inline]
    async fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        match Arc::get_mut(self) {
            Some(disk) => disk.discard(offset, length).await,
            None => Err(io::Error::other("discards are measured on one thread")),
        }
    }

    fn queue(&self, work: &Work, offsets: &[u64], buffers: &mut [Buffer]) -> Option<io::Result<()>> {
        D::queue(self, work, offsets, buffers)
    }

    fn extra(&mut self, extra: &Extra) -> io::Result<Value> {
        match Arc::get_mut(self) {
            Some(disk) => disk.extra(extra),
            None => Err(io::Error::other("extras are for one thread")),
        }
    }

    async fn close(self) -> io::Result<()> {
        match Arc::into_inner(self) {
            Some(disk) => disk.close().await,
            None => Ok(()),
        }
    }
}
