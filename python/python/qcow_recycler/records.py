"""What the calls return: plain values. All sizes and offsets are in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class Extent(NamedTuple):
    """A run of the virtual disk that is stored in one way."""

    offset: int
    length: int
    kind: Literal["data", "compressed", "zero", "unallocated"]
    """In the file; there, compressed; reading as zeroes; or as the backing file does (as zeroes without one)."""
    host_offset: int | None
    """Where in the image file, or its external data file, it is, in one piece; for data only."""


class Progress(NamedTuple):
    """How far a compaction is."""

    done: int
    """Clusters handled so far: moved, or found in use by the guest and left."""
    total: int
    """Clusters that are to be handled, as far as is known: while the tables are searched, one more than are done."""
    file_size: int
    """Length of the file now."""


class CommitReport(NamedTuple):
    """What a commit into the backing file did, or how far it is. Sizes are in bytes of the virtual disk."""

    done: int
    total: int
    """Size of the disk."""
    written: int
    zeroed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bitmap:
    """A persistent bitmap."""

    name: str
    granularity: int
    """How much of the disk one bit stands for."""
    recording: bool
    """Whether it marks what is written."""
    inconsistent: bool
    """Whether its last user did not store it: it says nothing, and can only be removed."""
    dirty: int
    """How much of the disk it marks, in whole units of the granularity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """An internal snapshot."""

    id: str
    """No other snapshot of the image has it."""
    name: str
    created: float
    """When it was made, in seconds since 1970 (UTC)."""
    vm_clock: float
    """How long the guest had been running, in seconds, as far as whoever made it said."""
    vm_state_size: int
    """0 if there is no VM state."""
    virtual_size: int
    """Of the disk, when it was made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """What an image is."""

    version: int
    virtual_size: int
    cluster_size: int
    refcount_bits: int
    file_size: int
    lazy_refcounts: bool
    extended_l2: bool
    """Whether clusters are allocated in 32 parts."""
    encryption: Literal["luks", "aes"] | None
    """How guest data is encrypted."""
    snapshots: int
    backing_file: str | None
    backing_format: str | None
    data_file: str | None
    """The external data file's name; empty if there is one that the image does not name."""
    data_file_raw: bool
    """Whether it reads as the disk does, without the image."""
    read_only: bool
    pinned: tuple[str, ...]
    """What keeps parts of the image where they are: one reason each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompactReport:
    """What a compaction did."""

    file_size_before: int
    file_size_after: int
    """On a device that cannot be resized: the length it could be cut to."""
    moved: int
    cancelled: int
    """Moves that a guest write or discard cancelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What a check found. Counts are of clusters or entries."""

    corruptions: int
    """Errors that may lose data."""
    leaks: int
    """Clusters counted more often than they are referred to."""
    corruptions_fixed: int
    leaks_fixed: int
    allocated_clusters: int
    total_clusters: int
    fragmented_clusters: int
    image_end_offset: int
    """End of the last cluster in use."""
    messages: tuple[str, ...]
    """The first findings in words."""

    @property
    def is_clean(self) -> bool:
        """Whether nothing is wrong, or everything wrong was repaired."""
        return self.corruptions == self.corruptions_fixed and self.leaks == self.leaks_fixed


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What an image and its recycler are doing: gauges of this moment, then counters since the image was opened."""

    virtual_size: int
    file_size: int
    used: int
    """Clusters that something refers to, metadata included."""
    freed: int
    """Clusters whose unlinking is not durable yet, or that an older request may still use."""
    junk: int
    """Free clusters with arbitrary contents."""
    erased: int
    """Free clusters overwritten with zeroes, not flushed yet."""
    available: int
    """The pool for new guest writes."""
    roots: int
    """Clusters allocated and not linked yet, or being erased."""
    copies: int
    """Destinations of moves in progress."""
    moves_copying: int
    moves_copied: int
    moves_flushed: int
    moves_referenced: int
    recycler_running: int
    """1 while the recycler runs, 0 while it is stopped or paused."""
    guest_reads: int
    guest_read_bytes: int
    guest_writes: int
    guest_write_bytes: int
    guest_discards: int
    guest_discard_bytes: int
    guest_flushes: int
    device_flushes: int
    metadata_read_bytes: int
    metadata_write_bytes: int
    moved_bytes: int
    moves_cancelled: int
    erased_bytes: int
    truncated_bytes: int
    compactions: int
    background_errors: int
    """Failures in the recycler's work."""


__all__ = ["Bitmap", "CheckReport", "CommitReport", "CompactReport", "Extent", "Info", "Progress", "Snapshot", "Stats"]
