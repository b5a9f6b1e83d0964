"""QEMU's tools as oracles: every call fails loudly, with what the tool said."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 120


class ToolFailed(AssertionError):
    """A tool ended with an error."""


def run(*args: object, ok: tuple[int, ...] = (0,), stdin: bytes | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a tool; its exit status must be one of `ok`."""
    command = [str(a) for a in args]
    result = subprocess.run(command, input=stdin, capture_output=True, timeout=TIMEOUT, check=False)
    out, err = result.stdout.decode(errors="replace"), result.stderr.decode(errors="replace")
    if result.returncode not in ok:
        raise ToolFailed(f"{' '.join(command)[:2000]}\nexit status {result.returncode}\n{out[-2000:]}\n{err[-2000:]}")
    return subprocess.CompletedProcess(command, result.returncode, out, err)


def img(*args: object, ok: tuple[int, ...] = (0,)) -> str:
    """`qemu-img ...`; what it printed."""
    return run("qemu-img", *args, ok=ok).stdout


def create(
    path: Path, size: int, *, backing: Path | str | None = None, backing_format: str = "qcow2", **options: object
) -> None:
    """`qemu-img create -f qcow2` with `-o` options; underscores stand for themselves."""
    arguments: list[object] = []
    if options:
        arguments += ["-o", ",".join(f"{k}={v}" for k, v in options.items())]
    if backing is not None:
        arguments += ["-b", backing, "-F", backing_format]
    img("create", "-q", "-f", "qcow2", *arguments, path, size)


def named(path: Path, passphrase: str | None = None) -> list[object]:
    """An image as an argument of QEMU's tools, with the passphrase if it is encrypted."""
    if passphrase is None:
        return ["-f", "qcow2", path]
    secret = f"secret,id=s,data={passphrase}"
    return ["--object", secret, "--image-opts", f"driver=qcow2,encrypt.key-secret=s,file.filename={path}"]


def io(
    path: Path,
    *commands: str,
    discard: bool = True,
    options: tuple[str, ...] = (),
    passphrase: str | None = None,
) -> str:
    """Runs `qemu-io` commands on an image, read-write; each must succeed."""
    arguments: list[object] = [*(["-d", "unmap"] if discard else []), *options]
    for command in commands:
        arguments += ["-c", command]
    result = run("qemu-io", *arguments, *named(path, passphrase))
    for line in (result.stdout + result.stderr).splitlines():
        if "failed" in line or "rror" in line or "Pattern verification" in line:
            raise ToolFailed(f"qemu-io {path}: {line}")
    return result.stdout


@dataclass
class Check:
    """What `qemu-img check` found."""

    corruptions: int
    leaks: int
    check_errors: int
    allocated_clusters: int
    image_end_offset: int


def check(path: Path, repair: str | None = None, *, passphrase: str | None = None) -> Check:
    """`qemu-img check`, with `-r leaks` or `-r all` if asked; findings are not failures."""
    arguments = ["-r", repair] if repair else []
    report = json.loads(img("check", "--output=json", *arguments, *named(path, passphrase), ok=(0, 2, 3)))
    return Check(
        report.get("corruptions", 0),
        report.get("leaks", 0),
        report.get("check-errors", 0),
        report.get("allocated-clusters", 0),
        report.get("image-end-offset", 0),
    )


def assert_clean(path: Path, *, passphrase: str | None = None) -> Check:
    """QEMU finds neither corruption nor leak."""
    found = check(path, passphrase=passphrase)
    if found.corruptions or found.leaks or found.check_errors:
        text = run("qemu-img", "check", *named(path, passphrase), ok=(0, 1, 2, 3))
        raise AssertionError(f"qemu-img check {path.name}: {found}\n{(text.stdout + text.stderr)[:3000]}")
    return found


def info(path: Path) -> dict:
    return json.loads(img("info", "--output=json", "-U", path))


