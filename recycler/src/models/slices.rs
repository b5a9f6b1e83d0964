//! Looks at slices without a lock, against whoever fills their places anew.

use std::sync::Arc;

use super::{play, spawn};
use crate::metadata::slices::{Layout, Slices};

/// A look never shows another slice's entries.
pub(super) fn looks() {
    let slices = Arc::new(Slices::new(7, Layout::new(64, 1, 16)).unwrap());
    let fill = |slices: &Slices, key: u64| _ = slices.insert(key, &[key.to_be(); 64]);
    (0..7).for_each(|key| fill(&slices, key));
    let fillers: Vec<_> = [7..10u64, 0..2]
        .into_iter()
        .map(|keys| {
            let slices = slices.clone();
            spawn(move || {
                for key in keys {
                    if slices.get(key).is_none() {
                        fill(&slices, key);
                    }
                }
            })
        })
        .collect();
    for key in [0, 1, 7, 0, 8, 2] {
        if let Some(view) = slices.view(key) {
            let (first, last) = (view.word(0), view.word(63));
            assert!(!view.still() || (first, last) == (key, key), "a look at slice {key} shows {first} and {last}");
        }
    }
    for filler in fillers {
        filler.join().unwrap();
    }
}

#[test]
fn a_look_without_a_lock_never_shows_another_slice() {
    play("looks", 0.1, looks);
}
