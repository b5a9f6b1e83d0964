//! The asynchronous queue on files of the host: random requests against a model, with the recycler at work and QEMU as the
//! judge; sleeping, waking and ending.

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::slice::Slice;
use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::{Held, IoBuf, IoBufMut, IoVec};
use qcow_recycler::device::host::HostFile;
use qcow_recycler::queue::{Completion, Full, Queue, QueueOptions, Request, Transfers};
use qcow_recycler::{CreateOptions, Disk, Error, Options};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tempfile::TempDir;

const SECTOR: usize = 512;

/// Both ways of doing transfers: a machine whose kernel has no io_uring tests the second twice.
const WAYS: [Transfers; 2] = [Transfers::Auto, Transfers::Threads];

/// Where files are on a disk. `QCR_DISK` names another place, such as a file system on a device with sectors of 4096 bytes.
fn on_disk() -> std::path::PathBuf {
    std::env::var_os("QCR_DISK").unwrap_or_else(|| env!("CARGO_TARGET_TMPDIR").into()).into()
}

fn new_disk(size: u64, options: Options) -> (TempDir, std::path::PathBuf, Disk<HostFile>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.qcow2");
    let file = HostFile::create(&path).unwrap();
    block_on(qcow_recycler::image::create(&file, &CreateOptions::new(size))).unwrap();
    (dir, path, Disk::open(file, options).unwrap())
}

fn queue(disk: &Disk<HostFile>, depth: u32, transfers: Transfers) -> Queue<HostFile> {
    Queue::new(disk.image().clone(), QueueOptions { depth, transfers, ..QueueOptions::default() }).unwrap()
}

/// The memory of a request, kept by the test until its completion is there.
fn held(pieces: &mut [Vec<u8>]) -> Held {
    let areas: Vec<IoVec> =
        pieces.iter_mut().map(|p| IoVec { iov_base: p.as_mut_ptr().cast(), iov_len: p.len() }).collect();
    // SAFETY: every test keeps the pieces, and does not look at them, until the request has ended.
    unsafe { Held::new(&areas) }
}

fn reap(queue: &Queue<HostFile>, min: usize) -> Vec<Completion> {
    let mut all = Vec::new();
    queue.reap(min, usize::MAX, Some(Duration::from_secs(60)), |c| all.push(c));
    all
}

#[test]
fn requests_of_every_kind_end_once_with_their_own_data() {
    for way in WAYS {
        let (_dir, _path, disk) = new_disk(8 << 20, Options::default());
        let queue = queue(&disk, 16, way);
        let mut data = [vec![7u8; 65536], vec![8u8; 4096]];
        queue.submit(Request::Write { offset: 1 << 20, memory: held(&mut data) }, 1).unwrap();
        assert_eq!(reap(&queue, 1).len(), 1);
        let mut one = [vec![0u8; 4096]];
        let mut other = [vec![1u8; 1024], vec![1u8; 512]];
        let mut nothing = [vec![]];
        queue.submit(Request::Read { offset: (1 << 20) + 61440, memory: held(&mut one) }, 2).unwrap();
        queue.submit(Request::Read { offset: 4 << 20, memory: held(&mut other) }, 3).unwrap();
        queue.submit(Request::Flush, 4).unwrap();
        queue.submit(Request::Discard { offset: 2 << 20, length: 65536 }, 5).unwrap();
        queue.submit(Request::WriteZeroes { offset: 0, length: 512, may_unmap: false }, 6).unwrap();
        queue.submit(Request::Read { offset: 0, memory: held(&mut nothing) }, 7).unwrap();
        let mut ended: Vec<u64> = reap(&queue, 6)
            .into_iter()
            .map(|c| {
                c.result.unwrap();
                c.user_data
            })
            .collect();
        ended.sort_unstable();
        assert_eq!(ended, [2, 3, 4, 5, 6, 7]);
        assert_eq!((&one[0], &other[0], &other[1]), (&vec![7; 4096], &vec![0; 1024], &vec![0; 512]));
        assert_eq!((queue.pending(), reap(&queue, 1).len()), (0, 0), "there is nothing more to wait for");
        drop(queue);
        disk.close().unwrap();
    }
}

