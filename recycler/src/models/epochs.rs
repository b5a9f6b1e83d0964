//! Requests in flight against whoever awaits their end.

use std::sync::Arc;

use super::{block_on, play, spawn};
use crate::clusters::epochs::Epochs;
use crate::mutation::{Mutation, broken};
use crate::sync::atomic::{AtomicBool, Ordering};

/// A freed cluster is overwritten only when no request can be using it, whether the end of a grace period is awaited or
/// asked for.
pub(super) fn reuse() {
    let epochs = Arc::new(Epochs::default());
    let overwritten = Arc::new(AtomicBool::new(false));
    // Somebody else asks as well, so that the epoch advances at any time, for instance while the request enters.
    let asker = spawn({
        let epochs = epochs.clone();
        move || _ = epochs.elapsed(epochs.now())
    });
    let request = epochs.enter();
    // The request has found the cluster; now it is unlinked.
    let recycler = spawn({
        let (epochs, overwritten) = (epochs.clone(), overwritten.clone());
        move || {
            let ticket = epochs.now();
            if !broken(Mutation::ReuseWithoutGrace) && !(0..4).any(|_| epochs.elapsed(ticket)) {
                block_on(epochs.grace());
            }
            overwritten.store(true, Ordering::SeqCst);
        }
    });
    for _ in 0..10 {
        assert!(!overwritten.load(Ordering::SeqCst), "overwritten while a request that found it is in flight");
    }
    drop(request);
    recycler.join().unwrap();
    asker.join().unwrap();
}

/// Several who await a grace period at once are all woken up.
pub(super) fn waiters() {
    let epochs = Arc::new(Epochs::default());
    let request = epochs.enter();
    let waiting: Vec<_> = (0..2)
        .map(|_| {
            let epochs = epochs.clone();
            spawn(move || block_on(epochs.grace()))
        })
        .collect();
    let others = spawn({
        let epochs = epochs.clone();
        move || drop(epochs.enter())
    });
    drop(request);
    for thread in waiting {
        thread.join().unwrap();
    }
    others.join().unwrap();
}

#[test]
fn freed_clusters_are_not_overwritten_under_requests() {
    play("freed_clusters", 0.1, reuse);
}

#[test]
fn every_waiter_for_a_grace_period_is_woken() {
    play("grace_waiters", 0.05, waiters);
}
