"""Snapshot tables that QEMU would not write today, and as many snapshots as there can be."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import qcow_recycler
import qemu
from damage import Victim, digest
from qcow2 import COPIED, DIRTY, HEADER, OFFSET_MASK, Qcow2

SIZE = 4 << 20
FIXED = ">QIHHIIQII"
# What QEMU writes is 24 bytes long: the size of the VM state, that of the disk, the number of instructions.
EXTRAS = {
    "none": b"",
    "no size of the disk": bytes(8),
    "no number of instructions": struct.pack(">QQ", 0, SIZE),
    "more than anybody knows": struct.pack(">QQQ", 0, SIZE, (1 << 64) - 1) + b"what comes after 24 bytes is the future",
}


def entries(path: Path) -> list[tuple[tuple[int, ...], bytes, bytes, bytes]]:
    """The fixed fields, extra data, ID and name of each."""
    q = Qcow2(path)
    at, found = q.get("snapshots_offset"), []
    for _ in range(q.get("nb_snapshots")):
        fixed = struct.unpack(FIXED, q.bytes_at(at, 40))
        lengths = (fixed[8], fixed[2], fixed[3])
        rest = q.bytes_at(at + 40, sum(lengths))
        extra, rest = rest[: lengths[0]], rest[lengths[0] :]
        found.append((fixed, extra, rest[: lengths[1]], rest[lengths[1] :]))
        at += -(-(40 + sum(lengths)) // 8) * 8
    return found


def rewrite(path: Path, extras: list[bytes]) -> None:
    """The same table, in its place, with other extra data."""
    table = b""
    for (fixed, _, name_id, name), extra in zip(entries(path), extras, strict=True):
        entry = struct.pack(FIXED, *fixed[:8], len(extra)) + extra + name_id + name
        table += entry.ljust(-(-len(entry) // 8) * 8, b"\0")
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), table, Qcow2(path).get("snapshots_offset"))


def three(path: Path, compat: str) -> dict[str, bytes]:
    """Three snapshots of a disk, and what each holds."""
    qemu.create(path, SIZE, compat=compat)
    kept = {}
    for n in range(1, 4):
        qemu.io(path, f"write -q -P {n} {n << 16} 256k")
        qemu.img("snapshot", "-c", f"s{n}", path)
        kept[f"s{n}"] = qemu.contents(path)
    return kept


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("extra", EXTRAS)
def test_entries_stay_as_they_were(image_path: Path, extra: str, compat: str) -> None:
    """Whatever extra data they have, while snapshots are made and deleted beside them, and while their tables move."""
    kept = three(image_path, compat)
    usual = [e[1] for e in entries(image_path)]
    rewrite(image_path, [EXTRAS[extra], usual[1], EXTRAS[extra]])
    before = {e[3]: (e[0][4:8], e[1], e[2]) for e in entries(image_path)}
    with qcow_recycler.open(image_path) as image:
        assert [(s.name, s.virtual_size) for s in image.snapshots()] == [(name, SIZE) for name in kept]
        image.write(0, b"\x44" * (1 << 20))
        image.create_snapshot("s4")
        image.delete_snapshot("s2")
        image.discard(1 << 20, 1 << 20)
        image.compact()
        image.create_snapshot("s5")
        image.delete_snapshot("s4")
        image.compact()
    after = {e[3]: (e[0][4:8], e[1], e[2]) for e in entries(image_path)}
    assert list(after) == [b"s1", b"s3", b"s5"]
    assert after[b"s1"] == before[b"s1"] and after[b"s3"] == before[b"s3"]
    # QEMU misses what version 3 wants in each, and nothing else.
    incomplete = 2 * (compat == "1.1" and len(EXTRAS[extra]) < 16)
    found = qemu.check(image_path)
    assert (found.corruptions, found.leaks, found.check_errors) == (incomplete, 0, 0)
    for name in ("s1", "s3"):
        qemu.assert_contents(image_path, kept[name], snapshot=name)
    with qcow_recycler.open(image_path) as image:
        image.apply_snapshot("s1")
        assert image.read(0, SIZE) == kept["s1"]
    found = qemu.check(image_path)
    assert (found.corruptions, found.leaks, found.check_errors) == (incomplete, 0, 0)


@pytest.mark.parametrize("extra", EXTRAS)
def test_such_entries_after_a_crash(image_path: Path, extra: str) -> None:
    """A check finds them incomplete, and no repair of ours completes them: that must keep nobody from the image."""
    kept = three(image_path, "1.1")
    rewrite(image_path, [EXTRAS[extra]] * 3)
    before = entries(image_path)
    script = "import os, sys, qcow_recycler; i = qcow_recycler.open(sys.argv[1]); i.write(0, bytes(512)); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", script, image_path], check=False).returncode == 9
    assert Qcow2(image_path).get("incompatible_features") & DIRTY
    incomplete = 3 * (len(EXTRAS[extra]) < 16)
    assert qcow_recycler.check(image_path).corruptions == incomplete
    with qcow_recycler.open(image_path, check_on_connect=True) as image:
        assert [s.name for s in image.snapshots()] == list(kept)
        image.write(1 << 20, b"\x66" * 65536)
    assert not Qcow2(image_path).get("incompatible_features") & DIRTY
    assert entries(image_path) == before
    with qcow_recycler.open(image_path, check_on_connect=True) as image:
        assert image.read(1 << 20, 65536) == b"\x66" * 65536
    found = qemu.check(image_path)
    assert (found.corruptions, found.leaks, found.check_errors) == (incomplete, 0, 0)
    for name, held in kept.items():
        qemu.assert_contents(image_path, held, snapshot=name)
    qemu.check(image_path, repair="all")
    qemu.assert_clean(image_path)
    for name, held in kept.items():
        qemu.assert_contents(image_path, held, snapshot=name)


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_upgrade_needs_the_sizes_of_the_disks(image_path: Path, extra: str) -> None:
    """Version 3 wants them in each entry, and nobody knows them for certain."""
    kept = three(image_path, "0.10")
    rewrite(image_path, [EXTRAS[extra]] * 3)
    before = digest(image_path)
    if "none" in extra or "size" in extra:
        with pytest.raises(qcow_recycler.Unsupported, match="size"):
            qcow_recycler.upgrade(image_path)
        assert digest(image_path) == before
        return
    qcow_recycler.upgrade(image_path)
    assert [e[1] for e in entries(image_path)] == [EXTRAS[extra]] * 3
    qemu.assert_clean(image_path)
    for name, held in kept.items():
        qemu.assert_contents(image_path, held, snapshot=name)


def test_no_more_snapshots_than_the_format_allows(image_path: Path) -> None:
    qemu.create(image_path, SIZE)
    qemu.io(image_path, "write -q -P 1 0 1M")
    table = bytearray()
    for n in range(65536):
        number = str(n + 1).encode()
        entry = struct.pack(FIXED, 0, 0, len(number), len(number) + 1, 0, 0, 0, 0, 16) + struct.pack(">QQ", 0, SIZE)
        entry += number + b"s" + number
        table += entry.ljust(-(-len(entry) // 8) * 8, b"\0")
    with open(image_path, "r+b") as file:
        at = -(-image_path.stat().st_size // 65536) * 65536
        os.pwrite(file.fileno(), table, at)
        file.truncate(at + -(-len(table) // 65536) * 65536)
        for name, value in (("nb_snapshots", 65536), ("snapshots_offset", at)):
            offset, width = HEADER[name]
            os.pwrite(file.fileno(), value.to_bytes(width, "big"), offset)
    qcow_recycler.check(image_path, repair="all")
    before = digest(image_path)
    with qcow_recycler.open(image_path) as image:
        assert len(image.snapshots()) == 65536
        with pytest.raises(qcow_recycler.Unsupported, match="65536 snapshots"):
            image.create_snapshot("one too many")
    assert digest(image_path) == before
    with qcow_recycler.open(image_path) as image:
        image.delete_snapshot("s77")
        image.create_snapshot("the last")
        assert len(image.snapshots()) == 65536
        assert image.read(0, 1 << 20) == b"\1" * (1 << 20)
    assert qcow_recycler.check(image_path).corruptions == 0


@pytest.mark.parametrize("value", [0, 1 << 40, (1 << 63) - 4096])
def test_the_offset_means_nothing_where_there_are_no_snapshots(image_path: Path, value: int) -> None:
    victim = Victim(image_path)
    victim.header("snapshots_offset", value)
    qemu.assert_clean(image_path)
    with qcow_recycler.open(image_path) as image:
        assert image.snapshots() == ()
        image.write(0, b"\5" * 4096)
        image.compact()
        image.create_snapshot("one")
    qemu.assert_clean(image_path)
    before = qemu.contents(image_path)
    with qcow_recycler.open(image_path) as image:
        image.write(0, b"\6" * 8192)
        image.delete_snapshot("one")
    qemu.assert_contents(image_path, b"\6" * 8192 + before[8192:])
    qemu.assert_clean(image_path)


@pytest.mark.parametrize("value", [COPIED | 0x00FF_FFFF_FFFF_F000, COPIED | (9 * 4096 + 512), 1 << 40])
def test_a_disk_with_a_bad_entry_has_no_snapshot_made_of_it(image_path: Path, value: int) -> None:
    """Whoever went back to it would have the damage twice, and its counts would be anybody's guess."""
    victim = Victim(image_path)
    at, good = victim.meta.mapping(0)
    victim.put(at, value)
    with qcow_recycler.open(image_path) as image:
        with pytest.raises(qcow_recycler.InvalidImage):
            image.create_snapshot("one")
        assert image.snapshots() == ()
        # The rest of the disk goes on.
        image.write(3 << 20, b"\7" * 4096)
        assert image.read(4096, 4096) == b"\x11" * 4096
    victim.put(at, good)
    qemu.assert_clean(image_path)
    qemu.io(image_path, "read -q -P 0x11 0 256k", "read -q -P 7 3M 4k")