#[test]
fn a_bad_request_is_a_completion() {
    for way in WAYS {
        let (_dir, _path, disk) = new_disk(1 << 20, Options::default());
        let queue = queue(&disk, 8, way);
        let mut memory = [vec![0u8; 1024]];
        for (n, offset) in [(0, 1 << 20), (1, 256), (2, u64::MAX - 511)] {
            queue.submit(Request::Read { offset, memory: held(&mut memory) }, n).unwrap();
            queue.submit(Request::Discard { offset, length: 1024 }, n).unwrap();
        }
        let errors = reap(&queue, 6);
        assert_eq!(errors.len(), 6);
        for c in errors {
            let misaligned = c.user_data == 1;
            match c.result.unwrap_err() {
                Error::Misaligned { .. } if misaligned => {}
                Error::OutOfRange { .. } if !misaligned => {}
                other => panic!("{other}"),
            }
        }
        disk.close().unwrap();
        queue.submit(Request::Flush, 9).unwrap();
        queue.submit(Request::Write { offset: 0, memory: held(&mut memory) }, 9).unwrap();
        for c in reap(&queue, 2) {
            assert!(matches!(c.result, Err(Error::Closed)));
        }
    }
}

#[test]
fn a_full_queue_says_so_and_loses_nothing() {
    for way in WAYS {
        let (_dir, _path, disk) = new_disk(1 << 20, Options::default());
        let queue = queue(&disk, 4, way);
        for n in 0..4 {
            queue.submit(Request::WriteZeroes { offset: n * 4096, length: 4096, may_unmap: true }, n).unwrap();
        }
        assert_eq!(queue.submit(Request::Flush, 4), Err(Full));
        // Ended or not: the room is there when they are reaped.
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(queue.submit(Request::Flush, 4), Err(Full));
        assert_eq!(reap(&queue, 4).len(), 4);
        queue.submit(Request::Flush, 4).unwrap();
        assert_eq!(reap(&queue, 1).len(), 1);
        for depth in [0, u32::MAX] {
            let options = QueueOptions { depth, ..QueueOptions::default() };
            assert!(matches!(Queue::new(disk.image().clone(), options), Err(Error::BadOption { .. })));
        }
    }
}

/// A closing, a compaction and a resize on the thread that has submitted and not reaped.
#[test]
fn nobody_waits_for_a_program_that_does_not_reap() {
    for way in WAYS {
        let (_dir, _path, disk) = new_disk(8 << 20, Options::default());
        disk.write(0, IoBuf::new(&[1; 1 << 20])).unwrap();
        disk.discard(0, 1 << 19).unwrap();
        let queue = queue(&disk, 64, way);
        let mut memory: Vec<_> = (0..30).map(|_| [vec![3u8; 4096]]).collect();
        let mut parts = memory.chunks_mut(10);
        for step in 0..3u64 {
            for (n, memory) in parts.next().unwrap().iter_mut().enumerate() {
                let offset = (1 << 19) + n as u64 * 4096;
                queue.submit(Request::Write { offset, memory: held(memory) }, n as u64).unwrap();
                queue.submit(Request::Read { offset, memory: held(memory) }, n as u64).unwrap();
            }
            match step {
                0 => drop(disk.compact(|_| true).unwrap()),
                1 => disk.resize(4 << 20, true).unwrap(),
                _ => disk.close().unwrap(),
            }
        }
        let all = reap(&queue, 60);
        assert_eq!(all.len(), 60);
        // Those before the close have all been carried out, or found the image closed.
        for c in all {
            assert!(matches!(c.result, Ok(()) | Err(Error::Closed)), "{:?}", c.result);
        }
    }
}

