//! An asynchronous queue over an open image: requests are submitted and go on by themselves, completions are reaped.
//!
//! A read or overwrite of clusters whose tables are in memory is planned at once (`image/plan.rs`) and carried out by the
//! kernel, on the queue's own io_uring, or by a device that can begin a transfer and tell of its end. Everything else
//! waits for something: it runs the ordinary path on a helper thread, and its completion arrives here as well.
//!
//! Transfers under way hold back grace periods until somebody looks at them. That is the reaper as a rule; but who awaits
//! a grace period pokes the queue, so no program can hold the recycler up by not reaping.

mod helpers;
mod mailbox;
mod ring;

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::blocking::block_on;
use crate::buf::Held;
use crate::clusters::epochs::Detached;
use crate::clusters::stragglers::Straggler;
use crate::device::{Addressee, BlockDevice, Direction};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::image::mapping::Purpose;
use crate::image::plan::Planned;
use crate::options::LogLevel;
use crate::units::{GuestOffset, HostOffset};
use helpers::{Helpers, Turn, Work};
use mailbox::{Mailbox, News};
use ring::Ring;

/// The deepest queue.
pub const MAX_DEPTH: u32 = 16_384;

/// How transfers are carried out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Transfers {
    /// By the kernel (io_uring) where it lets us; by threads otherwise.
    #[default]
    Auto,
    /// By threads.
    Threads,
}

/// What a queue is to be like.
#[derive(Clone, Copy, Debug)]
pub struct QueueOptions {
    /// The most requests that are submitted and not reaped: 1 to [`MAX_DEPTH`].
    pub depth: u32,
    /// The most threads that it uses for what has to wait. They are started when they are needed.
    pub helpers: u32,
    /// How transfers are carried out.
    pub transfers: Transfers,
}

impl Default for QueueOptions {
    fn default() -> Self {
        QueueOptions { depth: 128, helpers: 16, transfers: Transfers::Auto }
    }
}

/// A request to submit. Offsets and lengths are in bytes on the virtual disk, multiples of 512.
#[derive(Debug)]
pub enum Request {
    /// As [`Image::read`]; the memory is written.
    Read {
        /// Where the disk is read.
        offset: u64,
        /// Where the bytes go.
        memory: Held,
    },
    /// As [`Image::write`].
    Write {
        /// Where the disk is written.
        offset: u64,
        /// Where the bytes are.
        memory: Held,
    },
    /// As [`Image::discard`].
    Discard {
        /// Start of the range.
        offset: u64,
        /// Its length.
        length: u64,
    },
    /// As [`Image::write_zeroes`].
    WriteZeroes {
        /// Start of the range.
        offset: u64,
        /// Its length.
        length: u64,
        /// Whether whole clusters go back to the recycler.
        may_unmap: bool,
    },
    /// As [`Image::flush`]: covers every request whose completion was there to be reaped when this was submitted.
    Flush,
}

/// A request has ended.
#[derive(Debug)]
pub struct Completion {
    /// What the request was submitted with.
    pub user_data: u64,
    /// How it ended.
    pub result: Result<()>,
}

/// No room: as many requests as the queue is deep are submitted and not reaped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

/// A transfer that the kernel or the device carries out.
struct Transfer {
    direction: Direction,
    host: HostOffset,
    memory: Held,
    request: Detached,
}

enum Slot {
    Free,
    /// A helper thread has it.
    Helped,
    /// The kernel or the device has it. The areas stay where they are until it has ended.
    Transfer(Transfer),
}

/// What a helper thread is to do.
struct Job {
    number: u32,
    task: Task,
}

enum Task {
    Request(Request),
    /// One that the kernel did not do, or did not do whole: all of it again.
    Transfer(Transfer),
}

struct State {
    slots: Box<[Slot]>,
    user_data: Box<[u64]>,
    free: Vec<u32>,
    /// Slots in use by transfers.
    transfers: usize,
    /// Ended, and not reaped yet.
    ready: VecDeque<Completion>,
    ring: Option<Ring>,
    armed: bool,
}

struct Shared<D: BlockDevice> {
    image: Arc<Image<D>>,
    /// Held while the reaper sleeps, which is only while something is under way that will end by itself. Never locked by
    /// a helper or by a device that tells of an end.
    state: Mutex<State>,
    mailbox: Arc<Mailbox>,
    helpers: Helpers<Job>,
    /// What each slot's transfer tells of its end to the mailbox, for devices that begin transfers.
    ends: Box<[Addressee]>,
}

