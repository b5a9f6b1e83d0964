"""The keyword arguments of :func:`qcow_recycler.open` and :func:`qcow_recycler.create`. None stands for the default."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Literal, TypedDict

LogFunction = Callable[[Literal["error", "warning", "info", "debug"], str], object]
"""Called with a level and a message, from any thread; what it raises is reported as unraisable."""


class OpenOptions(TypedDict, total=False):
    """How an image is opened and how its recycler behaves. Sizes are in bytes, times in seconds."""

    read_only: bool | None
    """Refuse every change; nothing is written to the image, not even to repair it. Default: False."""
    config: str | None
    """``key=value;...`` as mirage/ocaml-qcow takes it (sizes there in 512-byte sectors); the other arguments win."""
    direct: bool | None
    """Transfers of an image file pass the host's page cache (O_DIRECT). Default: False."""
    discard: bool | None
    """Accept discards. Default: True."""
    keep_erased: int | None
    """How many bytes of zeroed clusters the recycler keeps ready for new guest writes. Default: 16 MiB."""
    compact_after_unmaps: int | None
    """The recycler compacts by itself when more than this is free inside the file; 0: never. Default: 64 MiB."""
    settle_time: float | None
    """How long the amount of free space must not have grown before that. It waits twelve times as long at most.
    Default: 5 s."""
    flush_after: float | None
    """The recycler flushes this long after the first unflushed work. Default: 5 s."""
    rate_limit: int | None
    """The most bytes a second that the recycler copies and erases. Default: 0, no limit."""
    punch_junk: bool | None
    """Give the space of clusters that were freed, and stay in the file, back to the host. Default: True."""
    l2_cache_size: int | None
    """Memory for cached L2 tables. Default: 4 MiB."""
    check_on_connect: bool | None
    """Check the whole image first, and refuse it if it is corrupt. Default: False."""
    runtime_asserts: bool | None
    """Let the library check its own invariants while it works (slow). Default: False."""
    backing: Literal["refuse", "skip", "allow"] | None
    """Refuse an image with a backing file (the default); fail only the requests that need it; or open it read-only."""
    backing_directory: str | PathLike[str] | None
    """Where relative names of backing files and of the data file start. Default: the image's own directory."""
    backing_format: Literal["raw", "qcow2"] | None
    """Of backing files whose images do not record one. Default: they are refused, since formats are never guessed."""
    data_file: Literal["refuse", "skip", "allow"] | None
    """Refuse an image with an external data file (the default); fail all requests; or open it, for writing too."""
    passphrase: str | bytes | None
    """Of an encrypted image, and of encrypted images behind it; text counts as UTF-8. Without it an encrypted image can
    be looked at, checked, discarded from and compacted, and neither read nor written. With QEMU's first encryption
    (AES) nothing tells whether it is right."""
    id: str | None
    """A name for statistics and messages. Default: the path."""
    log: LogFunction | None
    """Where messages go. Default: nowhere."""


class CreateOptions(TypedDict, total=False):
    """What a new image is to be like."""

    cluster_size: int | None
    """In bytes, a power of two from 512 to 2 MiB. Default: 65536."""
    refcount_bits: int | None
    """1, 2, 4, 8, 16, 32 or 64; 16 for version 2. Default: 16."""
    version: Literal[2, 3] | None
    """Default: 3."""
    lazy_refcounts: bool | None
    """Let refcounts go stale while the image is open (version 3 only). Default: False."""
    extended_l2: bool | None
    """Allocate clusters in 32 parts (version 3 only, clusters of 16 KiB at least). Default: False."""
    backing_file: str | None
    """Name of a backing file, as it is to be recorded; it is not opened."""
    backing_format: str | None
    """Format of the backing file, such as ``raw`` or ``qcow2``; needed with one."""
    data_file: str | None
    """Name of an external data file, relative to the image: the guest's data is kept there (version 3 only).

    QEMU takes a relative name from its own working directory."""
    data_file_raw: bool | None
    """The data file is to read as the disk does, without the image. Not with a backing file. Default: False."""


__all__ = ["CreateOptions", "LogFunction", "OpenOptions"]
