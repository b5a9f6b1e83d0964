//! Where everything is in an image: a reader of its own, which believes nothing and shares no code with the engine, so
//! that the two do not share their mistakes.

use std::collections::HashMap;
use std::ops::Range;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Tables are followed for this many entries at most, whatever the image claims.
const MOST_ENTRIES: u64 = 1 << 16;

/// What a field is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Of the header.
    Header,
    /// Type or length of a header extension, or part of its data.
    Extension,
    /// Of the active L1 table or a snapshot's.
    L1,
    /// Of an L2 table.
    L2,
    /// Of the refcount table.
    RefcountTable,
    /// Part of a refcount block.
    RefcountBlock,
    /// Of a snapshot table entry.
    Snapshot,
}

/// A big-endian number in the file.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    pub kind: Kind,
    /// Where, in bytes.
    pub at: u64,
    /// How wide, in bytes.
    pub width: usize,
}

/// The fields of the header: offset and width in bytes.
const HEADER: [(u64, usize); 20] = [
    (0, 4),
    (4, 4),
    (8, 8),
    (16, 4),
    (20, 4),
    (24, 8),
    (32, 4),
    (36, 4),
    (40, 8),
    (48, 8),
    (56, 4),
    (60, 4),
    (64, 8),
    (72, 8),
    (80, 8),
    (88, 8),
    (96, 4),
    (100, 4),
    (104, 1),
    (112, 4),
];

/// The big-endian number of `width` bytes at `at`; `None` past the end.
pub fn number(bytes: &[u8], at: u64, width: usize) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    let field = bytes.get(at..at.checked_add(width)?)?;
    Some(field.iter().fold(0, |n, &b| n << 8 | u64::from(b)))
}

/// Replaces the number of `width` bytes at `at`; past the end nothing happens.
pub fn put(bytes: &mut [u8], at: u64, width: usize, value: u64) {
    let Ok(at) = usize::try_from(at) else { return };
    if let Some(field) = at.checked_add(width).and_then(|end| bytes.get_mut(at..end)) {
        field.copy_from_slice(&value.to_be_bytes()[8 - width..]);
    }
}

/// A table of 8-byte entries.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    pub at: u64,
    pub entries: u64,
}

/// How a guest cluster is stored, and what in the file says so.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Where its L1 entry is, in bytes.
    pub l1_entry: u64,
    /// Where its L2 table is, if there is one, and the bytes of its entry there.
    pub l2: Option<(u64, Range<u64>)>,
    /// Where its data is.
    pub data: Option<Range<u64>>,
    /// Whether that is compressed.
    pub compressed: bool,
}

/// How often something refers to a host cluster.
#[derive(Clone, Copy, Debug, Default)]
pub struct Uses {
    /// By any table, snapshots' included.
    pub all: u64,
    /// By an active entry that claims to be the only one.
    pub copied: u64,
    /// By the disk, as the active L1 table shows it.
    pub active: u64,
    /// The same, by compressed data, of which several may share a cluster.
    pub packed: u64,
    /// As a table, or part of one.
    pub tables: u64,
}

impl Uses {
    /// Whether a refcount accounts for them, and every entry that claims to be the only one is.
    pub fn are_accounted_for(&self, refcount: u64) -> bool {
        let shared_openly = self.all == 1 || self.copied == 0;
        let of_one_kind = self.tables == 0 || self.tables == self.all;
        self.all <= refcount && shared_openly && of_one_kind
    }
}

/// An image's parts. Offsets and sizes are as the image claims them.
#[derive(Debug)]
pub struct Anatomy<'a> {
    bytes: &'a [u8],
    pub cluster_bits: u64,
    pub version: u64,
    pub refcount_order: u64,
    /// Size of the virtual disk in bytes.
    pub size: u64,
    pub l1: Table,
    pub refcounts: Table,
    pub snapshots: Vec<(u64, Table)>,
    header_length: u64,
    snapshots_at: u64,
    snapshots_end: u64,
    extended: bool,
    /// The guest's data is in another file.
    external: bool,
}

