//! The active L1 table, in memory whole.

use std::collections::BTreeSet;
use std::ops::Range;

use super::Writes;
use crate::buf::IoBufMut;
use crate::device::BlockDevice;
use crate::device::volume::Volume;
use crate::error::{Error, Result};
use crate::format::l2;
use crate::sync::RwLock;
use crate::units::{Geometry, HostOffset};

/// Where an L2 table is, and whether it is ours alone (its refcount is one).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct L2Ref {
    pub(crate) host: HostOffset,
    pub(crate) copied: bool,
}

struct State {
    offset: HostOffset,
    entries: Vec<u64>,
    dirty: BTreeSet<u64>,
}

/// The active L1 table.
pub(crate) struct L1Table {
    geometry: Geometry,
    state: RwLock<State>,
}

impl L1Table {
    pub(crate) async fn open<D: BlockDevice>(
        volume: &Volume<D>,
        geometry: Geometry,
        offset: HostOffset,
        entries: u32,
    ) -> Result<Self> {
        let mut bytes = vec![0u8; entries as usize * 8];
        volume.read("reading the L1 table", offset.0, IoBufMut::new(&mut bytes)).await?;
        let state = State { offset, entries: super::decode_table(&bytes), dirty: BTreeSet::new() };
        Ok(L1Table { geometry, state: RwLock::new(state) })
    }

    /// The L2 table that entry `index` refers to, if any. The entry is checked now, not at opening, so that one bad
    /// entry does not hide the rest of the disk.
    pub(crate) fn get<D: BlockDevice>(&self, index: u64, volume: &Volume<D>) -> Result<Option<L2Ref>> {
        let state = self.state.read();
        let Some(&entry) = state.entries.get(index as usize) else { return Ok(None) };
        let at = state.offset.0 + index * 8;
        let invalid = |reason: &str| Error::invalid("L1 table entry", at, format!("{entry:#x}: {reason}"));
        let Some((host, copied)) = l2::decode_l1(entry, self.geometry.cluster_size()).map_err(invalid)? else {
            return Ok(None);
        };
        // While nobody changes the entry: the file became long enough before it was made, and is cut after it is gone.
        let length = volume.length().next_multiple_of(self.geometry.cluster_size());
        if host.0 + self.geometry.cluster_size() > length {
            return Err(invalid("the L2 table lies outside the file"));
        }
        Ok(Some(L2Ref { host, copied }))
    }

    /// Points entry `index` at an L2 table that is ours alone, or at none.
    pub(crate) fn set(&self, index: u64, table: Option<HostOffset>) {
        let mut state = self.state.write();
        if let Some(entry) = state.entries.get_mut(index as usize) {
            *entry = table.map_or(0, |t| t.0 | l2::COPIED);
            state.dirty.insert(index);
        }
    }

    /// Points entry `index` at the new place of an L2 table that a snapshot shares.
    pub(crate) fn set_shared(&self, index: u64, table: HostOffset) {
        let mut state = self.state.write();
        if let Some(entry) = state.entries.get_mut(index as usize) {
            *entry = table.0;
            state.dirty.insert(index);
        }
    }

    pub(crate) fn len(&self) -> u64 {
        self.state.read().entries.len() as u64
    }

    /// Where an entry is in the file.
    pub(crate) fn offset_of(&self, index: u64) -> u64 {
        self.state.read().offset.0 + index * 8
    }

    /// The clusters that the table occupies.
    pub(crate) fn clusters(&self) -> Range<u64> {
        let state = self.state.read();
        let start = self.geometry.host_cluster(state.offset).0;
        start..start + self.geometry.clusters_for(state.entries.len() as u64 * 8)
    }

    /// The table stands at a new place from now on, with this many entries.
    pub(super) fn moved_to(&self, to: HostOffset, entries: u64) {
        let mut state = self.state.write();
        state.offset = to;
        state.entries.resize(entries as usize, 0);
    }

    /// Another table, at another place, is the active one from now on; it is on disk.
    pub(crate) fn exchanged(&self, offset: HostOffset, entries: Vec<u64>) {
        *self.state.write() = State { offset, entries, dirty: BTreeSet::new() };
    }

    /// The entries.
    pub(crate) fn entries(&self) -> Vec<u64> {
        self.state.read().entries.clone()
    }

    /// Copies the changed sectors, or the whole table if it is written to a new place (with so many entries), to be
    /// written; all counts as clean from now on. Returns the entries that had changed.
    pub(super) fn capture(&self, moving: Option<(HostOffset, u64)>) -> (Writes, BTreeSet<u64>) {
        let mut state = self.state.write();
        let changed = std::mem::take(&mut state.dirty);
        let mut writes = Writes::default();
        if let Some((to, entries)) = moving {
            let mut table = state.entries.clone();
            table.resize(entries as usize, 0);
            for sector in 0..entries.div_ceil(64) {
                super::push_table_sector(&mut writes, to, &table, sector);
            }
        } else {
            let sectors: BTreeSet<u64> = changed.iter().map(|i| i / 64).collect();
            for sector in sectors {
                super::push_table_sector(&mut writes, state.offset, &state.entries, sector);
            }
        }
        (writes, changed)
    }

    /// The captured entries could not be written.
    pub(super) fn restore(&self, entries: BTreeSet<u64>) {
        self.state.write().dirty.extend(entries);
    }
}
