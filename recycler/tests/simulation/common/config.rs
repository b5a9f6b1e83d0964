//! What kind of image a history runs on, and how it is opened.

use std::collections::HashMap;
use std::fmt;
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use parking_lot::Mutex;
use qcow_recycler::device::Features;
use qcow_recycler::{BlockDevice, Error, Image, Options};
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};

use super::chain::{self, Behind};
use super::content::SECTOR;
use super::encryption::Encryption;
use super::sim::{Delay, Settings};

/// The image as qemu-img makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ImageKind {
    pub cluster_bits: u32,
    pub refcount_bits: u32,
    pub version: u32,
    pub lazy_refcounts: bool,
    /// Clusters have subclusters, and take 16 KiB at least.
    pub extended_l2: bool,
    pub preallocated: bool,
    /// Clusters are compressed by zstd, not by deflate.
    pub zstd: bool,
    pub encryption: Encryption,
    pub backing: Behind,
    /// Size of the virtual disk in sectors.
    pub sectors: u64,
}

impl ImageKind {
    /// Sectors in a cluster.
    pub fn cluster_sectors(&self) -> u64 {
        (1u64 << self.cluster_bits) / SECTOR as u64
    }

    /// The same with this behind it, if QEMU makes such an image.
    pub fn over(self, backing: Behind) -> ImageKind {
        ImageKind { backing, preallocated: self.preallocated && !backing.exists(), ..self }
    }

    /// For `qemu-img -o`.
    pub fn options(&self) -> String {
        let mut options = format!("cluster_size={}", 1u64 << self.cluster_bits);
        if self.version == 2 {
            options.push_str(",compat=0.10");
        } else {
            let lazy = if self.lazy_refcounts { "on" } else { "off" };
            options.push_str(&format!(",compat=1.1,refcount_bits={},lazy_refcounts={lazy}", self.refcount_bits));
            if self.extended_l2 {
                options.push_str(",extended_l2=on");
            }
            if self.zstd {
                options.push_str(",compression_type=zstd");
            }
        }
        options
    }

    /// The bytes of a new image, made by qemu-img (once for each kind).
    pub fn create(&self) -> Vec<u8> {
        static MADE: LazyLock<Mutex<HashMap<ImageKind, Vec<u8>>>> = LazyLock::new(Mutex::default);
        if let Some(bytes) = MADE.lock().get(self) {
            return bytes.clone();
        }
        // Where its backing file is.
        let chain = self.backing.chain();
        let file = tempfile::NamedTempFile::new_in(chain::directory()).expect("a temporary file");
        let path = file.path();
        let mut options = self.options();
        if self.preallocated {
            options.push_str(",preallocation=metadata");
        }
        let output = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-o", &options])
            .args(chain.iter().flat_map(|chain| chain.arguments()))
            .arg(path)
            .arg((self.sectors * SECTOR as u64).to_string())
            .output()
            .expect("these tests need qemu-img");
        assert!(output.status.success(), "qemu-img create -o {options}: {}", String::from_utf8_lossy(&output.stderr));
        let bytes = self.encryption.apply(std::fs::read(path).expect("the new image"));
        MADE.lock().insert(*self, bytes.clone());
        bytes
    }
}

/// What is behind some of the images with a disk of so many sectors: shorter than it, longer, or as long.
fn random_backing(seed: u64, sectors: u64) -> Behind {
    let mut rng = SmallRng::seed_from_u64(seed ^ 0x6261_636b);
    if rng.random_bool(0.7) {
        return Behind::Nothing;
    }
    let size = match rng.random_range(0..4) {
        0 => rng.random_range(1..=sectors),
        1 => sectors + rng.random_range(1..=sectors),
        _ => sectors,
    };
    // Where it matters, a chain is a short one.
    match rng.random_range(0..4) {
        0 | 1 => Behind::Raw(size),
        2 => Behind::Image(size),
        _ => Behind::Two(size),
    }
}

