//! Requests that need nothing but the device: planned, and where the device allows it carried out, without waiting.
//!
//! Most requests of a guest read or overwrite clusters whose L2 slices are in memory. For these the plan is a synchronous
//! question with a small answer, so that a caller with its own way of doing I/O can submit the transfers itself:
//!
//! 1. [`begin`](Image::begin) checks the request and puts it in flight. Hold on to the guard (or
//!    [detach](InFlight::detach) it, and attach it when the completion arrives) until the last transfer has *completed*:
//!    it is what keeps the clusters from being moved or reused under the transfer.
//! 2. [`plan`](Image::plan) says what to do with the next bytes: a transfer at a place in the file, or zeroes, or that
//!    only the asynchronous path can tell. Each transfer goes as far as the clusters follow one another in the file; ask
//!    again for the rest. Every answer is good for as long as the request is in flight.
//! 3. For [`Planned::Wait`] call [`read_range`](Image::read_range) or [`write_rest`](Image::write_rest) for the rest of the
//!    request, within the same guard.
//! 4. When all transfers have completed, [`end`](Image::end) counts the request; a failed one is only dropped.
//!
//! The transfers of one request may run in any order and at once. `Image::read` and `Image::write` do the same, one
//! transfer after the other.

use super::Image;
use super::mapping::{Purpose, Run, RunKind};
use super::obstacles::Obstacle;
use crate::buf::{IoBuf, IoBufMut};
use crate::clusters::epochs::{Counter, InFlight};
use crate::device::BlockDevice;
use crate::error::Result;
use crate::format::l2::{Entry, Mapping};
use crate::metadata::l2::Loaded;
use crate::metadata::slice::{Entries as _, Sector};
use crate::sync::atomic::Ordering;
use crate::units::{GuestOffset, HostOffset};

/// What to do with the next bytes of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Planned {
    /// Read or write this many bytes of the file with guest data, which it has.
    Transfer { host: HostOffset, length: u64 },
    /// Only for reads: this many bytes are zero.
    Zeroes { length: u64 },
    /// A table must be read, a cluster allocated, decompressed or decrypted, a backing file read: the asynchronous path.
    Wait,
}

/// What counts requests and their bytes.
fn counters(purpose: Purpose) -> (Counter, Counter) {
    match purpose {
        Purpose::Read => (Counter::Reads, Counter::ReadBytes),
        Purpose::Write => (Counter::Writes, Counter::WriteBytes),
    }
}

