"""Images made to mislead: each gets a clear error that names the place, soon, in little memory, and is left as it was.

The cases are the hostile lines of the qcow2 specification's limits and of what went wrong in other implementations.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import qcow_recycler
import qemu
from damage import CLUSTER, Victim, digest
from qcow2 import COMPRESSED, COPIED, DIRTY, EXTENSION_BITMAPS, HEADER, OFFSET_MASK, ZERO, Qcow2

CHILD = Path(__file__).with_name("hostile_child.py")
# An L1 table and a refcount table may be of 32 and of 8 MiB; the limit of the child's address space is larger.
MEMORY = 96 << 20
HUGE64 = (1 << 63) - CLUSTER


def meet(mode: str, path: Path, guest_offset: int = 0) -> dict[str, dict]:
    """What the library does with an image, in a process with little memory. It must neither crash nor take its time."""
    result = subprocess.run(
        [sys.executable, str(CHILD), mode, str(path), str(guest_offset)], capture_output=True, timeout=60, check=False
    )
    assert result.returncode == 0, f"{mode}: {result.stdout.decode()}\n{result.stderr.decode()[-3000:]}"
    told = json.loads(result.stdout)
    assert told["grown"] < MEMORY, f"{mode}: {told['grown']} bytes of memory"
    steps: dict[str, dict] = told["steps"]
    for name, step in steps.items():
        # Cutting a long file off takes its bounded steps.
        limit = 20 if name == "compact" else 1
        assert step["seconds"] < limit, f"{mode}: {name} took {step['seconds']:.2f} s"
    return steps


@pytest.fixture
def victim(image_path: Path) -> Victim:
    return Victim(image_path)


def assert_refused(path: Path, *, field: str | None = None, offset: int | None = None, words: str = "") -> None:
    """Opening fails, for reading and for writing; checking fails or finds it; the file is as it was."""
    before = digest(path)
    for mode in ("open", "write-open"):
        error = meet(mode, path)["open"]["error"]
        assert error, f"{mode}: opened without an error"
        if field is not None:
            assert error["field"] == field, error
        if offset is not None:
            assert error["offset"] == offset, error
        assert words in error["message"], error
    check = meet("check", path)["check"]
    assert check["error"] or check["corruptions"], "the check finds nothing wrong"
    assert digest(path) == before, "the file was changed"


# --- header ---------------------------------------------------------------------------------------------------------


@dataclass
class Field:
    """A header field with a value that must not be believed. The error names the field and its place in the file, or
    those of another field, where the two contradict each other."""

    name: str
    value: int | Callable[[Qcow2], int]
    why: str
    blames: tuple[str, ...] = ()


FIELDS = [
    Field("magic", 0x514649FA, "not qcow2"),
    Field("version", 0, "no such version"),
    Field("version", 1, "the old qcow format"),
    Field("version", 4, "no such version"),
    Field("backing_file_offset", 8, "backing name inside the header", ("backing_file_size",)),
    Field("backing_file_offset", 1 << 40, "backing name beyond the first cluster"),
    Field("backing_file_offset", (1 << 64) - 8, "offset plus length overflows"),
    Field("cluster_bits", 8, "clusters of 256 bytes"),
    Field("cluster_bits", 22, "clusters of 4 MiB"),
    Field("cluster_bits", 64, "shift beyond the word"),
    Field("cluster_bits", 0xFFFFFFFF, "shift beyond the word"),
    Field("size", 1 << 40, "larger than the L1 table maps (CVE-2014-0147)", ("l1_size",)),
    Field("size", (1 << 64) - 512, "negative as a signed number", ("l1_size",)),
    Field("crypt_method", 3, "no such encryption"),
    Field("l1_size", 0, "no L1 table for a disk that has a size"),
    Field("l1_size", 1, "smaller than the disk needs"),
    Field("l1_size", (32 << 20) // 8 + 1, "over 32 MiB (CVE-2014-0144)"),
    Field("l1_size", 0xFFFFFFFF, "over 32 MiB (CVE-2014-0144)"),
    Field("l1_size", 1 << 20, "reaches past the end of the file", ("l1_table_offset",)),
    Field("l1_table_offset", 0, "on the header"),
    Field("l1_table_offset", CLUSTER + 8, "unaligned"),
    Field("l1_table_offset", 1 << 40, "past the end of the file", ("l1_size",)),
    Field("l1_table_offset", HUGE64, "beyond the format's reach"),
    Field(
        "l1_table_offset", lambda q: q.get("refcount_table_offset"), "on the refcount table", ("refcount_table_offset",)
    ),
    Field("refcount_table_offset", 0, "on the header"),
    Field("refcount_table_offset", CLUSTER + 512, "unaligned"),
    Field("refcount_table_offset", 1 << 40, "past the end of the file", ("refcount_table_clusters",)),
    Field("refcount_table_offset", HUGE64, "beyond the format's reach"),
    Field("refcount_table_offset", lambda q: q.get("l1_table_offset"), "on the L1 table", ("l1_table_offset",)),
    Field("refcount_table_clusters", 0, "no refcount table"),
    Field("refcount_table_clusters", (8 << 20) // CLUSTER + 1, "over 8 MiB (CVE-2014-0143)"),
    Field("refcount_table_clusters", 0x80000000, "over 8 MiB (CVE-2014-0143)"),
    Field("refcount_table_clusters", 0xFFFFFFFF, "over 8 MiB (CVE-2014-0143)"),
    Field("refcount_table_clusters", 2048, "reaches past the end of the file", ("refcount_table_offset",)),
    Field("nb_snapshots", 65537, "more snapshots than the format allows (CVE-2014-0145)"),
    Field("nb_snapshots", 0xFFFFFFFF, "more snapshots than the format allows (CVE-2014-0145)"),
    Field("nb_snapshots", 1, "a snapshot table at offset 0, on the header", ("snapshots_offset",)),
    Field("incompatible_features", 1 << 5, "an unknown incompatible feature"),
    Field("incompatible_features", 1 << 63, "an unknown incompatible feature"),
    Field("refcount_order", 7, "refcounts of 128 bits"),
    Field("refcount_order", 0xFFFFFFFF, "shift beyond the word"),
    Field("header_length", 0, "shorter than version 3's fields"),
    Field("header_length", 96, "shorter than version 3's fields"),
    Field("header_length", 109, "not a multiple of 8"),
    Field("header_length", CLUSTER + 8, "longer than the first cluster"),
    Field("header_length", 0xFFFFFFF8, "longer than the first cluster"),
    Field("compression_type", 1, "zstd without its incompatible bit"),
    Field("compression_type", 2, "no such compression"),
]


@pytest.mark.parametrize("case", FIELDS, ids=lambda c: f"{c.name}-{c.why}".replace(" ", "-"))
def test_header_field(victim: Victim, case: Field) -> None:
    if case.name == "backing_file_offset":
        victim.header("backing_file_size", 16)
    value = case.value if isinstance(case.value, int) else case.value(victim.meta)
    victim.header(case.name, value)
    before = digest(victim.path)
    for mode in ("open", "write-open"):
        error = meet(mode, victim.path)["open"]["error"]
        assert error, f"{mode}: opened although {case.name} = {value:#x} ({case.why})"
        if case.name == "incompatible_features":
            assert error["errno"] == 95, error
            continue
        named = {case.name, *case.blames}
        assert error["field"] in named or any(n in error["message"] for n in named), error
        if error["field"] in HEADER:
            assert error["offset"] == HEADER[error["field"]][0], error
    check = meet("check", victim.path)["check"]
    assert check["error"] or check["corruptions"]
    assert digest(victim.path) == before


def test_backing_name_too_long(victim: Victim) -> None:
    victim.header("backing_file_offset", 512)
    at = victim.header("backing_file_size", 1024)
    assert_refused(victim.path, field="backing_file_size", offset=at)


def test_compression_bit_without_a_type(victim: Victim) -> None:
    victim.header("incompatible_features", 1 << 3)
    assert_refused(victim.path, words="ompression")


@pytest.mark.parametrize("length", [0, 1, 3, 4, 71, 72, 103, 104, 111, 512, 4095])
def test_truncated_header(victim: Victim, length: int) -> None:
    victim.path.write_bytes(victim.path.read_bytes()[:length])
    assert_refused(victim.path)


@pytest.mark.parametrize("value", [0xFFFFFFFF, 0xFFFFFFF0, CLUSTER, 1 << 20])
def test_header_extension_longer_than_the_first_cluster(victim: Victim, value: int) -> None:
    at = victim.meta.get("header_length")
    victim.put(at, 0x7E57AB1E, 4)
    victim.put(at + 4, value, 4)
    assert_refused(victim.path)


def test_the_unknown_feature_is_called_by_the_name_that_the_image_gives(image_path: Path) -> None:
    """The feature name table exists to tell users what is missing. QEMU writes one only where there is much room."""
    victim = Victim(image_path, cluster_size=65536)
    table = victim.extension(0x6803F857)
    entry = bytes([0, 40]) + b"quantum clusters".ljust(46, b"\0")
    with open(victim.path, "r+b") as file:
        os.pwrite(file.fileno(), entry, table)
    victim.header("incompatible_features", 1 << 40)
    assert_refused(victim.path, words="quantum clusters")


@pytest.mark.parametrize(
    ("field", "at", "width", "value"),
    [
        ("nb_bitmaps", 0, 4, 0),
        ("nb_bitmaps", 0, 4, 65536),
        ("nb_bitmaps", 0, 4, 0xFFFFFFFF),
        ("bitmap_directory_size", 8, 8, 1 << 40),
        ("bitmap_directory_size", 8, 8, (1 << 64) - 1),
        ("bitmap_directory_offset", 16, 8, 513),
        ("bitmap_directory_offset", 16, 8, 1 << 40),
        ("bitmap_directory_offset", 16, 8, 0),
    ],
)
def test_bitmaps_extension(image_path: Path, field: str, at: int, width: int, value: int) -> None:
    victim = Victim(image_path, bitmap=True)
    victim.put(victim.extension(EXTENSION_BITMAPS) + at, value, width)
    before = digest(image_path)
    error = meet("write-open", image_path)["open"]["error"]
    assert error and ("bitmap" in error["message"]), error
    check = meet("check", image_path)["check"]
    assert check["error"] or check["corruptions"]
    assert digest(image_path) == before


# --- snapshot table -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "at", "width", "value"),
    [
        ("l1_table_offset unaligned", 0, 8, CLUSTER + 8),
        ("l1_table_offset past the end", 0, 8, 1 << 40),
        ("l1_size over 32 MiB", 8, 4, 0xFFFFFFFF),
        ("l1_size past the end", 8, 4, 1 << 20),
        ("extra_data_size huge", 36, 4, 0xFFFFFFFF),
        ("extra_data_size over 1024", 36, 4, 1025),
        ("name_size past the end", 14, 2, 0xFFFF),
    ],
)
def test_snapshot_entry(image_path: Path, what: str, at: int, width: int, value: int) -> None:
    """The first of two entries is damaged: a wrong length also misplaces the second."""
    victim = Victim(image_path, snapshot=True)
    victim.put(victim.meta.snapshots()[0].at + at, value, width)
    before = digest(image_path)
    error = meet("write-open", image_path)["open"]["error"]
    assert error, f"opened for writing although {what}"
    check = meet("check", image_path)["check"]
    assert check["error"] or check["corruptions"], what
    assert digest(image_path) == before


@pytest.mark.parametrize("value", [CLUSTER + 8, 1 << 40, HUGE64])
def test_snapshot_table_offset(image_path: Path, value: int) -> None:
    victim = Victim(image_path, snapshot=True)
    at = victim.header("snapshots_offset", value)
    assert_refused(image_path, field="snapshots_offset", offset=at)


def test_more_snapshots_than_the_table_holds(image_path: Path) -> None:
    victim = Victim(image_path, snapshot=True)
    victim.header("nb_snapshots", 65536)
    before = digest(image_path)
    assert meet("write-open", image_path)["open"]["error"]
    assert digest(image_path) == before


TABLES = {
    "the header": lambda q: 0,
    "the L1 table": lambda q: q.get("l1_table_offset"),
    "the refcount table": lambda q: q.get("refcount_table_offset"),
    "a refcount block": lambda q: q.refcount_table()[0],
    "another snapshot's L1 table": lambda q: q.snapshots()[1].l1_offset,
    "an L2 table": lambda q: q.l1()[0] & OFFSET_MASK,
    "a data cluster": lambda q: q.mapping(0)[1] & OFFSET_MASK,
}


@pytest.mark.parametrize("target", TABLES)
@pytest.mark.parametrize("what", ["the snapshot table", "a snapshot's L1 table"])
def test_snapshot_tables_that_lie_on_others(image_path: Path, what: str, target: str) -> None:
    """Two tables at one place: whoever writes one of them destroys the other."""
    victim = Victim(image_path, snapshot=True)
    q = victim.meta
    offset = TABLES[target](q)
    if what == "the snapshot table":
        victim.header("snapshots_offset", offset)
    else:
        victim.put(q.snapshots()[0].at, offset)
    before = digest(image_path)
    check = meet("check", image_path)["check"]
    assert check["error"] or check["corruptions"], f"the check does not find {what} on {target}"
    steps = meet("write-open", image_path)
    assert steps["open"]["error"] or target == "a data cluster", f"opened for writing, with {what} on {target}"
    assert digest(image_path) == before


# --- tables ---------------------------------------------------------------------------------------------------------


def assert_contained(victim: Victim, protected: list[int], *, guest_offset: int = 0) -> None:
    """A damaged table: the check reports it and changes nothing; reading only changes nothing; and a guest that writes
    at the damaged place never reaches the protected host clusters, whatever errors it gets."""
    before = digest(victim.path)
    check = meet("check", victim.path)["check"]
    assert check["error"] or check["corruptions"], "the check finds nothing wrong"
    assert digest(victim.path) == before, "a check without repair changed the file"
    meet("open", victim.path)
    assert digest(victim.path) == before, "reading changed the file"
    kept = [victim.meta.bytes_at(offset, CLUSTER) for offset in protected]
    steps = meet("use", victim.path, guest_offset)
    if not steps["open"]["error"]:
        assert steps["write"]["error"] or steps["part"]["error"], f"the write went through: {steps}"
    for offset, old in zip(protected, kept):
        new = victim.meta.bytes_at(offset, CLUSTER)
        assert b"\xee" * 512 not in new and b"\xdd" * 512 not in new, f"guest data in the metadata at {offset:#x}"
        # Of the header, the feature bits may change while the image is open.
        if offset:
            assert new == old, f"the cluster at {offset:#x} changed"


ENTRIES = {
    "the L1 table": lambda q: q.get("l1_table_offset"),
    "the refcount table": lambda q: q.get("refcount_table_offset"),
    "a refcount block": lambda q: q.refcount_table()[0],
    "an L2 table": lambda q: q.l1()[0] & OFFSET_MASK,
}


@pytest.mark.parametrize("target", ENTRIES)
def test_an_l2_entry_that_points_at_metadata(victim: Victim, target: str) -> None:
    q = victim.meta
    offset = ENTRIES[target](q)
    victim.put(q.mapping(0)[0], offset | COPIED)
    assert_contained(victim, [0, offset])


@pytest.mark.parametrize("target", ["the L1 table", "the refcount table", "a refcount block"])
def test_an_l1_entry_that_points_at_metadata(victim: Victim, target: str) -> None:
    """Read as an L2 table, metadata maps the guest onto whatever it holds; the L1 table then is a loop."""
    q = victim.meta
    offset = ENTRIES[target](q)
    victim.put(q.get("l1_table_offset"), offset | COPIED)
    assert_contained(victim, [0, q.get("l1_table_offset"), q.get("refcount_table_offset"), q.refcount_table()[0]])


@pytest.mark.parametrize(
    "value",
    [
        COPIED | (1 << 40),
        COPIED | 0x00FF_FFFF_FFFF_F000,
        COPIED | (9 * CLUSTER + 512),
        COPIED | (1 << 56) | 9 * CLUSTER,
    ],
    ids=["past-the-end", "far-past-the-end", "unaligned", "reserved-bit"],
)
@pytest.mark.parametrize("level", ["l1", "l2"])
def test_an_entry_that_points_nowhere_sane(victim: Victim, level: str, value: int) -> None:
    q = victim.meta
    at = q.get("l1_table_offset") if level == "l1" else q.mapping(0)[0]
    victim.put(at, value)
    length = victim.path.stat().st_size
    check = meet("check", victim.path)["check"]
    assert check["error"] or check["corruptions"]
    protected = [0, q.get("l1_table_offset"), q.get("refcount_table_offset"), q.refcount_table()[0]]
    kept = [q.bytes_at(offset, CLUSTER) for offset in protected[1:3]]
    steps = meet("use", victim.path)
    if not steps["open"]["error"] and not value & (1 << 56):
        assert steps["read"]["error"], "read through an entry that points nowhere"
        assert steps["write"]["error"], "wrote through an entry that points nowhere"
    assert victim.path.stat().st_size < length + (1 << 20)
    assert [victim.meta.bytes_at(offset, CLUSTER) for offset in protected[1:3]] == kept


def test_two_l1_entries_with_one_l2_table(victim: Victim) -> None:
    """Both halves of the disk would change together."""
    q = victim.meta
    victim.put(q.get("l1_table_offset") + 8, q.l1()[0])
    before = digest(victim.path)
    assert meet("check", victim.path)["check"]["corruptions"]
    meet("open", victim.path)
    assert digest(victim.path) == before


def test_two_l2_entries_with_one_data_cluster(victim: Victim) -> None:
    q = victim.meta
    victim.put(q.mapping(CLUSTER)[0], q.mapping(0)[1])
    before = digest(victim.path)
    assert meet("check", victim.path)["check"]["corruptions"]
    meet("open", victim.path)
    assert digest(victim.path) == before


def test_bit_62_is_tested_before_bit_0_means_zero(victim: Victim) -> None:
    """In a compressed entry bit 0 belongs to the offset."""
    q = victim.meta
    victim.put(q.mapping(0)[0], COMPRESSED | (q.mapping(0)[1] & OFFSET_MASK) | ZERO)
    before = digest(victim.path)
    meet("open", victim.path)
    error = meet("write-open", victim.path)
    assert error["open"]["error"] or error["read"]["error"]
    assert digest(victim.path) == before


def test_a_compressed_entry_past_the_end(victim: Victim) -> None:
    victim.put(victim.meta.mapping(0)[0], COMPRESSED | (1 << 50) | (1 << 40))
    before = digest(victim.path)
    assert meet("check", victim.path)["check"]["corruptions"]
    steps = meet("write-open", victim.path)
    assert steps["open"]["error"] or steps["read"]["error"]
    assert digest(victim.path) == before


@pytest.mark.parametrize(
    "value",
    [0, 512, 1 << 40, 0x00FF_FFFF_FFFF_F000, (1 << 64) - CLUSTER],
    ids=["at-offset-0", "unaligned", "past-the-end", "far-past-the-end", "all-bits"],
)
def test_refcount_block(victim: Victim, value: int) -> None:
    """A block at offset 0 means that nothing is counted: an allocator that believes it hands out live clusters."""
    q = victim.meta
    victim.put(q.get("refcount_table_offset"), value)
    kept = [q.bytes_at(offset, CLUSTER) for offset in (q.get("l1_table_offset"), q.l1()[0] & OFFSET_MASK)]
    check = meet("check", victim.path)["check"]
    assert check["error"] or check["corruptions"]
    # A free guest cluster, so that the write allocates.
    meet("use", victim.path, 1 << 20)
    first = victim.meta.bytes_at(q.mapping(0)[1] & OFFSET_MASK, CLUSTER)
    assert first == b"\x11" * CLUSTER, "a live cluster was given away"
    assert victim.meta.bytes_at(0, 4) == b"QFI\xfb"
    assert victim.meta.bytes_at(q.get("l1_table_offset"), 8) == kept[0][:8]


@pytest.mark.parametrize("target", ["the L1 table", "the refcount table", "an L2 table"])
def test_a_refcount_block_on_other_metadata(victim: Victim, target: str) -> None:
    """Counting there would overwrite the table."""
    q = victim.meta
    offset = ENTRIES[target](q)
    victim.put(q.get("refcount_table_offset"), offset)
    before = digest(victim.path)
    check = meet("check", victim.path)["check"]
    assert check["error"] or check["corruptions"]
    assert digest(victim.path) == before
    kept = victim.meta.bytes_at(offset, CLUSTER)
    steps = meet("use", victim.path, 1 << 20)
    assert steps["open"]["error"] or steps["write"]["error"] or steps["flush"]["error"], steps
    assert victim.meta.bytes_at(offset, CLUSTER) == kept


def test_one_refcount_block_twice(victim: Victim) -> None:
    q = victim.meta
    victim.put(q.get("refcount_table_offset") + 8, q.refcount_table()[0])
    before = digest(victim.path)
    check = meet("check", victim.path)["check"]
    assert check["error"] or check["corruptions"]
    meet("open", victim.path)
    assert digest(victim.path) == before


def test_a_live_cluster_with_refcount_0(victim: Victim) -> None:
    """What a careless compactor leaves behind. Only a scan finds it: a check does, and the one asked for at open."""
    q = victim.meta
    host = q.mapping(0)[1] & OFFSET_MASK
    victim.put(q.refcount_table()[0] + host // CLUSTER * 2, 0, 2)
    before = digest(victim.path)
    check = meet("check", victim.path)["check"]
    assert check["corruptions"] and f"{host:#x}" in " ".join(check["messages"]), check
    steps = meet("checked-open", victim.path)
    assert steps["open"]["error"] and steps["open"]["error"]["errno"] == errno.EUCLEAN, steps
    assert digest(victim.path) == before
    qcow_recycler.check(victim.path, repair="all")
    qemu.assert_clean(victim.path)
    qemu.io(victim.path, "read -P 0x11 0 256k")


@pytest.mark.parametrize(
    "value",
    [1 << 40, (1 << 63) - CLUSTER, 9 * CLUSTER + 512, 9 * CLUSTER + 8],
    ids=["past-the-end", "far-past-the-end", "unaligned", "reserved-bits"],
)
@pytest.mark.parametrize("index", [0, 1])
def test_a_dirty_image_with_a_bad_refcount_table_entry(image_path: Path, index: int, value: int) -> None:
    """Opened for writing it is repaired, or refused and left alone; nothing of the disk is lost either way."""
    victim = Victim(image_path)
    victim.put(victim.meta.get("refcount_table_offset") + 8 * index, value)
    victim.header("incompatible_features", DIRTY)
    before = digest(image_path)
    steps = meet("write-open", image_path)
    if steps["open"]["error"]:
        assert digest(image_path) == before, "refused, and changed"
        qcow_recycler.check(image_path, repair="all")
    else:
        assert not steps["read"]["error"], steps
    qemu.assert_clean(image_path)
    qemu.io(image_path, "read -q -P 0x11 0 256k", "read -q -P 0x22 3M 64k")
    with qcow_recycler.open(image_path) as image:
        image.write(1 << 20, b"\5" * (1 << 20))
        image.compact()
    qemu.assert_clean(image_path)
    qemu.io(image_path, "read -q -P 0x11 0 256k", "read -q -P 5 1M 1M")


@pytest.mark.parametrize("change", ["write", "discard", "write_zeroes"])
def test_an_unaligned_zero_cluster(victim: Victim, change: str) -> None:
    """A change of it is refused and reaches none of its neighbours; a repair takes its place away."""
    at, entry = victim.meta.mapping(0)
    victim.put(at, (entry & OFFSET_MASK) + 512 | COPIED | ZERO)
    assert meet("check", victim.path)["check"]["corruptions"]
    with qcow_recycler.open(victim.path) as image:
        with pytest.raises(qcow_recycler.InvalidImage) as raised:
            image.write(0, b"\xee" * 512) if change == "write" else getattr(image, change)(0, CLUSTER)
        assert raised.value.offset == at
        image.write(CLUSTER, b"\5" * CLUSTER)
        image.compact()
    report = qcow_recycler.check(victim.path, repair="all")
    assert report.corruptions == report.corruptions_fixed and "not aligned" in " ".join(report.messages), report
    assert Qcow2(victim.path).mapping(0)[1] == ZERO
    qemu.assert_clean(victim.path)
    qemu.io(victim.path, "read -q -P 5 4k 4k", "read -q -P 0x11 8k 248k", "read -q -P 0x22 3M 64k", "read -q -P 0 0 4k")


def test_what_only_a_snapshot_uses_is_not_free_though_it_is_counted_so(image_path: Path) -> None:
    """A guest that allocates and a compaction find room elsewhere."""
    qemu.create(image_path, 8 << 20, cluster_size=CLUSTER)
    qemu.io(image_path, "write -P 0x11 0 1M")
    q = Qcow2(image_path)
    hosts = [q.mapping(at)[1] & OFFSET_MASK for at in range(0, 1 << 20, CLUSTER)]
    qemu.img("snapshot", "-c", "one", image_path)
    qemu.io(image_path, "write -P 0x22 0 1M", "write -P 0x33 4M 1M")
    block = Qcow2(image_path).refcount_table()[0]
    with open(image_path, "r+b") as file:
        for host in hosts[::2]:
            os.pwrite(file.fileno(), bytes(2), block + host // CLUSTER * 2)
    with qcow_recycler.open(image_path, config="keep_erased=1024;compact_after_unmaps=0") as image:
        image.discard(4 << 20, 1 << 20)
        image.compact()
        image.start()
        for at in range(2 << 20, 4 << 20, CLUSTER):
            image.write(at, b"\x44" * CLUSTER)
        image.flush()
        image.stop()
        image.compact()
    held = qemu.contents(image_path, snapshot="one")
    assert held == b"\x11" * (1 << 20) + bytes(7 << 20)


# --- size and time --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dirty", [False, True])
def test_a_claimed_petabyte_costs_nothing(image_path: Path, dirty: bool) -> None:
    """A small file that claims a huge disk: neither opening nor rebuilding refcounts may be sized by the claim."""
    qemu.create(image_path, 1 << 50, cluster_size=2 << 20, lazy_refcounts="on")
    qemu.io(image_path, "write -P 1 0 64k")
    if dirty:
        with open(image_path, "r+b") as file:
            os.pwrite(file.fileno(), DIRTY.to_bytes(8, "big"), HEADER["incompatible_features"][0])
    length = image_path.stat().st_size
    steps = meet("write-open", image_path)
    assert not steps["open"]["error"], steps
    assert image_path.stat().st_size <= length + (8 << 20), "opening made the image grow"
    check = meet("check", image_path)["check"]
    assert not check["error"] and not check["corruptions"], check


def test_a_sparse_file_of_a_terabyte_costs_nothing(victim: Victim) -> None:
    """A file's length is a claim too: the hole after the last cluster must not be walked, counted or kept in memory."""
    with open(victim.path, "r+b") as file:
        file.truncate(1 << 40)
    steps = meet("use", victim.path, 1 << 20)
    assert not any(step["error"] for step in steps.values()), steps
    check = meet("check", victim.path)["check"]
    assert not check["error"] and not check["corruptions"], check


