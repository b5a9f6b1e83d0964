//! References of persistent bitmaps (section "Bitmaps" of the qcow2 specification).

use super::findings::Findings;
use super::regions::{Regions, overflow};
use super::source::{Source, Window, entries};
use crate::clusters::counts::Counts;
use crate::device::BlockDevice;
use crate::error::Result;
use crate::format::bitmap::{ENTRY, MAX_DATA, MAX_TABLE_ENTRIES, TableEntry};
use crate::format::header::Header;

/// Bytes of a bitmap table that are looked at together.
const CHUNK: u64 = 1 << 20;

/// Claims the clusters of the bitmap directory, the bitmap tables and the bitmaps. Bitmaps whose autoclear bit is clear
/// are stale, and own nothing.
pub(super) async fn claim<D: BlockDevice>(
    regions: &mut Regions,
    source: &Source<'_, D>,
    header: &Header,
    counts: &mut Counts,
    findings: &mut Findings,
) -> Result<()> {
    let Some(bitmaps) = header.bitmaps.filter(|_| header.bitmaps_consistent()) else { return Ok(()) };
    let directory = bitmaps.directory_offset.0;
    if !regions.claim(source, counts, findings, "bitmap directory", (directory, bitmaps.directory_size)) {
        return Ok(());
    }
    let end = directory.saturating_add(bitmaps.directory_size);
    let mut window = Window::default();
    let mut at = directory;
    for index in 0..bitmaps.count {
        let entry: [u8; ENTRY as usize] = window.get(source, "reading the bitmap directory", at).await?;
        let [table, sizes, tail] = [0, 8, 16].map(|i| u64::from_be_bytes(part(&entry, i)));
        let (table_entries, name, extra) = (sizes >> 32, tail >> 32 & 0xffff, tail & 0xffff_ffff);
        let length = (ENTRY + name + extra).next_multiple_of(8);
        if at + length > end {
            findings.hiding(1, || format!("the entry of bitmap {index} reaches past the end of the bitmap directory"));
            return Ok(());
        }
        at += length;
        let cluster_size = source.geometry.cluster_size();
        let aligned = table != 0 && table & (cluster_size - 1) == 0;
        let too_long = table_entries > MAX_TABLE_ENTRIES || table_entries * cluster_size > MAX_DATA;
        if !aligned || table_entries == 0 || too_long {
            findings.hiding(1, || format!("bitmap {index} has a table of {table_entries} entries at {table:#x}"));
            continue;
        }
        if regions.claim(source, counts, findings, "bitmap table", (table, table_entries * 8)) {
            claim_table(regions, source, counts, findings, (table, table_entries)).await?;
        }
    }
    if at != end {
        findings.corruption(1, || format!("the bitmap directory has {} bytes too many", end - at));
    }
    Ok(())
}

fn part(bytes: &[u8], at: usize) -> [u8; 8] {
    bytes.get(at..).and_then(|b| b.first_chunk().copied()).unwrap_or_default()
}

async fn claim_table<D: BlockDevice>(
    regions: &mut Regions,
    source: &Source<'_, D>,
    counts: &mut Counts,
    findings: &mut Findings,
    (table, table_entries): (u64, u64),
) -> Result<()> {
    let bits = source.geometry.cluster_bits;
    let cluster_size = source.geometry.cluster_size();
    let mut bytes = Vec::new();
    let mut done = 0;
    while done < table_entries * 8 {
        let length = CHUNK.min(table_entries * 8 - done);
        bytes.resize(length as usize, 0);
        source.read("reading a bitmap table", table + done, &mut bytes).await?;
        for (index, entry) in (done / 8..).zip(entries(&bytes)) {
            let offset = match TableEntry::decode(entry, cluster_size) {
                None => {
                    findings.hiding(1, || {
                        format!("entry {index} of the bitmap table at {table:#x} is invalid: {entry:#x}")
                    });
                    continue;
                }
                Some(TableEntry::Zeroes | TableEntry::Ones) => continue,
                Some(TableEntry::Data(offset)) => offset.0,
            };
            if source.holds(offset, cluster_size) {
                let cluster = offset >> bits;
                let excess = counts.add(cluster, 1);
                if excess > 0 {
                    findings.corruption(excess, || overflow(offset));
                }
                if !regions.claimed.insert(cluster) {
                    findings.overlap(cluster, || format!("bitmap data at {offset:#x} overlaps other metadata"));
                }
            } else {
                findings.hiding(1, || format!("bitmap data at {offset:#x} lies past the end of the file"));
            }
        }
        done += length;
    }
    Ok(())
}
