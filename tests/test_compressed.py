"""Images with compressed clusters get as small as their live data: what is compressed stays so and is packed together
again, while a guest works."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

import guest
import qcow_recycler
import qemu
from qcow2 import COMPRESSED, OFFSET_MASK, Qcow2

CONFIG = "keep_erased=0;compact_after_unmaps=0"


def half_compressible(rng: random.Random, length: int) -> bytes:
    """Of very different compressed lengths, most of them well below the length."""
    random_part = rng.randrange(length // 8, length // 2)
    return rng.randbytes(random_part) + bytes([rng.randrange(1, 255)]) * (length - random_part)


def compressed(path: Path, disk: guest.Disk, rng: random.Random, **options: object) -> None:
    """An image made by `qemu-img convert -c`."""
    for at in range(0, disk.size, disk.cluster_size):
        disk.write(at, half_compressible(rng, disk.cluster_size))
    raw = path.with_suffix(".raw")
    raw.write_bytes(disk.bytes)
    words = ",".join(f"{k}={v}" for k, v in {"cluster_size": disk.cluster_size, **options}.items())
    qemu.img("convert", "-q", "-c", "-O", "qcow2", "-o", words, raw, path)
    raw.unlink()


def extents(path: Path) -> dict[int, tuple[int, int]]:
    """Where each compressed cluster of the disk has its data: offset and length, in bytes."""
    header = Qcow2(path)
    found = {}
    for l1_index, l1_entry in enumerate(header.l1()):
        for i, entry in enumerate(header.l2(l1_entry) if l1_entry else ()):
            if entry & COMPRESSED:
                found[l1_index * header.entries + i] = header.compressed_extent(entry)
    return found


def discard(image: qcow_recycler.Image, disk: guest.Disk, clusters: list[int]) -> None:
    for cluster in clusters:
        image.discard(cluster * disk.cluster_size, disk.cluster_size)
        disk.zero(cluster * disk.cluster_size, disk.cluster_size)


def assert_small(path: Path, disk: guest.Disk) -> None:
    """Compressed data is dense: it takes little more host clusters than bytes."""
    size = disk.cluster_size
    taken = {c for at, n in extents(path).values() for c in range(at // size, (at + n - 1) // size + 1)}
    needed = sum(n + 512 for _, n in extents(path).values())
    assert len(taken) * size <= 1.25 * needed + (1 << 20)
    header = Qcow2(path)
    assert path.stat().st_size <= 1.02 * header.needed_bytes() + (1 << 20)


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize(
    ("cluster_size", "clusters", "refcount_bits"),
    [(4096, 4096, 16), (65536, 400, 16), (65536, 400, 2), (65536, 200, 1), (512 << 10, 100, 16)],
)
def test_half_of_it_discarded(
    image_path: Path, cluster_size: int, clusters: int, refcount_bits: int, compression: str
) -> None:
    rng = random.Random(cluster_size + refcount_bits)
    disk = guest.Disk(clusters * cluster_size, cluster_size)
    compressed(image_path, disk, rng, compression_type=compression, refcount_bits=refcount_bits)
    before = image_path.stat().st_size
    with qcow_recycler.open(image_path, config=CONFIG) as image:
        order = list(range(clusters))
        rng.shuffle(order)
        discard(image, disk, order[: clusters // 2])
        image.compact()
        guest.assert_reads(image, disk)
        assert image.stats.background_errors == 0
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)
    kept = extents(image_path)
    assert set(kept) == set(order[clusters // 2 :]), "what was compressed stays so"
    if refcount_bits > 1:
        assert_small(image_path, disk)
    # Sectors are not shared, which with small clusters costs more; with counts of one bit, clusters are not either.
    assert image_path.stat().st_size < 0.85 * before


def test_a_compaction_that_has_nothing_to_do_does_nothing(image_path: Path) -> None:
    disk = guest.Disk(200 * 65536, 65536)
    compressed(image_path, disk, random.Random(2))
    with qcow_recycler.open(image_path, config=CONFIG) as image:
        discard(image, disk, list(range(0, 200, 2)))
        image.compact()
        assert image.compact().moved == 0


def test_data_at_the_end_of_the_file_moves_past_compressed_data_at_its_start(image_path: Path) -> None:
    """As an image from a distribution is after some use: compressed at the start, then what was written since."""
    disk = guest.Disk(300 * 65536, 65536)
    rng = random.Random(3)
    compressed(image_path, disk, rng)
    with qcow_recycler.open(image_path, config=CONFIG) as image:
        for cluster in rng.sample(range(300), 150):
            content = guest.data(rng, 65536)
            image.write(cluster * 65536, content)
            disk.write(cluster * 65536, content)
        discard(image, disk, rng.sample(range(300), 120))
        image.compact()
        guest.assert_reads(image, disk)
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)
    assert_small(image_path, disk)


def test_a_guest_writes_and_discards_what_is_being_packed(image_path: Path) -> None:
    disk = guest.Disk(1500 * 16384, 16384)
    rng = random.Random(4)
    compressed(image_path, disk, rng)
    with qcow_recycler.open(image_path, config=CONFIG) as image:
        discard(image, disk, rng.sample(range(1500), 700))
        mine = random.Random(5)

        def step() -> None:
            at = mine.randrange(1500) * 16384
            choice = mine.randrange(4)
            if choice == 0:
                image.discard(at, 16384)
                disk.zero(at, 16384)
            elif choice == 1:
                content = guest.data(mine, 4096)
                image.write(at + 4096, content)
                disk.write(at + 4096, content)
            elif choice == 2 and mine.randrange(8) == 0:
                image.flush()
            # One that never rests would, on two cores, leave the compaction none.
            time.sleep(0.001)
            got = image.read(at, 16384)
            assert got == disk.bytes[at : at + 16384], qemu.first_difference(got, disk.bytes[at : at + 16384])

        with guest.at_work(step):
            for _ in range(3):
                image.compact()
        image.compact()
        guest.assert_reads(image, disk)
        assert image.stats.background_errors == 0
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)
    assert_small(image_path, disk)


def test_what_a_snapshot_shares_stays_as_it_is(image_path: Path) -> None:
    disk = guest.Disk(100 * 65536, 65536)
    rng = random.Random(6)
    compressed(image_path, disk, rng)
    qemu.img("snapshot", "-c", "before", image_path)
    old = bytes(disk.bytes)
    with qcow_recycler.open(image_path, config=CONFIG) as image:
        discard(image, disk, rng.sample(range(100), 60))
        image.compact()
        guest.assert_reads(image, disk)
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)
    qemu.assert_contents(image_path, old, snapshot="before")
    qemu.img("snapshot", "-d", "before", image_path)
    with qcow_recycler.open(image_path, config=CONFIG) as image:
        image.compact()
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)
    assert_small(image_path, disk)


def test_a_snapshot_keeps_what_a_damaged_disk_refers_to_as_well(image_path: Path) -> None:
    """Data is counted as often as the disk refers to it, and yet a snapshot has it too: the counts are wrong."""
    disk = guest.Disk(200 * 4096, 4096)
    rng = random.Random(1009)
    compressed(image_path, disk, rng)
    # What is left is worth being packed more densely.
    qemu.io(image_path, *(f"discard {n * 4096} 4096" for n in range(200) if n % 4))
    old = qemu.contents(image_path)
    descriptors = Qcow2(image_path).l2(Qcow2(image_path).l1()[0])[:200]
    assert sum(entry & COMPRESSED != 0 for entry in descriptors) == 50
    qemu.img("snapshot", "-c", "before", image_path)
    qemu.img("resize", "-q", image_path, 400 * 4096)
    qemu.io(image_path, "write -P 7 0 800k")
    # As if the disk had never let go of it, but for the counts.
    table = Qcow2(image_path).l1()[0] & OFFSET_MASK
    with open(image_path, "r+b") as file:
        os.pwrite(file.fileno(), b"".join(entry.to_bytes(8, "big") for entry in descriptors), table + 200 * 8)
    assert qemu.check(image_path).corruptions
    with qcow_recycler.open(image_path, config=CONFIG) as image:
        image.discard(0, 600 << 10)
        image.compact()
        assert image.read(800 << 10, 800 << 10) == old
    qemu.assert_contents(image_path, old + bytes(800 << 10), snapshot="before")


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
@pytest.mark.parametrize(
    ("cluster_size", "refcount_bits", "extended"),
    [(4096, 16, "off"), (65536, 16, "off"), (65536, 2, "off"), (65536, 16, "on"), (2 << 20, 16, "off")],
)
def test_what_we_compress_is_read_by_qemu(
    image_path: Path, cluster_size: int, refcount_bits: int, extended: str, compression: str
) -> None:
    rng = random.Random(cluster_size + refcount_bits)
    disk = guest.Disk(40 * cluster_size + 512 * 7, cluster_size)
    qemu.create(
        image_path,
        disk.size,
        cluster_size=cluster_size,
        refcount_bits=refcount_bits,
        extended_l2=extended,
        compression_type=compression,
    )
    with qcow_recycler.open(image_path, config=CONFIG) as image:
        for at in (*range(0, 30 * cluster_size, cluster_size), 40 * cluster_size):
            length = min(cluster_size, disk.size - at)
            content = half_compressible(rng, length)
            assert image.write_compressed(at, content) == length
            disk.write(at, content)
        # What does not compress is stored all the same; pieces of clusters are refused.
        content = rng.randbytes(2 * cluster_size)
        image.write_compressed(32 * cluster_size, content)
        disk.write(32 * cluster_size, content)
        with pytest.raises(qcow_recycler.Error, match="whole clusters"):
            image.write_compressed(512, bytes(cluster_size))
        with pytest.raises(qcow_recycler.Error, match="whole clusters"):
            image.write_compressed(0, bytes(512))
        guest.assert_reads(image, disk)
        report = image.check()
        assert (report.corruptions, report.leaks) == (0, 0)
        # Over one another, over what was written plainly, and the other way round.
        for _ in range(60):
            at = rng.randrange(40) * cluster_size
            if rng.random() < 0.6:
                content = half_compressible(rng, cluster_size)
                image.write_compressed(at, content)
                disk.write(at, content)
            elif rng.random() < 0.5:
                image.write(at + 512, b"plain   " * 64)
                disk.write(at + 512, b"plain   " * 64)
            else:
                discard(image, disk, [at // cluster_size])
        guest.assert_reads(image, disk)
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)
    assert len(extents(image_path)) > 10
    with qcow_recycler.open(image_path, config=CONFIG) as image:
        image.compact()
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)


def test_refcounts_of_one_bit_keep_everything_plain(image_path: Path) -> None:
    qemu.create(image_path, 1 << 20, refcount_bits=1)
    with qcow_recycler.open(image_path, config=CONFIG) as image:
        image.write_compressed(0, b"z" * 65536)
        with pytest.raises(qcow_recycler.Error, match="one bit"):
            image.compress()
    qemu.assert_clean(image_path)
    assert not extents(image_path)


@pytest.mark.parametrize("busy", [False, True])
def test_a_disk_is_compressed_while_a_guest_works(image_path: Path, busy: bool) -> None:
    rng = random.Random(11)
    disk = guest.Disk(32 << 20, 65536)
    qemu.create(image_path, disk.size)
    with qcow_recycler.open(image_path, config=CONFIG) as image:
        for at in range(0, disk.size, 65536):
            content = half_compressible(rng, 65536)
            image.write(at, content)
            disk.write(at, content)

        def step() -> None:
            at, length = disk.range(rng, 16384)
            content = rng.randbytes(length)
            image.write(at, content)
            disk.write(at, content)
            time.sleep(0.001)

        with guest.at_work(*[step] * busy):
            assert image.compress() > (0 if busy else 20 << 20)
            image.compact()
        guest.assert_reads(image, disk)
        report = image.check()
        assert (report.corruptions, report.leaks) == (0, 0)
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)
    if not busy:
        assert_small(image_path, disk)
        assert image_path.stat().st_size < disk.size * 3 // 4


def test_what_a_snapshot_shares_is_not_compressed_and_kept(image_path: Path) -> None:
    rng = random.Random(12)
    disk = guest.Disk(4 << 20, 65536)
    qemu.create(image_path, disk.size)
    qemu.io(image_path, "write -P 3 0 2M")
    qemu.img("snapshot", "-c", "before", image_path)
    old = bytes([3]) * (2 << 20) + bytes(2 << 20)
    qemu.io(image_path, "write -P 4 1M 2M")
    disk.write(0, bytes([3]) * (1 << 20) + bytes([4]) * (2 << 20))
    with qcow_recycler.open(image_path, config=CONFIG) as image:
        assert image.compress() == 2 << 20
        guest.our_session(image, disk, rng, 30)
        image.compact()
        guest.assert_reads(image, disk)
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)
    qemu.assert_contents(image_path, old, snapshot="before")


def test_a_disk_of_one_sector(image_path: Path) -> None:
    """Its only cluster ends with it."""
    qemu.create(image_path, 512)
    content = b"\1" * 300 + b"\2" * 212
    with qcow_recycler.open(image_path) as image:
        image.write_compressed(0, content)
        assert image.read(0, 512) == content
    assert Qcow2(image_path).mapping(0)[1] & COMPRESSED
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, content)


def test_entries_that_say_too_little_or_too_much(image_path: Path) -> None:
    """Whatever length an entry says: the data, if it is all within that, or an error; as with QEMU."""
    disk = guest.Disk(256 << 10, 64 << 10)
    compressed(image_path, disk, random.Random(7))
    at, entry = Qcow2(image_path).mapping(64 << 10)
    bits = 62 - (16 - 8)
    sectors = (entry & (COMPRESSED - 1)) >> bits
    assert sectors > 4
    for said in (0, 1, sectors // 2, sectors - 1, sectors, sectors + 1, sectors + 100):
        with open(image_path, "r+b") as file:
            os.pwrite(file.fileno(), (entry & ~(0xFF << bits) | said << bits).to_bytes(8, "big"), at)
        expected = disk.bytes[64 << 10 : 128 << 10]
        with qcow_recycler.open(image_path, read_only=True) as image:
            try:
                assert image.read(64 << 10, 64 << 10) == expected
                reads = True
            except qcow_recycler.InvalidImage as error:
                assert "compress" in str(error), error
                reads = False
            # Its neighbours are as they were.
            assert image.read(0, 64 << 10) == disk.bytes[: 64 << 10]
            assert image.read(128 << 10, 128 << 10) == disk.bytes[128 << 10 :]
        theirs = qemu.run("qemu-io", "-r", "-f", "qcow2", "-c", "read 64k 64k", image_path, ok=(0, 1))
        assert reads == ("failed" not in theirs.stdout + theirs.stderr), f"{said} sectors of {sectors}"
        assert reads or said < sectors


def test_compressed_data_past_4_gib_of_the_file(image_path: Path) -> None:
    """It is read and checked where it is, and a compaction brings it back to where the file is short."""
    disk = guest.Disk(1 << 20, 64 << 10)
    compressed(image_path, disk, random.Random(11))
    bits = 62 - (16 - 8)
    far = 5 << 30
    with open(image_path, "r+b") as file:
        for at in range(0, 4 * disk.cluster_size, disk.cluster_size):
            place, entry = Qcow2(image_path).mapping(at)
            offset, length = Qcow2(image_path).compressed_extent(entry)
            data = os.pread(file.fileno(), length, offset)
            os.pwrite(file.fileno(), data, far + offset)
            os.pwrite(file.fileno(), (entry - (entry & ((1 << bits) - 1)) + far + offset).to_bytes(8, "big"), place)
    report = qcow_recycler.check(image_path, repair="all")
    assert report.corruptions == report.corruptions_fixed > 0
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)
    # The repair left gigabytes that no refcount block counts: they go with the next opening, when the block behind them
    # is gone.
    for _ in range(2):
        with qcow_recycler.open(image_path, config=CONFIG) as image:
            assert image.read(0, disk.size) == disk.bytes
            image.compact()
    assert image_path.stat().st_size < 4 << 20
    assert all(offset < 4 << 20 for offset, _ in extents(image_path).values())
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)