/// A queue of requests to an image. One thread at a time uses it: calls from several wait for one another.
///
/// Dropping it waits until everything that was submitted has ended.
pub struct Queue<D: BlockDevice> {
    shared: Arc<Shared<D>>,
}

impl<D: BlockDevice> Queue<D> {
    /// A queue over an open image. It keeps the image's device open, even when the image is closed.
    ///
    /// # Errors
    /// [`Error::BadOption`]; [`Error::Io`] if there is no descriptor left.
    pub fn new(image: Arc<Image<D>>, options: QueueOptions) -> Result<Self> {
        let QueueOptions { depth, helpers, transfers } = options;
        if !(1..=MAX_DEPTH).contains(&depth) {
            let reason = format!("{depth} is not from 1 to {MAX_DEPTH}");
            return Err(Error::BadOption { name: "depth".to_owned(), reason });
        }
        let file = image.guest_volume().device().host_file().filter(|_| transfers == Transfers::Auto);
        let ring = file.and_then(|file| match file.for_kernel().and_then(|file| Ring::new(depth, &file)) {
            Ok(ring) => Some(ring),
            Err(e) => {
                image.logger().log(LogLevel::Info, || format!("transfers on threads, since io_uring is refused: {e}"));
                None
            }
        });
        let mailbox = Mailbox::new(depth as usize, ring.is_some()).map_err(Error::io("making an event", 0))?;
        let mailbox = Arc::new(mailbox);
        let state = State {
            slots: (0..depth).map(|_| Slot::Free).collect(),
            user_data: vec![0; depth as usize].into(),
            free: (0..depth).rev().collect(),
            transfers: 0,
            ready: VecDeque::with_capacity(depth as usize),
            ring,
            armed: false,
        };
        let ends = (0..depth).map(|number| Addressee::new(mailbox.clone(), number)).collect();
        let helpers = Helpers::new(helpers as usize, depth as usize);
        let shared = Arc::new(Shared { image, state: Mutex::new(state), mailbox, helpers, ends });
        let straggler: Arc<dyn Straggler> = shared.clone();
        shared.image.epochs.stragglers.join(&straggler);
        Ok(Queue { shared })
    }

    /// The image.
    #[must_use]
    pub fn image(&self) -> &Arc<Image<D>> {
        &self.shared.image
    }

    /// Whether transfers are carried out by the kernel.
    #[must_use]
    pub fn uses_io_uring(&self) -> bool {
        self.shared.state.lock().ring.as_ref().is_some_and(|ring| !ring.is_broken())
    }

    /// Submits a request. Its completion can be reaped later, whatever becomes of it; it may come before those of requests
    /// submitted earlier, and requests whose ranges overlap are carried out in any order.
    ///
    /// Transfers are handed to the kernel together, by the next [`reap`](Self::reap), [`kick`](Self::kick) or
    /// [`arm`](Self::arm). What needs a thread ends with [`Error::Io`] if the queue has none and none can be started.
    ///
    /// # Errors
    /// [`Full`]: reap first. Nothing was done.
    pub fn submit(&self, request: Request, user_data: u64) -> std::result::Result<(), Full> {
        let mut state = self.shared.state.lock();
        if state.ready.len() + state.in_flight() >= state.slots.len() {
            return Err(Full);
        }
        self.shared.submit(&mut state, request, user_data);
        Ok(())
    }

    /// Hands to the kernel what was submitted. Only needed by a program that does something else before it reaps.
    pub fn kick(&self) {
        let mut state = self.shared.state.lock();
        self.shared.look(&mut state);
    }

    /// Gives completions to `each`: at most `max`, and at least `min` (or as many as there can be) if they come before
    /// the time is up; `None` waits for as long as it takes. `each` must not call the queue. Returns how many.
    pub fn reap(&self, min: usize, max: usize, timeout: Option<Duration>, mut each: impl FnMut(Completion)) -> usize {
        let mut state = self.shared.state.lock();
        self.shared.disarm(&mut state);
        self.shared.collect(&mut state);
        let (mut given, mut until, mut slept) = (0, None, false);
        loop {
            while given < max
                && let Some(completion) = state.ready.pop_front()
            {
                each(completion);
                given += 1;
            }
            let missing = min.min(max).saturating_sub(given).min(state.in_flight());
            if missing == 0 {
                break;
            }
            let left = match timeout {
                None => None,
                Some(timeout) => {
                    let until = *until.get_or_insert_with(|| Instant::now().checked_add(timeout));
                    let left = until.map(|until| until.saturating_duration_since(Instant::now()));
                    if left == Some(Duration::ZERO) {
                        break;
                    }
                    left
                }
            };
            self.shared.sleep(&mut state, missing, left);
            slept = true;
            self.shared.collect(&mut state);
        }
        // What was not handed over for a sleep is now; some of it may have ended in the same call. A program that gets nothing
        // without sleeping has the kernel asked, so that looking again and again comes to an end.
        let asked = slept || given > 0;
        if (!asked || state.ring.as_ref().is_some_and(Ring::has_waiting)) && self.shared.look(&mut state) {
            while given < max
                && let Some(completion) = state.ready.pop_front()
            {
                each(completion);
                given += 1;
            }
        }
        given
    }

