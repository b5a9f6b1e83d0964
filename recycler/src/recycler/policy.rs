//! What the recycler does next: a pure function of what it sees.

use std::time::Duration;

/// What the recycler sees. Sizes are in bytes, times since the image was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct View {
    pub(crate) now: Duration,
    pub(crate) junk: u64,
    pub(crate) erased: u64,
    pub(crate) available: u64,
    /// How much Junk may still take space of the host that could be given back.
    pub(crate) occupied: u64,
    /// Whether clusters are free at the end of the file, pool included.
    pub(crate) free_tail: u64,
    /// Since when something waits for a flush: unlinked clusters to become Junk, erased ones to become Available.
    pub(crate) unflushed_since: Option<Duration>,
    /// Since when Junk has not become more.
    pub(crate) junk_stands_since: Duration,
    /// Since when there has been enough Junk for a compaction, none having been made.
    pub(crate) junk_waits_since: Option<Duration>,
    /// How much was Junk when erasing it was not possible.
    pub(crate) junk_unerasable: u64,
    /// How much was Junk when the last compaction ended without being able to use it.
    pub(crate) junk_useless: u64,
    /// When the last piece of work failed, it is not tried again before this.
    pub(crate) not_before: Duration,
    /// Whether the refcounts were searched for clusters that were free when the image was opened.
    pub(crate) junk_is_complete: bool,
}

/// How the recycler behaves: from [`Options`](crate::Options).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rules {
    pub(crate) keep_erased: u64,
    pub(crate) compact_after_unmaps: Option<u64>,
    pub(crate) settle_time: Duration,
    pub(crate) flush_after: Duration,
    pub(crate) cluster_size: u64,
}

impl Rules {
    /// Whether so many bytes of Junk are worth a compaction.
    pub(crate) fn is_much(&self, junk: u64) -> bool {
        self.compact_after_unmaps.is_some_and(|limit| junk > limit)
    }
}

/// The next piece of work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// Look for clusters that were free when the image was opened.
    FindJunk,
    /// Overwrite so many bytes of Junk with zeroes.
    Erase(u64),
    /// Flush.
    Flush,
    /// Move clusters from the end of the file into holes, and cut the file.
    Compact,
    /// Cut off what is free at the end.
    Shorten,
    /// Give the space of about so many bytes of Junk back to the host.
    Punch(u64),
    /// Nothing before this time, unless something changes.
    WaitUntil(Duration),
    /// Nothing until something changes.
    Wait,
}

/// The most that is erased in one piece of work.
pub(crate) const ERASE_STEP: u64 = 8 << 20;

/// The least that is given back, in clusters: many small holes cost more than their space.
const PUNCH_LEAST: u64 = 16;
/// So much is given back even while discards go on. It is also the most in one piece of work.
const PUNCH_MUCH: u64 = 64 << 20;

/// Discards that never settle put a compaction off for at most so many times the time that they are given to.
const PATIENCE: u32 = 12;

