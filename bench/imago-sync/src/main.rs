//! imago without futures.

use std::io;

use bench_work::Disk;
use bench_work::disk::Shared;
use bench_work::protocol::Opening;
use bench_work::serve::serve;
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate, StorageOpenOptions};

struct Image(FormatAccess<File>);

fn open(opening: &Opening) -> io::Result<Image> {
    let image = Qcow2::<File>::builder_path(&opening.path)
        .storage_open_options(StorageOpenOptions::new().direct(opening.direct))
        .write(true)
        .open(PermissiveImplicitOpenGate::default())?;
    Ok(Image(FormatAccess::new(image)))
}

impl Disk for Image {
    #[inline]
    async fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read(buffer, offset)
    }

    #[inline]
    async fn write(&self, buffer: &[u8], offset: u64) -> io::Result<()> {
        self.0.write(buffer, offset)
    }

    /// To the disk, as the others' flush; imago's own `flush` empties its caches only.
    async fn flush(&self) -> io::Result<()> {
        self.0.flush()?;
        self.0.sync()
    }

    #[inline]
    async fn discard(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.0.discard_to_zero(offset, length)
    }

    async fn close(self) -> io::Result<()> {
        self.0.flush()
    }
}

fn main() -> io::Result<()> {
    serve(&Shared::new(open))
}
