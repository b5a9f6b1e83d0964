//! What stands in the way of requests, in one word: a request looks once, and as a rule finds nothing.

use crate::sync::atomic::{AtomicU8, Ordering};

/// Something that a request must heed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Obstacle {
    /// The image is closed: nothing may begin any more.
    Closed = 1,
    /// The disk may not be changed.
    ReadOnly = 2,
    /// The [gate](super::gate) is closed: changes wait.
    Gate = 4,
    /// A bitmap records what is changed.
    Recording = 8,
    /// The mapping stands still (see [`structure`](super::structure)).
    Frozen = 16,
}

/// What stands in the way now.
#[derive(Default)]
pub(crate) struct Obstacles(AtomicU8);

impl Obstacles {
    /// Puts it in the way; returns whether it stood there already.
    pub(crate) fn put(&self, obstacle: Obstacle) -> bool {
        self.0.fetch_or(obstacle as u8, Ordering::SeqCst) & obstacle as u8 != 0
    }

    /// Takes it out of the way.
    pub(crate) fn take(&self, obstacle: Obstacle) {
        self.0.fetch_and(!(obstacle as u8), Ordering::SeqCst);
    }

    /// Whether this one stands in the way.
    #[inline]
    pub(crate) fn has(&self, obstacle: Obstacle) -> bool {
        self.0.load(Ordering::SeqCst) & obstacle as u8 != 0
    }

    /// Whether there is none.
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.load(Ordering::SeqCst) == 0
    }
}
