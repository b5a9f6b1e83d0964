//! Finding who refers to the clusters near the end of the file.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::Clusters;
use super::moves::{Place, Reference, SharedSource, SnapshotEntry};
use super::packed::Packed;
use super::set::ClusterSet;
use super::snapshots::{L1Tables, SharedTable};
use crate::device::BlockDevice;
use crate::device::volume::Volume;
use crate::error::Result;
use crate::format::l2::{self, Mapping};
use crate::metadata::Metadata;
use crate::metadata::slice::Entries as _;
use crate::units::{GuestCluster, HostCluster, HostOffset};

/// Movable clusters, with what refers to them.
#[derive(Debug, Default)]
pub(crate) struct Scan {
    /// Clusters with the one place that refers to each, in descending order of clusters.
    pub(crate) found: Vec<(HostCluster, Reference)>,
    /// Clusters that snapshots use: every reference that a snapshot has to each, in descending order of clusters.
    pub(crate) shared: Vec<SharedSource>,
    /// If not everything fitted: only clusters from here on are in `found` and `shared`.
    pub(crate) complete_from: u64,
    /// The highest clusters with compressed data, as the disk refers to it.
    pub(crate) packed: Packed,
    /// Clusters left out because the image's references or counts contradict each other, or an entry for data names a table.
    pub(crate) doubtful: u64,
}

/// How a search through the tables of a large image gives way to others.
pub(crate) trait Manners: Send {
    /// So many bytes of tables were looked at. An error ends the search, which has changed nothing.
    fn looked_at(&mut self, bytes: u64) -> impl Future<Output = Result<()>> + Send;
}

/// Somebody waits for the search, so only others on this thread get their turn.
pub(crate) struct Hurry;

impl Manners for Hurry {
    async fn looked_at(&mut self, _bytes: u64) -> Result<()> {
        tokio::task::yield_now().await;
        Ok(())
    }
}

/// What a scan looks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Clusters at or above this one.
    pub(crate) floor: u64,
    /// With so many references at most.
    pub(crate) max: usize,
    /// Whether guest data can be moved, or only tables.
    pub(crate) data_moves: bool,
}

/// Finds the clusters at or above `floor` that exactly one reference of the active tables names, or that snapshots use:
/// the highest, with at most `max` references. A damaged image may refer to one cluster twice, to a free one, or to one of its
/// own tables as if it were data: such clusters are left out, so that they stay where they are, and taken out of Junk.
///
/// Guests go on meanwhile, so what is found is a proposal, to be checked again when a move is committed.
pub(crate) async fn scan<D: BlockDevice>(
    volume: &Volume<D>,
    meta: &Metadata,
    clusters: &Clusters,
    snapshots: &mut L1Tables,
    limits: Limits,
    manners: &mut impl Manners,
) -> Result<Scan> {
    let geometry = meta.geometry;
    let Limits { floor, max, data_moves } = limits;
    let mut search = Search { floor, max, data_moves, complete_from: floor, ..Search::default() };
    {
        let refcounts = meta.refcounts.lock().await;
        for (index, block) in refcounts.blocks() {
            search.offer(geometry.host_cluster(block), Seen::Sole(Reference::RefcountTable(index)));
        }
    }
    let per_table = geometry.l2_entries();
    let mut words = Vec::new();
    for l1_index in 0..meta.l1.len().max(snapshots.len()) {
        let active = meta.l1.get(l1_index, volume)?;
        let shared = snapshots.at(volume, meta, l1_index).await?;
        if active.is_none() && shared.is_empty() {
            continue;
        }
        for table in &shared {
            let active = active.is_some_and(|t| !t.copied && t.host == table.host);
            if snapshots.is_disputed(geometry.host_cluster(table.host)) {
                search.odd_tables.insert(geometry.host_cluster(table.host));
            }
            search.snapshot_table(volume, meta, l1_index, table, active, &mut words).await?;
            manners.looked_at(geometry.cluster_size()).await?;
        }
        let Some(table) = active else { continue };
        let host = geometry.host_cluster(table.host);
        if !table.copied {
            if !shared.iter().any(|s| s.host == table.host) {
                search.share(host, 1);
            }
            continue;
        }
        search.offer(host, Seen::Sole(Reference::L1Entry(l1_index)));
        if meta.external {
            continue;
        }
        meta.l2.survey(volume, table.host, l1_index, &mut words).await?;
        for (i, entry) in l2::entries(&words, geometry).enumerate() {
            if entry.is_empty() {
                continue;
            }
            let guest = GuestCluster(l1_index * per_table + i as u64);
            let Ok(mapping) = Mapping::of(entry, meta.version, geometry) else { continue };
            if let Some((host, copied)) = mapping.host() {
                let seen =
                    if copied { Seen::Sole(Reference::L2Entry(guest)) } else { Seen::Active(Place::Data(guest)) };
                search.offer_data(geometry.host_cluster(host), seen);
            } else if let Mapping::Compressed { descriptor } = mapping {
                let (first, count) = l2::compressed_clusters(descriptor, geometry);
                search.share(first, count);
                search.packed.add(descriptor, l1_index, geometry);
            }
        }
        manners.looked_at(geometry.cluster_size()).await?;
    }
    search.judge(volume, meta, clusters).await
}

