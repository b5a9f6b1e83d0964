//! Header parsing: what qemu-img writes is understood, and every hostile header is refused by field, before anything is
//! allocated for it.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::Command;

use proptest::prelude::*;
use qcow_recycler::Error;
use qcow_recycler::format::extension::kind;
use qcow_recycler::format::header::{self, Header, Sector, crypt, incompatible};
use qcow_recycler::units::HostOffset;

const CLUSTER: u64 = 65536;
const FILE: u64 = 16 * CLUSTER;

/// A header of version 3 that is right, built by hand: L1 table in cluster 3, refcount table in cluster 1.
struct Builder {
    bytes: Vec<u8>,
    extensions: usize,
}

impl Builder {
    fn new() -> Self {
        let mut b = Builder { bytes: vec![0; CLUSTER as usize], extensions: 112 };
        b.u32(0, header::MAGIC).u32(4, 3).u32(20, 16).u64(24, 1 << 30).u32(36, 2).u64(40, 3 * CLUSTER);
        b.u64(48, CLUSTER).u32(56, 1).u32(96, 4).u32(100, 112);
        b
    }

    fn u32(&mut self, at: usize, value: u32) -> &mut Self {
        self.bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        self
    }

    fn u64(&mut self, at: usize, value: u64) -> &mut Self {
        self.bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        self
    }

    fn extension(&mut self, kind: u32, data: &[u8]) -> &mut Self {
        let at = self.extensions;
        self.u32(at, kind).u32(at + 4, data.len() as u32);
        self.bytes[at + 8..at + 8 + data.len()].copy_from_slice(data);
        self.extensions = (at + 8 + data.len()).next_multiple_of(8);
        self
    }

    fn bitmaps(&mut self, count: u32, reserved: u32, size: u64, offset: u64) -> &mut Self {
        let data = [&count.to_be_bytes()[..], &reserved.to_be_bytes(), &size.to_be_bytes(), &offset.to_be_bytes()];
        self.extension(kind::BITMAPS, &data.concat())
    }

    fn crypto(&mut self, offset: u64, length: u64) -> &mut Self {
        self.extension(kind::CRYPTO_HEADER, &[offset.to_be_bytes(), length.to_be_bytes()].concat())
    }

    fn backing(&mut self, at: u64, name: &[u8]) -> &mut Self {
        self.u64(8, at).u32(16, name.len() as u32);
        if let Some(place) = self.bytes.get_mut(at as usize..).and_then(|rest| rest.get_mut(..name.len())) {
            place.copy_from_slice(name);
        }
        self
    }

    fn parse(&self) -> Result<Header, Error> {
        Header::parse(&self.bytes, FILE)
    }

    #[track_caller]
    fn refused(&self, field: &str, at: u64) {
        match self.parse() {
            Err(e @ Error::Invalid { .. }) => assert_eq!((e.field(), e.offset()), (Some(field), Some(at)), "{e}"),
            other => panic!("expected {field} to be refused, got {other:?}"),
        }
    }
}

fn new() -> Builder {
    Builder::new()
}

#[test]
fn the_plain_header_is_accepted() {
    let h = new().parse().unwrap();
    assert_eq!((h.version, h.virtual_size, h.l1_entries, h.l1_offset), (3, 1 << 30, 2, HostOffset(3 * CLUSTER)));
    assert_eq!((h.unsupported_for_reading(), h.unsupported_for_writing()), (None, None));
    let ranges: Vec<_> = h.host_ranges().iter().map(|r| (r.what, r.offset.0, r.length)).collect();
    let expected =
        [("header", 0, CLUSTER), ("L1 table", 3 * CLUSTER, 16), ("refcount table", CLUSTER, CLUSTER)].to_vec();
    assert_eq!(ranges, expected);
}

#[test]
fn a_malformed_header_is_refused() {
    new().u32(0, 0).refused("magic", 0);
    new().u32(4, 1).refused("version", 4);
    new().u32(4, 4).refused("version", 4);
    for bits in [0, 8, 22, 63, 64, u32::MAX] {
        new().u32(20, bits).refused("cluster_bits", 20);
    }
    new().u32(20, 17).refused("cluster_bits", 20);
    for length in [0, 72, 96, 103, 105, CLUSTER as u32 + 8, u32::MAX - 7] {
        new().u32(100, length).refused("header_length", 100);
    }
    new().u32(96, 7).refused("refcount_order", 96);
    new().u32(96, u32::MAX).refused("refcount_order", 96);
    assert!(Header::parse(&new().bytes, 100).is_err());
}

