//! What a guest may find on its disk: now, and after a power cut.
//!
//! For every guest sector the model keeps what the last completed guest flush made durable and everything written
//! since, finished or not. Reads must find the newest finished write; after a power cut a sector may hold any of
//! them. Requests on the same sectors at the same time are the tests' to avoid.

use std::collections::BTreeMap;
use std::fmt;

use super::chain::Behind;
use super::content::{Content, SECTOR, recognise};
use super::taken::TakenAll;

/// The contents that one step allows. Usually one; more where the outcome is open (a failed write, a discard of part
/// of a cluster).
pub type Choice = Vec<Content>;

#[derive(Clone, Debug)]
struct Step {
    /// The number of the request.
    request: u64,
    allowed: Choice,
    /// The model's clock when the request ended; `None` while it is in flight.
    ended: Option<u64>,
    /// What requests in flight at the same time write.
    rivals: Choice,
}

#[derive(Clone, Debug)]
struct Cell {
    /// What the sector held at the last completed flush.
    flushed: Choice,
    steps: Vec<Step>,
}

impl Cell {
    fn new() -> Self {
        Cell { flushed: vec![Content::Zero], steps: Vec::new() }
    }

    /// What a read finds that runs alongside no request on this sector.
    fn current(&self) -> &Choice {
        self.steps.iter().rev().find(|s| s.ended.is_some()).map_or(&self.flushed, |s| &s.allowed)
    }

    fn current_mut(&mut self) -> &mut Choice {
        match self.steps.iter_mut().rev().find(|s| s.ended.is_some()) {
            Some(step) => &mut step.allowed,
            None => &mut self.flushed,
        }
    }

    /// `undone` is a request that certainly left no trace.
    fn may_survive(&self, content: Content, undone: Option<u64>) -> bool {
        let steps = self.steps.iter().filter(|s| Some(s.request) != undone);
        self.flushed.contains(&content) || steps.into_iter().any(|s| s.allowed.contains(&content))
    }

    /// A flush that began at `began` has completed: the newest request that had ended by then is durable.
    fn flushed_at(&mut self, began: u64) {
        let Some(last) = self.steps.iter().rposition(|s| s.ended.is_some_and(|e| e <= began)) else { return };
        self.flushed = std::mem::take(&mut self.steps[last].allowed);
        // Older requests that are still in flight, or ended too late, may come after it all the same.
        let mut index = 0;
        self.steps.retain(|s| {
            index += 1;
            index - 1 > last || s.ended.is_none_or(|e| e > began)
        });
    }
}

/// The guest's disk. Sizes and positions are in sectors.
#[derive(Clone, Debug)]
pub struct Model {
    cells: Vec<Cell>,
    size: u64,
    /// Sizes that a power cut may leave besides the present one.
    other_sizes: Vec<u64>,
    /// The size before, and the request that cuts off what is past the new end, while the disk is being made smaller.
    shrinking: Option<(u64, Request)>,
    clock: u64,
    requests: u64,
    watches: BTreeMap<u64, Watch>,
    /// The internal snapshots.
    pub taken: TakenAll,
    /// Rises whenever a flush or resize completes, that is, whenever less is allowed after a power cut than before.
    pub tightened: u64,
}

/// Contents that are not allowed.
#[derive(Clone, Copy, Debug)]
pub struct Mismatch {
    pub sector: u64,
    pub found: Content,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "guest sector {} holds {}", self.sector, self.found)?;
        match self.found {
            Content::Data { sector, .. } if sector != self.sector => write!(f, ": ANOTHER SECTOR'S DATA"),
            Content::Garbage { .. } => write!(f, ": NEVER WRITTEN BY THE GUEST"),
            _ => Ok(()),
        }
    }
}

/// What a read in flight may find.
#[derive(Clone, Debug)]
struct Watch {
    first: u64,
    allowed: Vec<Choice>,
    /// Nobody was changing the sector when the read began, or has begun to since.
    alone: Vec<bool>,
}

/// A request in flight.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub struct Request {
    number: u64,
    first: u64,
    count: u64,
}

impl Model {
    /// A disk of `size` sectors that durably holds zeroes.
    pub fn new(size: u64) -> Self {
        let cells = vec![Cell::new(); size as usize];
        Model {
            cells,
            size,
            other_sizes: Vec::new(),
            shrinking: None,
            clock: 0,
            requests: 0,
            watches: BTreeMap::new(),
            taken: TakenAll::default(),
            tightened: 0,
        }
    }