    /// How many requests were submitted and not reaped.
    #[must_use]
    pub fn pending(&self) -> usize {
        let state = self.shared.state.lock();
        state.ready.len() + state.in_flight()
    }

    /// A descriptor that becomes readable when a completion is there, if the queue was [armed](Self::arm). Now and then it does
    /// so for nothing: a completion can be seen, and reaped, before the kernel writes the event for it; and a kernel that is
    /// short of memory takes a transfer only when it is asked again, which the next call does.
    ///
    /// # Errors
    /// [`Error::Io`] if there is no descriptor left.
    pub fn event(&self) -> Result<BorrowedFd<'_>> {
        self.shared.mailbox.event().map_err(Error::io("making an event", 0))
    }

    /// To be called before sleeping on the [event](Self::event): returns how many completions are there already. If there
    /// are none, the event becomes readable with the next one. The next [`reap`](Self::reap) makes it unreadable, and
    /// nothing is written to it until the queue is armed again.
    ///
    /// # Errors
    /// [`Error::Io`] if there is no descriptor left.
    pub fn arm(&self) -> Result<usize> {
        let event = self.event()?;
        let state = &mut *self.shared.state.lock();
        self.shared.look(state);
        if state.ready.is_empty() {
            state.armed = true;
            if let Some(ring) = &mut state.ring {
                ring.announce(event).map_err(Error::io("asking for events", 0))?;
            }
            self.shared.mailbox.arm();
            // What came before it was armed, and whether the kernel has taken everything.
            self.shared.look(state);
        }
        Ok(state.ready.len())
    }
}

impl<D: BlockDevice> Drop for Queue<D> {
    fn drop(&mut self) {
        // The memory of requests belongs to the program again when this returns.
        self.reap(usize::MAX, usize::MAX, None, drop);
        self.shared.helpers.stop();
    }
}

impl State {
    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Empties a slot whose request has ended, and gives what was in it and the request's user data.
    #[inline(always)]
    fn end(&mut self, number: u32) -> Option<(Slot, u64)> {
        let (slot, user_data) = (self.slots.get_mut(number as usize)?, self.user_data.get(number as usize)?);
        if matches!(slot, Slot::Free) {
            // Nobody ends a request twice.
            return None;
        }
        let was = std::mem::replace(slot, Slot::Free);
        self.transfers -= usize::from(matches!(was, Slot::Transfer(_)));
        self.free.push(number);
        Some((was, *user_data))
    }
}

impl<D: BlockDevice> Shared<D> {
    fn ready(&self, state: &mut State, user_data: u64, result: Result<()>) {
        state.ready.push_back(Completion { user_data, result });
        if state.armed {
            self.mailbox.announce();
        }
    }

    /// There is room.
    fn submit(self: &Arc<Self>, state: &mut State, request: Request, user_data: u64) {
        let rest = match request {
            Request::Read { offset, memory } => {
                self.transfer_or_rest(state, Direction::Read, offset, memory, user_data)
            }
            Request::Write { offset, memory } => {
                self.transfer_or_rest(state, Direction::Write, offset, memory, user_data)
            }
            other => Some(other),
        };
        if let Some(request) = rest
            && let Some(number) = state.free.pop()
        {
            self.set(state, number, Slot::Helped, user_data);
            let job = Job { number, task: Task::Request(request) };
            // Not done here instead: it may wait at the gate for this queue's transfers, which nobody could collect meanwhile.
            if let Err((_, e)) = Helpers::hand_over(self, job, Turn::InOrder)
                && let Some((_, user_data)) = state.end(number)
            {
                self.ready(state, user_data, Err(Error::io("starting a thread", 0)(e)));
            }
        }
        // Whoever has armed the queue goes to sleep without another look.
        if state.armed {
            self.look(state);
        }
    }

    fn set(&self, state: &mut State, number: u32, slot: Slot, user_data: u64) {
        state.transfers += usize::from(matches!(slot, Slot::Transfer(_)));
        if let (Some(to), Some(data)) = (state.slots.get_mut(number as usize), state.user_data.get_mut(number as usize))
        {
            *to = slot;
            *data = user_data;
        }
    }

