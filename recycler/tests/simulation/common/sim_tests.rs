//! The simulated device does what its own documentation says.

use std::collections::HashSet;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use qcow_recycler::BlockDevice;
use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::device::Features;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::content::{self, Content, SECTOR, recognise};
use super::crash::{Effort, Epoch};
use super::model::Model;
use super::sim::{Delay, Fault, Kind, Settings, SimDevice};

const ALL: Effort = Effort { exhaustive: 16, random: 0, singles: 0 };

fn device(sectors: usize) -> SimDevice {
    SimDevice::new(vec![0; sectors * SECTOR], Settings::new(7))
}

fn put(device: &SimDevice, first: u64, sectors: u64, byte: u8) {
    let bytes = vec![byte; sectors as usize * SECTOR];
    block_on(device.write(first * SECTOR as u64, IoBuf::new(&bytes))).unwrap();
}

/// Every image that a power cut can leave, as the first byte of each sector.
fn outcomes(epoch: &Epoch) -> HashSet<Vec<u8>> {
    let (exhaustive, selections) = epoch.selections(ALL, &mut SmallRng::seed_from_u64(1));
    assert!(exhaustive);
    selections.iter().map(|s| epoch.image(s).iter().step_by(SECTOR).copied().collect()).collect()
}

fn set(images: &[&[u8]]) -> HashSet<Vec<u8>> {
    images.iter().map(|i| i.to_vec()).collect()
}

#[test]
fn each_sector_is_old_or_any_value_written_since_the_flush() {
    let d = device(2);
    put(&d, 0, 2, 1);
    block_on(d.flush()).unwrap();
    put(&d, 0, 2, 2);
    put(&d, 1, 1, 3);
    let expected = set(&[&[1, 1], &[1, 2], &[1, 3], &[2, 1], &[2, 2], &[2, 3]]);
    assert_eq!(outcomes(&d.epoch("")), expected);
    block_on(d.flush()).unwrap();
    assert_eq!(outcomes(&d.epoch("")), set(&[&[2, 3]]));
}

#[test]
fn a_shrink_followed_by_growth_shows_zeroes_only_if_it_happened() {
    let d = device(2);
    put(&d, 0, 2, 1);
    block_on(d.flush()).unwrap();
    block_on(d.truncate(SECTOR as u64)).unwrap();
    block_on(d.truncate(2 * SECTOR as u64)).unwrap();
    assert_eq!(outcomes(&d.epoch("")), set(&[&[1, 1], &[1], &[1, 0]]));
}

#[test]
fn data_beyond_a_lost_extension_is_lost() {
    let d = device(1);
    block_on(d.truncate(2 * SECTOR as u64)).unwrap();
    put(&d, 1, 1, 5);
    assert_eq!(outcomes(&d.epoch("")), set(&[&[0], &[0, 0], &[0, 5]]));
}

#[test]
fn holes_and_copies_are_lost_by_the_sector() {
    let d = device(3);
    put(&d, 0, 2, 1);
    block_on(d.flush()).unwrap();
    block_on(d.copy_range(0, 2 * SECTOR as u64, SECTOR as u64)).unwrap();
    block_on(d.punch_hole(0, 2 * SECTOR as u64)).unwrap();
    assert_eq!(outcomes(&d.epoch("")).len(), 8);
    assert!(outcomes(&d.epoch("")).contains(&vec![0, 1, 1]));
}

#[test]
fn a_flush_covers_only_what_ended_before_it_began() {
    let d = SimDevice::new(vec![0; 2 * SECTOR], Settings { delay: Delay::Yields(3), ..Settings::new(3) });
    let mut context = Context::from_waker(Waker::noop());
    let mut covered = 0;
    for byte in 1..100u8 {
        let before = d.contents()[0];
        let bytes = vec![byte; SECTOR];
        let mut write = pin!(d.write(0, IoBuf::new(&bytes)));
        let written = write.as_mut().poll(&mut context).is_ready();
        block_on(d.flush()).unwrap();
        // In flight when the flush began: in doubt, however long the flush took.
        let left = outcomes(&d.epoch(""));
        if written {
            assert_eq!(left, set(&[&[byte, 0]]));
            covered += 1;
        } else {
            assert_eq!(left, set(&[&[before, 0], &[byte, 0]]));
            block_on(write).unwrap();
            assert_eq!(outcomes(&d.epoch("")).len(), 2);
            block_on(d.flush()).unwrap();
        }
    }
    assert!(covered > 0 && covered < 99, "{covered}");
}

#[test]
fn a_failed_flush_promises_nothing_ever_after() {
    let d = device(2);
    put(&d, 0, 1, 1);
    d.arm(Fault { after: 0, errno: libc::EIO, lasting: false, only: None });
    assert_eq!(block_on(d.flush()).unwrap_err().raw_os_error(), Some(libc::EIO));
    assert_eq!(d.disarm().len(), 1);
    block_on(d.flush()).unwrap();
    assert_eq!(outcomes(&d.epoch("")), set(&[&[0, 0], &[1, 0]]));
    put(&d, 0, 1, 2);
    block_on(d.flush()).unwrap();
    assert_eq!(outcomes(&d.epoch("")), set(&[&[2, 0]]));
}

