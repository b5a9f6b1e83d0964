"""Guests that die at any moment: what they tell, and what must be true of the image afterwards."""

from __future__ import annotations

import os
import random
import select
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import qcow_recycler
import qemu
from clib import Installed
from crash_child import SECTOR, sectors
from qcow2 import DIRTY, Qcow2

PYTHON_CHILD = Path(__file__).with_name("crash_child.py")
CONFIG = "compact_after_unmaps=128;keep_erased=256;settle_ms=3;flush_ms=10"
# What an internal snapshot is called.
SNAPSHOT = "before"


@dataclass(frozen=True)
class Kind:
    """A kind of image, and who works on it: a C program with so many threads, or a Python program (0).

    With a depth, each thread has a queue with so many requests under way.
    """

    name: str
    cluster_size: int = 65536
    refcount_bits: int = 16
    lazy: bool = False
    version: int = 3
    snapshot: bool = False
    threads: int = 3
    depth: int = 0
    config: str = ""

    @property
    def size(self) -> int:
        return (4 << 20) if self.cluster_size < 4096 else (16 << 20)


KINDS = [
    Kind("512-python", 512, threads=0),
    Kind("4k-1bit", 4096, 1),
    Kind("64k"),
    Kind("64k-lazy", lazy=True),
    Kind("16k-version-2-python", 16384, version=2, threads=0),
    Kind("16k-snapshot", 16384, snapshot=True),
    Kind("4k-version-2-snapshot", 4096, version=2, snapshot=True),
    Kind("2m-64bit", 2 << 20, 64, threads=2),
    Kind("64k-queues", threads=2, depth=8),
    Kind("4k-snapshot-queues-direct", 4096, snapshot=True, threads=2, depth=16, config=";direct=1"),
]