/// Some of the kernel's completions are seen only by who asks it.
#[test]
fn a_program_that_never_sleeps_in_the_queue_gets_everything() {
    for (way, direct) in WAYS.into_iter().flat_map(|way| [(way, false), (way, true)]) {
        let dir = tempfile::tempdir_in(on_disk()).unwrap();
        let path = dir.path().join("disk.qcow2");
        block_on(qcow_recycler::image::create(&HostFile::create(&path).unwrap(), &CreateOptions::new(8 << 20)))
            .unwrap();
        let options = Options { direct, ..Options::default() };
        let disk = Disk::open(HostFile::open_for(&path, &options).unwrap(), options).unwrap();
        disk.write(0, IoBuf::new(&[1; 4 << 20])).unwrap();
        let queue = queue(&disk, 32, way);
        let mut memory: Vec<_> = (0..32).map(|_| [vec![5u8; 8192]]).collect();
        for min in [0, 1, 32] {
            for (n, memory) in memory.iter_mut().enumerate() {
                let request = (n as u64 * 65536, held(memory));
                let request = match n % 2 {
                    0 => Request::Write { offset: request.0, memory: request.1 },
                    _ => Request::Read { offset: request.0, memory: request.1 },
                };
                queue.submit(request, 0).unwrap();
            }
            let (mut got, deadline) = (0, Instant::now() + Duration::from_secs(60));
            while got < 32 {
                assert!(Instant::now() < deadline, "{got} of 32 by {way:?}, direct: {direct}, at least {min} wanted");
                got += queue.reap(min, usize::MAX, Some(Duration::ZERO), |c| c.result.unwrap());
            }
        }
        drop(queue);
        disk.close().unwrap();
    }
}

#[test]
fn a_queue_that_is_dropped_waits_for_what_was_submitted() {
    for way in WAYS {
        let (_dir, path, disk) = new_disk(8 << 20, Options::default());
        let mut memory: Vec<_> = (0..64).map(|n| [vec![n as u8; 4096]]).collect();
        for round in 0..2 {
            // The second time in place.
            let queue = queue(&disk, 64, way);
            for (n, memory) in memory.iter_mut().enumerate() {
                memory[0].fill(n as u8 + round);
                queue.submit(Request::Write { offset: n as u64 * 8192, memory: held(memory) }, 0).unwrap();
            }
            drop(queue);
            let mut back = vec![0; 4096];
            for (n, memory) in memory.iter().enumerate() {
                disk.read(n as u64 * 8192, IoBufMut::new(&mut back)).unwrap();
                assert_eq!(back, memory[0]);
            }
        }
        disk.close().unwrap();
        drop(disk);
        assert_clean(&path);
    }
}

fn is_readable(fd: impl AsRawFd, wait: Duration) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let until = Instant::now() + wait;
    loop {
        let left = until.saturating_duration_since(Instant::now()).as_millis() as libc::c_int;
        // SAFETY: one descriptor, as it says.
        let result = unsafe { libc::poll(&raw mut poll, 1, left) };
        if result >= 0 {
            return result > 0;
        }
    }
}

type Make = fn(&mut [Vec<u8>]) -> Request;

#[test]
fn the_event_is_written_for_those_who_sleep_on_it_only() {
    const SOON: Duration = Duration::from_secs(60);
    for way in WAYS {
        let (_dir, _path, disk) = new_disk(8 << 20, Options::default());
        disk.write(0, IoBuf::new(&[1; 1 << 20])).unwrap();
        let queue = queue(&disk, 16, way);
        let event = queue.event().unwrap();
        let mut memory = [vec![0u8; 4096]];
        let requests: [Make; 4] = [
            |m| Request::Read { offset: 4096, memory: held(m) },
            |m| Request::Read { offset: 4 << 20, memory: held(m) },
            |_| Request::Flush,
            |_| Request::Discard { offset: 1, length: 1 },
        ];
        for request in requests {
            // Nobody sleeps.
            queue.submit(request(&mut memory), 1).unwrap();
            queue.kick();
            std::thread::sleep(Duration::from_millis(20));
            assert!(!is_readable(event, Duration::ZERO));
            assert!(queue.arm().unwrap() > 0 || is_readable(event, SOON));
            assert_eq!(reap(&queue, 1).len(), 1);
            // Armed before and after something is under way.
            for arm_first in [true, false] {
                if arm_first {
                    assert_eq!(queue.arm().unwrap(), 0);
                }
                queue.submit(request(&mut memory), 2).unwrap();
                if arm_first || queue.arm().unwrap() == 0 {
                    assert!(is_readable(event, SOON), "{way:?}");
                }
                assert_eq!(reap(&queue, 1).len(), 1);
                assert!(!is_readable(event, Duration::ZERO), "taken back");
            }
        }
    }
}

