//! Persistent bitmaps under power cuts and failures: a bitmap that the file does not mark as in use tells of every sector that
//! differs from what its owner last saw.
//!
//! `QCR_SEED=n cargo test --test simulation bitmaps::` replays a seed.

use std::sync::Arc;
use std::task::Poll;

use crate::common::crash::Effort;
use crate::common::memory::MemoryDevice;
use crate::common::sim::{Delay, Fault, Settings, SimDevice};
use crate::common::slice;
use crate::common::verify::{self, Tolerance, in_paused_time};
use parking_lot::Mutex;
use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::image::create;
use qcow_recycler::{BlockDevice, CreateOptions, Error, Image, Options};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const DISK: u64 = 256 << 10;

fn options() -> Options {
    Options { keep_erased: 4096, runtime_asserts: true, ..Options::default() }
}

fn seed() -> u64 {
    let seed = slice::replay_seed().unwrap_or(1);
    println!("QCR_SEED={seed}");
    seed
}

async fn open<D: BlockDevice + Clone>(device: &D) -> Image<D> {
    Image::open(device.clone(), options()).await.unwrap()
}

async fn contents<D: BlockDevice>(image: &Image<D>) -> Vec<u8> {
    let mut bytes = vec![0; image.virtual_size() as usize];
    image.read(0, IoBufMut::new(&mut bytes)).await.unwrap();
    bytes
}

/// An image with contents, holes, and two bitmaps: one that records, one that does not.
fn image(cluster_size: u64, name: usize, seed: u64) -> Vec<u8> {
    let device = MemoryDevice::new(Vec::new());
    let backing = (name > 0).then(|| ("n".repeat(name), "raw".to_owned()));
    let wanted = CreateOptions { cluster_size, backing, ..CreateOptions::new(DISK) };
    block_on(create(&device, &wanted)).unwrap();
    let options = Options { backing: qcow_recycler::BackingPolicy::Skip, ..options() };
    let image = block_on(Image::open(device.clone(), options)).unwrap();
    let mut rng = SmallRng::seed_from_u64(seed);
    block_on(image.write(0, IoBuf::new(&vec![1; DISK as usize]))).unwrap();
    block_on(image.add_bitmap("recording", 512, true)).unwrap();
    block_on(image.add_bitmap("quiet", 4096, false)).unwrap();
    for _ in 0..8 {
        let at = rng.random_range(0..DISK / cluster_size) * cluster_size;
        block_on(image.discard(at, cluster_size)).unwrap();
    }
    block_on(image.clear_bitmap("recording")).unwrap();
    block_on(image.close()).unwrap();
    device.contents()
}

/// Writes, discards, a compaction, flushes; the bitmap must mark all that the writes touched.
async fn work<D: BlockDevice>(image: &Image<D>, rng: &mut SmallRng, steps: u64) -> Result<(), Error> {
    for version in 2..2 + steps {
        let length = rng.random_range(1..=16) * 512;
        let at = rng.random_range(0..=(DISK - length) / 512) * 512;
        match rng.random_range(0..8) {
            0..4 => image.write(at, IoBuf::new(&vec![version as u8; length as usize])).await?,
            4 => image.discard(at, length).await?,
            5 => image.write_zeroes(at, length, true).await?,
            6 => image.flush().await?,
            _ => {
                qcow_recycler::recycler::compact(image, &mut |_| true).await?;
            }
        }
    }
    Ok(())
}

/// What a bitmap marks, in sectors.
fn marked<D: BlockDevice>(image: &Image<D>, name: &str) -> Result<Vec<bool>, Error> {
    let mut sectors = vec![false; (image.virtual_size() / 512) as usize];
    let mut from = 0;
    while let Some(range) = image.next_dirty(name, from)? {
        assert!(range.start >= from && range.end > range.start);
        sectors[(range.start / 512) as usize..(range.end / 512) as usize].fill(true);
        from = range.end;
    }
    Ok(sectors)
}

