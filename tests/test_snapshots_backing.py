"""Internal snapshots keep their contents; backing files are read through and copied up, never exposed or trusted."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

import guest
import qcow_recycler
import qemu
from qcow2 import DIRTY, HEADER, Qcow2

EAGER = "compact_after_unmaps=8;keep_erased=8;settle_ms=5;flush_ms=5;runtime_asserts=true"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- internal snapshots ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lazy", ["off", "on"])
@pytest.mark.parametrize(
    ("cluster_size", "refcount_bits"), [(512, 16), (4096, 2), (4096, 64), (65536, 8), (65536, 16), (2 << 20, 4)]
)
def test_snapshots_keep_their_contents(image_path: Path, cluster_size: int, refcount_bits: int, lazy: str) -> None:
    """Snapshots are taken between sessions of ours; every one still reads as it did when it was taken."""
    rng = random.Random(cluster_size + refcount_bits)
    disk = guest.Disk(max(1 << 20, 6 * cluster_size), cluster_size)
    qemu.create(image_path, disk.size, cluster_size=cluster_size, refcount_bits=refcount_bits, lazy_refcounts=lazy)
    kept: dict[str, bytes] = {}
    guest.qemu_session(image_path, disk, rng, 6)
    # A cluster that the active disk and n snapshots share has refcount n + 1: 2 bits hold 3.
    for n in range(2):
        qemu.img("snapshot", "-c", f"s{n}", image_path)
        kept[f"s{n}"] = bytes(disk.bytes)
        with qcow_recycler.open(image_path, config=EAGER if n else "") as image:
            assert image.info.snapshots == n + 1
            guest.assert_reads(image, disk)
            if n:
                image.start()
            guest.our_session(image, disk, rng, 30)
            image.compact()
            guest.assert_reads(image, disk)
        qemu.assert_clean(image_path)
        qemu.assert_contents(image_path, disk.bytes)
        for name, expected in kept.items():
            qemu.assert_contents(image_path, expected, snapshot=name)
    # QEMU deletes one and goes back to the other: the refcounts it relies on are right.
    qemu.img("snapshot", "-d", "s0", image_path)
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, kept["s1"], snapshot="s1")
    qemu.img("snapshot", "-a", "s1", image_path)
    qemu.assert_contents(image_path, kept["s1"])
    disk.bytes[:] = kept["s1"]
    with qcow_recycler.open(image_path) as image:
        guest.assert_reads(image, disk)
        guest.our_session(image, disk, rng, 20)
        image.compact()
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)
    qemu.assert_contents(image_path, kept["s1"], snapshot="s1")


def test_discarding_everything_keeps_the_snapshot(image_path: Path) -> None:
    disk = guest.Disk(4 << 20, 65536)
    rng = random.Random(4)
    content = guest.data(rng, 3 << 20)
    qcow_recycler.create(image_path, disk.size)
    with qcow_recycler.open(image_path) as image:
        image.write(0, content)
        disk.write(0, content)
    qemu.img("snapshot", "-c", "full", image_path)
    before = bytes(disk.bytes)
    with qcow_recycler.open(image_path) as image:
        image.discard(0, disk.size)
        image.compact()
        assert image.read(0, disk.size) == bytes(disk.size)
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, bytes(disk.size))
    qemu.assert_contents(image_path, before, snapshot="full")


def test_vm_state_past_the_end_of_the_disk_survives(image_path: Path) -> None:
    """VM state lives in L1 entries past the disk's size: a snapshot's L1 table is longer than the disk needs."""
    disk = guest.Disk(1 << 20, 4096)
    rng = random.Random(5)
    qemu.create(image_path, disk.size, cluster_size=4096)
    guest.qemu_session(image_path, disk, rng, 6)
    qemu.io(image_path, "write -b -P 0x7e 0 256k")
    qemu.img("snapshot", "-c", "state", image_path)
    before = bytes(disk.bytes)
    with qcow_recycler.open(image_path) as image:
        guest.our_session(image, disk, rng, 30)
        image.discard(0, 512 << 10)
        disk.zero(0, 512 << 10)
        image.compact()
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)
    qemu.assert_contents(image_path, before, snapshot="state")
    qemu.img("snapshot", "-a", "state", image_path)
    qemu.io(image_path, "read -b -P 0x7e 0 256k")


def test_a_full_refcount_refuses_nothing_we_need(image_path: Path) -> None:
    """With 1-bit refcounts nothing can be shared: QEMU makes no snapshot there, and the image stays writable for us."""
    qemu.create(image_path, 1 << 20, refcount_bits=1)
    qemu.io(image_path, "write -P 1 0 512k")
    with pytest.raises(qemu.ToolFailed):
        qemu.img("snapshot", "-c", "s", image_path)
    with qcow_recycler.open(image_path) as image:
        image.write(0, b"\2" * 65536)
        assert image.read(0, 131072) == b"\2" * 65536 + b"\1" * 65536


def put(path: Path, offset: int, value: int, width: int = 8) -> None:
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), value.to_bytes(width, "big"), offset)


@pytest.mark.parametrize("cluster_size", [512, 4096, 65536])
@pytest.mark.parametrize("kind", ["version 2", "version 3", "extended", "snapshot", "backing"])
def test_what_a_shrink_that_was_cut_off_left_is_forgotten(
    tmp_path: Path, image_path: Path, cluster_size: int, kind: str
) -> None:
    """The power went between the smaller size and the entries past it, which QEMU would show again."""
    size, small = 5 << 20, 1 << 20
    options: dict[str, object] = {"cluster_size": cluster_size, "compat": "0.10" if kind == "version 2" else "1.1"}
    if kind == "extended":
        if cluster_size < 16384:
            pytest.skip("subclusters would be smaller than a sector")
        options["extended_l2"] = "on"
    if kind == "backing":
        (tmp_path / "base").write_bytes(b"\5" * small)
        qemu.create(image_path, size, backing="base", backing_format="raw", **options)
    else:
        qemu.create(image_path, size, **options)
    # All of it, more than one L2 table where clusters are small, but for a hole across the new end.
    held = b"\7" * (small - cluster_size) + bytes(2 * cluster_size) + b"\7" * (size - small - cluster_size)
    qemu.io(image_path, f"write -q -P 7 0 {size}", f"write -q -z {small - cluster_size} {2 * cluster_size}")
    if kind == "snapshot":
        qemu.img("snapshot", "-c", "s", image_path)
    put(image_path, HEADER["size"][0], small)
    if kind == "version 2":
        # Without the mark it is a leak that tells of the crash.
        q = Qcow2(image_path)
        end = image_path.stat().st_size // cluster_size
        block = q.refcount_table()[end // (cluster_size // 2)]
        assert block
        put(image_path, block + end % (cluster_size // 2) * 2, 1, width=2)
    else:
        put(image_path, HEADER["incompatible_features"][0], Qcow2(image_path).get("incompatible_features") | DIRTY)
    before = digest(image_path)
    with qcow_recycler.open(image_path, backing="allow", read_only=True) as image:
        assert image.read(0, small) == held[:small]
    assert digest(image_path) == before
    with qcow_recycler.open(image_path, backing="allow") as image:
        assert image.read(0, small) == held[:small]
    qemu.assert_clean(image_path)
    if kind == "snapshot":
        assert image_path.stat().st_size > size
    else:
        assert image_path.stat().st_size < small + (1 << 20)
    qemu.img("resize", "-q", "-f", "qcow2", image_path, size)
    qemu.assert_contents(image_path, held[:small] + bytes(size - small))
    if kind == "snapshot":
        qemu.assert_contents(image_path, held, snapshot="s")
    qemu.assert_clean(image_path)


def test_an_image_that_maps_nothing_past_its_end_is_not_marked_when_it_is_opened(image_path: Path) -> None:
    qemu.create(image_path, 5 << 20, cluster_size=4096)
    qemu.io(image_path, "write -q -P 7 0 5M")
    qemu.img("snapshot", "-c", "s", image_path)
    put(image_path, HEADER["incompatible_features"][0], DIRTY)
    with qcow_recycler.open(image_path) as image:
        assert Qcow2(image_path).get("incompatible_features") == 0
        assert image.read(0, 5 << 20) == b"\7" * (5 << 20)
    qemu.assert_clean(image_path)


# --- backing files --------------------------------------------------------------------------------------------------


def backed(
    tmp_path: Path, rng: random.Random, *, fmt: str, size: int, backing_size: int, **options: object
) -> guest.Disk:
    """`disk.qcow2` over a filled `base`; the model holds what both together show."""
    base = tmp_path / "base"
    content = guest.data(rng, backing_size)
    if fmt == "raw":
        base.write_bytes(content)
    else:
        raw = tmp_path / "base.raw"
        raw.write_bytes(content)
        qemu.img("convert", "-f", "raw", "-O", "qcow2", raw, base)
    qemu.create(tmp_path / "disk.qcow2", size, backing="base", backing_format=fmt, **options)
    disk = guest.Disk(size, int(str(options.get("cluster_size", 65536))))
    disk.write(0, content[: min(size, backing_size)])
    return disk


def test_a_backing_file_needs_permission(tmp_path: Path, image_path: Path) -> None:
    backed(tmp_path, random.Random(1), fmt="raw", size=1 << 20, backing_size=1 << 20)
    before = digest(image_path)
    for read_only in (True, False):
        with pytest.raises(qcow_recycler.Error) as e:
            qcow_recycler.open(image_path, read_only=read_only)
        assert e.value.errno == errno.EPERM
        assert "base" in str(e.value)
    assert digest(image_path) == before


def test_without_its_backing_file_only_the_overlays_own_data_is_served(tmp_path: Path, image_path: Path) -> None:
    disk = backed(tmp_path, random.Random(1), fmt="raw", size=1 << 20, backing_size=1 << 20)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with qcow_recycler.open(image_path, backing="skip") as image:
        image.write(0, b"\7" * 65536)
        assert image.read(0, 65536) == b"\7" * 65536
        with pytest.raises(qcow_recycler.Error):
            image.read(65536, 512)
        # A write of part of a cluster needs the backing file for the rest, and must not invent it.
        with pytest.raises(qcow_recycler.Error):
            image.write(131072, b"\7" * 512)
    (tmp_path / "elsewhere").rename(tmp_path / "base")
    disk.write(0, b"\7" * 65536)
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
@pytest.mark.parametrize("cluster_size", [512, 4096, 65536, 2 << 20])
def test_read_through_and_copy_up(tmp_path: Path, image_path: Path, cluster_size: int, fmt: str) -> None:
    rng = random.Random(cluster_size)
    size = max(2 << 20, 3 * cluster_size) if cluster_size > 65536 else 2 << 20
    disk = backed(tmp_path, rng, fmt=fmt, size=size, backing_size=2 << 20, cluster_size=cluster_size)
    base = digest(tmp_path / "base")
    for _ in range(2):
        with qcow_recycler.open(image_path, backing="allow", config=EAGER) as image:
            guest.assert_reads(image, disk)
            image.start()
            guest.our_session(image, disk, rng, 40)
            image.compact()
            guest.assert_reads(image, disk)
        qemu.assert_clean(image_path)
        qemu.assert_contents(image_path, disk.bytes)
        guest.qemu_session(image_path, disk, rng, 4)
    assert digest(tmp_path / "base") == base, "the backing file was changed"


@pytest.mark.parametrize("backing_size", [512, 65536, 100 * 512, 700 * 512])
def test_a_backing_file_shorter_than_its_overlay_goes_on_as_zeroes(
    tmp_path: Path, image_path: Path, backing_size: int
) -> None:
    rng = random.Random(backing_size)
    disk = backed(tmp_path, rng, fmt="raw", size=1 << 20, backing_size=backing_size)
    with qcow_recycler.open(image_path, backing="allow") as image:
        guest.assert_reads(image, disk)
        # Copy-up of the cluster in which the backing file ends.
        content = guest.data(rng, 512)
        at = max(0, (backing_size - 512) // 65536 * 65536)
        image.write(at, content)
        disk.write(at, content)
        guest.assert_reads(image, disk)
        guest.our_session(image, disk, rng, 20)
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)


def test_growing_an_overlay_does_not_expose_the_backing_file(tmp_path: Path, image_path: Path) -> None:
    """The backing file may be longer than the overlay: what lies past the overlay's old end must read as zeroes."""
    rng = random.Random(2)
    disk = backed(tmp_path, rng, fmt="raw", size=1 << 20, backing_size=2 << 20)
    with qcow_recycler.open(image_path, backing="allow") as image:
        image.resize(2 << 20)
        disk.resize(2 << 20)
        guest.assert_reads(image, disk)
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)


