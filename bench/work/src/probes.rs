//! What a process can tell about itself.

use std::fs;

use crate::protocol::Memory;

/// A system call that does nothing, to be found in a trace: everything between two of them is one round's.
pub const MARK: libc::pid_t = 0x7f51_4352;

pub fn mark() {
    // SAFETY: getpgid takes any number; there is no such process.
    unsafe { libc::getpgid(MARK) };
}

/// Heap allocations of the whole process so far, if the counter of `bench/library/allocations.c` is preloaded.
pub fn allocations() -> Option<u64> {
    type Counter = unsafe extern "C" fn() -> u64;
    // SAFETY: looks a name up; the only library that defines it does so with this signature, without side effects.
    unsafe {
        let found = libc::dlsym(libc::RTLD_DEFAULT, c"bench_allocations".as_ptr());
        if found.is_null() {
            return None;
        }
        Some(std::mem::transmute::<*mut libc::c_void, Counter>(found)())
    }
}

/// How often this thread lost its core to somebody else.
pub fn preemptions() -> u64 {
    usage(libc::RUSAGE_THREAD).ru_nivcsw as u64
}

/// User and system time of the process in microseconds.
pub fn cpu_time() -> (u64, u64) {
    let usage = usage(libc::RUSAGE_SELF);
    let microseconds = |time: libc::timeval| time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64;
    (microseconds(usage.ru_utime), microseconds(usage.ru_stime))
}

fn usage(whose: libc::c_int) -> libc::rusage {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: getrusage fills the struct; zeroes are valid, should it fail.
    unsafe {
        libc::getrusage(whose, usage.as_mut_ptr());
        usage.assume_init()
    }
}

pub fn memory() -> Memory {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let value = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) << 10
    };
    Memory { resident: value("VmRSS:"), peak: value("VmHWM:"), anonymous: value("RssAnon:") }
}

/// How often the scheduler switched to one of the process's other threads.
pub fn wake_ups_of_other_threads() -> u64 {
    // SAFETY: gettid takes and changes nothing.
    let own = unsafe { libc::gettid() }.to_string();
    let Ok(tasks) = fs::read_dir("/proc/self/task") else { return 0 };
    tasks
        .flatten()
        .filter(|task| task.file_name().to_string_lossy() != own)
        .filter_map(|task| fs::read_to_string(task.path().join("status")).ok())
        .flat_map(|status| {
            let switches = |line: &str| {
                let (name, value) = line.split_once(':')?;
                name.ends_with("ctxt_switches").then(|| value.trim().parse::<u64>().ok())?
            };
            status.lines().filter_map(switches).collect::<Vec<_>>()
        })
        .sum()
}
