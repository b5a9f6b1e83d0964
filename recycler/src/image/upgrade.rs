//! From version 2 of the format to version 3.

use super::Image;
use super::open::{read_header, read_snapshots};
use crate::buf::{IoBuf, IoBufMut};
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::upgrade as format;
use crate::options::{BackingPolicy, DataFilePolicy, Options};

/// Makes an image of version 2 one of version 3, as `qemu-img amend -o compat=1.1` does; nobody may be using it. An image of
/// version 3 stays as it is. Leaked clusters are reclaimed first.
///
/// # Errors
/// [`Error::Unsupported`] if the header has no room for it, or a snapshot was taken by a QEMU so old that it did not record
/// what version 3 demands; as [`Image::open`] otherwise. The image has not changed its version then.
pub async fn upgrade<D: BlockDevice>(device: D, options: &Options) -> Result<()> {
    // No contents are needed. Opening an image of version 2 for writing, and closing it, leaves nothing leaked: version 3
    // would not look for that again.
    let own =
        Options { backing: BackingPolicy::Skip, data_file: DataFilePolicy::Skip, read_only: false, ..options.clone() };
    let image = Image::open(device, own).await?;
    image.close().await?;
    if image.meta.version == 2 { image.become_version_3().await } else { Ok(()) }
}

impl<D: BlockDevice> Image<D> {
    async fn become_version_3(&self) -> Result<()> {
        let (header, _) = read_header(&self.volume).await?;
        let (snapshots, _) = read_snapshots(&self.volume, &header).await?;
        if snapshots.iter().any(|s| s.virtual_size.is_none()) {
            let what = "upgrading an image with a snapshot that does not record the size of its disk";
            return Err(Error::unsupported(what));
        }
        let mut cluster = vec![0; header.geometry.cluster_size() as usize];
        self.volume.read("reading the header", 0, IoBufMut::new(&mut cluster)).await?;
        let new = format::upgrade(&cluster)?;
        if let Some((at, name)) = &new.name {
            // Cut before the flush: nothing refers to the copy. Cut after: whichever header there is names a whole name.
            self.volume.write("writing the backing file's name", *at, IoBuf::new(name)).await?;
            self.volume.flush().await?;
        }
        // One sector: the image is version 2 or version 3, and valid either way, since its tables mean the same in both.
        self.volume.write("writing the header", 0, IoBuf::new(&new.sector)).await?;
        self.volume.flush().await
    }
}
