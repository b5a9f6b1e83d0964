//! A block device that forgets: deterministic, in memory, with delays, faults and power cuts.
//!
//! It keeps what the last flush made durable, what readers see now, and in between the log of sector writes and
//! changes of length that a power cut may or may not undo. It also holds the library to the trait's rules: an
//! operation past the end, two overlapping operations of which both write, or a change of length under an operation
//! in flight is recorded as a violation.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use qcow_recycler::blocking::block_on;
use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::device::{BlockDevice, Features};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::content::{Content, SECTOR, is_guest_data, recognise};
use super::crash::{Atom, Epoch};

/// What is asked of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Length,
    Read,
    Write,
    Flush,
    Truncate,
    PunchHole,
    WriteZeroes,
    CopyRange,
}

impl Kind {
    /// Whether the device's contents or length change.
    pub fn modifies(self) -> bool {
        !matches!(self, Kind::Length | Kind::Read | Kind::Flush)
    }
}

/// How long operations take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delay {
    /// Every future is ready at its first poll.
    None,
    /// Each operation yields up to so many times.
    Yields(u32),
    /// Each operation yields up to so many times, some sleep for up to so many milliseconds, and a few for thirty times
    /// that (needs tokio's timer).
    Sleeps { yields: u32, millis: u64 },
    /// Writes of guest data take about so many milliseconds, everything else is done at once: everything overtakes them.
    SlowGuests { millis: u64 },
    /// Flushes take about so many milliseconds, everything else is done at once: much happens while one is under way.
    SlowFlushes { millis: u64 },
}

/// What an operation is, as far as delays tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    GuestData,
    Flush,
    Other,
}

/// How a device behaves.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Decides delays, and what of a failed or dropped operation happened.
    pub seed: u64,
    pub delay: Delay,
    pub features: Features,
    /// Every change is a violation.
    pub read_only: bool,
    /// Keep the log that crash images are made of. Without it, nothing is ever lost.
    pub record: bool,
    /// Whoever uses the library may write a guest's sector twice at the same time: that is no violation then.
    pub overlap: bool,
    /// Whether it says that no range occupies space.
    pub sparse: bool,
}

impl Settings {
    /// Everything supported, at once, recorded.
    pub fn new(seed: u64) -> Self {
        let features = Features { resize: true, punch_hole: true, write_zeroes: true, copy_range: true };
        Settings { seed, delay: Delay::None, features, read_only: false, record: true, overlap: false, sparse: false }
    }
}

/// A failure to come.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// How many operations (of any kind, counted from [`SimDevice::arm`] on) succeed before.
    pub after: u64,
    /// The error.
    pub errno: i32,
    /// Whether all later operations that this error can befall fail as well.
    pub lasting: bool,
    /// The kind of operation that it befalls; all kinds if none is named.
    pub only: Option<Kind>,
}

impl Fault {
    /// A full disk fails neither reads nor flushes nor punched holes.
    fn befalls(&self, kind: Kind) -> bool {
        let takes_room = matches!(kind, Kind::Write | Kind::Truncate | Kind::WriteZeroes | Kind::CopyRange);
        self.only.is_none_or(|only| kind == only) && (self.errno != libc::ENOSPC || takes_room)
    }
}

/// An operation that a fault befell.
#[derive(Clone, Copy, Debug)]
pub struct Fired {
    pub kind: Kind,
    pub length: u64,
}

type Observer = Arc<dyn Fn(&SimDevice, &str) + Send + Sync>;

/// The device; clones are handles to the same one.
#[derive(Clone)]
pub struct SimDevice {
    inner: Arc<Inner>,
}

struct Inner {
    settings: Settings,
    state: Mutex<State>,
    observer: Mutex<Option<Observer>>,
}

struct Pending {
    atom: Atom,
    /// Rises by one with every entry.
    number: u64,
    /// A flush that covered it failed: no later flush makes it durable.
    orphan: bool,
}

