"""Everything at once: compressed clusters, snapshots, a bitmap and a backing file, compacted under a busy guest."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import guest
import qcow_recycler
import qemu
from qcow2 import Qcow2

SIZE = 64 << 20
CONFIG = "keep_erased=0;compact_after_unmaps=0"


def half_compressible(rng: random.Random, length: int) -> bytes:
    part = rng.randrange(length // 8, length // 2)
    return rng.randbytes(part) + bytes([rng.randrange(1, 255)]) * (length - part)


class Marks:
    """What a bitmap of 64 KiB granularity must mark, at least."""

    def __init__(self) -> None:
        self.units: set[int] = set()

    def add(self, at: int, length: int) -> None:
        self.units.update(range(at // 65536, (at + length - 1) // 65536 + 1))


def dirty(image: qcow_recycler.Image, name: str) -> set[int]:
    found, at = set(), 0
    while at < SIZE and (marked := image.next_dirty(name, at)) is not None:
        start, length = marked
        found.update(range(start // 65536, (start + length - 1) // 65536 + 1))
        at = start + length
    return found


@pytest.mark.parametrize("extended", ["off", "on"])
def test_an_image_with_everything_is_compacted_under_a_guest(image_path: Path, tmp_path: Path, extended: str) -> None:
    rng = random.Random(20)
    disk = guest.Disk(SIZE, 65536)
    base = tmp_path / "base.raw"
    disk.write(0, rng.randbytes(SIZE // 4) + bytes(SIZE // 4) + rng.randbytes(SIZE // 4))
    base.write_bytes(disk.bytes)
    # A distribution's image: compressed, over a base.
    top = guest.Disk(SIZE, 65536)
    for at in range(0, SIZE, 65536):
        if rng.random() < 0.6:
            content = half_compressible(rng, 65536)
            disk.write(at, content)
    top.write(0, bytes(disk.bytes))
    raw = tmp_path / "top.raw"
    raw.write_bytes(top.bytes)
    qemu.img(
        "convert", "-q", "-c", "-O", "qcow2", "-B", base, "-F", "raw", "-o", f"extended_l2={extended}", raw, image_path
    )
    qemu.img("bitmap", "--add", "-g", "65536", image_path, "backup")
    held: dict[str, bytes] = {}
    marks = Marks()

    def write(image: qcow_recycler.Image, generator: random.Random, most: int = 200_000) -> None:
        at, length = disk.range(generator, most)
        if generator.random() < 0.35:
            image.discard(at, length)
            disk.zero(at, length)
        else:
            content = half_compressible(generator, length)
            image.write(at, content)
            disk.write(at, content)
        marks.add(at, length)

    # Three snapshots, with a guest's work between them.
    for name in ("one", "two", "three"):
        with qcow_recycler.open(image_path, config=CONFIG, backing="allow") as image:
            for _ in range(60):
                write(image, rng)
            guest.assert_reads(image, disk)
        qemu.img("snapshot", "-c", name, image_path)
        held[name] = bytes(disk.bytes)
    qemu.img("snapshot", "-d", "two", image_path)
    del held["two"]
    qemu.img("snapshot", "-c", "four", image_path)
    held["four"] = bytes(disk.bytes)

    with qcow_recycler.open(image_path, config=CONFIG, backing="allow") as image:
        image.discard(0, SIZE // 2)
        disk.zero(0, SIZE // 2)
        marks.add(0, SIZE // 2)
        generator = random.Random(21)

        def step() -> None:
            write(image, generator, 20_000)
            if generator.random() < 0.1:
                image.flush()

        with guest.at_work(step):
            image.compact()
        guest.assert_reads(image, disk)
        image.compact()
        guest.assert_reads(image, disk)
        assert marks.units <= dirty(image, "backup"), "a write is missing from the bitmap"
        assert image.stats.background_errors == 0
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)
    for name, content in held.items():
        qemu.assert_contents(image_path, content, snapshot=name)
    listed = qemu.info(image_path)["format-specific"]["data"]["bitmaps"]
    assert [(b["name"], b["flags"]) for b in listed] == [("backup", ["auto"])]
    header = Qcow2(image_path)
    assert image_path.stat().st_size <= 1.02 * header.needed_bytes() + (1 << 20)
