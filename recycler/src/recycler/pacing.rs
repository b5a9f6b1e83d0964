//! Holding background work to a rate.

use tokio::time::{Duration, Instant};

/// Lets so many bytes a second pass.
pub(crate) struct Pacer {
    limit: Option<u64>,
    next: Instant,
}

impl Pacer {
    /// `limit` in bytes per second; `None`: no limit.
    pub(crate) fn new(limit: Option<u64>) -> Self {
        Pacer { limit, next: Instant::now() }
    }

    /// Waits until work on `bytes` bytes may begin.
    pub(crate) async fn spend(&mut self, bytes: u64) {
        let Some(limit) = self.limit.filter(|&l| l > 0) else {
            // Still a chance for other tasks on this thread.
            tokio::task::yield_now().await;
            return;
        };
        let now = Instant::now();
        if self.next > now {
            tokio::time::sleep_until(self.next).await;
        }
        // Time not used is not saved up: that would allow a burst.
        self.next = self.next.max(now) + Duration::from_secs_f64(bytes as f64 / limit as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_rate_is_kept_without_bursts() {
        let start = Instant::now();
        let mut pacer = Pacer::new(Some(1000));
        for _ in 0..5 {
            pacer.spend(500).await;
        }
        assert_eq!(start.elapsed().as_millis(), 2000);
        tokio::time::sleep(Duration::from_secs(100)).await;
        let idle = Instant::now();
        pacer.spend(500).await;
        pacer.spend(500).await;
        assert_eq!(idle.elapsed().as_millis(), 500);
    }
}