def test_shrinking_and_growing_an_overlay_does_not_expose_the_backing_file(tmp_path: Path, image_path: Path) -> None:
    rng = random.Random(2)
    disk = backed(tmp_path, rng, fmt="raw", size=1 << 20, backing_size=1 << 20)
    with qcow_recycler.open(image_path, backing="allow") as image:
        for size in (300 << 10, 1 << 20):
            image.resize(size, shrink=True)
            disk.resize(size)
            guest.assert_reads(image, disk)
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)


def test_bitmaps_are_not_marked_where_the_data_file_cannot_grow(tmp_path: Path, image_path: Path) -> None:
    """A data file is made as long as the disk when it is opened; an image that is refused for it keeps its bitmaps."""
    qcow_recycler.create(image_path, 4 << 20, data_file="data.raw")
    with qcow_recycler.open(image_path, data_file="allow") as image:
        image.add_bitmap("b")
    os.truncate(tmp_path / "data.raw", 1 << 20)
    before = digest(image_path)
    script = """if True:
        import resource, sys, qcow_recycler
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, 2 << 20))
        try:
            qcow_recycler.open(sys.argv[1], data_file="allow")
        except qcow_recycler.Error:
            sys.exit(9)
    """
    assert subprocess.run([sys.executable, "-c", script, image_path], check=False).returncode == 9
    assert digest(image_path) == before
    with qcow_recycler.open(image_path, data_file="allow") as image:
        assert not image.bitmaps()[0].inconsistent