#[derive(Clone)]
enum Effect {
    Patch { offset: u64, bytes: Arc<Vec<u8>> },
    Length(u64),
    Nothing,
}

struct InFlight {
    kind: Kind,
    ranges: Vec<(Range<u64>, bool)>,
    /// What it was asked to do.
    asked: Effect,
    /// What it does: less, if it is to fail.
    effect: Effect,
}

struct State {
    now: Vec<u8>,
    durable: Arc<Vec<u8>>,
    generation: u64,
    pending: Vec<Pending>,
    logged: u64,
    in_flight: BTreeMap<u64, InFlight>,
    operations: u64,
    rng: SmallRng,
    fault: Option<Fault>,
    since_armed: u64,
    fired: Vec<Fired>,
    violations: Vec<String>,
    limit: u64,
}

impl SimDevice {
    /// A device that durably holds `image`.
    pub fn new(image: Vec<u8>, settings: Settings) -> Self {
        let state = State {
            durable: if settings.record { Arc::new(image.clone()) } else { Arc::default() },
            now: image,
            generation: 0,
            pending: Vec::new(),
            logged: 0,
            in_flight: BTreeMap::new(),
            operations: 0,
            rng: SmallRng::seed_from_u64(settings.seed),
            fault: None,
            since_armed: 0,
            fired: Vec::new(),
            violations: Vec::new(),
            limit: u64::MAX,
        };
        SimDevice { inner: Arc::new(Inner { settings, state: Mutex::new(state), observer: Mutex::new(None) }) }
    }

    /// Calls `observer` after every start and end of an operation that adds or removes uncertainty.
    pub fn observe(&self, observer: impl Fn(&SimDevice, &str) + Send + Sync + 'static) {
        *self.inner.observer.lock() = Some(Arc::new(observer));
    }

    /// Stops observing.
    pub fn ignore(&self) {
        *self.inner.observer.lock() = None;
    }

    /// Makes an operation fail; the count starts now.
    pub fn arm(&self, fault: Fault) {
        let mut state = self.inner.state.lock();
        state.since_armed = 0;
        state.fired.clear();
        state.fault = Some(fault);
    }

    /// Lets everything succeed again; returns what failed.
    pub fn disarm(&self) -> Vec<Fired> {
        let mut state = self.inner.state.lock();
        state.fault = None;
        std::mem::take(&mut state.fired)
    }

    /// Operations begun so far.
    pub fn operations(&self) -> u64 {
        self.inner.state.lock().operations
    }

    /// After so many operations in all, everything fails: ends a library that never comes to rest.
    pub fn limit_operations(&self, limit: u64) {
        self.inner.state.lock().limit = limit;
    }

    /// Broken rules of the device trait.
    pub fn violations(&self) -> Vec<String> {
        self.inner.state.lock().violations.clone()
    }

    /// What a reader sees now.
    pub fn contents(&self) -> Vec<u8> {
        self.inner.state.lock().now.clone()
    }

    /// How many sector writes and changes of length a power cut would put in doubt.
    pub fn uncertain(&self) -> usize {
        let state = self.inner.state.lock();
        state.pending.len() + state.in_flight.values().map(|o| o.effect.atoms()).sum::<usize>()
    }

    /// What a power cut at this instant could leave.
    pub fn epoch(&self, event: &str) -> Epoch {
        let state = self.inner.state.lock();
        let mut atoms: Vec<Atom> = state.pending.iter().map(|p| p.atom.clone()).collect();
        for operation in state.in_flight.values() {
            match &operation.effect {
                Effect::Nothing => {}
                Effect::Length(length) => atoms.push(Atom::Length(*length)),
                Effect::Patch { offset, bytes } => post_images(&state.now, *offset, bytes, &mut |a| atoms.push(a)),
            }
        }
        Epoch { durable: state.durable.clone(), generation: state.generation, atoms, event: event.to_owned() }
    }

    fn event(&self, text: impl FnOnce() -> String) {
        // Cloned out, so that the observer may use the device.
        let observer = self.inner.observer.lock().clone();
        if let Some(observer) = observer {
            observer(self, &text());
        }
    }
}