/// If the file says that its bitmaps can be believed, every sector that differs from `base` is marked.
fn judge(bytes: &[u8], base: &[u8]) -> bool {
    verify::our_check(bytes, Tolerance::Leaks).unwrap();
    let device = MemoryDevice::new(bytes.to_vec());
    in_paused_time(async {
        let image = open(&device).await;
        let bitmaps = image.bitmaps().await.unwrap();
        assert_eq!(bitmaps.iter().map(|b| b.name.as_str()).collect::<Vec<_>>(), ["recording", "quiet"]);
        let believed = !bitmaps[0].inconsistent;
        if believed {
            assert!(bitmaps[0].recording && !bitmaps[1].recording && bitmaps[1].dirty == 0);
            let (now, marks) = (contents(&image).await, marked(&image, "recording").unwrap());
            for (sector, (new, old)) in now.chunks(512).zip(base.chunks(512)).enumerate() {
                assert!(new == old || marks[sector], "sector {sector} has changed, and is not marked");
            }
        } else {
            assert!(image.clear_bitmap("recording").await.is_err());
            image.remove_bitmap("recording").unwrap();
        }
        image.close().await.unwrap();
        verify::our_check(&device.contents(), Tolerance::Clean).unwrap();
        believed
    })
    .unwrap()
}

/// Whoever asks on from where the last answer ended comes to an end, also where the disk does not end with a unit.
#[test]
fn what_is_dirty_ends_with_the_disk() {
    let device = MemoryDevice::new(Vec::new());
    block_on(create(&device, &CreateOptions::new((64 << 10) + 512))).unwrap();
    let image = block_on(open(&device));
    block_on(image.add_bitmap("recording", 64 << 10, true)).unwrap();
    block_on(image.write(64 << 10, IoBuf::new(&[1; 512]))).unwrap();
    let end = image.virtual_size();
    assert_eq!(image.next_dirty("recording", 0).unwrap(), Some(64 << 10..end));
    assert_eq!(image.next_dirty("recording", end).unwrap(), None);
    block_on(image.close()).unwrap();
}

/// Every write that is recorded waits for whoever asks: a long run of marks is not walked through.
#[test]
fn a_long_run_of_marks_is_found_at_once() {
    const SIZE: u64 = 4 << 30;
    let device = MemoryDevice::new(Vec::new());
    block_on(create(&device, &CreateOptions::new(SIZE))).unwrap();
    let image = block_on(open(&device));
    block_on(image.add_bitmap("b", 512, true)).unwrap();
    block_on(image.write_zeroes(0, SIZE / 2 + 1536, true)).unwrap();
    block_on(image.write_zeroes(SIZE / 2 + 2048, 512, true)).unwrap();
    let began = std::time::Instant::now();
    for from in (0..500).map(|n| n * 512) {
        assert_eq!(image.next_dirty("b", from).unwrap(), Some(from..SIZE / 2 + 1536));
    }
    assert!(began.elapsed().as_secs() < 5, "{:?}", began.elapsed());
    let last = SIZE / 2 + 2048;
    assert_eq!(image.next_dirty("b", SIZE / 2 + 1536).unwrap(), Some(last..last + 512));
    assert_eq!(image.next_dirty("b", last + 512).unwrap(), None);
    block_on(image.close()).unwrap();
}

