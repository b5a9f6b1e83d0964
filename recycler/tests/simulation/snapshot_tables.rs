//! Damaged images that lead guests to what a snapshot has: entries that point at its L2 tables, and counts that say that its tables
//! and data are free. Whatever guests do then, the snapshot holds what it held, as QEMU reads it.

use std::process::Command;

use crate::common::memory::MemoryDevice;
use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::image::{CreateOptions, create};
use qcow_recycler::recycler::compact;
use qcow_recycler::{Error, Image, Options};

const CLUSTER: u64 = 4096;
/// Guest clusters that an L2 table maps.
const TABLE: u64 = CLUSTER / 8;
/// Guest clusters that are filled before the snapshot is made; each with its number.
const HELD: u64 = 40;
/// The first so many are then overwritten.
const OVERWRITTEN: u64 = 20;
const SIZE: u64 = 3 * TABLE * CLUSTER;
const COPIED: u64 = 1 << 63;

fn number(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap())
}

fn field(bytes: &[u8], at: u64) -> u64 {
    number(bytes, at) & 0x00ff_ffff_ffff_fe00
}

fn put(bytes: &mut [u8], at: u64, value: u64) {
    bytes[at as usize..at as usize + 8].copy_from_slice(&value.to_be_bytes());
}

fn filled(guest: u64) -> Vec<u8> {
    vec![guest as u8 + 1; CLUSTER as usize]
}

/// An image with a snapshot that has an L2 table and data of its own, and the file's bytes.
fn image() -> Vec<u8> {
    let device = MemoryDevice::new(Vec::new());
    block_on(async {
        create(&device, &CreateOptions { cluster_size: CLUSTER, ..CreateOptions::new(SIZE) }).await.unwrap();
        let image = Image::open(device.clone(), Options::default()).await.unwrap();
        for guest in (0..HELD).chain([TABLE]) {
            image.write(guest * CLUSTER, IoBuf::new(&filled(guest))).await.unwrap();
        }
        image.create_snapshot("one").await.unwrap();
        for guest in (0..OVERWRITTEN).chain([TABLE]) {
            image.write(guest * CLUSTER, IoBuf::new(&[0xaa; CLUSTER as usize])).await.unwrap();
        }
        image.close().await.unwrap();
    });
    device.contents()
}

/// Where the disk's L1 table is.
fn l1(bytes: &[u8]) -> u64 {
    field(bytes, 40)
}

/// Where the snapshot's L1 table is: the first field of the snapshot table.
fn snapshot_l1(bytes: &[u8]) -> u64 {
    field(bytes, field(bytes, 64))
}

/// The snapshot's first L2 table.
fn snapshot_l2(bytes: &[u8]) -> u64 {
    field(bytes, snapshot_l1(bytes))
}

