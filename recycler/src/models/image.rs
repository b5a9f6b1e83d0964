//! Whole images: guests, flushes, discards and compactions at once. The smallest image there can be, on a device in memory.

use std::sync::Arc;

use super::device::SceneDevice;
use super::{block_on, play, spawn};
use crate::buf::{IoBuf, IoBufMut};
use crate::image::Image;
use crate::image::create::{CreateOptions, create};
use crate::image::mapping::Purpose;
use crate::options::Options;
use crate::recycler::compact;
use crate::units::GuestOffset;

const CLUSTER: u64 = 512;
const CLUSTERS: u64 = 12;

type Shared = Arc<Image<SceneDevice>>;

fn open(device: &SceneDevice) -> Shared {
    // Each word of the cache is something to watch.
    let options = Options { l2_cache_size: 0, ..Options::default() };
    Arc::new(block_on(Image::open(device.clone(), options)).unwrap())
}

/// A disk that was never written to.
fn blank() -> (SceneDevice, Shared) {
    let device = SceneDevice::new();
    let options = CreateOptions { cluster_size: CLUSTER, ..CreateOptions::new(CLUSTERS * CLUSTER) };
    block_on(create(&device, &options)).unwrap();
    let image = open(&device);
    (device, image)
}

fn write(image: &Shared, cluster: u64, value: u8) {
    block_on(image.write(cluster * CLUSTER, IoBuf::new(&[value; CLUSTER as usize]))).unwrap();
}

fn discard(image: &Shared, cluster: u64) {
    block_on(image.discard(cluster * CLUSTER, CLUSTER)).unwrap();
}

/// What a cluster holds, if it is the same all over.
fn read(image: &Shared, cluster: u64) -> u8 {
    let mut data = [0; CLUSTER as usize];
    block_on(image.read(cluster * CLUSTER, IoBufMut::new(&mut data))).unwrap();
    assert!(data.iter().all(|&b| b == data[0]), "cluster {cluster} is torn: {} and {}", data[0], data[511]);
    data[0]
}

/// The image is closed, whole, and holds this.
fn ends_with(device: &SceneDevice, image: Shared, expected: &[(u64, u8)]) {
    block_on(image.close()).unwrap();
    drop(image);
    let image = open(device);
    let report = block_on(image.check()).unwrap();
    assert!(report.is_clean(), "{report:?}");
    for &(cluster, value) in expected {
        assert_eq!(read(&image, cluster), value, "cluster {cluster}");
    }
    block_on(image.close()).unwrap();
}

/// A guest overwrites and reads what a compaction moves, and none of its writes is lost; another discards.
pub(super) fn moves() {
    let (device, image) = blank();
    (0..6).for_each(|cluster| write(&image, cluster, 100 + cluster as u8));
    // Holes in front of what is to move.
    (0..3).for_each(|cluster| discard(&image, cluster));
    block_on(image.flush()).unwrap();
    let recycler = spawn({
        let image = image.clone();
        move || _ = block_on(compact(&image, &mut |_| true)).unwrap()
    });
    let discarder = spawn({
        let image = image.clone();
        move || {
            discard(&image, 4);
            assert_eq!(read(&image, 4), 0);
        }
    });
    for value in 1..4 {
        write(&image, 5, value);
        assert_eq!(read(&image, 5), value, "a write was lost");
        assert_eq!(read(&image, 3), 103);
    }
    recycler.join().unwrap();
    discarder.join().unwrap();
    ends_with(&device, image, &[(0, 0), (3, 103), (4, 0), (5, 3)]);
}

/// The same with as little else as can be, since the moments that matter are few: one cluster, moved once.
pub(super) fn one_move() {
    let (device, image) = blank();
    (0..2).for_each(|cluster| write(&image, cluster, 100));
    discard(&image, 0);
    block_on(image.flush()).unwrap();
    let recycler = spawn({
        let image = image.clone();
        move || _ = block_on(compact(&image, &mut |_| true)).unwrap()
    });
    for value in 1..7 {
        write(&image, 1, value);
        assert_eq!(read(&image, 1), value, "a write was lost");
    }
    recycler.join().unwrap();
    ends_with(&device, image, &[(0, 0), (1, 6)]);
}

/// Guests allocate in one slice while it is written back: what they wrote is in the file in the end.
pub(super) fn commits() {
    let (device, image) = blank();
    write(&image, 0, 1);
    let threads: Vec<_> = (1..3u64)
        .map(|cluster| {
            let image = image.clone();
            spawn(move || {
                write(&image, cluster, 10 + cluster as u8);
                assert_eq!(read(&image, cluster), 10 + cluster as u8);
            })
        })
        .collect();
    let flusher = spawn({
        let image = image.clone();
        move || block_on(image.flush()).unwrap()
    });
    assert_eq!(read(&image, 0), 1);
    for thread in threads {
        thread.join().unwrap();
    }
    flusher.join().unwrap();
    ends_with(&device, image, &[(0, 1), (1, 11), (2, 12), (3, 0)]);
}

/// Guests look at a disk that gets its first table: none of them takes the table for one outside the file.
pub(super) fn first_table() {
    let (device, image) = blank();
    let readers: Vec<_> = (1..3)
        .map(|cluster| {
            let image = image.clone();
            spawn(move || (0..3).for_each(|_| assert_eq!(read(&image, cluster), 0)))
        })
        .collect();
    let flusher = spawn({
        let image = image.clone();
        move || block_on(image.flush()).unwrap()
    });
    write(&image, 0, 1);
    readers.into_iter().for_each(|reader| reader.join().unwrap());
    flusher.join().unwrap();
    ends_with(&device, image, &[(0, 1), (1, 0)]);
}

