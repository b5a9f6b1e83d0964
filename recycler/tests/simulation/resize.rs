//! The disk becomes larger or smaller while requests are under way that end where it ends; and calls that are given up half-way.

use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use crate::common::memory::MemoryDevice;
use crate::common::sim::{Delay, Settings, SimDevice};
use crate::common::slow::{At, SlowRead};
use crate::common::verify::{self, Tolerance, in_paused_time};
use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::image::{CreateOptions, create};
use qcow_recycler::{Error, Image, Options};

const CLUSTER: u64 = 4096;
/// What one L2 table maps, and a sector of the next cluster.
const SIZE: u64 = 512 * CLUSTER + 512;

/// A request that ends with the disk clears or fills the last cluster whole. If the disk has grown meanwhile, what others wrote
/// there must stay.
fn written_under(request: impl Fn(&Image<SlowRead>) + Sync) {
    let device = SlowRead::new();
    block_on(create(&device, &CreateOptions { cluster_size: CLUSTER, ..CreateOptions::new(SIZE) })).unwrap();
    let image = block_on(Image::open(device.clone(), Options::default())).unwrap();
    let write = |image: &Image<SlowRead>, at| block_on(image.write(at, IoBuf::new(&[7; 512])));
    write(&image, 0).unwrap();
    write(&image, SIZE - 512).unwrap();
    block_on(image.close()).unwrap();

    // Anew, so that the first table has to be read; the second one is in memory.
    let image = block_on(Image::open(device.clone(), Options::default())).unwrap();
    let mut sector = [0; 512];
    block_on(image.read(SIZE - 512, IoBufMut::new(&mut sector))).unwrap();
    let (state, grown) = (&device.state, AtomicBool::new(false));
    std::thread::scope(|scope| {
        state.armed.store(true, Ordering::SeqCst);
        scope.spawn(|| request(&image));
        state.wait_for(At::Waiting);
        scope.spawn(|| {
            block_on(image.resize(2 * SIZE, false)).unwrap();
            // As soon as there is such a place.
            write(&image, SIZE).unwrap();
            grown.store(true, Ordering::SeqCst);
        });
        // Time to go wrong in: a library that makes the disk larger under the request is through with it in a moment.
        for _ in 0..100 {
            if grown.load(Ordering::SeqCst) {
                break;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        state.set(At::GoesOn);
    });
    block_on(image.read(SIZE, IoBufMut::new(&mut sector))).unwrap();
    assert_eq!(sector, [7; 512]);
    block_on(image.close()).unwrap();
}

#[test]
fn a_discard_to_the_old_end_keeps_what_is_written_past_it() {
    written_under(|image| block_on(image.discard(0, SIZE)).unwrap());
}

#[test]
fn zeroes_to_the_old_end_keep_what_is_written_past_it() {
    written_under(|image| block_on(image.write_zeroes(0, SIZE, true)).unwrap());
}

#[test]
fn a_compressed_write_to_the_old_end_keeps_what_is_written_past_it() {
    let zeroes = vec![0; SIZE as usize];
    written_under(|image| block_on(image.write_compressed(0, IoBuf::new(&zeroes))).unwrap());
}

/// Polls a future so many times, and drops it then. `None`: it had not ended.
async fn polled<T>(polls: usize, future: impl Future<Output = T>) -> Option<T> {
    let mut future = std::pin::pin!(future);
    let mut left = polls;
    std::future::poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(None);
        }
        left -= 1;
        future.as_mut().poll(context).map(Some)
    })
    .await
}

fn in_header(device: &SimDevice) -> u64 {
    device.contents()[24..32].try_into().map(u64::from_be_bytes).unwrap()
}

/// An image that was closed, with data where the disk ends.
fn with_an_end(size: u64) -> Vec<u8> {
    let device = MemoryDevice::new(Vec::new());
    block_on(create(&device, &CreateOptions { cluster_size: CLUSTER, ..CreateOptions::new(size) })).unwrap();
    let image = block_on(Image::open(device.clone(), Options::default())).unwrap();
    block_on(image.write(size - 512, IoBuf::new(&[7; 512]))).unwrap();
    block_on(image.close()).unwrap();
    device.contents()
}

fn slow(bytes: Vec<u8>, seed: u64) -> SimDevice {
    SimDevice::new(bytes, Settings { delay: Delay::Yields(2), ..Settings::new(seed) })
}

