//! Memory that is asked for more than a file would hold: sparse, counted, and strict about its bounds.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use qcow_recycler::buf::{IoBuf, IoBufMut};
use qcow_recycler::device::{BlockDevice, Features};

use super::meter;
use super::mutate::File;

const PAGE: usize = 4096;
/// No file is longer.
const LONGEST: u64 = 1 << 62;

#[derive(Default)]
struct State {
    pages: BTreeMap<u64, Box<[u8; PAGE]>>,
    length: u64,
    operations: u64,
    changes: u64,
    broken: Option<String>,
}

/// A device in memory; clones share it.
#[derive(Clone)]
pub struct Sparse {
    state: Arc<Mutex<State>>,
    features: Features,
    most_operations: u64,
}

impl Sparse {
    /// A device that holds a file. After `most_operations` it fails: whoever needs more of them is taken to hang.
    pub fn new(file: &File, features: Features, most_operations: u64) -> Self {
        let _unmetered = meter::pause();
        let mut state = State { length: file.length, ..State::default() };
        for (n, page) in file.bytes.chunks(PAGE).enumerate() {
            if page.iter().any(|&b| b != 0) {
                let mut bytes = Box::new([0; PAGE]);
                bytes[..page.len()].copy_from_slice(page);
                state.pages.insert(n as u64, bytes);
            }
        }
        Sparse { state: Arc::new(Mutex::new(state)), features, most_operations }
    }

    /// A device that holds what this one holds now, and counts for itself. The file may be long: only what is in it is copied.
    pub fn copied(&self, features: Features, most_operations: u64) -> Self {
        let _unmetered = meter::pause();
        let (pages, length) = {
            let state = self.state();
            (state.pages.clone(), state.length)
        };
        let state = State { pages, length, ..State::default() };
        Sparse { state: Arc::new(Mutex::new(state)), features, most_operations }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How often it was written to, punched or made longer or shorter.
    pub fn changes(&self) -> u64 {
        self.state().changes
    }

    /// A rule of the device's trait that was broken, or the number of operations that was too high.
    pub fn broken(&self) -> Option<String> {
        self.state().broken.clone()
    }

    /// The file's bytes, as far as they fit into `most`.
    pub fn contents(&self, most: u64) -> File {
        let state = self.state();
        let end = state.pages.last_key_value().map_or(0, |(n, _)| (n + 1) * PAGE as u64).min(state.length).min(most);
        let mut bytes = vec![0; end as usize];
        state.copy_out(0, &mut bytes);
        File { bytes, length: state.length }
    }

    fn begin(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.state();
        state.operations += 1;
        if state.operations > self.most_operations {
            let message = format!("more than {} operations of the device", self.most_operations);
            state.broken.get_or_insert(message);
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(state)
    }

    fn change(&self, offset: u64, length: u64) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.begin()?;
        state.changes += 1;
        state.bound("a change", offset, length)?;
        Ok(state)
    }

    /// Pages are not the library's memory.
    fn edit(&self, offset: u64, length: u64, source: Option<&[u8]>) -> io::Result<()> {
        let _unmetered = meter::pause();
        let mut state = self.change(offset, length)?;
        match source {
            Some(bytes) => state.copy_in(offset, bytes),
            None => state.zero(offset, length),
        }
        Ok(())
    }
}

impl State {
    /// The library knows the length, and stays below it.
    fn bound(&mut self, what: &str, offset: u64, length: u64) -> io::Result<()> {
        if offset.checked_add(length).is_some_and(|end| end <= self.length) {
            return Ok(());
        }
        let message = format!("{what} of {length} bytes at {offset:#x}, past the end at {:#x}", self.length);
        self.broken.get_or_insert(message);
        Err(io::ErrorKind::UnexpectedEof.into())
    }

    fn copy_out(&self, offset: u64, out: &mut [u8]) {
        let mut done = 0;
        while done < out.len() {
            let at = offset + done as u64;
            let within = (at % PAGE as u64) as usize;
            let count = (PAGE - within).min(out.len() - done);
            match self.pages.get(&(at / PAGE as u64)) {
                Some(page) => out[done..done + count].copy_from_slice(&page[within..within + count]),
                None => out[done..done + count].fill(0),
            }
            done += count;
        }
    }

    fn copy_in(&mut self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let within = (at % PAGE as u64) as usize;
            let count = (PAGE - within).min(bytes.len() - done);
            let part = &bytes[done..done + count];
            let page = at / PAGE as u64;
            if self.pages.contains_key(&page) || part.iter().any(|&b| b != 0) {
                let page = self.pages.entry(page).or_insert_with(|| Box::new([0; PAGE]));
                page[within..within + count].copy_from_slice(part);
            }
            done += count;
        }
    }

    fn zero(&mut self, offset: u64, length: u64) {
        let end = offset + length;
        let touched: Vec<u64> =
            self.pages.range(offset / PAGE as u64..end.div_ceil(PAGE as u64)).map(|(&n, _)| n).collect();
        for n in touched {
            let start = n * PAGE as u64;
            let (from, to) = (offset.max(start) - start, end.min(start + PAGE as u64) - start);
            if (from, to) == (0, PAGE as u64) {
                self.pages.remove(&n);
            } else if let Some(page) = self.pages.get_mut(&n) {
                page[from as usize..to as usize].fill(0);
            }
        }
    }
}

impl BlockDevice for Sparse {
    fn features(&self) -> Features {
        self.features
    }

    async fn length(&self) -> io::Result<u64> {
        Ok(self.begin()?.length)
    }

    async fn read(&self, offset: u64, mut buf: IoBufMut<'_>) -> io::Result<()> {
        let _unmetered = meter::pause();
        let mut state = self.begin()?;
        state.bound("a read", offset, buf.len() as u64)?;
        let mut bytes = vec![0; buf.len()];
        state.copy_out(offset, &mut bytes);
        buf.copy_from(&bytes);
        Ok(())
    }

    async fn write(&self, offset: u64, buf: IoBuf<'_>) -> io::Result<()> {
        let _unmetered = meter::pause();
        let mut bytes = vec![0; buf.len()];
        buf.copy_to(&mut bytes);
        self.edit(offset, bytes.len() as u64, Some(&bytes))
    }

    async fn flush(&self) -> io::Result<()> {
        self.begin().map(drop)
    }

    async fn truncate(&self, length: u64) -> io::Result<()> {
        let _unmetered = meter::pause();
        let mut state = self.begin()?;
        state.changes += 1;
        if length > LONGEST {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let old = state.length;
        if length < old {
            state.zero(length, old - length);
        }
        state.length = length;
        Ok(())
    }

    async fn punch_hole(&self, offset: u64, length: u64) -> io::Result<()> {
        self.edit(offset, length, None)
    }

    async fn write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        self.edit(offset, length, None)
    }

    async fn copy_range(&self, from: u64, to: u64, length: u64) -> io::Result<()> {
        let _unmetered = meter::pause();
        let bytes = {
            let mut state = self.begin()?;
            state.bound("a copy", from, length)?;
            let mut bytes = vec![0; length as usize];
            state.copy_out(from, &mut bytes);
            bytes
        };
        self.edit(to, length, Some(&bytes))
    }
}
