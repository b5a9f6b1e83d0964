"""Images that are in order and unlike what one expects: tables in unusual places, lengths that are no multiple of a
cluster, bits and extensions of somebody else's, sizes at the limits. Each is worked on, compacted and read by QEMU."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

import guest
import qcow_recycler
import qemu
from qcow2 import Qcow2

SIZE = 8 << 20
CLUSTER = 65536
CONFIG = "keep_erased=0;compact_after_unmaps=0"

Maker = Callable[[Path, guest.Disk], None]


def filled(path: Path, disk: guest.Disk, **options: object) -> None:
    """By QEMU, with every cluster of the disk allocated."""
    qemu.create(path, disk.size, **options)
    rng = random.Random(disk.size)
    for start in range(0, disk.size, disk.cluster_size):
        pattern = rng.randrange(1, 256)
        length = min(disk.cluster_size, disk.size - start)
        disk.write(start, bytes([pattern]) * length)
    raw = path.with_suffix(".filled")
    raw.write_bytes(disk.bytes)
    qemu.img("convert", "-n", "-q", "-f", "raw", "-O", "qcow2", raw, path)
    raw.unlink()


def patch(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as image:
        image.seek(offset)
        image.write(content)


def short_last_cluster(path: Path, disk: guest.Disk) -> None:
    """The file ends within its last data cluster: what is missing reads as zeroes."""
    filled(path, disk)
    header = Qcow2(path)
    last = max((header.mapping(at)[1] & 0x00FF_FFFF_FFFF_FE00, at) for at in range(0, SIZE, CLUSTER))
    assert last[0] + CLUSTER == path.stat().st_size, "the last cluster of the file holds data"
    with path.open("r+b") as image:
        image.truncate(last[0] + 512 * 5)
    disk.zero(last[1] + 512 * 5, CLUSTER - 512 * 5)


def trailing_garbage(path: Path, disk: guest.Disk) -> None:
    filled(path, disk)
    with path.open("ab") as image:
        image.write(random.Random(1).randbytes(3 * CLUSTER + 1234))


def leaks(path: Path, disk: guest.Disk) -> None:
    """Clusters are counted and nobody refers to them, some within the file and some at its end."""
    filled(path, disk)
    for at in range(CLUSTER, SIZE, 4 * CLUSTER):
        entry, _ = Qcow2(path).mapping(at)
        patch(path, entry, bytes(8))
        disk.zero(at, CLUSTER)
    assert qemu.check(path).leaks == SIZE // CLUSTER // 4


def moved_refcounts(path: Path, disk: guest.Disk) -> None:
    """Another refcount width makes QEMU build the refcount structures anew, at the file's end."""
    filled(path, disk, refcount_bits=16)
    before = Qcow2(path).get("refcount_table_offset")
    qemu.img("amend", "-q", "-f", "qcow2", "-o", "refcount_bits=32", path)
    assert Qcow2(path).get("refcount_table_offset") > before


