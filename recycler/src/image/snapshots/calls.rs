//! Snapshots made, deleted, gone back to.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::super::Image;
use super::super::structure::Frozen;
use super::exchange::{Change, NewCounts};
use super::references::{L1, References, flagged};
use crate::clusters::scan::Hurry;
use crate::clusters::set::ClusterSet;
use crate::clusters::snapshots::{L1Place, read_table};
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::header::{MAX_L1_BYTES, MAX_SNAPSHOTS};
use crate::format::l2::{self, Entry};
use crate::format::snapshot::{MAX_TABLE, Snapshot};
use crate::sync::atomic::Ordering;
use crate::units::{Geometry, HostOffset};

/// The longest name that is given to a snapshot, in bytes: QEMU shows no more.
const MAX_NAME: usize = 255;
/// QEMU's extra data: the size of the VM state, of the disk, and the count of instructions, which there is none of.
const EXTRA: usize = 24;

/// An internal snapshot. Names and IDs are for display: bytes that are not UTF-8 are replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SnapshotInfo {
    /// Its ID, which no other snapshot of the image has.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was made, since 1970 (UTC).
    pub created: Duration,
    /// How long the guest had been running, as far as whoever made it said.
    pub vm_clock: Duration,
    /// Size of the VM state in bytes; 0 if there is none.
    pub vm_state_size: u64,
    /// Size of the virtual disk in bytes when it was made.
    pub virtual_size: u64,
}

fn bad(reason: String) -> Error {
    Error::BadOption { name: "snapshot".to_owned(), reason }
}

/// The index of the snapshot that has this ID or, if there is none, this name.
fn find(snapshots: &[Snapshot], id_or_name: &str) -> Result<usize> {
    let wanted = id_or_name.as_bytes();
    if let Some(index) = snapshots.iter().position(|s| s.id_bytes == wanted) {
        return Ok(index);
    }
    let mut named = snapshots.iter().enumerate().filter(|(_, s)| s.name_bytes == wanted);
    match (named.next(), named.next()) {
        (Some((index, _)), None) => Ok(index),
        (Some(_), Some(_)) => Err(bad(format!("there are several snapshots of the name {id_or_name:?}: say the ID"))),
        (None, _) => Err(bad(format!("there is no snapshot {id_or_name:?}"))),
    }
}

/// An ID as QEMU gives them: one more than the highest. No other snapshot has it for a name either.
fn next_id(snapshots: &[Snapshot]) -> String {
    let highest = snapshots.iter().filter_map(|s| s.id.parse::<u64>().ok()).max().unwrap_or(0);
    let taken = |id: &String| snapshots.iter().any(|s| s.name == *id || s.id == *id);
    (1..).map(|n| highest.saturating_add(n).to_string()).find(|id| !taken(id)).unwrap_or_default()
}

