//! Image locks that QEMU understands.
//!
//! QEMU gives every permission on an image a number and two bytes of the file: byte 100 + n is read-locked by whoever
//! *has* the permission, byte 200 + n by whoever does not *share* it with others. An opener first takes its own locks
//! and then probes, with write locks that are tested but never taken, whether somebody refuses what it has, or has what
//! it refuses. Two that open at once may both fail; they never both succeed. The locks are open-file-description locks:
//! they vanish with the last descriptor of the file, also when the process dies.
//!
//! Somebody who locks the whole file exclusively (cloud-hypervisor does) stands in the way of the first step.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

use crate::error::{Error, Result};

/// Whether the image's locks are respected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LockMode {
    /// Take the locks; fail with [`Error::Locked`] if somebody uses the image in a way that excludes ours.
    #[default]
    Enforce,
    /// Take no locks and look at none. Only for callers who keep others away by their own means.
    Off,
}

/// First of the bytes that are locked by those who have a permission.
const HAVE: u64 = 100;
/// First of the bytes that are locked by those who do not share a permission.
const UNSHARED: u64 = 200;

/// QEMU's permissions, by number.
const PERMISSIONS: [&str; 4] = ["consistent read", "write", "write unchanged", "resize"];
const CONSISTENT_READ: u32 = 1 << 0;
const WRITE: u32 = 1 << 1;
const RESIZE: u32 = 1 << 3;

/// What a user of a qcow2 file does not share, reader or writer: QEMU's qcow2 driver needs metadata that nobody else
/// changes.
const NOT_SHARED: u32 = WRITE | RESIZE;

/// Takes the locks of a reader or writer of a qcow2 file, as QEMU would.
pub(super) fn acquire(file: &fs::File, read_only: bool) -> Result<()> {
    let have = if read_only { CONSISTENT_READ } else { CONSISTENT_READ | WRITE | RESIZE };
    for (base, set) in [(HAVE, have), (UNSHARED, NOT_SHARED)] {
        for (byte, _) in bytes(base, set) {
            if !ofd::read_lock(file.as_fd(), byte).map_err(failed)? {
                let pid = ofd::write_lock_conflict(file.as_fd(), byte).map_err(failed)?.unwrap_or(-1);
                return Err(conflict(file, byte, pid, |who| format!("{who} has locked it exclusively")));
            }
        }
    }
    for (byte, permission) in bytes(UNSHARED, have) {
        if let Some(pid) = ofd::write_lock_conflict(file.as_fd(), byte).map_err(failed)? {
            return Err(conflict(file, byte, pid, |who| {
                format!("{who} does not share the \"{permission}\" permission")
            }));
        }
    }
    for (byte, permission) in bytes(HAVE, NOT_SHARED) {
        if let Some(pid) = ofd::write_lock_conflict(file.as_fd(), byte).map_err(failed)? {
            return Err(conflict(file, byte, pid, |who| format!("{who} has the \"{permission}\" permission")));
        }
    }
    Ok(())
}

fn bytes(base: u64, set: u32) -> impl Iterator<Item = (u64, &'static str)> {
    (base..).zip(PERMISSIONS).enumerate().filter(move |(n, _)| set & (1 << n) != 0).map(|(_, item)| item)
}

fn failed(source: io::Error) -> Error {
    Error::Io { action: "locking the image file", offset: HAVE, source }
}

/// `pid` is the owner of a process lock; open-file-description locks have none, and are searched for.
fn conflict(file: &fs::File, byte: u64, pid: i32, say: impl FnOnce(&str) -> String) -> Error {
    let who = match u32::try_from(pid) {
        Ok(pid) if pid > 0 => describe(pid),
        _ => {
            let holders: Vec<String> = holders(file, byte).into_iter().map(describe).collect();
            if holders.is_empty() { "another process".to_owned() } else { holders.join(" and ") }
        }
    };
    Error::Locked { holder: format!("{} (lock on byte {byte})", say(&who)) }
}

fn describe(pid: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let this = if pid == std::process::id() { "this process, " } else { "" };
    match name.trim_end() {
        "" => format!("{this}process {pid}"),
        name => format!("{this}process {pid} ({})", name.escape_debug()),
    }
}