@dataclass
class Sectors:
    """For each sector what it may hold after a crash, as versions (0: zeroes): the last flushed one, and all since."""

    size: int
    allowed: dict[int, set[int]] = field(default_factory=dict)
    highest: int = 0

    def may_hold(self, sector: int) -> set[int]:
        return self.allowed.setdefault(sector, {0})

    def follow(self, told: bytes) -> None:
        """Takes in what a child told before it died; a last line without its end was never acted upon."""
        # In the order of telling, which in a thread is that of acting; threads never touch the same sectors.
        since: list[tuple[int, int, int, str]] = []
        latest: dict[str, int] = {}
        covered: dict[str, list[tuple[int, int, int, str]]] = {}
        for line in told.split(b"\n")[:-1]:
            words = line.decode().split()
            thread = words[-1]
            if words[0] in ("w", "z"):
                offset, length = int(words[1]), int(words[2])
                version = int(words[3]) if words[0] == "w" else 0
                self.highest = max(self.highest, version)
                latest[thread] = len(since)
                since.append((offset, length, version, thread))
                continue
            if words[0] == "f":
                # A thread that has told something else since has completed what it told before.
                latest.pop(thread, None)
                under_way = {id(since[at]) for at in latest.values()}
                covered[thread] = [change for change in since if id(change) not in under_way]
            elif words[0] == "F":
                flushed = {id(change) for change in covered.pop(thread)}
                for change in since:
                    if id(change) in flushed:
                        self.put(change[0], change[1], change[2])
                kept = [change for change in since if id(change) not in flushed]
                places = {id(change): at for at, change in enumerate(kept)}
                latest = {t: places[id(since[at])] for t, at in latest.items() if id(since[at]) in places}
                since = kept
        for offset, length, version, _ in since:
            for sector in range(offset // SECTOR, (offset + length) // SECTOR):
                self.may_hold(sector).add(version)

    def put(self, offset: int, length: int, version: int) -> None:
        """A range durably holds this version."""
        for sector in range(offset // SECTOR, (offset + length) // SECTOR):
            self.allowed[sector] = {version}

    def assert_holds(self, contents: bytes) -> dict[int, set[int]]:
        """Every sector holds something it may hold; what that is."""
        found = {}
        zero = bytes(SECTOR)
        for sector in range(self.size // SECTOR):
            content = contents[sector * SECTOR : (sector + 1) * SECTOR]
            allowed = self.may_hold(sector)
            if content == zero:
                version = 0
            else:
                at, version = struct.unpack_from("<QQ", content)
                assert content == content[:16] * (SECTOR // 16), f"sector {sector:#x} is torn: {content[:32].hex()}"
                assert at == sector * SECTOR, f"sector {sector:#x} holds data of sector {at // SECTOR:#x}"
            assert version in allowed, f"sector {sector:#x} holds version {version}, may hold {sorted(allowed)}"
            found[sector] = {version}
        return found


@dataclass
class Victim:
    """An image, what it may hold, and what its snapshot holds."""

    kind: Kind
    path: Path
    sectors: Sectors
    frozen: bytes = b""

    @staticmethod
    def create(kind: Kind, path: Path) -> Victim:
        qcow_recycler.create(
            path,
            kind.size,
            cluster_size=kind.cluster_size,
            refcount_bits=kind.refcount_bits,
            lazy_refcounts=kind.lazy,
            version=kind.version,
        )
        victim = Victim(kind, path, Sectors(kind.size))
        if kind.snapshot:
            # Its data is shared by the disk until the guest writes over it.
            with qcow_recycler.open(path) as image:
                for n, offset in enumerate(range(0, kind.size, kind.size // 8), 1):
                    image.write(offset, sectors(offset, kind.size // 16, n))
                    victim.sectors.put(offset, kind.size // 16, n)
            victim.sectors.highest = 8
            qemu.img("snapshot", "-c", SNAPSHOT, path)
            victim.frozen = qemu.contents(path)
        return victim

    def assert_survived(self, path: Path) -> dict[int, set[int]]:
        """All that must be true of what a crash left in `path`, which is then recovered; what its sectors hold."""
        copy = path.with_name("after.qcow2")
        # QEMU first, on a copy, so that what the library repairs cannot hide what it left.
        shutil.copy(path, copy)
        found = qemu.check(copy)
        if self.kind.lazy and Qcow2(copy).get("incompatible_features") & DIRTY:
            # Stale refcounts are what the dirty bit announces: QEMU puts them right when it opens the image.
            qemu.check(copy, repair="all")
            found = qemu.check(copy)
        assert not found.corruptions and not found.check_errors, f"after the crash: {found}"
        seen = qemu.contents(copy)
        copy.unlink()
        held = self.sectors.assert_holds(seen)
        with qcow_recycler.open(path) as image:
            assert image.read(0, self.kind.size) == seen
            image.compact()
            assert image.read(0, self.kind.size) == seen
        assert not Qcow2(path).get("incompatible_features") & DIRTY
        qemu.assert_clean(path)
        qemu.assert_contents(path, seen)
        if self.frozen:
            qemu.assert_contents(path, self.frozen, snapshot=SNAPSHOT)
        return held


class Child:
    """A guest at work on an image."""

    def __init__(self, victim: Victim, image: Path, seed: int, program: Path, installed: Installed) -> None:
        common = [str(image), str(seed), str(victim.sectors.highest)]
        environment = dict(os.environ)
        if victim.kind.threads:
            command = [str(program), *common, str(victim.kind.threads), CONFIG + victim.kind.config]
            if victim.kind.depth:
                command.append(str(victim.kind.depth))
            environment.update(installed.env)
        else:
            command = [sys.executable, str(PYTHON_CHILD), *common, CONFIG]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=environment
        )
        assert self.process.stdout
        told = self.process.stdout.read(5)
        assert told == b"open\n", f"the child could not open the image: {told.decode()} {self.complaint()}"
        self.told = b""

    def complaint(self) -> str:
        assert self.process.stderr
        return self.process.stderr.read().decode(errors="replace")[-3000:]

    def work(self, seconds: float) -> None:
        """Lets it work. Reads all the while: a child that waits for its pipe's reader would always be killed there."""
        assert self.process.stdout
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([self.process.stdout], [], [], left)[0]:
                more = os.read(self.process.stdout.fileno(), 1 << 16)
                assert more, f"the child ended by itself: {self.complaint()}"
                self.told += more

    def kill(self) -> bytes:
        """SIGKILL; everything it told."""
        assert self.process.stdout
        self.process.kill()
        while more := os.read(self.process.stdout.fileno(), 1 << 16):
            self.told += more
        self.process.wait()
        self.process.stdout.close()
        assert self.process.stderr
        self.process.stderr.close()
        return self.told


def rest(rng: random.Random) -> float:
    """How long a guest works before it dies, in seconds."""
    return rng.uniform(0.02, 0.6)
