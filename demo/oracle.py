"""What an image really is, without asking the library: QEMU's word, and a walk over the tables by the specification."""

from __future__ import annotations

import json
import mmap
import os
import struct
from pathlib import Path
from typing import NamedTuple

from ext4 import BLOCK
from programs import DemoError, run

_OFFSET = 0x00FF_FFFF_FFFF_FE00
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")


class Size(NamedTuple):
    """What a file takes, in bytes."""

    length: int
    on_disk: int


def size(path: Path) -> Size:
    status = os.stat(path)
    return Size(status.st_size, status.st_blocks * 512)


def check(image: Path) -> None:
    """Let QEMU check the image: anything but a clean bill ends the demo."""
    report = json.loads(run("qemu-img", "check", "--output=json", str(image), accept=(0, 2, 3)))
    errors = {key: report.get(key, 0) for key in ("corruptions", "leaks", "check-errors")}
    if any(errors.values()):
        raise DemoError(f"qemu-img check finds errors in {image}: {errors}")


class Needed(NamedTuple):
    """The clusters that an image without snapshots cannot do without."""

    cluster_size: int
    metadata: int
    live: int

    @property
    def bytes(self) -> int:
        return (self.metadata + self.live) * self.cluster_size

    @property
    def bound(self) -> int:
        """The longest that the file may be after it was recycled."""
        return self.bytes * 102 // 100 + (1 << 20)


def needed(image: Path) -> Needed | None:
    """Count the clusters in use from the tables themselves; None if the image has internal snapshots."""
    with image.open("rb") as file:
        magic, _, _, _, bits, _, crypt, l1_size, l1_offset, table_offset, table_clusters, snapshots, _ = _HEADER.unpack(
            file.read(_HEADER.size)
        )
        if magic != b"QFI\xfb" or crypt:
            raise DemoError(f"{image} is not a plain qcow2 image")
        if snapshots:
            return None
        cluster = 1 << bits

        def entries(offset: int, count: int) -> tuple[int, ...]:
            file.seek(offset)
            return struct.unpack(f">{count}Q", file.read(count * 8))

        tables = [entry & _OFFSET for entry in entries(l1_offset, l1_size) if entry & _OFFSET]
        blocks = [entry for entry in entries(table_offset, table_clusters * cluster // 8) if entry]
        live = {
            entry & _OFFSET
            for table in tables
            for entry in entries(table, cluster // 8)
            if entry & _OFFSET and not entry >> 62 & 1
        }
    metadata = 1 + -(-l1_size * 8 // cluster) + len(tables) + table_clusters + len(blocks)
    return Needed(cluster, metadata, len(live))


def compare(raw: Path, model: mmap.mmap) -> int:
    """Compare what QEMU reads with the model, which must be equal to the last byte; return its length."""
    base = 0
    with raw.open("rb") as file:
        while found := file.read(1 << 20):
            expected = model[base : base + len(found)]
            if found != expected:
                at = next(i for i in range(0, len(found), BLOCK) if found[i : i + BLOCK] != expected[i : i + BLOCK])
                raise DemoError(f"QEMU reads block {(base + at) // BLOCK} differently from what was written")
            base += len(found)
    if base != len(model):
        raise DemoError(f"the disk has {base} bytes instead of {len(model)}")
    return base
