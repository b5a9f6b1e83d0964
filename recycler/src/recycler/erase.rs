//! Erasing: from Junk to the pool.

use std::sync::atomic::Ordering;

use super::pacing::Pacer;
use crate::clusters::set::ClusterSet;
use crate::device::BlockDevice;
use crate::error::Result;
use crate::image::Image;
use crate::image::relocate::Hole;

/// Overwrites up to `bytes` of Junk with zeroes: Junk → Roots → Erased. The next flush makes it Available.
pub(super) async fn erase<D: BlockDevice>(image: &Image<D>, bytes: u64, pacer: &mut Pacer) -> Result<()> {
    let _turn = image.compaction.lock().await;
    let bits = image.meta.geometry.cluster_bits;
    let holes = image.take_holes(bytes >> bits, u64::MAX, Hole::Erase).await?;
    let mut left = holes.clone();
    for run in holes.runs() {
        let length = (run.end - run.start) << bits;
        pacer.spend(length).await;
        if let Err(e) = image.volume.erase(run.start << bits, length).await {
            return_rest(image, &left).await;
            return Err(e);
        }
        left.remove_range(run.clone());
        let mut states = image.clusters.lock();
        states.roots.remove_range(run.clone());
        states.erased.insert_range(run);
        image.counters.erased_bytes.fetch_add(length, Ordering::Relaxed);
    }
    Ok(())
}

async fn return_rest<D: BlockDevice>(image: &Image<D>, holes: &ClusterSet) {
    if let Err(e) = image.return_holes(holes).await {
        // They stay in Roots, and are returned when the image is closed.
        image.background_error("returning clusters that were not erased", &e);
    }
}
