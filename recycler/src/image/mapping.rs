//! From the virtual disk to the file: what the L2 tables say about a range.

use std::ops::Range;
use std::sync::Arc;

use super::Image;
use crate::blocking::block_on;
use crate::device::BlockDevice;
use crate::device::volume::Volume;
use crate::error::{Error, Result};
use crate::format::l2::{Entry, Mapping};
use crate::metadata::slice::{Entries, Locked, Slice};
use crate::mutation::{Mutation, broken};
use crate::units::{GuestCluster, GuestOffset, HostCluster, HostOffset};

/// How a run of bytes of the virtual disk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RunKind {
    /// In the file, in one piece, from this byte on. `copied`: ours alone, so it may be written in place.
    Data { host: HostOffset, copied: bool },
    /// Reads as zeroes.
    Zero,
    /// Reads as the backing file does.
    Unallocated,
    /// Part of one compressed cluster.
    Compressed { descriptor: u64 },
}

/// A run of bytes of the virtual disk that is stored in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) kind: RunKind,
    /// In bytes.
    pub(crate) length: u64,
}

/// Why a mapping is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Read,
    /// To write in place where that is possible: moves of the clusters found are cancelled.
    Write,
}

impl Run {
    /// Whether `next`, which is stored right after this on the virtual disk, is so in the file, too.
    fn continues(&self, next: &Run) -> bool {
        match (self.kind, next.kind) {
            (RunKind::Data { host, copied }, RunKind::Data { host: h, copied: c }) => {
                host.0 + self.length == h.0 && copied == c
            }
            (RunKind::Compressed { .. }, _) => false,
            (a, b) => a == b,
        }
    }
}

/// Consecutive entries of a slice which name clusters that follow one another.
struct TargetRun {
    first: usize,
    /// How many clusters each of them names.
    each: u64,
    hosts: Range<u64>,
}

impl TargetRun {
    fn is_continued_by(&self, index: usize, hosts: &Range<u64>) -> bool {
        hosts.start == self.hosts.end
            && hosts.end - hosts.start == self.each
            && index as u64 == self.first as u64 + self.count()
    }

    /// How many entries.
    fn count(&self) -> u64 {
        (self.hosts.end - self.hosts.start) / self.each
    }

    /// The entries' indices, and what each names.
    fn each(&self) -> impl Iterator<Item = (usize, Range<u64>)> + use<> {
        let each = self.each;
        (self.first..).zip(self.hosts.clone().step_by(each as usize)).map(move |(i, c)| (i, c..c + each))
    }
}

impl<D: BlockDevice> Image<D> {
    /// What is stored from `at` on, for at most `max` bytes. Clusters that follow one another in the file are one run, as
    /// far as the slices in memory tell.
    ///
    /// The caller must be in flight (see `Epochs`), which keeps the clusters from being reused.
    pub(crate) async fn lookup(&self, at: GuestOffset, max: u64, purpose: Purpose) -> Result<Run> {
        if let Some(run) = self.lookup_cached(at, max, purpose)? {
            return Ok(run);
        }
        let guest = self.meta.geometry.guest_cluster(at);
        match self.meta.l2.slice(&self.volume, &self.meta.l1, guest).await? {
            Some((slice, index)) => {
                if purpose == Purpose::Write {
                    self.check_targets(&slice, guest, index, self.clusters_of(at, max)).await?;
                }
                self.lookup_in_slice(&slice, index, at, max, purpose)
            }
            // No table: nothing is allocated up to the end of what the missing slice would map.
            None => {
                let length = self.slice_bytes() - at.0 % self.slice_bytes();
                Ok(Run { kind: RunKind::Unallocated, length: length.min(max) })
            }
        }
    }

    /// The same, as far as it is in memory, and without a lock. `None` if the first slice is not there, or
    /// if its entries must be checked before a write: then tables must be read.
    #[inline]
    pub(crate) fn lookup_cached(&self, at: GuestOffset, max: u64, purpose: Purpose) -> Result<Option<Run>> {
        // Before any entry is looked at.
        let moving = self.moves.bounds();
        let Some(mut run) = self.look(at, max, purpose)? else { return Ok(None) };
        if run.length < max {
            self.look_on(at, max, purpose, &mut run);
        }
        if self.may_move(purpose)
            && let RunKind::Data { host, copied: true } = run.kind
        {
            let (first, count) = self.hosts_of(host, run.length);
            let moving = if broken(Mutation::BoundsAfterEntry) { self.moves.bounds() } else { moving };
            if moving.touch(first, count) {
                return self.lookup_locked(at, max);
            }
        }
        Ok(Some(run))
    }

