//! Where images lie, and the images.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use bench_work::offsets::Offsets;
use bench_work::protocol::{Kind, Opening, Work};

use crate::contender::{Contender, Process};
use crate::qemu;

pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;

/// A directory of our own, removed at the end.
pub struct Place {
    /// "tmpfs", "ext4" and so on.
    pub name: String,
    directory: PathBuf,
}

impl Place {
    pub fn new(parent: &Path) -> Result<Self> {
        fs::create_dir_all(parent)?;
        let directory = parent.join(format!("qcr-bench-{}", std::process::id()));
        fs::create_dir(&directory).with_context(|| directory.display().to_string())?;
        let named = qemu::run(Command::new("stat").args(["-f", "-c", "%T"]).arg(&directory))?;
        let name = match String::from_utf8_lossy(&named.stdout).trim() {
            "ext2/ext3" => "ext4".to_owned(),
            name => name.to_owned(),
        };
        Ok(Self { name, directory })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// The file of a contender.
    pub fn of(&self, contender: Contender, name: &str) -> PathBuf {
        self.path(&format!("{name}-{}", contender.slug()))
    }

    /// Removes all files, for the next row.
    pub fn clear(&self) -> Result<()> {
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            if path.is_file() {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

pub fn opening(path: &Path) -> Opening {
    Opening { path: path.to_string_lossy().into_owned(), threads: 1, direct: false, config: String::new() }
}

/// A copy with the same holes.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    qemu::run(Command::new("cp").args(["--sparse=always", "--reflink=never"]).arg(from).arg(to)).map(drop)
}

/// The same, written in blocks of 4 KiB. What is written in longer pieces is cached in larger ones, of sizes that depend on how
/// memory is divided just then; and a write to part of a large one takes several times as long, on some filesystems.
fn copy_in_blocks(from: &Path, to: &Path) -> Result<()> {
    let mut dd = Command::new("dd");
    dd.args(["bs=4k", "conv=sparse", "status=none"]);
    qemu::run(dd.arg(format!("if={}", from.display())).arg(format!("of={}", to.display()))).map(drop)
}

/// Makes a file durable, and drops what of it is in the page cache.
pub fn drop_from_cache(file: &Path) -> Result<()> {
    let mut dd = Command::new("dd");
    dd.args(["oflag=nocache", "conv=notrunc,fdatasync", "count=0", "status=none"]);
    qemu::run(dd.arg(format!("of={}", file.display()))).map(drop)
}

pub fn sparse(path: &Path, length: u64) -> Result<()> {
    Ok(File::create(path)?.set_len(length)?)
}

/// What of a file has been written; the rest is a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resident {
    Nothing,
    /// One block in each stretch: random work is spread over a large disk, and the files of all contenders fit into
    /// memory at once. For tmpfs: filesystems on disks are slow to remove files of so many extents.
    Blocks,
    /// Those blocks that so many rounds of [`Shape::sample`] visit, each so many.
    Sample {
        rounds: u64,
        each: u64,
    },
    All,
}

/// The disk of a row, the same for each contender: how large, of what clusters, and what is in memory.
#[derive(Clone, Debug)]
pub struct Shape {
    pub size: u64,
    pub cluster: u64,
    /// Every cluster has its place in the file; otherwise none has.
    pub mapped: bool,
    pub resident: Resident,
}

/// Where in its stretch of the disk the block lies that random work reads and writes: not at the start of a cluster.
pub const WITHIN: u64 = 28 << 10;
pub const STRETCH: u64 = 64 << 10;

impl Shape {
    pub fn mapped(size: u64, cluster: u64, resident: Resident) -> Self {
        Self { size, cluster, mapped: true, resident }
    }

    pub fn empty(size: u64, cluster: u64) -> Self {
        Self { size, cluster, mapped: false, resident: Resident::Nothing }
    }

    pub fn stretches(&self) -> u64 {
        self.size / STRETCH
    }

    /// Blocks of random stretches, others in each round.
    pub fn sample(&self, round: u64) -> Offsets {
        Offsets::Random { units: self.stretches(), unit: STRETCH, within: WITHIN, seed: round }
    }

    /// What must be written to the disk to begin with.
    fn contents(&self) -> Vec<Work> {
        let stretches = self.stretches();
        match self.resident {
            Resident::Nothing => Vec::new(),
            Resident::Sample { rounds, each } => {
                (0..rounds).map(|round| Work::new(Kind::Write, 4096, self.sample(round), each)).collect()
            }
            Resident::Blocks => {
                let offsets = Offsets::Shuffled { units: stretches, unit: STRETCH, within: WITHIN, seed: 1, skip: 0 };
                vec![Work::new(Kind::Write, 4096, offsets, stretches)]
            }
            Resident::All => {
                let offsets = Offsets::Sequential { units: stretches, unit: STRETCH, skip: 0 };
                vec![Work::new(Kind::Write, STRETCH as usize, offsets, stretches)]
            }
        }
    }

    /// Makes a file for each contender: the raw disk for `Raw`, copies of one image for the others.
    pub fn make(&self, place: &Place, name: &str, contenders: &[Contender]) -> Result<()> {
        let base = place.path(&format!("{name}-base"));
        let allocation = if self.mapped { "metadata" } else { "off" };
        qemu::create(&base, self.size, &format!("cluster_size={},preallocation={allocation}", self.cluster))?;
        let fill = |contender: Contender, path: &Path| -> Result<()> {
            let contents = self.contents();
            if contents.is_empty() {
                return Ok(());
            }
            let mut process = Process::open(contender, &opening(path))?;
            for work in &contents {
                process.run(work)?;
            }
            process.close()
        };
        fill(Contender::Library, &base)?;
        let copy = if self.resident == Resident::All { copy_in_blocks } else { copy };
        for &contender in contenders {
            let path = place.of(contender, name);
            if contender == Contender::Raw {
                // Copied as the images are.
                let written = place.path(&format!("{name}-written"));
                sparse(&written, self.size)?;
                fill(contender, &written)?;
                copy(&written, &path)?;
                fs::remove_file(written)?;
            } else {
                copy(&base, &path)?;
            }
        }
        Ok(fs::remove_file(base)?)
    }
}

/// How many bytes of the disk a file occupies.
pub fn occupied(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    Ok(fs::metadata(path)?.blocks() * 512)
}