# --- what is not supported is refused by name -----------------------------------------------------------------------


def assert_unsupported(path: Path, words: str) -> None:
    """Opening for writing fails and says which feature it is; nothing is changed."""
    before = digest(path)
    error = meet("write-open", path)["open"]["error"]
    assert error, "opened for writing"
    assert error["errno"] == 95, error
    assert words in error["message"].lower(), error
    assert digest(path) == before


@pytest.mark.parametrize("method", ["luks", "aes"])
def test_without_its_passphrase_an_encrypted_image_is_no_disk(image_path: Path, method: str) -> None:
    """There is no incompatible bit for encryption: only crypt_method tells. A guest must not get ciphertext, and what
    it writes must not be stored as it is."""
    iterations = {"encrypt.iter-time": 10} if method == "luks" else {}
    secret = {"encrypt.format": method, "encrypt.key-secret": "s", **iterations}
    options = ",".join(f"{k}={v}" for k, v in secret.items())
    qemu.img("create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=passphrase", "-o", options, image_path, "4M")
    qemu.io(image_path, "write -P 1 0 256k", passphrase="passphrase")
    before = digest(image_path)
    steps = meet("use", image_path)
    assert not steps["open"]["error"] and not steps["close"]["error"], steps
    for name in ("read", "write", "part"):
        error = steps[name]["error"]
        assert error and (error["type"], error["errno"]) == ("PassphraseNeeded", errno.ENOKEY), steps
    assert meet("open", image_path)["read"]["error"], "a guest would get ciphertext"
    assert qemu.contents(image_path, passphrase="passphrase")[4096 : 256 << 10] == b"\x01" * ((256 << 10) - 4096)
    assert digest(image_path) == before


