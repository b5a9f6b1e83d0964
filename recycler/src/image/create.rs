//! Making new images.
//!
//! The file starts with the header, the refcount table, the refcount blocks and the L1 table, one after another;
//! nothing else is in it. Everything but the header's first sector is made durable first, so that after a crash there
//! is either no image or the whole of it: a sector is written at once or not at all. An image that was there before
//! loses its first sector before anything else happens to it.

use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::{U32, U64};

use crate::buf::IoBuf;
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::extension::{self, kind};
use crate::format::header::{
    AUTOCLEAR_RAW_DATA_FILE, COMPATIBLE_LAZY_REFCOUNTS, MAGIC, MAX_BACKING_NAME, MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES, RawHeader, RawVersion3, V2_LENGTH, V3_LENGTH, incompatible,
};
use crate::format::refcount;
use crate::units::{Geometry, HostCluster};

/// Zeroes are written in pieces of this many bytes where the device must be cleared.
const PIECE: usize = 1 << 20;
const SECTOR: usize = 512;

/// What a new image is to be like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size of the virtual disk in bytes, a multiple of 512.
    pub virtual_size: u64,
    /// Cluster size in bytes, a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Width of a refcount in bits: 1, 2, 4, 8, 16, 32 or 64; 16 for version 2.
    pub refcount_bits: u32,
    /// 2 or 3.
    pub version: u32,
    /// Let refcounts go stale while the image is open (version 3 only).
    pub lazy_refcounts: bool,
    /// Extended L2 entries: clusters consist of 32 subclusters that are allocated one by one (version 3, clusters of 16 KiB at
    /// least).
    pub extended_l2: bool,
    /// Name and format of a backing file.
    pub backing: Option<(String, String)>,
    /// An external data file, which holds the guest's data (version 3 only).
    pub data_file: Option<DataFileOptions>,
}

/// The external data file of a new image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFileOptions {
    /// Its name as it is to be recorded, relative to the image.
    pub name: String,
    /// It is to read as the disk does, without the image, at any time: discards make it zero there. Not with a backing file.
    pub raw: bool,
}

impl CreateOptions {
    /// QEMU's defaults for a disk of `virtual_size` bytes.
    #[must_use]
    pub fn new(virtual_size: u64) -> Self {
        CreateOptions {
            virtual_size,
            cluster_size: 65536,
            refcount_bits: 16,
            version: 3,
            lazy_refcounts: false,
            extended_l2: false,
            backing: None,
            data_file: None,
        }
    }

    fn geometry(&self) -> Result<Geometry> {
        if !self.cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&self.cluster_size) {
            return Err(bad("cluster_size", format!("is {}, not a power of two from 512 to 2 MiB", self.cluster_size)));
        }
        if !self.refcount_bits.is_power_of_two() || self.refcount_bits > 64 {
            return Err(bad("refcount_bits", format!("is {}, not a power of two from 1 to 64", self.refcount_bits)));
        }
        match self.version {
            2 if self.refcount_bits != 16 => Err(bad("refcount_bits", "must be 16 in version 2".to_owned())),
            2 if self.lazy_refcounts => Err(bad("lazy_refcounts", "needs version 3".to_owned())),
            2 if self.extended_l2 => Err(bad("extended_l2", "needs version 3".to_owned())),
            _ if self.extended_l2 && self.cluster_size < 16384 => {
                Err(bad("extended_l2", format!("needs clusters of 16 KiB at least, not {}", self.cluster_size)))
            }
            2 if self.data_file.is_some() => Err(bad("data_file", "needs version 3".to_owned())),
            2 | 3 => Ok(Geometry {
                cluster_bits: self.cluster_size.trailing_zeros(),
                refcount_order: self.refcount_bits.trailing_zeros(),
                extended_l2: self.extended_l2,
            }),
            other => Err(bad("version", format!("is {other}, neither 2 nor 3"))),
        }
    }
}

fn bad(name: &str, reason: String) -> Error {
    Error::BadOption { name: name.to_owned(), reason }
}

