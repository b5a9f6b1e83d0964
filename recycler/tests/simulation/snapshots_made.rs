//! Internal snapshots made, deleted and gone back to: what they hold, what is refused, and what a damaged image may not lead
//! to. QEMU is the judge.

use crate::common::chain::Behind;
use crate::common::memory::MemoryDevice;
use crate::common::snapshots::{self, Anatomy};
use crate::common::taken::TakenAll;
use crate::common::verify::{self, Tolerance};
use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::format::header::Header;
use qcow_recycler::format::refcount;
use qcow_recycler::image::create;
use qcow_recycler::{CreateOptions, Error, Image, Options};

const CLUSTER: u64 = 4096;
const DISK: u64 = 256 * CLUSTER;

type Tested = Image<MemoryDevice>;

fn open(device: &MemoryDevice) -> Tested {
    let options = Options { runtime_asserts: true, ..Options::default() };
    block_on(Image::open(device.clone(), options)).unwrap()
}

fn new(options: CreateOptions) -> (MemoryDevice, Tested) {
    let device = MemoryDevice::new(Vec::new());
    block_on(create(&device, &options)).unwrap();
    let image = open(&device);
    (device, image)
}

fn plain() -> CreateOptions {
    CreateOptions { cluster_size: CLUSTER, ..CreateOptions::new(DISK) }
}

fn fill(image: &Tested, first: u64, count: u64, byte: u8) {
    block_on(image.write(first * CLUSTER, IoBuf::new(&vec![byte; (count * CLUSTER) as usize]))).unwrap();
}

fn contents(image: &Tested) -> Vec<u8> {
    let mut bytes = vec![0; image.virtual_size() as usize];
    block_on(image.read(0, IoBufMut::new(&mut bytes))).unwrap();
    bytes
}

/// The image is sound, and QEMU finds this in its snapshots.
fn assert_holds(device: &MemoryDevice, expected: &[(&str, &[u8])]) {
    let file = device.contents();
    verify::our_check(&file, Tolerance::Clean).unwrap();
    verify::qemu_check(&file, Tolerance::Clean).unwrap();
    let names: Vec<_> = snapshots::names(&file).unwrap().into_iter().map(|(_, name)| name).collect();
    assert_eq!(names, expected.iter().map(|e| e.0).collect::<Vec<_>>());
    for (name, bytes) in expected {
        let back = verify::gone_back(&file, name).unwrap();
        assert!(verify::qemu_contents(&back).unwrap() == *bytes, "snapshot {name:?} holds something else");
        verify::qemu_check(&back, Tolerance::Clean).unwrap();
    }
}

#[test]
fn what_was_made_is_kept_and_what_was_deleted_is_free() {
    let (device, image) = new(plain());
    fill(&image, 0, 100, 1);
    let one = contents(&image);
    assert_eq!(block_on(image.create_snapshot("one")).unwrap().id, "1");
    fill(&image, 50, 100, 2);
    block_on(image.discard(10 * CLUSTER, 10 * CLUSTER)).unwrap();
    let two = contents(&image);
    assert_eq!(block_on(image.create_snapshot("two")).unwrap().id, "2");
    fill(&image, 0, 200, 3);
    let three = contents(&image);
    block_on(image.close()).unwrap();
    assert_holds(&device, &[("one", &one), ("two", &two)]);
    let used = Anatomy::of(&device.contents()).unwrap().used();

    let image = open(&device);
    block_on(image.delete_snapshot("one")).unwrap();
    assert!(contents(&image) == three);
    block_on(image.apply_snapshot("2")).unwrap();
    assert!(contents(&image) == two);
    // What is the disk's alone is written in place, and what the snapshot has is not.
    fill(&image, 60, 1, 9);
    let four = contents(&image);
    block_on(image.close()).unwrap();
    assert_holds(&device, &[("two", &two)]);
    let image = open(&device);
    assert!(contents(&image) == four);
    block_on(image.delete_snapshot("two")).unwrap();
    assert!(block_on(image.check()).unwrap().is_clean());
    block_on(image.close()).unwrap();
    assert_holds(&device, &[]);
    assert!(verify::qemu_contents(&device.contents()).unwrap() == four);
    assert!(Anatomy::of(&device.contents()).unwrap().used() < used - 150);
}

#[test]
fn again_and_again_takes_no_more_room() {
    let (device, image) = new(plain());
    fill(&image, 0, 100, 1);
    let mut lengths = Vec::new();
    // What the tables leave is where the next ones go, without a recycler, too.
    for _ in 0..20 {
        block_on(image.create_snapshot("s")).unwrap();
        block_on(image.delete_snapshot("s")).unwrap();
        lengths.push(device.contents().len());
    }
    assert!(lengths[19] <= lengths[4], "{lengths:?}");
    block_on(image.close()).unwrap();
    assert_holds(&device, &[]);
}

