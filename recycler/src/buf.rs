//! Guest buffers: lists of raw memory areas.
//!
//! Guest memory is volatile: the guest may change it while a request is under way. No Rust reference to it is ever
//! formed; the bytes are only handed to the kernel or copied through raw pointers. This is the one module of the crate
//! that may use `unsafe` for that, behind two types that know their length and whose lifetime keeps the memory alive.
#![allow(unsafe_code)]

use std::marker::PhantomData;
use std::ops::{ControlFlow, Range};

/// One memory area of a vectored buffer, laid out as POSIX `struct iovec`.
pub type IoVec = libc::iovec;

#[derive(Clone, Copy)]
enum Areas<'a> {
    One(*mut u8),
    Many(&'a [IoVec]),
}

/// `len` bytes, `skip` bytes into the areas.
#[derive(Clone, Copy)]
struct Raw<'a> {
    areas: Areas<'a>,
    skip: usize,
    len: usize,
}

impl<'a> Raw<'a> {
    /// The one area that this is, if it is known to be one.
    #[inline]
    fn single(self) -> Option<*mut u8> {
        match self.areas {
            // SAFETY: `skip` is within the area, by the constructors and `slice`.
            Areas::One(base) => Some(unsafe { base.add(self.skip) }),
            Areas::Many(_) => None,
        }
    }

    #[inline]
    fn slice(self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "buffer range out of bounds");
        Raw { areas: self.areas, skip: self.skip + range.start, len: range.end - range.start }
    }

    /// Calls `f(position, address, length)` for every piece of memory, in order.
    fn for_each(self, mut f: impl FnMut(usize, *mut u8, usize)) {
        self.for_each_until(|at, base, len| {
            f(at, base, len);
            ControlFlow::Continue(())
        });
    }

    /// The same, until `f` breaks off: later areas are not looked at.
    fn for_each_until(self, mut f: impl FnMut(usize, *mut u8, usize) -> ControlFlow<()>) {
        if self.len == 0 {
            return;
        }
        match self.areas {
            Areas::One(base) => {
                // SAFETY: `skip + len` is within the area, by the constructors and `slice`.
                let _ = f(0, unsafe { base.add(self.skip) }, self.len);
            }
            Areas::Many(areas) => {
                let (mut skip, mut done) = (self.skip, 0);
                for area in areas {
                    if done == self.len {
                        break;
                    }
                    if skip >= area.iov_len {
                        skip -= area.iov_len;
                        continue;
                    }
                    let take = (area.iov_len - skip).min(self.len - done);
                    // SAFETY: `skip + take` is at most the area's length.
                    if f(done, unsafe { area.iov_base.cast::<u8>().add(skip) }, take).is_break() {
                        break;
                    }
                    done += take;
                    skip = 0;
                }
            }
        }
    }

    fn fill_iovecs(self, out: &mut [IoVec]) -> usize {
        let mut count = 0;
        // A long list is taken in many calls: none of them may look at all that is left.
        self.for_each_until(|_, base, len| {
            if let Some(slot) = out.get_mut(count) {
                *slot = IoVec { iov_base: base.cast(), iov_len: len };
                count += 1;
            }
            if count < out.len() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        count
    }
}

/// The source of a write: bytes that are read, possibly while somebody else changes them.
#[derive(Clone, Copy)]
pub struct IoBuf<'a> {
    raw: Raw<'a>,
    memory: PhantomData<&'a [u8]>,
}

/// The destination of a read.
pub struct IoBufMut<'a> {
    raw: Raw<'a>,
    memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: the areas are plain memory that outlives 'a; access goes through raw pointers only and is valid from any thread.
unsafe impl Send for IoBuf<'_> {}
// SAFETY: as above; a shared `IoBuf` only reads.
unsafe impl Sync for IoBuf<'_> {}
// SAFETY: as above; writing needs `&mut self` or ownership.
unsafe impl Send for IoBufMut<'_> {}
// SAFETY: a shared `IoBufMut` offers its length only.
unsafe impl Sync for IoBufMut<'_> {}

