//! `bench-qcow2-rs sync` and `bench-qcow2-rs uring`. A device of qcow2-rs cannot be shared: each thread has its own.

use std::future::Future;
use std::io;
use std::path::Path;

use bench_work::protocol::Opening;
use bench_work::serve::serve;
use bench_work::{Disk, Open};
use qcow2_rs::dev::{Qcow2Dev, Qcow2DevParams};
use qcow2_rs::error::Qcow2Error;
use qcow2_rs::ops::Qcow2IoOps;
use qcow2_rs::sync_io::Qcow2IoSync;
use qcow2_rs::uring::Qcow2IoUring;
use qcow2_rs::utils::{qcow2_setup_dev_sync, qcow2_setup_dev_uring};

/// Sectors of 512 bytes, caches of the sizes that qcow2-rs itself chooses.
fn parameters(opening: &Opening) -> Qcow2DevParams {
    Qcow2DevParams::new(9, None, None, false, opening.direct)
}

fn failed(error: Qcow2Error) -> io::Error {
    io::Error::other(format!("{error:?}"))
}

async fn flush<T: Qcow2IoOps>(device: &Qcow2Dev<T>) -> io::Result<()> {
    device.flush_meta().await.map_err(failed)?;
    let size = device.info.virtual_size() as usize;
    device.fsync_range(0, size).await.map_err(failed)
}

macro_rules! contender {
    ($name:ident, $io:ty, $runtime:item) => {
        struct $name(Qcow2Dev<$io>);

        impl Disk for $name {
            $runtime

            #[inline]
            async fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
                self.0.read_at(buffer, offset).await.map(drop).map_err(failed)
            }

            #[inline]
            async fn write(&self, buffer: &[u8], offset: u64) -> io::Result<()> {
                self.0.write_at(buffer, offset).await.map_err(failed)
            }

            async fn flush(&self) -> io::Result<()> {
                flush(&self.0).await
            }

            async fn discard(&mut self, _offset: u64, _length: u64) -> io::Result<()> {
                Err(io::Error::other("qcow2-rs has no discard"))
            }

            async fn close(self) -> io::Result<()> {
                self.0.flush_meta().await.map_err(failed)
            }
        }
    };
}

contender!(
    Sync,
    Qcow2IoSync,
    fn block_on<T>(future: impl Future<Output = T>) -> T {
        pollster::block_on(future)
    }
);
contender!(
    Uring,
    Qcow2IoUring,
    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio_uring::start(future)
    }
);

struct OpenSync;

impl Open for OpenSync {
    type Disk = Sync;

    async fn open(&self, opening: &Opening) -> io::Result<Sync> {
        let device = qcow2_setup_dev_sync(Path::new(&opening.path), &parameters(opening)).map_err(failed)?;
        device.qcow2_prep_io().await.map_err(failed)?;
        Ok(Sync(device))
    }
}

struct OpenUring;

impl Open for OpenUring {
    type Disk = Uring;

    async fn open(&self, opening: &Opening) -> io::Result<Uring> {
        let device = qcow2_setup_dev_uring(Path::new(&opening.path), &parameters(opening)).await;
        Ok(Uring(device.map_err(failed)?))
    }
}

fn main() -> io::Result<()> {
    match std::env::args().nth(1).as_deref() {
        Some("sync") => serve(&OpenSync),
        Some("uring") => serve(&OpenUring),
        _ => Err(io::Error::other("which back end: sync or uring?")),
    }
}
