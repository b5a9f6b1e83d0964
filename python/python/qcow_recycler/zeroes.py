"""Finding clusters that hold nothing but zeroes, and giving them back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from ._ext import Image

CHUNK = 4 << 20
"""How many bytes are read at a time."""


class ZeroScan(NamedTuple):
    """How far the search is; at its end, what it did. In bytes of the virtual disk."""

    scanned: int
    """Of `total`, how much was read so far."""
    total: int
    """What is stored in the file, compressed clusters aside."""
    discarded: int
    """What held zeroes and was given back."""


def discard_zeroes(image: Image, progress: Callable[[ZeroScan], object] | None = None) -> ZeroScan:
    """Give the clusters of `image` back that hold only zeroes; what the disk reads as does not change.

    Nobody else may write to the image meanwhile: a write between looking at a cluster and giving it back would be
    lost. `progress` is called after every chunk; what it raises ends the work, and nothing is lost by that.
    """
    info = image.info
    # A discard is refused where the format cannot keep a backing file from showing through; zeroes can be written then.
    give_back = image.discard if info.backing_file is None else image.write_zeroes
    cluster = info.cluster_size
    stored = [(e.offset, e.length) for e in image.extents() if e.kind == "data"]
    total = sum(length for _, length in stored)
    scanned = discarded = 0
    for start, size in stored:
        for offset in range(start, start + size, CHUNK):
            length = min(CHUNK, start + size - offset)
            for zero_offset, zero_length in _zero_runs(image.read(offset, length), offset, cluster):
                give_back(zero_offset, zero_length)
                discarded += zero_length
            scanned += length
            if progress is not None:
                progress(ZeroScan(scanned, total, discarded))
    image.flush()
    return ZeroScan(scanned, total, discarded)


def _zero_runs(data: bytes, base: int, cluster: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of the runs of zero clusters in `data`, which starts at `base` on the disk."""
    zero = bytes(cluster)
    if not data.strip(b"\0"):
        yield base, len(data)
        return
    run = 0
    for at in range(0, len(data), cluster):
        piece = data[at : at + cluster]
        # The last cluster of a disk may be a part of one.
        if piece == zero or not piece.strip(b"\0"):
            run += len(piece)
        elif run:
            yield base + at - run, run
            run = 0
    if run:
        yield base + len(data) - run, run


__all__ = ["ZeroScan", "discard_zeroes"]