/// A reference that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Seen {
    /// It claims to be the only one.
    Sole(Reference),
    /// It does not, and stands in a table that the disk has for itself.
    Active(Place),
    /// It stands in a table that snapshots refer to.
    Snapshot(Place, SnapshotEntry),
}

#[derive(Default)]
struct Search {
    floor: u64,
    max: usize,
    data_moves: bool,
    highest: BinaryHeap<Reverse<(HostCluster, Seen)>>,
    complete_from: u64,
    /// Clusters with a reference that cannot be rewritten.
    shared: ClusterSet,
    packed: Packed,
    /// L2 tables of snapshots, and those of them that were met under two indexes, or are not L2 tables of snapshots at all: what
    /// they refer to is counted wrongly.
    tables: ClusterSet,
    odd_tables: ClusterSet,
}

impl Search {
    /// A reference to a cluster.
    fn offer(&mut self, host: HostCluster, seen: Seen) {
        if host.0 >= self.floor {
            self.highest.push(Reverse((host, seen)));
            if self.highest.len() > self.max
                && let Some(Reverse((lowest, _))) = self.highest.pop()
            {
                self.complete_from = self.complete_from.max(lowest.0 + 1);
            }
        }
    }

    /// A reference to a cluster of guest data.
    fn offer_data(&mut self, host: HostCluster, seen: Seen) {
        if self.data_moves { self.offer(host, seen) } else { self.share(host, 1) }
    }

    /// References that cannot be rewritten.
    fn share(&mut self, first: HostCluster, count: u64) {
        self.shared.insert_range(first.0.max(self.floor)..(first.0 + count).max(self.floor));
    }

    /// Looks at an L2 table that snapshots refer to; `active` says whether the disk does, too.
    async fn snapshot_table<D: BlockDevice>(
        &mut self,
        volume: &Volume<D>,
        meta: &Metadata,
        l1_index: u64,
        table: &SharedTable,
        active: bool,
        words: &mut Vec<u64>,
    ) -> Result<()> {
        let geometry = meta.geometry;
        let host = geometry.host_cluster(table.host);
        for &(at, copied) in &table.entries {
            let entry = SnapshotEntry { at, paths: 1, zero: false, copied, active };
            self.offer(host, Seen::Snapshot(Place::Table(l1_index), entry));
        }
        if !self.tables.insert(host) {
            self.odd_tables.insert(host);
            return Ok(());
        }
        super::snapshots::read_table(volume, meta, table.host, words).await?;
        for (i, entry) in l2::entries(words, geometry).enumerate() {
            if entry.is_empty() {
                continue;
            }
            let Ok(mapping) = Mapping::of(entry, meta.version, geometry) else { continue };
            if let Some((host, copied)) = mapping.host() {
                let place = Place::Data(GuestCluster(l1_index * geometry.l2_entries() + i as u64));
                let entry = SnapshotEntry {
                    at: table.host.0 + (i * geometry.l2_entry_words() * 8) as u64,
                    paths: table.entries.len() as u32,
                    zero: entry.word & l2::ZERO != 0,
                    copied,
                    active,
                };
                self.offer_data(geometry.host_cluster(host), Seen::Snapshot(place, entry));
            } else if let Mapping::Compressed { descriptor } = mapping {
                let (first, count) = l2::compressed_clusters(descriptor, geometry);
                self.share(first, count);
            }
        }
        Ok(())
    }

    /// Sorts out what can be moved.
    async fn judge<D: BlockDevice>(self, volume: &Volume<D>, meta: &Metadata, clusters: &Clusters) -> Result<Scan> {
        let all = self.highest.into_sorted_vec();
        let mut scan = Scan { complete_from: self.complete_from, packed: self.packed, ..Scan::default() };
        for same in all.chunk_by(|a, b| a.0.0 == b.0.0) {
            let Some(&Reverse((host, _))) = same.first() else { continue };
            // If not everything fitted, some of the references to this one may be missing.
            if self.shared.contains(host) || host.0 < self.complete_from {
                continue;
            }
            let seen: Vec<Seen> = same.iter().map(|Reverse((_, seen))| *seen).collect();
            let sole: Vec<Reference> =
                seen.iter().filter_map(|s| if let Seen::Sole(r) = s { Some(*r) } else { None }).collect();
            if sole.len() == seen.len() {
                scan.judge_sole(volume, meta, clusters, host, &sole).await?;
            } else if !sole.is_empty() {
                scan.doubtful += 1;
            } else {
                let odd = seen.iter().any(|s| match s {
                    Seen::Snapshot(Place::Data(_), e) => {
                        self.odd_tables.contains(meta.geometry.host_cluster(HostOffset(e.at)))
                    }
                    Seen::Snapshot(Place::Table(_), _) => self.odd_tables.contains(host),
                    _ => false,
                });
                scan.judge_shared(volume, meta, clusters, host, odd, &seen).await?;
            }
        }
        Ok(scan)
    }
}

