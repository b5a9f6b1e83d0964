"""Internal snapshots made, deleted and gone back to by us: QEMU reads ours, and we read QEMU's."""

from __future__ import annotations

import asyncio
import errno
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import guest
import qcow_recycler
import qemu
from qcow_recycler import aio

EAGER = "compact_after_unmaps=8;keep_erased=8;settle_ms=5;flush_ms=5;runtime_asserts=true"


def qemu_lists(path: Path) -> dict[str, str]:
    """The names of the snapshots that QEMU sees, by ID."""
    return {s["id"]: s["name"] for s in qemu.info(path).get("snapshots", [])}


def assert_holds(path: Path, kept: dict[str, bytes]) -> None:
    qemu.assert_clean(path)
    assert sorted(qemu_lists(path).values()) == sorted(kept)
    for name, expected in kept.items():
        qemu.assert_contents(path, expected, snapshot=name)


@pytest.mark.parametrize(
    ("cluster_size", "refcount_bits", "lazy"),
    [(512, 16, "off"), (4096, 2, "off"), (4096, 64, "on"), (65536, 8, "off"), (65536, 16, "off"), (2 << 20, 4, "off")],
)
def test_qemu_reads_ours(image_path: Path, cluster_size: int, refcount_bits: int, lazy: str) -> None:
    rng = random.Random(cluster_size + refcount_bits)
    disk = guest.Disk(max(1 << 20, 6 * cluster_size), cluster_size)
    qemu.create(image_path, disk.size, cluster_size=cluster_size, refcount_bits=refcount_bits, lazy_refcounts=lazy)
    guest.qemu_session(image_path, disk, rng, 6)
    kept: dict[str, bytes] = {}
    for n in range(2):
        with qcow_recycler.open(image_path, config=EAGER) as image:
            if n:
                image.start()
            guest.our_session(image, disk, rng, 20)
            made = image.create_snapshot(f"s{n}")
            assert (made.id, made.name, made.virtual_size) == (str(n + 1), f"s{n}", disk.size)
            assert abs(made.created - time.time()) < 600
            assert image.snapshots()[-1] == made
            kept[f"s{n}"] = bytes(disk.bytes)
            guest.our_session(image, disk, rng, 20)
            image.compact()
            guest.assert_reads(image, disk)
            assert image.check().corruptions == 0
        assert_holds(image_path, kept)
        qemu.assert_contents(image_path, disk.bytes)
    # QEMU deletes one and goes back to the other; what it relies on is right. (In the other order two bits have no
    # room for that: it counts what comes before what goes.)
    qemu.img("snapshot", "-d", "s1", image_path)
    del kept["s1"]
    qemu.img("snapshot", "-a", "s0", image_path)
    qemu.assert_contents(image_path, kept["s0"])
    assert_holds(image_path, kept)


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_we_use_qemus(image_path: Path, compat: str) -> None:
    rng = random.Random(1)
    disk = guest.Disk(4 << 20, 4096)
    qemu.create(image_path, disk.size, cluster_size=4096, compat=compat)
    kept: dict[str, bytes] = {}
    for n in range(3):
        guest.qemu_session(image_path, disk, rng, 8)
        qemu.img("snapshot", "-c", f"q{n}", image_path)
        kept[f"q{n}"] = bytes(disk.bytes)
    guest.qemu_session(image_path, disk, rng, 4)
    with qcow_recycler.open(image_path, config=EAGER) as image:
        assert [s.name for s in image.snapshots()] == list(kept)
        image.apply_snapshot("q1")
        disk.bytes[:] = kept["q1"]
        guest.assert_reads(image, disk)
        guest.our_session(image, disk, rng, 20)
        image.delete_snapshot("3")
        del kept["q2"]
        made = image.create_snapshot("ours")
        assert made.id == "3"
        kept["ours"] = bytes(disk.bytes)
        guest.our_session(image, disk, rng, 20)
        guest.assert_reads(image, disk)
    assert_holds(image_path, kept)
    qemu.assert_contents(image_path, disk.bytes)
    with qcow_recycler.open(image_path) as image:
        for name in kept:
            image.delete_snapshot(name)
        assert image.snapshots() == ()
        image.compact()
        guest.assert_reads(image, disk)
    assert_holds(image_path, {})
    qemu.assert_contents(image_path, disk.bytes)


