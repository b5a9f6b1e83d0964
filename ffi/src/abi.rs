//! Structs that grow: both sides say how large theirs is.
//!
//! A program compiled against an older header passes a shorter struct, one compiled against a newer header a longer
//! one. Each shared struct starts with its size in bytes, as the program knows it.

use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;

use crate::error::Fault;

/// No struct of ours will ever be longer: a larger size is garbage, and nothing that far is read or written.
const MAX_SIZE: usize = 4096;

/// A struct shared with C.
///
/// # Safety
/// `repr(C)`, without padding bytes, starts with a `u32` size, and all zeroes is a valid value.
pub(crate) unsafe trait Shared: Copy {
    /// The name in messages.
    const NAME: &'static str;
    /// The size in bytes of the first released version: every program's struct is at least that long. It stays what it
    /// is when members are added.
    const MIN_SIZE: usize = size_of::<Self>();

    /// All zeroes.
    fn zeroed() -> Self {
        // SAFETY: all zeroes is a valid value, says the trait.
        unsafe { MaybeUninit::zeroed().assume_init() }
    }
}

/// The size that the program gave its struct, checked.
///
/// # Safety
/// `theirs` is NULL or points at as many readable bytes as its first member says.
#[inline]
unsafe fn size_of_theirs<T: Shared>(theirs: *const T) -> Result<usize, Fault> {
    if theirs.is_null() {
        return Err(Fault::null(T::NAME));
    }
    // SAFETY: the caller has at least the size member there; it need not be aligned.
    let size = unsafe { theirs.cast::<u32>().read_unaligned() } as usize;
    if size == size_of::<T>() { Ok(size) } else { other_size::<T>(size) }
}

/// The size of a struct of another version than this one, checked.
#[cold]
fn other_size<T: Shared>(size: usize) -> Result<usize, Fault> {
    if size < T::MIN_SIZE {
        let reason = format!("struct_size is {size}, less than the {} of the first version", T::MIN_SIZE);
        return Err(Fault::argument(T::NAME, reason));
    }
    if size > MAX_SIZE {
        return Err(Fault::new(libc::E2BIG, format!("struct_size of {} is {size}", T::NAME)).field(T::NAME));
    }
    Ok(size)
}

/// A copy of the program's struct. What a shorter one lacks is zero; what a longer one has beyond ours must be zero,
/// since it asks for something that this version does not know.
///
/// # Safety
/// `theirs` is NULL or points at as many readable bytes as its first member says.
pub(crate) unsafe fn copy_in<T: Shared>(theirs: *const T) -> Result<T, Fault> {
    // SAFETY: as promised by the caller.
    let size = unsafe { size_of_theirs(theirs)? };
    let known = size.min(size_of::<T>());
    for at in known..size {
        // SAFETY: `at` is less than `size`, and so many bytes are readable.
        if unsafe { theirs.cast::<u8>().add(at).read() } != 0 {
            let reason = format!("{} asks for something newer than this library (byte {at})", T::NAME);
            return Err(Fault::new(libc::E2BIG, reason).field(T::NAME));
        }
    }
    let mut ours = T::zeroed();
    // SAFETY: `known` bytes are readable there and fit here; any bytes are a valid `T` where its fields are integers,
    // and where they are pointers the program must give good ones anyway.
    unsafe { std::ptr::copy_nonoverlapping(theirs.cast::<u8>(), (&raw mut ours).cast::<u8>(), known) };
    Ok(ours)
}

/// A struct of the program's that will be filled on success.
pub(crate) struct Out<T> {
    theirs: *mut T,
    size: usize,
}

impl<T: Shared> Out<T> {
    /// Checks that a struct can be filled, before anything is done.
    ///
    /// # Safety
    /// `theirs` is NULL or points at as many writable bytes as its first member says, until [`store`](Self::store).
    #[inline]
    pub(crate) unsafe fn new(theirs: *mut T) -> Result<Self, Fault> {
        // SAFETY: as promised by the caller.
        let size = unsafe { size_of_theirs(theirs.cast_const())? };
        Ok(Out { theirs, size })
    }

    /// As [`new`](Self::new), for a result that the program may not want: then it passes NULL.
    ///
    /// # Safety
    /// As there.
    #[inline]
    pub(crate) unsafe fn optional(theirs: *mut T) -> Result<Option<Self>, Fault> {
        // SAFETY: as promised by the caller.
        if theirs.is_null() { Ok(None) } else { unsafe { Self::new(theirs) }.map(Some) }
    }