    /// Where, in which file, a request goes that lies within one cluster of data, as most do. `None` if it does not, or if the
    /// answer is not that simple, for whatever reason: then ask [`lookup_cached`](Self::lookup_cached), which is longer and
    /// says the same.
    #[inline(always)]
    pub(crate) fn place_of(&self, at: GuestOffset, length: u64, purpose: Purpose) -> Option<(&Volume<D>, HostOffset)> {
        // Before the entry is looked at.
        let moving = (purpose == Purpose::Write).then(|| self.moves.bounds());
        let cluster_size = self.meta.geometry.cluster_size();
        let within = at.0 & (cluster_size - 1);
        // This also keeps requests to encrypted data away.
        if within + length > self.plain_span {
            return None;
        }
        if self.meta.external {
            return self.place_outside(at, length);
        }
        let (view, index) = self.meta.l2.view(self.meta.geometry.guest_cluster(at))?;
        let (host, copied) = view.data_for(purpose == Purpose::Write, index)?;
        let end = host.0 + within + length;
        if !view.still() || end > self.volume.length() {
            return None;
        }
        if let Some(moving) = moving {
            let moving = if broken(Mutation::BoundsAfterEntry) { self.moves.bounds() } else { moving };
            if !copied || moving.touch(self.meta.geometry.host_cluster(host), 1) {
                return None;
            }
        }
        Some((&self.volume, HostOffset(host.0 + within)))
    }

    /// Looks at one slice.
    #[inline]
    fn look(&self, at: GuestOffset, max: u64, purpose: Purpose) -> Result<Option<Run>> {
        let guest = self.meta.geometry.guest_cluster(at);
        let Some((view, index)) = self.meta.l2.view(guest) else {
            return if self.meta.geometry.extended_l2 { self.look_locked(guest, at, max, purpose) } else { Ok(None) };
        };
        if purpose == Purpose::Write && !view.targets().are_checked(index, self.clusters_of(at, max)) {
            return Ok(None);
        }
        let run = self.run_in(&view, index, at, max);
        // Also an error is one only if it is this slice's.
        if view.still() { run.map(Some) } else { Ok(None) }
    }

    /// Looks at one slice of extended entries, which only its lock shows whole.
    fn look_locked(&self, guest: GuestCluster, at: GuestOffset, max: u64, purpose: Purpose) -> Result<Option<Run>> {
        let Some((slice, index)) = self.meta.l2.cached(guest) else { return Ok(None) };
        if purpose == Purpose::Write && !slice.targets().are_checked(index, self.clusters_of(at, max)) {
            return Ok(None);
        }
        self.run_in(&slice.read(), index, at, max).map(Some)
    }

    /// Looks on into the next slices, as far as what they say continues the run.
    #[cold]
    fn look_on(&self, at: GuestOffset, max: u64, purpose: Purpose, run: &mut Run) {
        loop {
            let next = GuestOffset(at.0 + run.length);
            if run.length == max || !next.0.is_multiple_of(self.slice_bytes()) {
                return;
            }
            // An error there is left to the request that needs it: this one may end before, or comes again.
            match self.look(next, max - run.length, purpose) {
                Ok(Some(more)) if run.continues(&more) => run.length += more.length,
                _ => return,
            }
        }
    }

    /// The way of a writer whose cluster may be about to move, and whose entries have been checked: under the slice's lock.
    #[cold]
    fn lookup_locked(&self, at: GuestOffset, max: u64) -> Result<Option<Run>> {
        let Some((slice, index)) = self.meta.l2.cached(self.meta.geometry.guest_cluster(at)) else { return Ok(None) };
        self.lookup_in_slice(&slice, index, at, max, Purpose::Write).map(Some)
    }

    /// How many clusters a range of the disk touches.
    fn clusters_of(&self, at: GuestOffset, length: u64) -> u64 {
        let cluster_size = self.meta.geometry.cluster_size();
        ((at.0 & (cluster_size - 1)) + length).div_ceil(cluster_size)
    }

    /// How many bytes of the virtual disk one slice maps.
    fn slice_bytes(&self) -> u64 {
        self.meta.l2.per_slice() << self.meta.geometry.cluster_bits
    }

    fn hosts_of(&self, host: HostOffset, length: u64) -> (HostCluster, u64) {
        let first = self.meta.geometry.host_cluster(host);
        let last = self.meta.geometry.host_cluster(HostOffset(host.0 + length - 1));
        (first, last.0 - first.0 + 1)
    }

