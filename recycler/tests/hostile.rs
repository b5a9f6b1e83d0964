//! Damaged images by the thousand: whatever is in them, the library neither panics, nor hangs, nor takes memory out of
//! proportion; it changes nothing when it refuses, names what is wrong, and loses nothing that is not damaged.
//!
//! `QCR_SEED=n cargo test --test hostile` replays a seed, `QCR_SAVE=path` with it saves the damaged image;
//! `QCR_SOAK_MINUTES=n` makes the run longer and starts it from `QCR_SOAK_SEED=n`, or from the clock. The damage and what
//! is expected of the library are those of the fuzz targets, in `fuzz/`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../fuzz/src/lib.rs"]
mod fuzz;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use fuzz::choices::Choices;
use fuzz::known::{Original, is_accounted_for};
use fuzz::meet::{Met, meet};
use fuzz::meter::SEED;
use fuzz::mutate::{File, mutate};
use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::IoBuf;
use qcow_recycler::device::Features;
use qcow_recycler::image::{CreateOptions, create};
use qcow_recycler::{Image, Options};

#[global_allocator]
static ALLOCATOR: fuzz::meter::Metered = fuzz::meter::Metered;

/// How long a run is that nobody asked to be longer.
const SECONDS: u64 = 35;
/// Nothing takes longer than this, however busy the machine is.
const HANGS: Duration = Duration::from_secs(30);

/// Seeds that found something once: a file that was cut, counts past its end, free clusters that nothing can count,
/// entries past the end of the file that compaction stumbled over, a snapshot table that reaches into free clusters,
/// compressed data of a snapshot's that the counts give to the disk, a file that a repair made long, compressed data that
/// reaches into a table, another way of compressing, a file that is long to begin with.
const FOUND: [u64; 14] = [
    75,
    215,
    221,
    1009,
    6265,
    33166,
    35253,
    814_834_457,
    815_063_852,
    815_069_265,
    120_504_582_808_267_736,
    120_505_412_407_958_455,
    120_505_412_408_202_205,
    120_505_412_408_286_822,
];

/// Since when [`SEED`] is being tried, in milliseconds: for whoever notices that it takes too long.
static SINCE: AtomicU64 = AtomicU64::new(0);

fn milliseconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_millis() as u64)
}

fn variable<T: std::str::FromStr>(name: &str) -> Option<T> {
    Some(std::env::var(name).ok()?.trim().parse().ok().unwrap_or_else(|| panic!("{name} must be a number")))
}

/// The files of the corpus of a target, by name.
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(&directory)
        .unwrap_or_else(|e| panic!("{}: {e}", directory.display()))
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(&path).unwrap()))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", directory.display());
    files
}

/// An image with clusters too large for the corpus, half of it full.
fn large_clusters(cluster_size: u64, refcount_bits: u32) -> Original {
    let size = 6 * cluster_size;
    let all = Features { resize: true, punch_hole: true, write_zeroes: true, copy_range: true };
    let device = fuzz::device::Sparse::new(&File::new(Vec::new()), all, u64::MAX);
    block_on(async {
        let options = CreateOptions { cluster_size, refcount_bits, ..CreateOptions::new(size) };
        create(&device, &options).await.unwrap();
        let image = Image::open(device.clone(), Options::default()).await.unwrap();
        for at in [0, cluster_size, 3 * cluster_size] {
            image.write(at, IoBuf::new(&vec![7; cluster_size as usize])).await.unwrap();
        }
        image.close().await.unwrap();
    });
    Original::new(&format!("clusters of {cluster_size}"), device.contents(u64::MAX).bytes)
}

fn originals() -> Vec<Original> {
    let mut all: Vec<_> =
        corpus("image").into_iter().map(|(name, input)| Original::new(&name, input[8..].to_vec())).collect();
    all.push(large_clusters(64 << 10, 16));
    all.push(large_clusters(1 << 20, 1));
    all
}

/// One damaged image, from its seed.
fn one(seed: u64, originals: &[Original]) -> Result<Met, String> {
    let mut choices = Choices::new(seed);
    // Copying megabytes is slow, so the images with large clusters, the last two, have few turns.
    let few = if choices.chance(4) { originals.len() } else { originals.len() - 2 };
    let original = &originals[choices.below(few as u64) as usize];
    let mut file = File::new(original.bytes.clone());
    let damage = mutate(&mut file, &mut choices);
    let disk = original.survives(&file);
    if let Some(path) = std::env::var_os("QCR_SAVE") {
        std::fs::write(&path, &file.bytes).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(file.length).unwrap();
        println!("{} with {}", original.name, damage.join(", "));
    }
    let story = |e: String| format!("{} with {}: {e}", original.name, damage.join(", "));
    match catch_unwind(AssertUnwindSafe(|| meet(&file, disk, &mut choices))) {
        Ok(result) => result.map_err(story),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned())).unwrap_or_default();
            Err(story(format!("panicked: {text}")))
        }
    }
}

