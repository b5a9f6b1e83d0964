//! A contender's life: commands in, answers out; and the loop that is measured.

use std::io::{self, BufRead, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier};
use std::thread::Scope;
use std::time::Instant;

use futures_util::future::join_all;
use hdrhistogram::Histogram;

use crate::buffer::Buffer;
use crate::disk::{Disk, Open};
use crate::probes;
use crate::protocol::{Answer, Command, Done, Extra, Kind, Latency, Opening, Work};

/// Takes commands until the input ends.
pub fn serve<O: Open>(opener: &O) -> io::Result<()> {
    std::thread::scope(|scope| {
        let mut threads: Vec<Thread> = Vec::new();
        for line in io::stdin().lock().lines() {
            let command: Command = serde_json::from_str(&line?).map_err(io::Error::other)?;
            let answer = obey(scope, opener, &mut threads, command).unwrap_or_else(Answer::Failed);
            let mut output = io::stdout().lock();
            serde_json::to_writer(&mut output, &answer).map_err(io::Error::other)?;
            output.write_all(b"\n")?;
            output.flush()?;
        }
        Ok(())
    })
}

fn obey<'scope, O: Open>(
    scope: &'scope Scope<'scope, '_>,
    opener: &'scope O,
    threads: &mut Vec<Thread>,
    command: Command,
) -> Result<Answer, String> {
    match command {
        Command::Open(opening) => {
            let count = opening.threads.max(1);
            let together = Arc::new(Barrier::new(count));
            let started = Instant::now();
            for number in 0..count {
                threads.push(Thread::start(scope, opener, opening.clone(), number, Arc::clone(&together))?);
            }
            Ok(Answer::Opened { nanoseconds: started.elapsed().as_nanos() as u64 })
        }
        Command::Run(work) => run(threads, &work).map(Answer::Done),
        Command::Flush => ask(threads, Request::Flush).map(|_| Answer::Ok),
        Command::Extra(extra) => ask(threads, Request::Extra(extra)).map(|reply| match reply {
            Reply::Value(value) => Answer::Value(value),
            Reply::Done(_) => Answer::Ok,
        }),
        Command::Memory => Ok(Answer::Memory(probes::memory())),
        Command::Close => {
            let mut result = Ok(Answer::Ok);
            for thread in threads.drain(..) {
                if let Err(error) = thread.ask(Request::Close).and_then(|()| thread.reply()) {
                    result = Err(error);
                }
            }
            result
        }
    }
}

fn run(threads: &[Thread], work: &Work) -> Result<Done, String> {
    let allocations = probes::allocations();
    let (user, system) = probes::cpu_time();
    for thread in threads {
        thread.ask(Request::Run(work.clone()))?;
    }
    let mut total = Done::default();
    for thread in threads {
        let Reply::Done(done) = thread.reply()? else { return Err("not a round's reply".into()) };
        total.nanoseconds = total.nanoseconds.max(done.nanoseconds);
        total.operations += done.operations;
        total.preempted += done.preempted;
        total.latency = worse(total.latency, done.latency);
        total.allocations = done.allocations;
    }
    if threads.len() > 1 {
        total.allocations = probes::allocations().zip(allocations).map(|(after, before)| after - before);
    }
    let (user_after, system_after) = probes::cpu_time();
    total.user_microseconds = user_after - user;
    total.system_microseconds = system_after - system;
    Ok(total)
}

fn ask(threads: &[Thread], request: Request) -> Result<Reply, String> {
    let first = threads.first().ok_or("nothing is open")?;
    first.ask(request)?;
    first.reply()
}

fn worse(one: Option<Latency>, other: Option<Latency>) -> Option<Latency> {
    let (Some(a), Some(b)) = (&one, &other) else { return one.or(other) };
    Some(Latency {
        median: a.median.max(b.median),
        p99: a.p99.max(b.p99),
        p999: a.p999.max(b.p999),
        worst: a.worst.max(b.worst),
    })
}

enum Request {
    Run(Work),
    Flush,
    Extra(Extra),
    Close,
}

enum Reply {
    Done(Done),
    Value(serde_json::Value),
}

/// A thread that keeps its disk from one round to the next.
struct Thread {
    requests: Sender<Request>,
    replies: Receiver<Result<Reply, String>>,
}

impl Thread {
    fn start<'scope, O: Open>(
        scope: &'scope Scope<'scope, '_>,
        opener: &'scope O,
        opening: Opening,
        number: usize,
        together: Arc<Barrier>,
    ) -> Result<Self, String> {
        let (requests, inbox) = channel();
        let (outbox, replies) = channel();
        scope.spawn(move || {
            O::Disk::block_on(async move {
                let disk = match opener.open(&opening).await {
                    Ok(disk) => disk,
                    Err(error) => return drop(outbox.send(Err(format!("{}: {error}", opening.path)))),
                };
                let _ = outbox.send(Ok(Reply::Done(Done::default())));
                Worker { disk, number, threads: opening.threads.max(1), together }.live(&inbox, &outbox).await;
            });
        });
        let thread = Self { requests, replies };
        thread.reply()?;
        Ok(thread)
    }

    fn ask(&self, request: Request) -> Result<(), String> {
        self.requests.send(request).map_err(|_| "the thread has ended".to_owned())
    }

    fn reply(&self) -> Result<Reply, String> {
        self.replies.recv().map_err(|_| "the thread has ended".to_owned())?
    }
}

struct Worker<D> {
    disk: D,
    number: usize,
    threads: usize,
    together: Arc<Barrier>,
}