#[test]
fn a_timeout_ends_the_waiting() {
    for way in WAYS {
        let (_dir, _path, disk) = new_disk(1 << 20, Options::default());
        let queue = queue(&disk, 4, way);
        // A flush that another thread's many flushes hold up, now and then; but it ends.
        for _ in 0..50 {
            queue.submit(Request::Flush, 1).unwrap();
            let mut count = queue.reap(1, 9, Some(Duration::ZERO), drop);
            while count == 0 {
                count = queue.reap(1, 9, Some(Duration::from_micros(50)), drop);
            }
            assert_eq!(count, 1);
        }
    }
}

/// There are as many as there is work for, however many there may be.
#[test]
fn any_number_of_threads_may_be_allowed() {
    for way in WAYS {
        let (_dir, _path, disk) = new_disk(8 << 20, Options::default());
        let options = QueueOptions { helpers: u32::MAX, transfers: way, ..QueueOptions::default() };
        let queue = Queue::new(disk.image().clone(), options).unwrap();
        let mut memory: Vec<_> = (0..16).map(|n| [vec![n as u8; 4096]]).collect();
        for (n, memory) in memory.iter_mut().enumerate() {
            queue.submit(Request::Write { offset: n as u64 * 65536, memory: held(memory) }, 0).unwrap();
            queue.submit(Request::Flush, 0).unwrap();
        }
        let all = reap(&queue, 32);
        assert_eq!(all.len(), 32);
        all.into_iter().for_each(|c| c.result.unwrap());
        let mut back = vec![0; 4096];
        for (n, memory) in memory.iter().enumerate() {
            disk.read(n as u64 * 65536, IoBufMut::new(&mut back)).unwrap();
            assert_eq!(back, memory[0]);
        }
    }
}

/// Has these system calls fail with `errno` on this thread, for as long as it lives.
fn refuse(calls: &[libc::c_long], errno: i32) {
    let line = |code: u32, jf, k| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    // The number of the call is what comes first.
    let mut program = vec![line(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0)];
    for call in calls {
        program.push(line(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, *call as u32));
        program.push(line(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO | errno as u32));
    }
    program.push(line(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW));
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: integers, and a program that outlives the call.
    unsafe {
        let (yes, no): (libc::c_ulong, libc::c_ulong) = (1, 0);
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, yes, no, no, no), 0);
        let mode = libc::c_ulong::from(libc::SECCOMP_MODE_FILTER);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const program), 0);
    }
}

/// The calls that start a thread.
const STARTING: [libc::c_long; 2] = [libc::SYS_clone, libc::SYS_clone3];

/// Does something on a thread that is gone afterwards.
fn on_thread(body: impl FnOnce() + Send) {
    std::thread::scope(|scope| scope.spawn(body).join().unwrap());
}

#[test]
fn who_sleeps_is_woken_for_what_the_kernel_did_not_take() {
    let (_dir, _path, disk) = new_disk(8 << 20, Options::default());
    disk.write(0, IoBuf::new(&[1; 1 << 20])).unwrap();
    let queue = queue(&disk, 16, Transfers::Auto);
    if !queue.uses_io_uring() {
        println!("not tested: the kernel has no io_uring for us");
        return;
    }
    let event = queue.event().unwrap();
    let errors = [libc::EAGAIN, libc::ENOMEM, libc::EBUSY];
    for (errno, arm_first) in errors.into_iter().flat_map(|errno| [(errno, true), (errno, false)]) {
        let mut memory = [vec![0u8; 4096]];
        let request = Request::Read { offset: 4096, memory: held(&mut memory) };
        on_thread(|| {
            refuse(&[libc::SYS_io_uring_enter], errno);
            assert!(!arm_first || queue.arm().unwrap() == 0);
            queue.submit(request, 1).unwrap();
            for _ in 0..2 {
                assert!(arm_first || queue.arm().unwrap() == 0);
                assert!(is_readable(event, Duration::ZERO), "nobody else hands it over");
                assert_eq!(queue.reap(0, 9, None, drop), 0);
                assert!(!is_readable(event, Duration::ZERO), "taken back");
                assert_eq!(queue.arm().unwrap(), 0);
            }
        });
        // The kernel takes it now.
        assert!(is_readable(event, Duration::ZERO));
        let all = reap(&queue, 1);
        assert_eq!(all.len(), 1);
        all.into_iter().for_each(|c| c.result.unwrap());
        assert_eq!(memory[0], [1; 4096]);
    }
    assert!(queue.uses_io_uring());
}