impl Effect {
    /// Whether two overlapping writes may be of one guest's sectors: where they overlap, none holds another sector's data
    /// than the other.
    fn same_guest(&self, other: &Effect) -> bool {
        let (Effect::Patch { offset: a, bytes: mine }, Effect::Patch { offset: b, bytes: theirs }) = (self, other)
        else {
            return false;
        };
        let sector = SECTOR as u64;
        let start = *a.max(b);
        let end = (a + mine.len() as u64).min(b + theirs.len() as u64);
        let at = |bytes: &[u8], from: u64, offset: u64| -> Option<u64> {
            let start = (from - offset) as usize;
            match bytes.get(start..start + SECTOR).map(recognise) {
                Some(Content::Data { sector, .. }) => Some(sector),
                _ => None,
            }
        };
        (start..end).step_by(SECTOR).take_while(|from| from + sector <= end).all(|from| {
            let (mine, theirs) = (at(mine, from, *a), at(theirs, from, *b));
            mine.is_none() || theirs.is_none() || mine == theirs
        })
    }

    fn atoms(&self) -> usize {
        match self {
            Effect::Nothing => 0,
            Effect::Length(_) => 1,
            Effect::Patch { offset, bytes } => {
                let sector = SECTOR as u64;
                ((offset + bytes.len() as u64).div_ceil(sector) - offset / sector) as usize
            }
        }
    }
}

/// Whole sectors as they are once `bytes` are stored over `now`.
fn post_images(now: &[u8], offset: u64, bytes: &[u8], out: &mut dyn FnMut(Atom)) {
    let end = offset as usize + bytes.len();
    let mut at = offset as usize;
    while at < end {
        let index = at / SECTOR;
        let stop = end.min((index + 1) * SECTOR);
        let mut sector = [0; SECTOR];
        let old = now.get(index * SECTOR..).unwrap_or_default();
        let len = old.len().min(SECTOR);
        sector[..len].copy_from_slice(&old[..len]);
        sector[at % SECTOR..at % SECTOR + (stop - at)]
            .copy_from_slice(&bytes[at - offset as usize..stop - offset as usize]);
        out(Atom::Sector { index: index as u64, bytes: Arc::new(sector) });
        at = stop;
    }
}

impl State {
    /// Makes an effect visible to readers.
    fn apply(&mut self, effect: &Effect) {
        match effect {
            Effect::Nothing => {}
            Effect::Length(length) => self.now.resize(*length as usize, 0),
            Effect::Patch { offset, bytes } => {
                let start = (*offset as usize).min(self.now.len());
                let end = (start + bytes.len()).min(self.now.len());
                self.now[start..end].copy_from_slice(&bytes[..end - start]);
            }
        }
    }

    /// Puts an effect that is visible already into the log.
    fn log(&mut self, effect: &Effect) {
        let State { now, pending, logged, .. } = self;
        let mut push = |atom| {
            pending.push(Pending { atom, number: *logged, orphan: false });
            *logged += 1;
        };
        match effect {
            Effect::Nothing => {}
            Effect::Length(length) => push(Atom::Length(*length)),
            // What is there now, not what the operation wrote: an overlapping one may have come after it.
            Effect::Patch { offset, bytes } => {
                let end = now.len().min(*offset as usize + bytes.len());
                let there = now.get(*offset as usize..end).unwrap_or_default();
                post_images(now, *offset, there, &mut push);
            }
        }
    }

