//! Turns on ranges: two writers that want the same guest clusters wait for one another, others do not.

use std::ops::Range;

use crate::mutation::{Mutation, broken};
use crate::sync::{Mutex, Notify};

/// Ranges that somebody is working on.
#[derive(Default)]
pub(crate) struct Turns {
    state: Mutex<State>,
    released: Notify,
}

#[derive(Default)]
struct State {
    held: Vec<Range<u64>>,
    /// How many wait for a range to be released: as a rule none, and nobody needs to be told.
    waiting: usize,
}

/// A range that is held until this is dropped.
#[must_use]
pub(crate) struct Turn<'a> {
    turns: &'a Turns,
    range: Range<u64>,
}

impl Turns {
    /// Takes the range, unless somebody holds any part of it.
    pub(crate) fn try_take(&self, range: Range<u64>) -> Option<Turn<'_>> {
        self.take_from(&mut self.state.lock(), &range)
    }

    fn take_from(&self, state: &mut State, range: &Range<u64>) -> Option<Turn<'_>> {
        let free = !state.held.iter().any(|h| h.start < range.end && range.start < h.end);
        free.then(|| {
            state.held.push(range.clone());
            Turn { turns: self, range: range.clone() }
        })
    }

    /// Waits until nobody holds any part of the range, and takes it.
    pub(crate) async fn take(&self, range: Range<u64>) -> Turn<'_> {
        loop {
            let released = self.released.notified();
            tokio::pin!(released);
            {
                let mut state = self.state.lock();
                if let Some(turn) = self.take_from(&mut state, &range) {
                    return turn;
                }
                // Registered under the lock, so that a release after it is not missed.
                released.as_mut().enable();
                state.waiting += 1;
            }
            let _waiting = Waiting(self);
            if broken(Mutation::WaitForTurnUnregistered) {
                self.released.notified().await;
            } else {
                released.await;
            }
        }
    }
}

/// Somebody waits until this is dropped.
struct Waiting<'a>(&'a Turns);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.state.lock().waiting -= 1;
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let waiting = {
            let mut state = self.turns.state.lock();
            if let Some(at) = state.held.iter().position(|h| *h == self.range) {
                state.held.swap_remove(at);
            }
            state.waiting > 0
        };
        if waiting {
            self.turns.released.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[tokio::test]
    async fn overlapping_ranges_wait_and_others_do_not() {
        let turns = Arc::new(Turns::default());
        let first = turns.take(4..8).await;
        let other = turns.take(8..9).await;
        let waiting = tokio::spawn({
            let turns = turns.clone();
            async move { drop(turns.take(7..20).await) }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(first);
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(other);
        waiting.await.unwrap();
    }
}
