//! Finding who refers to the clusters near the end of the file.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::Clusters;
use super::moves::Reference;
use super::set::ClusterSet;
use crate::device::BlockDevice;
use crate::device::volume::Volume;
use crate::error::Result;
use crate::format::l2::{self, Mapping};
use crate::metadata::Metadata;
use crate::units::{GuestCluster, HostCluster};

/// Movable clusters, each with the one place that refers to it.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    /// In descending order of clusters.
    pub(crate) found: Vec<(HostCluster, Reference)>,
    /// If not everything fitted: only clusters from here on are in `found`.
    pub(crate) complete_from: u64,
    /// Clusters left out because the image's references or counts contradict each other.
    pub(crate) doubtful: u64,
}

/// Finds the clusters at or above `floor` that exactly one reference of the active tables names: at most `max` of them,
/// the highest. A damaged image may refer to one cluster twice, or to a free one: such clusters are left out, so that they stay
/// where they are, and taken out of Junk.
///
/// Guests go on meanwhile, so what is found is a proposal, to be checked again when a move is committed.
pub(crate) async fn scan<D: BlockDevice>(
    volume: &Volume<D>,
    meta: &Metadata,
    clusters: &Clusters,
    floor: u64,
    max: usize,
) -> Result<Scan> {
    let geometry = meta.geometry;
    let mut search =
        Search { floor, max, highest: BinaryHeap::new(), complete_from: floor, shared: ClusterSet::default() };
    {
        let refcounts = meta.refcounts.lock().await;
        for (index, block) in refcounts.blocks() {
            search.offer(geometry.host_cluster(block), Reference::RefcountTable(index));
        }
    }
    let per_table = geometry.entries_per_cluster();
    let mut entries = Vec::new();
    for l1_index in 0..meta.l1.len() {
        let Some(table) = meta.l1.get(l1_index, volume.length())? else { continue };
        if !table.copied {
            search.share(geometry.host_cluster(table.host), 1);
            continue;
        }
        search.offer(geometry.host_cluster(table.host), Reference::L1Entry(l1_index));
        meta.l2.survey(volume, table.host, l1_index, &mut entries).await?;
        for (i, &entry) in entries.iter().enumerate() {
            if entry == 0 {
                continue;
            }
            match Mapping::decode(entry, meta.version, geometry.cluster_size()) {
                Ok(Mapping::Data { host, copied } | Mapping::Zero { preallocated: Some((host, copied)) }) => {
                    let host = geometry.host_cluster(host);
                    if copied {
                        search.offer(host, Reference::L2Entry(GuestCluster(l1_index * per_table + i as u64)));
                    } else {
                        search.share(host, 1);
                    }
                }
                Ok(Mapping::Compressed { descriptor }) => {
                    let (first, count) = l2::compressed_clusters(descriptor, geometry);
                    search.share(first, count);
                }
                _ => {}
            }
        }
        // A scan of a large image must not keep other work from this thread.
        tokio::task::yield_now().await;
    }
    let (all, shared, complete_from) = search.into_found();
    let mut scan = Scan { found: Vec::with_capacity(all.len()), complete_from, doubtful: 0 };
    for same in all.chunk_by(|a, b| a.0 == b.0) {
        let Some(&(host, _)) = same.first() else { continue };
        if shared.contains(host) {
            continue;
        }
        if same.len() == 1 && !clusters.lock().junk.contains(host) {
            scan.found.extend_from_slice(same);
            continue;
        }
        // Guests went on meanwhile: a cluster may have been freed, and given to another, since it was found. Look again.
        let mut live = Vec::new();
        let mut contradiction = false;
        for &found in same {
            let (named, is_junk) = names(volume, meta, clusters, found).await?;
            contradiction |= is_junk;
            if named {
                live.push(found);
            }
        }
        if contradiction {
            // Free by its count, and in use: nobody may overwrite it.
            clusters.lock().junk.remove(host);
        }
        match live[..] {
            [one] if !contradiction => scan.found.push(one),
            [] => {}
            _ => scan.doubtful += 1,
        }
    }
    Ok(scan)
}

struct Search {
    floor: u64,
    max: usize,
    highest: BinaryHeap<Reverse<(HostCluster, Reference)>>,
    complete_from: u64,
    /// Clusters with a reference that does not claim to be the only one.
    shared: ClusterSet,
}

impl Search {
    /// A reference that claims to be the only one.
    fn offer(&mut self, host: HostCluster, reference: Reference) {
        if host.0 >= self.floor {
            self.highest.push(Reverse((host, reference)));
            if self.highest.len() > self.max
                && let Some(Reverse((lowest, _))) = self.highest.pop()
            {
                self.complete_from = self.complete_from.max(lowest.0 + 1);
            }
        }
    }

    /// References that do not.
    fn share(&mut self, first: HostCluster, count: u64) {
        self.shared.insert_range(first.0.max(self.floor)..(first.0 + count).max(self.floor));
    }

    /// What was found, in descending order of clusters.
    fn into_found(self) -> (Vec<(HostCluster, Reference)>, ClusterSet, u64) {
        let found = self.highest.into_sorted_vec().into_iter().map(|Reverse(x)| x).collect();
        (found, self.shared, self.complete_from)
    }
}

/// Whether a reference names the cluster at this moment, and whether the cluster is Junk at the same moment: in a sound image
/// it never is both.
async fn names<D: BlockDevice>(
    volume: &Volume<D>,
    meta: &Metadata,
    clusters: &Clusters,
    (host, reference): (HostCluster, Reference),
) -> Result<(bool, bool)> {
    let is_junk = || clusters.lock().junk.contains(host);
    let geometry = meta.geometry;
    match reference {
        Reference::L2Entry(guest) => {
            let Some((slice, index)) = meta.l2.slice(volume, &meta.l1, guest).await? else { return Ok((false, false)) };
            let entries = slice.read();
            let named = match Mapping::decode(entries.get(index), meta.version, geometry.cluster_size()) {
                Ok(Mapping::Data { host: h, .. } | Mapping::Zero { preallocated: Some((h, _)) }) => {
                    geometry.host_cluster(h) == host
                }
                _ => false,
            };
            Ok((named, named && is_junk()))
        }
        Reference::L1Entry(index) => {
            let named = meta.l1.get(index, volume.length())?.is_some_and(|t| geometry.host_cluster(t.host) == host);
            Ok((named, false))
        }
        Reference::RefcountTable(index) => {
            let block = meta.refcounts.lock().await.block(index)?;
            Ok((block.is_some_and(|b| geometry.host_cluster(b) == host), false))
        }
    }
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
        // Where the file does not reach, a cluster that is not counted is not there to be used.
        let end = clusters.lock().end.min(meta.geometry.clusters_for(volume.length()));
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
