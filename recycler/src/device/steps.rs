//! Steps of work on the device that guests' writes may have to wait for: cutting the file, punching holes.

use tokio::time::{Duration, Instant};

/// Beyond what the shortest of them takes, a step is to take at most this part of the time for which guests have been quiet: who
/// comes back then waits no longer than makes no difference to him.
const PART: u32 = 8;
/// But it may take so long even if they are not quiet.
const LEAST: Duration = Duration::from_micros(250);
const MOST: Duration = Duration::from_millis(8);
/// The first step is of so many bytes; none is shorter, but what lies in shorter pieces.
const LEAST_BYTES: u64 = 128 << 10;
/// The most that is done in one step that is not quick.
const MOST_BYTES: u64 = 64 << 20;

/// A step that was made: its size in bytes, and how long it took.
#[derive(Clone, Copy, Debug)]
struct Step {
    size: u64,
    took: Duration,
}

/// Steps whose size follows from how long those before took: one large truncation can hold a file for seconds.
#[derive(Debug, Default)]
pub(crate) struct Steps {
    /// The last one that was not cut short because there was no more to do.
    last: Option<Step>,
    /// How long the shortest took: about what every step takes, however little it does (a transaction of the file system's journal,
    /// a call to the device, and whatever else is in that).
    shortest: Duration,
    offered: u64,
}

impl Steps {
    /// How many bytes the next step is to have, a multiple of 128 KiB, if guests have been quiet for so long.
    pub(crate) fn size(&mut self, quiet: Duration) -> u64 {
        let slow = (quiet / PART).clamp(LEAST, MOST);
        self.offered = self.last.map_or(LEAST_BYTES, |last| {
            // With less, most of the time would be what every step takes.
            let most = slow.max(self.shortest);
            let took = last.took.saturating_sub(self.shortest);
            let size = last.size.next_multiple_of(LEAST_BYTES);
            if last.took < slow * 2 / 5 {
                // A hole of a terabyte is cut off in no time.
                size.min(1 << 61) * 2
            } else if took < most * 2 / 5 {
                (size * 2).min(MOST_BYTES)
            } else if took <= most {
                size
            } else {
                let times = (took.as_nanos() / most.as_nanos()) as u64;
                (size / times.next_power_of_two().max(2)).next_multiple_of(LEAST_BYTES).max(LEAST_BYTES)
            }
        });
        self.offered
    }

    /// Makes a step: of that size or, if there is not so much to do, shorter; or longer.
    pub(crate) async fn take<E>(&mut self, size: u64, work: impl Future<Output = Result<(), E>>) -> Result<(), E> {
        let began = Instant::now();
        work.await?;
        self.took(size, began.elapsed());
        Ok(())
    }

    fn took(&mut self, size: u64, took: Duration) {
        self.shortest = if self.shortest.is_zero() { took } else { self.shortest.min(took) };
        if size >= self.offered {
            self.last = Some(Step { size, took });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUSY: Duration = Duration::ZERO;
    const QUIET: Duration = Duration::from_secs(1);

    /// Makes so many steps, where so many KiB take so many microseconds; their sizes in KiB.
    fn make(steps: &mut Steps, count: usize, quiet: Duration, cost: impl Fn(u64) -> u64) -> Vec<u64> {
        let mut sizes = Vec::new();
        for _ in 0..count {
            let size = steps.size(quiet);
            sizes.push(size >> 10);
            steps.took(size, Duration::from_micros(cost(size >> 10)));
        }
        sizes
    }

    /// The sizes of steps once they have settled.
    fn settled(quiet: Duration, cost: impl Fn(u64) -> u64) -> Vec<u64> {
        make(&mut Steps::default(), 50, quiet, cost).split_off(20)
    }

    #[test]
    fn steps_are_short_where_length_costs() {
        // 3 ms for each MiB.
        assert!(make(&mut Steps::default(), 50, BUSY, |kib| kib * 3).iter().all(|&kib| kib <= 256));
        assert!(make(&mut Steps::default(), 50, QUIET, |kib| kib * 3).iter().all(|&kib| kib <= 2048));
        assert!(settled(QUIET, |kib| kib * 3).iter().all(|&kib| kib == 2048));
        // A sixteenth of a millisecond.
        assert!(settled(BUSY, |kib| kib / 16).iter().all(|&kib| (2048..=4096).contains(&kib)));
        assert!(settled(QUIET, |kib| kib / 16).iter().all(|&kib| kib == 65_536));
    }

    #[test]
    fn steps_are_long_where_only_the_call_costs() {
        for microseconds in [110, 150, 240, 260, 3000, 30_000] {
            assert!(settled(BUSY, |_| microseconds).iter().all(|&kib| kib == MOST_BYTES >> 10), "{microseconds}");
        }
        let sizes = settled(BUSY, |_| 10);
        assert!(sizes[20] >= 1 << 40, "a hole of a petabyte is cut off at once: {sizes:?}");
    }

    #[test]
    fn steps_take_a_part_of_the_quiet() {
        // A millisecond for each MiB, and half of one for the call.
        let longest = |quiet| settled(Duration::from_millis(quiet), |kib| kib + 500).into_iter().max();
        assert_eq!(longest(0), Some(512));
        assert_eq!(longest(10), Some(1024));
        assert_eq!(longest(30), Some(2048));
        assert_eq!(longest(100), Some(4096));
    }

    #[test]
    fn when_guests_come_back_the_next_step_is_short() {
        for cost in [1, 16, 100] {
            let mut steps = Steps::default();
            let sizes = make(&mut steps, 20, QUIET, |kib| kib / cost);
            let next = steps.size(BUSY) >> 10;
            assert!(next / cost < 500, "{sizes:?}, and then {next}");
        }
    }

    #[test]
    fn what_lies_in_short_pieces_tells_nothing_of_long_ones() {
        let mut steps = Steps::default();
        let pieces = |steps: &mut Steps| {
            for _ in 0..50 {
                steps.size(QUIET);
                steps.took(64 << 10, Duration::from_micros(10));
            }
        };
        pieces(&mut steps);
        assert_eq!(steps.size(QUIET), LEAST_BYTES);
        let sizes = make(&mut steps, 20, QUIET, |kib| kib);
        pieces(&mut steps);
        assert_eq!(steps.size(QUIET) >> 10, sizes[19], "{sizes:?}");
    }

    #[test]
    fn sizes_are_aligned_whatever_was_made() {
        let mut steps = Steps::default();
        for n in 0..1000 {
            let size = steps.size(if n % 3 == 0 { BUSY } else { QUIET });
            assert!(size > 0 && size.is_multiple_of(LEAST_BYTES), "{size}");
            // A cluster of 2 MiB is not divided.
            let took = if n % 100 == 99 { Duration::from_secs(n * n) } else { Duration::from_micros(n * n % 10_007) };
            steps.took(size.max((n % 5) << 20) + n * 4096, took);
        }
    }
}