#[test]
fn a_full_disk_fails_writes_only_and_a_passing_fault_passes() {
    let d = device(1);
    d.arm(Fault { after: 0, errno: libc::ENOSPC, lasting: false, only: None });
    block_on(d.flush()).unwrap();
    block_on(d.read(0, IoBufMut::new(&mut [0; SECTOR]))).unwrap();
    assert_eq!(block_on(d.write(0, IoBuf::new(&[1; SECTOR]))).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    block_on(d.write(0, IoBuf::new(&[1; SECTOR]))).unwrap();
    let fired = d.disarm();
    assert_eq!(fired.len(), 1);
    assert_eq!((fired[0].kind, fired[0].length), (Kind::Write, SECTOR as u64));
}

#[test]
fn a_dropped_write_is_done_or_not_and_never_again_in_flight() {
    let d = SimDevice::new(vec![0; SECTOR], Settings { delay: Delay::Yields(5), ..Settings::new(11) });
    let mut seen = HashSet::new();
    for _ in 0..50 {
        {
            let bytes = [9; SECTOR];
            let mut write = pin!(d.write(0, IoBuf::new(&bytes)));
            if let Poll::Ready(result) = write.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                result.unwrap();
            }
        }
        seen.insert(d.contents()[0]);
        block_on(d.write(0, IoBuf::new(&[0; SECTOR]))).unwrap();
    }
    assert_eq!(seen.len(), 2);
    assert!(d.violations().is_empty());
}

#[test]
fn of_overlapping_writes_the_one_that_is_seen_is_the_one_that_becomes_durable() {
    let settings = Settings { delay: Delay::Yields(3), overlap: true, ..Settings::new(5) };
    let d = SimDevice::new(vec![0; SECTOR], settings);
    let mut orders = HashSet::new();
    for _ in 0..50 {
        let (a, b) = ([1; SECTOR], [2; SECTOR]);
        let mut first = pin!(d.write(0, IoBuf::new(&a)));
        let waits = first.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending();
        block_on(d.write(0, IoBuf::new(&b))).unwrap();
        if waits {
            block_on(first).unwrap();
        }
        block_on(d.flush()).unwrap();
        assert_eq!(outcomes(&d.epoch("")), set(&[&[d.contents()[0]]]));
        orders.insert(d.contents()[0]);
    }
    assert_eq!(orders.len(), 2);
    assert!(d.violations().is_empty());
}

#[test]
fn broken_rules_are_noticed() {
    let d = device(1);
    assert!(block_on(d.write(SECTOR as u64, IoBuf::new(&[0; 1]))).is_err());
    assert_eq!(d.violations().len(), 1);

    let d = SimDevice::new(vec![0; SECTOR], Settings { delay: Delay::Yields(9), ..Settings::new(2) });
    let bytes = [1; SECTOR];
    let mut first = pin!(d.write(0, IoBuf::new(&bytes)));
    if first.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending() {
        block_on(d.punch_hole(0, 8)).unwrap();
        assert_eq!(d.violations().len(), 1);
    }

    let d = SimDevice::new(vec![0; SECTOR], Settings { read_only: true, ..Settings::new(2) });
    assert!(block_on(d.truncate(0)).is_err());
    assert_eq!(d.violations().len(), 1);

    let d = SimDevice::new(vec![0; SECTOR], Settings { features: Features::default(), ..Settings::new(2) });
    assert_eq!(block_on(d.truncate(0)).unwrap_err().kind(), std::io::ErrorKind::Unsupported);
    assert!(d.violations().is_empty());
}

#[test]
fn large_epochs_are_sampled_with_the_telling_cases() {
    let d = device(64);
    put(&d, 0, 32, 1);
    block_on(d.write(32 * SECTOR as u64, IoBuf::new(&content::data(0, 32, 1)))).unwrap();
    let epoch = d.epoch("");
    let effort = Effort { exhaustive: 10, random: 5, singles: 4 };
    let (exhaustive, selections) = epoch.selections(effort, &mut SmallRng::seed_from_u64(1));
    assert!(!exhaustive);
    let counts: HashSet<usize> = selections.iter().map(|s| s.iter().filter(|b| **b).count()).collect();
    for wanted in [0, 1, 32, 63, 64] {
        assert!(counts.contains(&wanted), "{wanted} of 64");
    }
}

#[test]
fn contents_are_recognised_and_torn_ones_are_not() {
    let mut bytes = content::data(5, 1, 9);
    assert_eq!(recognise(&bytes), Content::Data { sector: 5, version: 9 });
    bytes[300] ^= 1;
    assert!(matches!(recognise(&bytes), Content::Garbage { .. }));
    assert_eq!(recognise(&[0; SECTOR]), Content::Zero);
}

#[test]
fn the_model_allows_what_a_power_cut_may_leave_and_no_more() {
    let mut model = Model::new(2);
    let write = |model: &mut Model, first: u64, count: u64, version: u64| {
        model.begin(first, count, |sector, _| vec![Content::Data { sector, version }])
    };
    let disk = |a: Option<u64>, b: Option<u64>| {
        let sector = |s, v: Option<u64>| v.map_or(vec![0; SECTOR], |v| content::data(s, 1, v));
        [sector(0, a), sector(1, b)].concat()
    };
    let first = write(&mut model, 0, 2, 1);
    model.end(first);
    assert!(model.survived(&disk(None, Some(1))).is_ok());
    assert!(model.read(0, &disk(None, Some(1))).is_err());
    let began = model.flush_begins();
    let second = write(&mut model, 1, 1, 2);
    model.end(second);
    model.flushed(began);
    for (a, b, good) in
        [(Some(1), Some(1), true), (Some(1), Some(2), true), (None, Some(1), false), (Some(1), None, false)]
    {
        assert_eq!(model.survived(&disk(a, b)).is_ok(), good, "{a:?} {b:?}");
    }
    // Another sector's data is never right, whatever its version.
    let foreign = [content::data(1, 1, 1), content::data(1, 1, 1)].concat();
    assert!(model.survived(&foreign).unwrap_err().to_string().contains("ANOTHER SECTOR"));
}
