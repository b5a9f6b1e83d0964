//! Making new images.

use crate::device::BlockDevice;
use crate::error::{Error, Result};

/// What a new image is to be like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size of the virtual disk in bytes, a multiple of 512.
    pub virtual_size: u64,
    /// Cluster size in bytes, a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Width of a refcount in bits: 1, 2, 4, 8, 16, 32 or 64; 16 for version 2.
    pub refcount_bits: u32,
    /// 2 or 3.
    pub version: u32,
    /// Let refcounts go stale while the image is open (version 3 only).
    pub lazy_refcounts: bool,
    /// Name and format of a backing file.
    pub backing: Option<(String, String)>,
}

impl CreateOptions {
    /// QEMU's defaults for a disk of `virtual_size` bytes.
    #[must_use]
    pub fn new(virtual_size: u64) -> Self {
        CreateOptions { virtual_size, cluster_size: 65536, refcount_bits: 16, version: 3, lazy_refcounts: false, backing: None }
    }
}

/// Writes an empty image to `device`, whatever it held before, and flushes it.
///
/// # Errors
/// [`Error::BadOption`] names the unusable option; [`Error::Unsupported`] if the device is too short and cannot grow.
pub async fn create<D: BlockDevice>(device: &D, options: &CreateOptions) -> Result<()> {
    let _ = (device, options);
    Err(Error::unsupported("create"))
}
