//! Calls of the program's block callbacks: those that return when all is done, and those that only begin.

use std::ffi::{c_int, c_void};
use std::io;

use qcow_recycler::buf::{Held, IoBuf, IoBufMut, IoVec};
use qcow_recycler::device::{Direction, Done, ending};

use crate::callbacks::{Callbacks, QCR_IOV_MAX, qcr_io};

type Submit = unsafe extern "C" fn(*mut c_void, *const IoVec, c_int, u64, *mut qcr_io);

/// What a callback returned. A positive value may be a count of bytes, so a short transfer: it must not pass.
pub(crate) fn outcome(verb: &str, returned: c_int) -> io::Result<()> {
    match returned {
        0 => Ok(()),
        -4095..=-1 => Err(io::Error::from_raw_os_error(-returned)),
        other => Err(io::Error::other(format!("the {verb} callback returned {other}, neither 0 nor a negative errno"))),
    }
}

fn absent<T>(verb: Option<T>) -> io::Result<T> {
    verb.ok_or_else(|| io::ErrorKind::Unsupported.into())
}

const NO_AREA: IoVec = IoVec { iov_base: std::ptr::null_mut(), iov_len: 0 };
type Areas = [IoVec; QCR_IOV_MAX as usize];

/// Moves `length` bytes to or from `offset` on, as many at a time as `part` says: it is told the place, how many bytes were
/// moved, and all that there are.
fn in_parts(
    offset: u64,
    length: usize,
    mut part: impl FnMut(u64, usize, usize, &mut Areas) -> io::Result<usize>,
) -> io::Result<()> {
    let mut areas: Areas = [NO_AREA; _];
    let mut done = 0;
    while done < length {
        done += part(offset + done as u64, done, length, &mut areas)?;
    }
    Ok(())
}

fn bytes_of(areas: &Areas, count: usize) -> usize {
    areas.iter().take(count).map(|area| area.iov_len).sum()
}

/// The areas that `fill` stores, and says how many they are.
///
/// # Safety
/// As [`Held::new`].
unsafe fn held(fill: impl FnOnce(&mut Areas) -> usize) -> Held {
    let mut areas: Areas = [NO_AREA; _];
    let count = fill(&mut areas);
    // SAFETY: as promised by the caller.
    unsafe { Held::new(areas.get(..count).unwrap_or_default()) }
}

/// Every call below relies on the header's rules for callbacks, which the program promised to keep when it handed
/// them over; `owner` keeps `user` alive.
impl Callbacks {
    pub(crate) fn length(&self) -> io::Result<u64> {
        let mut length = 0;
        // SAFETY: see the impl; `length` outlives the call.
        outcome("length", unsafe { absent(self.verbs.length)?(self.owner.user(), &raw mut length) })?;
        Ok(length)
    }

    /// Reads by `preadv`, if there is one.
    pub(crate) fn read_now(&self, offset: u64, mut buf: IoBufMut<'_>) -> Option<io::Result<()>> {
        let preadv = self.verbs.preadv?;
        Some(in_parts(offset, buf.len(), |at, done, end, areas| {
            let count = buf.slice(done..end).fill_iovecs(areas);
            // SAFETY: see the impl; the first `count` areas are filled, and writable while `buf` lives.
            outcome("preadv", unsafe { preadv(self.owner.user(), areas.as_ptr(), count as c_int, at) })?;
            Ok(bytes_of(areas, count))
        }))
    }

    /// Writes by `pwritev`, if there is one.
    pub(crate) fn write_now(&self, offset: u64, buf: IoBuf<'_>) -> Option<io::Result<()>> {
        let pwritev = self.verbs.pwritev?;
        Some(in_parts(offset, buf.len(), |at, done, end, areas| {
            let count = buf.slice(done..end).fill_iovecs(areas);
            // SAFETY: see the impl; the first `count` areas are filled, and readable while `buf` lives.
            outcome("pwritev", unsafe { pwritev(self.owner.user(), areas.as_ptr(), count as c_int, at) })?;
            Ok(bytes_of(areas, count))
        }))
    }

    pub(crate) async fn read(&self, offset: u64, mut buf: IoBufMut<'_>) -> io::Result<()> {
        let (mut done, end) = (0, buf.len());
        if let Some(result) = self.read_now(offset, buf.slice(0..end)) {
            return result;
        }
        while done < end {
            // SAFETY: the areas are writable while `buf` lives, and `ending` ends before.
            let memory = unsafe { held(|areas| buf.slice(done..end).fill_iovecs(areas)) };
            ending(|told| self.begin(Direction::Read, offset + done as u64, &memory, told)).await?;
            done += memory.len();
        }
        Ok(())
    }

    pub(crate) async fn write(&self, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
        if let Some(result) = self.write_now(offset, buf) {
            return result;
        }
        let (mut done, end) = (0, buf.len());
        while done < end {
            // SAFETY: the areas are readable while `buf` lives, and `ending` ends before.
            let memory = unsafe { held(|areas| buf.slice(done..end).fill_iovecs(areas)) };
            ending(|told| self.begin(Direction::Write, offset + done as u64, &memory, told)).await?;
            done += memory.len();
        }
        Ok(())
    }

    fn submit(&self, direction: Direction) -> Option<Submit> {
        match direction {
            Direction::Read => self.verbs.submit_preadv,
            Direction::Write => self.verbs.submit_pwritev,
        }
    }

    /// Whether [`begin`](Self::begin) takes a transfer of so many areas.
    pub(crate) fn begins(&self, direction: Direction, areas: usize) -> bool {
        self.submit(direction).is_some() && (1..=QCR_IOV_MAX as usize).contains(&areas)
    }

    pub(crate) fn begin(&self, direction: Direction, offset: u64, memory: &Held, done: Done) {
        let areas = memory.areas();
        match self.submit(direction) {
            // SAFETY: see the impl; the areas and their list are there until `done` was told.
            Some(submit) => unsafe {
                submit(self.owner.user(), areas.as_ptr(), areas.len() as c_int, offset, qcr_io::of(done));
            },
            None => done.complete(Err(io::ErrorKind::Unsupported.into())),
        }
    }

    pub(crate) async fn flush(&self) -> io::Result<()> {
        if let Some(flush) = self.verbs.flush {
            // SAFETY: see the impl.
            return outcome("flush", unsafe { flush(self.owner.user()) });
        }
        let submit = absent(self.verbs.submit_flush)?;
        // SAFETY: see the impl.
        ending(|told| unsafe { submit(self.owner.user(), qcr_io::of(told)) }).await
    }

    pub(crate) fn truncate(&self, length: u64) -> io::Result<()> {
        // SAFETY: see the impl.
        outcome("truncate", unsafe { absent(self.verbs.truncate)?(self.owner.user(), length) })
    }

    pub(crate) fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: see the impl.
        outcome("punch_hole", unsafe { absent(self.verbs.punch_hole)?(self.owner.user(), offset, length) })
    }

    pub(crate) fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        // SAFETY: see the impl.
        outcome("write_zeroes", unsafe { absent(self.verbs.write_zeroes)?(self.owner.user(), offset, length) })
    }

    pub(crate) fn copy_range(&self, from: u64, to: u64, length: u64) -> io::Result<()> {
        // SAFETY: see the impl.
        outcome("copy_range", unsafe { absent(self.verbs.copy_range)?(self.owner.user(), from, to, length) })
    }
}
