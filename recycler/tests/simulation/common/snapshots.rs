//! Internal snapshots as the file has them, read straight from its bytes: what each holds, and which clusters the image
//! uses in all.

use std::collections::{BTreeMap, BTreeSet};

use qcow_recycler::format::header::Header;
use qcow_recycler::format::l2::{self, Mapping};
use qcow_recycler::format::refcount;
use qcow_recycler::format::snapshot::{Snapshot, parse_entry};
use qcow_recycler::format::subclusters::{Part, Subclusters};

use super::chain::Behind;
use super::content::SECTOR;
use super::taken::TakenAll;

/// What a snapshot holds: the clusters that are not zero, by number; those past the disk's size are VM state.
pub type Held = BTreeMap<u64, Vec<u8>>;

/// An image file, taken apart.
pub struct Anatomy<'a> {
    image: &'a [u8],
    header: Header,
    pub entries: Vec<Snapshot>,
    /// Every cluster that something refers to.
    used: BTreeSet<u64>,
}

impl<'a> Anatomy<'a> {
    /// # Errors
    /// What cannot be read.
    pub fn of(image: &'a [u8]) -> Result<Self, String> {
        let header = Header::parse(image, image.len() as u64).map_err(|e| e.to_string())?;
        let mut entries = Vec::new();
        let mut at = header.snapshots_offset.0;
        for _ in 0..header.snapshot_count {
            let (entry, length) =
                parse_entry(image.get(at as usize..).unwrap_or_default(), at).map_err(|e| e.to_string())?;
            at += length as u64;
            entries.push(entry);
        }
        let mut anatomy = Anatomy { image, header, entries, used: BTreeSet::new() };
        anatomy.walk(at)?;
        Ok(anatomy)
    }

    fn entry(&self, at: u64) -> u64 {
        let bytes = self.image.get(at as usize..at as usize + 8).map_or([0; 8], |b| b.try_into().unwrap());
        u64::from_be_bytes(bytes)
    }

    fn use_bytes(&mut self, offset: u64, length: u64) {
        let bits = self.header.geometry.cluster_bits;
        self.used.extend(offset >> bits..(offset + length).div_ceil(1 << bits));
    }

    fn walk(&mut self, table_end: u64) -> Result<(), String> {
        let geometry = self.header.geometry;
        let cluster_size = geometry.cluster_size();
        self.use_bytes(0, cluster_size);
        let table =
            (self.header.refcount_table_offset.0, u64::from(self.header.refcount_table_clusters) * cluster_size);
        self.use_bytes(table.0, table.1);
        for at in (table.0..table.0 + table.1).step_by(8) {
            let block = self.entry(at) & refcount::TABLE_OFFSET;
            if block != 0 {
                self.use_bytes(block, cluster_size);
            }
        }
        if !self.entries.is_empty() {
            self.use_bytes(self.header.snapshots_offset.0, table_end - self.header.snapshots_offset.0);
        }
        let mut l1s: Vec<_> = self.entries.iter().map(|s| (s.l1_offset.0, u64::from(s.l1_entries))).collect();
        l1s.push((self.header.l1_offset.0, u64::from(self.header.l1_entries)));
        for (offset, entries) in l1s {
            self.use_bytes(offset, entries * 8);
            let mut clusters = Vec::new();
            self.each(offset, entries, |_, table, mapping| clusters.push((table, mapping)))?;
            for (table, mapping) in clusters {
                self.use_bytes(table, cluster_size);
                match mapping {
                    Mapping::Compressed { descriptor } => {
                        let (offset, length) = l2::compressed_extent(descriptor, geometry);
                        self.use_bytes(offset, length);
                    }
                    other => {
                        if let Some((host, _)) = other.host() {
                            self.use_bytes(host.0, cluster_size);
                        }
                    }
                }
            }
        }
        Ok(())
    }

    /// Calls `f` with every L2 entry below an L1 table: the guest cluster, where the L2 table is, what the entry says.
    fn each(&self, l1: u64, entries: u64, mut f: impl FnMut(u64, u64, Mapping)) -> Result<(), String> {
        let geometry = self.header.geometry;
        for index in 0..entries {
            let entry = self.entry(l1 + index * 8);
            let Some((table, _)) = l2::decode_l1(entry, geometry.cluster_size())? else { continue };
            let words: Vec<u64> = (0..geometry.entries_per_cluster()).map(|i| self.entry(table.0 + i * 8)).collect();
            for (i, entry) in (0..).zip(l2::entries(&words, geometry)) {
                let mapping = Mapping::of(entry, self.header.version, geometry)?;
                f(index * geometry.l2_entries() + i, table.0, mapping);
            }
        }
        Ok(())
    }

