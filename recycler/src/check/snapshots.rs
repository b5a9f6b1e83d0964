//! References of the snapshot table (section "Snapshots" of the qcow2 specification).

use super::counts::Counts;
use super::findings::Findings;
use super::regions::{L1, Regions};
use super::source::{Source, Window};
use crate::device::BlockDevice;
use crate::error::Result;
use crate::format::header::{Header, MAX_L1_BYTES, SNAPSHOT_ENTRY_MIN};

/// The longest snapshot table that QEMU accepts, in bytes.
const MAX_TABLE: u64 = 1024 << 16;
/// The most extra data of an entry that QEMU accepts, in bytes.
const MAX_EXTRA: u64 = 1024;
/// The extra data that version 3 asks for, in bytes.
const V3_EXTRA: u64 = 16;

/// Claims the snapshot table and the snapshots' L1 tables; adds the latter to `tables`, to be walked.
pub(super) async fn claim<D: BlockDevice>(
    regions: &mut Regions,
    source: &Source<'_, D>,
    header: &Header,
    counts: &mut Counts,
    findings: &mut Findings,
    tables: &mut Vec<L1>,
) -> Result<()> {
    let start = header.snapshots_offset.0;
    let mut window = Window::default();
    let mut at = start;
    let mut found = Vec::new();
    for index in 0..header.snapshot_count {
        let fixed: [u8; SNAPSHOT_ENTRY_MIN as usize] = window.get(source, "reading the snapshot table", at).await?;
        let entry = Entry::parse(&fixed);
        let end = at + entry.length;
        if end - start > MAX_TABLE || end > source.length || entry.extra > MAX_EXTRA {
            findings.hiding(1, || format!("entry {index} of the snapshot table, at {at:#x}, is too long"));
            break;
        }
        if header.version >= 3 && entry.extra < V3_EXTRA {
            findings.corruption(1, || format!("snapshot {index} lacks the extra data of version 3"));
        }
        found.push((index, entry));
        // The file may end before the padding does.
        at = end.next_multiple_of(8);
    }
    regions.claim(source, counts, findings, "snapshot table", (start, at - start));
    for (index, entry) in found {
        let length = entry.l1_entries * 8;
        if entry.l1_offset & (source.geometry.cluster_size() - 1) != 0 || length > MAX_L1_BYTES {
            let Entry { l1_offset, l1_entries, .. } = entry;
            findings
                .hiding(1, || format!("snapshot {index} has an L1 table of {l1_entries} entries at {l1_offset:#x}"));
        } else if regions.claim(source, counts, findings, "L1 table of a snapshot", (entry.l1_offset, length)) {
            tables.push(L1 { offset: entry.l1_offset, entries: entry.l1_entries, active: false });
        }
    }
    Ok(())
}

/// What the check needs of a snapshot table entry.
struct Entry {
    l1_offset: u64,
    l1_entries: u64,
    /// Length of the extra data in bytes.
    extra: u64,
    /// Length of the whole entry in bytes, without the padding to a multiple of 8.
    length: u64,
}

impl Entry {
    fn parse(fixed: &[u8; SNAPSHOT_ENTRY_MIN as usize]) -> Self {
        let number = |at: usize, length: usize| {
            fixed.get(at..at + length).unwrap_or_default().iter().fold(0u64, |n, &b| n << 8 | u64::from(b))
        };
        let extra = number(36, 4);
        Entry {
            l1_offset: number(0, 8),
            l1_entries: number(8, 4),
            extra,
            length: SNAPSHOT_ENTRY_MIN + extra + number(12, 2) + number(14, 2),
        }
    }
}
