//! The worker that keeps the file small.
use std::sync::Arc;

use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::image::Image;

/// How far a compaction is. Sizes are in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Clusters handled so far: moved, or found in use by the guest and left.
    pub done: u64,
    /// Clusters that the plan moves in all.
    pub total: u64,
    /// Length of the file now.
    pub file_size: u64,
}

/// What a compaction did. Sizes are in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CompactReport {
    /// Length of the file before.
    pub file_size_before: u64,
    /// Length of the file after. On a device that cannot be resized, the length it could be cut to.
    pub file_size_after: u64,
    /// Bytes of clusters moved.
    pub moved: u64,
    /// Moves that a guest write or discard cancelled.
    pub cancelled: u64,
}

/// The remote control of a running recycler; clones control the same one.
#[derive(Clone, Debug)]
pub struct Control;

#[allow(missing_docs)]
impl Control {
    pub fn new() -> Self { Control }
    pub fn pause(&self) {}
    pub fn resume(&self) {}
    pub fn stop(&self) {}
    pub fn is_running(&self) -> bool { false }
}

/// The recycler's life: works until [`Control::stop`].
pub async fn run<D: BlockDevice>(_image: Arc<Image<D>>, _control: Control) {}

/// Compacts the image now, while guests go on.
pub async fn compact<D: BlockDevice>(_image: &Image<D>, _progress: &mut (dyn FnMut(Progress) -> bool + Send)) -> Result<CompactReport> {
    Err(Error::unsupported("compact"))
}