#[test]
fn an_l1_table_beyond_the_limits_is_refused() {
    new().u32(36, (32 << 20) / 8 + 1).refused("l1_size", 36);
    new().u32(36, u32::MAX).refused("l1_size", 36);
    new().u32(36, 1).refused("l1_size", 36);
    new().u32(36, (14 * CLUSTER / 8) as u32).refused("l1_table_offset", 40);
    new().u64(40, 0).refused("l1_table_offset", 40);
    new().u64(40, 3 * CLUSTER + 512).refused("l1_table_offset", 40);
    new().u64(40, FILE).refused("l1_table_offset", 40);
    new().u64(40, u64::MAX - CLUSTER + 1).refused("l1_table_offset", 40);
}

#[test]
fn a_disk_size_beyond_the_limits_is_refused() {
    new().u64(24, u64::MAX).refused("size", 24);
    new().u64(24, 1 << 63).refused("size", 24);
    new().u64(24, i64::MAX as u64).refused("l1_size", 36);
    assert_eq!(new().u64(24, 1000).parse().unwrap().virtual_size, 512);
}

#[test]
fn a_refcount_table_beyond_the_limits_is_refused() {
    new().u32(56, 0).refused("refcount_table_clusters", 56);
    new().u32(56, 129).refused("refcount_table_clusters", 56);
    new().u32(56, u32::MAX).refused("refcount_table_clusters", 56);
    new().u32(56, 128).refused("refcount_table_offset", 48);
    new().u64(48, 0).refused("refcount_table_offset", 48);
    new().u64(48, CLUSTER + 8).refused("refcount_table_offset", 48);
    new().u64(48, 1 << 56).refused("refcount_table_offset", 48);
}

#[test]
fn host_offsets_end_at_56_bits_even_if_the_file_is_longer() {
    let b = new().u64(48, (1 << 56) - CLUSTER).bytes.clone();
    assert!(Header::parse(&b, u64::MAX).is_ok());
    let e = Header::parse(&new().u64(48, 1 << 56).bytes, u64::MAX).unwrap_err();
    assert_eq!(e.field(), Some("refcount_table_offset"));
}

#[test]
fn snapshot_counts_beyond_the_limits_are_refused() {
    new().u32(60, 65537).u64(64, 4 * CLUSTER).refused("nb_snapshots", 60);
    new().u32(60, 1).refused("snapshots_offset", 64);
    new().u32(60, 1).u64(64, 4 * CLUSTER + 8).refused("snapshots_offset", 64);
    new().u32(60, 65536).u64(64, 4 * CLUSTER).refused("snapshots_offset", 64);
    assert_eq!(new().u32(60, 3).u64(64, 4 * CLUSTER).parse().unwrap().snapshot_count, 3);
}

#[test]
fn tables_that_overlap_are_refused() {
    new().u64(48, 3 * CLUSTER).refused("refcount_table_offset", 48);
    new().u32(56, 3).refused("l1_table_offset", 40);
    new().u32(60, 1).u64(64, CLUSTER).refused("snapshots_offset", 64);
    new().u64(88, 1).bitmaps(1, 0, 32, CLUSTER).refused("Header extension", 112);
    new().u32(32, 2).crypto(2 * CLUSTER, 2 * CLUSTER).refused("l1_table_offset", 40);
}

#[test]
fn extension_lengths_beyond_the_first_cluster_are_refused() {
    new().u32(112, 0x1234).u32(116, u32::MAX).refused("Header extension", 116);
    new().u32(112, 0x1234).u32(116, CLUSTER as u32 - 119).refused("Header extension", 116);
    // The backing file's name bounds them too.
    new().backing(128, b"base").u32(112, 0x1234).u32(116, 9).refused("Header extension", 116);
    new().backing(116, b"base").refused("Header extension", 112);
    new().extension(kind::BACKING_FORMAT, &[b'q'; 16]).refused("Backing file format name", 120);
    new().extension(kind::DATA_FILE, &[b'q'; 4097]).refused("External data file name", 120);
    new()
        .extension(kind::BACKING_FORMAT, b"raw")
        .extension(kind::BACKING_FORMAT, b"qcow2")
        .refused("Header extension", 128);
}

#[test]
fn extensions_may_fill_the_area_to_its_end() {
    let h = new().u32(112, 0x1234).u32(116, CLUSTER as u32 - 120).parse().unwrap();
    assert_eq!(h.unknown_extensions.len(), 1);
    let h = new().backing(128, b"base").u32(112, 0x1234).u32(116, 8).parse().unwrap();
    assert_eq!(h.backing_file.as_deref(), Some("base"));
}