/// Chooses the next piece of work.
pub(crate) fn next(view: &View, rules: &Rules) -> Work {
    if view.now < view.not_before {
        return Work::WaitUntil(view.not_before);
    }
    if !view.junk_is_complete {
        return Work::FindJunk;
    }
    // First the pool: a guest write that finds it empty has to grow the file.
    let pool = view.erased + view.available;
    let shortfall = rules.keep_erased.saturating_sub(pool).min(view.junk).min(ERASE_STEP);
    if shortfall >= rules.cluster_size && view.junk != view.junk_unerasable {
        return Work::Erase(shortfall);
    }
    let mut wait: Option<Duration> = None;
    let mut due = |at: Duration| {
        if at <= view.now {
            return true;
        }
        wait = Some(wait.map_or(at, |w| w.min(at)));
        false
    };
    if view.unflushed_since.is_some_and(|since| due(since.saturating_add(rules.flush_after))) {
        return Work::Flush;
    }
    // Then compaction, once discards have settled: what is freed in the middle of a burst would be moved for nothing.
    let wanted = rules.is_much(view.junk) && view.junk != view.junk_useless;
    let settled = view.junk_stands_since.saturating_add(rules.settle_time);
    let latest = view.junk_waits_since.map(|since| since.saturating_add(rules.settle_time.saturating_mul(PATIENCE)));
    if wanted && due(latest.map_or(settled, |latest| latest.min(settled))) {
        return Work::Compact;
    }
    // And the end of the file, when more is free there than growing again would cost.
    if !wanted
        && rules.compact_after_unmaps.is_some()
        && view.free_tail > rules.keep_erased.max(rules.cluster_size)
        && due(settled)
    {
        return Work::Shorten;
    }
    // What stays in the file for now need not take space. (Compaction would move clusters there, or cut it off.)
    if !wanted && view.occupied >= PUNCH_LEAST * rules.cluster_size && (view.occupied >= PUNCH_MUCH || due(settled)) {
        return Work::Punch(view.occupied.min(PUNCH_MUCH));
    }
    wait.map_or(Work::Wait, Work::WaitUntil)
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: fn(u64) -> Duration = Duration::from_secs;

    fn rules() -> Rules {
        Rules {
            keep_erased: 1 << 20,
            compact_after_unmaps: Some(4 << 20),
            settle_time: S(5),
            flush_after: S(5),
            cluster_size: 65536,
        }
    }

    fn searched() -> View {
        View { junk_is_complete: true, ..View::default() }
    }

    #[test]
    fn free_clusters_are_found_first() {
        assert_eq!(next(&View::default(), &rules()), Work::FindJunk);
    }

    #[test]
    fn nothing_to_do_is_no_timer() {
        assert_eq!(next(&View { now: S(100), available: 1 << 20, ..searched() }, &rules()), Work::Wait);
    }

    #[test]
    fn the_pool_comes_first() {
        let view = View { now: S(100), junk: 100 << 20, available: 1 << 19, ..searched() };
        assert_eq!(next(&view, &rules()), Work::Erase(1 << 19));
        // Less than a cluster short is not short.
        let view = View { available: (1 << 20) - 512, ..view };
        assert_eq!(next(&view, &rules()), Work::Compact);
        // No Junk, nothing to erase.
        assert_eq!(next(&View { junk: 0, available: 0, ..view }, &rules()), Work::Wait);
        // In bounded steps.
        let big = Rules { keep_erased: 1 << 40, ..rules() };
        assert_eq!(next(&View { available: 0, ..view }, &big), Work::Erase(ERASE_STEP));
    }

    #[test]
    fn compaction_waits_until_discards_have_settled() {
        let view = View { now: S(100), junk: 5 << 20, available: 1 << 20, junk_stands_since: S(97), ..searched() };
        assert_eq!(next(&view, &rules()), Work::WaitUntil(S(102)));
        assert_eq!(next(&View { now: S(102), ..view }, &rules()), Work::Compact);
        // At the threshold is not above it.
        assert_eq!(next(&View { now: S(102), junk: 4 << 20, ..view }, &rules()), Work::Wait);
        let never = Rules { compact_after_unmaps: None, ..rules() };
        assert_eq!(next(&View { now: S(102), ..view }, &never), Work::Wait);
    }

    #[test]
    fn a_compaction_does_not_wait_for_ever() {
        let waits = View { junk: 5 << 20, available: 1 << 20, junk_waits_since: Some(S(40)), ..searched() };
        let view = View { now: S(99), junk_stands_since: S(98), ..waits };
        assert_eq!(next(&view, &rules()), Work::WaitUntil(S(100)));
        assert_eq!(next(&View { now: S(100), junk_stands_since: S(98), ..waits }, &rules()), Work::Compact);
        // One that has settled does not wait so long.
        assert_eq!(next(&View { now: S(60), junk_stands_since: S(55), ..waits }, &rules()), Work::Compact);
    }

    #[test]
    fn never_is_a_long_time() {
        let never = Rules { settle_time: Duration::MAX, flush_after: Duration::MAX, ..rules() };
        let view = View { now: S(100), junk: 5 << 20, available: 1 << 20, unflushed_since: Some(S(1)), ..searched() };
        let view = View { junk_stands_since: S(1), junk_waits_since: Some(S(1)), ..view };
        assert_eq!(next(&view, &never), Work::WaitUntil(Duration::MAX));
    }

    #[test]
    fn a_compaction_that_could_not_use_the_junk_is_not_repeated() {
        let view = View { now: S(100), junk: 5 << 20, available: 1 << 20, junk_useless: 5 << 20, ..searched() };
        assert_eq!(next(&view, &rules()), Work::Wait);
        assert_eq!(next(&View { junk: 6 << 20, ..view }, &rules()), Work::Compact);
    }

    #[test]
    fn junk_that_cannot_be_erased_is_not_tried_again() {
        let view = View { now: S(100), junk: 1 << 20, junk_unerasable: 1 << 20, ..searched() };
        assert_eq!(next(&view, &rules()), Work::Wait);
        assert_eq!(next(&View { junk: 2 << 20, ..view }, &rules()), Work::Erase(1 << 20));
    }

    #[test]
    fn unflushed_work_is_flushed_in_time() {
        let view = View { now: S(10), unflushed_since: Some(S(7)), available: 1 << 20, ..searched() };
        assert_eq!(next(&view, &rules()), Work::WaitUntil(S(12)));
        assert_eq!(next(&View { now: S(12), ..view }, &rules()), Work::Flush);
    }

    #[test]
    fn a_free_tail_is_cut_off_when_it_is_worth_it() {
        let view = View { now: S(10), available: 1 << 20, free_tail: 2 << 20, ..searched() };
        assert_eq!(next(&view, &rules()), Work::Shorten);
        assert_eq!(next(&View { free_tail: 1 << 20, ..view }, &rules()), Work::Wait);
    }

    #[test]
    fn the_space_of_what_no_compaction_will_use_is_given_back() {
        let view = View { now: S(10), junk: 2 << 20, occupied: 2 << 20, available: 1 << 20, ..searched() };
        assert_eq!(next(&view, &rules()), Work::Punch(2 << 20));
        assert_eq!(next(&View { junk_stands_since: S(8), ..view }, &rules()), Work::WaitUntil(S(13)));
        assert_eq!(next(&View { occupied: 1 << 19, ..view }, &rules()), Work::Wait);
        // A compaction comes first.
        let more = View { junk: 80 << 20, occupied: 80 << 20, ..view };
        assert_eq!(next(&more, &rules()), Work::Compact);
        // Where there is none, it need not wait for the end of the discards, and comes in steps.
        let never = Rules { compact_after_unmaps: None, ..rules() };
        assert_eq!(next(&View { junk_stands_since: S(10), ..more }, &never), Work::Punch(64 << 20));
    }

    #[test]
    fn after_a_failure_there_is_a_pause() {
        let view = View { now: S(10), junk: 1 << 30, not_before: S(11), ..searched() };
        assert_eq!(next(&view, &rules()), Work::WaitUntil(S(11)));
    }
}