/// What one guest gives back another is given: neither ever sees the other's data.
pub(super) fn hand_out() {
    let (device, image) = blank();
    (0..3).for_each(|cluster| write(&image, cluster, 1 + cluster as u8));
    block_on(image.flush()).unwrap();
    let giver = spawn({
        let image = image.clone();
        move || {
            discard(&image, 1);
            block_on(image.flush()).unwrap();
            // Gives the cluster to another guest cluster's data.
            block_on(compact(&image, &mut |_| true)).unwrap();
        }
    });
    let taker = spawn({
        let image = image.clone();
        move || {
            write(&image, 6, 16);
        }
    });
    for _ in 0..3 {
        let seen = read(&image, 1);
        assert!(seen == 2 || seen == 0, "another guest's data, {seen}");
        assert_eq!((read(&image, 0), read(&image, 2)), (1, 3));
    }
    giver.join().unwrap();
    taker.join().unwrap();
    ends_with(&device, image, &[(0, 1), (1, 0), (2, 3), (6, 16)]);
}

/// Who has frozen the mapping finds it still, whatever guests do, and what they did meanwhile is there in the end.
pub(super) fn frozen() {
    let (device, image) = blank();
    write(&image, 0, 1);
    block_on(image.flush()).unwrap();
    let guests: Vec<_> = [(1, 0), (2, 5)]
        .into_iter()
        .map(|(first, gone)| {
            let image = image.clone();
            spawn(move || {
                write(&image, first, 10 + first as u8);
                discard(&image, gone);
            })
        })
        .collect();
    {
        let _turn = block_on(image.compaction.take());
        let _frozen = block_on(image.freeze());
        let mapped = || {
            let runs = (0..CLUSTERS)
                .map(|cluster| block_on(image.lookup(GuestOffset(cluster * CLUSTER), CLUSTER, Purpose::Read)).unwrap());
            runs.collect::<Vec<_>>()
        };
        let before = mapped();
        assert_eq!(before, mapped(), "the mapping was changed while it was frozen");
    }
    guests.into_iter().for_each(|guest| guest.join().unwrap());
    ends_with(&device, image, &[(0, 0), (1, 11), (2, 12)]);
}

/// Guests write to one cluster for the first time, by itself and with its neighbour, and discard it: one of them was last.
pub(super) fn first_writes() {
    let (device, image) = blank();
    write(&image, 0, 1);
    let threads: Vec<_> = (0..4u8)
        .map(|guest| {
            let image = image.clone();
            spawn(move || match guest {
                0 | 1 => write(&image, 1, 5 + guest),
                2 => block_on(image.write(CLUSTER, IoBuf::new(&[7; 2 * CLUSTER as usize]))).unwrap(),
                _ => discard(&image, 1),
            })
        })
        .collect();
    let flusher = spawn({
        let image = image.clone();
        move || block_on(image.flush()).unwrap()
    });
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    flusher.join().unwrap();
    let last = read(&image, 1);
    assert!([0, 5, 6, 7].contains(&last), "{last}");
    ends_with(&device, image, &[(0, 1), (1, last), (2, 7)]);
}

#[test]
fn one_of_several_first_writes_is_the_last() {
    play("first_writes", 0.1, first_writes);
}

/// A disk that ends within a cluster is made longer while a guest writes to that cluster, which has no place of its own.
pub(super) fn grown() {
    const SIZE: u64 = 2 * 1024 + 512;
    let device = SceneDevice::new();
    let options = CreateOptions { cluster_size: 1024, ..CreateOptions::new(SIZE) };
    block_on(create(&device, &options)).unwrap();
    let image = open(&device);
    block_on(image.write_compressed(2048, IoBuf::new(&[1; 512]))).unwrap();
    block_on(image.flush()).unwrap();
    let guest = spawn({
        let image = image.clone();
        move || block_on(image.write(2048, IoBuf::new(&[2; 512]))).unwrap()
    });
    block_on(image.resize(SIZE + 512, false)).unwrap();
    guest.join().unwrap();
    let mut data = [9; 1024];
    block_on(image.read(2048, IoBufMut::new(&mut data))).unwrap();
    assert!(data[..512].iter().all(|&b| b == 2) && data[512..].iter().all(|&b| b == 0));
    ends_with(&device, image, &[]);
}

#[test]
fn a_disk_grows_while_its_end_is_written() {
    play("grown", 0.1, grown);
}

#[test]
fn a_frozen_mapping_stands_still() {
    play("frozen", 0.1, frozen);
}

#[test]
fn no_write_is_lost_to_a_move() {
    play("moves", 0.2, moves);
}

#[test]
fn no_write_is_lost_to_the_only_move() {
    play("one_move", 0.1, one_move);
}

#[test]
fn no_write_is_lost_to_a_commit() {
    play("commits", 0.2, commits);
}

#[test]
fn a_new_table_is_within_the_file() {
    play("first_table", 0.1, first_table);
}

#[test]
fn what_is_given_back_is_nobody_elses_meanwhile() {
    play("hand_out", 0.2, hand_out);
}
