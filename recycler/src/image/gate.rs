//! The gate that requests which change the disk pass before they are in flight.
//!
//! Writes in place take no lock, so whoever needs that nobody writes closes the gate, and then awaits a grace period:
//! requests that were in flight end, and later ones wait outside, where no grace period waits for them.
//!
//! A request enters its epoch and then looks at the gate; who closes it does so and then looks at the epoch. So a request
//! that found the gate open is one that the grace period waits for.

use crate::mutation::{Mutation, broken};
use crate::sync::Notify;
use crate::sync::atomic::{AtomicBool, Ordering};

/// Open, unless somebody has closed it.
#[derive(Default)]
pub(crate) struct Gate {
    closed: AtomicBool,
    opened: Notify,
}

/// The gate is closed until this is dropped.
#[must_use]
pub(crate) struct Closed<'a>(&'a Gate);

impl Gate {
    #[inline]
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    /// Closes the gate. One at a time does so.
    pub(crate) fn close(&self) -> Closed<'_> {
        self.closed.store(!broken(Mutation::SnapshotUnderWrites), Ordering::SeqCst);
        Closed(self)
    }

    /// Waits until the gate is open. The caller is not in flight.
    #[cold]
    pub(crate) async fn passed(&self) {
        loop {
            let opened = self.opened.notified();
            tokio::pin!(opened);
            // Registered before looking, so that no opening is missed.
            opened.as_mut().enable();
            if !self.is_closed() {
                return;
            }
            opened.await;
        }
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.0.closed.store(false, Ordering::SeqCst);
        self.0.opened.notify_waiters();
    }
}
