"""One life of every kind of image that QEMU makes: QEMU fills it, a guest of ours works on it, half of it is discarded,
it is compacted, and QEMU goes on with it. `-s` prints how long the file was, is, and how much longer than it has to be.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import guest
import qcow_recycler
import qemu
from qcow2 import Qcow2

SIZE = 48 << 20
PASSPHRASE = "open sesame"
SNAPSHOTS = ("one", "two", "three")


@dataclass
class Kind:
    """What QEMU is asked for."""

    options: dict[str, object] = field(default_factory=dict)
    size: int = SIZE
    compressed: bool = False
    snapshots: bool = False
    bitmap: bool = False
    depth: int = 0

    @property
    def passphrase(self) -> str | None:
        return PASSPHRASE if "encrypt.format" in self.options else None

    @property
    def cluster_size(self) -> int:
        given = str(self.options.get("cluster_size", "64k"))
        return int(given[:-1]) << {"k": 10, "M": 20}[given[-1]]


LUKS = {"encrypt.format": "luks", "encrypt.key-secret": "s", "encrypt.iter-time": 10}
AES = {"encrypt.format": "aes", "encrypt.key-secret": "s"}
DATA = {"data_file": "data.raw"}
RAW_DATA = {**DATA, "data_file_raw": "on"}
EXTENDED = {"extended_l2": "on"}

KINDS = {
    "version 3": Kind(),
    "version 2": Kind({"compat": "0.10"}),
    "clusters of 4 KiB": Kind({"cluster_size": "4k"}),
    "clusters of 2 MiB": Kind({"cluster_size": "2M"}, size=96 << 20),
    "refcounts of 1 bit": Kind({"refcount_bits": 1}),
    "refcounts of 64 bits": Kind({"refcount_bits": 64}),
    "lazy refcounts": Kind({"lazy_refcounts": "on"}),
    "preallocated": Kind({"preallocation": "full"}),
    "disk of odd length": Kind(size=SIZE - 12345 * 512),
    "snapshots": Kind(snapshots=True),
    "snapshots, version 2": Kind({"compat": "0.10"}, snapshots=True),
    "compressed, zlib": Kind(compressed=True),
    "compressed, zstd": Kind({"compression_type": "zstd"}, compressed=True),
    "extended L2": Kind(EXTENDED),
    "extended L2, snapshots": Kind(EXTENDED, snapshots=True),
    "data file": Kind(DATA),
    "raw data file": Kind(RAW_DATA),
    "data file, extended L2": Kind({**DATA, **EXTENDED}),
    "raw data file, extended L2": Kind({**RAW_DATA, **EXTENDED}),
    "bitmap": Kind(bitmap=True),
    "bitmap, snapshots": Kind(bitmap=True, snapshots=True),
    "LUKS": Kind(LUKS),
    "LUKS, extended L2": Kind({**LUKS, **EXTENDED}),
    "LUKS, data file": Kind({**LUKS, **DATA}),
    "AES": Kind(AES),
    "chain of two": Kind(depth=1),
    "chain of ten": Kind(depth=9),
    "chain of three, compressed, snapshots, bitmap": Kind(depth=2, compressed=True, snapshots=True, bitmap=True),
}


def half_compressible(rng: random.Random, length: int) -> bytes:
    return guest.data(rng, length // 3) + bytes([rng.randrange(1, 255)]) * (length - length // 3)


def make(path: Path, kind: Kind, disk: guest.Disk, rng: random.Random) -> None:
    """The image and what is behind it, with half of the disk written by QEMU."""
    below: Path | None = None
    for level in range(kind.depth):
        layer = path.with_name(f"layer{level}")
        if below is None:
            content = rng.randbytes(kind.size // 3)
            disk.write(0, content)
            layer.write_bytes(content + bytes(kind.size - len(content)))
        else:
            qemu.create(layer, kind.size, backing=below, backing_format="raw" if level == 1 else "qcow2")
            guest.qemu_session(layer, disk, rng, 8)
        below = layer
    arguments: list[object] = []
    if kind.passphrase:
        arguments += ["--object", f"secret,id=s,data={kind.passphrase}"]
    if kind.options:
        arguments += ["-o", ",".join(f"{k}={v}" for k, v in kind.options.items())]
    if below:
        arguments += ["-b", below, "-F", "raw" if kind.depth == 1 else "qcow2"]
    qemu.img("create", "-q", "-f", "qcow2", *arguments, path, kind.size)
    source = path.with_name("source")
    if kind.compressed:
        size = kind.cluster_size
        commands = []
        for at in rng.sample(range(0, kind.size - size + 1, size), kind.size // size * 2 // 3):
            source.with_name(f"source.{at}").write_bytes(content := half_compressible(rng, size))
            commands.append(f"write -q -c -s {source}.{at} {at} {size}")
            disk.write(at, content)
        for first in range(0, len(commands), 200):
            qemu.io(path, *commands[first : first + 200])
        for file in source.parent.glob("source.*"):
            file.unlink()
    else:
        source.write_bytes(content := rng.randbytes(kind.size // 2))
        qemu.io(path, f"write -q -s {source} 0 {len(content)}", passphrase=kind.passphrase)
        disk.write(0, content)
    guest.qemu_session(path, disk, rng, 20, passphrase=kind.passphrase)


def marked(path: Path, image: qcow_recycler.Image, size: int) -> set[int]:
    """The units of 64 KiB that the bitmap marks."""
    units, at = set[int](), 0
    while at < size and (run := image.next_dirty("backup", at)) is not None:
        at = sum(run)
        units.update(range(run[0] // 65536, -(-at // 65536)))
    return units


def needed_bytes(path: Path, kind: Kind) -> int:
    """What the file cannot do without: its data, its tables, the header of its encryption."""
    image = Qcow2(path)
    clusters = len(image.usage().metadata) if "data_file" in kind.options else image.usage().clusters
    encryption = qemu.info(path)["format-specific"]["data"].get("encrypt", {})
    return clusters * image.cluster_size + encryption.get("payload-offset", 0)


@pytest.mark.parametrize("name", KINDS)
def test_a_life(name: str, image_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # QEMU takes a data file's name relative to its own directory.
    monkeypatch.chdir(tmp_path)
    kind, rng = KINDS[name], random.Random(name)
    disk = guest.Disk(kind.size, kind.cluster_size)
    make(image_path, kind, disk, rng)
    held: dict[str, bytes] = {}
    if kind.bitmap:
        qemu.img("bitmap", "--add", "-g", "65536", image_path, "backup")
    for snapshot in SNAPSHOTS if kind.snapshots else ():
        qemu.img("snapshot", "-c", snapshot, image_path)
        held[snapshot] = bytes(disk.bytes)
        guest.qemu_session(image_path, disk, rng, 10)

    def opened() -> qcow_recycler.Image:
        return qcow_recycler.open(
            image_path, backing="allow", data_file="allow", passphrase=kind.passphrase, config="keep_erased=0"
        )

    with opened() as image:
        guest.assert_reads(image, disk)
        before_marks = bytes(disk.bytes)
        guest.our_session(image, disk, rng, 60)
        for at in range(0, kind.size, kind.cluster_size):
            if rng.random() < 0.5:
                length = min(kind.cluster_size, kind.size - at)
                image.discard(at, length)
                disk.zero(at, length)
        image.flush()
        before = image_path.stat().st_size
        image.compact()
        guest.assert_reads(image, disk)
        if kind.bitmap:
            changed = {
                at // 65536
                for at in range(0, kind.size, 65536)
                if disk.bytes[at : at + 65536] != before_marks[at : at + 65536]
            }
            assert changed <= marked(image_path, image, kind.size), "the bitmap lacks a write"
        assert image.stats.background_errors == 0
    after, needed = image_path.stat().st_size, needed_bytes(image_path, kind)
    print(f"\n| {name} | {before / 2**20:.1f} | {after / 2**20:.1f} | {after / needed:.3f} |")
    assert after <= 1.02 * needed + (1 << 20)
    qemu.assert_clean(image_path, passphrase=kind.passphrase)
    qemu.assert_contents(image_path, disk.bytes, passphrase=kind.passphrase)
    for snapshot, content in held.items():
        qemu.assert_contents(image_path, content, snapshot=snapshot)
    if kind.bitmap:
        listed = qemu.info(image_path)["format-specific"]["data"]["bitmaps"]
        assert [(b["name"], b["flags"]) for b in listed] == [("backup", ["auto"])]

    guest.qemu_session(image_path, disk, rng, 20, passphrase=kind.passphrase)
    for snapshot, content in held.items():
        qemu.assert_contents(image_path, content, snapshot=snapshot)
    with opened() as image:
        guest.assert_reads(image, disk)
    qemu.assert_clean(image_path, passphrase=kind.passphrase)