/// What has to wait cannot do so in the submitting call: others may be waiting for the queue.
#[test]
fn without_a_thread_requests_that_need_one_end_with_an_error() {
    for way in WAYS {
        let (_dir, _path, disk) = new_disk(8 << 20, Options::default());
        let queue = queue(&disk, 4, way);
        let event = queue.event().unwrap();
        let mut memory = [vec![7u8; 65536]];
        let write = Request::Write { offset: 0, memory: held(&mut memory) };
        on_thread(|| {
            refuse(&STARTING, libc::EAGAIN);
            assert_eq!(queue.arm().unwrap(), 0);
            queue.submit(write, 1).unwrap();
            assert!(is_readable(event, Duration::ZERO));
            queue.submit(Request::Flush, 2).unwrap();
            queue.submit(Request::Discard { offset: 0, length: 65536 }, 3).unwrap();
            queue.submit(Request::Flush, 4).unwrap();
            assert_eq!(queue.submit(Request::Flush, 5), Err(Full));
            let mut numbers = Vec::new();
            for c in reap(&queue, 4) {
                assert_eq!(c.result.unwrap_err().errno(), libc::EAGAIN);
                numbers.push(c.user_data);
            }
            assert_eq!(numbers, [1, 2, 3, 4]);
            assert_eq!(queue.pending(), 0);
        });
        let mut back = vec![1; 65536];
        disk.read(0, IoBufMut::new(&mut back)).unwrap();
        assert_eq!(back, [0; 65536], "nothing was done");
        queue.submit(Request::Write { offset: 0, memory: held(&mut memory) }, 6).unwrap();
        reap(&queue, 1).into_iter().for_each(|c| c.result.unwrap());
        disk.read(0, IoBufMut::new(&mut back)).unwrap();
        assert_eq!(back, memory[0], "threads can be had again");
    }
}

/// A transfer that the kernel does not do is not given up for want of a thread.
#[test]
fn a_ring_that_breaks_where_there_are_no_threads_loses_nothing() {
    let (_dir, _path, disk) = new_disk(8 << 20, Options::default());
    disk.write(0, IoBuf::new(&[1; 1 << 20])).unwrap();
    let queue = queue(&disk, 16, Transfers::Auto);
    let mut memory: Vec<_> = (0..8).map(|_| [vec![3u8; 4096]]).collect();
    let requests: Vec<_> = memory.iter_mut().enumerate().map(|(n, m)| (n as u64 * 4096, held(m))).collect();
    if !queue.uses_io_uring() {
        println!("not tested: the kernel has no io_uring for us");
        return;
    }
    on_thread(|| {
        refuse(&[libc::SYS_io_uring_enter], libc::EPERM);
        refuse(&STARTING, libc::EAGAIN);
        for (n, (offset, memory)) in requests.into_iter().enumerate() {
            let request = match n % 2 {
                0 => Request::Write { offset, memory },
                _ => Request::Read { offset, memory },
            };
            queue.submit(request, n as u64).unwrap();
        }
        let all = reap(&queue, 8);
        assert_eq!(all.len(), 8);
        all.into_iter().for_each(|c| c.result.unwrap());
        assert!(!queue.uses_io_uring());
    });
    let mut back = vec![0; 32768];
    disk.read(0, IoBufMut::new(&mut back)).unwrap();
    for (n, (back, memory)) in back.chunks(4096).zip(&memory).enumerate() {
        assert_eq!((back, memory[0].as_slice()), ([[3; 4096], [1; 4096]][n % 2].as_slice(), back));
    }
}

/// A process that another test is starting may hold a duplicate of a descriptor, and with it the locks, for a moment.
fn open(path: &Path) -> HostFile {
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        match HostFile::open(path, false) {
            Err(Error::Locked { .. }) if Instant::now() < until => std::thread::sleep(Duration::from_millis(5)),
            other => return other.unwrap(),
        }
    }
}

