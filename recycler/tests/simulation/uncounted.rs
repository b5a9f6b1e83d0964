//! A damaged image whose L2 entries point at clusters that are free by their counts: the next guest write may be given
//! them, so nobody may write there through the entries.

use crate::common::memory::MemoryDevice;
use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::image::{CreateOptions, create};
use qcow_recycler::recycler::compact;
use qcow_recycler::{Error, Image, Options};

const CLUSTER: u64 = 4096;
/// Guest clusters, each filled with its number.
const WRITTEN: u64 = 40;

fn field(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00
}

/// An image with some clusters, and the file's bytes.
fn image() -> Vec<u8> {
    let device = MemoryDevice::new(Vec::new());
    block_on(async {
        create(&device, &CreateOptions { cluster_size: CLUSTER, ..CreateOptions::new(4 << 20) }).await.unwrap();
        let image = Image::open(device.clone(), Options::default()).await.unwrap();
        for n in 0..WRITTEN {
            image.write(n * CLUSTER, IoBuf::new(&vec![n as u8; CLUSTER as usize])).await.unwrap();
        }
        image.close().await.unwrap();
    });
    device.contents()
}

/// Where the L2 entry of a guest cluster stands.
fn entry(bytes: &[u8], guest: u64) -> u64 {
    field(bytes, field(bytes, 40)) + guest * 8
}

/// Sets the count of a guest cluster's host cluster to 0.
fn uncount(bytes: &mut [u8], guest: u64) {
    let block = field(bytes, field(bytes, 48));
    let host = field(bytes, entry(bytes, guest)) / CLUSTER;
    bytes[(block + host * 2) as usize..][..2].fill(0);
}

fn refused(result: Result<(), Error>, bytes: &[u8], guest: u64) {
    match result {
        Err(Error::Invalid { field, offset, reason }) => {
            assert_eq!(
                (field, offset),
                ("L2 table entry", entry(bytes, guest)),
                "the error names another place: {reason}"
            );
        }
        other => panic!("written through an entry that points at a free cluster: {other:?}"),
    }
}

async fn read(image: &Image<MemoryDevice>, guest: u64) -> Vec<u8> {
    let mut bytes = vec![0xee; CLUSTER as usize];
    image.read(guest * CLUSTER, IoBufMut::new(&mut bytes)).await.unwrap();
    bytes
}

#[test]
fn a_cluster_that_is_not_counted_is_not_written() {
    let mut bytes = image();
    for guest in [3, 17] {
        uncount(&mut bytes, guest);
    }
    let device = MemoryDevice::new(bytes.clone());
    block_on(async {
        let image = Image::open(device.clone(), Options::default()).await.unwrap();
        let write = |guest: u64, count: u64| {
            let image = &image;
            async move { image.write(guest * CLUSTER, IoBuf::new(&vec![0xaa; (count * CLUSTER) as usize])).await }
        };
        refused(write(3, 1).await, &bytes, 3);
        refused(write(16, 3).await, &bytes, 17);
        refused(image.discard(3 * CLUSTER, CLUSTER).await, &bytes, 3);
        refused(image.write_zeroes(17 * CLUSTER, CLUSTER, false).await, &bytes, 17);
        // Also when the recycler has looked for free clusters and moved others into them.
        compact(&image, &mut |_| true).await.unwrap();
        refused(write(3, 1).await, &bytes, 3);
        // What has nothing to do with the damage can be written as ever.
        write(0, 2).await.unwrap();
        write(18, 20).await.unwrap();
        image.discard(2 * CLUSTER, CLUSTER).await.unwrap();
        image.flush().await.unwrap();
        assert!(read(&image, 0).await.iter().all(|&b| b == 0xaa));
        assert!(read(&image, 3).await.iter().all(|&b| b == 3), "the damaged cluster's data is lost");
        let _ = image.close().await;
    });
}