impl std::fmt::Debug for IoBuf<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoBuf({} bytes)", self.len())
    }
}

impl std::fmt::Debug for IoBufMut<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "IoBufMut({} bytes)", self.len())
    }
}

/// Total length of `areas` in bytes, or `None` when it overflows.
#[must_use]
pub fn iovecs_len(areas: &[IoVec]) -> Option<usize> {
    areas.iter().try_fold(0usize, |sum, a| sum.checked_add(a.iov_len))
}

impl<'a> IoBuf<'a> {
    /// The bytes of an ordinary slice.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        let raw = Raw { areas: Areas::One(bytes.as_ptr().cast_mut()), skip: 0, len: bytes.len() };
        IoBuf { raw, memory: PhantomData }
    }

    /// `len` bytes from `base` on; they may change while they are read.
    ///
    /// # Safety
    /// They must stay readable for `'a`, and `len` must be at most `isize::MAX`.
    #[inline]
    #[must_use]
    pub unsafe fn from_raw(base: *const u8, len: usize) -> Self {
        IoBuf { raw: Raw { areas: Areas::One(base.cast_mut()), skip: 0, len }, memory: PhantomData }
    }

    /// The bytes of a list of areas, in order; they may change while they are read.
    ///
    /// # Safety
    /// Every area must stay readable for `'a`, and their lengths must sum up without overflow (see [`iovecs_len`]).
    #[must_use]
    pub unsafe fn from_iovecs(areas: &'a [IoVec]) -> Self {
        let len = iovecs_len(areas).unwrap_or(0);
        IoBuf { raw: Raw { areas: Areas::Many(areas), skip: 0, len }, memory: PhantomData }
    }

    /// Length in bytes.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.raw.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.raw.len == 0
    }

    /// The address, if this is known to be one area. It is valid for `'a`.
    #[inline]
    pub(crate) fn single(&self) -> Option<*const u8> {
        self.raw.single().map(<*mut u8>::cast_const)
    }

    /// The part `range` (bytes). Panics when it is out of bounds.
    #[must_use]
    pub fn slice(&self, range: Range<usize>) -> IoBuf<'a> {
        IoBuf { raw: self.raw.slice(range), memory: PhantomData }
    }

    /// Copies everything into `out`, which must be of the same length.
    pub fn copy_to(&self, out: &mut [u8]) {
        assert_eq!(out.len(), self.len());
        self.raw.for_each(|at, base, len| {
            // SAFETY: `base..base+len` is readable for 'a; `out` has room for `at + len` bytes and cannot overlap, being
            // exclusively borrowed.
            unsafe { std::ptr::copy_nonoverlapping(base, out.as_mut_ptr().add(at), len) }
        });
    }

    /// Fills `out` with the memory areas, as far as they fit; returns how many. The addresses are valid for `'a`.
    pub fn fill_iovecs(&self, out: &mut [IoVec]) -> usize {
        self.raw.fill_iovecs(out)
    }
}

impl<'a> IoBufMut<'a> {
    /// The bytes of an ordinary slice.
    #[must_use]
    pub fn new(bytes: &'a mut [u8]) -> Self {
        let raw = Raw { areas: Areas::One(bytes.as_mut_ptr()), skip: 0, len: bytes.len() };
        IoBufMut { raw, memory: PhantomData }
    }

    /// `len` bytes from `base` on.
    ///
    /// # Safety
    /// They must stay writable for `'a` and belong to no Rust reference that is used meanwhile; `len` must be at most
    /// `isize::MAX`.
    #[inline]
    #[must_use]
    pub unsafe fn from_raw(base: *mut u8, len: usize) -> Self {
        IoBufMut { raw: Raw { areas: Areas::One(base), skip: 0, len }, memory: PhantomData }
    }

    /// The bytes of a list of areas, in order.
    ///
    /// # Safety
    /// Every area must stay writable for `'a`, belong to no Rust reference that is used meanwhile, and their lengths must
    /// sum up without overflow (see [`iovecs_len`]).
    #[must_use]
    pub unsafe fn from_iovecs(areas: &'a [IoVec]) -> Self {
        let len = iovecs_len(areas).unwrap_or(0);
        IoBufMut { raw: Raw { areas: Areas::Many(areas), skip: 0, len }, memory: PhantomData }
    }