def test_chain_of_three(tmp_path: Path, image_path: Path) -> None:
    """Each image's relative backing name counts from its own directory."""
    rng = random.Random(3)
    disk = guest.Disk(1 << 20, 65536)
    (tmp_path / "deep").mkdir()
    content = guest.data(rng, disk.size)
    (tmp_path / "deep" / "base.raw").write_bytes(content)
    disk.write(0, content)
    middle = tmp_path / "deep" / "middle.qcow2"
    qemu.create(middle, disk.size, backing="base.raw", backing_format="raw", cluster_size=4096)
    guest.qemu_session(middle, disk, rng, 5)
    qemu.create(image_path, disk.size, backing="deep/middle.qcow2")
    guest.qemu_session(image_path, disk, rng, 5)
    before = digest(middle)
    with qcow_recycler.open(image_path, backing="allow") as image:
        guest.assert_reads(image, disk)
        guest.our_session(image, disk, rng, 30)
        image.compact()
        guest.assert_reads(image, disk)
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)
    assert digest(middle) == before


def test_discard_over_a_backing_file_reads_as_zeroes(tmp_path: Path, image_path: Path) -> None:
    """Version 3 has zero clusters: a discarded range is zero, allocated before or not, as in QEMU."""
    disk = backed(tmp_path, random.Random(1), fmt="raw", size=1 << 20, backing_size=1 << 20)
    with qcow_recycler.open(image_path, backing="allow") as image:
        image.write(0, b"\7" * 131072)
        disk.write(0, b"\7" * 131072)
        image.discard(0, 512 << 10)
        disk.zero(0, 512 << 10)
        guest.assert_reads(image, disk)
        image.compact()
        guest.assert_reads(image, disk)
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)


