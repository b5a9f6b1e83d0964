//! What threads share: locks, atomics, notifications. The engine (everything below `blocking` and `queue`, which hand work to
//! threads of the system) takes them from here and from nowhere else, so that they can be exchanged for those of a model
//! checker.
//!
//! In every build but one these are the types of `parking_lot`, `std` and `tokio` themselves, by other names. In the crate's
//! own unit tests with the feature `models` they are those of [shuttle], which runs all threads of a test in one, decides
//! before each operation which goes on, and so plays thousands of interleavings of the real code: see `models`.
//!
//! **A new piece of the engine that several threads use** imports from here, and gets a model: `models/mod.rs` says how.
//!
//! [shuttle]: https://docs.rs/shuttle

#[cfg(not(all(test, feature = "models")))]
mod types {
    pub(crate) use parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
    pub(crate) use std::sync::atomic;
    pub(crate) use tokio::sync::{Mutex as AsyncMutex, Notify, RwLock as AsyncRwLock};
}

#[cfg(all(test, feature = "models"))]
mod types {
    pub(crate) use super::exchanged::{AsyncMutex, AsyncRwLock, Notify};
    pub(crate) use shuttle::sync::atomic;
    pub(crate) use shuttle_parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard};
}

pub(crate) use tokio::sync::{
    MutexGuard as AsyncMutexGuard, RwLockReadGuard as AsyncRwLockReadGuard, RwLockWriteGuard as AsyncRwLockWriteGuard,
};
pub(crate) use types::*;

/// One of `count` places, at most 64. Each but the last is one thread's own, until it ends; those that come too late share the
/// last.
#[cfg(not(all(test, feature = "models")))]
#[inline]
pub(crate) fn thread_place(count: usize) -> usize {
    places::mine().min(count - 1)
}

#[cfg(not(all(test, feature = "models")))]
mod places {
    use std::cell::Cell;
    use std::sync::atomic::{AtomicU64, Ordering};

    const NOT_ASKED: usize = usize::MAX;
    const NONE: usize = 64;

    static TAKEN: AtomicU64 = AtomicU64::new(0);

    /// Gives the thread's place back when the thread ends.
    struct GiveBack;

    impl Drop for GiveBack {
        fn drop(&mut self) {
            // Who takes it next sees what this thread did there.
            let place = MINE.replace(NONE);
            TAKEN.fetch_and(!(1u64.checked_shl(place as u32).unwrap_or(0)), Ordering::Release);
        }
    }

    thread_local! {
        static MINE: Cell<usize> = const { Cell::new(NOT_ASKED) };
        static GIVE_BACK: GiveBack = const { GiveBack };
    }

    #[inline]
    pub(super) fn mine() -> usize {
        let place = MINE.get();
        if place == NOT_ASKED { take() } else { place }
    }

    #[cold]
    fn take() -> usize {
        MINE.set(NONE);
        // A thread that is ending already has nobody to give it back.
        if GIVE_BACK.try_with(|_| ()).is_ok() {
            let free = |taken: u64| (taken != u64::MAX).then(|| taken | (taken + 1));
            if let Ok(before) = TAKEN.fetch_update(Ordering::Acquire, Ordering::Relaxed, free) {
                MINE.set(before.trailing_ones() as usize);
            }
        }
        MINE.get()
    }
}

/// The same where threads are not threads.
#[cfg(all(test, feature = "models"))]
pub(crate) fn thread_place(count: usize) -> usize {
    usize::from(shuttle::current::me()) % count
}

/// tokio's own types again, with a point at which the model checker may go on with another thread before each operation:
/// what happens inside one operation is tokio's business, and a single step here.
#[cfg(all(test, feature = "models"))]
mod exchanged {
    use shuttle::sync::atomic::{AtomicBool, Ordering};
    use tokio::sync::futures::Notified;
    use tokio::sync::{MutexGuard, RwLockReadGuard, RwLockWriteGuard, TryLockError};

    fn point() {
        AtomicBool::new(false).load(Ordering::SeqCst);
    }

    #[derive(Debug, Default)]
    pub(crate) struct Notify(tokio::sync::Notify);

    impl Notify {
        pub(crate) fn notified(&self) -> Notified<'_> {
            point();
            self.0.notified()
        }

        pub(crate) fn notify_waiters(&self) {
            point();
            self.0.notify_waiters();
        }

        pub(crate) fn notify_one(&self) {
            point();
            self.0.notify_one();
        }
    }

    #[derive(Debug, Default)]
    pub(crate) struct AsyncMutex<T>(tokio::sync::Mutex<T>);

    impl<T> AsyncMutex<T> {
        pub(crate) fn new(value: T) -> Self {
            AsyncMutex(tokio::sync::Mutex::new(value))
        }

        pub(crate) async fn lock(&self) -> MutexGuard<'_, T> {
            point();
            self.0.lock().await
        }

        pub(crate) fn try_lock(&self) -> Result<MutexGuard<'_, T>, TryLockError> {
            point();
            self.0.try_lock()
        }
    }

    #[derive(Debug, Default)]
    pub(crate) struct AsyncRwLock<T>(tokio::sync::RwLock<T>);

    impl<T> AsyncRwLock<T> {
        pub(crate) async fn read(&self) -> RwLockReadGuard<'_, T> {
            point();
            self.0.read().await
        }

        pub(crate) fn try_read(&self) -> Result<RwLockReadGuard<'_, T>, TryLockError> {
            point();
            self.0.try_read()
        }

        pub(crate) async fn write(&self) -> RwLockWriteGuard<'_, T> {
            point();
            self.0.write().await
        }
    }
}