    /// What a snapshot holds.
    ///
    /// # Errors
    /// What cannot be read.
    pub fn held(&self, snapshot: &Snapshot) -> Result<Held, String> {
        let cluster_size = self.header.geometry.cluster_size() as usize;
        let mut held = Held::new();
        self.each(snapshot.l1_offset.0, snapshot.l1_entries.into(), |guest, _, mapping| {
            let stored = match mapping {
                Mapping::Data { host, .. } => Some((host, Subclusters::STORED)),
                Mapping::Parts { host: Some((host, _)), subclusters } => Some((host, subclusters)),
                _ => None,
            };
            if let Some((host, subclusters)) = stored {
                let there = self.image.get(host.0 as usize..).unwrap_or_default();
                let mut bytes = there[..there.len().min(cluster_size)].to_vec();
                bytes.resize(cluster_size, 0);
                for (index, part) in (0..).zip(bytes.chunks_mut(cluster_size / Subclusters::COUNT as usize)) {
                    if subclusters.part(index) != Part::Stored {
                        part.fill(0);
                    }
                }
                if bytes.iter().any(|&b| b != 0) {
                    held.insert(guest, bytes);
                }
            }
        })?;
        Ok(held)
    }

    /// The disk of a snapshot without compressed clusters, over what shows where it holds nothing.
    fn disk(&self, snapshot: &Snapshot, behind: Vec<u8>) -> Result<Vec<u8>, String> {
        let geometry = self.header.geometry;
        let cluster_size = geometry.cluster_size() as usize;
        let part_size = cluster_size / Subclusters::COUNT as usize;
        let mut disk = behind;
        self.each(snapshot.l1_offset.0, snapshot.l1_entries.into(), |guest, _, mapping| {
            let (host, subclusters) = match mapping {
                Mapping::Data { host, .. } => (host.0, Subclusters::STORED),
                Mapping::Zero { .. } => (0, Subclusters::ZERO),
                Mapping::Parts { host, subclusters } => (host.map_or(0, |(host, _)| host.0), subclusters),
                Mapping::Unallocated | Mapping::Compressed { .. } => return,
            };
            let start = (guest as usize * cluster_size).min(disk.len());
            let end = (start + cluster_size).min(disk.len());
            let there = self.image.get(host as usize..).unwrap_or_default();
            for (at, byte) in disk[start..end].iter_mut().enumerate() {
                // Clusters without subclusters may be smaller than so many.
                let index = at.checked_div(part_size).unwrap_or(0);
                match subclusters.part(index as u64) {
                    Part::Stored => *byte = there.get(at).copied().unwrap_or_default(),
                    Part::Zero => *byte = 0,
                    Part::Unallocated => {}
                }
            }
        })?;
        Ok(disk)
    }

    fn is_compressed(&self, snapshot: &Snapshot) -> Result<bool, String> {
        let mut found = false;
        self.each(snapshot.l1_offset.0, snapshot.l1_entries.into(), |_, _, mapping| {
            found |= matches!(mapping, Mapping::Compressed { .. });
        })?;
        Ok(found)
    }

    /// What every snapshot holds, by ID and name.
    ///
    /// # Errors
    /// What cannot be read.
    pub fn all(&self) -> Result<BTreeMap<(String, String), Held>, String> {
        self.entries.iter().map(|s| Ok(((s.id.clone(), s.name.clone()), self.held(s)?))).collect()
    }

    /// How many clusters the image uses: no file that holds it can be shorter.
    pub fn used(&self) -> u64 {
        self.used.len() as u64
    }
}

/// What every snapshot in an image holds, by ID and name.
///
/// # Errors
/// What cannot be read.
pub fn all(image: &[u8]) -> Result<BTreeMap<(String, String), Held>, String> {
    Anatomy::of(image)?.all()
}

/// Whether the image has the snapshots that it must have, and each holds what it may.
///
/// # Errors
/// One is missing, unknown, or holds something else.
pub fn stand(image: &[u8], taken: &TakenAll, behind: Behind) -> Result<(), String> {
    let anatomy = Anatomy::of(image)?;
    let names: Vec<String> = anatomy.entries.iter().map(|s| s.name.clone()).collect();
    taken.all_there(&names)?;
    for snapshot in &anatomy.entries {
        let size = snapshot.virtual_size.unwrap_or(anatomy.header.virtual_size) as usize;
        if anatomy.is_compressed(snapshot)? {
            // For QEMU to read.
            continue;
        }
        let disk = anatomy.disk(snapshot, behind.bytes((size / SECTOR) as u64))?;
        taken.survived(&snapshot.name, &disk)?;
    }
    Ok(())
}

/// The IDs and names of an image's snapshots.
///
/// # Errors
/// They cannot be read.
pub fn names(image: &[u8]) -> Result<Vec<(String, String)>, String> {
    Ok(Anatomy::of(image)?.entries.iter().map(|s| (s.id.clone(), s.name.clone())).collect())
}
