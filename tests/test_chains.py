"""Chains of backing files: deep and mixed ones, images that do not record a format, commits, and version upgrades."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import guest
import qcow_recycler
import qemu


def overlay(
    tmp_path: Path, image_path: Path, rng: random.Random, *, base_size: int, size: int, raw: bool, compat: str = "1.1"
) -> tuple[guest.Disk, Path]:
    """An image of `size` over a base of `base_size`, both with contents."""
    base = tmp_path / ("base.raw" if raw else "base.qcow2")
    disk = guest.Disk(base_size, 65536)
    if raw:
        content = rng.randbytes(base_size)
        base.write_bytes(content)
        disk.write(0, content)
    else:
        qemu.create(base, base_size, compat=compat, cluster_size=4096)
        guest.qemu_session(base, disk, rng, 8)
    disk.resize(size)
    qemu.create(image_path, size, backing=base.name, backing_format="raw" if raw else "qcow2", compat=compat)
    guest.qemu_session(image_path, disk, rng, 8)
    if compat == "0.10":
        # QEMU ignores discards there that would let the base show through.
        disk.bytes[:] = qemu.contents(image_path)
    return disk, base


def without_format(path: Path) -> None:
    """The image as an old QEMU would have made it: the backing file's format is not recorded."""
    content = path.read_bytes()
    at = content.index((0xE2792ACA).to_bytes(4, "big"))
    path.write_bytes(content[:at] + (0x12345678).to_bytes(4, "big") + content[at + 4 :])


def test_chain_of_ten_over_a_raw_file(tmp_path: Path) -> None:
    rng = random.Random(10)
    disk = guest.Disk(2 << 20, 65536)
    content = guest.data(rng, disk.size)
    (tmp_path / "0.raw").write_bytes(content)
    disk.write(0, content)
    below, fmt = tmp_path / "0.raw", "raw"
    for n in range(1, 11):
        path = tmp_path / f"{n}.qcow2"
        qemu.create(path, disk.size, backing=below.name, backing_format=fmt, cluster_size=512 << n % 8)
        guest.qemu_session(path, disk, rng, 3)
        below, fmt = path, "qcow2"
    with qcow_recycler.open(below, backing="allow") as image:
        guest.assert_reads(image, disk)
        guest.our_session(image, disk, rng, 40)
        image.compact()
        guest.assert_reads(image, disk)
    qemu.assert_clean(below)
    qemu.assert_contents(below, disk.bytes)
    # And back down: each image goes into the one below it.
    for n in range(10, 0, -1):
        qcow_recycler.commit(tmp_path / f"{n}.qcow2")
        qemu.assert_clean(tmp_path / f"{n}.qcow2")
    assert (tmp_path / "0.raw").read_bytes() == disk.bytes


@pytest.mark.parametrize("raw", [True, False])
def test_a_format_that_no_image_records_is_the_callers_word(tmp_path: Path, image_path: Path, raw: bool) -> None:
    rng = random.Random(4)
    disk, _ = overlay(tmp_path, image_path, rng, base_size=1 << 20, size=1 << 20, raw=raw)
    without_format(image_path)
    with pytest.raises(qcow_recycler.BackingNotAllowed, match="does not record its format"):
        qcow_recycler.open(image_path, backing="allow")
    with qcow_recycler.open(image_path, backing="allow", backing_format="raw" if raw else "qcow2") as image:
        guest.assert_reads(image, disk)
    with pytest.raises(ValueError, match="backing_format"):
        qcow_recycler.open(image_path, backing="allow", backing_format="vmdk")


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "qcow2"])
@pytest.mark.parametrize("base_size", [1 << 20, 700 << 9, 3 << 20])
def test_a_commit_moves_everything_into_the_backing_file(
    tmp_path: Path, image_path: Path, base_size: int, raw: bool, compat: str
) -> None:
    """As `qemu-img commit` does; a base that is longer than the disk keeps its tail."""
    rng = random.Random(base_size + raw)
    size = 1 << 20
    base_disk_tail = b""
    disk, base = overlay(tmp_path, image_path, rng, base_size=base_size, size=size, raw=raw, compat=compat)
    if base_size > size:
        base_disk_tail = (base.read_bytes() if raw else qemu.contents(base))[size:]
    seen = []
    report = qcow_recycler.commit(image_path, seen.append)
    assert seen and seen[0].done == 0 and report.done == report.total == size
    assert report.written > 0
    for path in (image_path,) if raw else (image_path, base):
        qemu.assert_clean(path)
    assert (base.read_bytes() if raw else qemu.contents(base)) == bytes(disk.bytes) + base_disk_tail
    qemu.assert_contents(image_path, disk.bytes)
    # Nothing of it is left in the overlay, not even an empty table.
    assert qemu.img("map", "--output=json", image_path).count('"depth": 0') == 0
    assert image_path.stat().st_size <= 5 * 65536
    # Both go on.
    with qcow_recycler.open(image_path, backing="allow") as image:
        guest.our_session(image, disk, rng, 10) if compat == "1.1" else image.write(0, b"\1" * 512)
    qemu.assert_clean(image_path)


