//! imago with futures, on a runtime of one thread.

use std::future::Future;
use std::io;

use bench_work::Disk;
use bench_work::disk::Shared;
use bench_work::protocol::Opening;
use bench_work::serve::serve;
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate, StorageOpenOptions};

struct Image(FormatAccess<File>);

/// Opening does not wait for anything: the file's calls block.
fn open(opening: &Opening) -> io::Result<Image> {
    let image = Qcow2::<File>::builder_path(&opening.path)
        .storage_open_options(StorageOpenOptions::new().direct(opening.direct))
        .write(true)
        .open(PermissiveImplicitOpenGate::default());
    Ok(Image(FormatAccess::new(pollster::block_on(image)?)))
}

impl Disk for Image {
    fn block_on<T>(future: impl Future<Output = T>) -> T {
        match tokio::runtime::Builder::new_current_thread().build() {
            Ok(runtime) => runtime.block_on(future),
            Err(error) => panic!("no runtime: {error}"),
        }
    }

    #[inline]
    async fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read(buffer, offset).await
    }

    #[inline]
    async fn write(&self, buffer: &[u8], offset: u64) -> io::Result<()> {
        self.0.write(buffer, offset).await
    }

    /// To the disk, as the others' flush; imago's own `flush` empties its caches only.
    async fn flush(&self) -> io::Result<()> {
        self.0.flush().await?;
        self.0.sync().await
    }

    #[inline]
    async fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.0.discard_to_zero(offset, length).await
    }

    async fn close(self) -> io::Result<()> {
        self.0.flush().await
    }
}

fn main() -> io::Result<()> {
    serve(&Shared::new(open))
}
