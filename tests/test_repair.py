"""Repairs beside QEMU's: the same damage, repaired by both, and what is left of it afterwards.

Nothing that a guest could still read after QEMU's repair is lost by ours, and what QEMU then finds in both is the same;
where it is not, the case says what differs and why.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

import qcow_recycler
import qemu
from damage import CLUSTER, Victim, digest
from qcow2 import COPIED, DIRTY, OFFSET_MASK, ZERO, Qcow2

SECTOR = 512


class Patient(Victim):
    """An image with two snapshots, which share most of the disk, and a few compressed clusters."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, snapshot=True)
        qemu.io(path, "write -c -P 0x44 2M 4k", "write -c -P 0x55 2052k 4k", "write -P 0x66 1M 64k")
        self.disk = qemu.contents(path)
        self.snapshot = qemu.contents(path, snapshot="one")

    def another(self, path: Path) -> Patient:
        """The same at another path."""
        shutil.copy(self.path, path)
        other = copy.copy(self)
        other.path = path
        return other

    def data(self, guest: int) -> int:
        """The host cluster of a guest cluster, its offset."""
        return self.meta.mapping(guest)[1] & OFFSET_MASK

    def entry(self, guest: int) -> int:
        """Where the L2 entry of a guest offset stands."""
        return self.meta.mapping(guest)[0]

    def of_snapshot(self, guest: int) -> int:
        """Where the first snapshot's L2 entry of a guest offset, of the first L2 table, stands."""
        (table,) = self.meta.table(self.meta.snapshots()[0].l1_offset, 1)
        return (table & OFFSET_MASK) + guest // CLUSTER * 8

    def count_at(self, offset: int) -> int:
        """Where the refcount of a cluster, of 16 bits, stands."""
        cluster = offset // CLUSTER
        block = self.meta.refcount_table()[cluster // (CLUSTER // 2)]
        return block + cluster % (CLUSTER // 2) * 2

    def count(self, offset: int, value: int) -> None:
        self.put(self.count_at(offset), value, 2)

    def end(self) -> int:
        """The end of the file, in whole clusters."""
        return -(-self.path.stat().st_size // CLUSTER) * CLUSTER

    def flip(self, at: int) -> None:
        self.put(at, int.from_bytes(self.meta.bytes_at(at, 8), "big") ^ COPIED)

    def fill(self, offset: int, byte: int) -> None:
        with open(self.path, "r+b") as file:
            file.seek(offset)
            file.write(bytes([byte]) * CLUSTER)


@dataclass
class Case:
    """Damage by name. `differs`: by mode, why QEMU finds something else after our repair than after its own."""

    name: str
    damage: Callable[[Patient], object]
    differs: dict[str, str] = field(default_factory=dict)
    # Why a guest's work on the repaired image does not leave a sound one, here as with QEMU.
    unusable: str = ""


# Why the two differ.
FLAGS = {"leaks": "flags that have nothing to do with a leak are turned by a full repair only"}
HIDDEN = dict.fromkeys(("leaks", "all"), "what nothing refers to stays counted: the bad entry may once have")
NOT_ALONE = {"all": "a refcount block that somebody else refers to is not written to"}
STILL_SHARED = "when one of the two owners gives it up, the other's entry does not say that it is the only one"
GIVEN_UP = {"all": "QEMU does not replace it"}

OWN = 3 << 20  # only the disk's since the last snapshot was taken before it was written
SHARED = 128 << 10  # the disk's and both snapshots'

CASES = [
    Case("nothing", lambda v: None),
    Case("a leak: an entry is gone", lambda v: v.put(v.entry(OWN), 0)),
    Case("a leak: a shared entry is gone", lambda v: v.put(v.entry(SHARED), 0)),
    Case("a leak past the end", lambda v: v.count(v.end() + 5 * CLUSTER, 1)),
    Case("counted too often", lambda v: v.count(v.data(OWN), 9)),
    Case("a data cluster counted too seldom", lambda v: v.count(v.data(SHARED), 1)),
    Case("a data cluster not counted", lambda v: v.count(v.data(1 << 20), 0)),
    Case("a compressed cluster not counted", lambda v: v.count(v.data(2 << 20) & -CLUSTER, 0)),
    Case("an L2 table not counted", lambda v: v.count(v.meta.l1()[0] & OFFSET_MASK, 0)),
    Case("the L1 table not counted", lambda v: v.count(v.meta.get("l1_table_offset"), 0)),
    Case("the header not counted", lambda v: v.count(0, 0)),
    Case("a refcount block that does not count itself", lambda v: v.count(v.meta.refcount_table()[0], 0)),
    Case("COPIED missing", lambda v: v.flip(v.entry(1 << 20)), FLAGS),
    Case("COPIED on a shared cluster", lambda v: v.flip(v.entry(SHARED)), FLAGS),
    Case("COPIED on a shared table", lambda v: v.flip(v.meta.snapshots()[0].l1_offset)),
    Case("COPIED wrong in the L1 table", lambda v: v.flip(v.meta.get("l1_table_offset")), FLAGS),
    Case("two entries, one cluster", lambda v: v.put(v.entry(OWN), v.data(1 << 20) | COPIED), unusable=STILL_SHARED),
    Case(
        "two L1 entries, one table",
        lambda v: v.put(v.meta.get("l1_table_offset") + 8, v.meta.l1()[0]),
        unusable=STILL_SHARED,
    ),
    Case("data at the L1 table", lambda v: v.put(v.entry(OWN), v.meta.get("l1_table_offset") | COPIED), HIDDEN),
    Case(
        "data at the refcount table",
        lambda v: v.put(v.entry(OWN), v.meta.get("refcount_table_offset") | COPIED),
        HIDDEN,
    ),
    Case("data at a refcount block", lambda v: v.put(v.entry(OWN), v.meta.refcount_table()[0] | COPIED), NOT_ALONE),
    Case("data at an L2 table", lambda v: v.put(v.entry(OWN), v.meta.l1()[0] & OFFSET_MASK | COPIED), HIDDEN),
    Case("data past the end", lambda v: v.put(v.entry(OWN), v.end() + (1 << 20) | COPIED), HIDDEN),
    Case("data far past the end", lambda v: v.put(v.entry(OWN), 1 << 50 | COPIED), HIDDEN),
    Case(
        "an L2 table past the end",
        lambda v: v.put(v.meta.get("l1_table_offset") + 8, v.end() + (1 << 20) | COPIED),
        HIDDEN,
    ),
    Case("an unaligned entry", lambda v: v.put(v.entry(OWN), v.data(OWN) + SECTOR | COPIED)),
    Case("an unaligned zero cluster", lambda v: v.put(v.entry(OWN), v.data(OWN) + SECTOR | ZERO | COPIED)),
    Case("a snapshot's unaligned zero cluster", lambda v: v.put(v.of_snapshot(SHARED), v.data(SHARED) + SECTOR | ZERO)),
    Case("a reserved bit", lambda v: v.put(v.entry(OWN), v.data(OWN) | 1 << 56 | COPIED)),
    Case(
        "a snapshot's table past the end", lambda v: v.put(v.meta.snapshots()[0].l1_offset, v.end() + (1 << 20)), HIDDEN
    ),
    Case("no refcount block", lambda v: v.put(v.meta.get("refcount_table_offset"), 0)),
    Case(
        "an unaligned refcount block", lambda v: v.put(v.meta.get("refcount_table_offset"), CLUSTER + SECTOR), GIVEN_UP
    ),
    Case("a refcount block past the end", lambda v: v.put(v.meta.get("refcount_table_offset"), 1 << 40)),
    Case(
        "a refcount block at a data cluster",
        lambda v: v.put(v.meta.get("refcount_table_offset"), v.data(OWN)),
        NOT_ALONE,
    ),
    Case("a refcount block of zeroes", lambda v: v.fill(v.meta.refcount_table()[0], 0)),
    Case("a refcount block of garbage", lambda v: v.fill(v.meta.refcount_table()[0], 0xA5)),
    Case("the dirty bit", lambda v: v.header("incompatible_features", DIRTY)),
    Case("the dirty bit and low counts", lambda v: (v.header("incompatible_features", DIRTY), v.count(v.data(OWN), 0))),
    Case("the corrupt bit", lambda v: v.header("incompatible_features", 2)),
]


def salvage(path: Path) -> bytes:
    """The disk as QEMU reads it; what it cannot read is zero."""
    raw = path.with_name(path.name + ".raw")
    qemu.img("convert", "-q", "--salvage", "-f", "qcow2", "-O", "raw", path, raw)
    return raw.read_bytes()


def findings(path: Path) -> tuple[int, int]:
    """Corruptions and leaks, as QEMU counts them."""
    text = qemu.img("check", "--output=json", "-f", "qcow2", path, ok=(0, 1, 2, 3))
    report = json.loads(text)
    return report.get("corruptions", 0) + report.get("check-errors", 0), report.get("leaks", 0)


def lost(expected: bytes, got: bytes) -> set[int]:
    """The sectors that differ."""
    return {at for at in range(0, len(expected), SECTOR) if expected[at : at + SECTOR] != got[at : at + SECTOR]}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Patient:
    return Patient(tmp_path_factory.mktemp("healthy") / "healthy.qcow2")


@pytest.mark.parametrize("mode", ["leaks", "all"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_repair_beside_qemu(healthy: Patient, tmp_path: Path, case: Case, mode: Literal["leaks", "all"]) -> None:
    patient = healthy.another(tmp_path / "damaged.qcow2")
    case.damage(patient)
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    shutil.copy(patient.path, ours)
    shutil.copy(patient.path, theirs)
    qemu.img("check", "-q", "-r", mode, "-f", "qcow2", theirs, ok=(0, 1, 2, 3))
    report = qcow_recycler.check(ours, repair=mode)

    kept = salvage(ours)
    # Nothing is lost that QEMU's repair keeps.
    assert lost(patient.disk, kept) <= lost(patient.disk, salvage(theirs))
    # What is left is the same, or there is a reason.
    left = findings(ours)
    if mode in case.differs:
        assert left != findings(theirs), f"they agree by now: {case.differs[mode]}"
    else:
        assert left == findings(theirs)
    # The report tells the truth, and there is nothing to do for a second repair.
    again = qcow_recycler.check(ours)
    assert again.corruptions == report.corruptions - report.corruptions_fixed, again.messages
    assert again.leaks == report.leaks - report.leaks_fixed, again.messages
    before = digest(ours)
    qcow_recycler.check(ours, repair=mode)
    assert digest(ours) == before, "a second repair changed the file"
    # What is whole again can be used.
    if mode == "all" and not report.corruptions - report.corruptions_fixed and not case.unusable:
        held = patient.snapshot if mode in case.differs else qemu.contents(theirs, snapshot="one")
        with qcow_recycler.open(ours) as image:
            image.write(OWN, b"\x77" * CLUSTER)
            image.write(SHARED, b"\x88" * CLUSTER)
            image.discard(0, 16 * CLUSTER)
            image.compact()
        expected = bytearray(kept)
        expected[OWN : OWN + CLUSTER] = b"\x77" * CLUSTER
        expected[SHARED : SHARED + CLUSTER] = b"\x88" * CLUSTER
        expected[: 16 * CLUSTER] = bytes(16 * CLUSTER)
        qemu.assert_contents(ours, expected)
        qemu.assert_contents(ours, held, snapshot="one")
        assert qemu.check(ours).corruptions == 0


@pytest.mark.parametrize("allocated", [0, 0b1010], ids=["nothing stored", "something stored"])
def test_an_unaligned_cluster_of_extended_entries(tmp_path: Path, allocated: int) -> None:
    """It loses its place if no subcluster is stored there, as QEMU has it; otherwise it stays as it is."""
    path, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    qemu.create(path, 4 << 20, cluster_size=64 << 10, extended_l2="on")
    qemu.io(path, "write -P 0x11 0 1M")
    meta = Qcow2(path)
    at, entry = meta.mapping(256 << 10)
    zeroes = 0xF0 << 32 | allocated
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(((entry & OFFSET_MASK) + SECTOR | COPIED).to_bytes(8, "big") + zeroes.to_bytes(8, "big"))
    shutil.copy(path, theirs)
    qemu.img("check", "-q", "-r", "all", "-f", "qcow2", theirs, ok=(0, 1, 2, 3))
    report = qcow_recycler.check(path, repair="all")
    assert findings(path) == findings(theirs)
    fixed = report.corruptions == report.corruptions_fixed
    assert fixed == (allocated == 0), report.messages
    assert (Qcow2(path).mapping(256 << 10)[1] & OFFSET_MASK == 0) == fixed
    assert Qcow2(path).subclusters(256 << 10) == zeroes
    assert salvage(path) == salvage(theirs)


@pytest.mark.parametrize("bits", [1, 2])
def test_more_references_than_a_count_can_hold(tmp_path: Path, bits: int) -> None:
    """What they refer to stays, and stays an error; QEMU cannot count them either."""
    path, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    qemu.create(path, 4 << 20, cluster_size=CLUSTER, refcount_bits=bits)
    qemu.io(path, "write -q -P 0x11 0 1M", "write -q -P 0x22 1M 1M")
    meta = Qcow2(path)
    shared = meta.mapping(0)[1]
    with open(path, "r+b") as file:
        for guest in range(1, 1 << bits):
            file.seek(meta.mapping(guest * CLUSTER)[0])
            file.write(shared.to_bytes(8, "big"))
    shutil.copy(path, theirs)
    disk = qemu.contents(path)
    qemu.img("check", "-q", "-r", "all", "-f", "qcow2", theirs, ok=(0, 1, 2, 3))
    report = qcow_recycler.check(path, repair="all")
    assert report.corruptions > report.corruptions_fixed, report.messages
    assert lost(disk, salvage(path)) <= lost(disk, salvage(theirs))
    before = digest(path)
    again = qcow_recycler.check(path, repair="all")
    assert (again.corruptions_fixed, again.leaks_fixed) == (0, 0), again.messages
    assert digest(path) == before
