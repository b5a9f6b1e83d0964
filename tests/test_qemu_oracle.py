"""QEMU as the oracle, both ways: what QEMU writes we read, what we write and recycle QEMU reads and finds clean."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

import guest
import qcow_recycler
import qemu
from qcow2 import DIRTY, Qcow2

CLUSTER_SIZES = [512 << n for n in range(13)]
# The recycler at its busiest: it compacts as soon as a few clusters are free, and keeps no pool that hides a fault.
EAGER = "compact_after_unmaps=8;keep_erased=8;settle_ms=5;flush_ms=5;runtime_asserts=true"


def disk_of(rng: random.Random, cluster_size: int) -> guest.Disk:
    """A small disk whose size is often no multiple of the cluster size."""
    clusters = rng.randint(20, 200) if cluster_size <= 65536 else rng.randint(6, 24)
    size = min(max(clusters * cluster_size, 256 << 10), max(8 << 20, 6 * cluster_size))
    if rng.random() < 0.5:
        size -= rng.randrange(cluster_size // guest.SECTOR) * guest.SECTOR
    return guest.Disk(size, cluster_size)


def verify(path: Path, disk: guest.Disk) -> None:
    """Closed and clean: QEMU agrees about the contents, and finds nothing to repair."""
    assert not Qcow2(path).get("incompatible_features") & DIRTY
    qemu.assert_clean(path)
    qemu.assert_contents(path, disk.bytes)


def alternate(path: Path, seed: int) -> None:
    """Sessions of QEMU and of ours, in turns that the seed decides, on one image."""
    rng = random.Random(seed)
    cluster_size = rng.choice([*CLUSTER_SIZES, 512, 4096, 65536, 65536])
    old = rng.random() < 0.2
    extended = not old and rng.random() < 0.25
    if extended:
        cluster_size = max(cluster_size, 16384)
    shape = {
        "cluster_size": cluster_size,
        "refcount_bits": 16 if old else rng.choice([1, 2, 4, 8, 16, 16, 32, 64]),
        "lazy_refcounts": not old and rng.random() < 0.4,
        "extended_l2": extended,
    }
    disk = disk_of(rng, cluster_size)
    path.unlink(missing_ok=True)
    print(f"seed {seed}: version {2 if old else 3}, {shape}, {disk.size} bytes")
    if rng.random() < 0.5:
        words = {k: ("on" if v else "off") if isinstance(v, bool) else v for k, v in shape.items()}
        qemu.create(path, disk.size, compat="0.10" if old else "1.1", **words)
    else:
        qcow_recycler.create(path, disk.size, version=2 if old else 3, **shape)
        verify(path, disk)
    for _ in range(rng.randint(3, 6)):
        turn = rng.random()
        if turn < 0.4:
            guest.qemu_session(path, disk, rng, rng.randint(2, 12))
        elif turn < 0.5:
            size = max(guest.SECTOR, disk.size + rng.randint(-20, 40) * guest.SECTOR * rng.choice([1, 64]))
            guest.qemu_resize(path, disk, size)
        else:
            with qcow_recycler.open(path, config=rng.choice(["", "runtime_asserts=true", EAGER])) as image:
                guest.assert_reads(image, disk)
                if rng.random() < 0.5:
                    image.start()
                guest.our_session(image, disk, rng, rng.randint(5, 40))
                if rng.random() < 0.3:
                    # A resize does not wait for a compaction that is under way.
                    image.stop()
                    size = max(guest.SECTOR, disk.size + rng.randint(-20, 40) * guest.SECTOR * rng.choice([1, 64]))
                    image.resize(size, shrink=True)
                    disk.resize(size)
                    guest.our_session(image, disk, rng, rng.randint(1, 10))
                if rng.random() < 0.5:
                    image.compact()
                guest.assert_reads(image, disk)
                assert image.stats.background_errors == 0
        verify(path, disk)


@pytest.mark.parametrize("seed", guest.seeds(40))
def test_sessions_alternate(image_path: Path, seed: int) -> None:
    for each in guest.stretch(seed):
        alternate(image_path, each)


@pytest.mark.parametrize("lazy", ["off", "on"])
@pytest.mark.parametrize("cluster_size", CLUSTER_SIZES)
def test_what_qemu_wrote_is_read(image_path: Path, cluster_size: int, lazy: str) -> None:
    rng = random.Random(cluster_size)
    disk = disk_of(rng, cluster_size)
    qemu.create(image_path, disk.size, cluster_size=cluster_size, lazy_refcounts=lazy)
    for _ in range(3):
        guest.qemu_session(image_path, disk, rng, 12)
    before = image_path.read_bytes()
    with qcow_recycler.open(image_path, read_only=True) as image:
        assert image.info.virtual_size == disk.size
        assert image.info.cluster_size == cluster_size
        guest.assert_reads(image, disk)
    assert image_path.read_bytes() == before, "opening read-only changed the image"


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 << 20])
def test_version_2(image_path: Path, cluster_size: int) -> None:
    rng = random.Random(cluster_size)
    disk = disk_of(rng, cluster_size)
    qemu.create(image_path, disk.size, compat="0.10", cluster_size=cluster_size)
    guest.qemu_session(image_path, disk, rng, 12)
    for _ in range(2):
        with qcow_recycler.open(image_path) as image:
            assert image.info.version == 2
            guest.assert_reads(image, disk)
            guest.our_session(image, disk, rng, 20)
            image.compact()
        assert Qcow2(image_path).get("version") == 2
        verify(image_path, disk)
        guest.qemu_session(image_path, disk, rng, 6)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_converted_images(image_path: Path, tmp_path: Path, compat: str) -> None:
    rng = random.Random(7)
    disk = guest.Disk(3 << 20, 65536)
    for _ in range(20):
        offset, length = disk.range(rng)
        disk.write(offset, guest.data(rng, length))
    raw = tmp_path / "disk.raw"
    raw.write_bytes(disk.bytes)
    qemu.img("convert", "-f", "raw", "-O", "qcow2", "-o", f"compat={compat}", raw, image_path)
    with qcow_recycler.open(image_path) as image:
        guest.assert_reads(image, disk)
        guest.our_session(image, disk, rng, 30)
        image.compact()
    verify(image_path, disk)
    raw.write_bytes(disk.bytes)
    qemu.img("compare", "-f", "raw", "-F", "qcow2", raw, image_path)


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 1 << 20])
@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
def test_preallocated_images(image_path: Path, preallocation: str, cluster_size: int) -> None:
    rng = random.Random(cluster_size)
    disk = disk_of(rng, cluster_size)
    qemu.create(image_path, disk.size, preallocation=preallocation, cluster_size=cluster_size)
    guest.qemu_session(image_path, disk, rng, 4)
    with qcow_recycler.open(image_path) as image:
        guest.assert_reads(image, disk)
        guest.our_session(image, disk, rng, 20)
        guest.assert_reads(image, disk)
    verify(image_path, disk)
    with qcow_recycler.open(image_path) as image:
        image.discard(0, disk.size)
        disk.zero(0, disk.size)
        image.compact()
        guest.assert_reads(image, disk)
    verify(image_path, disk)


def test_preallocated_zero_clusters_read_as_zeroes_and_keep_their_cluster(image_path: Path) -> None:
    """`write -z` without `-u` leaves an allocated cluster with the zero flag: its old data must not come back."""
    disk = guest.Disk(4 << 20, 65536)
    rng = random.Random(3)
    qemu.create(image_path, disk.size)
    content = guest.data(rng, 1 << 20)
    with qcow_recycler.open(image_path) as image:
        image.write(0, content)
        disk.write(0, content)
    qemu.io(image_path, "write -z 0 512k")
    disk.zero(0, 512 << 10)
    assert Qcow2(image_path).mapping(0)[1] & 1, "QEMU made no zero cluster; the test shows nothing"
    with qcow_recycler.open(image_path) as image:
        guest.assert_reads(image, disk)
        # The rest of a zero cluster written in part is zero, not what the host cluster holds.
        patch = guest.data(rng, 512)
        image.write(65536 + 1024, patch)
        disk.write(65536 + 1024, patch)
        guest.assert_reads(image, disk)
        image.compact()
    verify(image_path, disk)


@pytest.mark.parametrize("cluster_size", [512, 65536])
def test_resized_by_qemu(image_path: Path, cluster_size: int) -> None:
    rng = random.Random(cluster_size)
    disk = guest.Disk(512 << 10, cluster_size)
    qemu.create(image_path, disk.size, cluster_size=cluster_size)
    for size in (900 << 10, 4 << 20, (3 << 20) + 512, 300 << 10, 1 << 20):
        guest.qemu_session(image_path, disk, rng, 6)
        guest.qemu_resize(image_path, disk, size)
        with qcow_recycler.open(image_path) as image:
            assert image.info.virtual_size == size
            guest.assert_reads(image, disk)
            guest.our_session(image, disk, rng, 10)
        verify(image_path, disk)


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
def test_resized_by_us(image_path: Path, cluster_size: int) -> None:
    rng = random.Random(cluster_size)
    disk = guest.Disk(512 << 10, cluster_size)
    qcow_recycler.create(image_path, disk.size, cluster_size=cluster_size)
    for size in (900 << 10, 8 << 20, (3 << 20) + 512, 300 << 10, 1 << 20):
        with qcow_recycler.open(image_path) as image:
            guest.our_session(image, disk, rng, 10)
            if size < disk.size:
                with pytest.raises(qcow_recycler.Error):
                    image.resize(size)
                guest.assert_reads(image, disk)
            image.resize(size, shrink=True)
            disk.resize(size)
            guest.assert_reads(image, disk)
        verify(image_path, disk)
        guest.qemu_session(image_path, disk, rng, 4)


def test_growing_does_not_show_what_qemu_left_past_the_end(image_path: Path) -> None:
    qemu.create(image_path, 100 << 10)
    qemu.io(image_path, "write -P 7 0 100k")
    qemu.img("resize", "-q", "--shrink", "-f", "qcow2", image_path, 90 << 10)
    with qcow_recycler.open(image_path) as image:
        image.resize(300 << 10)
        assert image.read(0, 300 << 10) == b"\7" * (90 << 10) + bytes(210 << 10)
    verify(image_path, guest.Disk(300 << 10, 65536, bytearray(b"\7" * (90 << 10) + bytes(210 << 10))))


@pytest.mark.parametrize("lazy", [False, True])
def test_what_we_wrote_is_read(image_path: Path, lazy: bool) -> None:
    rng = random.Random(11)
    for cluster_size in CLUSTER_SIZES:
        disk = disk_of(rng, cluster_size)
        image_path.unlink(missing_ok=True)
        qcow_recycler.create(image_path, disk.size, cluster_size=cluster_size, lazy_refcounts=lazy)
        with qcow_recycler.open(image_path) as image:
            guest.our_session(image, disk, rng, 25)
            guest.assert_reads(image, disk)
        verify(image_path, disk)


def test_a_dirty_image_of_qemu_is_repaired_on_open(image_path: Path) -> None:
    """A lazy-refcounts image that QEMU did not close has the dirty bit and stale refcounts."""
    disk = guest.Disk(8 << 20, 65536)
    qemu.create(image_path, disk.size, lazy_refcounts="on")
    with qemu.holding(image_path) as running:
        running.command("write -P 0x5a 0 2M")
        running.command("write -P 0x6b 4M 1M")
        running.command("flush")
        running.kill()
    assert Qcow2(image_path).get("incompatible_features") & DIRTY, "QEMU left no dirty bit; the test shows nothing"
    disk.write(0, b"\x5a" * (2 << 20))
    disk.write(4 << 20, b"\x6b" * (1 << 20))
    with qcow_recycler.open(image_path) as image:
        guest.assert_reads(image, disk)
        guest.our_session(image, disk, random.Random(1), 20)
        image.compact()
    verify(image_path, disk)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 << 20])
def test_compressed_clusters_are_read_and_written_over(
    image_path: Path, tmp_path: Path, cluster_size: int, compression: str
) -> None:
    """Several compressed clusters share a host cluster and begin at any byte: none may lose its data with another."""
    rng = random.Random(cluster_size)
    disk = disk_of(rng, cluster_size)
    for at in range(0, disk.size, 4096):
        # Compressible, and of very different compressed lengths.
        content = (guest.data(rng, rng.choice([16, 64, 1024])) * 512)[: min(4096, disk.size - at)]
        disk.write(at, content)
    raw = tmp_path / "disk.raw"
    raw.write_bytes(disk.bytes)
    options = ("-o", f"cluster_size={cluster_size},compression_type={compression}", raw, image_path)
    qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", *options)
    for _ in range(2):
        with qcow_recycler.open(image_path) as image:
            guest.assert_reads(image, disk)
            guest.our_session(image, disk, rng, 30)
            image.compact()
            guest.assert_reads(image, disk)
        verify(image_path, disk)
        guest.qemu_session(image_path, disk, rng, 4)
    with qcow_recycler.open(image_path) as image:
        image.discard(0, disk.size)
        disk.zero(0, disk.size)
        image.compact()
    verify(image_path, disk)
    assert image_path.stat().st_size <= Qcow2(image_path).needed_bytes() + (1 << 20)


def test_extents_agree_with_qemu(image_path: Path) -> None:
    """Ranges that we call unallocated or zero hold no data for QEMU either, and the other way round."""
    rng = random.Random(5)
    disk = guest.Disk(4 << 20, 65536)
    qemu.create(image_path, disk.size)
    guest.qemu_session(image_path, disk, rng, 20)
    with qcow_recycler.open(image_path, read_only=True) as image:
        ours = [(e.offset, e.length, e.kind) for e in image.extents()]
    assert sum(length for _, length, _ in ours) == disk.size
    theirs = bytearray(disk.size // guest.SECTOR)
    for extent in json.loads(qemu.img("map", "--output=json", "-f", "qcow2", image_path)):
        if extent["data"]:
            first, count = extent["start"] // guest.SECTOR, extent["length"] // guest.SECTOR
            theirs[first : first + count] = b"\1" * count
    for offset, length, kind in ours:
        expected = str(kind).lower().endswith("data")
        for sector in range(offset // guest.SECTOR, (offset + length) // guest.SECTOR):
            assert theirs[sector] == expected, f"{kind} at {sector * guest.SECTOR:#x}"


def test_qemu_copies_a_disk_over_nbd_after_us(image_path: Path, tmp_path: Path) -> None:
    """A running QEMU server, not only its offline tools, takes a recycled image, writes it and hands it back."""
    rng = random.Random(9)
    disk = guest.Disk(6 << 20, 65536)
    qcow_recycler.create(image_path, disk.size)
    with qcow_recycler.open(image_path) as image:
        guest.our_session(image, disk, rng, 40)
        image.compact()
    raw = tmp_path / "copy.raw"
    with qemu.nbd_export(image_path) as uri:
        qemu.img("convert", "-f", "raw", "-O", "raw", uri, raw)
        assert raw.read_bytes() == disk.bytes
        content = guest.data(rng, 1 << 20)
        pattern = tmp_path / "pattern"
        pattern.write_bytes(content)
        qemu.run("qemu-io", "-f", "raw", "-c", f"write -s {pattern} 1M 1M", "-c", "flush", uri)
        disk.write(1 << 20, content)
    with qcow_recycler.open(image_path) as image:
        guest.assert_reads(image, disk)
    verify(image_path, disk)