    /// A disk of `size` sectors that durably holds nothing, and shows what is behind it.
    pub fn over(behind: Behind, size: u64) -> Self {
        let mut model = Model::new(size);
        for (cell, sector) in model.cells.iter_mut().zip(0..) {
            cell.flushed = vec![behind.content(sector)];
        }
        model
    }

    /// Size of the disk in sectors.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// A number that no write had before.
    pub fn next_version(&mut self) -> u64 {
        self.requests += 1;
        self.requests
    }

    /// A request begins that gives each sector one of `allowed(sector, what it may hold now)`.
    pub fn begin(&mut self, first: u64, count: u64, allowed: impl Fn(u64, &Choice) -> Choice) -> Request {
        self.requests += 1;
        let number = self.requests;
        for sector in first..first + count {
            let cell = &mut self.cells[sector as usize];
            let allowed = allowed(sector, cell.current());
            let mut rivals = Choice::new();
            for other in cell.steps.iter_mut().filter(|s| s.ended.is_none()) {
                rivals.extend(&other.allowed);
                other.rivals.extend(&allowed);
            }
            self.taken.request(sector, &allowed);
            for watch in self.watches.values_mut() {
                let index = sector.checked_sub(watch.first).map_or(usize::MAX, |i| i as usize);
                if let Some(seen) = watch.allowed.get_mut(index) {
                    seen.extend(&allowed);
                    watch.alone[index] = false;
                }
            }
            cell.steps.push(Step { request: number, allowed, ended: None, rivals });
        }
        Request { number, first, count }
    }

    /// A request has ended well.
    pub fn end(&mut self, request: Request) {
        self.finish(request, false);
    }

    /// A request has failed, or was dropped: each of its sectors is as before or as asked.
    pub fn fail(&mut self, request: Request) {
        self.finish(request, true);
    }

    fn finish(&mut self, request: Request, failed: bool) {
        self.clock += 1;
        for sector in request.first..request.first + request.count {
            let cell = &mut self.cells[sector as usize];
            let before = if failed { cell.current().clone() } else { Choice::new() };
            let Some(step) = cell.steps.iter_mut().find(|s| s.request == request.number) else { continue };
            step.ended = Some(self.clock);
            step.allowed.extend(before);
            let rivals = std::mem::take(&mut step.rivals);
            step.allowed.extend(rivals);
        }
    }

    /// A snapshot is about to be made.
    pub fn snapshot_comes(&mut self, name: &str) {
        let may_hold = |cell: &Cell| {
            let in_flight = cell.steps.iter().filter(|s| s.ended.is_none());
            cell.current().iter().chain(in_flight.flat_map(|s| &s.allowed)).copied().collect()
        };
        let sectors = self.cells.iter().take(self.size as usize).map(may_hold).collect();
        self.taken.comes(name, sectors);
    }

    /// The disk is about to become what it was when a snapshot was made; no guest is at work. Returns the request that does
    /// that, to be ended or failed.
    pub fn snapshot_applies(&mut self, name: &str) -> Request {
        let sectors = self.taken.sectors(name).unwrap_or_default().to_vec();
        let size = sectors.len() as u64;
        if size != self.size {
            self.other_sizes.push(self.size);
        }
        if self.cells.len() < sectors.len() {
            self.cells.resize(sectors.len(), Cell::new());
        }
        self.size = size;
        let all = self.cells.len() as u64;
        self.begin(0, all, |sector, _| sectors.get(sector as usize).cloned().unwrap_or_else(|| vec![Content::Zero]))
    }

    /// The moment a flush begins, to be given to [`flushed`](Self::flushed).
    pub fn flush_begins(&self) -> u64 {
        self.clock
    }

    /// A flush that began at `began` has completed.
    pub fn flushed(&mut self, began: u64) {
        for cell in &mut self.cells {
            cell.flushed_at(began);
        }
        self.tightened += 1;
    }

    /// A resize has completed: the size is durable, and what lies past it is lost for good.
    pub fn size_flushed(&mut self) {
        for cell in self.cells.iter_mut().skip(self.size as usize) {
            *cell = Cell::new();
        }
        self.other_sizes.clear();
        self.shrinking = None;
        self.tightened += 1;
    }