    /// Makes the log's entries before `number` durable, but for orphans. What a durable entry overwrites can no longer
    /// come back, so it leaves the log.
    fn promote(&mut self, number: u64) {
        let durable = Arc::make_mut(&mut self.durable);
        let mut kept: Vec<Pending> = Vec::new();
        for entry in std::mem::take(&mut self.pending) {
            let room = match &entry.atom {
                Atom::Length(_) => true,
                Atom::Sector { index, .. } => (*index as usize * SECTOR) < durable.len(),
            };
            if entry.number >= number || entry.orphan || !room {
                kept.push(entry);
                continue;
            }
            match &entry.atom {
                Atom::Length(length) => kept.retain(|k| match &k.atom {
                    Atom::Length(_) => false,
                    Atom::Sector { index, .. } => index * (SECTOR as u64) < *length,
                }),
                Atom::Sector { index, .. } => {
                    kept.retain(|k| !matches!(&k.atom, Atom::Sector { index: other, .. } if other == index));
                }
            }
            entry.atom.apply(durable);
        }
        self.pending = kept;
        self.generation += 1;
    }

    /// The fault that befalls an operation now, if one does.
    fn fault(&mut self, kind: Kind, ranges: &[(Range<u64>, bool)]) -> Option<io::Error> {
        if self.operations > self.limit {
            self.violation(format!("more than {} operations: the library does not come to rest", self.limit));
            return Some(io::Error::other("the device's limit of operations is used up"));
        }
        let fault = self.fault?;
        let number = self.since_armed;
        self.since_armed += 1;
        let due = number == fault.after || number > fault.after && (fault.lasting || self.fired.is_empty());
        if !due || !fault.befalls(kind) || !fault.lasting && !self.fired.is_empty() {
            return None;
        }
        let length = ranges.last().map_or(0, |(r, _)| r.end - r.start);
        self.fired.push(Fired { kind, length });
        Some(io::Error::from_raw_os_error(fault.errno))
    }

    fn violation(&mut self, text: String) {
        if self.violations.len() < 20 {
            self.violations.push(text);
        }
    }
}

/// An operation in flight; dropping it unfinished leaves it done or not done, never to be touched again.
struct Operation<'a> {
    device: &'a SimDevice,
    id: u64,
    kind: Kind,
    /// Whether its effect is visible already.
    applied: bool,
    failed: Option<io::Error>,
    /// For a flush: the number of the first log entry that it does not cover.
    covers: u64,
    ended: bool,
}