/// A disk is not made larger than its bitmaps may be: nobody could open the image.
#[test]
fn a_disk_does_not_outgrow_its_bitmaps() {
    const MOST: u64 = 2 << 40;
    let device = MemoryDevice::new(Vec::new());
    block_on(create(&device, &CreateOptions::new(2 * MOST))).unwrap();
    let image = block_on(open(&device));
    block_on(image.create_snapshot("large")).unwrap();
    let error = block_on(image.add_bitmap("fine", 512, true)).unwrap_err();
    assert_eq!(error.field(), Some("granularity"), "{error}");
    block_on(image.resize(MOST, true)).unwrap();
    block_on(image.add_bitmap("coarse", 1024, true)).unwrap();
    block_on(image.add_bitmap("fine", 512, true)).unwrap();
    let refused = |result: Result<(), Error>| {
        let error = result.unwrap_err();
        assert!(matches!(&error, Error::Unsupported { what } if what.contains("\"fine\"")), "{error}");
        assert_eq!(image.virtual_size(), MOST);
    };
    refused(block_on(image.resize(MOST + 512, false)));
    refused(block_on(image.apply_snapshot("large")));
    block_on(image.close()).unwrap();
    let image = block_on(open(&device));
    assert!(block_on(image.bitmaps()).unwrap().iter().all(|b| !b.inconsistent));
    image.remove_bitmap("fine").unwrap();
    block_on(image.apply_snapshot("large")).unwrap();
    assert_eq!(image.virtual_size(), 2 * MOST);
    block_on(image.close()).unwrap();
    let image = block_on(open(&device));
    assert_eq!(block_on(image.bitmaps()).unwrap().len(), 1);
    block_on(image.close()).unwrap();
}

/// An image whose bitmaps are stored at the end of the file, behind what a compaction moves.
fn at_the_end() -> Vec<u8> {
    let device = MemoryDevice::new(Vec::new());
    block_on(create(&device, &CreateOptions { cluster_size: 4096, ..CreateOptions::new(DISK) })).unwrap();
    let image = block_on(open(&device));
    block_on(image.write(0, IoBuf::new(&vec![1; DISK as usize]))).unwrap();
    block_on(image.add_bitmap("recording", 512, true)).unwrap();
    block_on(image.add_bitmap("quiet", 4096, false)).unwrap();
    block_on(image.write(DISK - 4096, IoBuf::new(&[2; 512]))).unwrap();
    block_on(image.close()).unwrap();
    device.contents()
}

/// Lets a compaction take so many polls; then `meanwhile`, and the rest of it if that is asked for. `true`: it had ended
/// before.
async fn compacted(image: &Image<SimDevice>, polls: usize, meanwhile: impl FnOnce() -> bool) -> bool {
    let mut compaction = Box::pin(async { qcow_recycler::recycler::compact(image, &mut |_| true).await });
    for _ in 0..polls {
        let poll = std::future::poll_fn(|context| Poll::Ready(compaction.as_mut().poll(context))).await;
        if let Poll::Ready(report) = poll {
            report.unwrap();
            meanwhile();
            return true;
        }
        tokio::task::yield_now().await;
    }
    if meanwhile() {
        compaction.await.unwrap();
    }
    false
}

/// The bitmaps give way to a compaction, which is dropped at any moment, or meanwhile one of them is removed: a clean close leaves
/// bitmaps that are right, and no leak.
fn compactions(removes: bool) {
    let old = at_the_end();
    let mut in_doubt = 0;
    for polls in 1.. {
        let device = SimDevice::new(old.clone(), Settings { delay: Delay::Yields(2), ..Settings::new(polls as u64) });
        let ended = in_paused_time(async {
            let image = open(&device).await;
            image.discard(0, DISK / 2).await.unwrap();
            image.flush().await.unwrap();
            let meanwhile = || {
                if removes {
                    image.remove_bitmap("quiet").unwrap();
                }
                removes
            };
            let ended = compacted(&image, polls, meanwhile).await;
            // None where the header is in doubt.
            let marks = if removes { None } else { marked(&image, "recording").ok() };
            match image.close().await {
                Ok(()) => {
                    verify::our_check(&device.contents(), Tolerance::Clean).unwrap_or_else(|e| panic!("{polls}: {e}"));
                    let image = open(&device).await;
                    let bitmaps = image.bitmaps().await.unwrap();
                    assert_eq!(bitmaps.len(), if removes { 1 } else { 2 }, "{polls} polls");
                    assert!(bitmaps.iter().all(|b| !b.inconsistent), "{polls} polls");
                    if let Some(marks) = marks {
                        assert_eq!(marked(&image, "recording").unwrap(), marks, "{polls} polls");
                    }
                    image.close().await.unwrap();
                }
                Err(Error::Failed { .. }) => {
                    in_doubt += 1;
                    verify::our_check(&device.contents(), Tolerance::Leaks).unwrap();
                    let image = open(&device).await;
                    image.close().await.unwrap();
                }
                Err(e) => panic!("{polls} polls: {e}"),
            }
            ended
        })
        .unwrap();
        assert_eq!(device.violations(), Vec::<String>::new());
        if ended {
            println!("{polls} polls, after {in_doubt} of them the header is in doubt");
            break;
        }
    }
    assert_eq!(in_doubt > 0, !removes);
}

