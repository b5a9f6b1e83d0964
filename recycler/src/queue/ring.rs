//! An io_uring for the transfers of one queue: the only place that talks to the kernel about it.
//!
//! Transfers are collected in the ring and handed over together. Should the kernel refuse to take any more (a sandbox
//! that closed after the ring was made), the ring says which transfers it never took, and they are carried out by other
//! means; those that it took still end by themselves.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use io_uring::types::{Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue, types};

use crate::buf::Held;
use crate::device::Direction;

/// Larger rings are refused by the kernel.
const MAX_ENTRIES: u32 = 32_768;
/// Areas that the kernel takes in one call.
pub(super) const MAX_AREAS: usize = 1024;
/// Not the number of a transfer: somebody has written to the bell.
const BELL: u64 = u64::MAX;
/// How often a ring that the kernel does not let us wait for is looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

pub(super) struct Ring {
    ring: IoUring,
    /// What the kernel has not taken yet, oldest first.
    waiting: VecDeque<u64>,
    /// Whether the kernel watches the bell.
    watching: bool,
    /// Set for good when the kernel refuses what it must not refuse.
    broken: bool,
    has_event: bool,
}

impl Ring {
    /// A ring for `depth` transfers at once to and from `file`, which the kernel keeps.
    ///
    /// # Errors
    /// The kernel has no io_uring, an old one, or none for this process.
    pub(super) fn new(depth: u32, file: &File) -> io::Result<Self> {
        // One more for the bell.
        let entries = (depth + 1).next_power_of_two().min(MAX_ENTRIES);
        let ring = IoUring::builder()
            .dontfork()
            .setup_coop_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .build(entries)
            // Kernels before 5.19 know none of these.
            .or_else(|_| IoUring::builder().dontfork().build(entries))?;
        let params = ring.params();
        if !(params.is_feature_nodrop() && params.is_feature_ext_arg() && params.is_feature_submit_stable()) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        ring.submitter().register_files(&[file.as_raw_fd()])?;
        let waiting = VecDeque::with_capacity(entries as usize);
        Ok(Ring { ring, waiting, watching: false, broken: false, has_event: false })
    }

    /// Whether there is anything that the kernel has not been told of.
    pub(super) fn has_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Whether the kernel takes no transfers any more.
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Puts a transfer into the ring. `false`: there is no room, or the ring is broken.
    ///
    ///
    /// `memory` must stay where it is until the transfer has been collected, or given back by [`refused`](Self::refused):
    /// so it is in one of the slots of a queue, which drops none of them before.
    pub(super) fn push(&mut self, number: u32, direction: Direction, memory: &Held, offset: u64) -> bool {
        let areas = memory.areas();
        if self.broken {
            return false;
        }
        let file = Fixed(0);
        let single = match areas {
            [one] => u32::try_from(one.iov_len).ok().map(|length| (one.iov_base.cast::<u8>(), length)),
            _ => None,
        };
        let entry = match (direction, single) {
            (Direction::Read, Some((base, length))) => opcode::Read::new(file, base, length).offset(offset).build(),
            (Direction::Write, Some((base, length))) => opcode::Write::new(file, base, length).offset(offset).build(),
            (Direction::Read, None) => {
                opcode::Readv::new(file, areas.as_ptr(), areas.len() as u32).offset(offset).build()
            }
            (Direction::Write, None) => {
                opcode::Writev::new(file, areas.as_ptr(), areas.len() as u32).offset(offset).build()
            }
        };
        // SAFETY: `Held` promises that the areas stay valid until the request has ended, and the slot keeps their list; the
        // file is the registered one.
        unsafe { self.put(entry, u64::from(number)) }
    }

    /// # Safety
    /// What the entry refers to stays valid until it is complete.
    unsafe fn put(&mut self, entry: squeue::Entry, name: u64) -> bool {
        // SAFETY: as promised by the caller.
        let put = unsafe { self.ring.submission().push(&entry.user_data(name)) }.is_ok();
        if put {
            self.waiting.push_back(name);
        }
        put
    }

