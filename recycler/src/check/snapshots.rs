//! References of the snapshot table (section "Snapshots" of the qcow2 specification).

use super::findings::Findings;
use super::regions::{L1, Regions};
use super::source::Source;
use crate::clusters::counts::Counts;
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::header::Header;
use crate::format::snapshot::{self, MAX_ENTRY, MAX_TABLE, Snapshot};

/// The extra data that version 3 asks for, in bytes.
const V3_EXTRA: usize = 16;

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
    let mut window = Window::new(start);
    let mut found = Vec::new();
    let mut at = start;
    for index in 0..header.snapshot_count {
        match window.next(source).await? {
            Ok(entry) if window.at - start <= MAX_TABLE => {
                if header.version >= 3 && entry.extra.len() < V3_EXTRA {
                    findings.report.incomplete_snapshots += 1;
                    findings.corruption(1, || format!("snapshot {index} lacks the extra data of version 3"));
                }
                let l1 = L1 { offset: entry.l1_offset.0, entries: entry.l1_entries.into(), active: false };
                found.push((index, l1, entry.check_l1(source.geometry, source.length)));
                at = window.at;
            }
            Ok(_) => {
                findings.hiding(1, || format!("the snapshot table is longer than {MAX_TABLE} bytes"));
                break;
            }
            Err(e) => {
                findings.hiding(1, || format!("snapshot {index}: {e}"));
                break;
            }
        }
    }
    regions.claim(source, counts, findings, "snapshot table", (start, at - start));
    for (index, l1, place) in found {
        if let Err(e) = place {
            findings.hiding(1, || format!("snapshot {index}: {e}"));
        } else if regions.claim(source, counts, findings, "L1 table of a snapshot", (l1.offset, l1.entries * 8)) {
            tables.push(l1);
        }
    }
    Ok(())
}

/// A view of the table that slides over it; always long enough for one entry, unless the file ends.
struct Window {
    start: u64,
    bytes: Vec<u8>,
    /// Where the next entry starts in the file.
    at: u64,
}

impl Window {
    fn new(start: u64) -> Self {
        Window { start, bytes: Vec::new(), at: start }
    }

    /// Parses the entry at `at` and moves on. The inner error says what is wrong with it.
    async fn next<D: BlockDevice>(&mut self, source: &Source<'_, D>) -> Result<Result<Snapshot, Error>> {
        let rest = |this: &Self| usize::try_from(this.at - this.start).unwrap_or(usize::MAX).min(this.bytes.len());
        let seen = self.bytes.get(rest(self)..).unwrap_or_default();
        let short = snapshot::needed(seen, self.at).is_ok_and(|n| n > seen.len() || seen.len() < snapshot::FIXED);
        if short {
            let there = usize::try_from(source.length.saturating_sub(self.at)).unwrap_or(usize::MAX);
            self.bytes.resize((2 * MAX_ENTRY).min(there), 0);
            self.start = self.at;
            source.read("reading the snapshot table", self.at, &mut self.bytes).await?;
        }
        let parsed = snapshot::parse_entry(self.bytes.get(rest(self)..).unwrap_or_default(), self.at);
        Ok(parsed.map(|(entry, length)| {
            self.at += length as u64;
            entry
        }))
    }
}
