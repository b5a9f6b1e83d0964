"""What a guest does, and what its disk must then hold."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import qcow_recycler
import qemu

SECTOR = 512

# Random bytes to cut write data from: different everywhere, so that misplaced data is seen.
POOL = random.Random(0x51464906).randbytes(4 << 20)


def soak_seconds() -> float:
    """How long a part of a soak lasts; 0 in the ordinary run."""
    return 60 * float(os.environ.get("QCR_SOAK_MINUTES") or 0)


def seeds(count: int) -> list[int]:
    """The seeds of an ordinary run; only QCR_SEED when it is given; in a soak one to go on from."""
    if given := os.environ.get("QCR_SEED"):
        return [int(given)]
    start = int(os.environ.get("QCR_SOAK_SEED") or time.time())
    return [start << 20] if soak_seconds() else list(range(1, count + 1))


def stretch(seed: int, tests: int = 1) -> Iterator[int]:
    """`seed`; in a soak also the seeds after it, until this test's share of the time is over, one of `tests`."""
    deadline = time.monotonic() + soak_seconds() / tests
    while True:
        print(f"QCR_SEED={seed}", flush=True)
        yield seed
        if time.monotonic() >= deadline:
            return
        seed += 1


def data(rng: random.Random, length: int) -> bytes:
    """Write data of a length in bytes."""
    at = rng.randrange(len(POOL) - length)
    return POOL[at : at + length]


@dataclass
class Disk:
    """The model of a virtual disk: its bytes. Sizes and offsets are in bytes."""

    size: int
    cluster_size: int
    bytes: bytearray = field(default_factory=bytearray)

    def __post_init__(self) -> None:
        if not self.bytes:
            self.bytes = bytearray(self.size)

    def write(self, offset: int, content: bytes) -> None:
        assert offset + len(content) <= self.size
        self.bytes[offset : offset + len(content)] = content

    def zero(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def resize(self, size: int) -> None:
        if size < self.size:
            del self.bytes[size:]
        else:
            self.bytes.extend(bytes(size - self.size))
        self.size = size

    def range(self, rng: random.Random, longest: int | None = None) -> tuple[int, int]:
        """A range in sectors of the disk, most often short, at times of several clusters."""
        longest = min(self.size, longest or min(3 * self.cluster_size, 512 << 10))
        length = rng.randint(1, max(1, longest // SECTOR)) * SECTOR
        if rng.random() < 0.4:
            length = min(length, 8 * SECTOR)
        offset = rng.randrange((self.size - length) // SECTOR + 1) * SECTOR
        return offset, length

    def clusters(self, rng: random.Random, most: int = 6) -> tuple[int, int]:
        """A range of whole clusters; the disk's last one may be cut short."""
        total = -(-self.size // self.cluster_size)
        first = rng.randrange(total)
        end = min(total, first + rng.randint(1, most))
        offset = first * self.cluster_size
        return offset, min(end * self.cluster_size, self.size) - offset


def qemu_session(
    path: Path,
    disk: Disk,
    rng: random.Random,
    operations: int,
    *,
    options: tuple[str, ...] = (),
    passphrase: str | None = None,
) -> None:
    """QEMU writes, zeroes and discards; discards whole clusters only, as it ignores the rest."""
    source = path.with_name("pattern")
    commands = []
    files = []
    for n in range(operations):
        kind = rng.choices(["write", "zeroes", "unmap", "discard", "flush"], [5, 1, 1, 2, 1])[0]
        if kind == "write":
            offset, length = disk.range(rng)
            content = data(rng, length)
            file = source.with_name(f"pattern.{n}")
            file.write_bytes(content)
            files.append(file)
            commands.append(f"write -q -s {file} {offset} {length}")
            disk.write(offset, content)
        elif kind in ("zeroes", "unmap"):
            offset, length = disk.range(rng, 4 * disk.cluster_size)
            commands.append(f"write -q -z {'-u ' if kind == 'unmap' else ''}{offset} {length}")
            disk.zero(offset, length)
        elif kind == "discard":
            offset, length = disk.clusters(rng)
            commands.append(f"discard -q {offset} {length}")
            disk.zero(offset, length)
        else:
            commands.append("flush")
    qemu.io(path, *commands, options=options, passphrase=passphrase)
    for file in files:
        file.unlink()


def qemu_resize(path: Path, disk: Disk, size: int) -> None:
    """`qemu-img resize`. QEMU's growth shows what the last cluster held past the old end; the library's does not."""
    old = disk.size
    qemu.img("resize", "-q", "--shrink", "-f", "qcow2", path, size)
    disk.resize(size)
    rest = min(-old % disk.cluster_size, size - old)
    if rest > 0:
        disk.write(old, qemu.contents(path)[old : old + rest])


def discarded(image: qcow_recycler.Image, disk: Disk, offset: int, length: int) -> None:
    """Whole discarded clusters read as zeroes; of a cluster discarded in part, each sector is zero or as before."""
    got = image.read(offset, length)
    end = offset + length
    whole = -(-offset // disk.cluster_size) * disk.cluster_size
    whole_end = end if end == disk.size else end // disk.cluster_size * disk.cluster_size
    for at in range(offset, end, SECTOR):
        sector = got[at - offset : at - offset + SECTOR]
        if not any(sector):
            continue
        assert not whole <= at < whole_end, f"discarded sector {at:#x} is not zero"
        assert sector == disk.bytes[at : at + SECTOR], f"sector {at:#x} changed by a discard around it"
    disk.write(offset, got)


def our_session(image: qcow_recycler.Image, disk: Disk, rng: random.Random, operations: int) -> None:
    """The library writes, zeroes, discards, reads, flushes and compacts."""
    for _ in range(operations):
        kind = rng.choices(
            ["write", "zeroes", "discard", "discard clusters", "read", "flush", "compact"], [6, 2, 1, 3, 3, 1, 0.5]
        )[0]
        if kind == "write":
            offset, length = disk.range(rng)
            content = data(rng, length)
            image.write(offset, content)
            disk.write(offset, content)
        elif kind == "zeroes":
            offset, length = disk.range(rng, 4 * disk.cluster_size)
            image.write_zeroes(offset, length, may_unmap=rng.random() < 0.5)
            disk.zero(offset, length)
        elif kind == "discard":
            offset, length = disk.range(rng, 4 * disk.cluster_size)
            image.discard(offset, length)
            discarded(image, disk, offset, length)
        elif kind == "discard clusters":
            offset, length = disk.clusters(rng)
            image.discard(offset, length)
            discarded(image, disk, offset, length)
        elif kind == "read":
            offset, length = disk.range(rng)
            got = image.read(offset, length)
            expected = disk.bytes[offset : offset + length]
            assert got == expected, f"read {length} at {offset:#x}: {qemu.first_difference(got, expected)}"
        elif kind == "flush":
            image.flush()
        else:
            image.compact()


@contextmanager
def at_work(*steps: Callable[[], object]) -> Iterator[None]:
    """Repeats each step, on a thread of its own, until the block ends, and then raises what one of them has raised."""
    enough = threading.Event()
    failures: list[BaseException] = []

    def work(step: Callable[[], object]) -> None:
        try:
            while not enough.is_set():
                step()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        enough.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def assert_reads(image: qcow_recycler.Image, disk: Disk, step: int = 1 << 20) -> None:
    """The library reads exactly the model's bytes."""
    for offset in range(0, disk.size, step):
        length = min(step, disk.size - offset)
        got = image.read(offset, length)
        expected = disk.bytes[offset : offset + length]
        assert got == expected, f"read at {offset:#x}: {qemu.first_difference(got, expected)}"