impl<D: BlockDevice> Image<D> {
    /// Checks a request, and puts it in flight. `None`: it is to write, and the [gate](super::gate) is closed. Only the
    /// asynchronous path waits for that.
    ///
    /// # Errors
    /// As [`read`](Image::read), and as [`write`](Image::write) if that is what it is for.
    pub(crate) fn begin(&self, offset: u64, length: u64, purpose: Purpose) -> Result<Option<InFlight<'_>>> {
        if let Some(request) = self.begin_free(offset, length, purpose) {
            return Ok(Some(request));
        }
        let request = self.epochs.enter();
        if purpose == Purpose::Write && self.obstacles.has(Obstacle::Gate) {
            return Ok(None);
        }
        self.check_request(offset, length)?;
        if purpose == Purpose::Write {
            self.ensure_writable()?;
            self.bitmaps.will_change(offset, length);
        }
        Ok(Some(request))
    }

    /// The same, if nothing is in the way and nothing is wrong.
    #[inline(always)]
    pub(super) fn begin_free(&self, offset: u64, length: u64, purpose: Purpose) -> Option<InFlight<'_>> {
        let request = self.epochs.enter();
        let free = match purpose {
            Purpose::Read => !self.obstacles.has(Obstacle::Closed),
            Purpose::Write => self.obstacles.is_empty() && self.volume.is_sound(),
        };
        (free && self.is_on_disk(offset, length)).then_some(request)
    }

    /// The same, when the gate is open.
    ///
    /// # Errors
    /// As there.
    pub(super) async fn begin_waiting(&self, offset: u64, length: u64, purpose: Purpose) -> Result<InFlight<'_>> {
        loop {
            if let Some(request) = self.begin(offset, length, purpose)? {
                return Ok(request);
            }
            self.gate.passed(&self.obstacles).await;
        }
    }

    /// A request that was [begun](Self::begin) has done what it was to do.
    #[inline]
    pub(crate) fn end(&self, request: InFlight<'_>, length: u64, purpose: Purpose) {
        let (requests, bytes) = counters(purpose);
        request.count(requests, 1);
        request.count(bytes, length);
    }

    /// The same, on the thread that began the request.
    #[inline]
    pub(super) fn end_here(&self, request: InFlight<'_>, length: u64, purpose: Purpose) {
        request.count_here(counters(purpose), length);
    }

    /// What to do with the next bytes, at most `max` of them, at `at` of the virtual disk.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) for a table entry that cannot be;
    /// [`Error::PassphraseNeeded`](crate::Error::PassphraseNeeded).
    pub(crate) fn plan(&self, _in_flight: &InFlight<'_>, at: u64, max: u64, purpose: Purpose) -> Result<Planned> {
        if self.plain_span == 0 {
            self.encryption.ensure_open()?;
        }
        let run = self.lookup_cached(GuestOffset(at), max, purpose)?;
        Ok(run.map_or(Planned::Wait, |run| self.plan_run(at, run, purpose)))
    }

    fn plan_run(&self, at: u64, run: Run, purpose: Purpose) -> Planned {
        let length = run.length;
        match (run.kind, purpose) {
            // The last cluster of the file may be cut short: that is for the asynchronous path to handle.
            (RunKind::Data { host, copied }, _)
                if self.plain_span != 0
                    && (copied || purpose == Purpose::Read)
                    && host.0 + length <= self.guest_volume().length() =>
            {
                Planned::Transfer { host, length }
            }
            (RunKind::Zero, Purpose::Read) => Planned::Zeroes { length },
            (RunKind::Unallocated, Purpose::Read) if self.backing.is_zero_from(at) => Planned::Zeroes { length },
            _ => Planned::Wait,
        }
    }

    /// Reads a request of the commonest kind at once: `false` if it is not of that kind.
    #[inline(always)]
    pub(super) fn read_mapped(&self, offset: u64, buf: &mut IoBufMut<'_>) -> Result<bool> {
        let length = buf.len() as u64;
        let place = self.place_of(GuestOffset(offset), length, Purpose::Read);
        let Some((volume, host)) = place else { return Ok(false) };
        match volume.read_now("reading guest data", host.0, buf.reborrow()) {
            None => Ok(false),
            Some(Ok(())) => Ok(true),
            Some(Err(e)) => Err(e),
        }
    }

    /// Writes a request of the commonest kind at once: `false` if it is not of that kind.
    #[inline(always)]
    pub(super) fn write_mapped(&self, offset: u64, buf: IoBuf<'_>) -> Result<bool> {
        let place = self.place_of(GuestOffset(offset), buf.len() as u64, Purpose::Write);
        let Some((volume, host)) = place else { return Ok(false) };
        match volume.write_now("writing guest data", host.0, buf) {
            None => Ok(false),
            Some(Ok(())) => Ok(true),
            Some(Err(e)) => Err(e),
        }
    }

    /// Reads as much as can be read at once; returns how many bytes that were.
    pub(super) fn read_at_once(&self, request: &InFlight<'_>, offset: u64, buf: &mut IoBufMut<'_>) -> Result<usize> {
        let (mut done, mut loaded) = (0, None);
        while done < buf.len() {
            let (at, max) = (offset + done as u64, (buf.len() - done) as u64);
            let mut planned = self.plan(request, at, max, Purpose::Read)?;
            if planned == Planned::Wait {
                let mut sector = Sector::default();
                // What needs more than the entry needs the slice in the end.
                let once = (self.plain_span != 0 && !self.backing.exists()).then_some(&mut sector);
                match self.load_at_once(at, &mut loaded, once)? {
                    None | Some(Loaded::NoTable) => break,
                    Some(Loaded::Slice) => continue,
                    Some(Loaded::Sector(index)) => {
                        let run = self.run_in(&sector, index, GuestOffset(at), max)?;
                        planned = self.plan_run(at, run, Purpose::Read);
                    }
                }
            }
            match planned {
                Planned::Transfer { host, length } => {
                    let end = done + length as usize;
                    match self.guest_volume().read_now("reading guest data", host.0, buf.slice(done..end)) {
                        None => break,
                        Some(result) => result?,
                    }
                    done = end;
                }
                Planned::Zeroes { length } => {
                    let end = done + length as usize;
                    buf.slice(done..end).fill_zero();
                    done = end;
                }
                Planned::Wait => break,
            }
        }
        Ok(done)
    }

    /// The next bytes of a request could not be planned: if that is for want of a slice, and the device can read it at once,
    /// it does. `loaded` is the last place that this was done for, since once is enough.
    #[cold]
    fn load_at_once(&self, at: u64, loaded: &mut Option<u64>, once: Option<&mut Sector>) -> Result<Option<Loaded>> {
        let guest = self.meta.geometry.guest_cluster(GuestOffset(at));
        if loaded.replace(at) == Some(at) || self.meta.l2.is_seen(guest) {
            return Ok(None);
        }
        self.meta.l2.load_now(&self.volume, &self.meta.l1, guest, once).transpose()
    }

    /// Writes as much as can be written at once; returns how many bytes that were.
    pub(super) fn write_at_once(&self, request: &InFlight<'_>, offset: u64, buf: IoBuf<'_>) -> Result<usize> {
        let (mut done, mut loaded) = (0, None);
        while done < buf.len() {
            let max = (buf.len() - done) as u64;
            let planned = self.plan(request, offset + done as u64, max, Purpose::Write)?;
            let Planned::Transfer { host, length } = planned else {
                match self.load_at_once(offset + done as u64, &mut loaded, None)? {
                    Some(Loaded::Slice) => continue,
                    _ => break,
                }
            };
            let end = done + length as usize;
            match self.guest_volume().write_now("writing guest data", host.0, buf.slice(done..end)) {
                None => break,
                Some(result) => result?,
            }
            done = end;
        }
        Ok(done)
    }

    /// Writes for the first time to a cluster that reads as zeroes and has no place yet, at once. `false` if this is anything
    /// else, or if somebody must be waited for; then the range holds what it held.
    ///
    /// Somebody else may link a cluster of his own meanwhile, since no turn is taken: whoever links, looks under the slice's lock
    /// whether the entry is still what it was. The caller is in flight.
    ///
    /// The same steps as [`write_new`](Self::write_new), in the same order, and for its reasons: the data first, then the entry,
    /// if it has not changed meanwhile, behind a barrier unless the cluster's zeroes and its count are durable.
    pub(super) fn write_first_at_once(&self, offset: u64, buf: IoBuf<'_>) -> Result<bool> {
        let geometry = self.meta.geometry;
        let within = offset & (geometry.cluster_size() - 1);
        let one_plain_cluster = !buf.is_empty() && within + buf.len() as u64 <= self.plain_span;
        let simple = one_plain_cluster && !self.meta.external && !geometry.extended_l2;
        if !simple || !self.prepared.load(Ordering::Acquire) {
            return Ok(false);
        }
        let guest = geometry.guest_cluster(GuestOffset(offset));
        // Asked again under the slice's lock, which decides. Asked here, no data is written in vain while somebody freezes.
        if self.obstacles.has(Obstacle::Frozen) {
            return Ok(false);
        }
        let Some((view, index)) = self.meta.l2.view(guest) else { return Ok(false) };
        let entry = view.get(index);
        if !view.still() || !view.may_link(index) && self.lock_at_once(guest, 1)?.is_none() {
            return Ok(false);
        }
        let mapping = self.decode(guest, entry)?;
        let placeless = matches!(mapping, Mapping::Unallocated | Mapping::Zero { preallocated: None });
        if !placeless || !self.reads_as_zero(mapping, offset - within) {
            return Ok(false);
        }
        let Some(mut allocation) = self.clusters.take(1) else { return Ok(false) };
        let host = geometry.host_offset(allocation.first());
        let end = host.0 + within + buf.len() as u64;
        let written = if end <= self.volume.length() {
            self.volume.write_now("writing guest data", host.0 + within, buf)
        } else {
            None
        };
        let Some(written) = written else {
            allocation.put_back();
            return Ok(false);
        };
        written?;
        if !allocation.durable {
            self.meta.require_barrier();
        }
        let Some((slice, mut entries, index)) = self.lock_at_once(guest, 1)? else { return Ok(false) };
        if entries.get(index) != entry {
            return Ok(false);
        }
        self.meta.l2.will_change(slice);
        entries.set(index, Entry::data(host, geometry));
        allocation.link_first(1);
        drop(entries);
        self.work.notify_one();
        Ok(true)
    }

    /// Writes what [`plan`](Self::plan) could not: the rest of a request that is in flight. It may leave much that is
    /// dirty, so call [`commit_if_due`](Self::commit_if_due) when the request has ended.
    pub(crate) async fn write_rest(&self, offset: u64, buf: IoBuf<'_>) -> Result<()> {
        self.write_range(offset, buf, super::discard::Access::Shared).await
    }
}