impl Scan {
    /// A cluster whose references each claim to be the only one.
    async fn judge_sole<D: BlockDevice>(
        &mut self,
        volume: &Volume<D>,
        meta: &Metadata,
        clusters: &Clusters,
        host: HostCluster,
        references: &[Reference],
    ) -> Result<()> {
        let is_odd = match references {
            [Reference::L2Entry(_)] => is_no_data(meta, clusters, host),
            _ => clusters.lock().junk.contains(host),
        };
        if let [one] = references
            && !is_odd
        {
            self.found.push((host, *one));
            return Ok(());
        }
        // Guests went on meanwhile: a cluster may have been freed, and given to another, since it was found. Look again.
        let mut live = Vec::new();
        let mut contradiction = false;
        for &reference in references {
            let (named, is_odd) = names(volume, meta, clusters, (host, reference)).await?;
            contradiction |= is_odd;
            if named {
                live.push((host, reference));
            }
        }
        if contradiction {
            // If it is free by its count, it is in use all the same: nobody may overwrite it.
            clusters.lock().junk.remove(host);
        }
        match live[..] {
            [one] if !contradiction => self.found.push(one),
            [] => {}
            _ => self.doubtful += 1,
        }
        Ok(())
    }

    /// A cluster whose references all say that there may be others.
    async fn judge_shared<D: BlockDevice>(
        &mut self,
        volume: &Volume<D>,
        meta: &Metadata,
        clusters: &Clusters,
        host: HostCluster,
        odd: bool,
        seen: &[Seen],
    ) -> Result<()> {
        let place = |s: &Seen| match *s {
            Seen::Active(place) | Seen::Snapshot(place, _) => Some(place),
            Seen::Sole(_) => None,
        };
        let is_active = |s: &Seen| matches!(s, Seen::Active(_) | Seen::Snapshot(_, SnapshotEntry { active: true, .. }));
        let active = seen.iter().any(is_active);
        let source = |s: &Seen| match *s {
            Seen::Snapshot(place, entry) => {
                Some(SharedSource { cluster: host, place, entry: SnapshotEntry { active, ..entry } })
            }
            _ => None,
        };
        let entries: Vec<SharedSource> = seen.iter().filter_map(source).collect();
        if entries.is_empty() {
            // The disk says that somebody else uses it, and no snapshot that we see does.
            return Ok(());
        }
        // Snapshots share clusters by taking over whole tables, so the same place refers to them everywhere. A count that
        // is too low, or a second place, means damage. So does a table of the image's: what a snapshot refers to cannot have
        // become one meanwhile.
        let paths: u64 = entries.iter().map(|s| u64::from(s.entry.paths)).sum();
        let count = meta.refcounts.lock().await.count(volume, host).await?;
        let first = seen.first().and_then(place);
        let is_odd = odd || matches!(first, Some(Place::Data(_))) && is_no_data(meta, clusters, host);
        let contradiction = is_odd || seen.iter().any(|s| place(s) != first) || count < paths;
        if !contradiction && count != paths + u64::from(active) {
            // A guest has dropped the disk's reference since it was seen, or it is counted still. Or somebody whom we do not
            // know refers to the cluster: then it must stay, since its count must not become one without its flag.
            return Ok(());
        }
        if contradiction {
            clusters.lock().junk.remove(host);
            self.doubtful += 1;
        } else {
            self.shared.extend(entries);
        }
        Ok(())
    }
}

/// Whether the cluster holds nobody's data: it is one of the image's own tables, or nothing refers to it any more, or it was cut
/// off. In a sound image no L2 entry names such a cluster. To move it as data would free it where it is: a table would be lost,
/// and what is freed already would be uncounted twice, the second time at the cost of whoever has got it since.
fn is_no_data(meta: &Metadata, clusters: &Clusters, host: HostCluster) -> bool {
    // One lock after the other.
    let is_table = meta.tables.lock().contains(host);
    let states = clusters.lock();
    let is_free = host.0 >= states.end || states.any_free(&(host.0..host.0 + 1));
    let mut freed =
        [&states.unlinked, &states.committing].into_iter().chain(states.grace.iter().map(|(_, batch)| batch));
    is_table || is_free || freed.any(|batch| batch.clusters.contains(host))
}