/// Writes an empty image to `device`, whatever it held before, and flushes it.
///
/// # Errors
/// [`Error::BadOption`] names the unusable option, and nothing has changed; [`Error::Unsupported`] if the device is too
/// short and cannot grow. After [`Error::Io`] the device holds what it held before, or no image, or the new one.
pub async fn create<D: BlockDevice>(device: &D, options: &CreateOptions) -> Result<()> {
    if options.data_file.is_some() {
        return Err(bad("data_file", "needs the device that is to hold the data".to_owned()));
    }
    write_image(device, options).await
}

/// Writes an empty image to `device`, and makes `data` its external data file: as long as the disk, and empty, whatever the two
/// held before.
///
/// # Errors
/// As [`create`]; [`Error::BadOption`] without [`CreateOptions::data_file`]; [`Error::Unsupported`] if the data file is too
/// short and cannot grow.
pub async fn create_with_data<D: BlockDevice>(device: &D, data: &D, options: &CreateOptions) -> Result<()> {
    let Some(file) = &options.data_file else { return Err(bad("data_file", "needs a name".to_owned())) };
    // Everything that can be refused is, before anything changes.
    let geometry = options.geometry()?;
    header_cluster(options, geometry, &Layout::new(geometry, options)?)?;
    // An image that was here may have its data there.
    remove_header(device).await?;
    clear_data(data, options.virtual_size, file.raw).await?;
    write_image(device, options).await
}

/// Makes a data file as long as the disk. What it holds matters only if it is raw: otherwise no entry shows it.
async fn clear_data<D: BlockDevice>(data: &D, size: u64, raw: bool) -> Result<()> {
    let old = data.length().await.map_err(Error::io("asking for the length", 0))?;
    if data.features().resize {
        for length in [0, size] {
            data.truncate(length).await.map_err(Error::io("changing the length", length))?;
        }
    } else if old < size {
        return Err(Error::unsupported(format!("a data file of {old} bytes that cannot grow, for a disk of {size}")));
    } else if raw {
        zero(data, 0, size).await?;
    }
    flush(data).await
}

async fn write_image<D: BlockDevice>(device: &D, options: &CreateOptions) -> Result<()> {
    let geometry = options.geometry()?;
    let layout = Layout::new(geometry, options)?;
    let header = header_cluster(options, geometry, &layout)?;
    let length = layout.clusters << geometry.cluster_bits;

    clear(device, &layout, length, geometry.cluster_size()).await?;
    write(
        device,
        "writing the refcount table",
        layout.table << geometry.cluster_bits,
        &layout.refcount_table(geometry),
    )
    .await?;
    for index in 0..layout.block_count {
        let at = (layout.blocks + index) << geometry.cluster_bits;
        write(device, "writing a refcount block", at, &layout.refcount_block(geometry, index)).await?;
    }
    let (first, rest) = header.split_at_checked(SECTOR).unwrap_or((&header, &[]));
    if !rest.is_empty() {
        write(device, "writing the header", SECTOR as u64, rest).await?;
    }
    flush(device).await?;
    write(device, "writing the header", 0, first).await?;
    flush(device).await
}

/// Where everything is, in clusters; the header is in the first one.
struct Layout {
    /// First cluster of the refcount table, and how many it has.
    table: u64,
    table_count: u64,
    /// First refcount block, and how many there are.
    blocks: u64,
    block_count: u64,
    /// First cluster of the L1 table, and its entries.
    l1: u64,
    l1_entries: u64,
    /// Clusters of the whole file.
    clusters: u64,
}

impl Layout {
    fn new(geometry: Geometry, options: &CreateOptions) -> Result<Layout> {
        let size = options.virtual_size;
        if !size.is_multiple_of(SECTOR as u64) {
            return Err(bad("virtual_size", format!("{size} is not a multiple of {SECTOR}")));
        }
        // An empty disk has an L1 table as well, so that there is one to speak of.
        let l1_entries = size.div_ceil(geometry.cluster_size() * geometry.l2_entries()).max(1);
        if l1_entries * 8 > MAX_L1_BYTES {
            let most = MAX_L1_BYTES / 8 * geometry.cluster_size() * geometry.l2_entries();
            let reason = format!("{size} is too large: {most} is the most with this cluster size");
            return Err(bad("virtual_size", reason));
        }
        let l1_clusters = geometry.clusters_for(l1_entries * 8);
        // The refcounts count their own clusters: enlarge until nothing changes. It ends, since both numbers only grow
        // and each cluster more costs much less than a cluster of refcounts.
        let (mut table_count, mut block_count) = (1, 1);
        loop {
            let clusters = 1 + table_count + block_count + l1_clusters;
            let blocks = clusters.div_ceil(geometry.refcounts_per_block());
            let table = geometry.clusters_for(blocks * 8);
            if (table, blocks) == (table_count, block_count) {
                if table << geometry.cluster_bits > MAX_REFCOUNT_TABLE_BYTES {
                    return Err(bad("virtual_size", "needs a refcount table beyond the format's limit".to_owned()));
                }
                let (table, blocks) = (1, 1 + table_count);
                let l1 = blocks + block_count;
                return Ok(Layout { table, table_count, blocks, block_count, l1, l1_entries, clusters });
            }
            (table_count, block_count) = (table.max(table_count), blocks.max(block_count));
        }
    }

