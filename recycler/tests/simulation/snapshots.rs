//! Internal snapshots: the clusters that they use move, and they come and go while guests work.

use std::path::Path;
use std::process::Command;

use crate::common::memory::MemoryDevice;
use crate::common::snapshots::{self, Anatomy};
use crate::common::verify::{self, Tolerance};
use qcow_recycler::buf::IoBufMut;
use qcow_recycler::recycler::compact;
use qcow_recycler::{Image, Options};

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().expect("these tests need QEMU's tools");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}{}", String::from_utf8_lossy(&output.stdout));
}

/// An image that qemu-img made and qemu-io wrote to; a command `+name` makes a snapshot, `-name` deletes it.
fn by_qemu(size: &str, options: &str, commands: &[&str]) -> Vec<u8> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.qcow2");
    let name = path.to_str().unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, name, size]);
    for command in commands {
        match command.split_at(1) {
            ("+", snapshot) => run("qemu-img", &["snapshot", "-c", snapshot, name]),
            ("-", snapshot) => run("qemu-img", &["snapshot", "-d", snapshot, name]),
            _ => run("qemu-io", &["-d", "unmap", "-f", "qcow2", "-c", command, name]),
        }
    }
    read(&path)
}

fn read(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    verify::in_paused_time(future).unwrap()
}

async fn open(device: &MemoryDevice) -> Image<MemoryDevice> {
    let options = Options { runtime_asserts: true, ..Options::default() };
    Image::open(device.clone(), options).await.unwrap()
}

async fn expect(image: &Image<MemoryDevice>, offset: u64, length: usize, byte: u8) {
    let mut bytes = vec![!byte; length];
    image.read(offset, IoBufMut::new(&mut bytes)).await.unwrap();
    assert!(bytes.iter().all(|&b| b == byte), "at {offset:#x}: not all {byte:#x}");
}

/// The file is as short as it can be, and all is well with it.
fn assert_packed(file: &[u8], cluster_size: u64) {
    verify::our_check(file, Tolerance::Clean).unwrap();
    verify::qemu_check(file, Tolerance::Clean).unwrap();
    assert_eq!(file.len() as u64, Anatomy::of(file).unwrap().used() * cluster_size, "length, and the bound for it");
}

/// Everything of a snapshot moves: data that it shares and data that it has alone, its L2 tables, its L1 table, the
/// snapshot table; VM state, too.
#[test]
fn what_snapshots_use_moves_until_the_file_is_as_short_as_can_be() {
    for (cluster_size, refcount_bits, compat) in
        [(512, 16, "1.1"), (4096, 16, "0.10"), (4096, 2, "1.1"), (65536, 64, "1.1")]
    {
        let c = cluster_size;
        let write = |pattern: u8, first: u64, count: u64| format!("write -P {pattern} {} {}", first * c, count * c);
        let options = if compat == "1.1" {
            format!("cluster_size={c},refcount_bits={refcount_bits},compat={compat}")
        } else {
            format!("cluster_size={c},compat={compat}")
        };
        let state = format!("write -b -P 77 0 {}", 4 * c);
        // What is written first becomes holes when the first snapshot goes, with everything else above them.
        let image = by_qemu(
            &format!("{}", 1000 * c),
            &options,
            &[
                &write(1, 700, 220),
                "+holes",
                &format!("discard {} {}", 700 * c, 220 * c),
                &write(2, 0, 60),
                &state,
                "+first",
                &write(3, 10, 10),
                &write(4, 300, 30),
                "+second",
                &write(5, 15, 10),
                "-holes",
            ],
        );
        let before = snapshots::all(&image).unwrap();
        assert_eq!(before.len(), 2);
        let device = MemoryDevice::new(image);
        block_on(async {
            let image = open(&device).await;
            compact(&image, &mut |_| true).await.unwrap();
            assert_eq!(image.stats().background_errors, 0);
            assert!(image.stats().moved_bytes > 60 * c, "{:?}", image.stats());
            assert!(image.check().await.unwrap().is_clean());
            expect(&image, 0, 10 * c as usize, 2).await;
            expect(&image, 10 * c, 5 * c as usize, 3).await;
            expect(&image, 15 * c, 10 * c as usize, 5).await;
            expect(&image, 300 * c, 30 * c as usize, 4).await;
            image.close().await.unwrap();
        });
        assert_packed(&device.contents(), c);
        assert_eq!(snapshots::all(&device.contents()).unwrap(), before);
    }
}

/// Compactions take turns batch by batch: what one has moved, another that planned it earlier must not move again.
#[test]
fn two_compactions_at_once_move_what_snapshots_use_once() {
    let commands = [
        "write -P 1 700k 220k",
        "+holes",
        "discard 700k 220k",
        "write -P 2 0 60k",
        "+first",
        "write -P 3 10k 10k",
        "-holes",
    ];
    let image = by_qemu("1000k", "cluster_size=1k", &commands);
    let before = snapshots::all(&image).unwrap();
    let device = MemoryDevice::new(image);
    block_on(async {
        let image = open(&device).await;
        let (mut first, mut second) = (|_| true, |_| true);
        let (a, b) = tokio::join!(compact(&image, &mut first), compact(&image, &mut second));
        a.unwrap();
        b.unwrap();
        assert_eq!(image.stats().background_errors, 0);
        assert!(image.check().await.unwrap().is_clean());
        image.close().await.unwrap();
    });
    assert_packed(&device.contents(), 1024);
    assert_eq!(snapshots::all(&device.contents()).unwrap(), before);
}
