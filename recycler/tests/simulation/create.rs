//! New images, judged by QEMU.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use qcow_recycler::Error;
use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::device::host::HostFile;
use qcow_recycler::device::{BlockDevice, Features};
use qcow_recycler::format::header::Header;
use qcow_recycler::image::{CreateOptions, create};

use crate::common::crash::Effort;
use crate::common::sim::{Fault, Settings, SimDevice};
use parking_lot::Mutex;
use rand::SeedableRng;
use rand::rngs::SmallRng;

const WIDTHS: [u32; 7] = [1, 2, 4, 8, 16, 32, 64];

fn make(path: &Path, options: &CreateOptions) {
    let _ = fs::remove_file(path);
    block_on(create(&HostFile::create(path).unwrap(), options)).unwrap();
}

fn header(path: &Path) -> Header {
    let bytes = fs::read(path).unwrap();
    Header::parse(&bytes, bytes.len() as u64).unwrap()
}

#[track_caller]
fn qemu(program: &str, args: &[&str], path: &Path) -> String {
    let out = Command::new(program).args(args).arg(path).output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{program} {args:?}: {text}{}", String::from_utf8_lossy(&out.stderr));
    text
}

#[track_caller]
fn check(path: &Path) {
    let text = qemu("qemu-img", &["check", "-f", "qcow2"], path);
    assert!(text.contains("No errors were found on the image."), "{text}");
}

/// The number or word after `"key":` in QEMU's JSON, where it is nested least: the image file has a size as well.
#[track_caller]
fn field<'a>(json: &'a str, key: &str) -> &'a str {
    let start = format!("\"{key}\": ");
    let lines = json.lines().filter(|line| line.trim_start().starts_with(&start));
    let line =
        lines.min_by_key(|line| line.len() - line.trim_start().len()).unwrap_or_else(|| panic!("{key} in {json}"));
    line.trim_start()[start.len()..].trim_end_matches(',').trim_matches('"')
}

#[track_caller]
fn judge(path: &Path, options: &CreateOptions) {
    check(path);
    let info = qemu("qemu-img", &["info", "--output=json", "-f", "qcow2"], path);
    assert_eq!(field(&info, "cluster-size"), options.cluster_size.to_string());
    assert_eq!(field(&info, "virtual-size"), options.virtual_size.to_string());
    assert_eq!(field(&info, "compat"), if options.version == 2 { "0.10" } else { "1.1" });
    if options.version == 3 {
        assert_eq!(field(&info, "refcount-bits"), options.refcount_bits.to_string());
        assert_eq!(field(&info, "lazy-refcounts"), options.lazy_refcounts.to_string());
    }
    let h = header(path);
    assert_eq!(h.virtual_size, options.virtual_size);
    assert_eq!(h.geometry.cluster_size(), options.cluster_size);
    assert_eq!((h.version, 1 << h.geometry.refcount_order), (options.version, options.refcount_bits));
    assert_eq!(h.unsupported_for_writing(), None);
}

/// A process that another test starts holds our open files, with their locks, from its fork to its exec. So tests that lock
/// images and then start QEMU on them take turns.
fn alone() -> std::sync::MutexGuard<'static, ()> {
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    TURN.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[test]
fn every_cluster_size_and_refcount_width_is_a_right_image() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    for bits in 9..=21 {
        for (n, width) in WIDTHS.into_iter().enumerate() {
            let options = CreateOptions {
                cluster_size: 1 << bits,
                refcount_bits: width,
                lazy_refcounts: n % 2 == 0,
                ..CreateOptions::new(5 << 20)
            };
            make(&path, &options);
            judge(&path, &options);
        }
        let options = CreateOptions { cluster_size: 1 << bits, version: 2, ..CreateOptions::new(5 << 20) };
        make(&path, &options);
        judge(&path, &options);
    }
}

#[test]
fn a_large_l1_table_has_refcount_blocks_enough() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    for (cluster_size, width) in [(512, 1), (512, 16), (512, 64), (1024, 64), (4096, 64)] {
        // The largest disk there is with 512-byte clusters: an L1 table of 32 MiB.
        let options = CreateOptions { cluster_size, refcount_bits: width, ..CreateOptions::new(128 << 30) };
        make(&path, &options);
        judge(&path, &options);
    }
    let h = header(&path);
    assert!(h.refcount_table_clusters >= 1);
}

#[test]
fn sizes_at_the_edges() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    for (size, cluster_size) in [(0, 65536), (512, 65536), (32768, 512), (32768 + 512, 512), (1 << 60, 2 << 20)] {
        let options = CreateOptions { cluster_size, ..CreateOptions::new(size) };
        make(&path, &options);
        judge(&path, &options);
    }
}