#[test]
fn refcounts_that_are_too_narrow_are_told_of_before_anything_changes() {
    let (device, image) = new(CreateOptions { refcount_bits: 2, ..plain() });
    fill(&image, 0, 100, 1);
    let disk = contents(&image);
    block_on(image.create_snapshot("one")).unwrap();
    block_on(image.create_snapshot("two")).unwrap();
    let error = block_on(image.create_snapshot("three")).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    let error = block_on(image.apply_snapshot("one"));
    // What goes makes room for what comes.
    assert!(error.is_ok(), "{error:?}");
    fill(&image, 5, 5, 7);
    block_on(image.close()).unwrap();
    // QEMU cannot go back to one: what comes is counted before what goes.
    let file = device.contents();
    verify::qemu_check(&file, Tolerance::Clean).unwrap();
    let mut taken = TakenAll::default();
    taken.insert("one", &disk);
    taken.insert("two", &disk);
    snapshots::stand(&file, &taken, Behind::Nothing).unwrap();
    let (_, image) = new(CreateOptions { refcount_bits: 1, ..plain() });
    let error = block_on(image.create_snapshot("one")).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
}

#[test]
fn names_are_looked_at() {
    let (_, image) = new(plain());
    block_on(image.create_snapshot("one")).unwrap();
    block_on(image.create_snapshot("3")).unwrap();
    let long = "x".repeat(256);
    for name in ["", "one", "1", "3", "a\0b", &long] {
        let error = block_on(image.create_snapshot(name)).unwrap_err();
        assert!(matches!(error, Error::BadOption { .. }), "{name:?}: {error}");
    }
    // Not "3", which would name two.
    assert_eq!(block_on(image.create_snapshot("next")).unwrap().id, "4");
    for name in ["5", "", "One"] {
        assert!(block_on(image.delete_snapshot(name)).is_err());
        assert!(block_on(image.apply_snapshot(name)).is_err());
    }
    assert_eq!(image.snapshots().unwrap().len(), 3);
    block_on(image.close()).unwrap();
    assert!(matches!(image.snapshots(), Err(Error::Closed)));
    assert!(matches!(block_on(image.create_snapshot("x")), Err(Error::Closed)));
}

/// Gives a cluster another refcount, in a file with refcounts of 16 bits.
fn recount(file: &mut [u8], cluster: u64, count: u64) {
    let header = Header::parse(file, file.len() as u64).unwrap();
    let per_block = header.geometry.refcounts_per_block();
    let at = (header.refcount_table_offset.0 + cluster / per_block * 8) as usize;
    let block = u64::from_be_bytes(file[at..at + 8].try_into().unwrap()) as usize;
    let size = header.geometry.cluster_size() as usize;
    refcount::set(
        &mut file[block..block + size],
        header.geometry.refcount_order,
        (cluster % per_block) as usize,
        count,
    );
}

/// Of a damaged image whose counts are too low, nothing is freed, and nothing given to the disk alone, that a table names.
#[test]
fn counts_that_are_too_low_free_nothing() {
    let (device, image) = new(plain());
    fill(&image, 0, 10, 1);
    block_on(image.create_snapshot("one")).unwrap();
    block_on(image.create_snapshot("two")).unwrap();
    block_on(image.close()).unwrap();
    let sound = device.contents();
    let data = data_cluster(&sound);
    // Three references: two snapshots' and the disk's.
    for count in 1..3 {
        let mut damaged = sound.clone();
        recount(&mut damaged, data, count);
        let device = MemoryDevice::new(damaged.clone());
        let image = open(&device);
        let error = block_on(image.delete_snapshot("one")).unwrap_err();
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
        if count == 1 {
            let error = block_on(image.apply_snapshot("two"));
            assert!(error.is_ok() || matches!(error, Err(Error::Invalid { .. })), "{error:?}");
        }
        assert_eq!(image.snapshots().unwrap().len(), 2);
        block_on(image.close()).unwrap();
        for name in ["one", "two"] {
            let back = verify::gone_back(&device.contents(), name).unwrap();
            assert!(verify::qemu_contents(&back).unwrap()[..10 * CLUSTER as usize].iter().all(|&b| b == 1));
        }
    }
    let mut damaged = sound;
    recount(&mut damaged, data, 0);
    let device = MemoryDevice::new(damaged);
    let image = open(&device);
    assert!(matches!(block_on(image.create_snapshot("three")), Err(Error::Invalid { .. })));
}

/// A cluster that holds ones.
fn data_cluster(file: &[u8]) -> u64 {
    let ones = vec![1; CLUSTER as usize];
    file.chunks(CLUSTER as usize).position(|c| c == ones).unwrap() as u64
}

#[test]
fn a_table_of_a_snapshot_that_is_another_table_does_not_become_the_disks() {
    let (device, image) = new(plain());
    fill(&image, 0, 10, 1);
    block_on(image.create_snapshot("one")).unwrap();
    block_on(image.close()).unwrap();
    let mut damaged = device.contents();
    let header = Header::parse(&damaged, damaged.len() as u64).unwrap();
    let l1 = Anatomy::of(&damaged).unwrap().entries[0].l1_offset.0 as usize;
    damaged[l1..l1 + 8].copy_from_slice(&header.refcount_table_offset.0.to_be_bytes());
    let device = MemoryDevice::new(damaged);
    let image = open(&device);
    let error = block_on(image.apply_snapshot("one")).unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
    let error = block_on(image.delete_snapshot("one")).unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
    assert!(contents(&image)[..10 * CLUSTER as usize].iter().all(|&b| b == 1));
}