    /// Begins a read or write that is one transfer. Gives back what is not.
    fn transfer_or_rest(
        self: &Arc<Self>,
        state: &mut State,
        direction: Direction,
        offset: u64,
        mut memory: Held,
        user_data: u64,
    ) -> Option<Request> {
        let length = memory.len() as u64;
        let purpose = direction.purpose();
        let file = self.image.guest_volume().device().host_file();
        let by_ring = state.ring.is_some() && memory.areas().len() <= ring::MAX_AREAS;
        let planned = self.image.begin(offset, length, purpose).and_then(|request| {
            // Where the gate is closed a helper waits.
            let Some(request) = request else { return Ok(None) };
            let planned = if length == 0 {
                Planned::Zeroes { length: 0 }
            } else if let Some((_, host)) = self.image.place_of(GuestOffset(offset), length, purpose) {
                Planned::Transfer { host, length }
            } else {
                self.image.plan(&request, offset, length, purpose)?
            };
            Ok(Some((request, planned)))
        });
        match planned {
            Err(e) => {
                self.ready(state, user_data, Err(e));
                return None;
            }
            Ok(Some((request, Planned::Zeroes { length: all }))) if all == length => {
                if direction == Direction::Read {
                    memory.destination().fill_zero();
                }
                self.image.end(request, length, purpose);
                self.ready(state, user_data, Ok(()));
                return None;
            }
            Ok(Some((request, Planned::Transfer { host, length: all })))
                if all == length
                    && if by_ring {
                        file.is_some_and(|file| file.takes(direction, host.0, memory.areas()))
                    } else {
                        self.image.guest_volume().device().begins(direction, memory.areas())
                    } =>
            {
                if let Some(number) = state.free.pop() {
                    let request = request.detach();
                    let transfer = Transfer { direction, host, memory, request };
                    self.set(state, number, Slot::Transfer(transfer), user_data);
                    self.begin(state, number, by_ring);
                    return None;
                }
            }
            Ok(_) => {}
        }
        Some(match direction {
            Direction::Read => Request::Read { offset, memory },
            Direction::Write => Request::Write { offset, memory },
        })
    }

    /// Begins the transfer in a slot.
    fn begin(self: &Arc<Self>, state: &mut State, number: u32, by_ring: bool) {
        let Some(Slot::Transfer(Transfer { direction, host, memory, .. })) = state.slots.get(number as usize) else {
            return;
        };
        if by_ring {
            let pushed = state.ring.as_mut().is_some_and(|ring| ring.push(number, *direction, memory, host.0));
            if !pushed {
                self.again(state, number);
            }
        } else if let Some(end) = self.ends.get(number as usize) {
            let begin = || self.image.guest_volume().device().begin(*direction, host.0, memory, end.done());
            // The transfer has failed then, or the device knows of it and tells of its end.
            if catch_unwind(AssertUnwindSafe(begin)).is_err() {
                self.image.panicked("the beginning of a transfer");
            }
        }
    }

    /// Has a transfer carried out by a helper instead, from the start: what part of it was done does no harm, since the
    /// request has not ended, and its clusters are still its own.
    fn again(self: &Arc<Self>, state: &mut State, number: u32) {
        let Some(slot) = state.slots.get_mut(number as usize) else { return };
        match std::mem::replace(slot, Slot::Helped) {
            Slot::Transfer(transfer) => {
                state.transfers -= 1;
                // It is in flight, and the helpers may all be waiting at the gate for requests in flight to end.
                let job = Job { number, task: Task::Transfer(transfer) };
                if let Err((job, _)) = Helpers::hand_over(self, job, Turn::AtOnce) {
                    // It waits for nothing but the device.
                    self.carry_out(job);
                }
            }
            other => *slot = other,
        }
    }

    /// Takes in what has ended. Costs no system call.
    fn collect(self: &Arc<Self>, state: &mut State) {
        while let Some((number, moved)) = state.ring.as_mut().and_then(Ring::collect) {
            let whole = matches!(state.slots.get(number as usize), Some(Slot::Transfer(t))
                if usize::try_from(moved).is_ok_and(|moved| moved == t.memory.len()));
            if whole { self.transferred(state, number, Ok(())) } else { self.again(state, number) }
        }
        while let Some(number) = state.ring.as_mut().and_then(Ring::refused) {
            self.again(state, number);
        }
        while let Some((number, news)) = self.mailbox.take() {
            match news {
                News::Transferred(result) => self.transferred(state, number, result),
                News::Ended(result) => {
                    if let Some((_, user_data)) = state.end(number) {
                        self.ready(state, user_data, result);
                    }
                }
            }
        }
    }

