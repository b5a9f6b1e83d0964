//! Consistency check and repair.
//!
//! The check counts every reference to every host cluster and compares the sums with the refcounts on disk, as QEMU's
//! does, in this order: the regions that the header and the snapshot and bitmap tables name (`regions`); the refcount
//! blocks, so that it is known which refcounts are one (`refcounts`); the L1 tables, which yield the set of L2
//! tables; the L2 tables, each read once (`mapping`); the refcount blocks again, against the counts. All metadata is
//! known before the first data cluster is counted, so an entry that leads into metadata is seen at once. What is found
//! is repaired, if at all, in the order that `repair` argues for.

mod bitmaps;
mod blocks;
mod exchange;
mod findings;
mod flags;
mod mapping;
mod refcounts;
mod regions;
mod repair;
mod snapshots;
mod source;

use crate::clusters::counts::Counts;
use findings::Findings;
use mapping::{Layout, Tables};
use refcounts::{Differences, Refcounts};
use regions::Regions;
use repair::{Cleared, Repairing};
use source::Source;

use crate::buf::IoBufMut;
use crate::device::BlockDevice;
use crate::error::{Error, Result};
use crate::format::header::{Header, incompatible};

/// What a check may repair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing: only look.
    #[default]
    No,
    /// Leaked clusters.
    Leaks,
    /// Everything that can be repaired without a risk to guest data.
    All,
}

/// What a check found. Counts are of clusters or entries, as each field says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Errors that may lose data: refcounts too low, references outside the file, overlaps, bad entries.
    pub corruptions: u64,
    /// Clusters counted more often than they are referred to.
    pub leaks: u64,
    /// Of `corruptions`, how many were repaired.
    pub corruptions_fixed: u64,
    /// Of `leaks`, how many were repaired.
    pub leaks_fixed: u64,
    /// Guest clusters that are allocated in the file.
    pub allocated_clusters: u64,
    /// Guest clusters of the virtual disk.
    pub total_clusters: u64,
    /// Allocated guest clusters that do not follow their neighbour in the file.
    pub fragmented_clusters: u64,
    /// End of the last cluster in use, in bytes.
    pub image_end_offset: u64,
    /// The first findings in words, at most [`CheckReport::MAX_MESSAGES`].
    pub messages: Vec<String>,
    /// Of `corruptions`: snapshots without the extra data that version 3 asks for, as old programs made them. No repair makes
    /// it up, and nothing relies on it: such an image is used like any other.
    pub(crate) incomplete_snapshots: u64,
}

impl CheckReport {
    /// How many findings are put in words.
    pub const MAX_MESSAGES: usize = 100;

    /// Errors that speak against using the image, repaired or not.
    pub(crate) fn errors(&self) -> u64 {
        self.corruptions.saturating_sub(self.incomplete_snapshots)
    }

    /// Those of them that were not repaired.
    pub(crate) fn errors_left(&self) -> u64 {
        self.errors().saturating_sub(self.corruptions_fixed)
    }

    /// Adds what a first round of a repair cleared.
    fn note_cleared(&mut self, cleared: Cleared) {
        self.corruptions = self.corruptions.saturating_add(cleared.entries);
        self.corruptions_fixed = self.corruptions_fixed.saturating_add(cleared.entries);
        self.messages.splice(0..0, cleared.messages);
        self.messages.truncate(Self::MAX_MESSAGES);
    }

    /// Whether nothing is wrong, or everything wrong was repaired.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.corruptions == self.corruptions_fixed && self.leaks == self.leaks_fixed
    }
}

/// Checks the image on `device`, which nobody may be using, and repairs what `repair` allows.
///
/// Whatever the image claims, time and memory are bounded by the length of its file. With [`Repair::No`] nothing is
/// written. A repair may be cut off at any moment: what it leaves is no worse than what it found, and repairing again
/// completes it.
///
/// # Errors
/// When the device fails, or the header does not let the image be opened at all; findings are not errors.
pub async fn check<D: BlockDevice>(device: &D, repair: Repair) -> Result<CheckReport> {
    let (mut report, cleared) = round(device, repair, None).await?;
    if !cleared.is_empty() {
        // What the cleared entries referred to is counted anew. Those that could not be cleared are found again, and left.
        (report, _) = round(device, repair, Some(&cleared)).await?;
        report.note_cleared(cleared);
    }
    Ok(report)
}

