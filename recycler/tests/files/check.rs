//! The check against QEMU's, on images that QEMU made: sound ones, and ones damaged in named ways.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::check::check;
use qcow_recycler::device::Features;
use qcow_recycler::format::refcount;
use qcow_recycler::{BlockDevice, CheckReport, Repair};

/// What a device was asked to change.
#[derive(Clone)]
enum Change {
    Write(usize, Vec<u8>),
    Truncate(usize),
    Flush,
}

/// A file in memory that counts its changes and remembers them.
struct Memory {
    bytes: Mutex<Vec<u8>>,
    changes: AtomicUsize,
    history: Mutex<Vec<Change>>,
    resize: bool,
    /// No room for a longer file.
    full: bool,
    /// Flushes that succeed before one fails, as if for want of room.
    flushes: AtomicUsize,
}

impl Memory {
    fn new(bytes: Vec<u8>) -> Self {
        let (changes, history) = (AtomicUsize::new(0), Mutex::default());
        let flushes = AtomicUsize::new(usize::MAX);
        Memory { bytes: Mutex::new(bytes), changes, history, resize: true, full: false, flushes }
    }

    fn range(bytes: &[u8], offset: u64, length: usize) -> io::Result<std::ops::Range<usize>> {
        let range = offset as usize..offset as usize + length;
        if range.end > bytes.len() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(range) }
    }
}

impl BlockDevice for Memory {
    fn features(&self) -> Features {
        Features { resize: self.resize, ..Features::default() }
    }

    async fn length(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }

    async fn read(&self, offset: u64, mut buf: IoBufMut<'_>) -> io::Result<()> {
        let bytes = self.bytes.lock().unwrap();
        buf.copy_from(&bytes[Self::range(&bytes, offset, buf.len())?]);
        Ok(())
    }

    async fn write(&self, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
        self.changes.fetch_add(1, Ordering::Relaxed);
        let mut bytes = self.bytes.lock().unwrap();
        let range = Self::range(&bytes, offset, buf.len())?;
        buf.copy_to(&mut bytes[range.clone()]);
        self.history.lock().unwrap().push(Change::Write(range.start, bytes[range].to_vec()));
        Ok(())
    }

    async fn flush(&self) -> io::Result<()> {
        if self.flushes.fetch_sub(1, Ordering::Relaxed) == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.history.lock().unwrap().push(Change::Flush);
        Ok(())
    }

    async fn truncate(&self, length: u64) -> io::Result<()> {
        if self.full {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.changes.fetch_add(1, Ordering::Relaxed);
        self.bytes.lock().unwrap().resize(length as usize, 0);
        self.history.lock().unwrap().push(Change::Truncate(length as usize));
        Ok(())
    }
}

fn run(program: &str, args: &[&str]) -> String {
    let out = Command::new(program).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{program} {args:?}: {text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

/// What `qemu-img check` says, by the same names.
#[derive(Debug, Default, PartialEq, Eq)]
struct Verdict {
    corruptions: u64,
    leaks: u64,
    errors: u64,
    allocated: u64,
    total: u64,
    fragmented: u64,
    end: u64,
}

fn qemu(path: &Path) -> Verdict {
    qemu_check(&["-f", "qcow2", path.to_str().unwrap()])
}

fn qemu_check(image: &[&str]) -> Verdict {
    let out = Command::new("qemu-img").args(["check", "--output=json"]).args(image).output().unwrap();
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.contains("check-errors"), "{text}{}", String::from_utf8_lossy(&out.stderr));
    let number = |key: &str| {
        let Some((_, rest)) = text.split_once(&format!("\"{key}\": ")) else { return 0 };
        rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap()].parse().unwrap()
    };
    Verdict {
        corruptions: number("corruptions"),
        leaks: number("leaks"),
        errors: number("check-errors"),
        allocated: number("allocated-clusters"),
        total: number("total-clusters"),
        fragmented: number("fragmented-clusters"),
        end: number("image-end-offset"),
    }
}

fn verdict(report: &CheckReport) -> Verdict {
    Verdict {
        corruptions: report.corruptions,
        leaks: report.leaks,
        errors: 0,
        allocated: report.allocated_clusters,
        total: report.total_clusters,
        fragmented: report.fragmented_clusters,
        end: report.image_end_offset,
    }
}

/// An image in a file of a directory of its own.
struct Image {
    dir: tempfile::TempDir,
}

impl Image {
    /// An image made with these `qemu-img create` options.
    fn create(options: &str, size: &str) -> Self {
        let image = Image { dir: tempfile::tempdir().unwrap() };
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, &image.name(), size]);
        image
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    fn name(&self) -> String {
        self.path().to_str().unwrap().to_owned()
    }

    fn io(&self, commands: &[&str]) {
        let name = self.name();
        let mut args = vec!["-f", "qcow2"];
        commands.iter().for_each(|c| args.extend(["-c", c]));
        args.push(&name);
        run("qemu-io", &args);
    }

    fn snapshot(&self, name: &str) {
        run("qemu-img", &["snapshot", "-q", "-c", name, &self.name()]);
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap()
    }