impl<'a> Anatomy<'a> {
    /// Takes an image apart, if its header says enough for that.
    pub fn of(bytes: &'a [u8]) -> Option<Self> {
        let field = |at, width| number(bytes, at, width);
        let (version, cluster_bits) = (field(4, 4)?, field(20, 4)?);
        if field(0, 4)? != 0x5146_49fb || !(9..=21).contains(&cluster_bits) {
            return None;
        }
        let v3 = version >= 3;
        let of_v3 = |at, width, otherwise| if v3 { field(at, width) } else { Some(otherwise) };
        let mut anatomy = Anatomy {
            bytes,
            cluster_bits,
            version,
            refcount_order: of_v3(96, 4, 4)?.min(6),
            size: field(24, 8)?,
            l1: Table { at: field(40, 8)?, entries: field(36, 4)?.min(MOST_ENTRIES) },
            refcounts: Table { at: field(48, 8)?, entries: (field(56, 4)? << (cluster_bits - 3)).min(MOST_ENTRIES) },
            snapshots: Vec::new(),
            header_length: of_v3(100, 4, 72)?,
            snapshots_at: field(64, 8)?,
            snapshots_end: field(64, 8)?,
            extended: of_v3(72, 8, 0)? & 16 != 0,
            external: of_v3(72, 8, 0)? & 4 != 0,
        };
        let mut at = anatomy.snapshots_at;
        for _ in 0..field(60, 4)?.min(64) {
            let (Some(l1), Some(entries)) = (field(at, 8), field(at.saturating_add(8), 4)) else { break };
            let sizes = [(12, 2), (14, 2), (36, 4)].map(|(n, width)| field(at.saturating_add(n), width).unwrap_or(0));
            anatomy.snapshots.push((at, Table { at: l1, entries: entries.min(MOST_ENTRIES) }));
            at = at.saturating_add((40 + sizes.iter().sum::<u64>()).next_multiple_of(8));
        }
        anatomy.snapshots_end = at;
        Some(anatomy)
    }

    /// Cluster size in bytes.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of an L2 entry.
    fn l2_width(&self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    fn entries(&self, table: Table) -> impl Iterator<Item = (u64, u64)> + use<'a> {
        let bytes = self.bytes;
        (0..table.entries).map_while(move |i| {
            let at = table.at.checked_add(i * 8)?;
            Some((at, number(bytes, at, 8)?))
        })
    }

