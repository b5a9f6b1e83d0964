//! Mounts a filesystem of one file that loses what was not flushed when its power is cut.
//!
//! ```text
//! qcow-lossy MOUNTPOINT [--lie]
//! ```
//!
//! The file is `MOUNTPOINT/disk`. Whoever runs this sends one command a line on standard input, and gets one line back:
//!
//! ```text
//! load PATH          the file holds what PATH holds, durably; the power is on     loaded
//! cut                the power is off: every call fails with EIO                  cut CHANGES-IN-DOUBT
//! image SEED PATH    writes to PATH what the cut leaves; any number of times      image CHANGES-LOST
//! ```
//!
//! At the end of the input the filesystem is unmounted. With `--lie`, flushes report success and make nothing durable: a
//! test that finds nothing wrong after that is blind.

mod store;

use std::ffi::OsStr;
use std::io::{self, BufRead, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Config, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, Request, WriteFlags,
};
use parking_lot::Mutex;
use store::Store;

const NAME: &str = "disk";
const FILE: INodeNo = INodeNo(2);
/// The length changes behind the kernel's back when another file is loaded.
const TTL: Duration = Duration::ZERO;
/// Requests are served by so many threads, so that others go on while a flush takes its time.
const THREADS: usize = 4;

#[derive(Clone)]
struct Disk {
    store: Arc<Mutex<Store>>,
    lie: bool,
    flushes: Arc<AtomicU64>,
}

impl Disk {
    /// Runs one request, if the power is on.
    fn powered<T>(&self, request: impl FnOnce(&mut Store) -> T) -> Result<T, Errno> {
        let mut store = self.store.lock();
        if store.off { Err(Errno::EIO) } else { Ok(request(&mut store)) }
    }

    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let file = ino == FILE;
        let size = if file { self.store.lock().length() } else { 0 };
        FileAttr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if file { FileType::RegularFile } else { FileType::Directory },
            perm: if file { 0o600 } else { 0o700 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    fn flush_to_medium(&self) -> Result<(), Errno> {
        let covered = self.powered(|store| store.so_far())?;
        // What is written meanwhile is not covered: some flushes take long enough for that to happen.
        let number = self.flushes.fetch_add(1, Ordering::Relaxed);
        if number.is_multiple_of(3) {
            std::thread::sleep(Duration::from_micros(number.wrapping_mul(7919) % 3000));
        }
        self.powered(|store| {
            if !self.lie {
                store.settle(covered);
            }
        })
    }
}

fn empty(reply: ReplyEmpty, result: Result<(), Errno>) {
    match result {
        Ok(()) => reply.ok(),
        Err(e) => reply.error(e),
    }
}

impl Filesystem for Disk {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == INodeNo::ROOT && name == NAME {
            reply.entry(&TTL, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(ino));
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        _mode: Option<u32>,
        _uid: Option<u32>,
        _gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<fuser::TimeOrNow>,
        _mtime: Option<fuser::TimeOrNow>,
        _ctime: Option<std::time::SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<std::time::SystemTime>,
        _chgtime: Option<std::time::SystemTime>,
        _bkuptime: Option<std::time::SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let result = self.powered(|store| {
            if let Some(size) = size {
                store.set_length(size);
            }
        });
        match result {
            Ok(()) => reply.attr(&TTL, &self.attributes(ino)),
            Err(e) => reply.error(e),
        }
    }

    fn readdir(&self, _: &Request, _ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        if offset == 0 {
            let _ = reply.add(FILE, 1, FileType::RegularFile, NAME);
        }
        reply.ok();
    }

    fn open(&self, _: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // No page cache of the kernel's in between: this is the cache, and decides what is lost.
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);
    }

    fn read(
        &self,
        _: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.powered(|store| store.read(offset, size as usize).to_vec()) {
            Ok(bytes) => reply.data(&bytes),
            Err(e) => reply.error(e),
        }
    }

    fn write(
        &self,
        _: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        match self.powered(|store| store.write(offset, data)) {
            Ok(()) => reply.written(data.len() as u32),
            Err(e) => reply.error(e),
        }
    }

    /// A file descriptor is closed, which makes nothing durable.
    fn flush(&self, _: &Request, _ino: INodeNo, _fh: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsync(&self, _: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        empty(reply, self.flush_to_medium());
    }

    fn fallocate(
        &self,
        _: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let zeroes = mode & (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE) != 0;
        if !zeroes || mode & libc::FALLOC_FL_KEEP_SIZE == 0 {
            return reply.error(Errno::EOPNOTSUPP);
        }
        empty(reply, self.powered(|store| store.zero(offset, length)));
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _ino_in: INodeNo,
        _fh_in: FileHandle,
        offset_in: u64,
        _ino_out: INodeNo,
        _fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let copied = self.powered(|store| {
            let bytes = store.read(offset_in, len.min(1 << 20) as usize).to_vec();
            store.write(offset_out, &bytes);
            bytes.len() as u32
        });
        match copied {
            Ok(count) => reply.written(count),
            Err(e) => reply.error(e),
        }
    }
}

/// Carries out one command; what to answer.
fn obey(command: &str, store: &Mutex<Store>) -> io::Result<String> {
    let words: Vec<&str> = command.splitn(3, ' ').collect();
    match words[..] {
        ["load", path] => {
            *store.lock() = Store::holding(std::fs::read(path)?);
            Ok("loaded".to_owned())
        }
        ["cut"] => {
            let mut store = store.lock();
            store.off = true;
            Ok(format!("cut {}", store.uncertain()))
        }
        ["image", seed, path] => {
            let seed = seed.parse().map_err(io::Error::other)?;
            let (file, lost) = store.lock().after_cut(seed);
            std::fs::write(path, file)?;
            Ok(format!("image {lost}"))
        }
        _ => Err(io::Error::other(format!("no such command: {command}"))),
    }
}

fn serve(mountpoint: &Path, lie: bool) -> io::Result<()> {
    let store = Arc::new(Mutex::new(Store::default()));
    let disk = Disk { store: store.clone(), lie, flushes: Arc::default() };
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("qcow-lossy".to_owned()), MountOption::NoAtime];
    config.n_threads = Some(THREADS);
    let session = fuser::spawn_mount(disk, mountpoint, &config)?;
    let mut out = io::stdout();
    writeln!(out, "mounted")?;
    out.flush()?;
    for line in io::stdin().lock().lines() {
        writeln!(out, "{}", obey(line?.trim_end(), &store)?)?;
        out.flush()?;
    }
    session.umount_and_join()
}

fn main() -> std::process::ExitCode {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let (mountpoint, lie) = match &arguments[..] {
        [mountpoint] => (mountpoint, false),
        [mountpoint, flag] if flag == Path::new("--lie") => (mountpoint, true),
        _ => {
            eprintln!("usage: qcow-lossy MOUNTPOINT [--lie]");
            return 2.into();
        }
    };
    match serve(mountpoint, lie) {
        Ok(()) => 0.into(),
        Err(e) => {
            eprintln!("{}: {e}", mountpoint.display());
            1.into()
        }
    }
}
