//! The host-file device: transfers, space, and locks against real QEMU processes.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::{IoBuf, IoBufMut, IoVec};
use qcow_recycler::device::host::HostFile;
use qcow_recycler::device::lock::LockMode;
use qcow_recycler::{BlockDevice, Error};
use tempfile::TempDir;

fn new_file() -> (TempDir, PathBuf, HostFile) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let file = HostFile::create(&path).unwrap();
    (dir, path, file)
}

fn new_image() -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg("64M").status().unwrap();
    assert!(made.success());
    (dir, path)
}

fn areas(pieces: &mut [Vec<u8>]) -> Vec<IoVec> {
    pieces.iter_mut().map(|p| IoVec { iov_base: p.as_mut_ptr().cast(), iov_len: p.len() }).collect()
}

/// Opens an image whose locks have just been given up. A process that another test is starting may hold duplicates of
/// our descriptors, and with them the locks, until it executes its program.
#[track_caller]
fn open_freed(path: &Path, read_only: bool) -> HostFile {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match HostFile::open(path, read_only) {
            Err(Error::Locked { .. }) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
            other => return other.unwrap(),
        }
    }
}

#[test]
fn what_is_written_is_read_whatever_the_areas() {
    let (_dir, path, file) = new_file();
    block_on(file.truncate(1 << 20)).unwrap();
    for count in [1usize, 2, 127, 128, 129, 1024, 3000] {
        let mut source: Vec<Vec<u8>> = (0..count).map(|i| vec![i as u8; 1 + i % 5]).collect();
        let total: usize = source.iter().map(Vec::len).sum();
        let all = source.concat();
        let list = areas(&mut source);
        // SAFETY: `source` outlives the buffer and is not touched meanwhile.
        block_on(file.write(777, unsafe { IoBuf::from_iovecs(&list) })).unwrap();
        assert_eq!(fs::read(&path).unwrap()[777..777 + total], all);

        let mut target: Vec<Vec<u8>> = source.iter().map(|s| vec![0; s.len()]).collect();
        let list = areas(&mut target);
        // SAFETY: as above.
        block_on(file.read(777, unsafe { IoBufMut::from_iovecs(&list) })).unwrap();
        assert_eq!(target, source);
    }
    block_on(file.flush()).unwrap();
}

#[test]
fn reading_past_the_end_is_an_error_even_when_some_bytes_are_there() {
    let (_dir, _path, file) = new_file();
    block_on(file.truncate(1000)).unwrap();
    let mut buf = [0; 512];
    for offset in [600, 1000, 1 << 40] {
        let e = block_on(file.read(offset, IoBufMut::new(&mut buf))).unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::UnexpectedEof);
    }
    let e = block_on(file.read(u64::MAX, IoBufMut::new(&mut buf))).unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::InvalidInput);
    assert!(block_on(file.write(i64::MAX as u64, IoBuf::new(&buf))).is_err());
    block_on(file.read(u64::MAX, IoBufMut::new(&mut []))).unwrap();
}

/// Where files are on a disk. `QCR_DISK` names another place, such as a file system on a device with sectors of 4096 bytes.
fn on_disk() -> PathBuf {
    std::env::var_os("QCR_DISK").unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into()).into()
}

/// A file on a disk, whose file system has direct transfers as a rule; `None` if this one has not.
fn direct_file() -> Option<(TempDir, PathBuf, HostFile)> {
    let dir = tempfile::tempdir_in(on_disk()).unwrap();
    let path = dir.path().join("disk");
    match HostFile::create(&path).unwrap().into_direct() {
        Err(Error::Unsupported { what }) => {
            println!("not tested: {what}");
            None
        }
        file => Some((dir, path, file.unwrap())),
    }
}