@pytest.mark.parametrize("count", [1 << 63, (1 << 64) - 1])
def test_counts_at_the_end_of_64_bits(image_path: Path, count: int) -> None:
    """They are counts like any other: a guest's write takes one away, and nothing is added to the highest."""
    qemu.create(image_path, SIZE, refcount_bits=64, cluster_size=4096)
    qemu.io(image_path, "write -q -P 0x11 0 64k")
    victim_at, entry = Qcow2(image_path).mapping(0)
    host = entry & OFFSET_MASK
    counted = Qcow2(image_path).refcount_table()[0] + host // 4096 * 8
    with open(image_path, "r+b") as file:
        os.pwrite(file.fileno(), count.to_bytes(8, "big"), counted)
        os.pwrite(file.fileno(), (entry & ~COPIED).to_bytes(8, "big"), victim_at)
    qemu.check(image_path)
    with qcow_recycler.open(image_path) as image:
        if count == (1 << 64) - 1:
            with pytest.raises(qcow_recycler.Error):
                image.create_snapshot("one")
            assert image.snapshots() == ()
        image.write(512, b"\x22" * 512)
        image.flush()
        assert image.read(0, 4096) == b"\x11" * 512 + b"\x22" * 512 + b"\x11" * 3072
    new = Qcow2(image_path)
    assert new.mapping(0)[1] & OFFSET_MASK != host
    block = new.refcount_table()[0]
    assert int.from_bytes(new.bytes_at(block + host // 4096 * 8, 8), "big") == count - 1
    assert qemu.check(image_path).corruptions == 0
    qcow_recycler.check(image_path, repair="all")
    qemu.assert_clean(image_path)