/// Whether a reference names the cluster at this moment, and whether the cluster is [no data](is_no_data) at the same moment,
/// though the reference is that of an L2 entry: in a sound image it never is both.
async fn names<D: BlockDevice>(
    volume: &Volume<D>,
    meta: &Metadata,
    clusters: &Clusters,
    (host, reference): (HostCluster, Reference),
) -> Result<(bool, bool)> {
    let geometry = meta.geometry;
    match reference {
        Reference::L2Entry(guest) => {
            let Some((slice, index)) = meta.l2.slice(volume, &meta.l1, guest).await? else { return Ok((false, false)) };
            let entries = slice.read();
            let mapping = Mapping::of(entries.get(index), meta.version, geometry);
            let named = mapping.is_ok_and(|m| m.host().is_some_and(|(h, _)| geometry.host_cluster(h) == host));
            Ok((named, named && is_no_data(meta, clusters, host)))
        }
        Reference::L1Entry(index) => {
            let named = meta.l1.get(index, volume)?.is_some_and(|t| geometry.host_cluster(t.host) == host);
            Ok((named, false))
        }
        Reference::RefcountTable(index) => {
            let block = meta.refcounts.lock().await.block(index)?;
            Ok((block.is_some_and(|b| geometry.host_cluster(b) == host), false))
        }
    }
}

/// Puts the clusters that were free when the image was opened into Junk: those with a refcount of 0 that are none of the image's
/// own tables, and that no entry of the active tables names, nor one of a snapshot's. Returns how many a damaged image names all
/// the same: they are left alone.
///
/// Whoever counts or releases clusters holds the refcounts, as this does block by block, so a cluster with a count of 0
/// that is not in Junk was free from the start. Nobody takes such a cluster before it is in Junk, so an entry that names it
/// was there from the start, too, however guests go on meanwhile.
pub(crate) async fn find_junk<D: BlockDevice>(
    volume: &Volume<D>,
    meta: &Metadata,
    clusters: &Clusters,
    snapshots: &mut L1Tables,
    manners: &mut impl Manners,
) -> Result<u64> {
    if clusters.lock().junk_is_complete {
        return Ok(0);
    }
    let mut found = ClusterSet::default();
    let mut index = 0;
    loop {
        let mut refcounts = meta.refcounts.lock().await;
        // Where the file does not reach, a cluster that is not counted is not there to be used.
        let end = clusters.lock().end.min(meta.geometry.clusters_for(volume.length()));
        if index * meta.geometry.refcounts_per_block() >= end {
            break;
        }
        let free = refcounts.free_in_block(volume, index, end).await?;
        {
            let states = clusters.lock();
            free.into_iter().for_each(|run| found.insert_range(run));
            found.remove_all(&states.junk);
        }
        drop(refcounts);
        index += 1;
        manners.looked_at(meta.geometry.cluster_size()).await?;
    }
    let all = found.len();
    // The image's own tables, bitmaps included, are where they are, whatever their counts say.
    found.remove_all(&meta.tables.lock());
    if !found.is_empty() {
        remove_named(volume, meta, snapshots, &mut found, manners).await?;
    }
    let mut states = clusters.lock();
    states.junk.add_all(&found);
    states.junk_is_complete = true;
    Ok(all - found.len())
}

/// Removes the clusters that an entry of the active tables names, or of a snapshot's.
async fn remove_named<D: BlockDevice>(
    volume: &Volume<D>,
    meta: &Metadata,
    snapshots: &mut L1Tables,
    set: &mut ClusterSet,
    manners: &mut impl Manners,
) -> Result<()> {
    let geometry = meta.geometry;
    // A damaged L1 table may name one table as often as it has entries.
    let (mut met, mut words) = (ClusterSet::default(), Vec::new());
    let remove = |words: &[u64], set: &mut ClusterSet| {
        let named = l2::mappings(words, meta.version, geometry).filter_map(|m| m.host_clusters(geometry));
        named.for_each(|hosts| set.remove_range(hosts));
    };
    for l1_index in 0..meta.l1.len().max(snapshots.len()) {
        for table in snapshots.at(volume, meta, l1_index).await? {
            let host = geometry.host_cluster(table.host);
            if met.insert(host) {
                set.remove(host);
                super::snapshots::read_table(volume, meta, table.host, &mut words).await?;
                remove(&words, set);
                manners.looked_at(geometry.cluster_size()).await?;
            }
        }
        // An entry that cannot be is reported to the request that needs it.
        let Ok(Some(table)) = meta.l1.get(l1_index, volume) else { continue };
        set.remove(geometry.host_cluster(table.host));
        if meta.external {
            continue;
        }
        meta.l2.survey(volume, table.host, l1_index, &mut words).await?;
        remove(&words, set);
        manners.looked_at(geometry.cluster_size()).await?;
    }
    Ok(())
}
