"""External data files: QEMU's images and ours, raw and not, with extended L2 entries or encrypted: contents, space,
length, locks, kills, hostile names."""

from __future__ import annotations

import errno
import functools
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import guest
import qcow_recycler
import qemu
from qcow2 import COPIED, DATA_FILE, EXTENDED_L2, Qcow2

SIZE = 8 << 20
RAW_BIT = 1 << 1
EXTENSION = (0x44415441).to_bytes(4, "big")
PASSPHRASE = "open sesame"
WAYS = pytest.mark.parametrize("raw", [False, True], ids=["plain", "raw"])

# Everything that QEMU makes, by what else is particular about it. "raw" is the flag in the header; "luks" and "aes" are
# encrypted.
KINDS = [
    f"{method}{extended}{raw}"
    for method in ("", "luks", "aes")
    for extended in ("", "-extended")
    for raw in ("", "-raw")
]
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def in_the_images_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU takes the data file's name relative to its own working directory."""
    monkeypatch.chdir(tmp_path)


def passphrase_of(kind: str) -> str | None:
    return PASSPHRASE if kind.startswith(("luks", "aes")) else None


def is_raw(kind: str) -> bool:
    return kind.endswith("raw")


def reads_as_the_disk(kind: str) -> bool:
    """Whether the data file does. An encrypted one cannot, whatever the header says."""
    return is_raw(kind) and passphrase_of(kind) is None


def open_image(path: Path, kind: str = "", **options: object) -> qcow_recycler.Image:
    given: dict[str, object] = {"data_file": "allow", "passphrase": passphrase_of(kind), **options}
    return qcow_recycler.open(path, **given)  # type: ignore[arg-type]


@functools.cache
def new_image(size: int, kind: str, options: tuple[tuple[str, object], ...]) -> bytes:
    """An image of QEMU's without its data file; with LUKS it takes seconds to make one, so each is made once."""
    given = {"data_file": "data.raw", "data_file_raw": "on" if is_raw(kind) else "off", **dict(options)}
    arguments: list[object] = []
    method = kind.split("-")[0]
    if "extended" in kind:
        given["extended_l2"] = "on"
    if method in ("luks", "aes"):
        given |= {"encrypt.format": method, "encrypt.key-secret": "s"}
        arguments = ["--object", f"secret,id=s,data={PASSPHRASE}"]
    if method == "luks":
        given["encrypt.iter-time"] = 10
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as there:
        there.chdir(directory)
        named = ",".join(f"{k}={v}" for k, v in given.items())
        qemu.img("create", "-q", "-f", "qcow2", *arguments, "-o", named, "new.qcow2", size)
        return Path("new.qcow2").read_bytes()


def qemu_creates(path: Path, size: int, *, kind: str = "", cluster_size: int = 65536, **options: object) -> Path:
    """An image of QEMU's with a data file; gives the data file's path."""
    named = tuple(sorted({"cluster_size": cluster_size, **options}.items()))
    path.write_bytes(new_image(size, kind, named))
    data = path.with_name("data.raw")
    data.write_bytes(b"")
    os.truncate(data, size)
    return data


def new_disk(path: Path, size: int, kind: str, cluster_size: int = 65536) -> guest.Disk:
    """What a new image of QEMU's reads as: zeroes, or garbage where entries show an encrypted data file's zeroes."""
    passphrase = passphrase_of(kind)
    content = bytearray(qemu.contents(path, passphrase=passphrase) if passphrase else size)
    return guest.Disk(size, cluster_size, content)


def assert_both(image: Path, data: Path, disk: guest.Disk, *, kind: str = "") -> None:
    """QEMU and the library read the disk and find nothing wrong; a raw data file is the disk."""
    passphrase = passphrase_of(kind)
    qemu.assert_clean(image, passphrase=passphrase)
    assert qcow_recycler.check(image).is_clean
    qemu.assert_contents(image, disk.bytes, passphrase=passphrase)
    assert qemu.info(image)["format-specific"]["data"]["data-file-raw"] == is_raw(kind)
    content = data.read_bytes()
    if reads_as_the_disk(kind):
        assert content[: disk.size] == disk.bytes
    # QEMU's zeroes fill the disk's last cluster, even where the disk ends in it.
    assert disk.size <= len(content) < disk.size + disk.cluster_size


