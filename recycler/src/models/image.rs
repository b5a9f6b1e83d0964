//! Whole images: guests, flushes, discards and compactions at once. The smallest image there can be, on a device in memory.

use std::sync::Arc;

use super::device::SceneDevice;
use super::{block_on, play, spawn};
use crate::buf::{IoBuf, IoBufMut};
use crate::image::Image;
use crate::image::create::{CreateOptions, create};
use crate::options::Options;
use crate::recycler::compact;

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