#[test]
fn direct_transfers_of_any_alignment_move_what_they_should() {
    let Some((_dir, path, file)) = direct_file() else { return };
    println!("blocks of {} bytes", file.direct_block().unwrap());
    // Not a whole number of blocks, nor of sectors.
    let length = (3 << 20) + 700;
    let mut model = vec![0u8; length];
    block_on(file.truncate(length as u64)).unwrap();
    let mut memory = vec![0u8; (2 << 20) + 8192];
    let page = memory.as_ptr().align_offset(4096);
    let sizes = [1, 511, 512, 513, 4096, 8192, 65536, (1 << 20) + 512, (1 << 20) + 4096, 2 << 20];
    for (n, size) in sizes.into_iter().cycle().take(60).enumerate() {
        let at = [0, 512, 4096, 12_288 + 512, 1000, 1 << 20, length - size][n % 7];
        let skew = [0, 1, 512][n % 3];
        let buffer = &mut memory[page + skew..][..size];
        for (i, byte) in buffer.iter_mut().enumerate() {
            *byte = (i / 512 * 7 + n + i) as u8;
        }
        block_on(file.write(at as u64, IoBuf::new(buffer))).unwrap();
        model[at..at + size].copy_from_slice(buffer);
        let at = (at * 3 + 512 * n) % (length - size + 1);
        block_on(file.read(at as u64, IoBufMut::new(buffer))).unwrap();
        assert!(buffer == &model[at..at + size], "{size} bytes at {at}, memory off by {skew}");
    }
    block_on(file.flush()).unwrap();
    assert!(fs::read(&path).unwrap() == model, "and nothing was written beyond the end");
    // Several areas, the whole aligned or not.
    for cut in [512, 700] {
        let mut pieces = vec![vec![5u8; cut], vec![6u8; 8192 - cut]];
        let list = areas(&mut pieces);
        // SAFETY: `pieces` outlives the buffers and is not touched meanwhile.
        block_on(file.write(8192, unsafe { IoBuf::from_iovecs(&list) })).unwrap();
        pieces.iter_mut().for_each(|p| p.fill(0));
        // SAFETY: as above.
        block_on(file.read(8192, unsafe { IoBufMut::from_iovecs(&list) })).unwrap();
        assert!(pieces[0].iter().all(|&b| b == 5) && pieces[1].iter().all(|&b| b == 6));
    }
    let e = block_on(file.read(length as u64 - 100, IoBufMut::new(&mut [0; 512]))).unwrap_err();
    assert_eq!(e.kind(), io::ErrorKind::UnexpectedEof);
}

/// Threads write neighbouring sectors, which share a block where blocks are larger, in memory of every alignment.
#[test]
fn direct_writes_of_neighbours_do_not_undo_one_another() {
    const SECTORS: usize = 64;
    let Some((_dir, path, file)) = direct_file() else { return };
    block_on(file.truncate((SECTORS * 512) as u64)).unwrap();
    for round in 1..40u8 {
        std::thread::scope(|scope| {
            for t in 0..4 {
                let file = &file;
                scope.spawn(move || {
                    let bytes = vec![round; 5000];
                    for sector in (t..SECTORS).step_by(4) {
                        let at = (sector * 512) as u64;
                        block_on(file.write(at, IoBuf::new(&bytes[t..t + 512]))).unwrap();
                    }
                });
            }
        });
        assert!(fs::read(&path).unwrap().iter().all(|&b| b == round));
    }
}

#[test]
fn every_call_is_ready_at_its_first_poll() {
    use std::future::Future;
    use std::task::{Context, Poll, Waker};
    fn first<T>(future: impl Future<Output = T>) -> T {
        match std::pin::pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(value) => value,
            Poll::Pending => panic!("not ready"),
        }
    }
    let (_dir, _path, file) = new_file();
    first(file.truncate(8192)).unwrap();
    first(file.write(0, IoBuf::new(&[1; 512]))).unwrap();
    first(file.read(0, IoBufMut::new(&mut [0; 512]))).unwrap();
    first(file.flush()).unwrap();
    assert_eq!(first(file.length()).unwrap(), 8192);
}