def contents(path: Path, *, snapshot: str | None = None, passphrase: str | None = None) -> bytes:
    """The whole virtual disk as QEMU reads it, or that of an internal snapshot."""
    raw = path.with_name(path.name + ".raw")
    arguments = ["-l", f"snapshot.name={snapshot}"] if snapshot else []
    try:
        img("convert", "-q", "-O", "raw", *arguments, *named(path, passphrase), raw)
        return raw.read_bytes()
    finally:
        raw.unlink(missing_ok=True)


def first_difference(a: bytes | bytearray, b: bytes | bytearray) -> str:
    """For an assertion's message: where two disks differ."""
    if len(a) != len(b):
        return f"lengths {len(a):#x} and {len(b):#x}"
    step = 512
    places = [at for at in range(0, len(a), step) if a[at : at + step] != b[at : at + step]]
    at = places[0]
    return (
        f"{len(places)} sectors differ, the first at {at:#x}, the last at {places[-1]:#x}: "
        f"{bytes(a[at : at + 16]).hex()} and {bytes(b[at : at + 16]).hex()}"
    )


def assert_contents(
    path: Path, expected: bytes | bytearray, *, snapshot: str | None = None, passphrase: str | None = None
) -> None:
    """QEMU reads exactly these bytes."""
    got = contents(path, snapshot=snapshot, passphrase=passphrase)
    assert got == expected, f"QEMU read and expected: {first_difference(got, expected)}"


class Holder:
    """A running `qemu-io`, which keeps its image open and so locked."""

    PROMPT = b"qemu-io> "

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def answer(self) -> str:
        """What it prints up to its next prompt."""
        assert self.process.stdout
        answer = b""
        while not answer.endswith(self.PROMPT):
            ready, _, _ = select.select([self.process.stdout], [], [], 20)
            more = self.process.stdout.read1(4096) if ready else b""
            if not more:
                raise ToolFailed(f"qemu-io said nothing more after: {answer.decode(errors='replace')}")
            answer += more
        return answer.removesuffix(self.PROMPT).decode(errors="replace")

    def command(self, command: str) -> str:
        """Runs one command to its end; `qemu-io` loses commands that are sent together."""
        assert self.process.stdin
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()
        answer = self.answer()
        if "failed" in answer or "rror" in answer:
            raise ToolFailed(f"qemu-io: {command}: {answer}")
        return answer

    def kill(self) -> None:
        """SIGKILL: the image is not closed."""
        self.process.kill()
        self.process.wait(timeout=20)


@contextlib.contextmanager
def holding(path: Path, *options: str) -> Iterator[Holder]:
    """A `qemu-io` that has the image open until the block ends."""
    command = ["qemu-io", "-f", "qcow2", *options, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        holder = Holder(process)
        try:
            holder.answer()
            yield holder
        finally:
            if process.poll() is None and process.stdin:
                process.stdin.close()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                holder.kill()


@contextlib.contextmanager
def nbd_export(path: Path, *options: str) -> Iterator[str]:
    """A `qemu-nbd` that exports the image read-write over a socket; gives its URI."""
    address = path.with_name("nbd.sock")
    command = ["qemu-nbd", "-f", "qcow2", "-t", "-k", str(address), *options, str(path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 20
            while not greets(address):
                assert process.poll() is None, f"qemu-nbd ended: {process.stderr and process.stderr.read().decode()}"
                assert time.monotonic() < deadline, "qemu-nbd did not come up"
                time.sleep(0.01)
            yield f"nbd+unix:///?socket={address}"
        finally:
            process.terminate()
            process.wait(timeout=20)
            address.unlink(missing_ok=True)


def greets(address: Path) -> bool:
    """Whether an NBD server answers: its socket is there before it has opened, and locked, the image."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        try:
            client.connect(str(address))
            return client.recv(8) == b"NBDMAGIC"
        except (FileNotFoundError, ConnectionError):
            return False