def test_external_data_file(tmp_path: Path, image_path: Path) -> None:
    data = tmp_path / "data.raw"
    qemu.create(image_path, 4 << 20, data_file=data)
    qemu.io(image_path, "write -P 1 0 256k")
    before = digest(data), digest(image_path)
    for mode in ("open", "write-open"):
        error = meet(mode, image_path)["open"]["error"]
        assert error and error["errno"] == 1 and "external data file" in error["message"], error
    assert (digest(data), digest(image_path)) == before


def test_corrupt_bit(victim: Victim) -> None:
    """Set by whoever found corruption: the image is for reading only until it is repaired."""
    victim.header("incompatible_features", 1 << 1)
    before = digest(victim.path)
    error = meet("write-open", victim.path)["open"]["error"]
    assert error and "corrupt" in error["message"], error
    assert not meet("open", victim.path)["open"]["error"]
    assert digest(victim.path) == before


def test_zstd_without_compressed_clusters_is_kept(image_path: Path) -> None:
    """The compression type says how clusters would be compressed; an image without any can be used, and keeps it."""
    qemu.create(image_path, 4 << 20, compression_type="zstd")
    qemu.io(image_path, "write -P 1 0 256k")
    steps = meet("use", image_path, 1 << 20)
    assert not any(step["error"] for step in steps.values()), steps
    assert Qcow2(image_path).get("compression_type") == 1
    assert Qcow2(image_path).get("incompatible_features") == 1 << 3
    qemu.assert_clean(image_path)