#[test]
fn a_dropped_compaction_leaves_bitmaps_that_are_right() {
    compactions(false);
}

#[test]
fn a_bitmap_that_is_removed_under_a_compaction_is_freed_once() {
    compactions(true);
}

#[test]
fn a_power_cut_never_leaves_a_bitmap_that_lies() {
    for seed in seed()..seed() + 6 {
        let cluster_size = [1024, 2048, 4096][seed as usize % 3];
        let old = image(cluster_size, 0, seed);
        let device = SimDevice::new(old.clone(), Settings::new(seed));
        let cuts = Arc::new(Mutex::new(Vec::new()));
        let collect = cuts.clone();
        let mut last = 0;
        let moment = Mutex::new(SmallRng::seed_from_u64(seed));
        let base = in_paused_time(async {
            let image = open(&device).await;
            contents(&image).await
        })
        .unwrap();
        // That opening was not closed: the bitmaps of the device are inconsistent now. Start from the good image.
        let device = SimDevice::new(old, Settings::new(seed));
        device.observe(move |device, event| {
            let epoch = device.epoch(event);
            let rng = &mut *moment.lock();
            let effort = Effort { exhaustive: 3, random: 2, singles: 2 };
            for selection in epoch.selections(effort, rng).1 {
                collect.lock().push(epoch.image(&selection));
            }
        });
        in_paused_time(async {
            let image = open(&device).await;
            let mut rng = SmallRng::seed_from_u64(seed);
            work(&image, &mut rng, 10).await.unwrap();
            image.close().await.unwrap();
        })
        .unwrap();
        device.ignore();
        assert_eq!((device.violations(), device.uncertain()), (Vec::<String>::new(), 0), "seed {seed}");
        verify::qemu_check(&device.contents(), Tolerance::Clean).unwrap();
        assert!(judge(&device.contents(), &base), "seed {seed}: a clean close leaves bitmaps that can be believed");
        let mut cuts = std::mem::take(&mut *cuts.lock());
        cuts.dedup();
        let mut believed = 0;
        for (number, cut) in cuts.iter().enumerate() {
            let good = std::panic::catch_unwind(|| judge(cut, &base));
            believed += u64::from(good.unwrap_or_else(|_| panic!("seed {seed}, crash image {number}")));
            last += 1;
        }
        println!("seed {seed}: {last} crash images, the bitmaps of {believed} can be believed");
        assert!(last > believed);
    }
}

#[test]
fn every_failed_call_leaves_bitmaps_that_are_right_or_not_believed() {
    let seed = seed();
    let old = image(1024, 0, seed);
    let base = in_paused_time(async { contents(&open(&MemoryDevice::new(old.clone())).await).await }).unwrap();
    let mut failed = 0;
    for after in 0.. {
        let device = SimDevice::new(old.clone(), Settings::new(after));
        device.arm(Fault { after, errno: libc::EIO, lasting: false, only: None });
        let outcome = in_paused_time(async {
            let image = Image::open(device.clone(), options()).await?;
            let worked = work(&image, &mut SmallRng::seed_from_u64(seed), 6).await;
            worked.and(image.close().await)
        })
        .unwrap();
        let fired = device.disarm();
        if fired.is_empty() {
            outcome.unwrap();
            break;
        }
        failed += 1;
        judge(&device.contents(), &base);
    }
    assert!(failed > 30, "{failed}");
}