    /// The L2 tables that an L1 table names: each entry's index and value, and the table.
    fn l2_tables(&self, l1: Table) -> impl Iterator<Item = (u64, u64, Table)> + use<'a> {
        let entries = self.cluster_size() / 8;
        let named = (0..).zip(self.entries(l1)).filter(|(_, (_, entry))| entry & OFFSET != 0);
        named.map(move |(index, (_, entry))| (index, entry, Table { at: entry & OFFSET, entries }))
    }

    /// The places of numbers in the file that mean something: all of those in use, and a few of those that are not.
    pub fn fields(&self) -> Vec<Field> {
        let mut fields: Vec<Field> = Vec::new();
        let mut add = |kind, at, width| fields.push(Field { kind, at, width });
        HEADER.into_iter().for_each(|(at, width)| add(Kind::Header, at, width));
        let mut at = self.header_length;
        for _ in 0..16 {
            let (Some(kind), Some(length)) = (number(self.bytes, at, 4), number(self.bytes, at + 4, 4)) else { break };
            add(Kind::Extension, at, 4);
            add(Kind::Extension, at + 4, 4);
            (0..length.min(48)).step_by(8).for_each(|n| add(Kind::Extension, at + 8 + n, 8));
            if kind == 0 || length > self.cluster_size() {
                break;
            }
            at += 8 + length.next_multiple_of(8);
        }
        for &(at, _) in &self.snapshots {
            for (n, width) in [(0, 8), (8, 4), (12, 2), (14, 2), (32, 4), (36, 4), (40, 8), (48, 8)] {
                add(Kind::Snapshot, at + n, width);
            }
        }
        let used = |i: u64, entry: u64| entry != 0 || i < 2 || i.is_multiple_of(16);
        let l1_tables: Vec<Table> =
            std::iter::once(self.l1).chain(self.snapshots.iter().map(|&(_, table)| table)).collect();
        for &l1 in &l1_tables {
            for (i, (at, entry)) in (0..).zip(self.entries(l1)) {
                if used(i, entry) {
                    add(Kind::L1, at, 8);
                }
            }
            for (_, _, table) in self.l2_tables(l1).take(64) {
                for (i, (at, entry)) in (0..).zip(self.entries(table)) {
                    if used(i, entry) {
                        add(Kind::L2, at, 8);
                    }
                }
            }
        }
        let mut blocks = 0;
        for (i, (at, entry)) in (0..).zip(self.entries(self.refcounts)) {
            if used(i, entry) {
                add(Kind::RefcountTable, at, 8);
            }
            // In a table that is none, anything is a block.
            if entry != 0 && blocks < 16 {
                blocks += 1;
                let width = 1usize << self.refcount_order.saturating_sub(3);
                for n in (0..self.cluster_size()).step_by(width) {
                    let at = entry.saturating_add(n);
                    if number(self.bytes, at, width).is_some_and(|count| used(n, count)) {
                        add(Kind::RefcountBlock, at, width);
                    }
                }
            }
        }
        fields
    }

    /// Where a compressed cluster's data lies.
    fn compressed(&self, entry: u64) -> Range<u64> {
        let bits = 62 - (self.cluster_bits - 8);
        let start = entry & ((1 << bits) - 1);
        let sectors = ((entry & (COMPRESSED - 1)) >> bits) + 1;
        start..(start & !511) + sectors * 512
    }

    fn data(&self, entry: u64) -> Option<Range<u64>> {
        if self.external {
            return None;
        }
        if entry & COMPRESSED != 0 {
            return Some(self.compressed(entry));
        }
        let start = entry & OFFSET;
        (start != 0).then(|| start..start.saturating_add(self.cluster_size()))
    }

    /// How the guest's clusters are stored: those of the disk, `most` at most.
    pub fn stored(&self, most: u64) -> Vec<Stored> {
        let per_table = self.cluster_size() / self.l2_width();
        let clusters = self.size.div_ceil(self.cluster_size()).min(most);
        let one = |guest: u64| {
            let l1_entry = self.l1.at.checked_add(guest / per_table * 8)?;
            let table = number(self.bytes, l1_entry, 8)? & OFFSET;
            if table == 0 {
                return Some(Stored { l1_entry, l2: None, data: None, compressed: false });
            }
            let at = table.checked_add(guest % per_table * self.l2_width())?;
            let entry = number(self.bytes, at, 8)?;
            Some(Stored {
                l1_entry,
                l2: Some((table, at..at.saturating_add(self.l2_width()))),
                data: self.data(entry),
                compressed: entry & COMPRESSED != 0,
            })
        };
        (0..clusters).map_while(one).collect()
    }

    /// Who uses which host cluster.
    pub fn uses(&self) -> HashMap<u64, Uses> {
        let mut uses: HashMap<u64, Uses> = HashMap::new();
        let bits = self.cluster_bits;
        let mut note = |range: Range<u64>, table: bool, active: bool, flags: u64| {
            // An image of a few clusters cannot refer to more of them than this in one piece.
            for c in (range.start >> bits..range.end.saturating_sub(1).max(range.start) / (1 << bits) + 1).take(1 << 12)
            {
                let uses = uses.entry(c).or_default();
                uses.all += 1;
                uses.tables += u64::from(table);
                uses.active += u64::from(active);
                uses.packed += u64::from(active && flags & COMPRESSED != 0);
                uses.copied += u64::from(active && flags & (COPIED | COMPRESSED) == COPIED);
            }
        };
        let piece = |table: Table| table.at..table.at.saturating_add(table.entries * 8);
        note(0..1, true, false, 0);
        note(piece(self.refcounts), true, false, 0);
        if self.snapshots_end > self.snapshots_at {
            note(self.snapshots_at..self.snapshots_end, true, false, 0);
        }
        for (_, block) in self.entries(self.refcounts).filter(|&(_, entry)| entry != 0) {
            note(block..block.saturating_add(1), true, false, 0);
        }
        let l1_tables = std::iter::once((self.l1, true)).chain(self.snapshots.iter().map(|&(_, table)| (table, false)));
        for (l1, active) in l1_tables {
            if l1.entries > 0 {
                note(piece(l1), true, false, 0);
            }
            for (_, l1_entry, table) in self.l2_tables(l1) {
                note(piece(table), true, active, l1_entry & COPIED);
                for (_, entry) in self.entries(table).step_by(self.l2_width() as usize / 8) {
                    if let Some(data) = self.data(entry) {
                        note(data, false, active, entry);
                    }
                }
            }
        }
        uses
    }

    /// Whether the image says that it was not closed.
    pub fn is_dirty(&self) -> bool {
        self.version >= 3 && number(self.bytes, 72, 8).is_some_and(|features| features & 1 != 0)
    }

    /// The refcount of a host cluster.
    pub fn refcount(&self, cluster: u64) -> u64 {
        let bits = 1u64 << self.refcount_order;
        let per_block = self.cluster_size() * 8 / bits;
        let entry = self.refcounts.at.checked_add(cluster / per_block * 8);
        let inside = cluster / per_block < self.refcounts.entries;
        let Some(block) = entry.filter(|_| inside).and_then(|at| number(self.bytes, at, 8)).filter(|&b| b != 0) else {
            return 0;
        };
        let index = cluster % per_block;
        if bits >= 8 {
            return number(self.bytes, block.saturating_add(index * bits / 8), bits as usize / 8).unwrap_or(0);
        }
        let byte = number(self.bytes, block.saturating_add(index * bits / 8), 1).unwrap_or(0);
        byte >> (index * bits % 8) & ((1 << bits) - 1)
    }
}