impl SimDevice {
    fn begin(&self, kind: Kind, ranges: Vec<(Range<u64>, bool)>, effect: Effect) -> io::Result<Operation<'_>> {
        let mut state = self.inner.state.lock();
        let id = state.operations;
        state.operations += 1;
        let describe = || format!("operation {id}, {kind:?} {ranges:x?}");
        if self.inner.settings.read_only && kind.modifies() {
            let text = format!("{}: a change to a device that must not change", describe());
            state.violation(text);
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        let end = state.now.len() as u64;
        if ranges.iter().any(|(r, _)| r.end > end) {
            let text = format!("{}: past the end {end:#x}", describe());
            state.violation(text);
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let shrinks_to = match effect {
            Effect::Length(length) => length,
            _ => u64::MAX,
        };
        let clash = state.in_flight.values().find(|other| {
            let both_write = ranges
                .iter()
                .any(|(a, write)| *write && other.ranges.iter().any(|(b, w)| *w && a.start < b.end && b.start < a.end));
            let excused = self.inner.settings.overlap && kind == other.kind && effect.same_guest(&other.asked);
            both_write && !excused || other.ranges.iter().any(|(b, _)| b.end > shrinks_to)
        });
        if let Some(other) = clash {
            let text = format!("{}: while {:?} {:x?} is in flight", describe(), other.kind, other.ranges);
            state.violation(text);
        }
        let failed = state.fault(kind, &ranges);
        let covers = state.logged;
        let early = failed.is_none() && state.rng.random_bool(0.5);
        if early {
            state.apply(&effect);
        }
        let asked = effect.clone();
        // A failed write may have reached any of its sectors.
        let effect = if failed.is_some() { part(effect, &mut state.rng) } else { effect };
        state.in_flight.insert(id, InFlight { kind, ranges, asked, effect });
        drop(state);
        if kind.modifies() {
            self.event(|| format!("operation {id}, {kind:?}, in flight"));
        }
        Ok(Operation { device: self, id, kind, applied: early, failed, covers, ended: false })
    }

    /// Whether a transfer happens during the call. Half of them: the library has ways for either.
    fn is_prompt(&self) -> bool {
        self.inner.settings.delay == Delay::None && self.inner.state.lock().rng.random_bool(0.5)
    }

    async fn pause(&self, class: Class) {
        let (yields, millis) = {
            let mut state = self.inner.state.lock();
            let mut up_to = |n: u32| if n == 0 { 0 } else { state.rng.random_range(0..=n) };
            match self.inner.settings.delay {
                Delay::None => (0, 0),
                Delay::Yields(n) => (up_to(n), 0),
                Delay::SlowGuests { millis } if class == Class::GuestData => {
                    (0, state.rng.random_range(millis / 2..=millis))
                }
                Delay::SlowFlushes { millis } if class == Class::Flush => {
                    (0, state.rng.random_range(millis / 2..=millis))
                }
                Delay::SlowGuests { .. } | Delay::SlowFlushes { .. } => (0, 0),
                Delay::Sleeps { yields, millis } => {
                    let count = up_to(yields);
                    let longest = match state.rng.random_range(0..100) {
                        0..=2 => millis * 30,
                        3..=25 => millis,
                        _ => 0,
                    };
                    (count, state.rng.random_range(0..=longest))
                }
            }
        };
        for _ in 0..yields {
            tokio::task::yield_now().await;
        }
        if millis > 0 {
            tokio::time::sleep(Duration::from_millis(millis)).await;
        }
    }

    async fn modify(&self, kind: Kind, ranges: Vec<(Range<u64>, bool)>, effect: Effect) -> io::Result<()> {
        let class = match &effect {
            Effect::Patch { bytes, .. } if kind == Kind::Write && is_guest_data(bytes) => Class::GuestData,
            _ => Class::Other,
        };
        let operation = self.begin(kind, ranges, effect)?;
        self.pause(class).await;
        operation.end()
    }

    async fn zero(&self, kind: Kind, offset: u64, length: u64) -> io::Result<()> {
        let bytes = Arc::new(vec![0; length as usize]);
        self.modify(kind, vec![(offset..offset + length, true)], Effect::Patch { offset, bytes }).await
    }
}

/// What a failed operation did nevertheless: nothing, all, or a run of its sectors.
fn part(effect: Effect, rng: &mut SmallRng) -> Effect {
    match (effect, rng.random_range(0..3)) {
        (_, 0) => Effect::Nothing,
        (Effect::Patch { offset, bytes }, 1) => {
            let sectors = bytes.len().div_ceil(SECTOR);
            let end = (rng.random_range(0..=sectors) * SECTOR).min(bytes.len());
            Effect::Patch { offset, bytes: Arc::new(bytes[..end].to_vec()) }
        }
        (effect, _) => effect,
    }
}

impl Operation<'_> {
    fn end(mut self) -> io::Result<()> {
        self.finish(true);
        match self.failed.take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn finish(&mut self, happens: bool) {
        self.ended = true;
        let mut state = self.device.inner.state.lock();
        let Some(InFlight { effect, .. }) = state.in_flight.remove(&self.id) else { return };
        if happens && !self.applied {
            state.apply(&effect);
        }
        let record = self.device.inner.settings.record;
        if (happens || self.applied) && record {
            state.log(&effect);
        }
        if self.kind == Kind::Flush && record {
            if self.failed.is_some() {
                // As a host's page cache does: the pages are marked clean, and the next flush knows nothing of them.
                let covers = self.covers;
                state.pending.iter_mut().filter(|p| p.number < covers).for_each(|p| p.orphan = true);
            } else if happens {
                state.promote(self.covers);
            }
        }
        drop(state);
        if self.kind.modifies() || self.kind == Kind::Flush {
            let (id, kind) = (self.id, self.kind);
            let how = if self.failed.is_some() { "failed" } else { "ended" };
            self.device.event(|| format!("operation {id}, {kind:?}, {how}"));
        }
    }
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        if !self.ended {
            let happens = self.kind != Kind::Flush && self.device.inner.state.lock().rng.random_bool(0.5);
            self.finish(happens);
        }
    }
}

