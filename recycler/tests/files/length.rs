//! The file is cut while guests need a longer one.

use std::io;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::device::Features;
use qcow_recycler::device::host::HostFile;
use qcow_recycler::image::create;
use qcow_recycler::recycler::compact;
use qcow_recycler::{BlockDevice, CreateOptions, Image, Options};
use tempfile::TempDir;
use tokio::sync::Semaphore;

const CLUSTER: u64 = 64 << 10;

/// A file that is made shorter only when that is allowed, once each time.
struct Gated {
    file: HostFile,
    cuts: Arc<Semaphore>,
    /// Whether the last step is made, and an error told.
    fails: AtomicBool,
}

impl BlockDevice for Gated {
    fn features(&self) -> Features {
        self.file.features()
    }

    async fn length(&self) -> io::Result<u64> {
        self.file.length().await
    }

    async fn read(&self, offset: u64, buf: IoBufMut<'_>) -> io::Result<()> {
        self.file.read(offset, buf).await
    }

    async fn write(&self, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
        self.file.write(offset, buf).await
    }

    async fn flush(&self) -> io::Result<()> {
        self.file.flush().await
    }

    async fn truncate(&self, length: u64) -> io::Result<()> {
        let cuts = length < self.file.length().await?;
        if cuts {
            self.cuts.acquire().await.unwrap().forget();
        }
        self.file.truncate(length).await?;
        if cuts && length < 2 << 20 && self.fails.swap(false, Ordering::Relaxed) {
            Err(io::Error::other("as told"))
        } else {
            Ok(())
        }
    }

    async fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.file.punch_hole(offset, length).await
    }
}

/// Lets everybody go on until nobody can.
async fn settle() {
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
}

/// A disk of which all was written and all but the first cluster discarded.
struct Disk {
    _dir: TempDir,
    path: PathBuf,
    image: Arc<Image<Gated>>,
}

impl Disk {
    async fn new(cuts: Arc<Semaphore>, fails: bool) -> Self {
        const CLUSTERS: u64 = 1500;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let device = Gated { file: HostFile::create(&path).unwrap(), cuts, fails: AtomicBool::new(fails) };
        create(&device, &CreateOptions::new(CLUSTERS * CLUSTER)).await.unwrap();
        let image = Arc::new(Image::open(device, Options::default()).await.unwrap());
        for c in 0..CLUSTERS {
            image.write(c * CLUSTER, IoBuf::new(&[c as u8 | 1; CLUSTER as usize])).await.unwrap();
        }
        image.discard(CLUSTER, (CLUSTERS - 1) * CLUSTER).await.unwrap();
        image.flush().await.unwrap();
        Disk { _dir: dir, path, image }
    }

    fn length(&self) -> u64 {
        std::fs::metadata(&self.path).unwrap().len()
    }

    /// Writes a part of a cluster that is not in the file.
    async fn write(&self) {
        self.image.write(9 * CLUSTER + 4096, IoBuf::new(&[99; 4096])).await.unwrap();
    }

    /// What was written is there and nothing else.
    async fn read(&self) {
        let mut cluster = vec![0; CLUSTER as usize];
        self.image.read(9 * CLUSTER, IoBufMut::new(&mut cluster)).await.unwrap();
        let written = |i: usize| if (4096..8192).contains(&i) { 99 } else { 0 };
        assert!(cluster.iter().enumerate().all(|(i, &byte)| byte == written(i)), "what was cut off shows");
    }

    /// The same, as QEMU sees it.
    async fn verify(self) {
        self.read().await;
        self.image.close().await.unwrap();
        drop(self.image);
        let qemu = |program: &str, args: &[&str]| {
            let out = Command::new(program).args(args).arg(&self.path).output().unwrap();
            assert!(out.status.success(), "{out:?}");
        };
        qemu("qemu-img", &["check"]);
        let reads = ["read -P 1 0 64k", "read -P 0 64k 516k", "read -P 99 580k 4k", "read -P 0 584k 93m"];
        qemu("qemu-io", &reads.map(|read| ["-c", read]).concat());
    }
}

#[tokio::test]
async fn a_guest_that_needs_a_longer_file_waits_for_one_step_of_its_truncation() {
    let cuts = Arc::new(Semaphore::new(0));
    let disk = Arc::new(Disk::new(cuts.clone(), false).await);
    let before = disk.length();
    let compaction = tokio::spawn({
        let disk = disk.clone();
        async move { compact(&disk.image, &mut |_| true).await }
    });
    while cuts.available_permits() == 0 && disk.length() == before {
        // It has come to the first cut, which takes what is added here.
        cuts.add_permits(1);
        settle().await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(disk.length() > before / 2 && !compaction.is_finished(), "{}", disk.length());

    // The clusters ahead of the guests were at the end of the file, so there is none for these.
    let write = tokio::spawn({
        let disk = disk.clone();
        async move { disk.write().await }
    });
    let mut steps = 0;
    settle().await;
    while !write.is_finished() {
        cuts.add_permits(1);
        steps += 1;
        settle().await;
    }
    write.await.unwrap();
    assert!(steps <= 2 && disk.length() > before / 2, "{steps} steps, and the file has {} bytes", disk.length());
    disk.image.flush().await.unwrap();

    cuts.add_permits(10_000);
    compaction.await.unwrap().unwrap();
    // What the compaction found free is cut off, and what the guest took since is not.
    assert!(disk.length() < 8 << 20, "{}", disk.length());
    Arc::into_inner(disk).unwrap().verify().await;
}

// No time passes, so each step is twice as large as the one before, and the last one many MiB.
#[tokio::test(start_paused = true)]
async fn a_truncation_that_failed_may_have_been_made() {
    let disk = Disk::new(Arc::new(Semaphore::new(10_000)), true).await;
    compact(&disk.image, &mut |_| true).await.unwrap_err();
    disk.write().await;
    disk.read().await;
    disk.image.flush().await.unwrap();
    disk.verify().await;
}
