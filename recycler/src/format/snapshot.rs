//! The snapshot table (section "Snapshots" of the qcow2 specification): entries of variable length, one after another.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::header::{MAX_HOST_OFFSET, MAX_L1_BYTES};
use crate::error::{Error, Result};
use crate::units::{Geometry, HostOffset};

/// Bytes of an entry that are always there.
pub const FIXED: usize = size_of::<RawSnapshot>();
/// The most extra data that an entry may have, in bytes (QEMU's limit).
pub const MAX_EXTRA: u32 = 1024;
/// The longest entry in bytes, with its padding.
pub const MAX_ENTRY: usize = (FIXED + MAX_EXTRA as usize + 2 * u16::MAX as usize).next_multiple_of(8);
/// The longest snapshot table that is accepted, in bytes (QEMU's limit).
pub const MAX_TABLE: u64 = 1024 * 65536;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawSnapshot {
    l1_table_offset: U64,
    l1_size: U32,
    id_size: U16,
    name_size: U16,
    date_sec: U32,
    date_nsec: U32,
    vm_clock_nsec: U64,
    vm_state_size: U32,
    extra_data_size: U32,
}

/// An internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Where its entry starts in the file, in bytes. The offset of its L1 table is the first field there.
    pub at: u64,
    /// Where its L1 table starts.
    pub l1_offset: HostOffset,
    /// Entries in its L1 table. They may cover more than the disk: VM state lies beyond it.
    pub l1_entries: u32,
    /// Its unique ID, for display: bytes that are not UTF-8 are replaced.
    pub id: String,
    /// Its name, for display: bytes that are not UTF-8 are replaced.
    pub name: String,
    /// When it was taken: seconds and nanoseconds since the Epoch.
    pub date: (u32, u32),
    /// How long the guest had been running, in nanoseconds.
    pub vm_clock: u64,
    /// Size of the VM state in bytes; 0 if there is none.
    pub vm_state_size: u64,
    /// Size of the virtual disk in bytes when it was taken; `None` in old version 2 images: that of the image.
    pub virtual_size: Option<u64>,
    /// The extra data as a whole, including what is decoded above.
    pub extra: Vec<u8>,
    /// Its unique ID as it is stored.
    pub id_bytes: Vec<u8>,
    /// Its name as it is stored.
    pub name_bytes: Vec<u8>,
    /// The field for the size of the VM state that the extra data overrides, if there is any.
    pub vm_state_size_32: u32,
}

/// How many bytes the entry needs, without padding, as far as `bytes`, its start, tell: [`FIXED`] until that many are
/// there. Never more than [`MAX_ENTRY`].
///
/// # Errors
/// [`Error::Invalid`] for extra data beyond the limit.
pub fn needed(bytes: &[u8], at: u64) -> Result<usize> {
    let Ok((raw, _)) = RawSnapshot::ref_from_prefix(bytes) else { return Ok(FIXED) };
    let extra = raw.extra_data_size.get();
    if extra > MAX_EXTRA {
        let reason = format!("is {extra}; at most {MAX_EXTRA} bytes are supported");
        return Err(Error::invalid("extra_data_size", at + 36, reason));
    }
    Ok(FIXED + extra as usize + usize::from(raw.id_size.get()) + usize::from(raw.name_size.get()))
}

/// Parses the entry that starts at `bytes`, which is byte `at` of the file (for errors). Also returns how many bytes
/// further the next entry starts; the padding that this includes need not be there after the last entry.
///
/// # Errors
/// [`Error::Invalid`]: an impossible size, or fewer bytes than [`needed`] says.
pub fn parse_entry(bytes: &[u8], at: u64) -> Result<(Snapshot, usize)> {
    let length = needed(bytes, at)?;
    let short =
        || Error::invalid("Snapshot table entry", at, format!("{length} bytes are needed; the table ends before"));
    let (raw, rest) = RawSnapshot::ref_from_prefix(bytes).map_err(|_| short())?;
    let (extra, rest) = rest.split_at_checked(raw.extra_data_size.get() as usize).ok_or_else(short)?;
    let (id, rest) = rest.split_at_checked(raw.id_size.get().into()).ok_or_else(short)?;
    let name = rest.get(..raw.name_size.get().into()).ok_or_else(short)?;
    let l1_entries = raw.l1_size.get();
    if u64::from(l1_entries) * 8 > MAX_L1_BYTES {
        let reason = format!("is {l1_entries}; at most {} are supported", MAX_L1_BYTES / 8);
        return Err(Error::invalid("Number of entries in the L1 table of the snapshot", at + 8, reason));
    }
    let field = |from: usize| extra.get(from..from + 8).and_then(|b| U64::read_from_bytes(b).ok()).map(U64::get);
    let snapshot = Snapshot {
        at,
        l1_offset: HostOffset(raw.l1_table_offset.get()),
        l1_entries,
        id: String::from_utf8_lossy(id).into_owned(),
        name: String::from_utf8_lossy(name).into_owned(),
        date: (raw.date_sec.get(), raw.date_nsec.get()),
        vm_clock: raw.vm_clock_nsec.get(),
        vm_state_size: field(0).unwrap_or(raw.vm_state_size.get().into()),
        virtual_size: field(8),
        extra: extra.to_vec(),
        id_bytes: id.to_vec(),
        name_bytes: name.to_vec(),
        vm_state_size_32: raw.vm_state_size.get(),
    };
    Ok((snapshot, length.next_multiple_of(8)))
}

