"""Persistent bitmaps: QEMU's are kept right, and ours are QEMU's."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

import guest
import qcow_recycler
import qemu

EAGER = "compact_after_unmaps=8;keep_erased=8;settle_ms=5;flush_ms=5;runtime_asserts=true"


def dirty(path: Path, name: str, tmp_path: Path) -> set[int]:
    """The sectors that a bitmap marks, as QEMU reads it."""
    with qemu.nbd_export(path, "-r", "-B", name) as uri:
        options = (
            f"driver=nbd,server.type=unix,server.path={uri.rpartition('=')[2]},x-dirty-bitmap=qemu:dirty-bitmap:{name}"
        )
        extents = json.loads(qemu.img("map", "--output=json", "--image-opts", options))
    sectors: set[int] = set()
    for extent in extents:
        # QEMU shows what is dirty as holes.
        if not extent["data"]:
            sectors.update(range(extent["start"] // 512, (extent["start"] + extent["length"]) // 512))
    return sectors


def ours(image: qcow_recycler.Image, name: str) -> set[int]:
    sectors: set[int] = set()
    start = 0
    while found := image.next_dirty(name, start):
        start = found[0] + found[1]
        sectors.update(range(found[0] // 512, start // 512))
    return sectors


def units(sectors: set[int], granularity: int, size: int) -> set[int]:
    """The sectors of all units that have one of `sectors`."""
    per_unit = granularity // 512
    return {
        s
        for unit in {s // per_unit for s in sectors}
        for s in range(unit * per_unit, min((unit + 1) * per_unit, size // 512))
    }


def qemu_bitmaps(path: Path) -> dict[str, list[str]]:
    return {b["name"]: b["flags"] for b in qemu.info(path)["format-specific"]["data"].get("bitmaps", [])}


def changed(before: bytes, after: bytes) -> set[int]:
    return {at // 512 for at in range(0, len(after), 512) if before[at : at + 512] != after[at : at + 512]}


@pytest.mark.parametrize("cluster_size", [4096, 65536, 2 << 20])
def test_qemus_bitmaps_are_kept_right(tmp_path: Path, image_path: Path, cluster_size: int) -> None:
    """Writes are recorded, with the recycler at work and compactions; moves mark nothing."""
    rng = random.Random(cluster_size)
    disk = guest.Disk(4 << 20, cluster_size)
    qemu.create(image_path, disk.size, cluster_size=cluster_size)
    guest.qemu_session(image_path, disk, rng, 12)
    granularities = {"fine": 512, "coarse": 65536, "quiet": 4096}
    for name, granularity in granularities.items():
        disabled = ["--disable"] if name == "quiet" else []
        qemu.img("bitmap", "--add", "-g", granularity, *disabled, "-f", "qcow2", image_path, name)
    before = bytes(disk.bytes)
    marked: set[int] = set()
    for _ in range(3):
        with qcow_recycler.open(image_path, config=EAGER) as image:
            assert [b.name for b in image.bitmaps()] == list(granularities)
            assert ours(image, "fine") == marked
            image.start()
            for _ in range(12):
                offset, length = disk.range(rng)
                kind = rng.choice(["write", "write", "zeroes", "discard", "compact"])
                if kind == "compact":
                    image.compact()
                    continue
                if kind == "write":
                    content = guest.data(rng, length)
                    image.write(offset, content)
                    disk.write(offset, content)
                elif kind == "zeroes":
                    image.write_zeroes(offset, length)
                    disk.zero(offset, length)
                else:
                    offset, length = disk.clusters(rng)
                    image.discard(offset, length)
                    disk.zero(offset, length)
                marked.update(range(offset // 512, (offset + length) // 512))
            assert ours(image, "fine") == marked
            assert "in-use" in qemu_bitmaps(image_path)["fine"]
        qemu.assert_clean(image_path)
        qemu.assert_contents(image_path, disk.bytes)
        assert qemu_bitmaps(image_path) == {"fine": ["auto"], "coarse": ["auto"], "quiet": []}
        assert dirty(image_path, "fine", tmp_path) == marked >= changed(before, disk.bytes)
        assert dirty(image_path, "coarse", tmp_path) == units(marked, 65536, disk.size)
        assert dirty(image_path, "quiet", tmp_path) == set()
        qemu.assert_clean(image_path)
    # QEMU goes on with them.
    qemu.io(image_path, "write -q -P 5 0 512")
    marked.add(0)
    assert dirty(image_path, "fine", tmp_path) == marked
    with qcow_recycler.open(image_path) as image:
        assert ours(image, "fine") == marked
    qemu.assert_clean(image_path)


@pytest.mark.parametrize("cluster_size", [1024, 65536])
def test_our_bitmaps_are_qemus(tmp_path: Path, image_path: Path, cluster_size: int) -> None:
    qemu.create(image_path, 8 << 20, cluster_size=cluster_size)
    with qcow_recycler.open(image_path) as image:
        assert image.bitmaps() == ()
        image.add_bitmap("a", 4096)
        image.add_bitmap("b", 65536, recording=False)
        image.write(8192, b"\1" * 512)
        image.merge_bitmap("b", "a")
    assert qemu_bitmaps(image_path) == {"a": ["auto"], "b": []}
    assert dirty(image_path, "a", tmp_path) == set(range(16, 24))
    assert dirty(image_path, "b", tmp_path) == set(range(128))
    qemu.assert_clean(image_path)
    qemu.img("bitmap", "--clear", "--disable", "-f", "qcow2", image_path, "a")
    qemu.img("bitmap", "--merge", "b", "-f", "qcow2", image_path, "a")
    with qcow_recycler.open(image_path) as image:
        assert ours(image, "a") == set(range(128))
        assert [b.recording for b in image.bitmaps()] == [False, False]
        image.record_bitmap("b", True)
        image.clear_bitmap("b")
        image.write(1 << 20, b"\2" * 512)
        image.remove_bitmap("a")
    assert qemu_bitmaps(image_path) == {"b": ["auto"]}
    assert dirty(image_path, "b", tmp_path) == set(range(2048, 2048 + 128))
    qemu.assert_clean(image_path)
    with qcow_recycler.open(image_path) as image:
        image.remove_bitmap("b")
    assert qemu_bitmaps(image_path) == {}
    qemu.assert_clean(image_path)
    # As if there had never been any.
    qemu.img("bitmap", "--add", "-f", "qcow2", image_path, "new")
    qemu.assert_clean(image_path)


def test_a_whole_disk_that_is_marked(tmp_path: Path, image_path: Path) -> None:
    qemu.create(image_path, (1 << 20) + 512, cluster_size=4096)
    with qcow_recycler.open(image_path) as image:
        image.add_bitmap("all", 512)
        image.write(0, bytes(1 << 20) + b"\1" * 512)
    assert dirty(image_path, "all", tmp_path) == set(range(2049))
    with qcow_recycler.open(image_path) as image:
        assert ours(image, "all") == set(range(2049))
        image.resize(2 << 20)
        assert ours(image, "all") == set(range(2049))
        image.resize(512 << 10, shrink=True)
        assert ours(image, "all") == set(range(1024))
    assert dirty(image_path, "all", tmp_path) == set(range(1024))
    qemu.assert_clean(image_path)


@pytest.mark.parametrize(("cluster_size", "size"), [(512, 16 << 20), (4096, 70 << 20)])
def test_bitmaps_of_many_clusters(tmp_path: Path, image_path: Path, cluster_size: int, size: int) -> None:
    """Tables with several entries: clusters of marks that are all zeroes, all ones, and neither. QEMU reads what we
    store, we read what QEMU stores, and both follow the disk's size."""
    per_cluster = cluster_size * 8 * 512
    qemu.create(image_path, size, cluster_size=cluster_size)
    qemu.img("bitmap", "--add", "-g", 512, "-f", "qcow2", image_path, "theirs")
    # The second cluster of marks is full; in others the marks are at the ends, or there are none.
    ranges = [
        (per_cluster, per_cluster),
        (2 * per_cluster + 512, 1024),
        (3 * per_cluster - 512, 1024),
        (size - 512, 512),
    ]
    marked = {s for at, length in ranges for s in range(at // 512, (at + length) // 512)}
    with qcow_recycler.open(image_path, keep_erased=0) as image:
        image.add_bitmap("ours", 512)
        for at, length in ranges:
            image.write(at, b"\5" * length)
    for name in ("theirs", "ours"):
        assert dirty(image_path, name, tmp_path) == marked
    qemu.assert_clean(image_path)
    qemu.io(image_path, "write -q -P 6 0 512", f"write -q -P 6 {4 * per_cluster - 1024} 2048")
    more = {0, *range(4 * per_cluster // 512 - 2, 4 * per_cluster // 512 + 2)}
    with qcow_recycler.open(image_path, keep_erased=0) as image:
        assert ours(image, "theirs") == ours(image, "ours") == marked | more
        image.discard(per_cluster, per_cluster)
        image.compact()
        image.resize(size + 3 * per_cluster)
        image.write(size + 2 * per_cluster, b"\7" * 512)
    more.add((size + 2 * per_cluster) // 512)
    for name in ("theirs", "ours"):
        assert dirty(image_path, name, tmp_path) == marked | more
    qemu.assert_clean(image_path)
    end = 2 * per_cluster + 1024
    with qcow_recycler.open(image_path, keep_erased=0) as image:
        image.resize(end, shrink=True)
        image.remove_bitmap("ours")
        image.add_bitmap("ours", 512)
        image.merge_bitmap("ours", "theirs")
    left = {s for s in marked | more if s < end // 512}
    for name in ("theirs", "ours"):
        assert dirty(image_path, name, tmp_path) == left
    with qcow_recycler.open(image_path, keep_erased=0) as image:
        image.clear_bitmap("theirs")
        image.resize(size)
        assert ours(image, "theirs") == set()
    assert dirty(image_path, "theirs", tmp_path) == set()
    assert dirty(image_path, "ours", tmp_path) == left
    qemu.assert_clean(image_path)


@pytest.mark.parametrize("size", [2 << 20, 3 << 20])
def test_a_commit_marks_what_it_writes_in_the_base(tmp_path: Path, image_path: Path, size: int) -> None:
    """The base's bitmaps outlive the commit, those that record mark all that has changed, also if it grows."""
    rng = random.Random(size)
    base = tmp_path / "base.qcow2"
    disk = guest.Disk(2 << 20, 65536)
    qemu.create(base, disk.size)
    guest.qemu_session(base, disk, rng, 10)
    granularity = {"fine": 512, "coarse": 65536, "quiet": 4096}
    for name, unit in granularity.items():
        disabled = ["--disable"] if name == "quiet" else []
        qemu.img("bitmap", "--add", "-g", unit, *disabled, "-f", "qcow2", base, name)
    before = bytes(disk.bytes)
    disk.resize(size)
    qemu.create(image_path, size, backing=base.name)
    guest.qemu_session(image_path, disk, rng, 10)
    own = [e for e in json.loads(qemu.img("map", "--output=json", image_path)) if e["depth"] == 0]
    held = {s for e in own for s in range(e["start"] // 512, (e["start"] + e["length"]) // 512)}
    qcow_recycler.commit(image_path)
    qemu.assert_clean(base)
    qemu.assert_contents(base, disk.bytes)
    assert qemu_bitmaps(base) == {"fine": ["auto"], "coarse": ["auto"], "quiet": []}
    fine = dirty(base, "fine", tmp_path)
    assert changed(before.ljust(size, b"\0"), disk.bytes) <= fine <= held
    assert dirty(base, "coarse", tmp_path) == units(fine, 65536, size)
    assert dirty(base, "quiet", tmp_path) == set()
    # And they go on.
    with qcow_recycler.open(base) as image:
        image.write(size - 512, b"\1" * 512)
    assert dirty(base, "fine", tmp_path) == fine | {size // 512 - 1}


def test_bitmaps_do_not_keep_the_file_long(image_path: Path) -> None:
    """They lie at the end, behind what is freed; the file still becomes as short as its data."""
    qemu.create(image_path, 256 << 20)
    with qcow_recycler.open(image_path, keep_erased=0) as image:
        image.write(0, b"\7" * (64 << 20))
    qemu.img("bitmap", "--add", "-g", "512", "-f", "qcow2", image_path, "b")
    with qcow_recycler.open(image_path, keep_erased=0) as image:
        for at in range(0, 64 << 20, 1 << 16):
            image.write(at, b"\5" * 512)
        image.discard(0, 60 << 20)
        image.compact()
        # What is free inside is used when the bitmap is stored.
    assert image_path.stat().st_size < 5 << 20
    qemu.assert_clean(image_path)
    for _ in range(3):
        size = image_path.stat().st_size
        with qcow_recycler.open(image_path, keep_erased=0) as image:
            image.write(63 << 20, b"\6" * 512)
        assert image_path.stat().st_size <= size
    qemu.assert_clean(image_path)


def test_a_bitmap_that_was_not_stored_is_inconsistent(image_path: Path) -> None:
    qemu.create(image_path, 1 << 20)
    qemu.img("bitmap", "--add", "-f", "qcow2", image_path, "b")
    script = "import os, sys, qcow_recycler; i = qcow_recycler.open(sys.argv[1]); i.write(0, bytes(512)); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", script, image_path], check=False).returncode == 9
    assert "in-use" in qemu_bitmaps(image_path)["b"]
    with qcow_recycler.open(image_path) as image:
        (bitmap,) = image.bitmaps()
        assert bitmap.inconsistent and not bitmap.recording
        with pytest.raises(qcow_recycler.BadOption, match="can only be removed"):
            image.clear_bitmap("b")
    assert "in-use" in qemu_bitmaps(image_path)["b"]
    qemu.assert_clean(image_path)
    with qcow_recycler.open(image_path) as image:
        image.remove_bitmap("b")
    qemu.assert_clean(image_path)


def test_a_read_only_handle_shows_bitmaps_and_changes_nothing(image_path: Path) -> None:
    qemu.create(image_path, 1 << 20)
    qemu.img("bitmap", "--add", "-g", "4096", "-f", "qcow2", image_path, "b")
    before = image_path.read_bytes()
    with qcow_recycler.open(image_path, read_only=True) as image:
        (bitmap,) = image.bitmaps()
        assert (bitmap.name, bitmap.granularity, bitmap.recording, bitmap.dirty) == ("b", 4096, True, 0)
        with pytest.raises(qcow_recycler.ReadOnly):
            image.remove_bitmap("b")
    assert image_path.read_bytes() == before


def test_version_2_has_no_bitmaps(image_path: Path) -> None:
    qemu.create(image_path, 1 << 20, compat="0.10")
    with qcow_recycler.open(image_path) as image, pytest.raises(qcow_recycler.Unsupported, match="version 2"):
        image.add_bitmap("b")


def with_bitmap(path: Path, size: int, **create: object) -> None:
    qemu.create(path, size, **create)  # type: ignore[arg-type]
    qemu.img("bitmap", "--add", "-f", "qcow2", path, "b")
    qemu.io(path, "write -q -P 1 0 65536")


def assert_kept(*paths: Path) -> None:
    """Their bitmaps say something, and they were closed."""
    for path in paths:
        assert qemu_bitmaps(path) == {"b": ["auto"]}, path
        # The dirty bit.
        assert path.read_bytes()[79] & 1 == 0, path
        qemu.assert_clean(path)


def test_a_commit_that_comes_to_nothing_keeps_all_bitmaps(tmp_path: Path, image_path: Path) -> None:
    base = tmp_path / "base.qcow2"
    with_bitmap(base, 4 << 20)
    with_bitmap(image_path, 4 << 20, backing=base.name)
    # One that has no backing file; one that is in use; one that is not there.
    with pytest.raises(qcow_recycler.BadOption, match="no backing file"):
        qcow_recycler.commit(base)
    assert_kept(base)
    with qemu.holding(base), pytest.raises(OSError, match=r"in use"):
        qcow_recycler.commit(image_path)
    assert_kept(base, image_path)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"base\.qcow2"):
        qcow_recycler.commit(image_path)
    (tmp_path / "elsewhere").rename(base)
    assert_kept(base, image_path)
    # When some of it has been written.
    with pytest.raises(qcow_recycler.Cancelled):
        qcow_recycler.commit(image_path, lambda now: now.written == 0)
    assert_kept(base, image_path)
    assert 0 in dirty(base, "b", tmp_path)
    qcow_recycler.commit(image_path)
    assert_kept(base, image_path)


def test_a_bitmap_with_more_data_than_one_may_have_is_an_error(image_path: Path) -> None:
    with_bitmap(image_path, 1 << 20, cluster_size=2 << 20)
    content = bytearray(image_path.read_bytes())
    extension = content.index((0x23852875).to_bytes(4, "big"))
    directory = int.from_bytes(content[extension + 24 : extension + 32], "big")
    # The table stays in its cluster.
    for clusters, errors in [(257, 1), (1, 0)]:
        content[directory + 8 : directory + 12] = clusters.to_bytes(4, "big")
        image_path.write_bytes(content)
        assert qcow_recycler.check(image_path).corruptions == errors
        # QEMU does not open such an image, not even to check it.
        assert (qemu.run("qemu-img", "check", image_path, ok=(0, 1)).returncode != 0) == bool(errors)


def test_a_damaged_directory_is_refused_for_writing_and_left_alone(image_path: Path) -> None:
    qemu.create(image_path, 1 << 20)
    qemu.img("bitmap", "--add", "-f", "qcow2", image_path, "b")
    content = bytearray(image_path.read_bytes())
    extension = content.index((0x23852875).to_bytes(4, "big"))
    directory = int.from_bytes(content[extension + 24 : extension + 32], "big")
    fields = [(0, b"\0\0\0\0\0\1\2\3"), (8, b"\xff\xff\xff\xff"), (16, b"\7"), (17, b"\77"), (18, b"\0\0")]
    # Flags that nobody has given a meaning.
    fields += [(12, b"\x80"), (15, b"\x82")]
    for at, damage in fields:
        bad = content[:]
        bad[directory + at : directory + at + len(damage)] = damage
        image_path.write_bytes(bad)
        with pytest.raises(qcow_recycler.Error):
            qcow_recycler.open(image_path)
        assert image_path.read_bytes() == bad
        with qcow_recycler.open(image_path, read_only=True) as image:
            assert image.read(0, 512) == bytes(512)


def test_the_command(image_path: Path) -> None:
    qemu.create(image_path, 1 << 20)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "qcow_recycler", "bitmap", str(image_path), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert run("a", "--add", "--granularity", 4096).returncode == 0
    assert run("b", "--add").stdout.startswith("a: recording")
    assert run("a", "--disable").returncode == 0
    assert run("a", "--merge", "b").returncode == 0
    assert run("b", "--remove").returncode == 0
    (line,) = run("--json").stdout.splitlines()
    assert json.loads(line) == {
        "name": "a",
        "granularity": 4096,
        "recording": False,
        "inconsistent": False,
        "dirty": 0,
    }
    assert run("a").returncode == 64
    assert run("a", "--add").returncode == 1
