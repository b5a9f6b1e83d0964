//! Requests whose transfers have ended while nobody has looked: they hold back grace periods until somebody does.

use std::sync::{Arc, Weak};

use crate::sync::Mutex;

/// Somebody with requests in flight that end when they are looked at.
pub(crate) trait Straggler: Send + Sync {
    /// Looks. Returns whether there may be requests in flight of that kind still; never waits.
    fn poke(self: Arc<Self>) -> bool;
}

/// Those of one image.
#[derive(Default)]
pub(crate) struct Stragglers(Mutex<Vec<Weak<dyn Straggler>>>);

impl Stragglers {
    /// From now on, until it is gone, `straggler` is poked.
    pub(crate) fn join(&self, straggler: &Arc<dyn Straggler>) {
        let mut all = self.0.lock();
        all.retain(|one| one.strong_count() > 0);
        all.push(Arc::downgrade(straggler));
    }

    /// Pokes all. Returns whether it should be done again soon.
    pub(crate) fn poke(&self) -> bool {
        // Not under the lock: the last reference to one may be ours.
        let all = self.0.lock().clone();
        all.iter().filter_map(Weak::upgrade).fold(false, |again, one| one.poke() | again)
    }
}