#[test]
fn qemu_writes_to_it_and_grows_it() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    for (cluster_size, refcount_bits) in [(512, 64), (65536, 16), (2 << 20, 1)] {
        make(&path, &CreateOptions { cluster_size, refcount_bits, ..CreateOptions::new(8 << 20) });
        qemu("qemu-io", &["-f", "qcow2", "-c", "write -P 7 1M 3M"], &path);
        let grown =
            Command::new("qemu-img").args(["resize", "-q", "-f", "qcow2"]).arg(&path).arg("1G").status().unwrap();
        assert!(grown.success());
        let text = qemu("qemu-io", &["-f", "qcow2", "-c", "read -P 7 1M 3M", "-c", "read -P 0 0 1M"], &path);
        assert!(!text.contains("failed"), "{text}");
        check(&path);
    }
}

#[test]
fn a_backing_file_is_recorded_and_read_through() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.qcow2");
    fs::write(dir.path().join("base"), vec![9; 1 << 20]).unwrap();
    for (version, cluster_size) in [(2, 512), (2, 65536), (3, 512), (3, 65536)] {
        let backing = Some(("base".to_owned(), "raw".to_owned()));
        let options = CreateOptions { backing, version, cluster_size, ..CreateOptions::new(1 << 20) };
        make(&path, &options);
        judge(&path, &options);
        let text = qemu("qemu-io", &["-f", "qcow2", "-c", "read -P 9 0 1M"], &path);
        assert!(!text.contains("failed"), "{text}");
        let h = header(&path);
        assert_eq!((h.backing_file.as_deref(), h.backing_format.as_deref()), (Some("base"), Some("raw")));
    }
    // The longest name reaches into the header's later sectors.
    let backing = Some(("n".repeat(1023), "qcow2".to_owned()));
    make(&path, &CreateOptions { backing: backing.clone(), ..CreateOptions::new(1 << 20) });
    assert_eq!(header(&path).backing_file, backing.map(|b| b.0));
}

#[test]
fn unusable_options_are_named_and_the_device_is_left_alone() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    fs::write(&path, b"precious").unwrap();
    let device = HostFile::open(&path, false).unwrap();
    let base = CreateOptions::new(1 << 30);
    let backing = |name: &str, format: &str| Some((name.to_owned(), format.to_owned()));
    let long = "x".repeat(1024);
    for (name, options) in [
        ("cluster_size", CreateOptions { cluster_size: 256, ..base.clone() }),
        ("cluster_size", CreateOptions { cluster_size: 4 << 20, ..base.clone() }),
        ("cluster_size", CreateOptions { cluster_size: 65537, ..base.clone() }),
        ("cluster_size", CreateOptions { cluster_size: 0, ..base.clone() }),
        ("refcount_bits", CreateOptions { refcount_bits: 0, ..base.clone() }),
        ("refcount_bits", CreateOptions { refcount_bits: 3, ..base.clone() }),
        ("refcount_bits", CreateOptions { refcount_bits: 128, ..base.clone() }),
        ("refcount_bits", CreateOptions { refcount_bits: 8, version: 2, ..base.clone() }),
        ("lazy_refcounts", CreateOptions { lazy_refcounts: true, version: 2, ..base.clone() }),
        ("version", CreateOptions { version: 1, ..base.clone() }),
        ("virtual_size", CreateOptions { virtual_size: 1000, ..base.clone() }),
        ("virtual_size", CreateOptions { virtual_size: !511, ..base.clone() }),
        ("virtual_size", CreateOptions { virtual_size: (128 << 30) + 512, cluster_size: 512, ..base.clone() }),
        ("backing", CreateOptions { backing: backing("", "raw"), ..base.clone() }),
        ("backing", CreateOptions { backing: backing("base", ""), ..base.clone() }),
        ("backing", CreateOptions { backing: backing(&long, "raw"), ..base.clone() }),
        ("backing", CreateOptions { backing: backing("base", "sixteen-letters!"), ..base.clone() }),
        ("backing", CreateOptions { backing: backing("a\0b", "raw"), ..base.clone() }),
        ("backing", CreateOptions { backing: backing(&long[..500], "raw"), cluster_size: 512, ..base.clone() }),
    ] {
        let e = block_on(create(&device, &options)).unwrap_err();
        assert_eq!(e.field(), Some(name), "{e}");
        assert!(matches!(e, Error::BadOption { .. }));
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }
}

/// A host file whose length is fixed, as a logical volume's.
struct Volume(HostFile);

impl BlockDevice for Volume {
    fn features(&self) -> Features {
        Features::default()
    }
    async fn length(&self) -> io::Result<u64> {
        self.0.length().await
    }
    async fn read(&self, offset: u64, buf: IoBufMut<'_>) -> io::Result<()> {
        self.0.read(offset, buf).await
    }
    async fn write(&self, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
        assert!(offset + buf.len() as u64 <= self.0.length().await?, "written past the end");
        self.0.write(offset, buf).await
    }
    async fn flush(&self) -> io::Result<()> {
        self.0.flush().await
    }
}