def kinds_and_sizes() -> Iterator[tuple[str, int]]:
    """Cluster sizes for each kind: fewer where QEMU takes long."""
    for kind in KINDS:
        sizes = [16384, 65536, 1 << 20] if "extended" in kind else [512, 4096, 65536]
        yield from ((kind, size) for size in (sizes[:2] if passphrase_of(kind) else sizes))


@pytest.mark.parametrize(("kind", "cluster_size"), kinds_and_sizes())
@pytest.mark.parametrize("seed", guest.seeds(1))
def test_qemu_then_us_then_qemu(image_path: Path, seed: int, kind: str, cluster_size: int) -> None:
    rng = random.Random(f"{seed} {cluster_size} {kind}")
    passphrase = passphrase_of(kind)
    data = qemu_creates(image_path, SIZE - 512, kind=kind, cluster_size=cluster_size)
    disk = new_disk(image_path, SIZE - 512, kind, cluster_size)
    for _ in range(2):
        # QEMU's discards of a raw data file depend on what the host makes of holes: not what is tested here.
        guest.qemu_session(image_path, disk, rng, 12, passphrase=passphrase)
        with open_image(image_path, kind) as image:
            assert image.info.encryption == (kind.split("-")[0] or None)
            assert image.info.extended_l2 == ("extended" in kind)
            guest.assert_reads(image, disk)
            image.start()
            guest.our_session(image, disk, rng, 60)
            assert image.check().is_clean
            guest.assert_reads(image, disk)
        assert_both(image_path, data, disk, kind=kind)


@WAYS
@pytest.mark.parametrize("extended", [False, True])
def test_ours_are_qemus(image_path: Path, extended: bool, raw: bool) -> None:
    rng = random.Random(2)
    kind = f"{'-extended' if extended else ''}{'-raw' if raw else ''}"
    disk = guest.Disk(SIZE, 65536)
    qcow_recycler.create(image_path, SIZE, data_file="data.raw", data_file_raw=raw, extended_l2=extended)
    data = image_path.with_name("data.raw")
    assert data.stat().st_size == SIZE
    header = Qcow2(image_path)
    assert header.get("incompatible_features") == DATA_FILE | (EXTENDED_L2 if extended else 0)
    assert header.get("autoclear_features") == (RAW_BIT if raw else 0)
    guest.qemu_session(image_path, disk, rng, 10)
    with qcow_recycler.open(image_path, data_file="allow") as image:
        assert (image.info.data_file, image.info.data_file_raw) == ("data.raw", raw)
        assert any("external data file" in reason for reason in image.info.pinned)
        guest.our_session(image, disk, rng, 40)
    assert_both(image_path, data, disk, kind=kind)
    assert Qcow2(image_path).get("autoclear_features") == (RAW_BIT if raw else 0)


def test_data_is_at_its_own_offset(image_path: Path) -> None:
    data = qemu_creates(image_path, SIZE)
    with qcow_recycler.open(image_path, data_file="allow") as image:
        for at in (0, 5 << 16, SIZE - 65536):
            image.write(at + 512, bytes([at >> 16 | 1]) * 512)
        extents = [e for e in image.extents() if e.kind == "data"]
        assert [(e.offset, e.host_offset) for e in extents] == [(at, at) for at in (0, 5 << 16, SIZE - 65536)]
    content = data.read_bytes()
    for at in (0, 5 << 16, SIZE - 65536):
        assert content[at : at + 1024] == bytes(512) + bytes([at >> 16 | 1]) * 512
        assert Qcow2(image_path).mapping(at)[1] == at | COPIED