def oversized_refcount_table(path: Path, disk: guest.Disk) -> None:
    """It has room for far more than the file needs: entries past the first are zero."""
    filled(path, disk)
    header = Qcow2(path)
    blocks = header.refcount_table()
    end = -(-path.stat().st_size // CLUSTER)
    table = struct.pack(f">{len(blocks)}Q", *blocks) + bytes(3 * CLUSTER)
    patch(path, end * CLUSTER, table)
    patch(path, 48, struct.pack(">QI", end * CLUSTER, 4))
    # One block counts all of these, 16 bits each.
    old = header.get("refcount_table_offset") // CLUSTER
    patch(path, blocks[0] + 2 * old, bytes(2))
    patch(path, blocks[0] + 2 * end, struct.pack(">4H", 1, 1, 1, 1))
    qemu.assert_clean(path)


def moved_l1(path: Path, disk: guest.Disk) -> None:
    """The disk grew so much that QEMU moved the L1 table to the file's end."""
    filled(path, disk)
    before = Qcow2(path).get("l1_table_offset")
    qemu.img("resize", "-q", path, 5 << 42)
    # And back, which leaves the table there (QEMU does this, too, and takes minutes for it).
    with qcow_recycler.open(path) as image:
        image.resize(SIZE, shrink=True)
    assert Qcow2(path).get("l1_table_offset") > before


def amended(path: Path, disk: guest.Disk) -> None:
    filled(path, disk, compat="0.10")
    qemu.img("amend", "-q", "-f", "qcow2", "-o", "compat=1.1", path)
    assert Qcow2(path).get("version") == 3


def unknown_autoclear(path: Path, disk: guest.Disk) -> None:
    """A program that knows more than we do keeps something beside the disk, and must learn of others' changes."""
    filled(path, disk)
    patch(path, 88, struct.pack(">Q", 1 << 60))


def unknown_compatible(path: Path, disk: guest.Disk) -> None:
    filled(path, disk)
    patch(path, 80, struct.pack(">Q", 1 << 50))


def unknown_extension(path: Path, disk: guest.Disk) -> None:
    filled(path, disk)
    start = Qcow2(path).get("header_length")
    rest = Qcow2(path).bytes_at(start, 4096)
    patch(path, start, struct.pack(">II", 0x12345678, 11) + b"not for us!".ljust(16, b"\0") + rest)


def no_extensions(path: Path, disk: guest.Disk) -> None:
    """Not even QEMU's names of features, which it does not need."""
    filled(path, disk)
    start = Qcow2(path).get("header_length")
    patch(path, start, bytes(1024))


MAKERS: list[Maker] = [
    short_last_cluster,
    trailing_garbage,
    leaks,
    moved_refcounts,
    oversized_refcount_table,
    moved_l1,
    amended,
    unknown_autoclear,
    unknown_compatible,
    unknown_extension,
    no_extensions,
]


def work(path: Path, disk: guest.Disk, seed: int) -> None:
    """Writes and discards half of the disk, and compacts."""
    rng = random.Random(seed)
    with qcow_recycler.open(path, config=CONFIG) as image:
        guest.assert_reads(image, disk)
        for at in range(0, disk.size, disk.cluster_size):
            length = min(disk.cluster_size, disk.size - at)
            choice = rng.randrange(4)
            if choice < 2:
                image.discard(at, length)
                disk.zero(at, length)
            elif choice == 2:
                content = guest.data(rng, min(length, 5 * 512))
                image.write(at, content)
                disk.write(at, content)
        image.compact()
        guest.assert_reads(image, disk)


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_is_worked_on_and_compacted(make: Maker, image_path: Path) -> None:
    disk = guest.Disk(SIZE, CLUSTER)
    make(image_path, disk)
    before = image_path.stat().st_size
    # What was lost before, in the image as it was made, is no concern of the compaction.
    if make is leaks:
        qcow_recycler.check(image_path, repair="leaks")
    work(image_path, disk, 1)
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)
    needed = Qcow2(image_path).needed_bytes()
    assert image_path.stat().st_size <= 1.02 * needed + (1 << 20) < before
    # QEMU goes on, and so do we.
    qemu.io(image_path, f"write -P 77 {CLUSTER} {CLUSTER}")
    disk.write(CLUSTER, bytes([77]) * CLUSTER)
    work(image_path, disk, 2)
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)


def test_unknown_autoclear_bits_are_cleared_by_the_first_change_and_no_earlier(image_path: Path) -> None:
    unknown_autoclear(image_path, guest.Disk(SIZE, CLUSTER))
    with qcow_recycler.open(image_path, read_only=True) as image:
        image.read(0, 512)
    assert Qcow2(image_path).get("autoclear_features") == 1 << 60
    with qcow_recycler.open(image_path) as image:
        image.write(0, bytes(512))
        image.flush()
        assert Qcow2(image_path).get("autoclear_features") == 0