def test_a_commit_keeps_the_overlays_snapshots(tmp_path: Path, image_path: Path) -> None:
    rng = random.Random(6)
    disk, base = overlay(tmp_path, image_path, rng, base_size=1 << 20, size=1 << 20, raw=False)
    content = guest.data(rng, 1 << 20)
    # All of it in the overlay: the snapshot must not depend on the base.
    with qcow_recycler.open(image_path, backing="allow") as image:
        image.write(0, content)
    disk.write(0, content)
    qemu.img("snapshot", "-c", "kept", image_path)
    guest.qemu_session(image_path, disk, rng, 5)
    qcow_recycler.commit(image_path)
    qemu.assert_clean(image_path)
    qemu.assert_clean(base)
    qemu.assert_contents(image_path, disk.bytes)
    qemu.assert_contents(image_path, content, snapshot="kept")


def test_a_commit_takes_compressed_clusters_along(tmp_path: Path, image_path: Path) -> None:
    source = tmp_path / "source.raw"
    content = b"".join(bytes([n]) * 65536 for n in range(1, 17))
    source.write_bytes(content)
    base = tmp_path / "base.qcow2"
    qemu.create(base, len(content))
    qemu.img("convert", "-c", "-f", "raw", "-O", "qcow2", "-B", base.name, "-F", "qcow2", source, image_path)
    assert qcow_recycler.commit(image_path).written == len(content)
    assert qemu.contents(base) == content
    qemu.assert_clean(base)
    qemu.assert_clean(image_path)


def test_a_cancelled_commit_leaves_the_disk_as_it_was(tmp_path: Path, image_path: Path) -> None:
    rng = random.Random(7)
    disk, base = overlay(tmp_path, image_path, rng, base_size=4 << 20, size=4 << 20, raw=False)
    with pytest.raises(qcow_recycler.Cancelled):
        qcow_recycler.commit(image_path, lambda now: now.written == 0)
    for path in (base, image_path):
        qemu.assert_clean(path)
    qemu.assert_contents(image_path, disk.bytes)


def test_a_commit_needs_a_backing_file_that_nobody_uses(tmp_path: Path, image_path: Path) -> None:
    rng = random.Random(8)
    disk, base = overlay(tmp_path, image_path, rng, base_size=1 << 20, size=1 << 20, raw=False)
    with qemu.holding(base), pytest.raises(OSError, match=r"in use") as e:
        qcow_recycler.commit(image_path)
    assert e.value.errno == errno.EAGAIN
    with pytest.raises(qcow_recycler.BadOption, match="no backing file"):
        qcow_recycler.commit(base)
    with pytest.raises(qcow_recycler.BadOption, match="must be allowed"):
        qcow_recycler.commit(image_path, backing="skip")
    qemu.assert_contents(image_path, disk.bytes)


COMMIT = "import sys, qcow_recycler; qcow_recycler.commit(sys.argv[1], lambda now: print(now.done, flush=True))"


@pytest.mark.parametrize("raw", [True, False], ids=["raw", "qcow2"])
def test_a_killed_commit_leaves_the_disk_as_it_was(tmp_path: Path, image_path: Path, raw: bool) -> None:
    """At whatever moment: the overlay shows the same disk, and a second commit completes the first."""
    rng = random.Random(9)
    disk, base = overlay(tmp_path, image_path, rng, base_size=16 << 20, size=16 << 20, raw=raw)
    with qcow_recycler.open(image_path, backing="allow") as image:
        for at in range(0, disk.size, 128 << 10):
            content = guest.data(rng, 64 << 10)
            image.write(at, content)
            disk.write(at, content)
    survived = 0
    for _ in range(8):
        with subprocess.Popen([sys.executable, "-c", COMMIT, image_path], stdout=subprocess.PIPE) as child:
            assert child.stdout
            child.stdout.readline()
            time.sleep(rng.random() * 0.05)
            child.send_signal(signal.SIGKILL)
        survived += child.returncode == -signal.SIGKILL
        for path in (image_path,) if raw else (image_path, base):
            assert qemu.check(path).corruptions == 0
        qemu.assert_contents(image_path, disk.bytes)
    qcow_recycler.commit(image_path)
    qemu.assert_contents(image_path, disk.bytes)
    assert (base.read_bytes() if raw else qemu.contents(base)) == disk.bytes
    for path in (image_path,) if raw else (image_path, base):
        qemu.assert_clean(path)