def test_discard_in_version_2_over_a_backing_file_is_refused(tmp_path: Path, image_path: Path) -> None:
    """Version 2 has no zero clusters: freeing a cluster would let the backing file show through."""
    disk = backed(tmp_path, random.Random(1), fmt="raw", size=1 << 20, backing_size=1 << 20, compat="0.10")
    with qcow_recycler.open(image_path, backing="allow") as image:
        image.write(0, b"\7" * 131072)
        disk.write(0, b"\7" * 131072)
        with pytest.raises(qcow_recycler.Error) as e:
            image.discard(0, 512 << 10)
        assert e.value.errno == errno.EOPNOTSUPP
        guest.assert_reads(image, disk)
        # Zeroes can still be written: they cost clusters here.
        image.write_zeroes(0, 256 << 10)
        disk.zero(0, 256 << 10)
        guest.assert_reads(image, disk)
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, disk.bytes)


def refused_quickly(path: Path, **options: object) -> qcow_recycler.Error:
    """Opening fails, read-only and not, in less than a second, and changes nothing."""
    before = digest(path)
    failures = []
    for read_only in (True, False):
        start = time.monotonic()
        with pytest.raises(qcow_recycler.Error) as e:
            qcow_recycler.open(path, read_only=read_only, **options)
        assert time.monotonic() - start < 1
        failures.append(e.value)
    assert digest(path) == before
    return failures[-1]


