//! New refcount blocks, and a new table, for old ones, in one moment.

use std::collections::BTreeMap;

use super::Refcounts;
use crate::device::BlockDevice;
use crate::device::volume::Volume;
use crate::error::{Error, Result};
use crate::units::{HostCluster, HostOffset};

impl Refcounts {
    /// Whether the table on disk is the one in memory.
    pub(crate) fn table_is_written(&self) -> bool {
        self.dirty_table.is_empty() && self.moved.is_empty()
    }

    /// A block's bytes as they are now.
    pub(crate) async fn block_bytes<D: BlockDevice>(&mut self, volume: &Volume<D>, index: u64) -> Result<Vec<u8>> {
        if self.block(index)?.is_none() {
            let first = index * self.geometry.refcounts_per_block();
            let reason = format!("there is no block, and clusters from {first:#x} on are in use");
            return Err(Error::invalid("refcount table entry", self.table_offset.0 + index * 8, reason));
        }
        let mut bytes = Vec::with_capacity(self.geometry.cluster_size() as usize);
        for slice in index * self.slices_per_block()..(index + 1) * self.slices_per_block() {
            self.evict();
            self.load(volume, slice).await?;
            bytes.extend_from_slice(self.slices.get(&slice).map(|s| &**s).unwrap_or_default());
        }
        Ok(bytes)
    }

    /// The table with these blocks at these places.
    pub(crate) fn table_with(&self, blocks: &BTreeMap<u64, HostCluster>) -> Vec<u64> {
        let mut table = self.table.clone();
        for (&index, &cluster) in blocks {
            if let Some(entry) = table.get_mut(index as usize) {
                *entry = self.geometry.host_offset(cluster).0;
            }
        }
        table
    }

    /// These blocks, and the table, stand at these places from now on, durably and with other contents; nobody is writing
    /// refcounts back.
    pub(crate) fn exchanged(&mut self, blocks: &BTreeMap<u64, HostCluster>, table: HostOffset) {
        self.table = self.table_with(blocks);
        self.table_offset = table;
        for &index in blocks.keys() {
            for slice in index * self.slices_per_block()..(index + 1) * self.slices_per_block() {
                self.slices.remove(&slice);
                self.dirty.remove(&slice);
            }
        }
    }
}