#[test]
fn holes_zeroes_and_copies() {
    let (_dir, path, file) = new_file();
    let features = file.features();
    assert!(features.resize);
    let before = fs::metadata(&path).unwrap();
    assert_eq!((before.len(), before.blocks()), (0, 0), "the probe at open left something behind");
    let data: Vec<u8> = (0..1 << 20).map(|i| (i / 512 % 251) as u8).collect();
    block_on(file.write(0, IoBuf::new(&data))).unwrap();
    let mut expected = data.clone();

    // Where the file system lacks a call it must say so in the one way that the engine understands.
    let done = |result: io::Result<()>| match result {
        Ok(()) => true,
        Err(e) => {
            assert_eq!(e.kind(), io::ErrorKind::Unsupported, "{e}");
            false
        }
    };
    let punched = done(block_on(file.punch_hole(65536, 131_072)));
    assert_eq!(punched, features.punch_hole);
    if punched {
        expected[65536..65536 + 131_072].fill(0);
    }
    if done(block_on(file.write_zeroes(512 * 1024 + 512, 66_000))) {
        expected[512 * 1024 + 512..][..66_000].fill(0);
    }
    if done(block_on(file.copy_range(262_144 + 512, 786_432, 100_000))) {
        let source = expected[262_144 + 512..][..100_000].to_vec();
        expected[786_432..][..100_000].copy_from_slice(&source);
    }
    block_on(file.flush()).unwrap();
    assert!(fs::read(&path).unwrap() == expected);
    assert_eq!(block_on(file.length()).unwrap(), 1 << 20);

    // What comes back by growing is zero.
    block_on(file.truncate(1000)).unwrap();
    block_on(file.truncate(4096)).unwrap();
    assert!(fs::read(&path).unwrap()[1000..].iter().all(|&b| b == 0));
    assert_eq!(block_on(file.copy_range(0, 2048, 0)).map_err(|e| e.kind()), Ok(()));
    assert_eq!(
        block_on(file.copy_range(8192, 0, 512)).map_err(|e| e.kind()),
        Err(io::ErrorKind::Unsupported),
        "a copy from beyond the end must not look done"
    );
}

#[test]
fn only_files_and_block_devices_are_images() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    for path in [dir.path(), &fifo, Path::new("/dev/null")] {
        let e = HostFile::open(path, true).unwrap_err();
        assert!(matches!(e, Error::Unsupported { .. }), "{path:?}: {e}");
    }
    let e = HostFile::open(dir.path().join("none"), false).unwrap_err();
    assert_eq!(e.errno(), libc::ENOENT);
    fs::write(dir.path().join("there"), b"x").unwrap();
    assert_eq!(HostFile::create(dir.path().join("there")).unwrap_err().errno(), libc::EEXIST);
}

#[test]
fn a_read_only_file_offers_no_changes() {
    let (_dir, path) = new_image();
    let file = HostFile::open(&path, true).unwrap();
    assert_eq!(file.features(), qcow_recycler::device::Features::default());
    assert!(block_on(file.write(0, IoBuf::new(&[0; 512]))).is_err());
}

/// A process of QEMU that is ended with the test.
struct Qemu(Child);

impl Qemu {
    /// Starts it on an image and waits until it has its locks.
    #[track_caller]
    fn start(program: &str, args: &[&str], path: &Path) -> Qemu {
        let child = Command::new(program)
            .args(args)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut qemu = Qemu(child);
        let until = Instant::now() + Duration::from_secs(60);
        // Byte 203 is the last that it takes. We must not try to open the image ourselves meanwhile: that could refuse
        // it.
        while !qemu.has_locked("203 203") {
            assert!(qemu.0.try_wait().unwrap().is_none() && Instant::now() < until, "{program} did not start");
            std::thread::sleep(Duration::from_millis(20));
        }
        qemu
    }

    fn has_locked(&self, range: &str) -> bool {
        let descriptors = fs::read_dir(format!("/proc/{}/fdinfo", self.0.id())).into_iter().flatten().flatten();
        descriptors
            .filter_map(|d| fs::read_to_string(d.path()).ok())
            .any(|info| info.lines().any(|line| line.starts_with("lock:") && line.ends_with(range)))
    }