    /// Fills the struct but for its size; what a longer one has beyond ours becomes zero.
    pub(crate) fn store(self, ours: T) {
        const SIZE: usize = size_of::<u32>();
        let known = self.size.min(size_of::<T>());
        let (to, from) = (self.theirs.cast::<u8>(), (&raw const ours).cast::<u8>());
        // SAFETY: `size` bytes are writable there, by `new`; `known` is at least the size of the first version, which
        // has the size member, and at most the size of `ours`, which has no padding.
        unsafe {
            std::ptr::copy_nonoverlapping(from.add(SIZE), to.add(SIZE), known - SIZE);
            std::ptr::write_bytes(to.add(known), 0, self.size - known);
        }
    }
}

/// Refuses bits that this version gives no meaning.
pub(crate) fn known_flags(given: u32, known: u32) -> Result<(), Fault> {
    if given & !known == 0 {
        return Ok(());
    }
    Err(Fault::argument("flags", format!("{given:#x} has unknown bits (known: {known:#x})")))
}

/// A string argument.
///
/// # Safety
/// `text` is NULL or ends with a zero byte, and stays unchanged for `'a`.
pub(crate) unsafe fn string<'a>(name: &'static str, text: *const c_char) -> Result<&'a CStr, Fault> {
    if text.is_null() {
        return Err(Fault::null(name));
    }
    // SAFETY: as promised by the caller.
    Ok(unsafe { CStr::from_ptr(text) })
}

/// As [`string`], for text that must be UTF-8.
///
/// # Safety
/// As there.
pub(crate) unsafe fn text<'a>(name: &'static str, text: *const c_char) -> Result<&'a str, Fault> {
    // SAFETY: as promised by the caller.
    unsafe { string(name, text)? }.to_str().map_err(|_| Fault::argument(name, "is not UTF-8"))
}

/// Fills an array with as much of `text` as fits before the closing zero byte, cut between characters.
pub(crate) fn store_text(out: &mut [c_char], text: &str) {
    let room = out.len().saturating_sub(1);
    let fits = text.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|&end| end <= room).last().unwrap_or(0);
    out.fill(0);
    for (to, from) in out.iter_mut().zip(text.bytes().take(fits)) {
        // A zero byte would make C see less than there is.
        *to = c_char::from_ne_bytes([if from == 0 { b'?' } else { from }]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Copy, PartialEq, Debug)]
    #[repr(C)]
    struct Ours {
        struct_size: u32,
        first: u32,
        later: u32,
    }
    // SAFETY: three integers.
    unsafe impl Shared for Ours {
        const NAME: &'static str = "ours";
        const MIN_SIZE: usize = 8;
    }

    #[test]
    fn shorter_and_longer_structs_are_read() {
        for (size, tail, want) in [(8u32, 7, Ok(0)), (12, 7, Ok(7)), (16, 7, Ok(7)), (4, 7, Err(22)), (5000, 7, Err(7))]
        {
            let theirs = [size, 5, tail, 0];
            // SAFETY: as many bytes as the size says, or the size is refused.
            let got = unsafe { copy_in(theirs.as_ptr().cast::<Ours>()) };
            assert_eq!(got.map(|o| o.later).map_err(|f| f.errno()), want, "{size}");
        }
        let theirs = [16u32, 5, 7, 1];
        // SAFETY: as above.
        let got = unsafe { copy_in(theirs.as_ptr().cast::<Ours>()) };
        assert_eq!(got.unwrap_err().errno(), libc::E2BIG);
    }

    #[test]
    fn shorter_and_longer_structs_are_filled() {
        for (size, want) in [(8u32, [8, 5, 9, 9]), (12, [12, 5, 6, 9]), (16, [16, 5, 6, 0])] {
            let mut theirs = [size, 9, 9, 9];
            // SAFETY: as many bytes as the size says.
            let out = unsafe { Out::new(theirs.as_mut_ptr().cast::<Ours>()) }.unwrap();
            out.store(Ours { struct_size: 0, first: 5, later: 6 });
            assert_eq!(theirs, want);
        }
    }

    #[test]
    fn text_is_cut_between_characters() {
        let mut out = [1; 4];
        store_text(&mut out, "aéé");
        assert_eq!(out.map(|c| c.to_ne_bytes()[0]), [b'a', 0xc3, 0xa9, 0]);
        store_text(&mut out, "a\0b");
        assert_eq!(out.map(|c| c.to_ne_bytes()[0]), *b"a?b\0");
    }
}