    /// Checks the file, which must not change, and compares with QEMU.
    fn agrees(&self, what: &str) -> CheckReport {
        let device = Memory::new(self.bytes());
        let report = block_on(check(&device, Repair::No)).unwrap();
        assert_eq!(device.changes.load(Ordering::Relaxed), 0, "{what}");
        assert_eq!(verdict(&report), qemu(&self.path()), "{what}: {report:#?}");
        report
    }

    /// Checks and repairs the file; a second check must find what the first said it left.
    fn repair(&self, mode: Repair, what: &str) -> CheckReport {
        let device = Memory::new(self.bytes());
        let report = block_on(check(&device, mode)).unwrap();
        std::fs::write(self.path(), &*device.bytes.lock().unwrap()).unwrap();
        let after = block_on(check(&device, Repair::No)).unwrap();
        let left = (report.corruptions - report.corruptions_fixed, report.leaks - report.leaks_fixed);
        assert_eq!((after.corruptions, after.leaks), left, "{what}: {report:#?}, then {after:#?}");
        assert_eq!(after.image_end_offset, report.image_end_offset, "{what}");
        report
    }

    fn edit(&self, change: impl FnOnce(&mut Layout)) {
        let mut layout = Layout::new(self.bytes());
        change(&mut layout);
        std::fs::write(self.path(), layout.bytes).unwrap();
    }
}

/// A raw view of an image, enough to find and break things.
struct Layout {
    bytes: Vec<u8>,
    cluster: u64,
    order: u32,
    l1: u64,
    table: u64,
}

impl Layout {
    fn new(bytes: Vec<u8>) -> Self {
        let mut this = Layout { bytes, cluster: 0, order: 4, l1: 0, table: 0 };
        this.cluster = 1 << (this.get(16) & 0xffff_ffff);
        if this.get(4) >> 32 == 3 {
            this.order = (this.get(96) >> 32) as u32;
        }
        (this.l1, this.table) = (this.get(40), this.get(48));
        this
    }

    fn get(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.bytes[at as usize..][..8].try_into().unwrap())
    }

    fn put(&mut self, at: u64, value: u64) {
        self.bytes[at as usize..][..8].copy_from_slice(&value.to_be_bytes());
    }

    /// Where the L2 table of an L1 entry starts.
    fn l2(&self, index: u64) -> u64 {
        self.get(self.l1 + index * 8) & OFFSET
    }

    /// Where the L2 entry of a guest cluster stands.
    fn l2_entry(&self, guest: u64) -> u64 {
        let per_table = self.cluster / 8;
        self.l2(guest / per_table) + guest % per_table * 8
    }

    fn data(&self, guest: u64) -> u64 {
        self.get(self.l2_entry(guest)) & OFFSET
    }

    /// The refcount block of a cluster and the index in it.
    fn refcount_at(&self, offset: u64) -> (usize, usize) {
        let per_block = (self.cluster * 8) >> self.order;
        let cluster = offset / self.cluster;
        (self.get(self.table + cluster / per_block * 8) as usize, (cluster % per_block) as usize)
    }

    fn set_refcount(&mut self, offset: u64, value: u64) {
        let (block, index) = self.refcount_at(offset);
        let order = self.order;
        refcount::set(&mut self.bytes[block..][..self.cluster as usize], order, index, value);
    }
}

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const ZERO: u64 = 1;

/// 64 KiB clusters, three stretches of data, the last one over other data: fragmented.
fn plain() -> Image {
    let image = Image::create("cluster_size=64k", "64M");
    image.io(&["write -P 1 0 1M", "write -P 2 20M 256k", "write -P 3 1M 192k", "write -z 2M 128k"]);
    image
}

#[test]
fn sound_images_of_all_cluster_sizes_and_refcount_widths() {
    for cluster_bits in 9..=21u32 {
        for width in [1, 2, 8, 16, 64] {
            let cluster = 1u64 << cluster_bits;
            let options = format!("cluster_size={cluster},refcount_bits={width}");
            let image = Image::create(&options, &format!("{}", cluster * 400));
            let write = |at: u64, n: u64| format!("write -P 7 {} {}", at * cluster, n * cluster);
            let zero = format!("write -z {} {}", 5 * cluster, cluster);
            let discard = format!("discard {} {}", 41 * cluster, 3 * cluster);
            image.io(&[&write(0, 20), &write(300, 3), &write(40, 10), &zero, &discard]);
            image.agrees(&options);
            if width > 1 {
                image.snapshot("a");
                image.io(&[&write(2, 5), &write(90, 2)]);
                if width > 2 {
                    image.snapshot("b");
                    image.io(&[&write(301, 1)]);
                }
                let report = image.agrees(&options);
                assert!(report.is_clean(), "{options}");
            }
        }
    }
}

#[test]
fn version_2_lazy_refcounts_and_preallocation() {
    for options in [
        "compat=0.10",
        "lazy_refcounts=on",
        "preallocation=metadata",
        "preallocation=falloc,cluster_size=4k",
        "preallocation=metadata,extended_l2=on",
        "compression_type=zstd",
    ] {
        let image = Image::create(options, "16M");
        image.io(&["write -P 1 0 100k", "write -P 1 9M 1M", "write -z 64k 128k"]);
        assert!(image.agrees(options).is_clean());
    }
}