/// How many bytes some compactions move in a second, and in a batch; and whether they fill holes.
fn random_batches(seed: u64, cluster: u64) -> (Option<u64>, bool) {
    let mut rng = SmallRng::seed_from_u64(seed ^ 0x6261_7463);
    (rng.random_bool(0.4).then(|| rng.random_range(2..12) * cluster), rng.random_bool(0.3))
}

/// A whole set-up. Everything follows from it and the seed.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    pub seed: u64,
    pub image: ImageKind,
    /// In bytes, as the options of the same names.
    pub l2_cache_size: u64,
    pub keep_erased: u64,
    pub compact_after_unmaps: Option<u64>,
    /// So much is a batch of a compaction, too; `None`: all that these disks hold is one.
    pub rate_limit: Option<u64>,
    pub settle: Duration,
    pub flush_after: Duration,
    pub features: Features,
    pub delay: Delay,
    /// Guests change the same sectors at the same time.
    pub overlap: bool,
    /// Free clusters occupy no space, so that they are filled in small parts.
    pub sparse: bool,
    /// Clusters that hold anything, past the end of the image: room to grow on a device that cannot be resized.
    pub room: u64,
}

/// How large the disks may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// A few clusters: every crash image is opened and read whole.
    Tiny,
    /// Several L2 tables.
    Small,
}

impl Config {
    /// A random set-up; small clusters come oftenest, since there a small disk has many tables.
    pub fn random(seed: u64, scale: Scale, rng: &mut SmallRng) -> Config {
        let cluster_bits = match (scale, rng.random_range(0..20)) {
            (_, 0..=8) => 9,
            (_, 9..=14) => 12,
            (Scale::Tiny, 15) | (Scale::Small, 15..=17) => 16,
            (Scale::Tiny, n) => [9, 10, 11, 12][n % 4],
            (Scale::Small, _) => *[10, 11, 13, 14, 15, 17, 18, 19, 20, 21].choose(rng).unwrap(),
        };
        let version = if rng.random_bool(0.15) { 2 } else { 3 };
        let extended_l2 = version == 3 && cluster_bits >= 12 && rng.random_bool(0.2);
        let cluster_bits = if extended_l2 { cluster_bits.max(14) } else { cluster_bits };
        let clusters = match scale {
            Scale::Tiny if cluster_bits <= 10 => rng.random_range(20..200),
            Scale::Tiny if cluster_bits <= 12 => rng.random_range(4..40),
            Scale::Tiny => rng.random_range(2..6),
            Scale::Small => match cluster_bits {
                9 => rng.random_range(100..2000),
                10..=12 => rng.random_range(50..1000),
                13..=16 => rng.random_range(16..100),
                _ => rng.random_range(3..8),
            },
        };
        let cluster_sectors = (1u64 << cluster_bits) / SECTOR as u64;
        // Often the disk ends inside a cluster.
        let ragged = if rng.random_bool(0.3) { rng.random_range(0..cluster_sectors) } else { 0 };
        let image = ImageKind {
            cluster_bits,
            refcount_bits: if version == 2 || rng.random_bool(0.4) { 16 } else { 1 << rng.random_range(0..=6) },
            version,
            lazy_refcounts: version == 3 && rng.random_bool(0.3),
            extended_l2,
            preallocated: rng.random_bool(0.1),
            zstd: version == 3 && seed % 5 == 4,
            encryption: Encryption::None,
            backing: Behind::Nothing,
            sectors: clusters * cluster_sectors + ragged,
        };
        let image = image.over(random_backing(seed, image.sectors));
        let cluster = 1u64 << cluster_bits;
        let all = Features { resize: true, punch_hole: true, write_zeroes: true, copy_range: true };
        let features = match rng.random_range(0..4) {
            0 => Features { resize: true, ..Features::default() },
            1 => Features {
                resize: true,
                punch_hole: rng.random(),
                write_zeroes: rng.random(),
                copy_range: rng.random(),
            },
            _ => all,
        };
        // Without a recycler nothing is reused, so all that a history writes must have room.
        let fixed = rng.random_bool(0.15);
        let (features, room) = match scale {
            Scale::Tiny if fixed && cluster_bits == 9 => (Features { resize: false, ..features }, 1024),
            Scale::Small if fixed && cluster_bits <= 12 => (Features { resize: false, ..features }, 6144),
            _ => (features, 0),
        };
        let delay = match rng.random_range(0..4) {
            0 => Delay::None,
            1 => Delay::Yields(rng.random_range(1..6)),
            _ => Delay::Sleeps { yields: rng.random_range(0..4), millis: rng.random_range(1..5) },
        };
        let (rate_limit, sparse) = random_batches(seed, cluster);
        Config {
            seed,
            image,
            l2_cache_size: if rng.random_bool(0.6) { rng.random_range(0..3) * cluster } else { 4 << 20 },
            keep_erased: rng.random_range(0..6) * cluster,
            compact_after_unmaps: rng.random_bool(0.8).then(|| rng.random_range(1..8) * cluster),
            rate_limit,
            settle: Duration::from_millis(rng.random_range(1..40)),
            flush_after: Duration::from_millis(rng.random_range(1..60)),
            features,
            delay,
            overlap: rng.random_bool(0.3),
            sparse,
            room,
        }
    }

