//! Threads of a queue, for what has to wait: as many as there is work for, up to a limit.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// A thread with nothing to do ends after this long.
const IDLE: Duration = Duration::from_secs(10);

/// Who carries out what is handed to the threads.
pub(super) trait Work: Send + Sync + 'static {
    type Job: Send;
    fn helpers(&self) -> &Helpers<Self::Job>;
    fn carry_out(&self, job: Self::Job);
}

/// Whether a job may wait for a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// It waits until one of the threads has nothing else to do.
    InOrder,
    /// It is done before those that wait, by a thread beyond the limit if none is idle: what the others are doing may be to
    /// wait for the end of this very job's request.
    AtOnce,
}

pub(super) struct Helpers<J> {
    state: Mutex<State<J>>,
    news: Condvar,
    limit: usize,
}

struct State<J> {
    jobs: VecDeque<J>,
    idle: usize,
    /// Threads that will look for another job before they end.
    alive: usize,
    stopping: bool,
    threads: Vec<JoinHandle<()>>,
}

impl<J: Send> Helpers<J> {
    /// At most `limit` threads for jobs that may wait; room for `depth` jobs is made now. The limit may be any number:
    /// nothing is allocated for threads that are not started.
    pub(super) fn new(limit: usize, depth: usize) -> Self {
        let jobs = VecDeque::with_capacity(depth);
        let state = State { jobs, idle: 0, alive: 0, stopping: false, threads: Vec::new() };
        Helpers { state: Mutex::new(state), news: Condvar::new(), limit: limit.max(1) }
    }

    /// Hands a job over, or gives it back with the reason if there is no thread for it and none can be had.
    pub(super) fn hand_over<W: Work<Job = J>>(worker: &Arc<W>, job: J, turn: Turn) -> Result<(), (J, io::Error)> {
        let helpers = worker.helpers();
        let mut state = helpers.state.lock();
        match turn {
            Turn::InOrder => state.jobs.push_back(job),
            Turn::AtOnce => state.jobs.push_front(job),
        }
        if state.idle >= state.jobs.len() {
            drop(state);
            helpers.news.notify_one();
            return Ok(());
        }
        if state.alive < helpers.limit || turn == Turn::AtOnce {
            state.threads.retain(|thread| !thread.is_finished());
            let thread = worker.clone();
            match Builder::new().name("qcowrecycle-io".to_owned()).spawn(move || Helpers::work(&*thread)) {
                Ok(handle) => {
                    state.threads.push(handle);
                    state.alive += 1;
                }
                Err(e) if state.alive == 0 || turn == Turn::AtOnce => {
                    // Nobody has taken it: the lock was held all the time.
                    let own = match turn {
                        Turn::InOrder => state.jobs.pop_back(),
                        Turn::AtOnce => state.jobs.pop_front(),
                    };
                    return own.map_or(Ok(()), |job| Err((job, e)));
                }
                // Those that there are come round to it.
                Err(_) => {}
            }
        }
        drop(state);
        helpers.news.notify_one();
        Ok(())
    }

    fn work<W: Work<Job = J>>(worker: &W) {
        let helpers = worker.helpers();
        let mut state = helpers.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                worker.carry_out(job);
                state = helpers.state.lock();
                continue;
            }
            if state.stopping {
                state.alive -= 1;
                return;
            }
            state.idle += 1;
            let idle = helpers.news.wait_for(&mut state, IDLE).timed_out();
            state.idle -= 1;
            if idle && state.jobs.is_empty() {
                state.alive -= 1;
                return;
            }
        }
    }

    /// Waits until every job is done and every thread has ended. Nobody hands over jobs any more.
    pub(super) fn stop(&self) {
        let threads = {
            let mut state = self.state.lock();
            state.stopping = true;
            std::mem::take(&mut state.threads)
        };
        self.news.notify_all();
        for thread in threads {
            // Panics are caught where the job is done.
            let _ = thread.join();
        }
    }
}
