//! The turn of whoever moves, erases or cuts off clusters, or needs that nobody does: one at a time has it.

use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{AsyncMutex, AsyncMutexGuard};

/// See the module.
#[derive(Default)]
pub(crate) struct CompactionTurn {
    lock: AsyncMutex<()>,
    waiting: AtomicUsize,
}

/// Somebody waits.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl CompactionTurn {
    /// For the recycler's own work, which can wait.
    pub(crate) async fn take(&self) -> AsyncMutexGuard<'_, ()> {
        self.lock.lock().await
    }

    /// For who has called for something else, and waits for that.
    pub(crate) async fn take_soon(&self) -> AsyncMutexGuard<'_, ()> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.waiting);
        self.lock.lock().await
    }

    /// Whether somebody wants it soon: who has it should not dawdle.
    pub(crate) fn is_wanted(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }
}