    /// Within one slice, under its lock, whose entries have been checked if this is for a write.
    fn lookup_in_slice(
        &self,
        slice: &Arc<Slice>,
        index: usize,
        at: GuestOffset,
        max: u64,
        purpose: Purpose,
    ) -> Result<Run> {
        let entries = slice.read();
        let run = self.run_in(&entries, index, at, max)?;
        if self.may_move(purpose)
            && let RunKind::Data { host, copied: true } = run.kind
        {
            // Still under the slice's lock: the reference cannot be rewritten between this and our write, whatever state
            // the move was in.
            let (first, count) = self.hosts_of(host, run.length);
            self.moves.cancel(first, count);
        }
        Ok(run)
    }

    /// What is stored from `at` on, as far as these entries tell.
    #[inline]
    pub(super) fn run_in(&self, entries: &impl Entries, index: usize, at: GuestOffset, max: u64) -> Result<Run> {
        let cluster_size = self.meta.geometry.cluster_size();
        let within = at.0 & (cluster_size - 1);
        let guest = self.meta.geometry.guest_cluster(at);
        let entry = entries.get(index);
        let first = match self.meta.decode(guest, entry) {
            Ok(first) => first,
            Err(reason) => return Err(self.invalid_entry(guest, entry, reason)),
        };
        let mut length = cluster_size - within;
        let kind = match first {
            Mapping::Data { host, copied } => RunKind::Data { host: HostOffset(host.0 + within), copied },
            Mapping::Zero { .. } => RunKind::Zero,
            Mapping::Unallocated => RunKind::Unallocated,
            Mapping::Compressed { descriptor } => RunKind::Compressed { descriptor },
            Mapping::Parts { host, subclusters } => {
                let part = self.part_of(host, subclusters, within);
                length = part.length;
                part.kind
            }
        };
        if length < max && !matches!(first, Mapping::Parts { .. }) {
            length += self.followers(entries, guest, index, max - length, first);
        }
        let length = length.min(max);
        if let RunKind::Data { host, .. } = kind
            && (self.meta.external || host.0 + length > self.volume.length())
        {
            self.check_end(at, entry, host, length)?;
        }
        Ok(Run { kind, length })
    }

    /// How many bytes of clusters after that at `index` are stored as it is, in one run with it, in at most about `max` bytes.
    fn followers(&self, entries: &impl Entries, guest: GuestCluster, index: usize, max: u64, first: Mapping) -> u64 {
        let cluster_size = self.meta.geometry.cluster_size();
        let (mut length, mut next) = (0, index + 1);
        while length < max && next < entries.len() {
            // Decoding errors of later entries are left to the request that needs them.
            let guest = GuestCluster(guest.0 + (next - index) as u64);
            let Ok(mapping) = self.meta.decode(guest, entries.get(next)) else { break };
            let follows = match (first, mapping) {
                (Mapping::Data { host, copied }, Mapping::Data { host: h, copied: c }) => {
                    h.0 == host.0 + length + cluster_size && c == copied
                }
                (Mapping::Zero { .. }, Mapping::Zero { .. }) => true,
                (Mapping::Unallocated, Mapping::Unallocated) => true,
                _ => false,
            };
            if !follows {
                break;
            }
            length += cluster_size;
            next += 1;
        }
        length
    }

    /// Refuses data that lies outside the file; the last cluster may be cut short. What an external data file lacks reads as
    /// zeroes, but it must be open.
    #[cold]
    fn check_end(&self, at: GuestOffset, entry: Entry, host: HostOffset, length: u64) -> Result<()> {
        if self.meta.external {
            return self.ensure_data();
        }
        let end = self.volume.length();
        if host.0 + length > end.next_multiple_of(self.meta.geometry.cluster_size()) {
            let reason = format!("a data cluster lies outside the file of {end} bytes");
            return Err(self.invalid_entry(self.meta.geometry.guest_cluster(at), entry, &reason));
        }
        Ok(())
    }

    /// Decodes an entry, with an error that names its place.
    pub(crate) fn decode(&self, guest: GuestCluster, entry: Entry) -> Result<Mapping> {
        self.meta.decode(guest, entry).map_err(|reason| self.invalid_entry(guest, entry, reason))
    }

    pub(crate) fn invalid_entry(&self, guest: GuestCluster, entry: Entry, reason: &str) -> Error {
        self.meta.l2.invalid_entry(&self.volume, &self.meta.l1, guest, entry, reason)
    }

    /// Refuses to write through entries of a slice that a damaged image points at a free cluster, which the next write may be
    /// given, or at one of the image's own tables or a snapshot's, which a guest write would destroy; and through an L2 table that
    /// a snapshot has, too, though the image says otherwise. Done once for each entry; entries set later are right by construction.
    pub(crate) async fn check_targets(
        &self,
        slice: &Arc<Slice>,
        guest: GuestCluster,
        index: usize,
        count: u64,
    ) -> Result<()> {
        if slice.targets().are_checked(index, count) {
            return Ok(());
        }
        let range = index..index.saturating_add(count as usize);
        // In a box, lest the future of every request be as large as this one.
        Box::pin(self.check_targets_now(slice, guest, index, range)).await
    }

