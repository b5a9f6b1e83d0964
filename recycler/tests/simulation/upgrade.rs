//! From version 2 to version 3, with the power cut at every instant and every call of the device failing.

use std::sync::Arc;

use crate::common::crash::Effort;
use crate::common::memory::MemoryDevice;
use crate::common::sim::{Fault, Settings, SimDevice};
use crate::common::verify;
use crate::common::verify::Tolerance;
use parking_lot::Mutex;
use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::IoBuf;
use qcow_recycler::format::header::Header;
use qcow_recycler::image::{create, upgrade};
use qcow_recycler::{BackingPolicy, CreateOptions, Image, Options};
use rand::SeedableRng;
use rand::rngs::SmallRng;

fn options() -> Options {
    Options { backing: BackingPolicy::Skip, ..Options::default() }
}

/// A version 2 image with contents whose backing file has a name of so many bytes.
fn image(cluster_size: u64, name: usize) -> Vec<u8> {
    let device = MemoryDevice::with(Vec::new(), Settings::new(0).features);
    let backing = (name > 0).then(|| ("n".repeat(name), "raw".to_owned()));
    let wanted = CreateOptions { version: 2, cluster_size, backing, ..CreateOptions::new(1 << 20) };
    block_on(create(&device, &wanted)).unwrap();
    let image = block_on(Image::open(device.clone(), options())).unwrap();
    block_on(image.write(0, IoBuf::new(&vec![7; cluster_size as usize]))).unwrap();
    block_on(image.close()).unwrap();
    device.contents()
}

fn header(image: &[u8]) -> Header {
    Header::parse(image, image.len() as u64).unwrap()
}

/// The same header, but for its version and what follows from that.
fn same(old: &[u8], new: &[u8]) {
    let (old, new) = (header(old), header(new));
    assert_eq!(new.version, 3);
    let of_version_2 = Header { version: 2, header_length: old.header_length, ..new };
    assert_eq!(of_version_2, old);
}

/// With names that fit into the first sector afterwards, that have to go elsewhere, and that reach into the next sector.
const SHAPES: [(u64, usize); 6] = [(512, 0), (512, 300), (4096, 0), (4096, 390), (4096, 1000), (65536, 1023)];

#[test]
fn a_power_cut_leaves_version_2_or_version_3() {
    for (cluster_size, name) in SHAPES {
        let old = image(cluster_size, name);
        let device = SimDevice::new(old.clone(), Settings::new(5));
        let survivors = Arc::new(Mutex::new(Vec::new()));
        let collect = survivors.clone();
        device.observe(move |device, event| {
            let epoch = device.epoch(event);
            let effort = Effort { exhaustive: 10, random: 30, singles: 40 };
            for selection in epoch.selections(effort, &mut SmallRng::seed_from_u64(epoch.generation)).1 {
                collect.lock().push(epoch.image(&selection));
            }
        });
        block_on(upgrade(device.clone(), &options())).unwrap();
        device.ignore();
        assert_eq!((device.violations(), device.uncertain()), (Vec::<String>::new(), 0));
        same(&old, &device.contents());
        let survivors = survivors.lock();
        for image in survivors.iter() {
            let now = header(image);
            if now.version == 3 {
                same(&old, image);
            } else {
                assert_eq!(now, header(&old));
            }
            verify::our_check(image, Tolerance::Leaks).unwrap();
        }
        let threes = survivors.iter().filter(|i| header(i).version == 3).count();
        assert!(threes > 0 && threes < survivors.len());
        if name == 0 {
            // QEMU insists on opening the backing file.
            verify::qemu_check(&device.contents(), Tolerance::Clean).unwrap();
        }
    }
}

#[test]
fn every_failed_call_is_reported_and_the_next_attempt_succeeds() {
    for (cluster_size, name) in SHAPES {
        let old = image(cluster_size, name);
        for after in 0.. {
            let device = SimDevice::new(old.clone(), Settings::new(after));
            device.arm(Fault { after, errno: libc::EIO, lasting: false, only: None });
            let result = block_on(upgrade(device.clone(), &options()));
            if device.disarm().is_empty() {
                assert!(after > 5 && result.is_ok());
                break;
            }
            assert_eq!(result.unwrap_err().errno(), libc::EIO);
            block_on(upgrade(device.clone(), &options())).unwrap();
            same(&old, &device.contents());
        }
    }
}

#[test]
fn an_image_without_room_and_one_of_version_3_stay_as_they_are() {
    let old = image(512, 400);
    let device = MemoryDevice::with(old.clone(), Settings::new(0).features);
    assert_eq!(block_on(upgrade(device.clone(), &options())).unwrap_err().errno(), libc::EOPNOTSUPP);
    assert_eq!(device.contents(), old);
    let old = image(4096, 20);
    let device = MemoryDevice::with(old, Settings::new(0).features);
    block_on(upgrade(device.clone(), &options())).unwrap();
    let new = device.contents();
    block_on(upgrade(device.clone(), &options())).unwrap();
    assert_eq!(device.contents(), new);
}
