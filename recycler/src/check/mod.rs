//! Consistency check and repair.

use crate::device::BlockDevice;
use crate::error::Result;

/// What a check may repair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: only look.
    #[default]
    No,
    /// Leaked clusters.
    Leaks,
    /// Everything that can be repaired without a risk to guest data.
    All,
}

/// What a check found. Counts are of clusters or entries, as each field says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Errors that may lose data: refcounts too low, references outside the file, overlaps, bad entries.
    pub corruptions: u64,
    /// Clusters counted more often than they are referred to.
    pub leaks: u64,
    /// Of `corruptions`, how many were repaired.
    pub corruptions_fixed: u64,
    /// Of `leaks`, how many were repaired.
    pub leaks_fixed: u64,
    /// Guest clusters that are allocated in the file.
    pub allocated_clusters: u64,
    /// Guest clusters of the virtual disk.
    pub total_clusters: u64,
    /// Allocated guest clusters that do not follow their neighbour in the file.
    pub fragmented_clusters: u64,
    /// End of the last cluster in use, in bytes.
    pub image_end_offset: u64,
    /// The first findings in words, at most [`CheckReport::MAX_MESSAGES`].
    pub messages: Vec<String>,
}

impl CheckReport {
    /// How many findings are put in words.
    pub const MAX_MESSAGES: usize = 100;

    /// Whether nothing is wrong, or everything wrong was repaired.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.corruptions == self.corruptions_fixed && self.leaks == self.leaks_fixed
    }
}

/// Checks the image on `device`, which nobody may be using, and repairs what `repair` allows.
///
/// # Errors
/// When the device fails, or the header does not let the image be opened at all; findings are not errors.
pub async fn check<D: BlockDevice>(device: &D, repair: Repair) -> Result<CheckReport> {
    let _ = (device, repair);
    Err(crate::Error::unsupported("check"))
}