    /// Hands over what is waiting.
    pub(super) fn submit(&mut self) {
        self.enter(0, None);
    }

    /// Hands over what is waiting, and waits until `want` completions are there, or for so long, or less: the caller
    /// looks and waits again. With a bell, waits for its being written, too.
    pub(super) fn wait(&mut self, want: usize, timeout: Option<Duration>, bell: Option<BorrowedFd<'_>>) {
        if let Some(bell) = bell
            && !self.watching
        {
            let poll = opcode::PollAdd::new(types::Fd(bell.as_raw_fd()), libc::POLLIN as u32).multi(true);
            // SAFETY: refers to nothing but the descriptor's number.
            self.watching = unsafe { self.put(poll.build(), BELL) };
        }
        // A bell that is not watched must not be waited for: there was no room, so something is waiting and will complete.
        self.enter(want, timeout);
    }

    fn enter(&mut self, want: usize, timeout: Option<Duration>) {
        if self.broken {
            if want > 0 {
                std::thread::sleep(timeout.unwrap_or(LOOK_AGAIN).min(LOOK_AGAIN));
            }
            return;
        }
        let time = timeout.map(Timespec::from);
        let mut args = SubmitArgs::new();
        if let Some(time) = &time {
            args = args.timespec(time);
        }
        let before = self.ring.submission().len();
        let result = self.ring.submitter().submit_with_args(want, &args);
        let taken = before - self.ring.submission().len();
        self.waiting.drain(..taken.min(self.waiting.len()));
        match result.as_ref().map_err(io::Error::raw_os_error) {
            // A signal, or the time is up: nothing was lost.
            Ok(_) | Err(Some(libc::EINTR | libc::ETIME)) => {}
            // The kernel is short of memory, or has more completions than the ring has room for: they are collected, then
            // it is tried again.
            Err(Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM)) if want == 0 => {}
            Err(Some(libc::EAGAIN | libc::EBUSY | libc::ENOMEM)) => {
                std::thread::sleep(timeout.unwrap_or(LOOK_AGAIN).min(LOOK_AGAIN));
            }
            Err(_) => self.broken = true,
        }
    }

    /// The transfers that a broken ring never took.
    pub(super) fn refused(&mut self) -> Option<u32> {
        if !self.broken {
            return None;
        }
        let next = std::iter::from_fn(|| self.waiting.pop_front()).find(|name| *name != BELL)?;
        Some(next as u32)
    }

    /// The next completed transfer: its number, and how many bytes it moved or a negative errno. Costs no system call.
    pub(super) fn collect(&mut self) -> Option<(u32, i32)> {
        loop {
            let next: Option<cqueue::Entry> = self.ring.completion().next();
            let entry = next?;
            if entry.user_data() == BELL {
                self.watching &= cqueue::more(entry.flags());
                continue;
            }
            return Some((entry.user_data() as u32, entry.result()));
        }
    }

    /// Whether the kernel has completions that it has not put into the ring yet.
    pub(super) fn owes(&mut self) -> bool {
        let submission = self.ring.submission();
        submission.taskrun() || submission.cq_overflow()
    }

    /// Has `event`, always the same, written whenever a transfer completes from now on.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn announce(&mut self, event: BorrowedFd<'_>) -> io::Result<()> {
        if !self.has_event {
            self.ring.submitter().register_eventfd(event.as_raw_fd())?;
            self.has_event = true;
        }
        self.ring.completion().enable_eventfd();
        // Seen by the kernel before the caller looks for what has completed meanwhile.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Has it not written any more.
    pub(super) fn quieten(&mut self) {
        self.ring.completion().disable_eventfd();
    }
}

impl Drop for Ring {
    /// The kernel takes rings apart in its own time; the file should be gone when the queue is.
    fn drop(&mut self) {
        let _ = self.ring.submitter().unregister_files();
    }
}
