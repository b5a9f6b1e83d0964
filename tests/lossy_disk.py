"""A filesystem that really loses what was not flushed: `lossy/`, mounted with FUSE."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from clib import ROOT, run

ANSWER_SECONDS = 60


def why_not() -> str:
    """Why FUSE cannot be used here, or ""."""
    if os.geteuid() != 0:
        return "mounting FUSE without fusermount needs root"
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as e:
        return f"no FUSE on this machine: {e}"
    return ""


def build() -> Path:
    """The filesystem's program."""
    run("cargo", "build", "--locked", "-q", "-p", "qcow-lossy", timeout=1800)
    return Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve() / "debug" / "qcow-lossy"


class LossyDisk:
    """The filesystem, mounted; its one file is `file`."""

    def __init__(self, process: subprocess.Popen[bytes], mountpoint: Path) -> None:
        self.process = process
        self.file = mountpoint / "disk"

    def answer(self) -> list[str]:
        assert self.process.stdout and self.process.stderr
        ready, _, _ = select.select([self.process.stdout], [], [], ANSWER_SECONDS)
        line = self.process.stdout.readline() if ready else b""
        assert line.endswith(b"\n"), f"the filesystem says nothing: {self.process.poll()}"
        return line.decode().split()

    def ask(self, command: str) -> list[str]:
        assert self.process.stdin
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()
        answer = self.answer()
        assert answer[0].startswith(command.split()[0]), answer
        return answer

    def load(self, path: Path) -> None:
        """The file durably holds what `path` holds, and the power is on."""
        self.ask(f"load {path}")

    def cut(self) -> int:
        """Cuts the power; how many changes are in doubt."""
        return int(self.ask("cut")[1])

    def image(self, seed: int, path: Path) -> int:
        """Writes one of the files that the cut could leave; how many changes it lost."""
        return int(self.ask(f"image {seed} {path}")[1])


@contextlib.contextmanager
def mounted(program: Path, mountpoint: Path, *options: str) -> Iterator[LossyDisk]:
    """Mounts the filesystem until the block ends; skips the test where that is forbidden."""
    mountpoint.mkdir()
    with subprocess.Popen(
        [str(program), str(mountpoint), *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        if process.stdout.readline() != b"mounted\n":
            complaint = process.stderr.read().decode(errors="replace").strip()
            if "not permitted" in complaint or "denied" in complaint:
                pytest.skip(f"mounting FUSE is forbidden here: {complaint}")
            raise AssertionError(complaint)
        try:
            yield LossyDisk(process, mountpoint)
        finally:
            process.stdin.close()
            process.wait(timeout=ANSWER_SECONDS)
