"""Every cluster size, refcount width and lazy refcounts on and off: a filled image, half of it discarded, is recycled
while a guest goes on working, and ends as small as its live data."""

from __future__ import annotations

import random
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import guest
import qcow_recycler
import qemu
from qcow2 import DIRTY, Qcow2

CLUSTER_SIZES = [512 << n for n in range(13)]
REFCOUNT_BITS = [1, 2, 4, 8, 16, 32, 64]

# At most this much of a cluster is written: the rest is a hole in the file that QEMU and the comparison skip quickly,
# and a cluster is moved whole all the same.
WRITTEN = 64 << 10


def names(cluster_size: int) -> str:
    return f"{cluster_size}" if cluster_size < 1024 else f"{cluster_size >> 10}k"


@dataclass
class Shape:
    cluster_size: int
    refcount_bits: int = 16
    lazy: bool = False
    version: int = 3

    @property
    def clusters(self) -> int:
        """Enough that half of them is far more than the 1 MiB the bound allows."""
        return max(64, (6 << 20) // self.cluster_size)


class Filled:
    """An image all of whose clusters are allocated, open, with the model of its disk."""

    def __init__(self, path: Path, shape: Shape, rng: random.Random, config: str) -> None:
        self.shape, self.rng, self.path = shape, rng, path
        self.disk = guest.Disk(shape.clusters * shape.cluster_size, shape.cluster_size)
        qcow_recycler.create(
            path,
            self.disk.size,
            cluster_size=shape.cluster_size,
            refcount_bits=shape.refcount_bits,
            version=shape.version,
            lazy_refcounts=shape.lazy,
        )
        self.image = qcow_recycler.open(path, config=config)
        try:
            self.fill()
        except BaseException:
            self.image.close()
            raise
        self.full_size = path.stat().st_size
        assert self.full_size >= self.disk.size

    def fill(self) -> None:
        shape, rng = self.shape, self.rng
        # In an order of extents that is not the guest's, so that guest and host order differ.
        step = shape.cluster_size if shape.cluster_size > WRITTEN else 256 << 10
        starts = list(range(0, self.disk.size, step))
        rng.shuffle(starts)
        for start in starts:
            if shape.cluster_size <= WRITTEN:
                content = guest.data(rng, min(step, self.disk.size - start))
            else:
                content = guest.data(rng, WRITTEN)
            # A cluster's number at its start tells, when a test fails, whose data was found.
            content = struct.pack(">Q", start // shape.cluster_size) + content[8:]
            self.image.write(start, content)
            self.disk.write(start, content)
        self.image.flush()

    def discard_half(self) -> list[int]:
        """Discards half of the clusters, chosen at random; gives those that stay."""
        cluster_size = self.shape.cluster_size
        order = list(range(self.shape.clusters))
        self.rng.shuffle(order)
        half = len(order) // 2
        zeroes = bytes(cluster_size)
        for cluster in order[:half]:
            self.image.discard(cluster * cluster_size, cluster_size)
            self.disk.write(cluster * cluster_size, zeroes)
        return order[half:]

    def verify(self) -> None:
        """Closed: clean and equal for QEMU, and within the bound on the file's length."""
        header = Qcow2(self.path)
        assert not header.get("incompatible_features") & DIRTY
        qemu.assert_clean(self.path)
        qemu.assert_contents(self.path, self.disk.bytes)
        length, needed = self.path.stat().st_size, header.needed_bytes()
        assert self.is_short(), f"{length} bytes long, {needed} needed, {self.full_size} when full"

    def is_short(self) -> bool:
        """Whether the file, as it is on disk, is within the bound."""
        return self.path.stat().st_size <= 1.02 * Qcow2(self.path).needed_bytes() + (1 << 20)


class Guest(threading.Thread):
    """Writes to the clusters that stay, and reads them back, until told to stop."""

    def __init__(self, filled: Filled, kept: list[int]) -> None:
        super().__init__()
        self.filled, self.kept = filled, kept
        self.rng = random.Random(len(kept))
        self.enough = threading.Event()
        self.rounds = 0
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            while not self.enough.is_set():
                self.round()
                self.rounds += 1
        except BaseException as failure:
            self.failure = failure

    def round(self) -> None:
        image, disk, cluster_size = self.filled.image, self.filled.disk, self.filled.shape.cluster_size
        start = self.rng.choice(self.kept) * cluster_size
        length = self.rng.randint(1, min(cluster_size, 16 << 10) // guest.SECTOR) * guest.SECTOR
        offset = start + self.rng.randrange((cluster_size - length) // guest.SECTOR + 1) * guest.SECTOR
        if self.rng.random() < 0.5:
            content = guest.data(self.rng, length)
            image.write(offset, content)
            disk.write(offset, content)
        got = image.read(offset, length)
        expected = disk.bytes[offset : offset + length]
        assert got == expected, f"guest read at {offset:#x}: {qemu.first_difference(got, expected)}"
        if self.rounds % 16 == 15:
            image.flush()
        # A guest that never rests would, in a test on two cores, leave the recycler none.
        time.sleep(0.0005)

    def __enter__(self) -> Guest:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.enough.set()
        self.join()
        if self.failure:
            raise self.failure


def recycle_on_request(path: Path, shape: Shape) -> None:
    """An explicit compaction while the guest works; moves that the guest cancels are done once it rests."""
    rng = random.Random(f"{shape}")
    filled = Filled(path, shape, rng, "keep_erased=0;compact_after_unmaps=0")
    with filled.image as image:
        kept = filled.discard_half()
        with Guest(filled, kept) as busy:
            image.compact()
            while busy.rounds < 3:
                time.sleep(0.001)
        report = image.compact()
        assert report.file_size_after == path.stat().st_size
        assert image.stats.background_errors == 0
    filled.verify()


@pytest.mark.parametrize("lazy", [False, True], ids=["", "lazy"])
@pytest.mark.parametrize("refcount_bits", REFCOUNT_BITS)
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES, ids=names)
def test_compact(image_path: Path, cluster_size: int, refcount_bits: int, lazy: bool) -> None:
    recycle_on_request(image_path, Shape(cluster_size, refcount_bits, lazy))
    image_path.unlink()


@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES, ids=names)
def test_compact_version_2(image_path: Path, cluster_size: int) -> None:
    recycle_on_request(image_path, Shape(cluster_size, version=2))
    image_path.unlink()


@pytest.mark.parametrize("lazy", [False, True], ids=["", "lazy"])
@pytest.mark.parametrize(
    ("cluster_size", "refcount_bits"),
    [(512, 1), (512, 64), (1024, 16), (4096, 2), (16384, 8), (65536, 16), (65536, 1), (262144, 32), (2 << 20, 16)],
)
def test_background(image_path: Path, cluster_size: int, refcount_bits: int, lazy: bool) -> None:
    """The recycler on its own: nobody asks, the file gets shorter while the guest works."""
    shape = Shape(cluster_size, refcount_bits, lazy)
    rng = random.Random(f"{shape}")
    sectors = shape.cluster_size // 512
    config = f"keep_erased=0;compact_after_unmaps={sectors};settle_ms=20;flush_ms=20"
    filled = Filled(image_path, shape, rng, config)
    with filled.image as image:
        image.start()
        kept = filled.discard_half()

        def bound() -> float:
            # What stays, its tables at their largest, and what the bound allows.
            return 1.02 * (filled.full_size - shape.clusters // 2 * cluster_size) + (1 << 20)

        with Guest(filled, kept):
            deadline = time.monotonic() + 30
            while image_path.stat().st_size > bound():
                assert time.monotonic() < deadline, (
                    f"still {image_path.stat().st_size} bytes, {bound():.0f} wanted: {image.stats}"
                )
                time.sleep(0.01)
        # What the guest did last may still be at the end of the file; stopping now would leave it there.
        while not filled.is_short():
            assert time.monotonic() < deadline, f"still {image_path.stat().st_size} bytes: {image.stats}"
            time.sleep(0.05)
        assert image.stats.background_errors == 0
        image.stop()
    filled.verify()
    image_path.unlink()


def test_cancelled_compaction_leaves_a_consistent_image(image_path: Path) -> None:
    """Cancelled at each of its first progress calls in turn, and then left to finish."""
    shape = Shape(4096)
    rng = random.Random(1)
    filled = Filled(image_path, shape, rng, "keep_erased=0;compact_after_unmaps=0")
    with filled.image as image:
        filled.discard_half()
        for allowed in range(4):
            calls = 0

            def progress(*_: object, allowed: int = allowed) -> bool:
                nonlocal calls
                calls += 1
                return calls <= allowed

            try:
                image.compact(progress=progress)
            except qcow_recycler.Error as e:
                assert e.errno == 125, e
            guest.assert_reads(image, filled.disk)
            assert image.check().corruptions == 0
        image.compact()
    filled.verify()


def test_paused_recycler_rests(image_path: Path) -> None:
    shape = Shape(65536)
    filled = Filled(
        image_path, shape, random.Random(2), "keep_erased=0;compact_after_unmaps=128;settle_ms=10;flush_ms=10"
    )
    with filled.image as image:
        image.start()
        image.pause()
        filled.discard_half()
        image.flush()
        # Long against the settling time, short for a test: the file must not have moved.
        time.sleep(0.3)
        assert image_path.stat().st_size >= filled.full_size
        assert image.stats.moved_bytes == 0
        image.resume()
        deadline = time.monotonic() + 20
        while image_path.stat().st_size > filled.full_size * 3 // 4:
            assert time.monotonic() < deadline, f"resumed, and did nothing: {image.stats}"
            time.sleep(0.01)
    filled.verify()
