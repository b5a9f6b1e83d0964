//! Memory for many words at once, zero at first, and next to one another, so that the place of one is computed.

#[cfg(not(all(test, feature = "models")))]
pub(super) use memory::Words;

/// What a model checker watches is more than memory.
#[cfg(all(test, feature = "models"))]
pub(super) struct Words(Box<[crate::sync::atomic::AtomicU64]>);

#[cfg(all(test, feature = "models"))]
impl Words {
    pub(super) fn new(len: usize) -> Option<Words> {
        Some(Words(std::iter::repeat_with(crate::sync::atomic::AtomicU64::default).take(len).collect()))
    }
}

#[cfg(all(test, feature = "models"))]
impl std::ops::Deref for Words {
    type Target = [crate::sync::atomic::AtomicU64];

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

#[cfg(not(all(test, feature = "models")))]
#[allow(unsafe_code)]
mod memory {
    use std::alloc::{Layout, alloc_zeroed, dealloc};
    use std::ops::Deref;
    use std::ptr::{NonNull, null_mut};

    use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

    use crate::sync::atomic::AtomicU64;

    /// Where there are many words, the system is asked for each page when it is first touched, so that the others cost nothing.
    pub(crate) struct Words {
        start: NonNull<AtomicU64>,
        len: usize,
        owner: Owner,
    }

    enum Owner {
        Heap(Layout),
        Mapping,
    }

    /// From so many bytes on, a mapping; miri does not know all of what that takes.
    const MAPPED: usize = if cfg!(miri) { usize::MAX } else { 256 << 10 };

    // SAFETY: this owns the words, which are atomics.
    unsafe impl Send for Words {}
    // SAFETY: as above.
    unsafe impl Sync for Words {}

    impl Words {
        /// `None`: the system has not so much.
        pub(crate) fn new(len: usize) -> Option<Words> {
            let bytes = len.checked_mul(size_of::<AtomicU64>())?;
            if bytes < MAPPED {
                let layout = Layout::array::<AtomicU64>(len).ok()?;
                if len == 0 {
                    return Some(Words { start: NonNull::dangling(), len, owner: Owner::Heap(layout) });
                }
                // SAFETY: the layout is not empty.
                let start = NonNull::new(unsafe { alloc_zeroed(layout) })?;
                return Some(Words { start: start.cast(), len, owner: Owner::Heap(layout) });
            }
            let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
            // SAFETY: a new mapping, at a place of the system's choosing, touches no memory that anybody has.
            let start = unsafe { mmap_anonymous(null_mut(), bytes, protection, flags) }.ok()?;
            let start = NonNull::new(start)?;
            // Only a hint: with larger pages, look-ups all over the words are faster.
            // SAFETY: the mapping is ours, and the advice does not change what is in it.
            let _ = unsafe { madvise(start.as_ptr(), bytes, Advice::LinuxHugepage) };
            Some(Words { start: start.cast(), len, owner: Owner::Mapping })
        }
    }

    impl Deref for Words {
        type Target = [AtomicU64];

        #[inline]
        fn deref(&self) -> &[AtomicU64] {
            // SAFETY: so many zeroed words start there, which an AtomicU64 may be, and they are this's own until it is dropped.
            unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
        }
    }

    impl Drop for Words {
        fn drop(&mut self) {
            match self.owner {
                Owner::Heap(_) if self.len == 0 => {}
                // SAFETY: what `new` was given for this layout.
                Owner::Heap(layout) => unsafe { dealloc(self.start.as_ptr().cast(), layout) },
                Owner::Mapping => {
                    // SAFETY: the mapping that `new` made, of this length; nobody has a reference into it any more.
                    let _ = unsafe { munmap(self.start.as_ptr().cast(), self.len * size_of::<AtomicU64>()) };
                }
            }
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;
        use crate::sync::atomic::Ordering;

        #[test]
        fn words_are_zero_and_keep_what_is_stored() {
            for len in [0, 1, 100, 32 << 10, 100_000] {
                let words = Words::new(len).unwrap();
                assert_eq!(words.len(), len);
                for (i, word) in words.iter().enumerate().step_by(511) {
                    assert_eq!(word.swap(i as u64, Ordering::Relaxed), 0);
                }
                assert!(words.iter().enumerate().step_by(511).all(|(i, w)| w.load(Ordering::Relaxed) == i as u64));
            }
        }
    }
}