    /// Length in bytes.
    #[inline]
    #[must_use]
    pub fn len(&self) -> usize {
        self.raw.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.raw.len == 0
    }

    /// The same buffer again, borrowed from this one.
    #[inline]
    pub(crate) fn reborrow(&mut self) -> IoBufMut<'_> {
        IoBufMut { raw: self.raw, memory: PhantomData }
    }

    /// The address, if this is known to be one area. It is valid for `'a`.
    #[inline]
    pub(crate) fn single(&mut self) -> Option<*mut u8> {
        self.raw.single()
    }

    /// The part `range` (bytes), borrowed from this one. Panics when it is out of bounds.
    #[must_use]
    pub fn slice(&mut self, range: Range<usize>) -> IoBufMut<'_> {
        IoBufMut { raw: self.raw.slice(range), memory: PhantomData }
    }

    /// Stores zeroes everywhere.
    pub fn fill_zero(&mut self) {
        // SAFETY: the areas are writable for 'a.
        self.raw.for_each(|_, base, len| unsafe { std::ptr::write_bytes(base, 0, len) });
    }

    /// Stores the bytes of `from`, which must be of the same length.
    pub fn copy_from(&mut self, from: &[u8]) {
        assert_eq!(from.len(), self.len());
        self.raw.for_each(|at, base, len| {
            // SAFETY: the areas are writable for 'a and `from` has `at + len` bytes; `from` cannot overlap them, since
            // nobody may hold a reference to them.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr().add(at), base, len) }
        });
    }

    /// Fills `out` with the memory areas, as far as they fit; returns how many. The addresses are valid for `'a`.
    pub fn fill_iovecs(&mut self, out: &mut [IoVec]) -> usize {
        self.raw.fill_iovecs(out)
    }
}

/// Areas that a request keeps by itself; longer lists are allocated.
const FEW: usize = 4;

enum List {
    One(IoVec),
    Few([IoVec; FEW], usize),
    Many(Box<[IoVec]>),
}

/// The memory of a request that goes on after the call that began it: areas that their owner has promised to keep.
pub struct Held {
    list: List,
    len: usize,
}

// SAFETY: as for `IoBuf` and `IoBufMut`.
unsafe impl Send for Held {}
// SAFETY: as above; a shared `Held` only reads.
unsafe impl Sync for Held {}

impl std::fmt::Debug for Held {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Held({} bytes)", self.len)
    }
}

impl Held {
    /// Memory that a request may use until it has ended, whatever becomes of the array `areas`.
    ///
    /// # Safety
    /// Until the request that is given this has ended, every area must stay readable; if it is a read, also writable, and
    /// no Rust reference to it may be used. The lengths must sum up without overflow (see [`iovecs_len`]).
    #[inline]
    #[must_use]
    pub unsafe fn new(areas: &[IoVec]) -> Self {
        if let [one] = areas
            && one.iov_len > 0
        {
            return Held { list: List::One(*one), len: one.iov_len };
        }
        let len = iovecs_len(areas).unwrap_or(0);
        let filled = areas.iter().filter(|area| area.iov_len > 0).copied();
        let count = filled.clone().count();
        let list = if count <= FEW {
            let mut few = [IoVec { iov_base: std::ptr::null_mut(), iov_len: 0 }; FEW];
            few.iter_mut().zip(filled).for_each(|(to, area)| *to = area);
            List::Few(few, count)
        } else {
            List::Many(filled.collect())
        };
        Held { list, len }
    }

    /// Length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no bytes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The areas that are not empty. They stay where they are as long as this value does.
    #[must_use]
    pub fn areas(&self) -> &[IoVec] {
        match &self.list {
            List::One(area) => std::slice::from_ref(area),
            List::Few(few, count) => few.get(..*count).unwrap_or_default(),
            List::Many(areas) => areas,
        }
    }

