"""Images with extended L2 entries: clusters of 32 subclusters, each stored, zero, or unallocated by itself."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

import guest
import qcow_recycler
import qemu
from qcow2 import OFFSET_MASK, Qcow2

CONFIG = "keep_erased=0;compact_after_unmaps=0;runtime_asserts=true"
CLUSTERS = [16384, 65536, 2 << 20]


def create(path: Path, size: int, cluster_size: int = 65536, **options: object) -> guest.Disk:
    qemu.create(path, size, extended_l2="on", cluster_size=cluster_size, **options)
    return guest.Disk(size, cluster_size)


def verify(path: Path, disk: guest.Disk) -> None:
    qemu.assert_clean(path)
    qemu.assert_contents(path, disk.bytes)


def parts(path: Path, at: int) -> tuple[int, int]:
    """The subclusters of the cluster at a guest offset that are stored, and those that are zero, as bits."""
    bitmap = Qcow2(path).subclusters(at)
    return bitmap & 0xFFFFFFFF, bitmap >> 32


@pytest.mark.parametrize("cluster_size", CLUSTERS)
def test_a_write_allocates_what_it_touches(image_path: Path, cluster_size: int) -> None:
    disk = create(image_path, 4 * cluster_size, cluster_size)
    part = cluster_size // 32
    with qcow_recycler.open(image_path, config=CONFIG) as image:
        assert image.info.extended_l2
        for at, length in ((part * 3, part * 2), (cluster_size + part - 512, 512), (cluster_size * 2 - 512, 1024)):
            content = random.Random(at).randbytes(length)
            image.write(at, content)
            disk.write(at, content)
    verify(image_path, disk)
    assert parts(image_path, 0) == (0b11000, 0)
    assert parts(image_path, cluster_size) == (1 << 31 | 1, 0)
    assert parts(image_path, 2 * cluster_size) == (1, 0)


def test_a_discard_frees_what_it_covers(image_path: Path) -> None:
    disk = create(image_path, 1 << 20)
    with qcow_recycler.open(image_path, config=CONFIG) as image:
        image.write(0, b"\x55" * (256 << 10))
        disk.write(0, b"\x55" * (256 << 10))
        # One subcluster whole and pieces of its neighbours; then the rest of that cluster.
        for at, length in (
            (4096 - 512, 3072),
            (65536 + 512, 65536 - 1024),
            (65536, 65536),
            (131072, 32768),
            (163840, 32768),
        ):
            image.discard(at, length)
            disk.zero(at, length)
        guest.assert_reads(image, disk)
        image.compact()
        guest.assert_reads(image, disk)
    verify(image_path, disk)
    assert parts(image_path, 0) == (0xFFFFFFFF & ~(1 << 2), 1 << 2)
    for at in (65536, 131072):
        assert parts(image_path, at) == (0, 0xFFFFFFFF)
        assert Qcow2(image_path).mapping(at)[1] & OFFSET_MASK == 0, "no host cluster is kept for zeroes"
    assert image_path.stat().st_size == Qcow2(image_path).needed_bytes()


@pytest.mark.parametrize("cluster_size", CLUSTERS)
@pytest.mark.parametrize("seed", guest.seeds(4))
def test_taking_turns_with_qemu(image_path: Path, cluster_size: int, seed: int) -> None:
    rng = random.Random(seed)
    disk = create(image_path, 12 * cluster_size + rng.randrange(64) * 512, cluster_size)
    for _ in range(4):
        guest.qemu_session(image_path, disk, rng, 10)
        with qcow_recycler.open(image_path, config=CONFIG) as image:
            guest.assert_reads(image, disk)
            image.start()
            guest.our_session(image, disk, rng, 30)
            image.stop()
            image.compact()
            guest.assert_reads(image, disk)
        verify(image_path, disk)


def test_backing_files_show_through_subcluster_by_subcluster(image_path: Path, tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    rng = random.Random(5)
    content = rng.randbytes(1 << 20)
    base.write_bytes(content)
    disk = create(image_path, 1 << 20, backing_file=base.name, backing_fmt="raw")
    disk.write(0, content)
    with qcow_recycler.open(image_path, config=CONFIG, backing="allow") as image:
        guest.assert_reads(image, disk)
        for _ in range(60):
            at, length = disk.range(rng, 20000)
            kind = rng.randrange(3)
            if kind == 0:
                image.discard(at, length)
                disk.zero(at, length)
            else:
                data = rng.randbytes(length)
                image.write(at, data)
                disk.write(at, data)
        guest.assert_reads(image, disk)
        image.compact()
        guest.assert_reads(image, disk)
    verify(image_path, disk)


def test_snapshots_and_compressed_clusters_in_such_images(image_path: Path, tmp_path: Path) -> None:
    rng = random.Random(9)
    disk = guest.Disk(100 * 65536, 65536)
    for at in range(0, disk.size, 65536):
        disk.write(at, rng.randbytes(20000) + bytes(45536))
    raw = tmp_path / "raw"
    raw.write_bytes(disk.bytes)
    qemu.img("convert", "-q", "-c", "-O", "qcow2", "-o", "extended_l2=on", raw, image_path)
    held = {}
    for name in ("one", "two"):
        with qcow_recycler.open(image_path, config=CONFIG) as image:
            guest.our_session(image, disk, rng, 40)
        qemu.img("snapshot", "-c", name, image_path)
        held[name] = bytes(disk.bytes)
    with qcow_recycler.open(image_path, config=CONFIG) as image:
        guest.our_session(image, disk, rng, 40)
        image.discard(0, 50 * 65536)
        disk.zero(0, 50 * 65536)
        image.compact()
        guest.assert_reads(image, disk)
    verify(image_path, disk)
    for name, content in held.items():
        qemu.assert_contents(image_path, content, snapshot=name)
    qemu.img("snapshot", "-d", "one", image_path)
    qemu.img("snapshot", "-a", "two", image_path)
    with qcow_recycler.open(image_path, config=CONFIG) as image:
        image.compact()
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, held["two"])


def test_compacted_while_a_guest_writes(image_path: Path) -> None:
    disk = create(image_path, 32 << 20)
    rng = random.Random(2)
    with qcow_recycler.open(image_path, config=CONFIG) as image:
        for at in range(0, disk.size, 65536):
            content = rng.randbytes(65536)
            image.write(at, content)
            disk.write(at, content)
        for at in range(0, disk.size // 2, 65536):
            image.discard(at, 65536)
            disk.zero(at, 65536)
        image.flush()

        def step() -> None:
            at, length = disk.range(rng, 8192)
            if rng.random() < 0.3:
                image.discard(at, length)
                disk.zero(at, length)
            else:
                content = rng.randbytes(length)
                image.write(at, content)
                disk.write(at, content)

        with guest.at_work(step):
            image.compact()
        guest.assert_reads(image, disk)
        image.compact()
    verify(image_path, disk)
    assert image_path.stat().st_size <= 1.02 * Qcow2(image_path).needed_bytes() + (1 << 20)


def test_created_by_us(image_path: Path) -> None:
    qcow_recycler.create(image_path, 10 << 20, extended_l2=True)
    assert qemu.info(image_path)["format-specific"]["data"]["extended-l2"]
    disk = guest.Disk(10 << 20, 65536)
    guest.qemu_session(image_path, disk, random.Random(3), 20)
    verify(image_path, disk)
    with pytest.raises(qcow_recycler.Error, match="16 KiB"):
        qcow_recycler.create(image_path.with_suffix(".small"), 1 << 20, cluster_size=4096, extended_l2=True)
    with pytest.raises(qcow_recycler.Error, match="version 3"):
        qcow_recycler.create(image_path.with_suffix(".old"), 1 << 20, version=2, extended_l2=True)


@pytest.mark.parametrize("longer", [0, 1 << 20])
def test_resized_over_a_backing_file(image_path: Path, tmp_path: Path, longer: int) -> None:
    """What is new reads as zeroes, also where the backing file goes on, and if the disk ended within a subcluster."""
    rng = random.Random(longer)
    base = tmp_path / "base.raw"
    size = (1 << 20) + 1536
    content = rng.randbytes(size + longer)
    base.write_bytes(content)
    disk = create(image_path, size, backing=base.name, backing_format="raw")
    disk.write(0, content[:size])
    for new in (size + 65536, (600 << 10) + 512, (600 << 10) + 2048, 3 << 20, size):
        with qcow_recycler.open(image_path, config=CONFIG, backing="allow") as image:
            image.write(4096, b"\4" * 1024)
            image.resize(new, shrink=True)
            disk.write(4096, b"\4" * 1024)
            disk.resize(new)
            guest.assert_reads(image, disk)
            image.write(new - 1024, b"\5" * 512)
            disk.write(new - 1024, b"\5" * 512)
        verify(image_path, disk)


def test_an_entry_that_cannot_be_is_an_error_that_names_it(image_path: Path) -> None:
    create(image_path, 1 << 20)
    qemu.io(image_path, "write -P 1 0 4k")
    at = Qcow2(image_path).mapping(0)[0]
    for word, bitmap, reason in ((0, 1, "no host cluster"), (None, 1 << 32 | 1, "both"), (None, None, None)):
        with open(image_path, "r+b") as file:
            old = file.seek(at) and file.read(16)
            if reason is None:
                break
            file.seek(at + 8)
            file.write(bitmap.to_bytes(8, "big"))
            if word is not None:
                file.seek(at)
                file.write(word.to_bytes(8, "big"))
        with qcow_recycler.open(image_path, read_only=True) as image, pytest.raises(qcow_recycler.Error) as caught:
            image.read(0, 4096)
        assert reason in str(caught.value) and f"{at:#x}" in str(caught.value)
        with qcow_recycler.open(image_path) as image:
            for change in (
                lambda: image.write(0, b"\2" * 512),
                lambda: image.write(0, b"\2" * 65536),
                lambda: image.discard(0, 65536),
                lambda: image.write_zeroes(0, 4096),
            ):
                with pytest.raises(qcow_recycler.Error) as caught:
                    change()
                assert reason in str(caught.value) and f"{at:#x}" in str(caught.value)
            image.write(65536, b"\3" * 512)
        assert Qcow2(image_path).subclusters(0) == bitmap
        with open(image_path, "r+b") as file:
            file.seek(at)
            file.write(old)


@pytest.mark.parametrize("unmap", [False, True])
def test_zeroes_leave_subclusters_as_qemu_leaves_them(tmp_path: Path, unmap: bool) -> None:
    """Over unallocated, stored and compressed clusters, in parts and whole: which are stored and which are zero.

    What is not allocated and reads as zeroes without that is left as it is here; so there is a backing file."""
    ours, theirs, base = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2", tmp_path / "base.raw"
    size, part = 512 << 10, 2048
    base.write_bytes(b"\x77" * size)
    create(ours, size, backing=base.name, backing_format="raw")
    qemu.io(ours, "write -q -P 1 64k 128k", "write -q -c -P 2 256k 64k", "write -q -P 3 320k 2k")
    shutil.copy(ours, theirs)
    ranges = [(part, 3 * part), (66 << 10, part), (70 << 10, 10 << 10), (128 << 10, 64 << 10)]
    ranges += [(258 << 10, 4 << 10), (320 << 10, 4 << 10), (384 << 10, 64 << 10)]
    with qcow_recycler.open(ours, config=CONFIG, backing="allow") as image:
        for at, length in ranges:
            image.write_zeroes(at, length, may_unmap=unmap)
    qemu.io(theirs, *(f"write -q -z {'-u ' if unmap else ''}{at} {length}" for at, length in ranges))
    qemu.assert_clean(ours)
    qemu.assert_contents(ours, qemu.contents(theirs))
    found = {at: (parts(ours, at), parts(theirs, at)) for at in range(0, size, 65536)}
    assert all(mine == qemus for mine, qemus in found.values()), found