@EVERY_KIND
def test_discards_give_space_back(image_path: Path, kind: str) -> None:
    data = qemu_creates(image_path, SIZE, kind=kind)
    with open_image(image_path, kind) as image:
        image.write(0, b"\1" * SIZE)
        image.flush()
        full = data.stat().st_blocks
        assert full >= SIZE // 512
        image.discard(1 << 20, 6 << 20)
        image.flush()
        assert data.stat().st_blocks <= full - (6 << 20) // 512
        assert image.read(1 << 20, 6 << 20) == bytes(6 << 20)
        # What is written to next to a discarded cluster's end shows nothing of what it held.
        image.write(3 << 20, b"\2" * 512)
        assert image.read(3 << 20, 1024) == b"\2" * 512 + bytes(512)
    expected = bytearray(b"\1" * (1 << 20) + bytes(6 << 20) + b"\1" * (1 << 20))
    expected[3 << 20 : (3 << 20) + 512] = b"\2" * 512
    disk = guest.Disk(SIZE, 65536, expected)
    assert_both(image_path, data, disk, kind=kind)


@pytest.mark.parametrize("kind", ["-extended", "luks-extended", "aes-extended"])
def test_discarded_subclusters_give_their_space_back(image_path: Path, kind: str) -> None:
    """Parts of a cluster of 1 MiB, whose subclusters have 32 KiB: what is beside them stays."""
    data = qemu_creates(image_path, SIZE, kind=kind, cluster_size=1 << 20)
    disk = new_disk(image_path, SIZE, kind, 1 << 20)
    content = guest.data(random.Random(7), 1 << 20)
    with open_image(image_path, kind) as image:
        image.write(1 << 20, content)
        disk.write(1 << 20, content)
        image.flush()
        full = data.stat().st_blocks
        # From the middle of a subcluster to the middle of another; 25 are whole.
        at, length = (1 << 20) + (2 << 15) + 512, (25 << 15) + (1 << 15)
        image.discard(at, length)
        disk.zero(at, length)
        image.flush()
        assert data.stat().st_blocks <= full - (25 << 15) // 512
        guest.assert_reads(image, disk)
        image.write((1 << 20) + (10 << 15), content[:512])
        disk.write((1 << 20) + (10 << 15), content[:512])
        guest.assert_reads(image, disk)
    assert bin(Qcow2(image_path).subclusters(1 << 20) & 0xFFFFFFFF).count("1") == 8
    assert_both(image_path, data, disk, kind=kind)


def test_a_small_write_takes_a_subcluster(image_path: Path) -> None:
    """The data file gets no more than the subcluster that is written to, and the entry shows no more."""
    data = qemu_creates(image_path, SIZE, kind="-extended")
    with qcow_recycler.open(image_path, data_file="allow") as image:
        data_before = data.read_bytes()
        image.write((5 << 16) + (3 << 11) + 512, b"\1" * 512)
        image.write(0, b"\2" * 512)
    meta = Qcow2(image_path)
    assert meta.mapping(5 << 16)[1] == (5 << 16) | COPIED and meta.subclusters(5 << 16) == 1 << 3
    assert meta.mapping(0)[1] == COPIED and meta.subclusters(0) == 1, "the file's first cluster is told by its flag"
    expected = bytearray(data_before)
    at = (5 << 16) + (3 << 11) + 512
    expected[at : at + 512] = b"\1" * 512
    expected[:512] = b"\2" * 512
    assert data.read_bytes() == expected
    assert_both(image_path, data, guest.Disk(SIZE, 65536, expected), kind="-extended")


@EVERY_KIND
def test_what_is_flushed_is_not_in_the_hole(image_path: Path, kind: str) -> None:
    """Discards and writes to the same clusters, without and with a flush in between: only what is discarded is lost."""
    data = qemu_creates(image_path, SIZE, kind=kind)
    disk = new_disk(image_path, SIZE, kind)
    rng = random.Random(11)
    with open_image(image_path, kind) as image:
        for flush in (0, 1, 2, 3):
            for at in range(0, SIZE, 1 << 20):
                content = guest.data(rng, 256 << 10)
                image.write(at, content)
                disk.write(at, content)
            image.flush()
            image.discard(0, SIZE)
            disk.zero(0, SIZE)
            if flush & 1:
                image.flush()
            for at in range(512, SIZE, 128 << 10):
                image.write(at, b"\3" * 1024)
                disk.write(at, b"\3" * 1024)
            if flush & 2:
                image.flush()
            guest.assert_reads(image, disk)
        image.flush()
        guest.assert_reads(image, disk)
    assert_both(image_path, data, disk, kind=kind)