    /// The bytes, as the source of a write.
    #[must_use]
    pub fn source(&self) -> IoBuf<'_> {
        let raw = Raw { areas: Areas::Many(self.areas()), skip: 0, len: self.len };
        IoBuf { raw, memory: PhantomData }
    }

    /// The bytes, as the destination of a read.
    #[must_use]
    pub fn destination(&mut self) -> IoBufMut<'_> {
        let raw = Raw { areas: Areas::Many(self.areas()), skip: 0, len: self.len };
        IoBufMut { raw, memory: PhantomData }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_across_areas_keep_order() {
        let mut a = [1u8, 2, 3];
        let mut b = [];
        let mut c = [4u8, 5, 6, 7];
        let areas: Vec<IoVec> = [a.as_mut_slice(), b.as_mut_slice(), c.as_mut_slice()]
            .into_iter()
            .map(|s| IoVec { iov_base: s.as_mut_ptr().cast(), iov_len: s.len() })
            .collect();
        // SAFETY: the arrays outlive the buffers and are not used meanwhile.
        let buf = unsafe { IoBuf::from_iovecs(&areas) };
        let mut out = [0; 4];
        buf.slice(1..6).slice(1..5).copy_to(&mut out);
        assert_eq!(out, [3, 4, 5, 6]);
        // SAFETY: as above.
        let mut dst = unsafe { IoBufMut::from_iovecs(&areas) };
        dst.slice(2..5).copy_from(&[9, 8, 7]);
        dst.slice(6..7).fill_zero();
        assert_eq!((a, c), ([1, 2, 9], [8, 7, 6, 0]));
    }

    #[test]
    fn areas_beyond_the_room_are_left_out() {
        let bytes = [0u8; 8];
        let mut out = [IoVec { iov_base: std::ptr::null_mut(), iov_len: 0 }; 1];
        assert_eq!(IoBuf::new(&bytes).slice(2..7).fill_iovecs(&mut out), 1);
        assert_eq!(out[0].iov_len, 5);
        assert_eq!(IoBuf::new(&bytes).fill_iovecs(&mut []), 0);
    }

    #[test]
    fn long_lists_are_taken_in_parts() {
        // Every third area is empty.
        let bytes: Vec<u8> = (0..3000u32).map(|n| n as u8).collect();
        let mut pieces = bytes.chunks(2);
        let area = |n: usize| match n % 3 {
            0 => IoVec { iov_base: std::ptr::null_mut(), iov_len: 0 },
            _ => pieces.next().map(|p| IoVec { iov_base: p.as_ptr().cast_mut().cast(), iov_len: p.len() }).unwrap(),
        };
        let areas: Vec<IoVec> = (0..2250).map(area).collect();
        // SAFETY: the bytes outlive the buffer, which is only read.
        let buf = unsafe { IoBuf::from_iovecs(&areas) };
        assert_eq!(buf.len(), bytes.len());
        for room in [1, 7, 128, 1499, 1500, 4000] {
            let mut out = vec![IoVec { iov_base: std::ptr::null_mut(), iov_len: 0 }; room];
            // Begins and ends in the middle of areas.
            let (mut done, end) = (1, bytes.len() - 1);
            while done < end {
                let count = buf.slice(done..end).fill_iovecs(&mut out);
                assert_eq!(count, room.min((end - done).div_ceil(2) + usize::from(done == 1)));
                for area in &out[..count] {
                    assert_eq!(area.iov_base.cast_const().cast(), bytes[done..].as_ptr());
                    done += area.iov_len;
                }
            }
            assert_eq!(done, end);
        }
    }

    #[test]
    fn nothing_is_looked_at_once_enough_was_seen() {
        let bytes = [0u8; 4];
        let area = IoVec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
        let areas = [area; 100];
        // SAFETY: the bytes outlive the buffer, which is only read.
        let buf = unsafe { IoBuf::from_iovecs(&areas) };
        let mut seen = 0;
        buf.raw.for_each_until(|at, _, _| {
            seen += 1;
            if at < 40 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        });
        assert_eq!(seen, 11);
    }
}
