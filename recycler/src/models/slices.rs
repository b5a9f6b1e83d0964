//! Looks at slices without a lock, against whoever fills their places anew, or changes their entries.

use std::sync::Arc;

use super::{play, spawn};
use crate::format::l2::{COPIED, Entry};
use crate::format::subclusters::Subclusters;
use crate::metadata::slice::Entries as _;
use crate::metadata::slices::Slices;
use crate::metadata::ways::Layout;

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

/// A slice that somebody has locked stays what it is until he lets go.
pub(super) fn locks() {
    let slices = Arc::new(Slices::new(7, Layout::new(64, 1, 16)).unwrap());
    let fill = |slices: &Slices, key: u64| _ = slices.insert(key, &[(key << 16).to_be(); 64]);
    (0..7).for_each(|key| fill(&slices, key));
    let filler = {
        let slices = slices.clone();
        spawn(move || (7..16).for_each(|key| fill(&slices, key)))
    };
    for key in [0, 8, 1, 2] {
        let Some((slice, mut entries)) = slices.lock(key, || true) else { continue };
        for index in 0..3 {
            assert_eq!((slice.key(), entries.get(index).word), (key, key << 16), "slice {key} is another's");
            entries.set(index, Entry { word: 0, subclusters: Subclusters(0) });
            assert_eq!(entries.get(index).word, 0, "slice {key} was filled anew");
        }
    }
    filler.join().unwrap();
}

#[test]
fn a_slice_that_is_locked_keeps_its_place() {
    play("locks", 0.1, locks);
}

/// Entry `index` of a table that says that each cluster follows the one before, from `base` on.
fn follower(base: u64, index: u64) -> u64 {
    (base << 32 | index << 16) | COPIED
}

/// Who changed an entry sees it as it is, and so does everybody from then on, while others look for runs.
pub(super) fn runs() {
    let slices = Arc::new(Slices::new(7, Layout::new(64, 1, 16)).unwrap());
    let words: Vec<u64> = (0..64).map(|i| follower(1, i).to_be()).collect();
    let slice = slices.insert(0, &words).unwrap();
    let look = |slices: &Slices, index| slices.view(0).unwrap().word(index);
    let watchers: Vec<_> = (0..2)
        .map(|_| {
            let slices = slices.clone();
            spawn(move || {
                let seen = [0; 5].map(|_| look(&slices, 63) >> 32 & 0xf);
                assert!(seen.is_sorted(), "the entry was changed to 1, 2, 3 in this order, and seen as {seen:?}");
                assert_eq!(look(&slices, 7), follower(1, 7));
            })
        })
        .collect();
    for base in [2, 3] {
        slice.write().set(63, Entry { word: follower(base, 63), subclusters: Subclusters(0) });
        assert_eq!(look(&slices, 63), follower(base, 63), "who changed an entry sees another");
    }
    for watcher in watchers {
        watcher.join().unwrap();
    }
    assert_eq!(look(&slices, 63), follower(3, 63));
}

#[test]
fn a_look_without_a_lock_shows_an_entry_that_was_changed() {
    play("runs", 0.1, runs);
}