/// Half of the data compresses well: extents of every length share clusters and straddle them.
fn compressible(path: &Path, length: usize) {
    let mut numbers = Numbers(1);
    let bytes: Vec<u8> = (0..length)
        .map(|i| if (i >> 9) % ((i >> 16) % 7 + 2) == 0 { (numbers.next() >> 32) as u8 } else { 3 })
        .collect();
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn compressed_clusters() {
    for (cluster, kind) in [("512", "zlib"), ("4k", "zstd"), ("64k", "zlib"), ("2M", "zlib")] {
        let image = Image { dir: tempfile::tempdir().unwrap() };
        let raw = image.dir.path().join("raw");
        compressible(&raw, 3 << 20);
        let options = format!("cluster_size={cluster},compression_type={kind}");
        let raw = raw.to_str().unwrap();
        run("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, raw, &image.name()]);
        let report = image.agrees(&options);
        assert!(report.is_clean() && report.allocated_clusters > 0, "{options}");
        image.snapshot("a");
        image.io(&["write -P 9 100k 300k"]);
        assert!(image.agrees(&options).is_clean(), "{options}");
    }
}

#[test]
fn bitmaps() {
    let image = plain();
    for name in ["a", "b"] {
        run("qemu-img", &["bitmap", "--add", "--enable", "-g", "64k", &image.name(), name]);
        image.io(&["write -P 5 30M 1M"]);
    }
    assert!(image.agrees("bitmaps").is_clean());
    // Without its autoclear bit a bitmap is stale, and its clusters are leaked.
    image.edit(|l| l.put(88, 0));
    let report = image.agrees("stale bitmaps");
    assert!(report.leaks > 0 && report.corruptions == 0);
    assert!(image.repair(Repair::Leaks, "stale bitmaps").is_clean());
    image.agrees("stale bitmaps, repaired");
}

#[test]
fn extended_l2_entries() {
    for cluster in ["16k", "64k", "2M"] {
        let options = format!("extended_l2=on,cluster_size={cluster}");
        let image = Image::create(&options, "64M");
        image.io(&["write -P 1 0 1M", "write -P 1 3M 2k", "write -z 64k 8k", "write -P 2 20M 70k"]);
        image.snapshot("a");
        image.io(&["write -P 3 4k 2k"]);
        assert!(image.agrees(&options).is_clean());
        // A flag repaired in 16-byte entries.
        image.edit(|l| l.put(l.l2(0), l.get(l.l2(0)) ^ COPIED));
        assert_eq!(image.agrees(&options).corruptions, 1);
        assert!(image.repair(Repair::All, &options).is_clean());
        assert!(image.agrees(&options).is_clean());
    }
}

#[test]
fn external_data_files() {
    for raw in ["off", "on"] {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let image = Image::create(&format!("data_file={},data_file_raw={raw}", data.to_str().unwrap()), "32M");
        image.io(&["write -P 1 0 1M", "write -P 1 9M 64k", "write -z 64k 64k"]);
        assert!(image.agrees("external data file").is_clean());
        image.edit(|l| l.put(l.l2_entry(3), l.get(l.l2_entry(3)) & !COPIED));
        assert_eq!(image.agrees("external data file").corruptions, 1);
        assert!(image.repair(Repair::All, "external data file").is_clean());
        assert!(image.agrees("external data file").is_clean());
    }
}

#[test]
fn luks_headers() {
    let image = Image { dir: tempfile::tempdir().unwrap() };
    let (secret, options) = ("secret,id=s,data=abc", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10");
    run("qemu-img", &["create", "-q", "--object", secret, "-f", "qcow2", "-o", options, &image.name(), "8M"]);
    let report = block_on(check(&Memory::new(image.bytes()), Repair::No)).unwrap();
    let options = format!("driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename={}", image.name());
    assert_eq!(verdict(&report), qemu_check(&["--object", secret, "--image-opts", &options]), "{report:#?}");
    assert!(report.is_clean());
}

#[test]
fn leaks_are_found_and_given_back() {
    for mode in [Repair::Leaks, Repair::All] {
        let image = plain();
        image.edit(|l| {
            l.put(l.l2_entry(0), 0);
            l.put(l.l2_entry(7), 0);
            // Still referred to, so its flag has to change with its refcount.
            l.set_refcount(l.data(9), 5);
            l.put(l.l2_entry(9), l.get(l.l2_entry(9)) & !COPIED);
        });
        assert_eq!(image.agrees("leaks").leaks, 3);
        let report = image.repair(mode, "leaks");
        assert!(report.is_clean() && report.leaks_fixed == 3);
        assert!(image.agrees("leaks").is_clean());
        image.io(&["read -P 1 64k 384k", "read -P 1 512k 512k", "read -P 3 1M 192k", "read -P 2 20M 256k"]);
    }
}

#[test]
fn leaked_counts_past_the_end_of_the_file_are_leaks() {
    let image = plain();
    image.edit(|l| l.set_refcount(l.bytes.len() as u64 + (10 << 20), 1));
    let report = image.repair(Repair::Leaks, "past the end");
    assert_eq!((report.leaks, report.leaks_fixed), (1, 1));
    assert!(image.agrees("past the end").is_clean());
}

#[test]
fn low_refcounts_are_raised_only_when_everything_may_be_repaired() {
    for refcounts in [(0, 0), (0, 1)] {
        let image = plain();
        image.snapshot("a");
        image.edit(|l| {
            l.set_refcount(l.data(1), refcounts.0);
            l.set_refcount(l.l2(0), refcounts.1);
            l.set_refcount(l.data(3), 1);
        });
        let found = image.agrees("low refcounts").corruptions;
        assert!(found >= 3);
        let report = image.repair(Repair::Leaks, "low refcounts");
        assert_eq!((report.corruptions, report.corruptions_fixed), (found, 0));
        let report = image.repair(Repair::All, "low refcounts");
        assert!(report.is_clean() && report.corruptions_fixed == found);
        assert!(image.agrees("low refcounts").is_clean());
        image.io(&["write -P 8 64k 128k", "read -P 1 0 64k"]);
        assert!(image.agrees("low refcounts").is_clean());
    }
}

#[test]
fn the_dirty_bit_is_cleared_by_a_full_repair() {
    let image = Image::create("lazy_refcounts=on", "64M");
    let name = image.name();
    // Killed with lazy refcounts: the refcounts on disk are behind.
    let killed = ["-f", "qcow2", "-c", "write 0 5M", "-c", "flush", "-c", "sigraise 9", &name];
    assert!(!Command::new("qemu-io").args(killed).output().unwrap().status.success());
    let dirty = |image: &Image| Layout::new(image.bytes()).get(72) & 1;
    assert_eq!(dirty(&image), 1);
    assert!(image.agrees("dirty").corruptions > 0);
    image.repair(Repair::Leaks, "dirty");
    assert_eq!(dirty(&image), 1);
    assert!(image.repair(Repair::All, "dirty").is_clean());
    assert_eq!(dirty(&image), 0);
    assert!(image.agrees("dirty").is_clean());
}

#[test]
fn copied_flags_that_lie_are_turned() {
    let image = plain();
    image.snapshot("a");
    image.io(&["write -P 4 0 128k"]);
    image.edit(|l| {
        for at in [l.l1, l.l2_entry(0), l.l2_entry(5), l.l2_entry(321)] {
            l.put(at, l.get(at) ^ COPIED);
        }
    });
    assert_eq!(image.agrees("flags").corruptions, 4);
    assert!(image.repair(Repair::All, "flags").is_clean());
    assert!(image.agrees("flags").is_clean());
}

#[test]
fn one_cluster_for_two_guest_clusters_is_counted_twice() {
    let image = plain();
    image.edit(|l| l.put(l.l2_entry(4), l.get(l.l2_entry(5))));
    let report = image.agrees("shared data");
    assert_eq!((report.corruptions, report.leaks), (1, 1));
    assert!(image.repair(Repair::All, "shared data").is_clean());
    assert!(image.agrees("shared data").is_clean());
    image.io(&["write -P 6 256k 64k", "read -P 1 320k 64k"]);
}

#[test]
fn an_entry_outside_the_file_is_reported_and_keeps_leaks_where_they_are() {
    let image = plain();
    image.edit(|l| l.put(l.l2_entry(4), 1 << 40 | COPIED));
    let report = image.agrees("outside");
    assert_eq!(report.leaks, 1);
    let repaired = image.repair(Repair::All, "outside");
    assert_eq!((repaired.leaks_fixed, repaired.corruptions - repaired.corruptions_fixed), (0, 1), "{repaired:#?}");
    assert!(repaired.messages.iter().any(|m| m.contains("left alone")));
    image.agrees("outside, repaired");
}

#[test]
fn an_entry_at_metadata_is_made_harmless_and_stays_an_error() {
    type Place = fn(&Layout) -> u64;
    let places: [(&str, Place); 5] = [
        ("L1 table", |l| l.l1),
        ("L2 table", |l| l.l2(0)),
        ("refcount table", |l| l.table),
        ("refcount block", |l| l.get(l.table)),
        ("snapshot table", |l| l.get(64)),
    ];
    for (what, place) in places {
        let image = plain();
        image.snapshot("a");
        image.io(&["write -P 4 0 1M"]);
        image.edit(|l| l.put(l.l2_entry(4), place(l) | COPIED));
        image.agrees(what);
        let before = image.bytes();
        let report = image.repair(Repair::All, what);
        assert!(!report.is_clean() && report.leaks_fixed == 0, "{what}: {report:#?}");
        let after = image.bytes();
        let l = Layout::new(after);
        if what == "refcount block" {
            // Either the entry or the refcount table is wrong, so the block is not touched.
            assert_eq!(before, l.bytes);
        } else {
            // A cluster with two references is not written in place, nor freed with the first of them.
            let (block, index) = l.refcount_at(place(&l));
            assert_eq!(refcount::get(&l.bytes[block..][..l.cluster as usize], l.order, index), 2, "{what}");
            // The entry is in the very table it refers to, which is then not written.
            assert_eq!(l.get(l.l2_entry(4)) & COPIED != 0, what == "L2 table");
        }
        // QEMU does not tell metadata from data once the refcount covers both.
        assert!(qemu(&image.path()).corruptions <= report.corruptions - report.corruptions_fixed, "{what}");
    }
}

#[test]
fn refcount_blocks_that_are_nowhere_are_made_anew() {
    for (entry, what) in [(0, "missing"), (1 << 40, "beyond"), (0x10200, "unaligned"), (0x2_0001, "reserved bits")] {
        let image = plain();
        image.edit(|l| l.put(l.table, entry));
        let report = block_on(check(&Memory::new(image.bytes()), Repair::No)).unwrap();
        let theirs = qemu(&image.path());
        // QEMU goes on to use an entry with reserved bits, and cannot go on with an unaligned one.
        if entry & 0xffff == 0 {
            assert_eq!(verdict(&report), theirs, "{what}");
        } else {
            assert!(report.corruptions > 0, "{what}");
        }
        assert!(image.repair(Repair::All, what).is_clean(), "{what}");
        assert!(image.agrees(what).is_clean(), "{what}");
        image.io(&["read -P 1 0 1M", "read -P 3 1M 192k", "read -P 2 20M 256k", "write 40M 1M"]);
        assert!(image.agrees(what).is_clean(), "{what}");
    }
}

#[test]
fn a_refcount_block_that_counts_two_ranges_is_replaced_for_the_second() {
    // Several refcount blocks in use: 512-byte clusters, 64-bit refcounts.
    let image = Image::create("cluster_size=512,refcount_bits=64", "256k");
    image.io(&["write -P 1 0 256k"]);
    image.edit(|l| l.put(l.table + 3 * 8, l.get(l.table + 8)));
    assert!(!block_on(check(&Memory::new(image.bytes()), Repair::No)).unwrap().is_clean());
    assert!(image.repair(Repair::All, "shared block").is_clean());
    assert!(image.agrees("shared block").is_clean());
    image.io(&["read -P 1 0 256k"]);
}

#[test]
fn a_refcount_table_that_is_too_short_moves() {
    // One cluster of table counts 64 * 64 clusters of 512 bytes: 2 MiB. The file is longer, and a table of one cluster
    // is all that is left of the refcounts.
    let image = Image::create("cluster_size=512,refcount_bits=64", "3M");
    image.io(&["write -P 1 0 3M"]);
    image.edit(|l| l.put(56, 1 << 32 | l.get(56) & 0xffff_ffff));
    assert!(!image.repair(Repair::Leaks, "short table").is_clean());
    let report = image.repair(Repair::All, "short table");
    assert!(report.is_clean(), "{report:#?}");
    assert!(image.agrees("short table").is_clean());
    image.io(&["read -P 1 0 3M", "write -P 2 1M 64k"]);
    assert!(image.agrees("short table").is_clean());
}

#[test]
fn a_device_that_cannot_grow_keeps_its_missing_block_unless_there_is_room() {
    for (room, clean) in [(0, false), (1 << 20, true)] {
        let image = plain();
        image.edit(|l| {
            l.put(l.table, 0);
            l.bytes.resize(l.bytes.len() + room, 0);
        });
        let device = Memory { resize: false, ..Memory::new(image.bytes()) };
        let report = block_on(check(&device, Repair::All)).unwrap();
        assert_eq!(report.is_clean(), clean, "{report:#?}");
        assert_eq!(device.bytes.lock().unwrap().len(), image.bytes().len());
        if clean {
            std::fs::write(image.path(), &*device.bytes.lock().unwrap()).unwrap();
            assert!(image.agrees("a device that cannot grow").is_clean());
        }
    }
}

#[test]
fn leaks_that_an_unknown_feature_may_own_are_left() {
    let image = plain();
    image.edit(|l| {
        l.put(l.l2_entry(0), 0);
        l.put(88, 1 << 40);
    });
    let report = image.repair(Repair::All, "unknown autoclear bit");
    assert_eq!((report.leaks, report.leaks_fixed), (1, 0));
    assert!(report.messages.iter().any(|m| m.contains("autoclear")), "{report:#?}");
}

#[test]
fn snapshots_that_lead_nowhere_are_errors_and_cost_nothing() {
    for (at, value) in [(0, 1 << 50), (0, 0x200), (8, u64::MAX), (0, 0), (32, u64::MAX)] {
        let image = plain();
        image.snapshot("a");
        image.edit(|l| l.put(l.get(64) + at, value));
        let report = image.repair(Repair::All, "snapshot");
        assert!(!report.is_clean() && report.leaks_fixed == 0, "{at} {value:#x}: {report:#?}");
    }
}

/// As old programs made them. Nothing relies on what they lack: they are told of, keep no image marked as dirty, and change
/// nothing about how the leaks of a crash are repaired.
#[test]
fn snapshots_without_the_extra_data_of_version_3_are_found_and_keep_no_image_dirty() {
    for kept in [0, 8] {
        let image = plain();
        image.snapshot("a");
        image.io(&["write -P 4 4M 64k"]);
        image.edit(|l| {
            // The ID and the name follow the extra data, of which QEMU wrote 24 bytes.
            let at = l.get(64) as usize;
            l.bytes.copy_within(at + 64..at + 72, at + 40 + kept);
            l.bytes[at + 39] = kept as u8;
        });
        assert_eq!(image.agrees("an entry that is too short").corruptions, 1);
        let old_l1 = Layout::new(image.bytes()).l1;
        image.edit(|l| {
            // A cluster that is counted twice and has one owner: its count and its flag change at once.
            l.set_refcount(l.data(64), 2);
            l.put(l.l2_entry(64), l.get(l.l2_entry(64)) & !COPIED);
            l.put(72, 1);
        });
        let report = image.repair(Repair::All, "an entry that is too short, and a leak");
        let found = (report.corruptions, report.corruptions_fixed, report.leaks, report.leaks_fixed);
        assert_eq!(found, (1, 0, 1, 1), "{report:#?}");
        let l = Layout::new(image.bytes());
        assert!(l.get(72) == 0 && l.l1 != old_l1);
        assert_eq!(image.agrees("an entry that is too short, repaired").corruptions, 1);
    }
}

#[test]
fn an_l1_table_that_refers_to_one_table_everywhere_is_walked_once() {
    let image = Image::create("cluster_size=2M", "1P");
    image.io(&["write 0 2M"]);
    image.edit(|l| {
        let entry = l.get(l.l1);
        for i in 0..(1 << 50) / ((2 << 20) * (2 << 17)) {
            l.put(l.l1 + i * 8, entry);
        }
    });
    let began = std::time::Instant::now();
    let report = block_on(check(&Memory::new(image.bytes()), Repair::No)).unwrap();
    assert!(report.corruptions > 0 && report.leaks == 0);
    assert!(began.elapsed() < std::time::Duration::from_secs(5), "{:?}", began.elapsed());
}

#[test]
fn snapshots_that_all_claim_one_l1_table_are_refused_without_walking_it() {
    let image = Image::create("cluster_size=512", "32M");
    image.io(&["write 0 1M"]);
    const COUNT: u64 = 65536;
    image.edit(|l| {
        let table = (l.bytes.len() as u64).next_multiple_of(l.cluster);
        l.bytes.resize((table + COUNT * 56 + l.cluster) as usize, 0);
        for at in (table..).step_by(56).take(COUNT as usize) {
            l.put(at, l.l1);
            l.put(at + 8, (l.get(36) >> 32) << 32);
            l.put(at + 32, 16);
        }
        l.put(60, COUNT << 32 | table >> 32);
        l.put(64, table);
    });
    let began = std::time::Instant::now();
    let report = block_on(check(&Memory::new(image.bytes()), Repair::All)).unwrap();
    assert!(!report.is_clean() && report.leaks_fixed == 0);
    assert_eq!(report.messages.len(), CheckReport::MAX_MESSAGES);
    assert!(began.elapsed() < std::time::Duration::from_secs(10), "{:?}", began.elapsed());
}

#[test]
fn leaks_that_an_unknown_extension_may_own_are_left() {
    let image = plain();
    image.edit(|l| {
        l.put(l.l2_entry(0), 0);
        // Over the feature name table, right after the header.
        let start = l.get(96) & 0xffff_ffff;
        l.put(start, 0x1234_5678 << 32 | 8);
        l.put(start + 16, 0);
    });
    for mode in [Repair::Leaks, Repair::All] {
        let report = image.repair(mode, "unknown extension");
        assert_eq!((report.leaks, report.leaks_fixed), (1, 0), "{report:#?}");
        assert!(report.messages.iter().any(|m| m.contains("extension")), "{report:#?}");
    }
}

/// Numbers without a pattern, the same in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 24
    }

    fn coin(&mut self) -> bool {
        self.next() & 1 == 0
    }
}

/// The device after a power cut `at` changes into its history: of those since the last flush, any sectors.
fn cut(before: &[u8], history: &[Change], at: usize, numbers: &mut Numbers) -> Vec<u8> {
    let mut bytes = before.to_vec();
    let durable = history[..at].iter().rposition(|c| matches!(c, Change::Flush)).unwrap_or(0);
    for (index, change) in history[..at].iter().enumerate() {
        match change {
            Change::Write(offset, new) => {
                for (start, sector) in (*offset..).step_by(512).zip(new.chunks(512)) {
                    if index < durable || numbers.coin() {
                        let end = (start + sector.len()).min(bytes.len());
                        let start = start.min(end);
                        bytes[start..end].copy_from_slice(&sector[..end - start]);
                    }
                }
            }
            Change::Truncate(length) if index < durable || numbers.coin() => bytes.resize(*length, 0),
            _ => {}
        }
    }
    bytes
}

/// Which clusters have a refcount on disk that covers them: for each, the lower of refcount and references.
fn covered(l: &Layout, clusters: &[(u64, u64)]) -> Vec<u64> {
    clusters
        .iter()
        .map(|&(offset, references)| {
            let (block, index) = l.refcount_at(offset);
            let Some(block) = l.bytes.get(block..block + l.cluster as usize).filter(|_| block != 0) else { return 0 };
            refcount::get(block, l.order, index).min(references)
        })
        .collect()
}

#[test]
fn a_repair_that_is_cut_off_protects_no_cluster_less_and_is_completed_by_the_next() {
    let image = Image::create("cluster_size=4k,refcount_bits=16", "24M");
    image.io(&["write -P 1 0 16M"]);
    image.snapshot("a");
    image.io(&["write -P 2 0 1M"]);
    image.edit(|l| {
        // Leaks, low refcounts, flags that lie or will, a block that is missing and one that lies outside the file, a zero
        // cluster whose place is none.
        l.put(l.l2_entry(400), (l.data(400) + 512) | ZERO);
        for guest in 0..8 {
            l.set_refcount(l.data(guest), [0, 1, 5][guest as usize % 3]);
            l.put(l.l2_entry(guest), l.get(l.l2_entry(guest)) ^ (guest % 2 * COPIED));
        }
        for guest in 300..310 {
            l.set_refcount(l.data(guest), guest % 5);
        }
        l.put(l.l1, l.get(l.l1) ^ COPIED);
        l.put(l.table + 8, 0);
        l.put(72, 1);
    });
    let before = image.bytes();
    let device = Memory::new(before.clone());
    let report = block_on(check(&device, Repair::All)).unwrap();
    assert!(report.is_clean() && report.leaks > 0 && report.corruptions > 0, "{report:#?}");
    let history = device.history.lock().unwrap().clone();
    let l = Layout::new(before.clone());
    let clusters: Vec<(u64, u64)> = (0..8).map(|g| (l.data(g), 1)).chain((300..310).map(|g| (l.data(g), 2))).collect();
    let protected = covered(&l, &clusters);

    let mut numbers = Numbers(3);
    for at in (0..=history.len()).flat_map(|at| std::iter::repeat_n(at, 8)) {
        let bytes = cut(&before, &history, at, &mut numbers);
        let l = Layout::new(bytes.clone());
        let now = covered(&l, &clusters);
        assert!(now.iter().zip(&protected).all(|(now, before)| now >= before), "{at}: {now:?}, {protected:?}");
        let dirty = l.get(72) & 1 == 1;
        let found = block_on(check(&Memory::new(bytes.clone()), Repair::No)).unwrap();
        assert!(dirty || found.is_clean(), "{at}: {found:#?}");
        let device = Memory::new(bytes);
        let completed = block_on(check(&device, Repair::All)).unwrap();
        assert!(completed.is_clean(), "{at}: {completed:#?}");
        let after = block_on(check(&device, Repair::No)).unwrap();
        assert_eq!((after.corruptions, after.leaks), (0, 0), "{at}");
        if at == history.len() / 2 {
            std::fs::write(image.path(), &*device.bytes.lock().unwrap()).unwrap();
            assert!(image.agrees("a repair that was cut off").is_clean());
            image.io(&["read -P 2 0 1M", "read -P 1 1M 576k", "read -P 0 1600k 4k", "read -P 1 1604k 14780k"]);
        }
    }
}

/// As if a snapshot's deletion had come no further than its table: most clusters are counted twice and have one owner, the
/// disk.
fn counted_twice(options: &str, size: &str) -> Image {
    let image = Image::create(options, size);
    image.io(&["write -P 1 0 200k", "write -P 2 220k 16k"]);
    image.snapshot("a");
    image.io(&["write -P 3 100k 8k"]);
    image.edit(|l| {
        l.put(60, l.get(60) & 0xffff_ffff);
        l.put(64, 0);
    });
    image
}

fn holds_what_it_did(image: &Image, what: &str) {
    image.agrees(what);
    image.io(&["read -P 1 0 100k", "read -P 3 100k 8k", "read -P 1 108k 92k", "read -P 2 220k 16k"]);
}

/// An image on which only leaks are found stays one when their repair is cut off: what is left to one owner is counted once
/// and says so, or neither.
#[test]
fn a_repair_of_leaks_that_is_cut_off_leaves_leaks() {
    let mut numbers = Numbers(5);
    for (options, size) in [
        ("cluster_size=512,refcount_bits=16", "256k"),
        ("cluster_size=512,refcount_bits=64", "256k"),
        ("cluster_size=4k,refcount_bits=2", "8M"),
        ("cluster_size=4k,compat=0.10", "8M"),
    ] {
        let image = counted_twice(options, size);
        let found = image.agrees(options);
        assert!(found.corruptions == 0 && found.leaks > 50, "{options}: {found:#?}");
        let left = image.bytes();
        for (mode, resize) in [(Repair::Leaks, true), (Repair::All, true), (Repair::Leaks, false)] {
            let mut before = left.clone();
            if !resize {
                before.resize(before.len() + (100 << 12), 0);
            }
            let mut device = Memory::new(before.clone());
            device.resize = resize;
            let report = block_on(check(&device, mode)).unwrap();
            assert_eq!((report.corruptions, report.leaks_fixed), (0, found.leaks), "{options}: {report:#?}");
            let history = device.history.lock().unwrap().clone();
            for at in (0..=history.len()).flat_map(|at| std::iter::repeat_n(at, 8)) {
                let bytes = cut(&before, &history, at, &mut numbers);
                let found = block_on(check(&Memory::new(bytes.clone()), Repair::No)).unwrap();
                assert_eq!(found.corruptions, 0, "{options}, {mode:?}, after {at} changes: {found:#?}");
                let device = Memory::new(bytes.clone());
                assert!(block_on(check(&device, mode)).unwrap().is_clean(), "{options}, {mode:?}, {at}");
                if at == history.len() || numbers.next().is_multiple_of(32) {
                    for bytes in [bytes, device.bytes.lock().unwrap().clone()] {
                        std::fs::write(image.path(), bytes).unwrap();
                        holds_what_it_did(&image, "a repair of leaks that was cut off");
                    }
                }
            }
        }
    }
}

/// What was found is made durable before anything is changed; and after a flush that fails, whatever the reason, nothing is.
#[test]
fn a_repair_begins_with_a_flush_and_ends_with_one_that_fails() {
    let image = counted_twice("cluster_size=512", "256k");
    for mode in [Repair::Leaks, Repair::All] {
        let device = Memory::new(image.bytes());
        assert!(block_on(check(&device, mode)).unwrap().is_clean());
        let history = device.history.lock().unwrap().clone();
        assert!(matches!(history.first(), Some(Change::Flush)), "{mode:?}");
        let flushes: Vec<_> = (0..history.len()).filter(|&at| matches!(history[at], Change::Flush)).collect();
        assert!(flushes.len() > 2);
        for (n, &at) in flushes.iter().enumerate() {
            let device = Memory::new(image.bytes());
            device.flushes.store(n, Ordering::Relaxed);
            block_on(check(&device, mode)).unwrap_err();
            assert_eq!(device.history.lock().unwrap().len(), at, "{mode:?}: changes after flush {n} failed");
        }
    }
}

/// Without room for new tables the old ones are changed in place.
#[test]
fn leaks_are_given_back_on_a_device_without_room() {
    for (resize, full) in [(true, true), (false, false)] {
        let image = counted_twice("cluster_size=512", "256k");
        let mut device = Memory::new(image.bytes());
        (device.resize, device.full) = (resize, full);
        let report = block_on(check(&device, Repair::Leaks)).unwrap();
        assert!(report.is_clean() && report.leaks > 50 && report.corruptions == 0, "{report:#?}");
        std::fs::write(image.path(), &*device.bytes.lock().unwrap()).unwrap();
        holds_what_it_did(&image, "a repair without room");
        assert_eq!(image.agrees("a repair without room").leaks, 0);
    }
}

#[test]
fn damage_anywhere_in_the_metadata_never_panics() {
    let image = plain();
    image.snapshot("a");
    run("qemu-img", &["bitmap", "--add", &image.name(), "b"]);
    let sound = Layout::new(image.bytes());
    let places = [sound.l1, sound.l2(0), sound.table, sound.get(sound.table), sound.get(64), 0];
    let mut numbers = Numbers(7);
    let mut random = || numbers.next();
    for round in 0..2000 {
        let mut bytes = sound.bytes.clone();
        for _ in 0..=random() % 3 {
            let at = places[(random() % 6) as usize] + random() % 200;
            bytes[at as usize] = random() as u8;
        }
        let device = Memory::new(bytes);
        let mode = [Repair::No, Repair::Leaks, Repair::All][round % 3];
        let Ok(report) = block_on(check(&device, mode)) else { continue };
        if mode != Repair::No {
            let after = block_on(check(&device, Repair::No)).unwrap();
            let left = (report.corruptions - report.corruptions_fixed, report.leaks - report.leaks_fixed);
            assert!((after.corruptions, after.leaks) == left, "{round}: {report:#?}, then {after:#?}");
        }
    }
}

/// Each table has an entry whose place is in the midst of the next table: each round of a repair could clear one more.
#[test]
fn tables_that_lead_to_one_another_are_looked_at_twice_at_most() {
    const TABLES: u64 = 1500;
    let image = Image::create("cluster_size=1k", "256M");
    image.edit(|l| {
        let first = l.bytes.len() as u64;
        l.bytes.resize((first + (TABLES + 2) * 1024) as usize, 0);
        for table in (first..).step_by(1024).take(TABLES as usize) {
            l.put(l.l1 + (table - first) / 1024 * 8, table | COPIED);
            l.put(table, (table + 1024 + 512) | ZERO);
        }
    });
    let began = std::time::Instant::now();
    let report = image.repair(Repair::All, "tables that lead to one another");
    assert!(report.corruptions_fixed > 0 && report.corruptions > report.corruptions_fixed, "{report:#?}");
    // A round takes milliseconds.
    assert!(began.elapsed() < std::time::Duration::from_secs(30), "{:?}", began.elapsed());
}