#[track_caller]
fn assert_clean(path: &Path) {
    drop(open(path));
    let check = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(path).output().unwrap();
    assert!(check.status.success(), "qemu-img check: {check:?}");
}

/// What QEMU reads.
fn seen_by_qemu(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("raw");
    let done =
        Command::new("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw"]).arg(path).arg(&raw).status().unwrap();
    assert!(done.success());
    std::fs::read(raw).unwrap()
}

/// One guest with a queue and a part of the disk of its own; sector by sector it knows what is there.
struct Guest {
    rng: SmallRng,
    first: usize,
    sectors: Vec<u32>,
    /// Those that a request under way reads or writes.
    busy: Vec<bool>,
    version: u32,
}

struct UnderWay {
    range: std::ops::Range<usize>,
    pieces: Vec<Vec<u8>>,
    /// What the sectors hold when it has ended; `None` for a read or a flush.
    after: Option<u32>,
    read: bool,
}

fn fill(sector: usize, version: u32) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    if version != 0 {
        for part in bytes.chunks_mut(16) {
            part[..8].copy_from_slice(&(sector as u64).to_le_bytes());
            part[8..12].copy_from_slice(&version.to_le_bytes());
        }
    }
    bytes
}

impl Guest {
    fn contents(&self, range: std::ops::Range<usize>) -> Vec<u8> {
        range.flat_map(|s| fill(self.first + s, self.sectors[s])).collect()
    }

    /// A range that no request under way touches, if chance finds one.
    fn range(&mut self) -> Option<std::ops::Range<usize>> {
        let length = 1 << self.rng.random_range(0..9);
        let start = self.rng.random_range(0..self.sectors.len());
        let range = start..(start + length).min(self.sectors.len());
        (!self.busy[range.clone()].contains(&true)).then_some(range)
    }

    /// In several areas, as guests have them.
    fn cut(&mut self, bytes: Vec<u8>) -> Vec<Vec<u8>> {
        let mut pieces = Vec::new();
        let mut rest = bytes;
        while self.rng.random_bool(0.3) && rest.len() > 1 {
            let at = self.rng.random_range(1..rest.len());
            let tail = rest.split_off(at);
            pieces.push(std::mem::replace(&mut rest, tail));
        }
        pieces.push(rest);
        pieces
    }

    fn next(&mut self) -> Option<(Request, UnderWay)> {
        let kind = self.rng.random_range(0..20);
        if kind == 0 {
            return Some((Request::Flush, UnderWay { range: 0..0, pieces: vec![], after: None, read: false }));
        }
        let range = self.range()?;
        let (offset, length) = (((self.first + range.start) * SECTOR) as u64, (range.len() * SECTOR) as u64);
        self.version += 1;
        let version = self.version;
        let (request, pieces, after, read) = match kind {
            1..8 => {
                let bytes = range.clone().flat_map(|s| fill(self.first + s, version)).collect();
                let mut pieces = self.cut(bytes);
                (Request::Write { offset, memory: held(&mut pieces) }, pieces, Some(version), false)
            }
            8..15 => {
                let mut pieces = self.cut(vec![0x5a; range.len() * SECTOR]);
                (Request::Read { offset, memory: held(&mut pieces) }, pieces, None, true)
            }
            15..18 => (Request::Discard { offset, length }, vec![], Some(0), false),
            _ => {
                let may_unmap = self.rng.random_bool(0.5);
                (Request::WriteZeroes { offset, length, may_unmap }, vec![], Some(0), false)
            }
        };
        self.busy[range.clone()].fill(true);
        Some((request, UnderWay { range, pieces, after, read }))
    }

    fn ended(&mut self, under_way: UnderWay) {
        let UnderWay { range, pieces, after, read } = under_way;
        self.busy[range.clone()].fill(false);
        if read {
            assert!(pieces.concat() == self.contents(range.clone()), "sectors {range:?} are not what was written");
        }
        if let Some(version) = after {
            self.sectors[range].fill(version);
        }
    }