/// Looks at the whole image, and repairs it, unless the first step of the repair clears something, which changes what there is
/// to look at: that is returned, too. `before` is what the round before has cleared; then this one clears nothing.
async fn round<D: BlockDevice>(device: &D, repair: Repair, before: Option<&Cleared>) -> Result<(CheckReport, Cleared)> {
    let length = device.length().await.map_err(Error::io("asking for the length of the image file", 0))?;
    let mut start = vec![0; usize::try_from(length).unwrap_or(usize::MAX).min(Header::READ_LEN)];
    device.read(0, IoBufMut::new(&mut start)).await.map_err(Error::io("reading the header", 0))?;
    let header = Header::parse(&start, length)?;
    drop(start);

    let mut source = Source { device, length, geometry: header.geometry };
    let layout = Layout::new(&header);
    let mut findings = Findings::default();
    let mut counts = Counts::new(header.geometry.refcount_order);
    findings.report.total_clusters = header.geometry.clusters_for(header.virtual_size);
    note_header(&header, layout, &mut findings);

    let mut regions = Regions::new();
    let l1_tables = regions.claim_header(&source, &header, &mut counts, &mut findings).await?;
    let mut refcounts = Refcounts::load(&source, &header, &mut regions, &mut counts, &mut findings).await?;
    let ones = &refcounts.ones;
    let tables = Tables::find(&source, layout, &l1_tables, ones, &mut regions, &mut counts, &mut findings).await?;
    tables.walk(&source, layout, ones, &regions, &mut counts, &mut findings).await?;
    drop(regions);
    let mut differences = refcounts.compare(&source, &counts).await?;
    note_differences(&source, &refcounts, &counts, &differences, &mut findings);

    if repair != Repair::No {
        let mut repairing = Repairing {
            source: &mut source,
            header: &header,
            mode: repair,
            layout,
            l1: l1_tables.iter().find(|l1| l1.active),
            tables: &tables,
            refcounts: &mut refcounts,
            counts: &mut counts,
            differences: &mut differences,
            findings: &mut findings,
            autoclear: before.map_or(header.autoclear, |before| before.autoclear),
            begun: false,
            postponed: false,
        };
        if before.is_none() {
            let cleared = repairing.clear_misplaced_zeroes().await?;
            if !cleared.is_empty() {
                return Ok((findings.report, cleared));
            }
        }
        repairing.run().await?;
        let in_file = header.geometry.clusters_for(source.length);
        let leaked = differences.high.iter().take_while(|&c| c < in_file).last();
        differences.highest = counts.highest().max(leaked);
    }
    let end = differences.highest.map_or(1, |c| c + 1);
    findings.report.image_end_offset = end.saturating_mul(header.geometry.cluster_size());
    Ok((findings.report, Cleared::default()))
}

fn note_header(header: &Header, layout: Layout, findings: &mut Findings) {
    if header.incompatible & incompatible::DIRTY != 0 {
        findings.say(|| "the dirty bit is set: the image was not closed, and refcounts may be behind".to_owned());
    }
    if header.incompatible & incompatible::CORRUPT != 0 {
        findings.say(|| "the corrupt bit is set".to_owned());
    }
    if layout.data_file && header.snapshot_count > 0 {
        findings.corruption(1, || "the image has an external data file and internal snapshots".to_owned());
    }
}

/// Counts the clusters whose refcount is wrong, and the metadata that has a second owner without that showing in its
/// refcount.
fn note_differences<D: BlockDevice>(
    source: &Source<'_, D>,
    refcounts: &Refcounts,
    counts: &Counts,
    differences: &Differences,
    findings: &mut Findings,
) {
    let bits = source.geometry.cluster_bits;
    findings.report.leaks = differences.high.len();
    let hidden = findings.overlaps.difference_len(&differences.low);
    // A refcount block with a second owner is wrong twice: it cannot be trusted to count, either.
    let blocks = findings.overlaps.intersection_len(&refcounts.blocks);
    for n in [differences.low.len(), hidden, blocks] {
        findings.report.corruptions = findings.report.corruptions.saturating_add(n);
    }
    let most = CheckReport::MAX_MESSAGES;
    for cluster in differences.low.iter().take(most) {
        let (at, found) = (cluster << bits, counts.get(cluster));
        findings.say(|| format!("the cluster at {at:#x} has {found} references, and a lower refcount"));
    }
    for cluster in differences.high.iter().take(most) {
        let (at, found) = (cluster << bits, counts.get(cluster));
        findings.say(|| format!("the cluster at {at:#x} is leaked: {found} references, and a higher refcount"));
    }
}
