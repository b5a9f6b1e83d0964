"""Power cuts on a device that really loses what was not flushed, under the unmodified library.

A guest works on the file of a FUSE filesystem that keeps every change since the last fsync in doubt. Its power is cut
at a random moment; each of several files that the cut could have left (any subset of the sectors written, the lengths
set and the holes punched since) must be a sound image that holds everything flushed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import guest
import lossy_disk
from clib import Installed
from crash import KINDS, Child, Kind, Victim, rest

pytestmark = [
    pytest.mark.timeout(1900),
    pytest.mark.skipif(bool(lossy_disk.why_not()), reason=lossy_disk.why_not()),
]

CUTS = 3
# Files tried of each cut.
OUTCOMES = 3
# A device that lies about its flushes must be found out in so many cuts.
LIES = 40


@pytest.fixture(scope="session")
def lossy() -> Path:
    return lossy_disk.build()


def cut(
    disk: lossy_disk.LossyDisk, victim: Victim, seed: int, program: Path, installed: Installed, rng: random.Random
) -> Iterator[tuple[Path, int]]:
    """Lets a guest work on the image until the power is cut; gives files that this could leave, and what each lost."""
    disk.load(victim.path)
    child = Child(victim, disk.file, seed, program, installed)
    try:
        child.work(rest(rng))
        disk.cut()
    finally:
        told = child.kill()
    victim.sectors.follow(told)
    left = victim.path.with_name("left.qcow2")
    for n in range(OUTCOMES):
        lost = disk.image(seed * OUTCOMES + n, left)
        yield left, lost


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("seed", guest.seeds(1))
def test_power_loss(
    tmp_path: Path, image_path: Path, installed: Installed, crash_guest: Path, lossy: Path, seed: int, kind: Kind
) -> None:
    victim = Victim.create(kind, image_path)
    cuts, losses = 0, 0
    with lossy_disk.mounted(lossy, tmp_path / "mnt") as disk:
        for each in guest.stretch(seed, len(KINDS)):
            rng = random.Random(each)
            # On one image throughout: what one cut leaves is what the next begins with.
            for n in range(CUTS):
                number = each * CUTS + n
                for left, lost in cut(disk, victim, number, crash_guest, installed, rng):
                    held = victim.assert_survived(left)
                    losses += bool(lost)
                victim.sectors.allowed = held
                left.replace(image_path)
                cuts += 1
    print(f"soak: power_cuts={cuts} lossy_outcomes={losses}")


def test_a_device_that_lies_is_found_out(
    tmp_path: Path, image_path: Path, installed: Installed, crash_guest: Path, lossy: Path
) -> None:
    """The same eyes on a device that says it has flushed and has not: were nothing found, nothing could be."""
    victim = Victim.create(Kind("64k"), image_path)
    rng = random.Random(1)
    with lossy_disk.mounted(lossy, tmp_path / "mnt", "--lie") as disk:
        for n in range(LIES):
            # Every time from the sound image, since damage is not what the next cut may begin with.
            victim.sectors.allowed.clear()
            for left, lost in cut(disk, victim, n, crash_guest, installed, rng):
                try:
                    victim.assert_survived(left)
                except Exception as e:
                    print(f"found after {n + 1} cuts, {lost} changes lost: {e}")
                    return
    raise AssertionError(f"a device that lies was not found out in {LIES} cuts")
