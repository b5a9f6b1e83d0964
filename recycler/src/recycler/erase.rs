//! Erasing: from Junk to the pool.

use super::pacing::Pacer;
use crate::device::BlockDevice;
use crate::device::steps::Steps;
use crate::error::Result;
use crate::image::Image;
use crate::image::relocate::Purpose;
use crate::sync::atomic::Ordering;

/// Overwrites up to `bytes` of Junk with zeroes: Junk → Roots → Erased. The next flush makes it Available. Returns how many
/// bytes it were.
pub(super) async fn erase<D: BlockDevice>(image: &Image<D>, bytes: u64, pacer: &mut Pacer<'_>) -> Result<u64> {
    let _turn = image.recycler_turn().await?;
    let bits = image.meta.geometry.cluster_bits;
    let mut holes = image.take_holes(bytes >> bits, u64::MAX, Purpose::Erase).await?;
    let mut erased = 0;
    let runs: Vec<_> = holes.set.runs().collect();
    let mut steps = Steps::default();
    for mut run in runs {
        while !run.is_empty() {
            let mut end = || run.end.min(run.start + (steps.size(image.epochs.quiet()) >> bits).max(1));
            let most = end();
            pacer.spend((most - run.start) << bits).await;
            // Guests may have come back meanwhile.
            let piece = run.start..most.min(end());
            let length = (piece.end - piece.start) << bits;
            steps.take(length, image.volume.erase(piece.start << bits, length)).await?;
            run.start = piece.end;
            holes.erased(piece);
            erased += length;
            image.counters.erased_bytes.fetch_add(length, Ordering::Relaxed);
        }
    }
    Ok(erased)
}