fn supported(yes: bool) -> io::Result<()> {
    if yes { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
}

impl BlockDevice for SimDevice {
    fn features(&self) -> Features {
        self.inner.settings.features
    }

    async fn length(&self) -> io::Result<u64> {
        let operation = self.begin(Kind::Length, Vec::new(), Effect::Nothing)?;
        self.pause(Class::Other).await;
        operation.end()?;
        Ok(self.inner.state.lock().now.len() as u64)
    }

    fn read_now(&self, offset: u64, buf: IoBufMut<'_>) -> Option<io::Result<()>> {
        self.is_prompt().then(|| block_on(self.read(offset, buf)))
    }

    fn write_now(&self, offset: u64, buf: IoBuf<'_>) -> Option<io::Result<()>> {
        self.is_prompt().then(|| block_on(self.write(offset, buf)))
    }

    async fn read(&self, offset: u64, mut buf: IoBufMut<'_>) -> io::Result<()> {
        let range = offset..offset + buf.len() as u64;
        let operation = self.begin(Kind::Read, vec![(range.clone(), false)], Effect::Nothing)?;
        // A read sees what is there at some instant of its life: tried are the first and the last.
        let early = self.inner.state.lock().rng.random_bool(0.5);
        let get = |buf: &mut IoBufMut<'_>| {
            let state = self.inner.state.lock();
            match state.now.get(range.start as usize..range.end as usize) {
                Some(bytes) => {
                    buf.copy_from(bytes);
                    Ok(())
                }
                None => Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
            }
        };
        if early {
            get(&mut buf)?;
            self.pause(Class::Other).await;
        } else {
            self.pause(Class::Other).await;
            get(&mut buf)?;
        }
        operation.end()
    }

    async fn write(&self, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
        let mut bytes = vec![0; buf.len()];
        buf.copy_to(&mut bytes);
        let range = offset..offset + bytes.len() as u64;
        self.modify(Kind::Write, vec![(range, true)], Effect::Patch { offset, bytes: Arc::new(bytes) }).await
    }

    fn is_hole(&self, _offset: u64, _length: u64) -> bool {
        self.inner.settings.sparse
    }

    async fn flush(&self) -> io::Result<()> {
        let operation = self.begin(Kind::Flush, Vec::new(), Effect::Nothing)?;
        self.pause(Class::Flush).await;
        operation.end()
    }

    async fn truncate(&self, length: u64) -> io::Result<()> {
        supported(self.inner.settings.features.resize)?;
        self.modify(Kind::Truncate, Vec::new(), Effect::Length(length)).await
    }

    async fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        supported(self.inner.settings.features.punch_hole)?;
        self.zero(Kind::PunchHole, offset, length).await
    }

    async fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        supported(self.inner.settings.features.write_zeroes)?;
        self.zero(Kind::WriteZeroes, offset, length).await
    }

    async fn copy_range(&self, from: u64, to: u64, length: u64) -> io::Result<()> {
        supported(self.inner.settings.features.copy_range)?;
        let bytes = {
            let state = self.inner.state.lock();
            state.now.get(from as usize..(from + length) as usize).map(<[u8]>::to_vec)
        };
        let ranges = vec![(from..from + length, false), (to..to + length, true)];
        let bytes = bytes.unwrap_or_else(|| vec![0; length as usize]);
        self.modify(Kind::CopyRange, ranges, Effect::Patch { offset: to, bytes: Arc::new(bytes) }).await
    }
}

/// Stops observing these devices.
///
/// # Errors
/// A rule of the device trait that was broken on one of them.
pub fn end(devices: [&SimDevice; 2]) -> Result<(), String> {
    devices.iter().for_each(|device| device.ignore());
    devices.iter().find_map(|device| device.violations().into_iter().next()).map_or(Ok(()), Err)
}