impl Snapshot {
    /// The entry as it is stored, with the padding up to the next one. What was parsed is stored as it was.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let raw = RawSnapshot {
            l1_table_offset: self.l1_offset.0.into(),
            l1_size: self.l1_entries.into(),
            id_size: (self.id_bytes.len() as u16).into(),
            name_size: (self.name_bytes.len() as u16).into(),
            date_sec: self.date.0.into(),
            date_nsec: self.date.1.into(),
            vm_clock_nsec: self.vm_clock.into(),
            vm_state_size: self.vm_state_size_32.into(),
            extra_data_size: (self.extra.len() as u32).into(),
        };
        let mut bytes = [raw.as_bytes(), &self.extra, &self.id_bytes, &self.name_bytes].concat();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes
    }

    /// Bytes of the entry with the padding up to the next one.
    #[must_use]
    pub fn encoded_len(&self) -> usize {
        (FIXED + self.extra.len() + self.id_bytes.len() + self.name_bytes.len()).next_multiple_of(8)
    }

    /// Checks that the L1 table is where one may be: aligned, not over the header, inside the file.
    ///
    /// # Errors
    /// [`Error::Invalid`] otherwise.
    pub fn check_l1(&self, geometry: Geometry, file_length: u64) -> Result<()> {
        let (offset, length) = (self.l1_offset, u64::from(self.l1_entries) * 8);
        let refuse = |reason| Err(Error::invalid("L1 table offset of the snapshot", self.at, reason));
        if !offset.0.is_multiple_of(geometry.cluster_size()) {
            return refuse(format!("{offset} is not aligned to a cluster"));
        }
        if length == 0 {
            return Ok(());
        }
        if offset.0 == 0 {
            return refuse("is zero, where the header is".to_owned());
        }
        match offset.0.checked_add(length) {
            Some(end) if end <= file_length.min(MAX_HOST_OFFSET) => Ok(()),
            _ => refuse(format!("{length} bytes at {offset} reach past the end of the file ({file_length} bytes)")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn entry(l1_offset: u64, l1_entries: u32, extra: &[u8], id: &[u8], name: &[u8]) -> Vec<u8> {
        let mut b = Vec::new();
        b.extend(l1_offset.to_be_bytes());
        b.extend(l1_entries.to_be_bytes());
        b.extend((id.len() as u16).to_be_bytes());
        b.extend((name.len() as u16).to_be_bytes());
        b.extend(7u32.to_be_bytes());
        b.extend(8u32.to_be_bytes());
        b.extend(9u64.to_be_bytes());
        b.extend(10u32.to_be_bytes());
        b.extend((extra.len() as u32).to_be_bytes());
        b.extend([extra, id, name].concat());
        b
    }

    #[test]
    fn entries_of_both_versions_parse() {
        let old = entry(0x30000, 4, &[], b"1", b"first");
        let (s, used) = parse_entry(&old, 0x50000).unwrap();
        assert_eq!((used, needed(&old, 0).unwrap()), (48, 46));
        assert_eq!((s.l1_offset, s.l1_entries, s.date, s.vm_clock), (HostOffset(0x30000), 4, (7, 8), 9));
        assert_eq!((s.vm_state_size, s.virtual_size), (10, None));
        assert_eq!((s.id.as_str(), s.name.as_str(), s.at), ("1", "first", 0x50000));

        let extra = [&(1u64 << 40).to_be_bytes()[..], &(1u64 << 30).to_be_bytes(), b"unknown"].concat();
        let (s, used) = parse_entry(&entry(0x30000, 4, &extra, b"2", b"\xff"), 0).unwrap();
        assert_eq!(used, 72);
        assert_eq!((s.vm_state_size, s.virtual_size, &s.extra), (1 << 40, Some(1 << 30), &extra));
        assert_eq!(s.encode()[..65], entry(0x30000, 4, &extra, b"2", b"\xff"));
        assert_eq!((s.encode().len(), s.encoded_len()), (72, 72));
    }

    #[test]
    fn impossible_sizes_are_refused_before_anything_is_allocated() {
        let mut b = entry(0x30000, 4, &[], b"", b"");
        b[36..40].copy_from_slice(&1025u32.to_be_bytes());
        assert_eq!(parse_entry(&b, 100).unwrap_err().offset(), Some(136));
        assert!(needed(&b, 100).is_err());
        let b = entry(0x30000, (32 << 20) / 8 + 1, &[], b"", b"");
        assert_eq!(parse_entry(&b, 100).unwrap_err().offset(), Some(108));
    }

    #[test]
    fn a_cut_off_entry_is_an_error_at_every_length() {
        let b = entry(0x30000, 4, &[1; 20], b"id", b"name");
        for end in 0..b.len() {
            assert!(parse_entry(&b[..end], 0).is_err(), "{end}");
            assert!(needed(&b[..end], 0).unwrap() > end);
        }
        assert_eq!(needed(&b, 0).unwrap(), b.len());
    }

    #[test]
    fn l1_tables_outside_the_file_are_refused() {
        let geometry = Geometry { cluster_bits: 16, refcount_order: 4, extended_l2: false };
        let check = |offset, entries, file| {
            let (s, _) = parse_entry(&entry(offset, entries, &[], b"", b""), 0).unwrap();
            s.check_l1(geometry, file)
        };
        assert!(check(0x30000, 2, 0x30010).is_ok());
        assert!(check(0x30000, 3, 0x30010).is_err());
        assert!(check(0x30200, 1, 1 << 30).is_err());
        assert!(check(0, 1, 1 << 30).is_err());
        assert!(check(0, 0, 1 << 30).is_ok());
        assert!(check(1 << 56, 1, u64::MAX).is_err());
        assert!(check(u64::MAX << 16, 1 << 20, u64::MAX).is_err());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), at in 0..u64::MAX / 2) {
            let _ = parse_entry(&bytes, at);
        }
    }
}