#[test]
fn unknown_extensions_are_kept_in_order() {
    let h = new().extension(7, b"one").extension(kind::BACKING_FORMAT, b"raw").extension(7, b"").parse().unwrap();
    assert_eq!(h.unknown_extensions, [(7, b"one".to_vec()), (7, vec![])]);
    assert_eq!(h.backing_format.as_deref(), Some("raw"));
}

#[test]
fn hostile_backing_names_are_refused() {
    new().backing(CLUSTER + 1, b"x").refused("backing_file_offset", 8);
    new().u64(8, u64::MAX).u32(16, 1).refused("backing_file_offset", 8);
    new().u64(8, 100).u32(16, 1).refused("backing_file_offset", 8);
    new().backing(512, &[b'x'; 1024]).refused("backing_file_size", 16);
    new().backing(CLUSTER - 2, b"abc").refused("backing_file_size", 16);
    new().backing(512, b"a\0b").refused("backing_file_name", 512);
    new().backing(512, b"\xff").refused("backing_file_name", 512);
    assert_eq!(new().backing(512, b"").parse().unwrap().backing_file, None);
    assert_eq!(new().backing(512, &[b'x'; 1023]).parse().unwrap().backing_file.unwrap().len(), 1023);
}

#[test]
fn bitmap_counts_and_directories_beyond_the_limits_are_refused() {
    new().bitmaps(0, 0, 32, 4 * CLUSTER).refused("nb_bitmaps", 120);
    new().bitmaps(65536, 0, 65536 * 32, 4 * CLUSTER).refused("nb_bitmaps", 120);
    new().bitmaps(1, 1, 32, 4 * CLUSTER).refused("Bitmaps extension", 124);
    new().bitmaps(2, 0, 63, 4 * CLUSTER).refused("bitmap_directory_size", 128);
    new().bitmaps(1, 0, 65535 * 1024 + 1, 4 * CLUSTER).refused("bitmap_directory_size", 128);
    new().bitmaps(1, 0, 32, 4 * CLUSTER + 512).refused("bitmap_directory_offset", 136);
    new().bitmaps(1, 0, 32, 0).refused("bitmap_directory_offset", 136);
    new().u64(88, 1).bitmaps(1, 0, 32, FILE).refused("bitmap_directory_offset", 136);
    new().extension(kind::BITMAPS, &[0; 23]).refused("Bitmaps extension", 116);
    new().u64(88, 1).refused("autoclear_features", 88);
}

#[test]
fn stale_bitmaps_own_nothing() {
    let h = new().u64(88, 1).bitmaps(1, 0, 32, 4 * CLUSTER).parse().unwrap();
    assert!(h.bitmaps_consistent());
    assert_eq!(h.host_ranges().len(), 4);
    let stale = new().bitmaps(1, 0, 32, 100 * CLUSTER).parse().unwrap();
    assert!(!stale.bitmaps_consistent());
    assert_eq!(stale.host_ranges().len(), 3);
    for h in [h, stale] {
        assert_eq!(h.unsupported_for_reading(), None);
        assert_eq!(h.unsupported_for_writing(), None);
    }
}

#[test]
fn encryption_is_seen_although_it_has_no_incompatible_bit() {
    let h = new().u32(32, 1).parse().unwrap();
    assert_eq!((h.crypt_method, h.unsupported_for_writing()), (crypt::AES, None));
    let h = new().u32(32, 2).crypto(4 * CLUSTER, 100_000).parse().unwrap();
    assert_eq!((h.crypt_method, h.unsupported_for_writing()), (crypt::LUKS, None));
    assert_eq!(h.crypto_header, Some((HostOffset(4 * CLUSTER), 100_000)));
    new().u32(32, 3).refused("crypt_method", 32);
    new().u32(32, 2).refused("crypt_method", 32);
    new().crypto(4 * CLUSTER, 512).refused("Full disk encryption header pointer", 120);
    let luks = |offset, length| {
        let mut b = new();
        b.u32(32, 2).crypto(offset, length);
        b
    };
    luks(4 * CLUSTER + 512, 512).refused("Full disk encryption header pointer", 120);
    luks(0, 512).refused("Full disk encryption header pointer", 120);
    luks(4 * CLUSTER, 0).refused("Full disk encryption header pointer", 128);
    luks(4 * CLUSTER, u64::MAX).refused("Full disk encryption header pointer", 120);
    new().u32(32, 2).extension(kind::CRYPTO_HEADER, &[0; 8]).refused("Full disk encryption header pointer", 116);
}