# --- version 2 becomes version 3 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("snapshots", [0, 2])
@pytest.mark.parametrize(
    ("cluster_size", "name"), [(512, "b"), (65536, "base.raw"), (4096, "b" * 200), (65536, "b" * 240)]
)
def test_an_upgraded_image_is_what_it_was(
    tmp_path: Path, image_path: Path, cluster_size: int, name: str, snapshots: int
) -> None:
    rng = random.Random(cluster_size + len(name))
    disk = guest.Disk(1 << 20, cluster_size)
    content = guest.data(rng, disk.size)
    # Longer names than a file may have consist of folders.
    name = "/".join([name] * (2 if len(name) > 100 else 1))
    base = tmp_path / name
    base.parent.mkdir(parents=True, exist_ok=True)
    if base.is_dir():
        base = base / "base"
        name += "/base"
    base.write_bytes(content)
    disk.write(0, content)
    qemu.create(image_path, disk.size, backing=name, backing_format="raw", compat="0.10", cluster_size=cluster_size)
    for n in range(4):
        offset, length = disk.range(rng)
        qemu.io(image_path, f"write -q -P {n + 1} {offset} {length}")
        disk.write(offset, bytes([n + 1]) * length)
    kept = {}
    for n in range(snapshots):
        qemu.img("snapshot", "-c", f"s{n}", image_path)
        kept[f"s{n}"] = bytes(disk.bytes)
        qemu.io(image_path, f"write -q -P {n + 77} 0 4096")
        disk.write(0, bytes([n + 77]) * 4096)
    before = qemu.info(image_path)
    qcow_recycler.upgrade(image_path)
    after = qemu.info(image_path)
    assert (before["format-specific"]["data"]["compat"], after["format-specific"]["data"]["compat"]) == ("0.10", "1.1")
    for key in ("virtual-size", "backing-filename", "backing-filename-format", "cluster-size"):
        assert before.get(key) == after.get(key)
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)
    for snapshot, expected in kept.items():
        qemu.assert_contents(image_path, expected, snapshot=snapshot)
    # Version 3 can discard over a backing file.
    with qcow_recycler.open(image_path, backing="allow") as image:
        assert image.info.version == 3
        image.discard(0, 512 << 10)
        disk.zero(0, 512 << 10)
        image.compact()
        guest.assert_reads(image, disk)
    qcow_recycler.upgrade(image_path)
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)


def test_a_header_without_room_is_not_upgraded(tmp_path: Path, image_path: Path) -> None:
    """The first cluster is 512 bytes long here, and the name fills it."""
    name = "/".join(["b" * 200] * 2)
    (tmp_path / name).parent.mkdir()
    (tmp_path / name).write_bytes(bytes(1 << 20))
    qemu.create(image_path, 1 << 20, backing=name, backing_format="raw", compat="0.10", cluster_size=512)
    before = image_path.read_bytes()
    with pytest.raises(qcow_recycler.Unsupported, match="no room"):
        qcow_recycler.upgrade(image_path)
    assert image_path.read_bytes() == before


def test_the_commands(tmp_path: Path, image_path: Path) -> None:
    rng = random.Random(11)
    disk, base = overlay(tmp_path, image_path, rng, base_size=1 << 20, size=1 << 20, raw=False, compat="0.10")
    command = [sys.executable, "-m", "qcow_recycler"]
    environment = {**os.environ, "LC_ALL": "C"}

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *map(str, arguments)], capture_output=True, text=True, timeout=60, env=environment, check=False
        )

    assert run("upgrade", base).returncode == 0
    without_format(image_path)
    refused = run("commit", image_path)
    assert refused.returncode == 1 and "does not record its format" in refused.stderr
    done = run("commit", "--backing-format", "qcow2", image_path)
    assert done.returncode == 0, done.stderr
    assert "written to the backing file" in done.stdout
    assert qemu.contents(base) == disk.bytes