/// Dropped at any moment, a resize leaves the size that the header has, or an image that takes no changes any more; and asked for
/// again it does what it is asked for.
fn dropped(old: u64, new: u64) {
    let bytes = with_an_end(old);
    let (mut ended, mut in_doubt) = (false, 0);
    for polls in 1.. {
        let device = slow(bytes.clone(), polls as u64);
        in_paused_time(async {
            let image = Image::open(device.clone(), Options::default()).await.unwrap();
            ended = polled(polls, image.resize(new, true)).await.is_some();
            let now = image.virtual_size();
            let mut sector = [0; 512];
            image.read(now - 512, IoBufMut::new(&mut sector)).await.unwrap();
            assert!(now != old || sector == [7; 512], "{polls} polls: the end of the disk is lost");
            match image.write(0, IoBuf::new(&[1; 512])).await {
                Ok(()) => {
                    assert_eq!(now, in_header(&device), "{polls} polls");
                    image.resize(new, true).await.unwrap();
                    assert_eq!((image.virtual_size(), in_header(&device)), (new, new), "{polls} polls");
                    image.write(new - 512, IoBuf::new(&[8; 512])).await.unwrap();
                    image.close().await.unwrap();
                    verify::our_check(&device.contents(), Tolerance::Clean).unwrap();
                }
                Err(Error::Failed { .. }) => {
                    in_doubt += 1;
                    image.close().await.unwrap_err();
                    verify::our_check(&device.contents(), Tolerance::Leaks).unwrap();
                }
                Err(e) => panic!("{polls} polls: {e}"),
            }
            let image = Image::open(device.clone(), Options::default()).await.unwrap();
            assert!([old, new].contains(&image.virtual_size()));
            image.close().await.unwrap();
        })
        .unwrap();
        if ended {
            println!("{old} to {new} bytes: {polls} polls, after {in_doubt} of them it is in doubt");
            break;
        }
    }
    assert!(in_doubt > 0);
}

#[test]
fn a_dropped_shrink_leaves_the_size_that_the_header_has() {
    dropped(2 * SIZE, CLUSTER + 512);
}

#[test]
fn a_dropped_growth_leaves_the_size_that_the_header_has() {
    dropped(CLUSTER + 512, 3 * SIZE);
}

/// While a disk becomes smaller, and may yet stay as it is, a request that ends where it is to end clears nothing beyond.
#[test]
fn a_shrink_that_is_given_up_loses_nothing() {
    const END: u64 = 2 * CLUSTER + 512;
    let device = SlowRead::new();
    block_on(create(&device, &CreateOptions { cluster_size: CLUSTER, ..CreateOptions::new(SIZE) })).unwrap();
    let image = block_on(Image::open(device.clone(), Options::default())).unwrap();
    block_on(image.write(0, IoBuf::new(&[7; 3 * CLUSTER as usize]))).unwrap();
    block_on(image.flush()).unwrap();
    let (state, discarded) = (&device.state, AtomicBool::new(false));
    std::thread::scope(|scope| {
        state.armed.store(true, Ordering::SeqCst);
        scope.spawn(|| block_on(image.read(0, IoBufMut::new(&mut [0; 512]))).unwrap());
        state.wait_for(At::Waiting);
        {
            // It awaits the end of the read.
            let mut resize = std::pin::pin!(image.resize(END, true));
            assert!(resize.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending());
            scope.spawn(|| {
                block_on(image.discard(0, END)).unwrap();
                discarded.store(true, Ordering::SeqCst);
            });
            // Time to go wrong in.
            for _ in 0..100 {
                if discarded.load(Ordering::SeqCst) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        state.set(At::GoesOn);
    });
    assert_eq!(image.virtual_size(), SIZE);
    let mut sector = [0; 512];
    block_on(image.read(END, IoBufMut::new(&mut sector))).unwrap();
    assert_eq!(sector, [7; 512]);
    block_on(image.close()).unwrap();
}

/// Who waits for others to be through, and finds the image closed then, changes nothing.
#[test]
fn a_resize_does_not_begin_on_a_closed_image() {
    let device = slow(with_an_end(SIZE), 1);
    in_paused_time(async {
        let image = Image::open(device.clone(), Options::default()).await.unwrap();
        let (checked, resized, closed) = tokio::join!(image.check(), image.resize(2 * SIZE, false), image.close());
        assert!(checked.unwrap().is_clean());
        assert!(matches!(resized, Err(Error::Closed)), "{resized:?}");
        closed.unwrap();
    })
    .unwrap();
    assert_eq!(in_header(&device), SIZE);
    verify::our_check(&device.contents(), Tolerance::Clean).unwrap();
}

/// Whatever is marked past the new end, no answer begins there.
#[test]
fn what_is_dirty_ends_with_the_disk_while_it_becomes_smaller() {
    let device = slow(with_an_end(SIZE), 1);
    in_paused_time(async {
        let image = Image::open(device.clone(), Options::default()).await.unwrap();
        image.add_bitmap("b", 512, true).await.unwrap();
        image.write(SIZE - 512, IoBuf::new(&[9; 512])).await.unwrap();
        let (ended, smaller) = (AtomicBool::new(false), AtomicBool::new(false));
        let resize = async {
            image.resize(CLUSTER, true).await.unwrap();
            ended.store(true, Ordering::SeqCst);
        };
        let look = async {
            while !ended.load(Ordering::SeqCst) {
                let found = image.next_dirty("b", 512).unwrap();
                assert!(found.as_ref().is_none_or(|range| range.start < range.end), "{found:?}");
                if found.is_none() {
                    smaller.store(true, Ordering::SeqCst);
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::join!(resize, look);
        assert!(smaller.load(Ordering::SeqCst));
        image.close().await.unwrap();
    })
    .unwrap();
}