def test_while_a_guest_writes_and_the_recycler_moves(image_path: Path) -> None:
    """Each of the guest's writes is in a snapshot whole or not at all, and none that ended before it is missing."""
    size, cluster = 8 << 20, 4096
    qcow_recycler.create(image_path, size, cluster_size=cluster)
    written = 0
    kept: list[tuple[str, int]] = []

    with qcow_recycler.open(image_path, config=EAGER) as image:

        def write() -> None:
            nonlocal written
            n = written + 1
            # One sector tells how far it is; others are overwritten, discarded, and written anew.
            at = (n * 37 % 2000) * cluster
            image.write(at + 4096, n.to_bytes(8, "little") * 64)
            if n % 5 == 0:
                image.discard(at // 2 // cluster * cluster + 4096, 4 * cluster)
            image.write(0, n.to_bytes(8, "little") * 64)
            written = n

        image.start()
        with guest.at_work(write, image.compact):
            for round_number in range(12):
                time.sleep(0.05)
                before = written
                image.create_snapshot(f"s{round_number}")
                kept.append((f"s{round_number}", before))
                if round_number % 3 == 2:
                    name, _ = kept.pop(0)
                    image.delete_snapshot(name)
        assert image.check().corruptions == 0
        assert image.stats.background_errors == 0
    qemu.assert_clean(image_path)
    assert list(qemu_lists(image_path).values()) == [name for name, _ in kept]
    with qcow_recycler.open(image_path) as image:
        for name, before in kept:
            image.apply_snapshot(name)
            sector = image.read(0, 512)
            assert sector == sector[:8] * 64
            assert int.from_bytes(sector[:8], "little") >= before
        for name, _ in kept:
            image.delete_snapshot(name)
    qemu.assert_clean(image_path)


def test_a_queue_waits_its_turn(image_path: Path) -> None:
    """Requests of a queue, more than it has threads, while snapshots come and go."""

    async def work() -> None:
        await aio.create(image_path, 4 << 20, cluster_size=4096)
        async with await aio.open(image_path) as image:
            for n in range(5):
                writes = [image.write(i * 8192, bytes([n + 1]) * 4096) for i in range(100)]
                await asyncio.gather(*writes, image.create_snapshot(f"s{n}"))
                assert await image.read(99 * 8192, 4096) == bytes([n + 1]) * 4096
            assert [s.name for s in image.snapshots()] == [f"s{n}" for n in range(5)]
            await image.write(0, b"z" * 4096)
            await image.apply_snapshot("s0")
            assert set(await image.read(0, 4096)) <= {0, 1}
            await image.delete_snapshot("s1")

    asyncio.run(work())
    qemu.assert_clean(image_path)


def test_vm_state_goes_with_its_snapshot(image_path: Path) -> None:
    qemu.create(image_path, 1 << 20, cluster_size=4096)
    qemu.io(image_path, "write -P 1 0 64k", "write -b -P 77 0 128k")
    qemu.img("snapshot", "-c", "state", image_path)
    qemu.io(image_path, "write -P 2 0 64k")
    with qcow_recycler.open(image_path) as image:
        image.apply_snapshot("state")
        assert image.read(0, 65536) == b"\x01" * 65536
        image.create_snapshot("ours")
    qemu.assert_clean(image_path)
    with qcow_recycler.open(image_path) as image:
        image.delete_snapshot("state")
        image.compact()
    qemu.assert_clean(image_path)
    assert image_path.stat().st_size < 64 * 4096


def test_sizes_come_back(image_path: Path) -> None:
    small, large = 1 << 20, 3 << 20
    qcow_recycler.create(image_path, small, cluster_size=4096)
    with qcow_recycler.open(image_path) as image:
        image.write(small - 4096, b"a" * 4096)
        image.create_snapshot("small")
        image.resize(large)
        image.write(large - 4096, b"b" * 4096)
        image.create_snapshot("large")
        image.apply_snapshot("small")
        assert image.info.virtual_size == small
        assert image.read(small - 4096, 4096) == b"a" * 4096
        with pytest.raises(qcow_recycler.OutOfRange):
            image.read(large - 4096, 4096)
        image.apply_snapshot("large")
        assert image.info.virtual_size == large
        assert image.read(large - 4096, 4096) == b"b" * 4096
        image.resize(small // 2, shrink=True)
        image.apply_snapshot("2")
        assert image.read(large - 4096, 4096) == b"b" * 4096
    qemu.assert_clean(image_path)
    qemu.img("snapshot", "-a", "small", image_path)
    assert qemu.info(image_path)["virtual-size"] == small
    qemu.assert_clean(image_path)


def test_bitmaps_do_not_lie(image_path: Path) -> None:
    qcow_recycler.create(image_path, 1 << 20)
    with qcow_recycler.open(image_path) as image:
        image.write(0, b"a" * 65536)
        image.create_snapshot("s")
        image.add_bitmap("recording")
        image.add_bitmap("quiet", recording=False)
        image.write(0, b"b" * 512)
        image.create_snapshot("t")
        assert [b.dirty for b in image.bitmaps()] == [65536, 0]
        image.apply_snapshot("s")
        assert [b.dirty for b in image.bitmaps()] == [1 << 20, 0]
    qemu.assert_clean(image_path)


def test_compressed_zero_and_backing_clusters(tmp_path: Path, image_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(b"base" * (1 << 18))
    qemu.create(image_path, 1 << 20, cluster_size=4096, backing=base, backing_format="raw")
    qemu.io(image_path, "write -c -P 5 0 4k", "write -c -P 6 4k 4k", "write -z 64k 64k", "write -P 7 128k 8k")
    before = qemu.contents(image_path)
    allow = {"backing": "allow", "backing_directory": tmp_path}
    with qcow_recycler.open(image_path, **allow) as image:
        whole = image.read(0, 1 << 20)
        assert before == whole
        image.create_snapshot("s")
        image.write(0, b"x" * (256 << 10))
        image.discard(512 << 10, 256 << 10)
        assert image.check().corruptions == 0
    qemu.assert_clean(image_path)
    with qcow_recycler.open(image_path, **allow) as image:
        image.apply_snapshot("s")
        assert image.read(0, 1 << 20) == whole
        image.delete_snapshot("s")
        assert image.read(0, 1 << 20) == whole
        image.write(0, b"y" * 4096)
        image.compact()
        assert image.read(4096, (1 << 20) - 4096) == whole[4096:]
    qemu.assert_clean(image_path)


def test_refusals(image_path: Path) -> None:
    qcow_recycler.create(image_path, 1 << 20, refcount_bits=1)
    with qcow_recycler.open(image_path) as image:
        with pytest.raises(qcow_recycler.Unsupported, match="one bit"):
            image.create_snapshot("s")
    image_path.unlink()
    qcow_recycler.create(image_path, 1 << 20, refcount_bits=2)
    with qcow_recycler.open(image_path) as image:
        image.write(0, b"a" * 65536)
        image.create_snapshot("one")
        image.create_snapshot("two")
        with pytest.raises(qcow_recycler.Unsupported, match="2 bits"):
            image.create_snapshot("three")
        for name in "", "x" * 256, "one", "2":
            with pytest.raises(qcow_recycler.BadOption):
                image.create_snapshot(name)
        for call in image.delete_snapshot, image.apply_snapshot:
            with pytest.raises(qcow_recycler.BadOption) as raised:
                call("none")
            assert raised.value.errno == errno.EINVAL
        image.write(0, b"b" * 512)
        image.delete_snapshot("one")
        image.create_snapshot("three")
    qemu.assert_clean(image_path)
    with qcow_recycler.open(image_path, read_only=True) as image:
        assert [s.name for s in image.snapshots()] == ["two", "three"]
        with pytest.raises(qcow_recycler.ReadOnly):
            image.delete_snapshot("two")
    with pytest.raises(qcow_recycler.Closed):
        image.snapshots()


def test_the_command(image_path: Path) -> None:
    def cli(*args: object, code: int = 0) -> str:
        command = [sys.executable, "-m", "qcow_recycler", "snapshot", *map(str, args)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        return done.stdout

    qcow_recycler.create(image_path, 1 << 20)
    qemu.io(image_path, "write -P 1 0 64k")
    assert cli("list", image_path) == ""
    assert cli("create", image_path, "first").startswith("1: first, ")
    qemu.io(image_path, "write -P 2 0 64k")
    assert json.loads(cli("create", image_path, "second", "--json"))["id"] == "2"
    assert [json.loads(line)["name"] for line in cli("list", image_path, "--json").splitlines()] == ["first", "second"]
    cli("apply", image_path, "first")
    qemu.io(image_path, "read -P 1 0 64k")
    cli("delete", image_path, "2")
    assert qemu_lists(image_path) == {"1": "first"}
    qemu.assert_clean(image_path)
    cli("delete", image_path, "second", code=1)
    cli("list", code=64)