def test_a_backing_chain_that_is_a_loop_is_refused(tmp_path: Path, image_path: Path) -> None:
    other = tmp_path / "other.qcow2"
    for path, backing in ((image_path, other), (other, image_path)):
        qemu.img("create", "-q", "-u", "-f", "qcow2", "-b", backing.name, "-F", "qcow2", path, "1M")
    refused_quickly(image_path, backing="allow")


def test_an_image_that_is_its_own_backing_file_is_refused(image_path: Path) -> None:
    qemu.img("create", "-q", "-u", "-f", "qcow2", "-b", image_path.name, "-F", "qcow2", image_path, "1M")
    refused_quickly(image_path, backing="allow")


def test_a_very_deep_chain_is_refused(tmp_path: Path) -> None:
    """No loop, but no end in sight either: each step costs memory and a file descriptor."""
    first = tmp_path / "00000.qcow2"
    qemu.img(
        "create", "-q", "-u", "-f", "qcow2", "-o", "cluster_size=512", "-b", "00001.qcow2", "-F", "qcow2", first, "64k"
    )
    template = first.read_bytes()
    for n in range(1, 3000):
        content = template.replace(b"00001.qcow2", b"%05d.qcow2" % (n + 1))
        (tmp_path / f"{n:05}.qcow2").write_bytes(content)
    refused_quickly(tmp_path / "00000.qcow2", backing="allow")


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver":"file","filename":"base"}',
        "nbd://127.0.0.1:1/base",
        "nbd+unix:///?socket=base",
        "file:base",
        ".",
    ],
)
def test_a_backing_name_is_a_plain_file_name(tmp_path: Path, image_path: Path, name: str) -> None:
    """A name is never parsed as a protocol or as JSON; at most it is looked for as a file, and not found."""
    (tmp_path / "base").write_bytes(bytes(1 << 20))
    qemu.img("create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", image_path, "1M")
    refused_quickly(image_path, backing="allow")


def test_a_missing_backing_file_is_an_error_that_names_it(image_path: Path) -> None:
    qemu.img("create", "-q", "-u", "-f", "qcow2", "-b", "gone.raw", "-F", "raw", image_path, "1M")
    assert "gone.raw" in str(refused_quickly(image_path, backing="allow"))


def test_a_backing_files_format_is_never_guessed(tmp_path: Path, image_path: Path) -> None:
    """A guest that writes a qcow2 header into its raw disk must not make us follow it."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"\x99" * (1 << 20))
    trap = tmp_path / "trap.raw"
    qemu.img("create", "-q", "-u", "-f", "qcow2", "-b", "secret", "-F", "raw", trap, "1M")
    trap.write_bytes(trap.read_bytes().ljust(1 << 20, b"\0"))
    qemu.img("create", "-q", "-u", "-f", "qcow2", "-b", "trap.raw", "-F", "raw", image_path, "1M")
    with qcow_recycler.open(image_path, read_only=True, backing="allow") as image:
        assert image.read(0, 1 << 20) == trap.read_bytes()
    # Without a recorded format there is nothing to go by but a guess.
    content = image_path.read_bytes()
    at = content.index((0xE2792ACA).to_bytes(4, "big"))
    image_path.write_bytes(content[:at] + (0x12345678).to_bytes(4, "big") + content[at + 4 :])
    refused_quickly(image_path, backing="allow")