#[test]
fn whatever_was_on_a_device_of_fixed_length_is_gone() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    for cluster_size in [512, 65536, 2 << 20] {
        fs::write(&path, vec![0xff; 9 << 20]).unwrap();
        let options = CreateOptions { cluster_size, ..CreateOptions::new(1 << 30) };
        block_on(create(&Volume(HostFile::open(&path, false).unwrap()), &options)).unwrap();
        judge(&path, &options);
        assert_eq!(fs::metadata(&path).unwrap().len(), 9 << 20);
    }
    fs::write(&path, vec![0xff; 100_000]).unwrap();
    let e = block_on(create(&Volume(HostFile::open(&path, false).unwrap()), &CreateOptions::new(1 << 30))).unwrap_err();
    assert!(matches!(e, Error::Unsupported { .. }), "{e}");
    assert!(fs::read(&path).unwrap().iter().all(|&b| b == 0xff));
}

#[test]
fn an_older_longer_file_is_replaced() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    fs::write(&path, vec![0xff; 3 << 20]).unwrap();
    let options = CreateOptions::new(1 << 30);
    block_on(create(&HostFile::open(&path, false).unwrap(), &options)).unwrap();
    judge(&path, &options);
    assert_eq!(fs::metadata(&path).unwrap().len(), 4 * 65536);
}

/// Creates an image on a device that holds `old`, with the power cut at every instant: what is left opens as what was
/// there before, or as the whole new image, or not at all.
fn cut_power(old: &[u8], options: &CreateOptions, resize: bool) {
    let settings = Settings { features: Features { resize, ..Features::default() }, ..Settings::new(7) };
    let device = SimDevice::new(old.to_vec(), settings);
    let survivors = Arc::new(Mutex::new(Vec::new()));
    let collect = survivors.clone();
    device.observe(move |device, event| {
        let epoch = device.epoch(event);
        let effort = Effort { exhaustive: 8, random: 30, singles: 40 };
        for selection in epoch.selections(effort, &mut SmallRng::seed_from_u64(epoch.generation)).1 {
            let image = epoch.image(&selection);
            if Header::parse(&image, image.len() as u64).is_ok() {
                collect.lock().push((image, event.to_owned()));
            }
        }
    });
    block_on(create(&device, options)).unwrap();
    device.ignore();
    assert_eq!(device.violations(), Vec::<String>::new());
    assert_eq!(device.uncertain(), 0, "something was not flushed");
    let new = device.contents();
    assert!(Header::parse(&new, new.len() as u64).is_ok());
    let survivors = survivors.lock();
    for (image, event) in survivors.iter() {
        assert!(image == old || *image == new, "neither the old image nor the new one after: {event}");
    }
    assert!(survivors.iter().any(|(image, _)| *image == new));
}

#[test]
fn a_power_cut_leaves_the_old_image_or_the_new_one_or_none() {
    let _alone = alone();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a");
    make(&path, &CreateOptions { cluster_size: 4096, refcount_bits: 1, ..CreateOptions::new(64 << 20) });
    qemu("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 256k"], &path);
    let old = fs::read(&path).unwrap();
    let backing = Some(("n".repeat(1023), "raw".to_owned()));
    for options in [
        CreateOptions { cluster_size: 512, refcount_bits: 64, ..CreateOptions::new(1 << 20) },
        CreateOptions { cluster_size: 4096, backing, ..CreateOptions::new(16 << 20) },
        CreateOptions { version: 2, ..CreateOptions::new(1 << 30) },
    ] {
        cut_power(&[], &options, true);
        cut_power(&old, &options, true);
        cut_power(&[&old[..], &[0xff; 65536]].concat(), &options, false);
    }
}

#[test]
fn every_failed_call_is_reported_and_the_next_attempt_makes_an_image() {
    let options = CreateOptions { cluster_size: 4096, ..CreateOptions::new(64 << 20) };
    let settings = Settings::new(7);
    for after in 0.. {
        let device = SimDevice::new(Vec::new(), settings);
        device.arm(Fault { after, errno: libc::EIO, lasting: false, only: None });
        let result = block_on(create(&device, &options));
        if device.disarm().is_empty() {
            assert!(after > 5 && result.is_ok());
            break;
        }
        assert_eq!(result.unwrap_err().errno(), libc::EIO);
        block_on(create(&device, &options)).unwrap();
        let image = device.contents();
        assert!(Header::parse(&image, image.len() as u64).is_ok());
    }
}