/// What the snapshot holds, as QEMU reads it.
fn held(bytes: &[u8]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let (image, raw) = (directory.path().join("image.qcow2"), directory.path().join("raw"));
    std::fs::write(&image, bytes).unwrap();
    let convert = ["convert", "-l", "snapshot.name=one", "-f", "qcow2", "-O", "raw"];
    let output = Command::new("qemu-img").args(convert).args([&image, &raw]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    std::fs::read(raw).unwrap()
}

fn as_made() -> Vec<u8> {
    let mut disk = vec![0; SIZE as usize];
    for guest in (0..HELD).chain([TABLE]) {
        disk[(guest * CLUSTER) as usize..][..CLUSTER as usize].copy_from_slice(&filled(guest));
    }
    disk
}

fn assert_held(bytes: &[u8], what: &str) {
    let (found, right) = (held(bytes), as_made());
    let wrong = found.chunks(CLUSTER as usize).zip(right.chunks(CLUSTER as usize)).position(|(f, r)| f != r);
    assert_eq!(wrong, None, "{what}: the snapshot has lost guest cluster {wrong:?}");
}

fn refused(result: Result<(), Error>, field: &str, at: u64, what: &str) {
    match result {
        Err(Error::Invalid { field: f, offset, .. }) => assert_eq!((f, offset), (field, at), "{what}"),
        other => panic!("{what}: {other:?}"),
    }
}

/// Every kind of change to a guest cluster.
const CHANGES: [&str; 6] = ["write", "part", "discard", "zeroes", "zeroes that stay", "compressed"];

async fn change(image: &Image<MemoryDevice>, kind: &str, guest: u64) -> Result<(), Error> {
    let at = guest * CLUSTER;
    let data = vec![0xbb; CLUSTER as usize];
    match kind {
        "write" => image.write(at, IoBuf::new(&data)).await,
        "part" => image.write(at + 512, IoBuf::new(&data[..512])).await,
        "discard" => image.discard(at, CLUSTER).await,
        "zeroes" => image.write_zeroes(at, CLUSTER, true).await,
        "zeroes that stay" => image.write_zeroes(at, CLUSTER, false).await,
        _ => image.write_compressed(at, IoBuf::new(&data)).await,
    }
}

/// The disk's L1 table says that the snapshot's L2 table is the disk's alone.
#[test]
fn a_table_that_a_snapshot_has_is_not_changed() {
    let mut bytes = image();
    let (entry, table) = (l1(&bytes), snapshot_l2(&bytes));
    put(&mut bytes, entry, table | COPIED);
    // One cluster could be written in place.
    let flagged = number(&bytes, table + 3 * 8) | COPIED;
    put(&mut bytes, table + 3 * 8, flagged);
    for kind in CHANGES {
        let device = MemoryDevice::new(bytes.clone());
        block_on(async {
            let image = Image::open(device.clone(), Options::default()).await.unwrap();
            for guest in [3, 5, HELD - 1] {
                refused(change(&image, kind, guest).await, "L1 table entry", entry, &format!("{kind} of {guest}"));
            }
            if kind == "write" {
                refused(change(&image, kind, HELD + 60).await, "L1 table entry", entry, "a write to a new cluster");
            }
            // The guest reads on, and writes where nothing is wrong.
            let mut found = vec![0; CLUSTER as usize];
            image.read(3 * CLUSTER, IoBufMut::new(&mut found)).await.unwrap();
            assert_eq!(found, filled(3));
            change(&image, kind, TABLE).await.unwrap();
            image.flush().await.unwrap();
            let _ = compact(&image, &mut |_| true).await;
            refused(change(&image, kind, 3).await, "L1 table entry", entry, &format!("{kind} after a compaction"));
            let _ = image.close().await;
        });
        assert_held(&device.contents(), kind);
    }
}

/// A smaller disk does not take the table with it.
#[test]
fn a_table_that_a_snapshot_has_outlives_a_shrink() {
    let mut bytes = image();
    let (entry, table) = (l1(&bytes), snapshot_l2(&bytes));
    // The disk has it at a place where the snapshot has nothing; of what is in it, nothing is the disk's.
    put(&mut bytes, entry + 16, table | COPIED);
    let device = MemoryDevice::new(bytes);
    block_on(async {
        let image = Image::open(device.clone(), Options::default()).await.unwrap();
        let shrunk = image.resize(2 * TABLE * CLUSTER, true).await;
        refused(shrunk, "L1 table entry", entry + 16, "shrinking");
        for guest in 2..OVERWRITTEN {
            change(&image, "write", TABLE + guest).await.unwrap();
        }
        let _ = compact(&image, &mut |_| true).await;
        let _ = image.close().await;
    });
    let now = device.contents();
    assert_eq!(now[table as usize..][..CLUSTER as usize], device_bytes_before(table));
    // QEMU reads of a snapshot what the disk has room for: the disk as long as it was.
    let mut longer = now;
    put(&mut longer, 24, SIZE);
    assert_held(&longer, "shrinking");
}

fn device_bytes_before(table: u64) -> Vec<u8> {
    image()[table as usize..][..CLUSTER as usize].to_vec()
}

/// An L2 entry of the disk's points at the snapshot's L2 table.
#[test]
fn a_cluster_that_is_a_snapshots_table_is_not_written() {
    let mut bytes = image();
    let table = snapshot_l2(&bytes);
    let entry = field(&bytes, l1(&bytes)) + 7 * 8;
    put(&mut bytes, entry, table | COPIED);
    for kind in CHANGES {
        let device = MemoryDevice::new(bytes.clone());
        block_on(async {
            let image = Image::open(device.clone(), Options::default()).await.unwrap();
            refused(change(&image, kind, 7).await, "L2 table entry", entry, kind);
            change(&image, kind, TABLE).await.unwrap();
            image.flush().await.unwrap();
            let _ = compact(&image, &mut |_| true).await;
            refused(change(&image, kind, 7).await, "L2 table entry", entry, &format!("{kind} after a compaction"));
            let _ = image.close().await;
        });
        assert_held(&device.contents(), kind);
    }
}

/// Counts of 0 for what is in use: a guest that allocates, a compaction, a new snapshot and a close may fail, but give none of it
/// away.
#[test]
fn what_is_counted_as_free_and_in_use_is_not_given_away() {
    let sound = image();
    let (l2, second) = (snapshot_l2(&sound), field(&sound, snapshot_l1(&sound) + 8));
    let data = |guest: u64| field(&sound, l2 + guest * 8);
    let own = field(&sound, l1(&sound));
    let cases: Vec<(&str, Vec<u64>)> = vec![
        ("data that only the snapshot has", (0..OVERWRITTEN).map(data).collect()),
        ("data that both have", (OVERWRITTEN..HELD).map(data).collect()),
        ("the snapshot's L2 tables", vec![l2, second]),
        ("its L1 table", vec![snapshot_l1(&sound)]),
        ("the snapshot table", vec![field(&sound, 64)]),
        ("the header", vec![0]),
        ("the disk's L1 table", vec![l1(&sound)]),
        ("the disk's L2 table", vec![own]),
        ("the refcount table", vec![field(&sound, 48)]),
        ("a refcount block", vec![field(&sound, field(&sound, 48))]),
        ("everything", (0..sound.len() as u64).step_by(CLUSTER as usize).collect()),
    ];
    for (what, clusters) in cases {
        let mut bytes = sound.clone();
        let block = field(&bytes, field(&bytes, 48));
        for cluster in clusters {
            bytes[(block + cluster / CLUSTER * 2) as usize..][..2].fill(0);
        }
        let device = MemoryDevice::new(bytes.clone());
        let opened = block_on(async {
            let options = Options { keep_erased: 8 * CLUSTER, ..Options::default() };
            let Ok(image) = Image::open(device.clone(), options).await else { return false };
            for guest in (0..60).chain(TABLE..TABLE + 60) {
                let _ = change(&image, "write", guest).await;
            }
            let _ = image.flush().await;
            let _ = image.discard(10 * CLUSTER, 4 * CLUSTER).await;
            let _ = compact(&image, &mut |_| true).await;
            let _ = image.create_snapshot("two").await;
            for guest in 0..60 {
                let _ = change(&image, "write", guest).await;
            }
            let _ = compact(&image, &mut |_| true).await;
            let _ = image.close().await;
            true
        });
        if !opened {
            assert!(device.contents() == bytes, "{what}: refused and changed");
        }
        assert_held(&device.contents(), what);
    }
}

/// A sound image: what a deleted snapshot had may be anybody's again.
#[test]
fn tables_of_a_deleted_snapshot_are_used_again() {
    let bytes = image();
    let table = snapshot_l2(&bytes);
    let device = MemoryDevice::new(bytes);
    block_on(async {
        let options = Options { l2_cache_size: 0, ..Options::default() };
        let image = Image::open(device.clone(), options).await.unwrap();
        change(&image, "write", 2).await.unwrap();
        image.delete_snapshot("one").await.unwrap();
        compact(&image, &mut |_| true).await.unwrap();
        // All of the disk: whatever is free is in use then.
        for guest in 0..3 * TABLE {
            change(&image, "write", guest).await.unwrap();
        }
        image.flush().await.unwrap();
        compact(&image, &mut |_| true).await.unwrap();
        for guest in 0..3 * TABLE {
            change(&image, "part", guest).await.unwrap();
        }
        image.close().await.unwrap();
    });
    assert!(device.contents().len() as u64 > table + CLUSTER);
    assert!(block_on(qcow_recycler::check::check(&device, qcow_recycler::Repair::No)).unwrap().is_clean());
}