/// Ends the program when one seed takes too long: a loop without an end cannot be left otherwise.
fn watch() {
    std::thread::spawn(|| {
        loop {
            std::thread::sleep(Duration::from_secs(1));
            let since = SINCE.load(Ordering::SeqCst);
            if since != 0 && milliseconds().saturating_sub(since) > HANGS.as_millis() as u64 {
                eprintln!("seed {} hangs", SEED.load(Ordering::SeqCst));
                std::process::abort();
            }
        }
    });
}

#[test]
fn damaged_images_do_no_harm() {
    watch();
    let originals = originals();
    let minutes = variable::<f64>("QCR_SOAK_MINUTES");
    let replay = variable::<u64>("QCR_SEED");
    let first = match (replay, minutes) {
        (Some(seed), _) => seed,
        (None, Some(_)) => variable("QCR_SOAK_SEED").unwrap_or_else(milliseconds) << 20,
        (None, None) => 1,
    };
    let end = Instant::now() + minutes.map_or(Duration::from_secs(SECONDS), |m| Duration::from_secs_f64(m * 58.0));
    let (mut all, mut readable, mut writable, mut followed, mut requests, mut failed) = (0, 0, 0, 0, 0, 0);
    let mut peak = (0, 0);
    let mut slowest = (Duration::ZERO, 0);
    let mut failures = Vec::new();
    let found = FOUND.into_iter().filter(|_| replay.is_none());
    for seed in found.chain(first..) {
        if Instant::now() >= end && all >= 200 || replay.is_some() && all > 0 {
            break;
        }
        SEED.store(seed, Ordering::SeqCst);
        SINCE.store(milliseconds(), Ordering::SeqCst);
        let began = Instant::now();
        match one(seed, &originals) {
            Ok(met) => {
                readable += u64::from(met.readable);
                writable += u64::from(met.writable);
                followed += u64::from(met.followed);
                requests += met.requests;
                failed += met.failed;
                peak = peak.max((met.peak, seed));
            }
            Err(e) => {
                failures.push(format!("seed {seed}: {e}"));
                if failures.len() >= 20 {
                    break;
                }
            }
        }
        slowest = slowest.max((began.elapsed(), seed));
        all += 1;
    }
    SINCE.store(0, Ordering::SeqCst);
    println!(
        "hostile: {all} images, {readable} readable, {writable} writable, {followed} followed to the end; {requests} \
         requests, {failed} of them refused; at most {} bytes (seed {}), {:?} (seed {})",
        peak.0, peak.1, slowest.0, slowest.1
    );
    println!("soak: damaged_images={all}");
    assert!(
        failures.is_empty(),
        "{}\nreplay: QCR_SEED=<seed> cargo test -p qcow-recycler --test hostile",
        failures.join("\n")
    );
    if replay.is_none() {
        assert!(
            readable > 0 && writable > 0 && followed > 0 && requests > failed,
            "the damage is not what it should be"
        );
    }
}

/// Undamaged, every image is followed to the end: what is expected is not expected of too few.
#[test]
fn sound_images_are_followed_to_the_end() {
    for original in originals() {
        let file = File::new(original.bytes.clone());
        assert!(is_accounted_for(&file) || original.name == "lazy-dirty", "{}", original.name);
        for seed in 0..4 {
            let met = meet(&file, original.survives(&file), &mut Choices::new(seed));
            let met = met.unwrap_or_else(|e| panic!("{}, requests of seed {seed}: {e}", original.name));
            assert_eq!(met.writable, met.followed, "{}", original.name);
            assert!(
                !met.readable || original.name == "empty-disk" || original.known_sectors() > 0,
                "{}",
                original.name
            );
        }
    }
}

/// The inputs of the fuzz targets, and each of those that found something once.
#[test]
fn the_corpus_is_met() {
    type Target = fn(&[u8]);
    let targets: [(&str, Target); 4] =
        [("image", fuzz::image), ("entries", fuzz::entries), ("header", fuzz::header), ("options", fuzz::options)];
    for (target, run) in targets {
        for (name, input) in corpus(target) {
            println!("{target}/{name}");
            run(&input);
        }
    }
}