def test_unknown_autoclear_bits_are_cleared_before_writing(victim: Victim) -> None:
    victim.header("autoclear_features", 1 << 40)
    before = digest(victim.path)
    meet("open", victim.path)
    assert digest(victim.path) == before
    steps = meet("use", victim.path, 1 << 20)
    assert not any(step["error"] for step in steps.values()), steps
    assert victim.meta.get("autoclear_features") == 0


def test_unknown_header_extensions_and_compatible_bits_survive(victim: Victim) -> None:
    at = victim.meta.get("header_length")
    # Before the feature name table, which is overwritten in part and stays a well-formed extension list.
    extension = (0x7E57AB1E).to_bytes(4, "big") + (5).to_bytes(4, "big") + b"hello\0\0\0" + bytes(8)
    with open(victim.path, "r+b") as file:
        os.pwrite(file.fileno(), extension, at)
    victim.header("compatible_features", 1 << 50)
    steps = meet("use", victim.path, 1 << 20)
    assert not any(step["error"] for step in steps.values()), steps
    assert victim.meta.bytes_at(at, len(extension)) == extension
    assert victim.meta.get("compatible_features") & (1 << 50)


# --- what is no image at all ----------------------------------------------------------------------------------------


def test_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "fifo", Path("/dev/null")):
        for mode in ("open", "write-open", "check"):
            (step,) = meet(mode, path).values()
            assert step["error"], f"{mode} of {path.name} succeeded"