#[test]
fn bitmaps_find_room_in_any_header_that_has_some() {
    // Names of backing files that stand in the way, and one that leaves no room.
    for (cluster_size, name) in [(1024, 0), (4096, 0), (4096, 1000), (65536, 1023), (2048, 500)] {
        let bytes = image(cluster_size, name, 3);
        let image = Image::open(
            MemoryDevice::new(bytes),
            Options { backing: qcow_recycler::BackingPolicy::Skip, ..Options::default() },
        );
        let image = block_on(image).unwrap();
        assert_eq!(image.info().backing_file.map_or(0, |n| n.len()), name);
        assert_eq!(block_on(image.bitmaps()).unwrap().len(), 2);
        image.remove_bitmap("recording").unwrap();
        image.remove_bitmap("quiet").unwrap();
        block_on(image.close()).unwrap();
    }
    let device = MemoryDevice::new(Vec::new());
    // The names of the features fill the first cluster, in QEMU's images as well.
    block_on(create(&device, &CreateOptions { cluster_size: 512, ..CreateOptions::new(DISK) })).unwrap();
    let skip = Options { backing: qcow_recycler::BackingPolicy::Skip, ..Options::default() };
    let image = block_on(Image::open(device, skip)).unwrap();
    let error = block_on(image.add_bitmap("b", 512, true)).unwrap_err();
    assert!(matches!(&error, Error::Unsupported { what } if what.contains("no room")), "{error}");
}

#[test]
fn what_is_asked_for_must_make_sense() {
    let image = block_on(Image::open(MemoryDevice::new(image(4096, 0, 1)), options())).unwrap();
    let name = |e: Error| e.field().map(str::to_owned);
    assert_eq!(name(block_on(image.add_bitmap("recording", 512, true)).unwrap_err()).as_deref(), Some("name"));
    assert_eq!(name(block_on(image.add_bitmap("", 512, true)).unwrap_err()).as_deref(), Some("name"));
    assert_eq!(name(block_on(image.add_bitmap("x", 256, true)).unwrap_err()).as_deref(), Some("granularity"));
    assert_eq!(name(block_on(image.add_bitmap("x", 768, true)).unwrap_err()).as_deref(), Some("granularity"));
    assert_eq!(name(image.merge_bitmap("recording", "nobody").unwrap_err()).as_deref(), Some("name"));
    block_on(image.write(5 * 512, IoBuf::new(&[9; 1024]))).unwrap();
    assert_eq!(image.next_dirty("recording", 0).unwrap(), Some(5 * 512..7 * 512));
    assert_eq!(image.next_dirty("recording", 6 * 512).unwrap(), Some(6 * 512..7 * 512));
    assert_eq!(image.next_dirty("recording", 7 * 512).unwrap(), None);
    assert_eq!(image.next_dirty("quiet", 0).unwrap(), None);
    image.merge_bitmap("quiet", "recording").unwrap();
    assert_eq!(image.next_dirty("quiet", 0).unwrap(), Some(0..4096));
    block_on(image.record_bitmap("recording", false)).unwrap();
    block_on(image.write(100 * 512, IoBuf::new(&[9; 1024]))).unwrap();
    assert_eq!(image.next_dirty("recording", 7 * 512).unwrap(), None);
    block_on(image.resize(6 * 512, true)).unwrap();
    assert_eq!(image.next_dirty("recording", 0).unwrap(), Some(5 * 512..6 * 512));
    block_on(image.close()).unwrap();
}
