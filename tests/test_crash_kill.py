"""SIGKILL at any moment: QEMU finds no corruption, what was flushed is there, and the next open reclaims every leak.

A killed process loses what it had in memory, not what it had written: this finds metadata that is written back in a
wrong order or not at all. Power cuts, which also lose what was written and not flushed, are in test_power_loss.py and,
simulated, in the core's own tests.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

import guest
from clib import Installed
from crash import KINDS, Child, Kind, Victim, rest

pytestmark = pytest.mark.timeout(1900)

KILLS = 4


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("seed", guest.seeds(1))
def test_kill(image_path: Path, installed: Installed, crash_guest: Path, seed: int, kind: Kind) -> None:
    victim = Victim.create(kind, image_path)
    kills = 0
    for each in guest.stretch(seed, len(KINDS)):
        rng = random.Random(each)
        # On one image throughout: what one crash leaves is what the next begins with.
        for n in range(KILLS):
            child = Child(victim, image_path, each * KILLS + n, crash_guest, installed)
            try:
                child.work(rest(rng))
            finally:
                told = child.kill()
            victim.sectors.follow(told)
            victim.sectors.allowed = victim.assert_survived(image_path)
            kills += 1
    print(f"soak: kills={kills}")