@pytest.mark.parametrize("kind", [k for k in KINDS if not is_raw(k)])
def test_stale_data_never_shows(image_path: Path, kind: str) -> None:
    """QEMU lets an entry go and leaves the data where it was: a write around it must not bring it back."""
    passphrase = passphrase_of(kind)
    data = qemu_creates(image_path, SIZE, kind=kind)
    qemu.io(image_path, f"write -P 7 0 {SIZE}", passphrase=passphrase)
    # Without `-d unmap` QEMU does not pass the discard on.
    qemu.io(image_path, f"write -z -u 0 {SIZE}", discard=False, passphrase=passphrase)
    data.write_bytes(b"\7" * SIZE)
    disk = guest.Disk(SIZE, 65536)
    with open_image(image_path, kind) as image:
        guest.assert_reads(image, disk)
        for at in range(1024, SIZE, 1 << 20):
            image.write(at, b"\1" * 512)
            disk.write(at, b"\1" * 512)
        guest.assert_reads(image, disk)
    assert_both(image_path, data, disk, kind=kind)


@EVERY_KIND
def test_the_image_is_compacted_and_both_files_follow_the_size(image_path: Path, kind: str) -> None:
    rng = random.Random(5)
    cluster_size = 16384 if "extended" in kind else 512
    data = qemu_creates(image_path, SIZE, kind=kind, cluster_size=cluster_size)
    disk = new_disk(image_path, SIZE, kind, cluster_size)
    content = guest.data(rng, 3 << 20)
    with open_image(image_path, kind, keep_erased=0) as image:
        for at in (4 << 20, 0):
            image.write(at, content)
            disk.write(at, content)
        image.flush()
        long = image_path.stat().st_size
        # The tables of what is cut off are the first in the file.
        image.resize(1 << 20, shrink=True)
        disk.resize(1 << 20)
        image.compact()
        guest.assert_reads(image, disk)
    assert_both(image_path, data, disk, kind=kind)
    if cluster_size == 512 and passphrase_of(kind) is None:
        needed = len(Qcow2(image_path).usage().metadata) * 512
        assert image_path.stat().st_size <= needed + (16 << 10) < long, (needed, long)
    with open_image(image_path, kind) as image:
        image.resize(SIZE + 512)
        disk.resize(SIZE + 512)
        guest.assert_reads(image, disk)
    assert_both(image_path, data, disk, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_growing_shows_zeroes(image_path: Path, kind: str) -> None:
    """The disk's end moves within clusters and subclusters, over what they held."""
    data = qemu_creates(image_path, SIZE, kind=kind)
    disk = guest.Disk(SIZE, 65536)
    rng = random.Random(12)
    with open_image(image_path, kind) as image:
        content = guest.data(rng, 2 << 20)
        image.write(0, content * (SIZE // len(content)))
        disk.write(0, content * (SIZE // len(content)))
        for size in (SIZE - 512, SIZE - 5 * 512, SIZE - 3 * 512, SIZE - 65536 * 3 // 2, SIZE + 1536, 4 << 20, SIZE):
            image.resize(size, shrink=True)
            disk.resize(size)
            guest.assert_reads(image, disk)
            if rng.random() < 0.5:
                at = disk.size // 65536 * 65536 - 65536
                image.write(at, b"\5" * (disk.size - at))
                disk.write(at, b"\5" * (disk.size - at))
    assert_both(image_path, data, disk, kind=kind)


@pytest.mark.parametrize("kind", [k for k in KINDS if not is_raw(k)])
def test_a_backing_file_shows_where_nothing_is_in_use(tmp_path: Path, image_path: Path, kind: str) -> None:
    rng = random.Random(6)
    base = tmp_path / "base.qcow2"
    disk = guest.Disk(SIZE, 65536)
    qemu.create(base, SIZE)
    guest.qemu_session(base, disk, rng, 10)
    passphrase = passphrase_of(kind)
    data = qemu_creates(image_path, SIZE, kind=kind)
    qemu.img("rebase", "-q", "-u", "-F", "qcow2", "-b", base.name, *qemu.named(image_path, passphrase))
    with open_image(image_path, kind, backing="allow") as image:
        guest.assert_reads(image, disk)
        guest.our_session(image, disk, rng, 60)
        guest.assert_reads(image, disk)
    assert_both(image_path, data, disk, kind=kind)
    with pytest.raises(qcow_recycler.DataFileNotAllowed):
        qcow_recycler.commit(image_path, passphrase=passphrase)
    qcow_recycler.commit(image_path, data_file="allow", passphrase=passphrase)
    assert data.stat().st_blocks == 0
    qemu.assert_contents(base, disk.bytes)
    assert_both(image_path, data, disk, kind=kind)


CHILD = """
import sys, qcow_recycler
passphrase = sys.argv[3] or None
image = qcow_recycler.open(sys.argv[1], data_file="allow", passphrase=passphrase, config="flush_ms=5;settle_ms=1")
image.start()
size, version = image.info.virtual_size, int(sys.argv[2])
while True:
    for at in range(0, size, 3 << 16):
        version += 1
        image.write(at + 512, version.to_bytes(4, "little") * 128)
        if version % 3 == 0:
            image.discard((at + (7 << 16)) % size // 65536 * 65536, 65536)
    image.flush()
    print(version, flush=True)
"""


@pytest.mark.parametrize("kind", [k for k in KINDS if not (passphrase_of(k) and is_raw(k))])
def test_kills(image_path: Path, kind: str) -> None:
    """Whatever a killed process left, QEMU finds no corruption, and a raw data file is what the image says."""
    data = qemu_creates(image_path, SIZE, kind=kind)
    passphrase = passphrase_of(kind)
    rng = random.Random(8)
    version = 0
    for _ in range(4):
        command = [sys.executable, "-c", CHILD, str(image_path), str(version), passphrase or ""]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout
            version = int(child.stdout.readline())
            time.sleep(rng.random() * 0.3)
            child.kill()
            lines = child.stdout.read().split(b"\n")[:-1]
        version = int(lines[-1]) if lines else version
        found = qemu.check(image_path, passphrase=passphrase)
        assert not found.corruptions, found
        qemu_read = qemu.contents(image_path, passphrase=passphrase)
        if is_raw(kind):
            assert data.read_bytes() == qemu_read
        with open_image(image_path, kind) as image:
            assert image.read(0, SIZE) == qemu_read
            # The last thing that a completed flush covered, or something later.
            seen = [int.from_bytes(qemu_read[at + 512 : at + 516], "little") for at in range(0, SIZE, 3 << 16)]
            round_ = len(seen)
            expected = range(version - round_ + 1, version + 1)
            assert all(n >= e or n == 0 for n, e in zip(seen, expected, strict=True)), (seen, version)
            assert any(n >= e for n, e in zip(seen, expected, strict=True))
        qemu.assert_clean(image_path, passphrase=passphrase)
        version += 2 * round_


def test_it_is_opened_only_by_permission(tmp_path: Path, image_path: Path) -> None:
    data = qemu_creates(image_path, SIZE)
    qemu.io(image_path, "write -P 1 0 1M")
    before = image_path.read_bytes(), data.read_bytes()
    with pytest.raises(qcow_recycler.DataFileNotAllowed, match=r"data\.raw") as refused:
        qcow_recycler.open(image_path)
    assert refused.value.errno == errno.EPERM
    with pytest.MonkeyPatch.context() as elsewhere:
        elsewhere.chdir("/")
        with qcow_recycler.open(image_path, data_file="allow", read_only=True) as image:
            assert image.read(0, 512) == b"\1" * 512
    with qcow_recycler.open(image_path, data_file="skip", read_only=True) as image:
        assert image.info.data_file == "data.raw"
        with pytest.raises(qcow_recycler.DataFileNotAllowed):
            image.read(0, 512)
    data.rename(tmp_path / "elsewhere")
    with pytest.raises(qcow_recycler.DataFileError) as missing:
        qcow_recycler.open(image_path, data_file="allow")
    assert missing.value.errno == errno.ENOENT
    (tmp_path / "elsewhere").rename(data)
    assert (image_path.read_bytes(), data.read_bytes()) == before


def rename_in(image: Path, name: bytes) -> None:
    """Lets the image name another data file; the name is no longer than the old one."""
    content = image.read_bytes()
    at = content.index(EXTENSION) + 8
    length = int.from_bytes(content[at - 4 : at], "big")
    padded = -(-length // 8) * 8
    new = len(name).to_bytes(4, "big") + name.ljust(padded, b"\0")
    assert -(-len(name) // 8) * 8 == padded
    image.write_bytes(content[: at - 4] + new + content[at + padded :])


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (b"disk.qcow2", "the image itself"),
        (b"hardlink", "the image itself"),
        (b"nbd:unix:x", "plain path"),
        (b"json:{}\0x", "NUL"),
        (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", "UTF-8"),
        (b"somefifo.1", "this kind of file"),
        (b"directory.", "directory"),
    ],
)
def test_hostile_names(tmp_path: Path, image_path: Path, name: bytes, error: str) -> None:
    qemu.create(image_path, SIZE, data_file="long_name.raw"[: 8 if len(name) <= 8 else 13])
    os.link(image_path, tmp_path / "hardlink")
    os.mkfifo(tmp_path / "somefifo.1")
    (tmp_path / "directory.").mkdir()
    rename_in(image_path, name)
    before = image_path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(qcow_recycler.Error, match=error):
            qcow_recycler.open(image_path, data_file="allow", read_only=read_only)
    assert image_path.read_bytes() == before


@pytest.mark.parametrize(
    ("entry", "subclusters"),
    [
        (1 << 62 | 65536, None),
        (COPIED | 3 << 16, None),
        (COPIED, None),
        (COPIED | 2 << 16 | 2, None),
        (COPIED | 3 << 16, 1),
        (COPIED | 2 << 16 | 1, 1),
        (COPIED | 2 << 16, 1 << 32 | 1),
        (0, 1),
    ],
)
def test_hostile_entries(image_path: Path, entry: int, subclusters: int | None) -> None:
    """Compressed, at another place, with reserved bits, impossible subclusters: an error, and nothing is written."""
    data = qemu_creates(image_path, SIZE, kind="" if subclusters is None else "-extended")
    qemu.io(image_path, "write -P 1 0 1M")
    at, _ = Qcow2(image_path).mapping(2 << 16)
    with open(image_path, "r+b") as file:
        os.pwrite(file.fileno(), entry.to_bytes(8, "big"), at)
        if subclusters is not None:
            os.pwrite(file.fileno(), subclusters.to_bytes(8, "big"), at + 8)
    before = image_path.read_bytes(), data.read_bytes()
    assert qcow_recycler.check(image_path).corruptions > 0
    with qcow_recycler.open(image_path, data_file="allow") as image:
        for work in (
            lambda: image.read(2 << 16, 512),
            lambda: image.write(2 << 16, bytes(512)),
            lambda: image.discard(2 << 16, 65536),
            lambda: image.discard(2 << 16, 4096),
        ):
            with pytest.raises(qcow_recycler.InvalidImage) as refused:
                work()
            assert refused.value.offset == at
        assert image.read(3 << 16, 512) == b"\1" * 512
    assert (image_path.read_bytes(), data.read_bytes()) == before


def set_features(path: Path, at: int, bits: int) -> None:
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), bits.to_bytes(8, "big"), at)


def test_hostile_headers(tmp_path: Path, image_path: Path) -> None:
    qemu_creates(image_path, SIZE, kind="-raw")
    qemu.io(image_path, "write -P 1 0 64k")
    original = image_path.read_bytes()

    def refused(words: str, **options: object) -> None:
        before = image_path.read_bytes()
        for read_only in (True, False):
            with pytest.raises(qcow_recycler.Error, match=words):
                qcow_recycler.open(image_path, data_file="allow", read_only=read_only, **options)
        assert image_path.read_bytes() == before
        image_path.write_bytes(original)

    # The extension without the bit, and the raw bit without either.
    set_features(image_path, 72, 0)
    set_features(image_path, 88, 0)
    refused("external data file bit is not set")
    set_features(image_path, 72, 0)
    refused("raw external data bit")
    # The bit without the extension.
    content = image_path.read_bytes()
    image_path.write_bytes(content.replace(EXTENSION, (0x7E57AB1E).to_bytes(4, "big"), 1))
    refused("does not name")
    # A raw data file cannot read as the disk does if something else shows through.
    base = tmp_path / "base.raw"
    base.write_bytes(bytes(SIZE))
    qemu.create(tmp_path / "other.qcow2", SIZE, backing=base.name, backing_format="raw", data_file="other.data")
    set_features(tmp_path / "other.qcow2", 88, RAW_BIT)
    with pytest.raises(qcow_recycler.Unsupported, match="backing file"):
        qcow_recycler.open(tmp_path / "other.qcow2", data_file="allow", backing="allow")


def test_snapshots_are_refused_as_by_qemu(image_path: Path) -> None:
    qemu_creates(image_path, SIZE)
    with pytest.raises(qemu.ToolFailed, match="not supported"):
        qemu.img("snapshot", "-c", "one", image_path)
    before = image_path.read_bytes()
    with qcow_recycler.open(image_path, data_file="allow") as image:
        for call in (image.create_snapshot, image.delete_snapshot, image.apply_snapshot):
            with pytest.raises(qcow_recycler.Unsupported, match="external data file"):
                call("one")
        assert image.snapshots() == ()
    assert image_path.read_bytes() == before


@pytest.mark.parametrize("kind", ["luks", "luks-extended", "aes"])
def test_without_a_passphrase_tables_move_and_discards_give_space_back(image_path: Path, kind: str) -> None:
    data = qemu_creates(image_path, SIZE, kind=kind)
    disk = new_disk(image_path, SIZE, kind)
    with open_image(image_path, kind) as image:
        image.write(0, b"\1" * SIZE)
    disk.write(0, b"\1" * SIZE)
    with qcow_recycler.open(image_path, data_file="skip") as image:
        pinned = " ".join(image.info.pinned)
        assert "external data file" in pinned and "no passphrase" not in pinned, pinned
        image.compact()
    with open_image(image_path, kind, passphrase=None) as image:
        with pytest.raises(qcow_recycler.PassphraseNeeded):
            image.read(0, 512)
        with pytest.raises(qcow_recycler.PassphraseNeeded):
            image.write(0, bytes(512))
        full = data.stat().st_blocks
        image.discard(1 << 20, 6 << 20)
        disk.zero(1 << 20, 6 << 20)
        image.flush()
        assert data.stat().st_blocks <= full - (6 << 20) // 512
    assert_both(image_path, data, disk, kind=kind)


def test_locks(tmp_path: Path, image_path: Path) -> None:
    """Whoever uses the data file excludes us, and we exclude them, whatever image it is reached by."""
    data = qemu_creates(image_path, SIZE, kind="-raw")
    other = tmp_path / "other.qcow2"
    other.write_bytes(image_path.read_bytes())
    with qemu.holding(image_path), pytest.raises(qcow_recycler.DataFileError) as locked:
        qcow_recycler.open(other, data_file="allow")
    assert locked.value.errno == errno.EAGAIN
    with qcow_recycler.open(image_path, data_file="allow"):
        with pytest.raises(qemu.ToolFailed, match="lock"):
            qemu.io(other, "write 0 512")
        with pytest.raises(qemu.ToolFailed, match="lock"):
            qemu.run("qemu-io", "-f", "raw", "-c", "write 0 512", data)


@pytest.mark.parametrize("kind", ["", "-extended"])
def test_repair(image_path: Path, kind: str) -> None:
    """A wrong COPIED flag and a leaked cluster are repaired; QEMU agrees."""
    data = qemu_creates(image_path, SIZE, kind=kind)
    qemu.io(image_path, "write -P 1 0 1M")
    at, entry = Qcow2(image_path).mapping(2 << 16)
    with open(image_path, "r+b") as file:
        os.pwrite(file.fileno(), (entry & ~COPIED).to_bytes(8, "big"), at)
        block = Qcow2(image_path).refcount_table()[0]
        os.pwrite(file.fileno(), (1).to_bytes(2, "big"), block + 2 * 100)
    before = data.read_bytes()
    ours = qcow_recycler.check(image_path)
    assert (ours.corruptions, ours.leaks) == (1, 1), ours
    assert qcow_recycler.check(image_path, "all").is_clean
    qemu.assert_clean(image_path)
    assert data.read_bytes() == before


class Memory:
    """A device in memory."""

    def __init__(self, content: bytes = b"") -> None:
        self.content = bytearray(content)

    def length(self) -> int:
        return len(self.content)

    def pread(self, offset: int, buffer: memoryview) -> None:
        buffer[:] = self.content[offset : offset + len(buffer)]

    def pwrite(self, offset: int, buffer: memoryview) -> None:
        self.content[offset : offset + len(buffer)] = buffer

    def flush(self) -> None:
        pass

    def truncate(self, length: int) -> None:
        self.content = self.content[:length].ljust(length, b"\0")


def test_devices(image_path: Path) -> None:
    image_bytes, data_bytes = Memory(), Memory()
    qcow_recycler.create_device(image_bytes, SIZE, data_bytes, data_file="data.raw", data_file_raw=True)
    disk = guest.Disk(SIZE, 65536)
    with qcow_recycler.open_device(image_bytes, data_bytes) as image:
        guest.our_session(image, disk, random.Random(9), 40)
    assert data_bytes.content == disk.bytes
    with pytest.raises(qcow_recycler.DataFileNotAllowed):
        qcow_recycler.open_device(image_bytes)
    with pytest.raises(qcow_recycler.DataFileNotAllowed, match="given with it"):
        image_path.with_name("data.raw").touch()
        qcow_recycler.open_device(image_bytes, data_file="allow", backing_directory=image_path.parent)
    with pytest.raises(qcow_recycler.BadOption):
        qcow_recycler.create_device(Memory(), SIZE, data_file="data.raw")
    image_path.write_bytes(image_bytes.content)
    image_path.with_name("data.raw").write_bytes(data_bytes.content)
    assert_both(image_path, image_path.with_name("data.raw"), disk, kind="-raw")


@pytest.mark.parametrize("kind", ["", "-extended", "luks", "luks-extended"])
def test_queues(image_path: Path, kind: str) -> None:
    """The kernel's transfers go to the data file, too."""
    import asyncio

    from qcow_recycler import aio

    data = qemu_creates(image_path, SIZE, kind=kind)
    disk = guest.Disk(SIZE, 65536)

    async def work() -> None:
        image = await aio.open(image_path, data_file="allow", passphrase=passphrase_of(kind))
        async with image:
            rng = random.Random(10)
            for _ in range(4):
                places = [at << 16 for at in rng.sample(range(SIZE >> 16), 32)]
                contents = [guest.data(rng, 8192) for _ in places]
                await asyncio.gather(*(image.write(at, c) for at, c in zip(places, contents, strict=True)))
                for at, content in zip(places, contents, strict=True):
                    disk.write(at, content)
                got = await asyncio.gather(*(image.read(at, 8192) for at in places))
                assert list(got) == contents
            await image.flush()

    asyncio.run(work())
    assert_both(image_path, data, disk, kind=kind)


def test_command(image_path: Path) -> None:
    data = qemu_creates(image_path, SIZE, kind="-raw")
    qemu.io(image_path, "write -P 1 0 1M", "write -P 0 1M 1M")

    def command(*arguments: object, ok: tuple[int, ...] = (0,)) -> subprocess.CompletedProcess[str]:
        return qemu.run(sys.executable, "-m", "qcow_recycler.cli", *arguments, ok=ok)

    shown = command("info", image_path).stdout
    assert "data.raw (raw)" in shown and "stays where it is" in shown, shown
    command("check", image_path)
    command("compact", image_path)
    assert "not allowed" in command("discard-zeroes", image_path, ok=(1,)).stderr
    blocks = data.stat().st_blocks
    command("discard-zeroes", "--data-file", image_path)
    assert data.stat().st_blocks <= blocks - (1 << 20) // 512
    disk = guest.Disk(SIZE, 65536)
    disk.write(0, b"\1" * (1 << 20))
    assert_both(image_path, data, disk, kind="-raw")