    fn refcount_table(&self, geometry: Geometry) -> Vec<u8> {
        let entries = (self.blocks..self.l1).map(|block| geometry.host_offset(HostCluster(block)).0.to_be_bytes());
        let mut bytes: Vec<u8> = entries.flatten().collect();
        bytes.resize((self.table_count << geometry.cluster_bits) as usize, 0);
        bytes
    }

    /// The refcount block that counts the clusters from `index * refcounts_per_block` on: one for each that exists.
    fn refcount_block(&self, geometry: Geometry, index: u64) -> Vec<u8> {
        let mut bytes = vec![0; geometry.cluster_size() as usize];
        let first = index * geometry.refcounts_per_block();
        let used = self.clusters.saturating_sub(first).min(geometry.refcounts_per_block());
        for entry in 0..used as usize {
            refcount::set(&mut bytes, geometry.refcount_order, entry, 1);
        }
        bytes
    }
}

/// The header with its extensions and the backing file's name: whole sectors, one at least.
fn header_cluster(options: &CreateOptions, geometry: Geometry, layout: &Layout) -> Result<Vec<u8>> {
    let backing = options.backing.as_ref();
    if let Some((name, format)) = backing {
        let too_long = name.len() > MAX_BACKING_NAME as usize || format.len() > extension::MAX_BACKING_FORMAT;
        if name.is_empty() || format.is_empty() || too_long || name.contains('\0') || format.contains('\0') {
            let most = extension::MAX_BACKING_FORMAT;
            let reason =
                format!("needs a name of 1 to {MAX_BACKING_NAME} bytes and a format of 1 to {most}, without NUL");
            return Err(bad("backing", reason));
        }
    }
    if let Some(file) = &options.data_file {
        let most = extension::MAX_DATA_FILE;
        if file.name.is_empty() || file.name.len() > most || file.name.contains('\0') {
            return Err(bad("data_file", format!("needs a name of 1 to {most} bytes, without NUL")));
        }
        if file.raw && backing.is_some() {
            return Err(bad(
                "data_file",
                "cannot be raw with a backing file: it would not read as the disk does".to_owned(),
            ));
        }
    }
    let fixed = if options.version == 2 { V2_LENGTH } else { V3_LENGTH } as usize;
    let mut extensions = Vec::new();
    if let Some((_, format)) = backing {
        extension::append(&mut extensions, kind::BACKING_FORMAT, format.as_bytes());
    }
    if let Some(file) = &options.data_file {
        extension::append(&mut extensions, kind::DATA_FILE, file.name.as_bytes());
    }
    let mut end = Vec::new();
    extension::append(&mut end, kind::END, &[]);
    let name = backing.map_or(&[][..], |(name, _)| name.as_bytes());
    if options.version == 3 {
        let mut names = Vec::new();
        extension::append(&mut names, kind::FEATURE_NAMES, &extension::feature_name_table());
        // It is only a help for other programs: in small clusters the backing file's name goes before it.
        if fixed + extensions.len() + names.len() + end.len() + name.len() <= geometry.cluster_size() as usize {
            extensions.extend(names);
        }
    }
    extensions.extend(end);
    let name_at = fixed + extensions.len();
    let length = name_at + name.len();
    if length as u64 > geometry.cluster_size() {
        let reason = format!("the names do not fit into the first cluster ({} bytes)", geometry.cluster_size());
        return Err(bad(if backing.is_some() { "backing" } else { "data_file" }, reason));
    }

    let mut bytes = vec![0; length.next_multiple_of(SECTOR)];
    let mut put = |at: usize, from: &[u8]| {
        if let Some(place) = bytes.get_mut(at..at + from.len()) {
            place.copy_from_slice(from);
        }
    };
    let raw = RawHeader {
        magic: U32::new(MAGIC),
        version: U32::new(options.version),
        backing_file_offset: U64::new(if name.is_empty() { 0 } else { name_at as u64 }),
        backing_file_size: U32::new(name.len() as u32),
        cluster_bits: U32::new(geometry.cluster_bits),
        size: U64::new(options.virtual_size),
        crypt_method: U32::ZERO,
        l1_size: U32::new(layout.l1_entries as u32),
        l1_table_offset: U64::new(layout.l1 << geometry.cluster_bits),
        refcount_table_offset: U64::new(layout.table << geometry.cluster_bits),
        refcount_table_clusters: U32::new(layout.table_count as u32),
        nb_snapshots: U32::ZERO,
        snapshots_offset: U64::ZERO,
    };
    put(0, raw.as_bytes());
    if options.version == 3 {
        let v3 = RawVersion3 {
            incompatible_features: U64::new(
                options.data_file.as_ref().map_or(0, |_| incompatible::DATA_FILE)
                    | if options.extended_l2 { incompatible::EXTENDED_L2 } else { 0 },
            ),
            compatible_features: U64::new(if options.lazy_refcounts { COMPATIBLE_LAZY_REFCOUNTS } else { 0 }),
            autoclear_features: U64::new(match &options.data_file {
                Some(file) if file.raw => AUTOCLEAR_RAW_DATA_FILE,
                _ => 0,
            }),
            refcount_order: U32::new(geometry.refcount_order),
            header_length: U32::new(V3_LENGTH),
        };
        put(V2_LENGTH as usize, v3.as_bytes());
    }
    put(fixed, &extensions);
    put(name_at, name);
    Ok(bytes)
}