#[test]
fn compression_type_and_bit_must_agree() {
    let with = |bit: u64, kind: u8| {
        let mut b = new();
        b.u64(72, bit).bytes[104] = kind;
        b
    };
    with(0, 1).refused("compression_type", 104);
    with(incompatible::COMPRESSION_TYPE, 0).refused("compression_type", 104);
    with(incompatible::COMPRESSION_TYPE, 2).refused("compression_type", 104);
    assert_eq!(with(incompatible::COMPRESSION_TYPE, 1).parse().unwrap().compression_type, 1);
    // A shorter header has no such field: what follows is an extension.
    let mut short = new();
    short.extensions = 104;
    let h = short.u32(100, 104).extension(0x0100_0000, b"").parse().unwrap();
    assert_eq!((h.compression_type, h.unknown_extensions.len()), (0, 1));
}

#[test]
fn features_that_are_not_supported_are_named() {
    let h = new().u64(72, incompatible::DATA_FILE).extension(kind::DATA_FILE, b"d.raw").parse().unwrap();
    assert!(h.has_data_file() && !h.has_raw_data_file() && h.unsupported_for_writing().is_none());
    assert_eq!(h.data_file.as_deref(), Some("d.raw"));
    new().extension(kind::DATA_FILE, b"d.raw").refused("incompatible_features", 72);
    let h = new().u64(72, incompatible::DATA_FILE).parse().unwrap();
    assert_eq!((h.has_data_file(), h.data_file), (true, None));
    let h = new().u64(72, incompatible::EXTENDED_L2).u32(36, 4).parse().unwrap();
    assert_eq!(h.unsupported_for_reading(), None);
    assert!(h.geometry.extended_l2);
    let h = new().u64(72, incompatible::CORRUPT).parse().unwrap();
    assert_eq!(h.unsupported_for_reading(), None);
    assert_eq!(h.unsupported_for_writing().as_deref(), Some("the corrupt bit is set"));
    new().u64(88, 2).refused("autoclear_features", 88);
}

#[test]
fn extended_l2_entries_halve_what_an_l1_entry_covers() {
    // Two L1 entries cover 1 GiB, or half of that.
    new().u64(72, incompatible::EXTENDED_L2).u64(24, (512 << 20) + 512).u32(36, 2).refused("l1_size", 36);
    assert!(new().u64(72, incompatible::EXTENDED_L2).u64(24, 512 << 20).u32(36, 2).parse().is_ok());
    let mut small = new();
    small.u32(20, 13).u64(72, incompatible::EXTENDED_L2).refused("cluster_bits", 20);
}

#[test]
fn unknown_incompatible_features_are_named_by_the_images_own_table() {
    let mut entry = [0u8; 48];
    entry[1] = 40;
    entry[2..9].copy_from_slice(b"wings\n\xff");
    let mut other = entry;
    other[0] = 1;
    other[1] = 41;
    let table = [&other[..], &entry, &[0; 7]].concat();
    let e = new().u64(72, 1 << 40 | 1 << 41).extension(kind::FEATURE_NAMES, &table).parse().unwrap_err();
    let Error::Unsupported { what } = e else { panic!("{e}") };
    assert!(what.starts_with("incompatible feature \"wings\\n"), "{what}");
    assert!(what.ends_with("unknown incompatible feature (bit 41)"), "{what}");
}

#[test]
fn an_empty_disk_needs_no_l1_table() {
    let h = new().u64(24, 0).u32(36, 0).u64(40, 0).parse().unwrap();
    assert_eq!((h.virtual_size, h.l1_entries), (0, 0));
}

#[test]
fn patches_touch_their_fields_only() {
    let mut b = new();
    let mut sector: Sector = b.bytes[..512].try_into().unwrap();
    header::patch_l1(&mut sector, HostOffset(5 * CLUSTER), 9);
    header::patch_refcount_table(&mut sector, HostOffset(7 * CLUSTER), 2);
    header::patch_virtual_size(&mut sector, 2 << 30);
    header::patch_incompatible(&mut sector, incompatible::DIRTY);
    header::patch_autoclear(&mut sector, 0);
    let expected = Header {
        l1_offset: HostOffset(5 * CLUSTER),
        l1_entries: 9,
        refcount_table_offset: HostOffset(7 * CLUSTER),
        refcount_table_clusters: 2,
        virtual_size: 2 << 30,
        incompatible: incompatible::DIRTY,
        ..b.parse().unwrap()
    };
    b.bytes[..512].copy_from_slice(&sector);
    assert_eq!(b.parse().unwrap(), expected);
}