def test_an_image_that_is_refused_for_its_bitmaps_keeps_its_autoclear_bits(image_path: Path) -> None:
    filled(image_path, guest.Disk(SIZE, CLUSTER))
    qemu.img("bitmap", "--add", image_path, "changes")
    header = Qcow2(image_path)
    extension = header.bytes_at(header.get("header_length"), 4096)
    at = extension.index(struct.pack(">II", 0x23852875, 24)) + 8
    directory = int.from_bytes(extension[at + 16 : at + 24], "big")
    # The entry's name reaches past the directory's end.
    patch(image_path, directory + 18, struct.pack(">H", 1023))
    patch(image_path, 88, struct.pack(">Q", 1 << 60 | 1))
    before = image_path.read_bytes()
    with pytest.raises(qcow_recycler.Error):
        qcow_recycler.open(image_path)
    assert image_path.read_bytes() == before


def test_what_others_wrote_into_the_header_stays(image_path: Path) -> None:
    disk = guest.Disk(SIZE, CLUSTER)
    unknown_extension(image_path, disk)
    patch(image_path, 80, struct.pack(">Q", 1 << 50))
    work(image_path, disk, 3)
    start = Qcow2(image_path).get("header_length")
    assert Qcow2(image_path).bytes_at(start, 19) == struct.pack(">II", 0x12345678, 11) + b"not for us!"
    assert Qcow2(image_path).get("compatible_features") & 1 << 50


def test_leaks_stay_for_a_repair_and_do_not_keep_the_disk_from_being_used(image_path: Path) -> None:
    disk = guest.Disk(SIZE, CLUSTER)
    leaks(image_path, disk)
    work(image_path, disk, 4)
    assert not qemu.check(image_path).corruptions
    qemu.assert_contents(image_path, disk.bytes)


@pytest.mark.parametrize("size", [SIZE + 512, SIZE - 512, SIZE + 3 * 512 + CLUSTER // 2, 512])
def test_sizes_that_are_no_multiple_of_a_cluster(image_path: Path, size: int) -> None:
    disk = guest.Disk(size, CLUSTER)
    filled(image_path, disk)
    work(image_path, disk, 5)
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)


@pytest.mark.parametrize("cluster_size", [1 << 20, 2 << 20])
def test_a_disk_of_a_pebibyte(image_path: Path, cluster_size: int) -> None:
    """Data at its start, in its middle and at its very end; all of it moves when what lay before it is gone."""
    size = 1 << 50
    qemu.create(image_path, size, cluster_size=cluster_size)
    places = [0, 77 * cluster_size, size // 2 + 4096, size - 4096]
    with qcow_recycler.open(image_path, config=CONFIG) as image:
        image.write(1 << 40, bytes([9]) * (4 * cluster_size))
        for n, at in enumerate(places):
            image.write(at, bytes([n + 1]) * 4096)
        image.flush()
        before = image_path.stat().st_size
        image.discard(1 << 40, 4 * cluster_size)
        image.compact()
        assert [image.read(at, 4096)[0] for at in places] == [1, 2, 3, 4]
    assert image_path.stat().st_size <= before - 4 * cluster_size
    qemu.assert_clean(image_path)
    qemu.io(image_path, *(f"read -P {n + 1} {at} 4096" for n, at in enumerate(places)), f"read -P 0 {1 << 40} 4096")


@pytest.mark.parametrize("how", ["discarded", "cut off"])
def test_more_than_2_gib_in_a_row_go_back_to_the_host(image_path: Path, how: str) -> None:
    qemu.create(image_path, 5 << 29, preallocation="falloc")
    assert image_path.stat().st_blocks * 512 > 5 << 29
    with qcow_recycler.open(image_path) as image:
        image.write(0, b"\x5a" * 4096)
        if how == "discarded":
            image.discard(1 << 20, (5 << 29) - (1 << 20))
        else:
            image.resize(1 << 20, shrink=True)
        image.compact()
        assert image_path.stat().st_blocks * 512 < 4 << 20
    qemu.assert_clean(image_path)
    assert qemu.contents(image_path)[:8192] == b"\x5a" * 4096 + bytes(4096)