/// Snapshots of the disk inside the image file. What each call changes is durable when it returns, and a power cut leaves it
/// done or not done. They go on while guests do: reads never wait; what changes the disk waits for a part of each call whose
/// length depends on how large the tables are, not the data: for 64 KiB clusters about a quarter of a MiB is read and
/// written for each GiB that the disk has allocated.
///
/// A call that is dropped half-way has changed nothing, or everything; if it is dropped while the header is being written,
/// nobody knows which, and the image takes no changes any more until it is opened again.
impl<D: BlockDevice> Image<D> {
    /// The internal snapshots, in the order of the image's table.
    ///
    /// # Errors
    /// [`Error::Closed`].
    pub fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        if self.is_closed() {
            return Err(Error::Closed);
        }
        let size = self.virtual_size();
        Ok(self.snapshots.lock().entries.iter().map(|s| info(s, size)).collect())
    }

    /// Makes a snapshot of the disk: of all that requests wrote that had ended before this call, whether or not it was
    /// flushed; a request under way is in it or not. Until the snapshot is deleted, what the guest overwrites or discards
    /// keeps its place in the file.
    ///
    /// # Errors
    /// [`Error::BadOption`] for a name that is empty, longer than 255 bytes, or the name or ID of a snapshot that there is;
    /// [`Error::Unsupported`] if the image's refcounts cannot count so many references (those of one bit: none), or beyond
    /// 65,536 snapshots; [`Error::Invalid`] if the image's counts are wrong: check it; as [`write`](Self::write) otherwise.
    /// Nothing has changed then.
    pub async fn create_snapshot(&self, name: &str) -> Result<SnapshotInfo> {
        let _turn = self.snapshot_turn().await?;
        let stay = self.snapshots.lock().entries.clone();
        self.check_new(&stay, name)?;
        self.prepare_changes().await?;
        self.find_junk(&mut Hurry).await?;
        let _closed = self.gate.close(&self.obstacles);
        let _frozen = self.quiet().await?;
        let size = self.virtual_size();
        let l1 = self.disk_l1();
        let (come, anew) = self.shared_references(&l1).await?;
        let new = self.new_entry(&stay, name, size, l1.entries.len() as u32);
        let made = info(&new, size);
        let mut change =
            Change { l1, anew, leaves: true, come, gone: References::new(), stay, new: Some(new), l1_gone: 0..0, size };
        let counts = self.new_counts(&change).await?;
        self.exchange(&mut change, &counts).await?;
        self.work.notify_one();
        Ok(made)
    }

    /// Deletes a snapshot, told by its ID or else its name. What only it used goes back to the recycler, VM state as well.
    ///
    /// # Errors
    /// [`Error::BadOption`] if there is none, or several have the name; [`Error::Invalid`] if something that is still in use
    /// is not counted often enough: check the image; as [`write`](Self::write) otherwise. Nothing has changed then.
    pub async fn delete_snapshot(&self, id_or_name: &str) -> Result<()> {
        let _turn = self.snapshot_turn().await?;
        let mut stay = self.snapshots.lock().entries.clone();
        let goes = stay.remove(find(&stay, id_or_name)?);
        self.prepare_changes().await?;
        self.find_junk(&mut Hurry).await?;
        // Guests need not stand still for what they never change.
        let others = self.all_reached(&places(&stay)).await?;
        let mut gone = References::new();
        let l1_gone = self.snapshot_l1(place(&goes)).await?;
        self.count_references(&l1_gone, &mut gone, |_| true).await?;
        let _closed = self.gate.close(&self.obstacles);
        let _frozen = self.quiet().await?;
        let mut change = Change {
            l1: self.disk_l1(),
            anew: BTreeSet::new(),
            leaves: true,
            come: References::new(),
            gone,
            stay,
            new: None,
            l1_gone: l1_clusters(&goes, self.meta.geometry),
            size: self.virtual_size(),
        };
        let counts = self.new_counts(&change).await?;
        self.check_freed(&change, &counts, &others)?;
        change.anew = self.tables_with_new_flags(&change, &counts, &others).await?;
        self.exchange(&mut change, &counts).await?;
        self.work.notify_one();
        Ok(())
    }

    /// Lets the disk be what it was when a snapshot was made, told by its ID or else its name: its contents and its size. What
    /// it was until now is lost, unless another snapshot has it. The snapshot stays. Bitmaps that record mark the whole disk.
    ///
    /// Requests under way end first; the guest must not be using the disk, since what it remembers of it is not so any more.
    ///
    /// # Errors
    /// As [`delete_snapshot`](Self::delete_snapshot); also [`Error::Unsupported`] if the snapshot's disk has another size and
    /// the image is of version 2, if a bitmap's granularity is too fine for that size, or the refcounts cannot count so many
    /// references.
    pub async fn apply_snapshot(&self, id_or_name: &str) -> Result<()> {
        let _turn = self.snapshot_turn().await?;
        let stay = self.snapshots.lock().entries.clone();
        let wanted = stay.get(find(&stay, id_or_name)?).cloned().ok_or(Error::Closed)?;
        let size = wanted.virtual_size.unwrap_or_else(|| self.virtual_size());
        let entries = self.check_size(&wanted, size)?;
        let _fits = self.bitmaps.will_reach(size, self.meta.geometry)?;
        self.prepare_changes().await?;
        self.find_junk(&mut Hurry).await?;
        let others = self.all_reached(&places(&stay)).await?;
        let mut l1 = self.snapshot_l1(place(&wanted)).await?;
        // What lies past the disk is VM state, of no use to the disk.
        l1.entries.resize(entries as usize, 0);
        self.check_tables(&l1).await?;
        let (come, anew) = self.shared_references(&l1).await?;
        let _closed = self.gate.close(&self.obstacles);
        let _frozen = self.quiet().await?;
        let mut gone = References::new();
        self.count_references(&self.disk_l1(), &mut gone, |_| true).await?;
        let mut change = Change { l1, anew, leaves: false, come, gone, stay, new: None, l1_gone: 0..0, size };
        let counts = self.new_counts(&change).await?;
        self.check_freed(&change, &counts, &others)?;
        self.exchange(&mut change, &counts).await?;
        self.virtual_size.store(size, Ordering::SeqCst);
        self.bitmaps.resized(size);
        self.bitmaps.will_change(0, size);
        self.work.notify_one();
        Ok(())
    }

    /// The turn that keeps the snapshots' tables as they are.
    async fn snapshot_turn(&self) -> Result<crate::sync::AsyncMutexGuard<'_, ()>> {
        if self.is_closed() {
            return Err(Error::Closed);
        }
        self.ensure_writable()?;
        if self.meta.external {
            return Err(Error::unsupported("internal snapshots of an image with an external data file"));
        }
        let turn = self.recycler_turn_soon().await?;
        self.leave_room().await;
        Ok(turn)
    }

    /// Waits until requests that change the disk have ended, what they changed is in the file, and whatever was freed is not
    /// counted any more: then each count is as high as there are references. The caller has closed the gate, so that no
    /// other request begins.
    async fn quiet(&self) -> Result<Frozen<'_>> {
        // First: what a request does after a commit has copied the tables is not in it.
        self.epochs.grace().await;
        self.settle().await?;
        let frozen = self.freeze().await;
        let states = self.clusters.lock();
        if !(states.unlinked.is_empty() && states.committing.is_empty() && states.grace.is_empty()) {
            let source = std::io::Error::other("what was freed before could not be uncounted");
            return Err(Error::Io { action: "writing refcounts", offset: 0, source });
        }
        drop(states);
        Ok(frozen)
    }

    fn check_new(&self, snapshots: &[Snapshot], name: &str) -> Result<()> {
        if self.meta.geometry.refcount_order == 0 {
            return Err(Error::unsupported("internal snapshots with refcounts of one bit"));
        }
        if name.is_empty() || name.len() > MAX_NAME || name.contains('\0') {
            return Err(bad(format!("{name:?} is no name: 1 to {MAX_NAME} bytes, none of them zero, are needed")));
        }
        if snapshots.iter().any(|s| s.name_bytes == name.as_bytes() || s.id_bytes == name.as_bytes()) {
            return Err(bad(format!("there is a snapshot {name:?} already")));
        }
        let length: usize = snapshots.iter().map(Snapshot::encoded_len).sum();
        if snapshots.len() as u64 >= u64::from(MAX_SNAPSHOTS) || length as u64 + 1024 > MAX_TABLE {
            return Err(Error::unsupported(format!("more than {} snapshots", snapshots.len())));
        }
        Ok(())
    }

    /// The entry of a new snapshot, whose L1 table has no place yet.
    fn new_entry(&self, snapshots: &[Snapshot], name: &str, size: u64, l1_entries: u32) -> Snapshot {
        let id = next_id(snapshots);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut extra = Vec::with_capacity(EXTRA);
        [0, size, u64::MAX].iter().for_each(|field| extra.extend(field.to_be_bytes()));
        Snapshot {
            at: 0,
            l1_offset: HostOffset(0),
            l1_entries,
            id_bytes: id.clone().into_bytes(),
            id,
            name: name.to_owned(),
            name_bytes: name.as_bytes().to_vec(),
            date: (now.as_secs() as u32, now.subsec_nanos()),
            vm_clock: 0,
            vm_state_size: 0,
            virtual_size: Some(size),
            extra,
            vm_state_size_32: 0,
        }
    }

    /// What an L1 table leads to if another one shares all of it from now on: all counts are higher then, and no COPIED flag
    /// may be set. Returns also the entries whose L2 tables have such flags: they are written anew, and so not counted.
    async fn shared_references(&self, l1: &L1) -> Result<(References, BTreeSet<u64>)> {
        let geometry = self.meta.geometry;
        let (mut come, mut anew) = (References::new(), BTreeSet::new());
        self.count_references(l1, &mut come, |table| {
            let mut entries = l2::entries(table.words, geometry);
            let flags = entries.any(|e| flagged(e.word, geometry).is_some_and(|(_, copied)| copied));
            if flags {
                anew.insert(table.index);
            }
            !flags
        })
        .await?;
        Ok((come, anew))
    }

    /// Whether nothing is freed that is in use. In a damaged image the counts may say so.
    fn check_freed(&self, change: &Change, counts: &NewCounts, others: &ClusterSet) -> Result<()> {
        let mut used = counts.free.intersection(&self.meta.tables.lock());
        used.remove_all(&change.gone.tables);
        used.add_all(&counts.free.intersection(others));
        used.add_all(&counts.free.intersection(&self.disputed.lock()));
        let states = self.clusters.lock();
        // What is free already is counted for whoever is going to be given it.
        let free = counts.free.runs().find(|run| states.any_free(run));
        match used.runs().next().or(free) {
            None => Ok(()),
            Some(run) => Err(contradiction(run.start)),
        }
    }

    /// The L1 entries whose L2 tables get other COPIED flags, since clusters in them are counted once now: tables that are
    /// the disk's alone.
    async fn tables_with_new_flags(
        &self,
        change: &Change,
        counts: &NewCounts,
        others: &ClusterSet,
    ) -> Result<BTreeSet<u64>> {
        let geometry = self.meta.geometry;
        let (mut anew, mut words) = (BTreeSet::new(), Vec::new());
        for (index, entry, place) in change.l1.each() {
            let Some(table) = self.table_of(entry, place)? else { continue };
            let c = geometry.host_cluster(table.host);
            let sole = if change.gone.to(c) > 0 { counts.ones.contains(c) } else { table.copied };
            if counts.free.contains(c) || sole && others.contains(c) {
                return Err(contradiction(c.0));
            }
            read_table(&self.volume, &self.meta, table.host, &mut words).await?;
            for Entry { word: entry, .. } in l2::entries(&words, geometry) {
                let Some((c, copied)) = flagged(entry, geometry) else {
                    // Compressed data has no flags, but may be freed.
                    if entry & l2::COMPRESSED != 0 {
                        let (first, count) = l2::compressed_clusters(entry & (l2::COMPRESSED - 1), geometry);
                        if counts.free.meets(&(first.0..first.0 + count)) {
                            return Err(contradiction(first.0));
                        }
                    }
                    continue;
                };
                let one = counts.ones.contains(c);
                if counts.free.contains(c) || one && others.contains(c) {
                    return Err(contradiction(c.0));
                }
                if sole && change.gone.to(c) > 0 && one != copied {
                    anew.insert(index);
                }
            }
            // A walk through a large image must not keep other work from this thread.
            tokio::task::yield_now().await;
        }
        Ok(anew)
    }

    /// The entries that the disk's L1 table needs for a snapshot's size.
    fn check_size(&self, snapshot: &Snapshot, size: u64) -> Result<u64> {
        let geometry = self.meta.geometry;
        let entries = geometry.clusters_for(size).div_ceil(geometry.l2_entries()).max(1);
        if !size.is_multiple_of(512) || size > i64::MAX as u64 || entries * 8 > MAX_L1_BYTES {
            let reason = format!("is {size}, which no disk has");
            return Err(Error::invalid("virtual disk size of the snapshot", snapshot.at, reason));
        }
        if self.meta.version < 3 && size != self.virtual_size() {
            return Err(Error::unsupported("resizing a version 2 image with internal snapshots"));
        }
        Ok(entries)
    }

    /// Whether an L1 table may become the disk's: no two of its L2 tables, nor one of them and another table, are at one
    /// place.
    async fn check_tables(&self, l1: &L1) -> Result<()> {
        let geometry = self.meta.geometry;
        let mut taken = ClusterSet::default();
        taken.insert_range(0..1);
        taken.insert_range(self.meta.l1.clusters());
        {
            let snapshots = self.snapshots.lock();
            taken.insert_range(snapshots.clusters(geometry));
            snapshots.entries.iter().for_each(|s| taken.insert_range(l1_clusters(s, geometry)));
        }
        {
            let refcounts = self.meta.refcounts.lock().await;
            taken.insert_range(refcounts.table_range());
            refcounts.blocks().for_each(|(_, block)| _ = taken.insert(geometry.host_cluster(block)));
        }
        for (_, entry, place) in l1.each() {
            let Some(table) = self.table_of(entry, place)? else { continue };
            if !taken.insert(geometry.host_cluster(table.host)) {
                let reason = format!("{}: the L2 table is at the place of another table", table.host);
                return Err(Error::invalid("L1 table entry", place.0, reason));
            }
        }
        Ok(())
    }
}

fn contradiction(c: u64) -> Error {
    let reason = format!("cluster {c:#x} is not counted as often as it is referred to: check the image");
    Error::invalid("refcount block entry", 0, reason)
}

/// The clusters of a snapshot's L1 table.
fn l1_clusters(s: &Snapshot, geometry: Geometry) -> Range<u64> {
    let first = geometry.host_cluster(s.l1_offset).0;
    first..first + geometry.clusters_for(u64::from(s.l1_entries) * 8)
}

fn place(s: &Snapshot) -> L1Place {
    L1Place { offset: s.l1_offset, entries: s.l1_entries.into() }
}

fn places(snapshots: &[Snapshot]) -> Vec<L1Place> {
    snapshots.iter().map(place).collect()
}

fn info(s: &Snapshot, size: u64) -> SnapshotInfo {
    SnapshotInfo {
        id: s.id.clone(),
        name: s.name.clone(),
        created: Duration::new(s.date.0.into(), 0) + Duration::from_nanos(s.date.1.into()),
        vm_clock: Duration::from_nanos(s.vm_clock),
        vm_state_size: s.vm_state_size,
        virtual_size: s.virtual_size.unwrap_or(size),
    }
}
