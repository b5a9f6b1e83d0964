//! Giving the space of Junk back to the host, where it stays in the file.
//!
//! Nothing refers to Junk, durably, and no request uses it: cut before or after a hole is durable, nobody looks there.
//! While a cluster is being punched it is in Roots, so it is not handed out, moved into or cut off meanwhile.

use super::pacing::Pacer;
use crate::clusters::Clusters;
use crate::clusters::set::ClusterSet;
use crate::device::BlockDevice;
use crate::device::steps::Steps;
use crate::error::Result;
use crate::image::Image;
use crate::options::LogLevel;

/// Clusters taken out of Junk, into Roots: back in Junk when this is dropped.
struct Taken<'a> {
    clusters: &'a Clusters,
    set: ClusterSet,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        let mut states = self.clusters.lock();
        states.roots.remove_all(&self.set);
        states.junk.add_all(&self.set);
    }
}

/// Punches holes where about `bytes` of Junk still take space.
pub(super) async fn punch<D: BlockDevice>(image: &Image<D>, bytes: u64, pacer: &mut Pacer<'_>) -> Result<()> {
    let _turn = image.recycler_turn().await?;
    punch_from(image, 0, bytes, pacer).await
}

/// The same, from cluster `from` on. The caller has the compaction's turn.
pub(super) async fn punch_from<D: BlockDevice>(
    image: &Image<D>,
    from: u64,
    bytes: u64,
    pacer: &mut Pacer<'_>,
) -> Result<()> {
    let bits = image.meta.geometry.cluster_bits;
    let taken = {
        // Only who has the refcounts takes from Junk.
        let _refcounts = image.meta.refcounts.lock().await;
        let set = image.clusters.lock().take_occupied(from, bytes >> bits);
        Taken { clusters: &image.clusters, set }
    };
    if taken.set.is_empty() {
        return Ok(());
    }
    image.logger().log(LogLevel::Debug, || {
        format!("{}: giving the space of {} bytes back", image.options.id, taken.set.len() << bits)
    });
    let mut steps = Steps::default();
    for run in taken.set.runs() {
        let (mut at, end) = (run.start << bits, run.end << bits);
        while at < end {
            let most = (end - at).min(steps.size(image.epochs.quiet()));
            pacer.spend(most).await;
            // Guests may have come back meanwhile.
            let piece = most.min(steps.size(image.epochs.quiet()));
            steps.take(piece, image.volume.punch(at, piece)).await?;
            at += piece;
        }
    }
    Ok(())
}