    /// A write could not be planned. If that is because nobody has looked yet where the entries of its first slice lead, this
    /// does, on a thread of the caller's that may sleep.
    ///
    /// # Errors
    /// As [`check_targets`](Self::check_targets).
    #[cold]
    pub(super) fn check_targets_blocking(&self, at: GuestOffset, max: u64) -> Result<bool> {
        let guest = self.meta.geometry.guest_cluster(at);
        let Some((slice, index)) = self.meta.l2.cached(guest) else { return Ok(false) };
        let count = self.clusters_of(at, max);
        if slice.targets().are_checked(index, count) {
            return Ok(false);
        }
        let range = index..index.saturating_add(count as usize);
        block_on(self.check_targets_now(&slice, guest, index, range)).map(|()| true)
    }

    #[cold]
    async fn check_targets_now(
        &self,
        slice: &Arc<Slice>,
        guest: GuestCluster,
        index: usize,
        range: Range<usize>,
    ) -> Result<()> {
        let invalid = |i: usize, entry: Entry, reason: &str| {
            self.invalid_entry(GuestCluster(guest.0 - index as u64 + i as u64), entry, reason)
        };
        self.note_snapshot_tables().await?;
        self.check_undisputed(guest.0 / self.meta.geometry.l2_entries())?;
        loop {
            let mut next = None;
            {
                let entries = slice.read();
                entries.set_checked_where(|entry| self.targets(entry).is_none());
                let tables = self.meta.tables.lock();
                for run in self.unchecked_targets(slice, &entries) {
                    // One such entry is reason enough to trust none of the slice.
                    if tables.meets(&run.hosts) {
                        let mut of_tables = run.each().filter(|(_, hosts)| tables.meets(hosts));
                        let i = of_tables.next().map_or(run.first, |(i, _)| i);
                        return Err(invalid(i, entries.get(i), "it points at one of the image's own tables"));
                    }
                    if next.is_none() {
                        next = run.each().find(|(i, _)| range.contains(i)).map(|(_, hosts)| hosts);
                    }
                }
            }
            let Some(hosts) = next else { return Ok(()) };
            // What tells the counts of this entry's clusters tells those of their neighbours, too: where the clusters of
            // a slice lie together, one read of 4 KiB is all that this ever costs.
            let mut refcounts = self.meta.refcounts.lock().await;
            refcounts.load_range(&self.volume, &hosts).await?;
            let entries = slice.read();
            let states = self.clusters.lock();
            let in_use = |hosts: &Range<u64>| refcounts.all_counted(hosts).map(|all| all && !states.any_free(hosts));
            for run in self.unchecked_targets(slice, &entries) {
                if in_use(&run.hosts) == Some(true) {
                    entries.set_all_checked(run.first, run.count());
                    continue;
                }
                for (i, hosts) in run.each() {
                    match in_use(&hosts) {
                        Some(true) => entries.set_checked(i),
                        Some(false) if range.contains(&i) => {
                            return Err(invalid(i, entries.get(i), "it points at a free cluster"));
                        }
                        _ => {}
                    }
                }
            }
            if slice.targets().are_checked(range.start, range.len() as u64) {
                return Ok(());
            }
        }
    }

    /// What the entries of a slice name that have not been checked yet.
    fn unchecked_targets<'a, G>(
        &'a self,
        slice: &'a Slice,
        entries: &'a Locked<'_, G>,
    ) -> impl Iterator<Item = TargetRun> + 'a {
        let unchecked = (0..entries.len()).filter(|&i| !slice.targets().is_checked(i));
        let mut named = unchecked.filter_map(|i| Some((i, self.targets(entries.get(i))?))).peekable();
        std::iter::from_fn(move || {
            let (first, hosts) = named.next()?;
            let mut run = TargetRun { first, each: (hosts.end - hosts.start).max(1), hosts };
            while let Some((_, hosts)) = named.next_if(|(i, hosts)| run.is_continued_by(*i, hosts)) {
                run.hosts.end = hosts.end;
            }
            Some(run)
        })
    }

    /// The clusters of the image that an entry names: a guest may write to them, or give up a reference to them. `None`
    /// if it names none, or cannot be decoded, which is reported to the request that needs it.
    fn targets(&self, entry: Entry) -> Option<Range<u64>> {
        let geometry = self.meta.geometry;
        if self.meta.external {
            return None;
        }
        let mapping = Mapping::of(entry, self.meta.version, geometry).ok()?;
        mapping.host_clusters(geometry)
    }
}
