//! Steps of work on the device that guests' writes may have to wait for: cutting the file, punching holes.

use tokio::time::{Duration, Instant};

/// How long a step is to take, if that can be: at least, and at most.
const WHILE_IDLE: (Duration, Duration) = (Duration::from_micros(500), Duration::from_millis(1));
/// The same while guests are at work.
const WHILE_BUSY: (Duration, Duration) = (Duration::from_micros(100), Duration::from_micros(250));
const FIRST: u64 = 4 << 20;
/// What is never divided further: while guests are idle, and at work.
const LEAST: [u64; 2] = [1 << 20, 256 << 10];
/// The most that is done in one step that is not quick.
const MOST: u64 = 64 << 20;

/// A step that was made: its size in bytes, and how long it took.
#[derive(Clone, Copy, Debug)]
struct Step {
    size: u64,
    took: Duration,
}

/// Steps whose size follows from how long those before took: one large truncation can hold a file for seconds.
#[derive(Debug)]
pub(crate) struct Steps {
    next: u64,
    last: Option<Step>,
}

impl Steps {
    pub(crate) fn new() -> Self {
        Steps { next: FIRST, last: None }
    }

    /// How many bytes the next step is to have.
    pub(crate) fn size(&self) -> u64 {
        self.next
    }

    /// Makes a step of that size (or a shorter one, at the end of the work). `busy`: guests are at work.
    pub(crate) async fn take<E>(&mut self, busy: bool, work: impl Future<Output = Result<(), E>>) -> Result<(), E> {
        let began = Instant::now();
        work.await?;
        self.took(began.elapsed(), busy);
        Ok(())
    }

    /// Much of a slow step may be time that every step takes, however short it is (a transaction of the file system's
    /// journal, and whatever else is in that): a shorter one is worth it only while it takes less time.
    fn took(&mut self, took: Duration, busy: bool) {
        let (quick, slow) = if busy { WHILE_BUSY } else { WHILE_IDLE };
        let (last, before) = (Step { size: self.next, took }, self.last);
        self.last = Some(last);
        self.next = if took < quick {
            // A hole of a terabyte is cut off in no time.
            last.size.saturating_mul(2)
        } else if took <= slow {
            last.size
        } else {
            match before {
                Some(b) if b.size > last.size && took * 4 > b.took * 3 => b.size.min(MOST),
                Some(b) if b.size < last.size && took * 2 < b.took * 3 => (last.size * 2).min(MOST),
                _ => (last.size / 2).max(LEAST[usize::from(busy)]),
            }
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sizes of steps in KiB, where so many KiB take so many microseconds.
    fn steps(busy: bool, cost: impl Fn(u64) -> u64) -> Vec<u64> {
        let mut steps = Steps::new();
        let mut sizes = Vec::new();
        for _ in 0..50 {
            sizes.push(steps.size() >> 10);
            steps.took(Duration::from_micros(cost(steps.size() >> 10)), busy);
        }
        sizes
    }

    #[test]
    fn steps_are_short_where_length_costs() {
        // 3 ms for each MiB.
        assert!(steps(true, |kib| kib * 3)[10..].iter().all(|&kib| kib == 256));
        assert!(steps(false, |kib| kib * 3)[10..].iter().all(|&kib| kib == 1024));
        // A sixteenth of a millisecond.
        assert!(steps(true, |kib| kib / 16)[10..].iter().all(|&kib| (2048..=4096).contains(&kib)));
        assert!(steps(false, |kib| kib / 16)[10..].iter().all(|&kib| (8192..=16384).contains(&kib)));
    }

    #[test]
    fn steps_are_long_where_only_the_call_costs() {
        let sizes = steps(true, |_| 3000);
        assert!(sizes[20..].iter().all(|&kib| kib >= 16 << 10), "{sizes:?}");
        assert!(sizes.iter().all(|&kib| kib <= MOST >> 10), "{sizes:?}");
        let sizes = steps(true, |_| 10);
        assert!(sizes[40] >= 1 << 40, "a hole of a petabyte is cut off at once: {sizes:?}");
    }
}
