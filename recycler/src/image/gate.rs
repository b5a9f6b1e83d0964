//! The gate that requests which change the disk pass before they are in flight.
//!
//! Writes in place take no lock, so whoever needs that nobody writes closes the gate, and then awaits a grace period:
//! requests that were in flight end, and later ones wait outside, where no grace period waits for them.
//!
//! A request enters its epoch and then looks at the gate; who closes it does so and then looks at the epoch. So a request
//! that found the gate open is one that the grace period waits for.

use super::obstacles::{Obstacle, Obstacles};
use crate::mutation::{Mutation, broken};
use crate::sync::Notify;

/// Open, unless somebody has closed it: then it stands among the obstacles.
#[derive(Default)]
pub(crate) struct Gate {
    opened: Notify,
}

/// The gate is closed until this is dropped.
#[must_use]
pub(crate) struct Closed<'a>(&'a Gate, &'a Obstacles);

impl Gate {
    /// Closes the gate. One at a time does so.
    pub(crate) fn close<'a>(&'a self, obstacles: &'a Obstacles) -> Closed<'a> {
        if !broken(Mutation::SnapshotUnderWrites) {
            obstacles.put(Obstacle::Gate);
        }
        Closed(self, obstacles)
    }

    /// Waits until the gate is open. The caller is not in flight.
    #[cold]
    pub(crate) async fn passed(&self, obstacles: &Obstacles) {
        loop {
            let opened = self.opened.notified();
            tokio::pin!(opened);
            // Registered before looking, so that no opening is missed.
            opened.as_mut().enable();
            if !obstacles.has(Obstacle::Gate) {
                return;
            }
            opened.await;
        }
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.1.take(Obstacle::Gate);
        self.0.opened.notify_waiters();
    }
}
