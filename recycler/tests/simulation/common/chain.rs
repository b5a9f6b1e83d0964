//! Backing files in the simulation: files for QEMU to find beside the images, and devices for the library.

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, LazyLock};

use parking_lot::Mutex;
use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::IoBuf;
use qcow_recycler::device::Features;
use qcow_recycler::{BackingFile, Image, Options};

use super::content::{self, Content, SECTOR};
use super::memory::MemoryDevice;
use super::sim::{Delay, Settings, SimDevice};

/// The number of the write that the contents of the lowest backing file look like; the next file's have the next number.
const FIRST: u64 = 1 << 41;
/// Clusters of backing images.
const CLUSTER: u64 = 1024;

/// What is behind an image, and how many sectors the file right behind it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Behind {
    Nothing,
    Raw(u64),
    Image(u64),
    /// An image over a raw file that is half as long.
    Two(u64),
}

/// Where files for QEMU are written, whatever they are.
pub fn directory() -> &'static Path {
    static DIRECTORY: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().unwrap());
    DIRECTORY.path()
}

/// The files behind an image.
#[derive(Default)]
pub struct Chain {
    /// Of the file right behind the image.
    pub name: String,
    pub format: &'static str,
    /// From the lowest up.
    files: Vec<Vec<u8>>,
}

impl Behind {
    /// Whether there is anything.
    pub fn exists(self) -> bool {
        self != Behind::Nothing
    }

    /// Size in sectors of the file right behind the image.
    pub fn sectors(self) -> u64 {
        match self {
            Behind::Nothing => 0,
            Behind::Raw(sectors) | Behind::Image(sectors) | Behind::Two(sectors) => sectors,
        }
    }

    /// What shows in a sector of an image that holds nothing there.
    pub fn content(self, sector: u64) -> Content {
        // Not all of it is data, and pieces of one kind are of odd lengths.
        let data = |version| if sector % 11 == 5 { Content::Zero } else { Content::Data { sector, version } };
        if sector >= self.sectors() {
            return Content::Zero;
        }
        match self {
            Behind::Nothing => Content::Zero,
            Behind::Raw(_) => data(FIRST),
            Behind::Image(_) if sector / 16 % 4 == 3 => Content::Zero,
            Behind::Image(_) => data(FIRST),
            Behind::Two(sectors) => match sector / 6 % 3 {
                0 => data(FIRST + 1),
                1 if sector % 6 >= 2 => Content::Zero,
                _ if sector < sectors / 2 => data(FIRST),
                _ => Content::Zero,
            },
        }
    }

    /// The same as bytes, of the first so many sectors.
    pub fn bytes(self, sectors: u64) -> Vec<u8> {
        (0..sectors).flat_map(|sector| bytes_of(self.content(sector))).collect()
    }

    /// The files; those that QEMU is to find are there from then on.
    pub fn chain(self) -> Option<Arc<Chain>> {
        static MADE: LazyLock<Mutex<HashMap<Behind, Arc<Chain>>>> = LazyLock::new(Mutex::default);
        let sectors = self.sectors();
        let mut made = MADE.lock();
        let chain = || match self {
            Behind::Nothing => unreachable!("nothing is behind the image"),
            Behind::Raw(_) => Chain::raw(format!("r{sectors}"), self.bytes(sectors)),
            Behind::Image(_) => Chain::default().image(format!("q{sectors}"), self, Behind::Nothing),
            Behind::Two(_) => {
                let lowest = Behind::Raw(sectors / 2);
                Chain::raw(format!("t{sectors}"), lowest.bytes(sectors / 2)).image(format!("u{sectors}"), self, lowest)
            }
        };
        self.exists().then(|| made.entry(self).or_insert_with(|| Arc::new(chain())).clone())
    }

    /// The file right behind an image, with all that is behind it, on devices that take so long, and must not be changed.
    pub async fn open(self, delay: Delay) -> Option<BackingFile<SimDevice>> {
        let chain = self.chain()?;
        let settings = Settings {
            delay,
            features: Features::default(),
            read_only: true,
            record: false,
            ..Settings::new(self.sectors())
        };
        let device = |bytes: &Vec<u8>| SimDevice::new(bytes.clone(), settings);
        let options = Options { read_only: true, ..Options::default() };
        Some(match (self, &chain.files[..]) {
            (Behind::Raw(_), [raw]) => BackingFile::Raw(device(raw)),
            (_, [image]) => BackingFile::Image(Box::new(Image::open(device(image), options).await.unwrap())),
            (_, [raw, image]) => {
                let raw = BackingFile::Raw(device(raw));
                let image = Image::open_with_backing(device(image), raw, options).await.unwrap();
                BackingFile::Image(Box::new(image))
            }
            _ => unreachable!("no chain has so many files"),
        })
    }
}

fn bytes_of(content: Content) -> Vec<u8> {
    let mut bytes = vec![0; SECTOR];
    if let Content::Data { sector, version } = content {
        content::fill(&mut bytes, sector, version);
    }
    bytes
}

impl Chain {
    fn raw(name: String, bytes: Vec<u8>) -> Chain {
        std::fs::write(directory().join(&name), &bytes).unwrap();
        Chain { name, format: "raw", files: vec![bytes] }
    }

    /// With an image on top, so that `shown` is to be seen where `lower` was.
    fn image(mut self, name: String, shown: Behind, lower: Behind) -> Chain {
        let size = shown.sectors() * SECTOR as u64;
        let path = directory().join(&name);
        let options = format!("cluster_size={CLUSTER}");
        let mut command = Command::new("qemu-img");
        command.args(["create", "-q", "-f", "qcow2", "-o", &options]);
        command.args(self.arguments());
        let output = command.arg(&path).arg(size.to_string()).output().expect("these tests need qemu-img");
        assert!(output.status.success(), "qemu-img create: {}", String::from_utf8_lossy(&output.stderr));
        let device = MemoryDevice::new(std::fs::read(&path).unwrap());
        block_on(async {
            let image = match self.files.first() {
                Some(raw) => {
                    let raw = BackingFile::Raw(MemoryDevice::new(raw.clone()));
                    Image::open_with_backing(device.clone(), raw, Options::default()).await.unwrap()
                }
                None => Image::open(device.clone(), Options::default()).await.unwrap(),
            };
            for sector in 0..shown.sectors() {
                let at = sector * SECTOR as u64;
                match shown.content(sector) {
                    same if same == lower.content(sector) => {}
                    Content::Zero => image.write_zeroes(at, SECTOR as u64, true).await.unwrap(),
                    other => image.write(at, IoBuf::new(&bytes_of(other))).await.unwrap(),
                }
            }
            image.close().await.unwrap();
        });
        let bytes = device.contents();
        std::fs::write(&path, &bytes).unwrap();
        self.files.push(bytes);
        Chain { name, format: "qcow2", files: self.files }
    }

    /// For qemu-img, to make an image over it.
    pub fn arguments(&self) -> Vec<&str> {
        if self.name.is_empty() { Vec::new() } else { vec!["-b", &self.name, "-F", self.format] }
    }
}
