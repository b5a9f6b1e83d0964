//! Writes that complete a file whose last cluster is cut short, against one another.

use std::sync::Arc;

use super::device::SceneDevice;
use super::{block_on, play, spawn};
use crate::buf::{IoBuf, IoBufMut};
use crate::device::volume::Volume;

const PIECE: u64 = 512;

/// No write makes the file shorter than another made it.
pub(super) fn extensions() {
    let volume = Arc::new(block_on(Volume::new(SceneDevice::new())).unwrap());
    let writers: Vec<_> = (0..3u64)
        .map(|piece| {
            let volume = volume.clone();
            spawn(move || {
                let data = [1 + piece as u8; PIECE as usize];
                block_on(volume.write("writing", piece * PIECE, IoBuf::new(&data))).unwrap();
                assert!(volume.length() >= (piece + 1) * PIECE, "the file ends before what was written");
            })
        })
        .collect();
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    let mut data = [0; 3 * PIECE as usize];
    block_on(volume.read("reading", 0, IoBufMut::new(&mut data))).unwrap();
    let pieces = data.chunks(PIECE as usize).map(|piece| (piece[0], piece[PIECE as usize - 1])).collect::<Vec<_>>();
    assert_eq!(pieces, [(1, 1), (2, 2), (3, 3)], "a write was lost");
}

#[test]
fn no_write_past_the_end_takes_another_away() {
    play("extensions", 0.1, extensions);
}
