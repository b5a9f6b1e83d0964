"""The main job on a copy of somebody's own image: discard what is zero, compact, verify."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import oracle
import qcow_recycler
from programs import DemoError, run

MIB = 1 << 20


class _Line:
    """One line that is written over and over on a terminal, and once a second elsewhere."""

    def __init__(self) -> None:
        self._due = 0.0

    def show(self, text: str) -> None:
        now = time.monotonic()
        if now >= self._due:
            self._due = now + (0.1 if sys.stdout.isatty() else 1.0)
            print(f"\r  {text}\x1b[K" if sys.stdout.isatty() else f"  {text}", end="", flush=True)
            if not sys.stdout.isatty():
                print()

    def end(self) -> None:
        if sys.stdout.isatty():
            print("\r\x1b[K", end="", flush=True)


def _copy(image: Path, directory: Path) -> Path:
    copy = directory / "copy.qcow2"
    print(f"copying {image}", flush=True)
    run("cp", "--sparse=always", "--reflink=auto", "--", str(image), str(copy))
    with qcow_recycler.open(copy, read_only=True, backing="skip") as opened:
        backing, form = opened.info.backing_file, opened.info.backing_format
    if backing is not None:
        # A relative name would now start from the copy's directory.
        absolute = (image.parent / backing).resolve()
        run("qemu-img", "rebase", "-u", "-b", str(absolute), "-F", form or "raw", "-f", "qcow2", str(copy))
    return copy


def recycle(image: Path, directory: Path) -> None:
    """Do it; raise DemoError or qcow_recycler.Error if anything is not as it must be."""
    if not image.is_file():
        raise DemoError(f"{image} is not a file")
    room = shutil.disk_usage(directory).free
    if room < 2 * oracle.size(image).on_disk:
        raise DemoError(f"{directory} has only {room // MIB} MiB of room")
    copy = _copy(image, directory)
    reference = directory / "reference.qcow2"
    run("cp", "--sparse=always", "--reflink=auto", "--", str(copy), str(reference))
    before = oracle.size(copy)
    line = _Line()
    with qcow_recycler.open(copy, backing="allow", keep_erased=0) as opened:
        print("discarding what is zero", flush=True)
        zeroes = qcow_recycler.discard_zeroes(
            opened,
            lambda at: line.show(f"{at.scanned // MIB} of {at.total // MIB} MiB, {at.discarded // MIB} were zeroes"),
        )
        line.end()
        print("compacting", flush=True)
        moved = opened.compact(
            lambda at: line.show(f"{at.done} of {at.total} clusters, the file has {at.file_size // MIB} MiB")
        ).moved
        line.end()
        flushes = opened.stats.device_flushes
    after = oracle.size(copy)
    print("qemu-img check", flush=True)
    oracle.check(copy)
    print("qemu-img compare", flush=True)
    run("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", str(reference), str(copy))
    needed = oracle.needed(copy)
    print(f"\n{'':24}{'before':>14}{'after':>14}")
    print(f"{'file length (MiB)':24}{before.length / MIB:>14.1f}{after.length / MIB:>14.1f}")
    print(f"{'disk usage (MiB)':24}{before.on_disk / MIB:>14.1f}{after.on_disk / MIB:>14.1f}")
    print(f"\nzeroes given back {zeroes.discarded / MIB:.1f} MiB, moved {moved / MIB:.1f} MiB, {flushes} flushes")
    if needed is not None and after.length > needed.bound:
        raise DemoError(f"the file is longer than the bound of {needed.bound / MIB:.1f} MiB")
    print(f"\nThe contents are equal. {image} itself was not touched.")