    fn play(&mut self, queue: &Queue<HostFile>, requests: usize) {
        let mut under_way = HashMap::new();
        let mut submitted = 0;
        while submitted < requests || !under_way.is_empty() {
            let wanted = if submitted < requests { self.rng.random_range(0..24) } else { 0 };
            for _ in 0..wanted {
                let Some((request, kept)) = self.next() else { continue };
                let number = submitted as u64;
                match queue.submit(request, number) {
                    Ok(()) => {
                        under_way.insert(number, kept);
                        submitted += 1;
                    }
                    Err(Full) => {
                        // As if it had never been thought of.
                        self.busy[kept.range].fill(false);
                        break;
                    }
                }
            }
            let min = if submitted < requests { self.rng.random_range(0..4) } else { 1 };
            queue.reap(min, usize::MAX, None, |c| {
                c.result.unwrap_or_else(|e| panic!("{e}"));
                let kept = under_way.remove(&c.user_data).expect("a completion of its own, once");
                self.ended(kept);
            });
        }
        assert_eq!(queue.pending(), 0);
    }
}

/// Guests on threads, each with a queue; the recycler and compactions at work; judged by QEMU.
#[test]
fn random_requests_against_a_model() {
    const GUESTS: usize = 3;
    let (mut histories, mut moved, mut in_direct) = (0, 0, 0);
    for seed in Slice::new(4, 20, 0.2) {
        println!("seed {seed}");
        let mut rng = SmallRng::seed_from_u64(seed);
        let per_guest = rng.random_range(2000..8000);
        let size = (GUESTS * per_guest * SECTOR) as u64;
        let mut options = Options {
            keep_erased: 1 << 18,
            compact_after_unmaps: Some(1 << 17),
            settle_time: Duration::from_millis(1),
            flush_after: Duration::from_millis(2),
            runtime_asserts: true,
            ..Options::default()
        };
        options.l2_cache_size = if rng.random_bool(0.5) { 4096 } else { 1 << 20 };
        let dir = tempfile::tempdir_in(on_disk()).unwrap();
        let path = dir.path().join("disk.qcow2");
        let file = HostFile::create(&path).unwrap();
        let mut create = CreateOptions::new(size);
        create.cluster_size = 1 << rng.random_range(9..17);
        block_on(qcow_recycler::image::create(&file, &create)).unwrap();
        drop(file);
        let mut guests: Vec<Guest> = (0..GUESTS)
            .map(|g| Guest {
                rng: SmallRng::seed_from_u64(rng.random()),
                first: g * per_guest,
                sectors: vec![0; per_guest],
                busy: vec![false; per_guest],
                version: 0,
            })
            .collect();
        for round in 0..2 {
            let file = open(&path);
            let direct = rng.random_bool(0.4);
            let file = match if direct { file.into_direct() } else { Ok(file) } {
                Err(Error::Unsupported { .. }) => open(&path),
                other => other.unwrap(),
            };
            in_direct += u64::from(file.direct_block().is_some());
            let disk = Disk::open(file, options.clone()).unwrap();
            disk.start().unwrap();
            let stop = Arc::new(AtomicBool::new(false));
            std::thread::scope(|scope| {
                let compactor = scope.spawn(|| {
                    while !stop.load(Ordering::SeqCst) {
                        moved += disk.compact(|_| true).unwrap().moved;
                        std::thread::sleep(Duration::from_millis(1));
                    }
                });
                let playing: Vec<_> = guests
                    .iter_mut()
                    .map(|guest| {
                        let way = WAYS[usize::from(guest.rng.random_bool(0.25))];
                        let queue = queue(&disk, guest.rng.random_range(1..64), way);
                        scope.spawn(move || guest.play(&queue, 600))
                    })
                    .collect();
                let all: Vec<_> = playing.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
                stop.store(true, Ordering::SeqCst);
                compactor.join().unwrap();
                all.into_iter().for_each(|one| one.unwrap());
            });
            assert_eq!(disk.stats().background_errors, 0);
            disk.close().unwrap();
            drop(disk);
            assert_clean(&path);
            if round == 1 {
                let expected: Vec<u8> = guests.iter().flat_map(|g| g.contents(0..per_guest)).collect();
                assert!(seen_by_qemu(&path) == expected, "seed {seed}: QEMU reads something else");
            }
        }
        histories += 1;
    }
    println!("queues: {histories} histories ({in_direct} times past the page cache), {moved} bytes moved");
}
