//! How long a test runs and from which seed: `QCR_SEED=n` replays one seed, `QCR_SOAK_MINUTES=n` makes the run longer
//! and starts it from `QCR_SOAK_SEED=n`, or from the clock. What was done is told in lines that `mk/soak.py` adds up.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The seeds of one run.
pub struct Slice {
    next: u64,
    replay: bool,
    handed_out: u64,
    at_least: u64,
    end: Instant,
}

/// The seed to replay, if one is asked for.
pub fn replay_seed() -> Option<u64> {
    let text = std::env::var("QCR_SEED").ok()?;
    Some(text.trim().parse().expect("QCR_SEED must be a number"))
}

/// Minutes of soak asked for.
pub fn soak_minutes() -> Option<f64> {
    let text = std::env::var("QCR_SOAK_MINUTES").ok()?;
    Some(text.trim().parse().expect("QCR_SOAK_MINUTES must be a number"))
}

/// The first of the seeds of a soak.
pub fn soak_seed() -> u64 {
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |d| d.as_secs());
    let given = std::env::var("QCR_SOAK_SEED").ok();
    let seed: u64 = given.map_or_else(clock, |text| text.trim().parse().expect("QCR_SOAK_SEED must be a number"));
    seed << 20
}

/// When the part of a soak ends that has this share of it; `None` outside a soak.
pub fn soak_deadline(share: f64) -> Option<Instant> {
    soak_minutes().map(|minutes| Instant::now() + Duration::from_secs_f64(minutes * 60.0 * share))
}

/// Tells what was done.
pub fn tell(counts: &[(&str, u64)]) {
    let words: Vec<_> = counts.iter().map(|(name, count)| format!("{name}={count}")).collect();
    println!("soak: {}", words.join(" "));
}

impl Slice {
    /// Seeds for about `seconds`, but at least `at_least` of them; `share` is the part of a soak that this test gets.
    pub fn new(seconds: u64, at_least: u64, share: f64) -> Slice {
        let (first, length) = match soak_minutes() {
            Some(minutes) => (soak_seed(), Duration::from_secs_f64(minutes * 60.0 * share)),
            None => (1, Duration::from_secs(seconds)),
        };
        let replay = replay_seed();
        Slice {
            next: replay.unwrap_or(first),
            replay: replay.is_some(),
            handed_out: 0,
            at_least: if soak_minutes().is_some() { 1 } else { at_least },
            end: Instant::now() + length,
        }
    }
}

impl Iterator for Slice {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let over = if self.replay {
            self.handed_out > 0
        } else {
            self.handed_out >= self.at_least && Instant::now() >= self.end
        };
        if over {
            return None;
        }
        self.handed_out += 1;
        self.next += 1;
        Some(self.next - 1)
    }
}
