"""A plain reader of qcow2 metadata that shares no code with the library: where things are, and how much is in use.

It believes the image (hostile ones are for the library to refuse) and needs neither speed nor bounds.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path

# Field of the header: its offset and its width in bytes, named as in QEMU's specification.
HEADER = {
    "magic": (0, 4),
    "version": (4, 4),
    "backing_file_offset": (8, 8),
    "backing_file_size": (16, 4),
    "cluster_bits": (20, 4),
    "size": (24, 8),
    "crypt_method": (32, 4),
    "l1_size": (36, 4),
    "l1_table_offset": (40, 8),
    "refcount_table_offset": (48, 8),
    "refcount_table_clusters": (56, 4),
    "nb_snapshots": (60, 4),
    "snapshots_offset": (64, 8),
    "incompatible_features": (72, 8),
    "compatible_features": (80, 8),
    "autoclear_features": (88, 8),
    "refcount_order": (96, 4),
    "header_length": (100, 4),
    "compression_type": (104, 1),
}

OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1

DIRTY, CORRUPT, DATA_FILE, COMPRESSION_TYPE, EXTENDED_L2 = (1 << n for n in range(5))

EXTENSION_BITMAPS = 0x23852875


@dataclass
class Snapshot:
    """One entry of the snapshot table; `at` is where the entry stands in the file."""

    at: int
    l1_offset: int
    l1_size: int
    name: str


@dataclass
class Usage:
    """Host clusters, by number, by what refers to them."""

    metadata: set[int] = field(default_factory=set)
    data: set[int] = field(default_factory=set)

    @property
    def clusters(self) -> int:
        return len(self.metadata | self.data)


class Qcow2:
    """The metadata of one image, read when it is made."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with open(path, "rb") as file:
            self.head = file.read(112)
        if self.get("version") < 3:
            self.head = self.head[:72] + bytes(40)
        self.cluster_size = 1 << self.get("cluster_bits")
        # Of the L1 or refcount table, in a cluster; and of an L2 table, whose entries may be extended to two words.
        self.entries = self.cluster_size // 8
        self.entry_words = 2 if self.get("incompatible_features") & EXTENDED_L2 else 1
        self.l2_entries = self.entries // self.entry_words
        self.refcount_bits = 16 if self.get("version") < 3 else 1 << self.get("refcount_order")

    def get(self, name: str) -> int:
        """A header field."""
        at, width = HEADER[name]
        return int.from_bytes(self.head[at : at + width], "big")

    def bytes_at(self, offset: int, length: int) -> bytes:
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), length, offset).ljust(length, b"\0")

    def table(self, offset: int, entries: int) -> tuple[int, ...]:
        return struct.unpack(f">{entries}Q", self.bytes_at(offset, entries * 8))

    def l1(self) -> tuple[int, ...]:
        return self.table(self.get("l1_table_offset"), self.get("l1_size"))

    def l2(self, l1_entry: int) -> tuple[int, ...]:
        """The entries of an L2 table; of extended ones the first words."""
        return self.table(l1_entry & OFFSET_MASK, self.entries)[:: self.entry_words]

    def subclusters(self, guest: int) -> int:
        """The bitmap of the extended L2 entry of a guest offset."""
        return self.table(self.mapping(guest)[0] + 8, 1)[0]

    def refcount_table(self) -> tuple[int, ...]:
        return self.table(self.get("refcount_table_offset"), self.get("refcount_table_clusters") * self.entries)

    def mapping(self, guest: int) -> tuple[int, int]:
        """Where the L2 entry of a guest offset stands in the file, and the entry."""
        index = guest // self.cluster_size
        table = self.l1()[index // self.l2_entries] & OFFSET_MASK
        assert table, f"guest offset {guest:#x} has no L2 table"
        at = table + index % self.l2_entries * 8 * self.entry_words
        return at, self.table(at, 1)[0]

    def compressed_extent(self, entry: int) -> tuple[int, int]:
        """Where a compressed cluster's data is: its offset, and the length up to the end of its last sector."""
        bits = 62 - (self.get("cluster_bits") - 8)
        offset = entry & ((1 << bits) - 1)
        sectors = ((entry & (COMPRESSED - 1)) >> bits) + 1
        return offset, sectors * 512 - offset % 512

    def snapshots(self) -> list[Snapshot]:
        at, found = self.get("snapshots_offset"), []
        for _ in range(self.get("nb_snapshots")):
            l1_offset, l1_size, id_len, name_len = struct.unpack(">QIHH", self.bytes_at(at, 16))
            extra = struct.unpack(">I", self.bytes_at(at + 36, 4))[0]
            name = self.bytes_at(at + 40 + extra + id_len, name_len).decode()
            found.append(Snapshot(at, l1_offset, l1_size, name))
            at = -(-(at + 40 + extra + id_len + name_len) // 8) * 8
        return found

    def snapshot_table_end(self) -> int:
        last = self.snapshots()[-1]
        id_len, name_len = struct.unpack(">HH", self.bytes_at(last.at + 12, 4))
        extra = struct.unpack(">I", self.bytes_at(last.at + 36, 4))[0]
        return last.at + 40 + extra + id_len + name_len

    def usage(self) -> Usage:
        """Every host cluster that the header, the refcounts, an L1 table or a snapshot needs."""
        usage = Usage()

        def run(offset: int, length: int, where: set[int] = usage.metadata) -> None:
            first, end = offset // self.cluster_size, -(-(offset + length) // self.cluster_size)
            where.update(range(first, end))

        run(0, 1)
        run(self.get("refcount_table_offset"), self.get("refcount_table_clusters") * self.cluster_size)
        for entry in self.refcount_table():
            if entry:
                run(entry & OFFSET_MASK, self.cluster_size)
        l1_tables = [(self.get("l1_table_offset"), self.get("l1_size"))]
        if self.get("nb_snapshots"):
            run(self.get("snapshots_offset"), self.snapshot_table_end() - self.get("snapshots_offset"))
            l1_tables += [(s.l1_offset, s.l1_size) for s in self.snapshots()]
        seen: set[int] = set()
        for offset, entries in l1_tables:
            run(offset, entries * 8)
            for l1_entry in self.table(offset, entries):
                l2_offset = l1_entry & OFFSET_MASK
                if not l2_offset or l2_offset in seen:
                    continue
                seen.add(l2_offset)
                run(l2_offset, self.cluster_size)
                for entry in self.l2(l1_entry):
                    if entry & COMPRESSED:
                        run(*self.compressed_extent(entry), usage.data)
                        continue
                    if entry & OFFSET_MASK:
                        usage.data.add((entry & OFFSET_MASK) // self.cluster_size)
        return usage

    def needed_bytes(self) -> int:
        """Header, metadata and live clusters, in bytes: what the file cannot do without."""
        return self.usage().clusters * self.cluster_size
