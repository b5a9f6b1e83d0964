//! The image's tables: cached, changed in memory, and written back in an order that any power cut survives.
//!
//! Lock order, first to last: `commit_turn` (async), `refcounts` (async), then the synchronous locks: the mirrors (which a
//! commit holds while it copies slices), one slice, one of dirty list, tables and header, and last the L1 table.

pub(crate) mod commit;
pub(crate) mod l1;
pub(crate) mod l2;
pub(crate) mod mirror;
pub(crate) mod patches;
pub(crate) mod refcounts;
pub(crate) mod slice;
pub(crate) mod slices;
pub(crate) mod ways;
mod words;

use std::sync::Arc;

use zerocopy::IntoBytes;

use crate::buf::IoBuf;
use crate::clusters::set::ClusterSet;
use crate::device::BlockDevice;
use crate::device::volume::{PIECE, Volume};
use crate::error::Result;
use crate::format::header::{Header, incompatible};
use crate::format::l2::{Entry, Mapping};
use crate::sync::atomic::{AtomicBool, AtomicU64};
use crate::sync::{AsyncMutex, Mutex};
use crate::units::{Geometry, GuestCluster, HostOffset};
use commit::{Stamp, Unfinished};
use l1::L1Table;
use l2::L2Cache;
use mirror::Mirrors;
use patches::Patches;
use refcounts::Refcounts;

/// All tables of one image.
pub(crate) struct Metadata {
    pub(crate) geometry: Geometry,
    pub(crate) version: u32,
    /// Whether guest data is in an external data file: then L2 entries name no cluster of this one.
    pub(crate) external: bool,
    /// The header's first sector as it is on disk. It is always written whole: a sector write is atomic.
    header: Mutex<[u8; 512]>,
    pub(crate) l1: L1Table,
    pub(crate) l2: L2Cache,
    pub(crate) refcounts: AsyncMutex<Refcounts>,
    pub(crate) mirrors: Mutex<Mirrors>,
    /// Changed entries of the snapshots' tables.
    pub(crate) patches: Arc<Patches>,
    /// The clusters of every table: no guest data may be in them, whatever an L2 entry says.
    pub(crate) tables: Arc<Mutex<ClusterSet>>,
    /// Whether an L1 or L2 change is waiting to be written back that must not become durable before what was written,
    /// or counted, before it. Set *before* the change is made.
    barrier: AtomicBool,
    /// One at a time writes metadata back.
    commit_turn: AsyncMutex<Unfinished>,
    clock: AtomicU64,
    completed: Mutex<Option<Stamp>>,
    /// Bytes read and written, for the statistics.
    pub(crate) written: AtomicU64,
}

impl Metadata {
    /// Reads the tables that are kept in memory whole: L1 and refcount table.
    pub(crate) async fn open<D: BlockDevice>(
        volume: &Volume<D>,
        header: &Header,
        sector: [u8; 512],
        l2_cache_size: u64,
    ) -> Result<Self> {
        let geometry = header.geometry;
        let table = (header.refcount_table_offset, header.refcount_table_clusters);
        let tables = Arc::new(Mutex::new(ClusterSet::default()));
        let patches = Arc::<Patches>::default();
        let refcounts = Refcounts::open(volume, geometry, table.0, table.1, tables.clone()).await?;
        Ok(Metadata {
            geometry,
            version: header.version,
            external: header.incompatible & incompatible::DATA_FILE != 0,
            header: Mutex::new(sector),
            l1: L1Table::open(volume, geometry, header.l1_offset, header.l1_entries).await?,
            l2: L2Cache::new(geometry, l2_cache_size, patches.clone())?,
            refcounts: AsyncMutex::new(refcounts),
            mirrors: Mutex::default(),
            patches,
            tables,
            barrier: AtomicBool::new(false),
            commit_turn: AsyncMutex::default(),
            clock: AtomicU64::new(0),
            completed: Mutex::default(),
            written: AtomicU64::new(0),
        })
    }

    /// What an L2 entry of a guest cluster says; the error is the reason why it cannot be.
    #[inline]
    pub(crate) fn decode(&self, guest: GuestCluster, entry: Entry) -> std::result::Result<Mapping, &'static str> {
        if self.external {
            return Mapping::of_external(entry, guest.0 << self.geometry.cluster_bits, self.geometry);
        }
        Mapping::of(entry, self.version, self.geometry)
    }
}

/// Pieces of tables to be written to the device, in words of 8 bytes as they are there: those that follow one another become one
/// write.
#[derive(Default)]
pub(crate) struct Writes(Vec<(u64, Vec<u64>)>);

impl Writes {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes, as many as are whole words.
    pub(crate) fn push(&mut self, offset: u64, bytes: &[u8]) {
        let words = bytes.as_chunks::<8>().0;
        self.at(offset, bytes.len()).extend(words.iter().map(|&word| u64::from_ne_bytes(word)));
    }

    /// Where the words to be written from `offset` on are to be put: as a rule so many bytes.
    fn at(&mut self, offset: u64, room: usize) -> &mut Vec<u64> {
        let continues = |(start, piece): &(u64, Vec<u64>)| {
            let length = size_of_val(&piece[..]);
            start + length as u64 == offset && length < PIECE
        };
        if !self.0.last().is_some_and(continues) {
            self.0.push((offset, Vec::with_capacity(room.min(PIECE) / 8)));
        }
        let last = self.0.len() - 1;
        &mut self.0[last].1
    }

    pub(crate) async fn submit<D: BlockDevice>(&self, volume: &Volume<D>, action: &'static str) -> Result<u64> {
        let mut written = 0;
        for (offset, words) in &self.0 {
            volume.write(action, *offset, IoBuf::new(words.as_bytes())).await?;
            written += size_of_val(&words[..]) as u64;
        }
        Ok(written)
    }
}

/// Entries of a table of big-endian 64-bit values.
fn decode_table(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks_exact(8).map(|b| b.iter().fold(0, |v, &b| v << 8 | u64::from(b))).collect()
}

/// Adds the 512-byte sector `sector` of a table (as far as the table reaches) to `writes`.
fn push_table_sector(writes: &mut Writes, table_offset: HostOffset, table: &[u64], sector: u64) {
    let start = sector as usize * 64;
    let entries = table.get(start..table.len().min(start + 64)).unwrap_or_default();
    writes.at(table_offset.0 + sector * 512, 512).extend(entries.iter().map(|entry| entry.to_be()));
}
