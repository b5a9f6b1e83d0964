//! Compressing what the disk holds, while guests go on: a move of each cluster into compressed form.
//!
//! Durable steps of a batch: the compressed data and its counts → **flush** → the entries → the next flush → the sources are
//! uncounted. Cut before the first flush: every entry names the old cluster, and what was written is a leak. Cut after: each
//! names the one or the other, and both hold the same, since a guest's write in between cancels the move, as it does any.

use super::compact::Progress;
use super::pacing::Pacer;
use crate::buf::{IoBuf, IoBufMut};
use crate::clusters::moves::{Move, Reference};
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::l2::{self, Mapping};
use crate::image::Image;
use crate::image::compress::Placed;
use crate::units::{GuestCluster, HostCluster};

/// A batch holds so many bytes of the disk.
const BATCH_BYTES: u64 = 4 << 20;

/// What a compression did. Counts are in bytes of the disk, whole clusters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CompressReport {
    /// Looked at: stored plainly before, and the disk's alone.
    pub considered: u64,
    /// Compressed now.
    pub compressed: u64,
}

/// No move is active any more, whatever happens.
struct Published<'a, D: BlockDevice>(&'a Image<D>);

impl<D: BlockDevice> Drop for Published<'_, D> {
    fn drop(&mut self) {
        self.0.moves.withdraw_all();
    }
}

/// Compresses every cluster of the disk that is stored plainly, is not shared with a snapshot, and gets smaller by that. For
/// data that is seldom written: what a guest writes to afterwards is stored plainly again. Nothing moves and the file is not
/// cut: [compact](super::compact()) afterwards. Clusters count in `progress`, which cancels the rest by returning `false`.
///
/// Waits while the recycler erases or compacts. Needs tokio's timers.
///
/// # Errors
/// [`Error::Cancelled`], [`Error::ReadOnly`], [`Error::Closed`]; [`Error::Unsupported`] where refcounts are of one bit,
/// the data is in an external data file, or it is encrypted; [`Error::Io`] and [`Error::Invalid`] as they come: the image
/// is consistent, and this can be asked for again.
pub async fn compress<D: BlockDevice>(
    image: &Image<D>,
    progress: &mut (dyn FnMut(Progress) -> bool + Send),
) -> Result<CompressReport> {
    image.ensure_writable()?;
    let geometry = image.meta.geometry;
    if image.meta.external {
        return Err(Error::unsupported("compressed clusters in an image with an external data file"));
    }
    if image.encryption.is_on() {
        return Err(Error::unsupported("compressed clusters in an encrypted image"));
    }
    if geometry.refcount_max() == 1 {
        return Err(Error::unsupported("compressed clusters with refcounts of one bit: no two could share a cluster"));
    }
    let mut turn = Some(image.recycler_turn().await?);
    let mut pacer = Pacer::new(image.options.rate_limit, &image.epochs);
    let mut report = CompressReport::default();
    let mut words = Vec::new();
    let total = geometry.clusters_for(image.virtual_size());
    for l1_index in 0..image.meta.l1.len() {
        let Some(table) = image.meta.l1.get(l1_index, &image.volume)?.filter(|t| t.copied) else { continue };
        image.meta.l2.survey(&image.volume, table.host, l1_index, &mut words).await?;
        let first = l1_index * geometry.l2_entries();
        let plain: Vec<(GuestCluster, HostCluster)> = (first..)
            .zip(l2::entries(&words, geometry))
            .filter_map(|(guest, entry)| match Mapping::of(entry, image.meta.version, geometry) {
                Ok(Mapping::Data { host, copied: true }) => Some((GuestCluster(guest), geometry.host_cluster(host))),
                _ => None,
            })
            .collect();
        for batch in plain.chunks((BATCH_BYTES >> geometry.cluster_bits).max(1) as usize) {
            let done = batch.first().map_or(first, |b| b.0.0);
            if !progress(Progress { done, total, file_size: image.file_size() }) {
                image.leave_room().await;
                return Err(Error::Cancelled);
            }
            // Between batches nothing is half done: whoever waits for the turn goes first.
            drop(turn.take());
            turn = Some(image.recycler_turn().await?);
            report.considered += (batch.len() as u64) << geometry.cluster_bits;
            report.compressed += compress_batch(image, batch, &mut pacer).await? << geometry.cluster_bits;
        }
    }
    image.leave_room().await;
    image.commit().await?;
    let _ = progress(Progress { done: total, total, file_size: image.file_size() });
    Ok(report)
}

/// Returns how many clusters are compressed now.
async fn compress_batch<D: BlockDevice>(
    image: &Image<D>,
    batch: &[(GuestCluster, HostCluster)],
    pacer: &mut Pacer<'_>,
) -> Result<u64> {
    let geometry = image.meta.geometry;
    image.prepare_changes().await?;
    let moves: Vec<Move> =
        batch.iter().map(|&(guest, src)| Move { src, dst: src, reference: Reference::L2Entry(guest) }).collect();
    let published = Published(image);
    image.moves.publish(&moves);
    // Writers that looked a source up before the moves were published may still be writing to it.
    image.epochs.grace().await;
    pacer.expose();
    let mut packed: Vec<(GuestCluster, HostCluster, Placed<'_>)> = Vec::new();
    for &(guest, src) in batch.iter().filter(|(_, src)| !image.moves.is_cancelled(*src)) {
        pacer.spend(geometry.cluster_size()).await;
        let mut cluster = vec![0; geometry.cluster_size() as usize];
        let at = geometry.host_offset(src).0;
        image.volume.read("reading a cluster to compress", at, IoBufMut::new(&mut cluster)).await?;
        if let Some(bytes) = image.compressed(&cluster) {
            let placed = image.place_packed(bytes.len() as u64).await?;
            image.volume.write("writing compressed data", placed.offset, IoBuf::new(&bytes)).await?;
            packed.push((guest, src, placed));
        }
    }
    // The data and its counts are durable after this.
    image.commit().await?;
    let mut count = 0;
    for (guest, src, placed) in packed {
        if image.name_packed(guest, src, &placed).await? {
            // No await since: one that is dropped must not uncount what is named.
            placed.linked();
            count += 1;
        }
    }
    drop(published);
    pacer.repay().await;
    Ok(count)
}
