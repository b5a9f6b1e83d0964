//! Reading the tables that snapshots have: L1 tables in windows, so that memory stays bounded however many there are, and
//! the L2 tables that they refer to.

use std::ops::Range;

use zerocopy::IntoBytes;

use super::set::ClusterSet;
use crate::buf::IoBufMut;
use crate::device::BlockDevice;
use crate::device::volume::Volume;
use crate::error::Result;
use crate::format::l2;
use crate::metadata::Metadata;
use crate::metadata::patches::lay_over;
use crate::units::{HostCluster, HostOffset};

/// The windows on all L1 tables take this many bytes together, unless there are so many snapshots that a sector of each
/// takes more.
const WINDOWS: u64 = 4 << 20;

/// Where the L1 table of a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct L1Place {
    pub(crate) offset: HostOffset,
    /// Entries.
    pub(crate) entries: u64,
}

/// An L2 table that snapshots refer to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SharedTable {
    pub(crate) host: HostOffset,
    /// The entries of the snapshots' L1 tables that refer to it: where they are in the file, and their COPIED flags (which
    /// mean nothing there).
    pub(crate) entries: Vec<(u64, bool)>,
}

/// The L1 tables of all snapshots, read side by side.
#[derive(Debug)]
pub(crate) struct L1Tables {
    tables: Vec<L1Place>,
    /// What they refer to in a damaged image, and the image needs for something else.
    disputed: ClusterSet,
    window: Range<u64>,
    /// For each table the entries in the window, as far as it reaches.
    entries: Vec<Vec<u64>>,
}

impl L1Tables {
    pub(crate) fn new(tables: Vec<L1Place>, disputed: ClusterSet) -> Self {
        L1Tables { tables, disputed, window: 0..0, entries: Vec::new() }
    }

    /// Whether the image needs the cluster for something else than an L2 table of a snapshot's.
    pub(crate) fn is_disputed(&self, table: HostCluster) -> bool {
        self.disputed.contains(table)
    }

    /// Entries of the longest.
    pub(crate) fn len(&self) -> u64 {
        self.tables.iter().map(|t| t.entries).max().unwrap_or(0)
    }

    /// The L2 tables that the entries at `index` refer to. Indexes are best asked for in ascending order. Entries that
    /// cannot be are left out.
    pub(crate) async fn at<D: BlockDevice>(
        &mut self,
        volume: &Volume<D>,
        meta: &Metadata,
        index: u64,
    ) -> Result<Vec<SharedTable>> {
        if self.tables.is_empty() {
            return Ok(Vec::new());
        }
        if !self.window.contains(&index) {
            self.read(volume, meta, index).await?;
        }
        let cluster_size = meta.geometry.cluster_size();
        let mut found = Vec::new();
        for (table, entries) in self.tables.iter().zip(&self.entries) {
            let Some(&entry) = entries.get((index - self.window.start) as usize) else { continue };
            if let Ok(Some((host, copied))) = l2::decode_l1(entry, cluster_size)
                && host.0 + cluster_size <= volume.length().next_multiple_of(cluster_size)
            {
                found.push((host, (table.offset.0 + index * 8, copied)));
            }
        }
        found.sort_unstable();
        let groups = found.chunk_by(|a, b| a.0 == b.0);
        Ok(groups
            .filter_map(|same| {
                let host = same.first()?.0;
                Some(SharedTable { host, entries: same.iter().map(|s| s.1).collect() })
            })
            .collect())
    }

    async fn read<D: BlockDevice>(&mut self, volume: &Volume<D>, meta: &Metadata, index: u64) -> Result<()> {
        let length = (WINDOWS / 8 / self.tables.len() as u64).next_multiple_of(64).max(64);
        let window = index / length * length..(index / length + 1) * length;
        self.entries.clear();
        for table in &self.tables {
            let end = window.end.min(table.entries).max(window.start);
            let mut entries = vec![0u64; (end - window.start) as usize];
            read_entries(volume, meta, HostOffset(table.offset.0 + window.start * 8), &mut entries).await?;
            self.entries.push(entries);
        }
        self.window = window;
        Ok(())
    }
}

/// Reads the L1 table of a snapshot.
pub(crate) async fn read_l1<D: BlockDevice>(volume: &Volume<D>, meta: &Metadata, place: L1Place) -> Result<Vec<u64>> {
    let mut entries = vec![0; place.entries as usize];
    read_entries(volume, meta, place.offset, &mut entries).await?;
    Ok(entries)
}

/// Reads the words of a whole L2 table that a snapshot refers to.
pub(crate) async fn read_table<D: BlockDevice>(
    volume: &Volume<D>,
    meta: &Metadata,
    table: HostOffset,
    entries: &mut Vec<u64>,
) -> Result<()> {
    entries.resize(meta.geometry.entries_per_cluster() as usize, 0);
    read_entries(volume, meta, table, entries).await
}

/// Reads entries of a table that only the recycler changes.
async fn read_entries<D: BlockDevice>(
    volume: &Volume<D>,
    meta: &Metadata,
    at: HostOffset,
    entries: &mut [u64],
) -> Result<()> {
    if entries.is_empty() {
        return Ok(());
    }
    let changed = meta.patches.within(at.0..at.0 + entries.len() as u64 * 8);
    volume.read("reading a snapshot's table", at.0, IoBufMut::new(entries.as_mut_bytes())).await?;
    lay_over(entries.as_mut_bytes(), at.0, &changed);
    for entry in entries {
        *entry = u64::from_be(*entry);
    }
    Ok(())
}
