//! Checks of an image that is open and in use: what is on its way from one state to another is no finding.

use std::sync::atomic::Ordering;

use crate::common::slow::{At, SlowRead};
use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::image::{CreateOptions, create};
use qcow_recycler::{Image, Options};

const CLUSTER: u64 = 4096;

/// A cluster is discarded while a read of it is under way, which ends during the `flush`-th flush of a check.
fn discarded_under_a_reader(flush: u32) {
    let device = SlowRead::new();
    let state = &device.state;
    let options = CreateOptions { cluster_size: CLUSTER, ..CreateOptions::new(1 << 20) };
    block_on(create(&device, &options)).unwrap();
    let image = block_on(Image::open(device.clone(), Options::default())).unwrap();
    block_on(image.write(0, IoBuf::new(&[7; 2 * CLUSTER as usize]))).unwrap();
    block_on(image.flush()).unwrap();
    std::thread::scope(|scope| {
        state.armed.store(true, Ordering::SeqCst);
        scope.spawn(|| {
            let mut data = [0; CLUSTER as usize];
            block_on(image.read(0, IoBufMut::new(&mut data))).unwrap();
            assert_eq!(data, [7; CLUSTER as usize], "read while it was discarded");
            state.set(At::Ended);
        });
        state.wait_for(At::Waiting);
        block_on(image.discard(0, CLUSTER)).unwrap();
        state.flushes.store(flush, Ordering::SeqCst);
        let report = block_on(image.check()).unwrap();
        state.flushes.store(0, Ordering::SeqCst);
        // If the check flushed less often, the read is still under way.
        if state.at() == At::Waiting {
            state.set(At::GoesOn);
        }
        assert!(report.is_clean(), "the read ended during flush {flush}: {report:?}");
    });
    block_on(image.close()).unwrap();
}

#[test]
fn a_request_that_ends_meanwhile_makes_no_leak() {
    (1..=4).for_each(discarded_under_a_reader);
}