#[test]
fn version_2_has_no_feature_bits_to_patch() {
    let mut b = new();
    b.bytes[72..].fill(0);
    let mut sector: Sector = b.u32(4, 2).bytes[..512].try_into().unwrap();
    let before = sector;
    header::patch_incompatible(&mut sector, 1);
    header::patch_autoclear(&mut sector, 1);
    assert_eq!(sector, before);
    let h = b.parse().unwrap();
    assert_eq!((h.header_length, h.geometry.refcount_order, h.incompatible), (72, 4, 0));
}

fn qemu_img(args: &[&str]) {
    let out = Command::new("qemu-img").args(args).output().unwrap();
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

fn parse_file(path: &Path) -> Header {
    let file = File::open(path).unwrap();
    let length = file.metadata().unwrap().len();
    let mut bytes = Vec::new();
    file.take(Header::READ_LEN as u64).read_to_end(&mut bytes).unwrap();
    Header::parse(&bytes, length).unwrap()
}

#[test]
fn headers_of_qemu_img_are_understood() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    let name = path.to_str().unwrap();
    for (options, size) in [
        ("compat=0.10", 0u64),
        ("compat=0.10,cluster_size=512", 3 << 30),
        ("compat=1.1,cluster_size=512,refcount_bits=64", 3 << 30),
        ("compat=1.1,cluster_size=2M,refcount_bits=1", 5 << 40),
        ("compat=1.1,lazy_refcounts=on,preallocation=metadata", 1 << 30),
        ("compat=1.1,compression_type=zstd", 1 << 30),
        ("compat=1.1,extended_l2=on", 1 << 30),
    ] {
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, name, &size.to_string()]);
        let h = parse_file(&path);
        assert_eq!(h.virtual_size, size, "{options}");
        assert_eq!(h.version, if options.starts_with("compat=0.10") { 2 } else { 3 });
        assert_eq!(h.compatible & 1 == 1, options.contains("lazy"));
        assert_eq!(h.compression_type == 1, options.contains("zstd"));
        assert_eq!(h.unsupported_for_reading(), None);
        assert_eq!(h.geometry.extended_l2, options.contains("extended"));
        assert_eq!(h.unknown_extensions, []);
    }
    qemu_img(&["create", "-q", "-f", "raw", dir.path().join("base").to_str().unwrap(), "1M"]);
    qemu_img(&["create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", name, "1M"]);
    qemu_img(&["snapshot", "-c", "one", name]);
    qemu_img(&["bitmap", "--add", name, "b0"]);
    let h = parse_file(&path);
    assert_eq!((h.backing_file.as_deref(), h.backing_format.as_deref()), (Some("base"), Some("raw")));
    assert_eq!((h.snapshot_count, h.bitmaps.map(|b| b.count)), (1, Some(1)));
    assert!(h.bitmaps_consistent());
    assert_eq!(h.unsupported_for_writing(), None);
    let options = "encrypt.format=aes,encrypt.key-secret=s";
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, "--object", "secret,id=s,data=x", name, "1M"]);
    let h = parse_file(&path);
    assert_eq!((h.crypt_method, h.unsupported_for_writing()), (crypt::AES, None));
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000), length: u64) {
        let _ = Header::parse(&bytes, length);
    }

    /// A right header with some bytes changed: it gets past the first checks.
    #[test]
    fn damaged_headers_never_panic_and_never_yield_tables_outside_the_file(
        damage in prop::collection::vec((0usize..200, any::<u8>()), 1..6),
        small in any::<bool>(),
        file in prop_oneof![Just(FILE), any::<u64>()],
    ) {
        let mut b = new();
        b.extension(kind::BACKING_FORMAT, b"raw").bitmaps(1, 0, 32, 5 * CLUSTER).backing(300, b"base");
        if small {
            b.u32(20, 9).u64(24, 4096);
        }
        for (at, value) in damage {
            b.bytes[at] = value;
        }
        if let Ok(h) = Header::parse(&b.bytes, file) {
            let mut ranges = h.host_ranges();
            ranges.sort_by_key(|r| r.offset);
            for pair in ranges.windows(2) {
                prop_assert!(pair[0].offset.0 + pair[0].length <= pair[1].offset.0);
            }
            for r in ranges {
                prop_assert!(r.offset.0 + r.length <= file);
                prop_assert!(r.offset.0 % h.geometry.cluster_size() == 0);
            }
            prop_assert!(h.virtual_size.div_ceil(h.geometry.cluster_size()) <= u64::from(h.l1_entries) << 18);
        }
    }
}
