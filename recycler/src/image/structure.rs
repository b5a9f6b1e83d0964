//! What keeps the mapping still for those who need that: a resize, a check, a snapshot, a commit into a backing file, closing.
//!
//! Requests that change the mapping share it, and wait while somebody has frozen it. Those that make no future, a discard or the
//! first write to a cluster, do not even count themselves: they change entries of one slice, under its lock, and look there
//! whether [`Obstacle::Frozen`] is in the way. Who freezes puts it there, and *then* takes and releases the lock of every slice:
//! who has the lock before him has made his change, and who has it after him finds the obstacle, or, if it is gone again, looks
//! *then* whether the slice is still there.

use super::obstacles::{Obstacle, Obstacles};
use crate::metadata::l2::L2Cache;
use crate::mutation::{Mutation, broken};
use crate::sync::{AsyncRwLock, AsyncRwLockReadGuard, AsyncRwLockWriteGuard};

/// See the module.
#[derive(Default)]
pub(crate) struct Structure(AsyncRwLock<()>);

/// The mapping stands still until this is dropped.
#[must_use]
pub(crate) struct Frozen<'a> {
    obstacles: &'a Obstacles,
    _guard: AsyncRwLockWriteGuard<'a, ()>,
}

impl Structure {
    /// Keeps the mapping from being frozen; waits while it is.
    pub(super) async fn share(&self) -> AsyncRwLockReadGuard<'_, ()> {
        self.0.read().await
    }

    /// The same, unless it is frozen or about to be.
    pub(super) fn try_share(&self) -> Option<AsyncRwLockReadGuard<'_, ()>> {
        self.0.try_read().ok()
    }

    /// Freezes the mapping. One at a time does so: it has the recycler's turn.
    pub(crate) async fn freeze<'a>(&'a self, obstacles: &'a Obstacles, slices: &L2Cache) -> Frozen<'a> {
        let guard = self.0.write().await;
        obstacles.put(Obstacle::Frozen);
        if !broken(Mutation::FreezeUnlocked) {
            slices.pass_locks();
        }
        Frozen { obstacles, _guard: guard }
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        self.obstacles.take(Obstacle::Frozen);
    }
}
