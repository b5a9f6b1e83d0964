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

/// A small number that is this thread's own as long as there are fewer than `count` threads.
#[cfg(not(all(test, feature = "models")))]
#[inline]
pub(crate) fn thread_number(count: usize) -> usize {
    use atomic::{AtomicUsize, Ordering};
    use std::cell::Cell;

    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static MINE: Cell<usize> = const { Cell::new(usize::MAX) });
    MINE.with(|mine| {
        if mine.get() == usize::MAX {
            mine.set(NEXT.fetch_add(1, Ordering::Relaxed));
        }
        mine.get()
    }) % count
}

/// The same where threads are not threads.
#[cfg(all(test, feature = "models"))]
pub(crate) fn thread_number(count: usize) -> usize {
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
