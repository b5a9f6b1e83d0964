//! Finding who refers to the clusters near the end of the file.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::Clusters;
use super::moves::Reference;
use crate::device::BlockDevice;
use crate::device::volume::Volume;
use crate::error::Result;
use crate::format::l2::Mapping;
use crate::metadata::Metadata;
use crate::units::{GuestCluster, HostCluster};

/// Movable clusters, each with the one place that refers to it.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    /// In descending order of clusters.
    pub(crate) found: Vec<(HostCluster, Reference)>,
    /// If not everything fitted: only clusters from here on are in `found`.
    pub(crate) complete_from: u64,
}

/// Finds the clusters at or above `floor` that exactly one reference of the active tables names: at most `max` of them,
/// the highest.
///
/// Guests go on meanwhile, so what is found is a proposal, to be checked again when a move is committed.
pub(crate) async fn scan<D: BlockDevice>(volume: &Volume<D>, meta: &Metadata, floor: u64, max: usize) -> Result<Scan> {
    let geometry = meta.geometry;
    let mut highest = BinaryHeap::new();
    let mut dropped = floor;
    let mut offer = |host: HostCluster, reference: Reference| {
        if host.0 >= floor {
            highest.push(Reverse((host, reference)));
            if highest.len() > max
                && let Some(Reverse((lowest, _))) = highest.pop()
            {
                dropped = dropped.max(lowest.0 + 1);
            }
        }
    };
    {
        let refcounts = meta.refcounts.lock().await;
        for (index, block) in refcounts.blocks() {
            offer(geometry.host_cluster(block), Reference::RefcountTable(index));
        }
    }
    let per_table = geometry.entries_per_cluster();
    let mut entries = Vec::new();
    for l1_index in 0..meta.l1.len() {
        let Some(table) = meta.l1.get(l1_index, volume.length())? else { continue };
        if !table.copied {
            continue;
        }
        offer(geometry.host_cluster(table.host), Reference::L1Entry(l1_index));
        meta.l2.survey(volume, table.host, l1_index, &mut entries).await?;
        for (i, &entry) in entries.iter().enumerate() {
            if entry == 0 {
                continue;
            }
            let host = match Mapping::decode(entry, meta.version, geometry.cluster_size()) {
                Ok(Mapping::Data { host, copied: true }) => host,
                Ok(Mapping::Zero { preallocated: Some((host, true)) }) => host,
                _ => continue,
            };
            offer(geometry.host_cluster(host), Reference::L2Entry(GuestCluster(l1_index * per_table + i as u64)));
        }
        // A scan of a large image must not keep other work from this thread.
        tokio::task::yield_now().await;
    }
    let found = highest.into_sorted_vec().into_iter().map(|Reverse(x)| x).collect();
    Ok(Scan { found, complete_from: dropped })
}

/// Puts the clusters that were free when the image was opened into Junk: those with a refcount of 0.
///
/// Whoever counts or releases clusters holds the refcounts, as this does block by block, so a cluster with a count of 0
/// that is not in Junk was free from the start.
pub(crate) async fn find_junk<D: BlockDevice>(volume: &Volume<D>, meta: &Metadata, clusters: &Clusters) -> Result<()> {
    if clusters.lock().junk_is_complete {
        return Ok(());
    }
    let mut index = 0;
    loop {
        let mut refcounts = meta.refcounts.lock().await;
        let end = clusters.lock().end;
        if index * meta.geometry.refcounts_per_block() >= end {
            clusters.lock().junk_is_complete = true;
            return Ok(());
        }
        let free = refcounts.free_in_block(volume, index, end).await?;
        {
            let mut states = clusters.lock();
            free.into_iter().for_each(|run| states.junk.insert_range(run));
        }
        drop(refcounts);
        index += 1;
        // A scan of a large image must not keep other work from this thread.
        tokio::task::yield_now().await;
    }
}
