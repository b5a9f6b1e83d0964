//! A device that has no room for more.

use crate::common::memory::MemoryDevice;
use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::device::Features;
use qcow_recycler::image::{CreateOptions, create};
use qcow_recycler::{Image, Options};

const CLUSTER: u64 = 4096;
const CLUSTERS: u64 = 64;

/// What was discarded is room for what comes, also where no recycler has made it ready.
#[test]
fn a_full_device_takes_as_much_as_was_discarded() {
    // The disk fits twice, so that it is the device that is full and not the disk.
    let features = Features { resize: false, ..Features::default() };
    let device = MemoryDevice::with(vec![0xa5; (2 * CLUSTERS * CLUSTER) as usize], features);
    let shape = CreateOptions { cluster_size: CLUSTER, ..CreateOptions::new(4 * CLUSTERS * CLUSTER) };
    block_on(create(&device, &shape)).unwrap();
    let image = block_on(Image::open(device.clone(), Options::default())).unwrap();
    let write = |cluster: u64, sectors: usize| {
        block_on(image.write(cluster * CLUSTER, IoBuf::new(&vec![cluster as u8 + 1; sectors * 512])))
    };
    let full = (0..).find(|&c| write(c, 8).is_err()).unwrap();
    assert!(full > CLUSTERS, "{full} clusters");
    for c in (0..full).step_by(2) {
        block_on(image.discard(c * CLUSTER, CLUSTER)).unwrap();
    }
    block_on(image.flush()).unwrap();
    block_on(image.flush()).unwrap();
    // A part of each cluster: what is around it must not show what the device held.
    let anew = (full..full + full.div_ceil(2)).take_while(|&c| write(c, 1).is_ok()).count() as u64;
    assert!(anew + 2 >= full / 2, "{anew} of {} clusters that were discarded", full.div_ceil(2));
    for c in 0..full + anew {
        let mut found = [0xff; CLUSTER as usize];
        block_on(image.read(c * CLUSTER, IoBufMut::new(&mut found))).unwrap();
        let written = |i: usize| if c < full { c % 2 == 1 } else { i < 512 };
        let wrong = found.iter().enumerate().find(|&(i, &byte)| byte != if written(i) { c as u8 + 1 } else { 0 });
        assert!(wrong.is_none(), "cluster {c}: {wrong:?}");
    }
    let report = block_on(image.check()).unwrap();
    assert!(report.is_clean(), "{report:?}");
    block_on(image.close()).unwrap();
}
