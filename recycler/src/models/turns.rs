//! Writers that want the same guest clusters.

use std::sync::Arc;

use super::{block_on, play, spawn};
use crate::image::turns::Turns;
use crate::sync::atomic::{AtomicBool, Ordering};

/// Who has the turn has the clusters to itself, and everybody gets it in the end.
pub(super) fn exclusion() {
    let turns = Arc::new(Turns::default());
    let busy: Arc<[AtomicBool; 4]> = Arc::default();
    let threads: Vec<_> = [0..2, 1..3, 0..3]
        .into_iter()
        .map(|range| {
            let (turns, busy) = (turns.clone(), busy.clone());
            spawn(move || {
                for _ in 0..2 {
                    let _turn = block_on(turns.take(range.clone()));
                    for cluster in range.clone() {
                        assert!(!busy[cluster as usize].swap(true, Ordering::SeqCst), "two have a turn on one cluster");
                    }
                    for cluster in range.clone() {
                        busy[cluster as usize].store(false, Ordering::SeqCst);
                    }
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn a_turn_is_had_by_one_at_a_time_and_by_everybody_in_the_end() {
    play("turns", 0.05, exclusion);
}