impl<D: Disk> Worker<D> {
    async fn live(mut self, inbox: &Receiver<Request>, outbox: &Sender<Result<Reply, String>>) {
        while let Ok(request) = inbox.recv() {
            let reply = match request {
                Request::Run(work) => self.run(&work).await.map(Reply::Done),
                Request::Flush => self.disk.flush().await.map(|()| Reply::Done(Done::default())),
                Request::Extra(Extra::Idle { milliseconds }) => Ok(Reply::Value(idle(milliseconds).into())),
                Request::Extra(extra) => {
                    probes::mark();
                    let value = self.disk.extra(&extra).map(Reply::Value);
                    probes::mark();
                    value
                }
                Request::Close => {
                    let closed = self.disk.close().await.map(|()| Reply::Done(Done::default()));
                    let _ = outbox.send(closed.map_err(|error| error.to_string()));
                    return;
                }
            };
            let _ = outbox.send(reply.map_err(|error| error.to_string()));
        }
    }

    async fn run(&mut self, work: &Work) -> io::Result<Done> {
        let all = work.offsets.of_thread(self.number, self.threads, work.count + work.warm);
        let (measured, warm) = all.split_at(work.count as usize);
        let mut buffers: Vec<Buffer> =
            (0..work.depth.max(1)).map(|i| Buffer::new(work.size, (self.number * 64 + i) as u8)).collect();
        let mut latencies = Histogram::<u64>::new_with_bounds(1, 60_000_000_000, 3).map_err(io::Error::other)?;

        if !warm.is_empty() {
            self.go_through(work, warm, &mut buffers).await?;
        }
        self.together.wait();
        let preempted = probes::preemptions();
        let allocations = probes::allocations();
        probes::mark();
        let started = Instant::now();
        if work.latencies {
            self.timed_each(work, measured, &mut buffers[0], &mut latencies).await?;
        } else {
            self.go_through(work, measured, &mut buffers).await?;
        }
        if work.flush_at_end {
            self.disk.flush().await?;
        }
        let nanoseconds = started.elapsed().as_nanos() as u64;
        probes::mark();
        let allocations = probes::allocations().zip(allocations).map(|(after, before)| after - before);
        Ok(Done {
            nanoseconds,
            preempted: probes::preemptions() - preempted,
            operations: work.count,
            allocations,
            latency: work.latencies.then(|| Latency {
                median: latencies.value_at_quantile(0.5),
                p99: latencies.value_at_quantile(0.99),
                p999: latencies.value_at_quantile(0.999),
                worst: latencies.max(),
            }),
            ..Done::default()
        })
    }

    async fn go_through(&mut self, work: &Work, offsets: &[u64], buffers: &mut [Buffer]) -> io::Result<()> {
        if work.depth > 1 {
            return match self.disk.queue(work, offsets, buffers) {
                Some(result) => result,
                None => concurrently(&self.disk, work, offsets, buffers).await,
            };
        }
        let buffer = &mut buffers[0];
        if work.flush_every == 0 {
            match work.kind {
                Kind::Read => {
                    for &offset in offsets {
                        self.disk.read(buffer, offset).await?;
                    }
                }
                Kind::Write => {
                    for &offset in offsets {
                        self.disk.write(buffer, offset).await?;
                    }
                }
                Kind::Discard => {
                    for &offset in offsets {
                        self.disk.discard(offset, work.size as u64).await?;
                    }
                }
            }
            return Ok(());
        }
        for part in offsets.chunks(work.flush_every as usize) {
            for &offset in part {
                self.one(work, offset, buffer).await?;
            }
            self.disk.flush().await?;
        }
        Ok(())
    }

    async fn one(&mut self, work: &Work, offset: u64, buffer: &mut Buffer) -> io::Result<()> {
        match work.kind {
            Kind::Read => self.disk.read(buffer, offset).await,
            Kind::Write => self.disk.write(buffer, offset).await,
            Kind::Discard => self.disk.discard(offset, work.size as u64).await,
        }
    }

    async fn timed_each(
        &mut self,
        work: &Work,
        offsets: &[u64],
        buffer: &mut Buffer,
        latencies: &mut Histogram<u64>,
    ) -> io::Result<()> {
        let mut last = Instant::now();
        for (number, &offset) in (1..).zip(offsets) {
            self.one(work, offset, buffer).await?;
            if work.flush_every != 0 && number % work.flush_every == 0 {
                self.disk.flush().await?;
            }
            let now = Instant::now();
            latencies.saturating_record((now - last).as_nanos() as u64);
            last = now;
        }
        Ok(())
    }
}

/// `depth` tasks that share the offsets out among them.
async fn concurrently<D: Disk>(disk: &D, work: &Work, offsets: &[u64], buffers: &mut [Buffer]) -> io::Result<()> {
    let depth = buffers.len();
    let tasks = buffers.iter_mut().enumerate().map(|(task, buffer)| async move {
        for &offset in offsets.iter().skip(task).step_by(depth) {
            match work.kind {
                Kind::Read => disk.read(buffer, offset).await?,
                Kind::Write => disk.write(buffer, offset).await?,
                Kind::Discard => return Err(io::Error::other("discards are measured one by one")),
            }
        }
        Ok(())
    });
    join_all(tasks).await.into_iter().collect()
}

fn idle(milliseconds: u64) -> u64 {
    let before = probes::wake_ups_of_other_threads();
    std::thread::sleep(std::time::Duration::from_millis(milliseconds));
    probes::wake_ups_of_other_threads() - before
}