/// The processes with a descriptor, other than `file`, through which `byte` of the same file is locked: as far as /proc
/// lets us see them. Only asked once a conflict is certain, so it may take its time.
fn holders(file: &fs::File, byte: u64) -> Vec<u32> {
    let mut found = BTreeSet::new();
    let Ok(ours) = file.metadata() else { return Vec::new() };
    let this = std::process::id();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        for descriptor in fs::read_dir(process.path().join("fdinfo")).into_iter().flatten().flatten() {
            let number = descriptor.file_name();
            if pid == this && number.to_str() == Some(&file.as_raw_fd().to_string()) {
                continue;
            }
            let Ok(info) = fs::read_to_string(descriptor.path()) else { continue };
            if !info.lines().any(|line| locks(line, ours.ino(), byte)) {
                continue;
            }
            // Inode numbers are unique per file system only.
            let same = fs::metadata(process.path().join("fd").join(&number))
                .is_ok_and(|theirs| (theirs.dev(), theirs.ino()) == (ours.dev(), ours.ino()));
            if same {
                found.insert(pid);
            }
        }
    }
    found.into_iter().collect()
}

/// Whether a line of fdinfo, such as `lock: 1: OFDLCK ADVISORY  READ -1 fe:00:10010766 201 201`, is a lock on `byte`.
fn locks(line: &str, inode: u64, byte: u64) -> bool {
    let Some(rest) = line.strip_prefix("lock:") else { return false };
    let words: Vec<&str> = rest.split_whitespace().collect();
    let [_, kind, _, _, _, place, first, last] = words[..] else { return false };
    let inside = first.parse::<u64>().is_ok_and(|first| first <= byte)
        && (last == "EOF" || last.parse::<u64>().is_ok_and(|last| byte <= last));
    kind != "FLOCK" && place.rsplit(':').next().and_then(|i| i.parse().ok()) == Some(inode) && inside
}

/// Open-file-description locks on single bytes.
#[allow(unsafe_code)]
mod ofd {
    use super::*;

    fn lock(kind: i32, byte: u64) -> libc::flock64 {
        // SAFETY: `flock64` is plain numbers, for which zero is valid. For these calls l_pid must be zero.
        let mut lock: libc::flock64 = unsafe { std::mem::zeroed() };
        lock.l_type = kind as libc::c_short;
        lock.l_whence = libc::SEEK_SET as libc::c_short;
        lock.l_start = byte as libc::off64_t;
        lock.l_len = 1;
        lock
    }

    fn control(fd: BorrowedFd<'_>, command: i32, lock: &mut libc::flock64) -> io::Result<()> {
        loop {
            // SAFETY: these commands read and write one `flock64`, which `lock` is.
            if unsafe { libc::fcntl(fd.as_raw_fd(), command, std::ptr::from_mut(lock)) } == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Takes a read lock; `false` if somebody holds a write lock.
    pub(super) fn read_lock(fd: BorrowedFd<'_>, byte: u64) -> io::Result<bool> {
        match control(fd, libc::F_OFD_SETLK, &mut lock(libc::F_RDLCK, byte)) {
            Ok(()) => Ok(true),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Whether somebody else's lock would refuse a write lock: then the process that owns it, or -1 if it belongs to an
    /// open file description.
    pub(super) fn write_lock_conflict(fd: BorrowedFd<'_>, byte: u64) -> io::Result<Option<i32>> {
        let mut lock = lock(libc::F_WRLCK, byte);
        control(fd, libc::F_OFD_GETLK, &mut lock)?;
        Ok((i32::from(lock.l_type) != libc::F_UNLCK).then_some(lock.l_pid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_lines_are_understood() {
        let line = "lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:10010766 201 203";
        for (inode, byte, expected) in [(10010766, 201, true), (10010766, 203, true), (10010766, 200, false)] {
            assert_eq!(locks(line, inode, byte), expected);
        }
        assert!(!locks(line, 1, 201));
        assert!(locks("lock: 9: OFDLCK ADVISORY  WRITE -1 00:2f:7 0 EOF", 7, 100));
        assert!(!locks("lock: 9: FLOCK  ADVISORY  WRITE 12 00:2f:7 0 EOF", 7, 100));
        assert!(!locks("lock: nonsense", 7, 100) && !locks("pos: 0", 7, 100) && !locks("", 7, 100));
    }

    #[test]
    fn the_bytes_are_qemus() {
        assert_eq!(bytes(HAVE, CONSISTENT_READ | WRITE | RESIZE).map(|b| b.0).collect::<Vec<_>>(), [100, 101, 103]);
        assert_eq!(bytes(UNSHARED, NOT_SHARED).collect::<Vec<_>>(), [(201, "write"), (203, "resize")]);
    }
}