    /// The refusal that opening `path` meets.
    #[track_caller]
    fn refuses(&self, path: &Path, read_only: bool) -> String {
        match HostFile::open(path, read_only) {
            Err(Error::Locked { holder }) if holder.contains(&format!("process {}", self.0.id())) => holder,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn qemu_io(args: &[&str], path: &Path) -> Output {
    Command::new("qemu-io").args(args).args(["-c", "read 0 512"]).arg(path).output().unwrap()
}

#[track_caller]
fn assert_qemu_refused(output: &Output, lock: &str) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains(&format!("Failed to get {lock} lock")), "{text}");
}

#[test]
fn an_image_that_qemu_writes_is_locked_and_the_holder_named() {
    let (_dir, path) = new_image();
    let qemu = Qemu::start("qemu-io", &[], &path);
    let holder = qemu.refuses(&path, false);
    assert!(holder.contains("(qemu-io)") && holder.contains("does not share the \"write\" permission"), "{holder}");
    let holder = qemu.refuses(&path, true);
    assert!(holder.contains("(qemu-io)") && holder.contains("has the \"write\" permission"), "{holder}");
    // Somebody who takes the risk is not held up.
    HostFile::open_with(&path, false, LockMode::Off).unwrap();
    drop(qemu);
    open_freed(&path, false);
}

#[test]
fn an_image_that_qemu_nbd_serves_is_locked() {
    let (dir, path) = new_image();
    let socket = dir.path().join("socket");
    let qemu = Qemu::start("qemu-nbd", &["-f", "qcow2", "-k", socket.to_str().unwrap()], &path);
    assert!(qemu.refuses(&path, false).contains("(qemu-nbd)"));
}

#[test]
fn an_image_that_qemu_reads_can_be_read_but_not_written() {
    let (_dir, path) = new_image();
    let qemu = Qemu::start("qemu-io", &["-r"], &path);
    assert!(qemu.refuses(&path, false).contains("(qemu-io)"));
    HostFile::open(&path, true).unwrap();
}

#[test]
fn qemu_fails_on_an_image_that_we_write() {
    let (_dir, path) = new_image();
    let file = HostFile::open(&path, false).unwrap();
    assert_qemu_refused(&qemu_io(&[], &path), "\"write\"");
    assert_qemu_refused(&qemu_io(&["-r"], &path), "shared \"write\"");
    drop(file);
    drop(open_freed(&path, false));
    let until = Instant::now() + Duration::from_secs(10);
    while !qemu_io(&[], &path).status.success() {
        assert!(Instant::now() < until, "still locked");
    }
}

#[test]
fn qemu_can_read_but_not_write_an_image_that_we_read() {
    let (_dir, path) = new_image();
    let _file = HostFile::open(&path, true).unwrap();
    assert_qemu_refused(&qemu_io(&[], &path), "\"write\"");
    assert!(qemu_io(&["-r"], &path).status.success());
}

#[test]
fn two_writers_of_ours_conflict_and_two_readers_do_not() {
    let (_dir, path) = new_image();
    let writer = HostFile::open(&path, false).unwrap();
    for read_only in [false, true] {
        let e = HostFile::open(&path, read_only).unwrap_err();
        assert_eq!(e.errno(), libc::EAGAIN);
        assert!(e.to_string().contains(&format!("this process, process {}", std::process::id())), "{e}");
    }
    // Refused openers leave no locks behind that would disturb the holder, or others later.
    drop(writer);
    let _reader = open_freed(&path, true);
    HostFile::open(&path, true).unwrap();
    assert!(matches!(HostFile::open(&path, false), Err(Error::Locked { .. })));
}

#[test]
fn a_lock_on_the_whole_file_conflicts() {
    use std::os::fd::AsRawFd;
    let (_dir, path) = new_image();
    let other = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
    // As cloud-hypervisor does: one lock on everything.
    // SAFETY: plain numbers; the call reads the structure only.
    let result = unsafe {
        let mut lock: libc::flock64 = std::mem::zeroed();
        lock.l_type = libc::F_WRLCK as libc::c_short;
        libc::fcntl(other.as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock)
    };
    assert_eq!(result, 0);
    for read_only in [false, true] {
        let e = HostFile::open(&path, read_only).unwrap_err();
        assert!(e.to_string().contains("has locked it exclusively"), "{e}");
    }
    drop(other);
    open_freed(&path, false);
}