/// Takes away what was on the device, and leaves zeroes wherever the new image has its L1 table or unused room.
async fn clear<D: BlockDevice>(device: &D, layout: &Layout, length: u64, cluster_size: u64) -> Result<()> {
    let old = device.length().await.map_err(Error::io("asking for the length", 0))?;
    let can_resize = device.features().resize;
    if old < length && !can_resize {
        let what = format!("a device of {old} bytes that cannot grow: an empty image of this kind takes {length}");
        return Err(Error::unsupported(what));
    }
    remove_header(device).await?;
    if can_resize {
        let action = "changing the length";
        device.truncate(0).await.map_err(Error::io(action, 0))?;
        return device.truncate(length).await.map_err(Error::io(action, length));
    }
    zero(device, 0, cluster_size).await?;
    zero(device, layout.l1 * cluster_size, length).await
}

/// Makes sure that there is no image on the device, durably.
async fn remove_header<D: BlockDevice>(device: &D) -> Result<()> {
    let length = device.length().await.map_err(Error::io("asking for the length", 0))?;
    let sector = [0; SECTOR];
    let there = sector.get(..length.min(SECTOR as u64) as usize).unwrap_or(&sector);
    if there.is_empty() {
        return Ok(());
    }
    write(device, "removing the old header", 0, there).await?;
    flush(device).await
}

async fn zero<D: BlockDevice>(device: &D, from: u64, to: u64) -> Result<()> {
    let zeroes = vec![0; to.saturating_sub(from).min(PIECE as u64) as usize];
    let mut at = from;
    while at < to {
        let piece = zeroes.get(..(to - at).min(PIECE as u64) as usize).unwrap_or(&zeroes);
        write(device, "clearing the device", at, piece).await?;
        at += piece.len() as u64;
    }
    Ok(())
}

async fn write<D: BlockDevice>(device: &D, action: &'static str, offset: u64, bytes: &[u8]) -> Result<()> {
    device.write(offset, IoBuf::new(bytes)).await.map_err(Error::io(action, offset))
}

async fn flush<D: BlockDevice>(device: &D) -> Result<()> {
    device.flush().await.map_err(Error::io("a flush", 0))
}
