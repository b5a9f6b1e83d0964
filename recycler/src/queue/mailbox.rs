//! Completions on their way from other threads to the one that reaps, and what wakes it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use once_cell::sync::OnceCell;
use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, eventfd};

use crate::device::Ended;
use crate::error::Result;

pub(super) enum News {
    /// A helper has carried out a request.
    Ended(Result<()>),
    /// A transfer has ended.
    Transferred(io::Result<()>),
}

/// The number of a slot, and the news about it.
pub(super) type Letter = (u32, News);

#[derive(Default)]
struct Letters {
    list: VecDeque<Letter>,
    /// Whether the reaper sleeps until something arrives.
    sleeping: bool,
    /// Whether the program's event is to be written when something arrives.
    armed: bool,
}

pub(super) struct Mailbox {
    letters: Mutex<Letters>,
    arrived: Condvar,
    /// Wakes a reaper that sleeps in the kernel; without it, it sleeps on `arrived`.
    bell: Option<OwnedFd>,
    /// The program's own.
    event: OnceCell<OwnedFd>,
}

fn new_event() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Writes an event. It fails only if the counter is full, and then the reader is awake already.
fn ring(event: &OwnedFd) {
    let _ = rustix::io::retry_on_intr(|| rustix::io::write(event, &1u64.to_ne_bytes()));
}

fn silence(event: &OwnedFd) {
    let _ = rustix::io::retry_on_intr(|| rustix::io::read(event, &mut [0; 8]));
}

impl Mailbox {
    /// With room for so many letters.
    pub(super) fn new(depth: usize, with_bell: bool) -> io::Result<Self> {
        let letters = Letters { list: VecDeque::with_capacity(depth), ..Letters::default() };
        Ok(Mailbox {
            letters: Mutex::new(letters),
            arrived: Condvar::new(),
            bell: if with_bell { Some(new_event()?) } else { None },
            event: OnceCell::new(),
        })
    }

    /// Something has ended.
    pub(super) fn post(&self, letter: Letter) {
        let mut letters = self.letters.lock();
        letters.list.push_back(letter);
        // All under the lock: a reaper that has risen, or disarmed the queue, must not be woken for this letter any more, nor a
        // program that has armed the queue anew since.
        let armed = std::mem::take(&mut letters.armed);
        if std::mem::take(&mut letters.sleeping) {
            match &self.bell {
                Some(bell) => ring(bell),
                None => {
                    self.arrived.notify_one();
                }
            }
        }
        if armed && let Some(event) = self.event.get() {
            ring(event);
        }
    }

    /// What has arrived.
    pub(super) fn take(&self) -> Option<Letter> {
        self.letters.lock().list.pop_front()
    }

    /// Sleeps until something is there, or the time is up.
    pub(super) fn sleep(&self, left: Option<Duration>) {
        let until = left.and_then(|left| Instant::now().checked_add(left));
        let mut letters = self.letters.lock();
        while letters.list.is_empty() {
            letters.sleeping = true;
            match until {
                None => self.arrived.wait(&mut letters),
                Some(until) => {
                    if self.arrived.wait_until(&mut letters, until).timed_out() {
                        break;
                    }
                }
            }
        }
        letters.sleeping = false;
    }

    /// The bell, if nothing has arrived: from now on it is rung when something does. The caller sleeps, and then
    /// [`rise`](Self::rise)s.
    pub(super) fn lie_down(&self) -> Option<BorrowedFd<'_>> {
        let mut letters = self.letters.lock();
        letters.sleeping = letters.list.is_empty();
        if letters.sleeping { self.bell.as_ref().map(AsFd::as_fd) } else { None }
    }

    pub(super) fn rise(&self) {
        let rung = !std::mem::take(&mut self.letters.lock().sleeping);
        if rung && let Some(bell) = &self.bell {
            silence(bell);
        }
    }

    /// The program's event.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub(super) fn event(&self) -> io::Result<BorrowedFd<'_>> {
        self.event.get_or_try_init(new_event).map(AsFd::as_fd)
    }

    /// Has the program's event written when something arrives, unless something is there.
    pub(super) fn arm(&self) {
        let mut letters = self.letters.lock();
        letters.armed = letters.list.is_empty();
    }

    /// Writes the program's event: something has ended that needed no letter.
    pub(super) fn announce(&self) {
        if let Some(event) = self.event.get() {
            ring(event);
        }
    }

    /// Does not have the event written any more, and takes back what was written.
    pub(super) fn disarm(&self) {
        self.letters.lock().armed = false;
        if let Some(event) = self.event.get() {
            silence(event);
        }
    }
}

impl Ended for Mailbox {
    fn ended(&self, number: u32, result: io::Result<()>) {
        self.post((number, News::Transferred(result)));
    }
}
