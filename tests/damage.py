"""Images to damage."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import qemu
from qcow2 import HEADER, Qcow2

CLUSTER = 4096


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Victim:
    """A valid image to damage: two L2 tables and 80 data clusters, when clusters are of 4 KiB."""

    def __init__(
        self, path: Path, *, snapshot: bool = False, bitmap: bool = False, cluster_size: int = CLUSTER
    ) -> None:
        self.path = path
        qemu.create(path, 4 << 20, cluster_size=cluster_size)
        qemu.io(path, "write -P 0x11 0 256k", "write -P 0x22 3M 64k")
        if snapshot:
            qemu.img("snapshot", "-c", "one", path)
            qemu.img("snapshot", "-c", "two", path)
            qemu.io(path, "write -P 0x33 0 16k")
        if bitmap:
            qemu.img("bitmap", "--add", path, "b0")

    @property
    def meta(self) -> Qcow2:
        return Qcow2(self.path)

    def put(self, offset: int, value: int, width: int = 8) -> int:
        """Overwrites one big-endian field; gives its offset."""
        with open(self.path, "r+b") as file:
            os.pwrite(file.fileno(), value.to_bytes(width, "big"), offset)
        return offset

    def header(self, name: str, value: int) -> int:
        offset, width = HEADER[name]
        return self.put(offset, value, width)

    def extension(self, kind: int) -> int:
        """Where a header extension's data starts."""
        at = self.meta.get("header_length")
        while True:
            found, length = (int.from_bytes(self.meta.bytes_at(at + n, 4), "big") for n in (0, 4))
            assert found, f"no header extension {kind:#x}"
            if found == kind:
                return at + 8
            at += 8 + -(-length // 8) * 8