    /// A transfer has ended, and with it its request.
    fn transferred(&self, state: &mut State, number: u32, result: std::io::Result<()>) {
        let Some((Slot::Transfer(transfer), user_data)) = state.end(number) else { return };
        let request = self.image.epochs.attach(transfer.request);
        let result = result.map_err(Error::io(transfer.direction.action(), transfer.host.0));
        if result.is_ok() {
            self.image.end(request, transfer.memory.len() as u64, transfer.direction.purpose());
        }
        self.ready(state, user_data, result);
    }

    /// Hands over what was submitted, and takes in what has ended. Whether there was anything to hand over.
    ///
    /// The kernel may take none of it, or not all, when it is short of memory. Who reaps looks again by itself; who has armed
    /// the queue is woken to do so, since nobody else might.
    fn look(self: &Arc<Self>, state: &mut State) -> bool {
        let submit = state.ring.as_mut().is_some_and(|ring| ring.has_waiting() || ring.owes());
        if submit && let Some(ring) = &mut state.ring {
            ring.submit();
        }
        self.collect(state);
        if state.armed && state.ring.as_ref().is_some_and(Ring::has_waiting) {
            self.mailbox.announce();
        }
        submit
    }

    /// Sleeps until `want` more completions may be there; something is in flight.
    fn sleep(&self, state: &mut State, want: usize, left: Option<Duration>) {
        let all_in_ring = state.in_flight() == state.transfers;
        match &mut state.ring {
            None => self.mailbox.sleep(left),
            Some(ring) if all_in_ring => ring.wait(want, left, None),
            Some(ring) => {
                if let Some(bell) = self.mailbox.lie_down() {
                    ring.wait(1, left, Some(bell));
                    self.mailbox.rise();
                }
            }
        }
    }

    fn disarm(&self, state: &mut State) {
        if std::mem::take(&mut state.armed) {
            if let Some(ring) = &mut state.ring {
                ring.quieten();
            }
            self.mailbox.disarm();
        }
    }

    fn carry_out_task(&self, task: Task) -> Result<()> {
        let image = &self.image;
        match task {
            Task::Request(Request::Read { offset, mut memory }) => image.read_blocking(offset, memory.destination()),
            Task::Request(Request::Write { offset, memory }) => image.write_blocking(offset, memory.source()),
            Task::Request(Request::Discard { offset, length }) => block_on(image.discard(offset, length)),
            Task::Request(Request::WriteZeroes { offset, length, may_unmap }) => {
                block_on(image.write_zeroes(offset, length, may_unmap))
            }
            Task::Request(Request::Flush) => block_on(image.flush()),
            Task::Transfer(Transfer { direction, host, mut memory, request }) => {
                let request = image.epochs.attach(request);
                let action = direction.action();
                match direction {
                    Direction::Read => block_on(image.guest_volume().read(action, host.0, memory.destination()))?,
                    Direction::Write => block_on(image.guest_volume().write(action, host.0, memory.source()))?,
                }
                image.end(request, memory.len() as u64, direction.purpose());
                Ok(())
            }
        }
    }
}

impl<D: BlockDevice> Work for Shared<D> {
    type Job = Job;

    fn helpers(&self) -> &Helpers<Job> {
        &self.helpers
    }

    fn carry_out(&self, job: Job) {
        let result = catch_unwind(AssertUnwindSafe(|| self.carry_out_task(job.task)));
        let result = result.unwrap_or_else(|_| {
            // What the request was changing is in doubt: nothing more may be written.
            self.image.panicked("a request of a queue");
            Err(Error::Failed { reason: "a request of a queue panicked".to_owned() })
        });
        self.mailbox.post((job.number, News::Ended(result)));
    }
}

impl<D: BlockDevice> Straggler for Shared<D> {
    fn poke(self: Arc<Self>) -> bool {
        // Locked: somebody is at it, and collects what has ended.
        let Some(mut state) = self.state.try_lock() else { return true };
        self.look(&mut state);
        state.transfers > 0
    }
}

impl Direction {
    fn purpose(self) -> Purpose {
        match self {
            Direction::Read => Purpose::Read,
            Direction::Write => Purpose::Write,
        }
    }

    /// What error messages say.
    fn action(self) -> &'static str {
        match self {
            Direction::Read => "reading guest data",
            Direction::Write => "writing guest data",
        }
    }
}
