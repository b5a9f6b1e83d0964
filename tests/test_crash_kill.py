"""SIGKILL at any moment: QEMU finds no corruption, what was flushed is there, and the next open reclaims every leak.

A killed process loses what it had in memory, not what it had written: this finds metadata that is written back in a
wrong order or not at all. Power cuts, which also lose what was written and not flushed, are simulated in the core's own
tests.
"""

from __future__ import annotations

import os
import random
import select
import shutil
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from crash_child import SECTOR

import guest
import qcow_recycler
import qemu
from qcow2 import DIRTY, Qcow2

CHILD = Path(__file__).with_name("crash_child.py")
CONFIG = "compact_after_unmaps=128;keep_erased=256;settle_ms=3;flush_ms=10"
KILLS = 5


@dataclass
class Sectors:
    """For each sector what it may hold after a crash, as versions (0: zeroes): the last flushed one, and all since."""

    size: int
    allowed: dict[int, set[int]] = field(default_factory=dict)
    highest: int = 0

    def may_hold(self, sector: int) -> set[int]:
        return self.allowed.setdefault(sector, {0})

    def follow(self, told: bytes) -> None:
        """Takes in what a child told before it was killed; a last line without its end was never acted upon."""
        since: list[tuple[int, int, int]] = []
        covered = 0
        for line in told.split(b"\n")[:-1]:
            words = line.decode().split()
            if words[0] in ("w", "z"):
                offset, length = int(words[1]), int(words[2])
                version = int(words[3]) if words[0] == "w" else 0
                self.highest = max(self.highest, version)
                since.append((offset, length, version))
            elif words[0] == "f":
                covered = len(since)
            elif words[0] == "F":
                for offset, length, version in since[:covered]:
                    for sector in range(offset // SECTOR, (offset + length) // SECTOR):
                        self.allowed[sector] = {version}
                del since[:covered]
        for offset, length, version in since:
            for sector in range(offset // SECTOR, (offset + length) // SECTOR):
                self.may_hold(sector).add(version)

    def settle(self, contents: bytes) -> None:
        """Every sector holds something it may hold; that is what it holds from now on."""
        zero = bytes(SECTOR)
        for sector in range(self.size // SECTOR):
            content = contents[sector * SECTOR : (sector + 1) * SECTOR]
            allowed = self.may_hold(sector)
            if content == zero:
                version = 0
            else:
                at, version = struct.unpack_from("<QQ", content)
                assert content == content[:16] * (SECTOR // 16), f"sector {sector:#x} is torn: {content[:32].hex()}"
                assert at == sector * SECTOR, f"sector {sector:#x} holds data of sector {at // SECTOR:#x}"
            assert version in allowed, f"sector {sector:#x} holds version {version}, may hold {sorted(allowed)}"
            self.allowed[sector] = {version}


def work_and_kill(path: Path, seed: int, version: int, seconds: float) -> bytes:
    """Lets a child work for so long, kills it, and gives what it told."""
    command = [sys.executable, str(CHILD), str(path), str(seed), str(version), CONFIG]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as child:
        assert child.stdout and child.stderr
        told = child.stdout.read(5)
        assert told == b"open\n", f"the child could not open the image: {told.decode()} {child.stderr.read().decode()}"
        deadline = time.monotonic() + seconds
        # Read all the while: a child that waits for its pipe's reader would always be killed there.
        told = b""
        while (left := deadline - time.monotonic()) > 0:
            if select.select([child.stdout], [], [], left)[0]:
                more = os.read(child.stdout.fileno(), 1 << 16)
                if not more:
                    raise AssertionError(f"the child ended by itself: {child.stderr.read().decode()[-3000:]}")
                told += more
        child.kill()
        while more := os.read(child.stdout.fileno(), 1 << 16):
            told += more
    return told


def survive(path: Path, sectors: Sectors, seed: int, rng: random.Random) -> None:
    """One kill, and everything that must be true afterwards."""
    told = work_and_kill(path, seed, sectors.highest, rng.uniform(0.02, 0.6))
    sectors.follow(told)
    lazy = bool(Qcow2(path).get("compatible_features") & 1)
    # QEMU first, on a copy, so that what the library repairs cannot hide what it left.
    copy = path.with_name("after.qcow2")
    shutil.copy(path, copy)
    found = qemu.check(copy)
    if lazy and Qcow2(copy).get("incompatible_features") & DIRTY:
        # Stale refcounts are what the dirty bit announces: QEMU puts them right when it opens the image.
        qemu.check(copy, repair="all")
        found = qemu.check(copy)
    assert not found.corruptions and not found.check_errors, f"after the kill: {found}"
    seen = qemu.contents(copy)
    copy.unlink()
    sectors.settle(seen)
    with qcow_recycler.open(path) as image:
        assert image.read(0, sectors.size) == seen
    assert not Qcow2(path).get("incompatible_features") & DIRTY
    qemu.assert_clean(path)
    qemu.assert_contents(path, seen)


KINDS = [(512, 16, False, 3), (4096, 1, False, 3), (65536, 16, False, 3), (65536, 16, True, 3), (16384, 16, False, 2)]


@pytest.mark.parametrize(
    ("cluster_size", "refcount_bits", "lazy", "version"),
    KINDS,
    ids=["512", "4k-1bit", "64k", "64k-lazy", "16k-version-2"],
)
@pytest.mark.parametrize("seed", guest.seeds(1))
def test_kill(image_path: Path, seed: int, cluster_size: int, refcount_bits: int, lazy: bool, version: int) -> None:
    size = (4 << 20) if cluster_size < 4096 else (16 << 20)
    qcow_recycler.create(
        image_path,
        size,
        cluster_size=cluster_size,
        refcount_bits=refcount_bits,
        lazy_refcounts=lazy,
        version=version,
    )
    sectors = Sectors(size)
    kills = 0
    for each in guest.stretch(seed, len(KINDS)):
        rng = random.Random(each)
        # On one image throughout: what one crash leaves is what the next begins with.
        for n in range(KILLS):
            survive(image_path, sectors, each * KILLS + n, rng)
            kills += 1
    print(f"soak: kills={kills}")
