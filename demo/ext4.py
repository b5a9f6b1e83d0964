"""A real ext4 filesystem, looked at and changed from outside with e2fsprogs. Blocks are of 4096 bytes."""

from __future__ import annotations

import os
import random
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from programs import DemoError, run

BLOCK = 4096
# The last directory of all, so that it lies at the end of the image, where the recycler works.
LIVE_FILE = "/var/guest/live.bin"

_ROOTS = ("/usr/share", "/usr/lib", "/usr/bin", "/usr/local", "/opt")
_SMALLEST, _LARGEST = 16 << 10, 8 << 20
# What debugfs takes as one word.
_PLAIN = re.compile(r"[A-Za-z0-9._+@:=~,/-]+\Z")
_LEAF = re.compile(r"^\s*(\d+)/\s*(\d+)\s+\d+/\s*\d+\s+(\d+)\s*-\s*(\d+)\s+(\d+)\s*-\s*(\d+)\s+(\d+)", re.MULTILINE)
_FREE = re.compile(r"^\s+Free blocks: (.+)$", re.MULTILINE)


class Run(NamedTuple):
    """Blocks that follow one another."""

    first: int
    size: int

    @property
    def offset(self) -> int:
        return self.first * BLOCK

    @property
    def length(self) -> int:
        return self.size * BLOCK

    @property
    def end(self) -> int:
        return self.first + self.size


def runs_of(blocks: list[int]) -> list[Run]:
    """Return sorted block numbers as runs."""
    runs: list[Run] = []
    for block in blocks:
        if runs and runs[-1].end == block:
            runs[-1] = Run(runs[-1].first, runs[-1].size + 1)
        else:
            runs.append(Run(block, 1))
    return runs


def machine_files(budget: int, chance: random.Random) -> list[tuple[str, int]]:
    """Choose ordinary files of this machine, `budget` bytes of them at most, as (path, size)."""
    found: list[tuple[str, int]] = []
    for root in _ROOTS:
        for directory, _, names in os.walk(root):
            for name in names:
                path = os.path.join(directory, name)
                try:
                    status = os.lstat(path)
                except OSError:
                    continue
                if (
                    stat.S_ISREG(status.st_mode)
                    and _SMALLEST <= status.st_size <= _LARGEST
                    and os.access(path, os.R_OK)
                    and _PLAIN.match(path)
                ):
                    found.append((path, status.st_size))
    found.sort()
    chance.shuffle(found)
    chosen, total = [], 0
    for path, size in found:
        if total + size <= budget:
            chosen.append((path, size))
            total += size
    return sorted(chosen)


def build(raw: Path, stage: Path, files: list[tuple[str, int]], live_size: int) -> None:
    """Make the filesystem `raw` with copies of `files`, and LIVE_FILE of `live_size` bytes."""
    total = live_size
    for path, size in files:
        copy = stage / path.lstrip("/")
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
        total += size + BLOCK
    live = stage / LIVE_FILE.lstrip("/")
    live.parent.mkdir(parents=True, exist_ok=True)
    live.write_bytes(os.urandom(live_size))
    # A fifth of it free, as on a disk in use, and room for the journal and the tables.
    size = total * 5 // 4 + (64 << 20)
    inodes = 2 * len(files) + 4096
    run(
        "mke2fs",
        "-q",
        "-F",
        "-t",
        "ext4",
        "-b",
        str(BLOCK),
        "-N",
        str(inodes),
        "-d",
        str(stage),
        str(raw),
        f"{size >> 10}k",
    )
    shutil.rmtree(stage)


def blocks_of(raw: Path, path: str) -> list[Run]:
    """Return where the file `path` is, in the order of its contents."""
    runs = []
    for level, depth, first_logical, last_logical, first, last, count in _LEAF.findall(
        run("debugfs", "-R", f"dump_extents -l {path}", str(raw))
    ):
        if level == depth:
            if not int(last) - int(first) == int(last_logical) - int(first_logical) == int(count) - 1:
                raise DemoError(f"debugfs describes an extent of {path} that makes no sense")
            runs.append(Run(int(first), int(count)))
    return runs


def free_blocks(raw: Path) -> list[Run]:
    """Return what the filesystem calls free, as long runs as there are."""
    parts = []
    for line in _FREE.findall(run("dumpe2fs", str(raw))):
        for part in line.split(", "):
            first, _, last = part.partition("-")
            parts.append(Run(int(first), int(last or first) - int(first) + 1))
    merged: list[Run] = []
    for part in sorted(parts):
        if merged and merged[-1].end == part.first:
            merged[-1] = Run(merged[-1].first, merged[-1].size + part.size)
        else:
            merged.append(part)
    return merged


def delete(raw: Path, paths: list[str]) -> None:
    """Delete files inside the filesystem."""
    commands = raw.with_suffix(".debugfs")
    commands.write_text("".join(f"rm {path}\n" for path in paths))
    run("debugfs", "-w", "-f", str(commands), str(raw))
    commands.unlink()


def changed_blocks(old: Path, new: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the new contents of each block that differs."""
    chunk = 1 << 20
    with old.open("rb") as old_file, new.open("rb") as new_file:
        base = 0
        while new_chunk := new_file.read(chunk):
            old_chunk = old_file.read(chunk)
            if old_chunk != new_chunk:
                for at in range(0, len(new_chunk), BLOCK):
                    block = new_chunk[at : at + BLOCK]
                    if block != old_chunk[at : at + BLOCK]:
                        yield (base + at) // BLOCK, block
            base += len(new_chunk)


def check(raw: Path) -> str:
    """Check the filesystem; return e2fsck's summary."""
    output = run("e2fsck", "-f", "-n", str(raw))
    return output.strip().splitlines()[-1].removeprefix(f"{raw}: ")