    /// What the device holds at first: a new image, and garbage in the room after it.
    pub fn create(&self) -> Vec<u8> {
        let mut bytes = self.image.create();
        if self.room > 0 {
            let clusters = (bytes.len() as u64).div_ceil(1 << self.image.cluster_bits) + self.room;
            bytes.resize((clusters << self.image.cluster_bits) as usize, 0xa5);
        }
        bytes
    }

    /// How the image is opened.
    pub fn options(&self) -> Options {
        Options {
            keep_erased: self.keep_erased,
            compact_after_unmaps: self.compact_after_unmaps,
            rate_limit: self.rate_limit,
            settle_time: self.settle,
            flush_after: self.flush_after,
            l2_cache_size: self.l2_cache_size,
            runtime_asserts: true,
            passphrase: self.image.encryption.passphrase(),
            ..Options::default()
        }
    }

    /// Opens the image, with what is behind it.
    ///
    /// # Errors
    /// The library's.
    pub async fn open<D: BlockDevice>(&self, device: D) -> Result<Image<D>, Error> {
        self.open_as(device, self.options(), Delay::None).await
    }

    /// The same with other options, and with backing files that take their time.
    ///
    /// # Errors
    /// The library's.
    pub async fn open_as<D: BlockDevice>(&self, device: D, options: Options, delay: Delay) -> Result<Image<D>, Error> {
        match self.image.backing.open(delay).await {
            Some(backing) => Image::open_with_backing(device, backing, options).await,
            None => Image::open(device, options).await,
        }
    }

    /// How the device behaves.
    pub fn device(&self, record: bool) -> Settings {
        Settings {
            delay: self.delay,
            features: self.features,
            record,
            overlap: self.overlap,
            sparse: self.sparse,
            ..Settings::new(self.seed)
        }
    }
}

impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let i = &self.image;
        write!(
            f,
            "clusters of {} B, refcounts of {} bits, version {}{}{}{}{}{}{}, disk of {} sectors, L2 cache {} B, \
            keep_erased {}, \
             compact_after {:?}, rate {:?}, settle {:?}, flush {:?}, {:?}, {:?}{}{}",
            1u64 << i.cluster_bits,
            i.refcount_bits,
            i.version,
            if i.lazy_refcounts { ", lazy" } else { "" },
            if i.extended_l2 { ", extended L2 entries" } else { "" },
            if i.preallocated { ", preallocated" } else { "" },
            if i.zstd { ", zstd" } else { "" },
            match i.encryption {
                Encryption::None => "",
                Encryption::Aes => ", AES",
                Encryption::Luks => ", LUKS",
            },
            if i.backing.exists() { format!(", over {:?}", i.backing) } else { String::new() },
            i.sectors,
            self.l2_cache_size,
            self.keep_erased,
            self.compact_after_unmaps,
            self.rate_limit,
            self.settle,
            self.flush_after,
            self.delay,
            self.features,
            if self.overlap { ", overlapping requests" } else { "" },
            if self.sparse { ", sparse" } else { "" },
        )
    }
}