    /// The disk's size is about to change to `size` sectors. What is cut off reads as zeroes if it ever comes back.
    pub fn resize(&mut self, size: u64) {
        self.other_sizes.push(self.size);
        if size < self.size {
            let request = self.begin(size, self.size - size, |_, _| vec![Content::Zero]);
            self.shrinking = Some((self.size, request));
        }
        if self.cells.len() < size as usize {
            self.cells.resize(size as usize, Cell::new());
        }
        self.size = size;
    }

    /// A resize to `size` failed: the size is the old or the new one.
    pub fn resize_failed(&mut self, before: u64) {
        self.other_sizes.push(self.size);
        if let Some((_, request)) = self.shrinking.take() {
            self.fail(request);
        }
        self.size = before;
    }

    /// Whether a power cut may leave a disk of `size` sectors.
    pub fn size_may_survive(&self, size: u64) -> bool {
        size == self.size || self.other_sizes.contains(&size)
    }

    /// A read begins; the number is to be given to [`read_ends`](Self::read_ends).
    pub fn read_begins(&mut self, first: u64, count: u64) -> u64 {
        self.requests += 1;
        let cells = &self.cells[first as usize..(first + count) as usize];
        let alone = cells.iter().map(|cell| cell.steps.iter().all(|s| s.ended.is_some())).collect();
        let allowed = cells
            .iter()
            .map(|cell| {
                let in_flight = cell.steps.iter().filter(|s| s.ended.is_none());
                cell.current().iter().chain(in_flight.flat_map(|s| &s.allowed)).copied().collect()
            })
            .collect();
        self.watches.insert(self.requests, Watch { first, allowed, alone });
        self.requests
    }

    /// A read has ended: compares what it found with what was there meanwhile, and remembers which of several
    /// possibilities it was.
    pub fn read_ends(&mut self, read: u64, bytes: Option<&[u8]>) -> Result<(), Mismatch> {
        let Some(watch) = self.watches.remove(&read) else { return Ok(()) };
        let found = bytes.unwrap_or_default().chunks_exact(SECTOR).map(recognise);
        for (index, found) in found.enumerate().take(watch.allowed.len()) {
            let sector = watch.first + index as u64;
            if !watch.allowed[index].contains(&found) {
                return Err(Mismatch { sector, found });
            }
            // What one read saw, all later ones see, until somebody writes.
            if watch.alone[index] {
                *self.cells[sector as usize].current_mut() = vec![found];
            }
        }
        Ok(())
    }

    /// Compares a disk that is at rest with what must be there.
    pub fn read(&mut self, first: u64, bytes: &[u8]) -> Result<(), Mismatch> {
        let count = ((bytes.len() / SECTOR) as u64).min((self.cells.len() as u64).saturating_sub(first));
        let read = self.read_begins(first, count);
        self.read_ends(read, Some(bytes))
    }

    /// Compares a whole disk with what may be there after a power cut.
    pub fn survived(&self, bytes: &[u8]) -> Result<(), Mismatch> {
        // A disk that is still as large as it was has lost nothing yet: its size becomes durable first.
        let size = (bytes.len() / SECTOR) as u64;
        let undone = self.shrinking.and_then(|(before, request)| (size == before).then_some(request.number));
        for (i, found) in bytes.chunks_exact(SECTOR).map(recognise).enumerate() {
            let sector = i as u64;
            let allowed = self.cells.get(i).map_or(found == Content::Zero, |c| c.may_survive(found, undone));
            if !allowed {
                return Err(Mismatch { sector, found });
            }
        }
        Ok(())
    }

    /// What the sector may hold now and after a power cut, for reports.
    pub fn explain(&self, sector: u64) -> String {
        let Some(cell) = self.cells.get(sector as usize) else { return "no such sector".into() };
        let show = |c: &Choice| c.iter().map(Content::to_string).collect::<Vec<_>>().join(" | ");
        let mut text = format!("flushed: {}", show(&cell.flushed));
        for step in &cell.steps {
            let state = if step.ended.is_some() { "ended" } else { "in flight" };
            text.push_str(&format!("; then ({state}): {}", show(&step.allowed)));
        }
        text
    }

    /// After a power cut: the disk is what was found, durably.
    pub fn settle(&mut self, bytes: &[u8]) {
        self.size = (bytes.len() / SECTOR) as u64;
        self.other_sizes.clear();
        self.shrinking = None;
        self.cells =
            bytes.chunks_exact(SECTOR).map(|s| Cell { flushed: vec![recognise(s)], steps: Vec::new() }).collect();
    }
}
