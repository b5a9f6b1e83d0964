"""The command qcow-recycler: output, exit codes, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import qcow2
import qcow_recycler
import qemu

MIB = 1 << 20
CLUSTER = 4096
COMMAND = [sys.executable, "-m", "qcow_recycler"]


def cli(*args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=120)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def refused(*args: object, code: int = 1) -> str:
    """The one line on standard error."""
    done = cli(*args, code=code)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("qcow-recycler: ")
    return line


@pytest.fixture
def image(image_path: Path) -> Path:
    """16 MiB of data, the first half of it zeroes."""
    qcow_recycler.create(image_path, 64 * MIB, cluster_size=CLUSTER)
    with qcow_recycler.open(image_path, keep_erased=0) as opened:
        opened.write_zeroes(0, 8 * MIB, may_unmap=False)
        opened.write(0, bytes(8 * MIB))
        opened.write(8 * MIB, b"data" * (2 * MIB))
    return image_path


EXPECTED = bytes(8 * MIB) + b"data" * (2 * MIB) + bytes(48 * MIB)


def test_the_command_is_installed() -> None:
    program = Path(sysconfig.get_path("scripts")) / "qcow-recycler"
    done = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["qcow-recycler", qcow_recycler.__version__]


def test_help_names_the_exit_codes() -> None:
    text = cli("--help").stdout
    for word in ("info", "check", "compact", "discard-zeroes", "exit codes"):
        assert word in text


@pytest.mark.parametrize("args", [[], ["shrink"], ["info"], ["check", "x", "--repair", "some"], ["compact", "a", "b"]])
def test_usage_errors_have_their_own_code(args: list[str]) -> None:
    assert "usage:" in cli(*args, code=64).stderr


def test_info(image: Path) -> None:
    text = cli("info", image).stdout
    assert "64.0 MiB (67108864 bytes)" in text and "4.0 KiB" in text
    (record,) = lines(cli("info", "--json", image).stdout)
    assert record["virtual_size"] == 64 * MIB and record["cluster_size"] == CLUSTER
    assert record["file_size"] == image.stat().st_size and record["snapshots"] == 0


def test_info_of_an_overlay_needs_no_backing_file(tmp_path: Path) -> None:
    qcow_recycler.create(tmp_path / "top.qcow2", MIB, backing_file="gone.qcow2", backing_format="qcow2")
    assert "gone.qcow2 (qcow2)" in cli("info", tmp_path / "top.qcow2").stdout


def test_discard_zeroes_then_compact(image: Path) -> None:
    before = image.stat().st_size
    *progress, done = lines(cli("discard-zeroes", "--json", image).stdout)
    assert progress and all(line["event"] == "progress" for line in progress)
    assert done["event"] == "done" and done["discarded"] == 8 * MIB
    qemu.assert_contents(image, EXPECTED)
    *progress, done = lines(cli("compact", "--json", image).stdout)
    assert all(line["event"] == "progress" and line["done"] <= line["total"] for line in progress)
    assert done["event"] == "done" and done["file_size"] == image.stat().st_size < before * 6 // 10
    qemu.assert_contents(image, EXPECTED)
    qemu.assert_clean(image)
    assert "0 B" in cli("discard-zeroes", image).stdout


def refcount_of(image: Path, cluster: int) -> int:
    """Where the refcount of a host cluster stands in the file; its block must exist."""
    metadata = qcow2.Qcow2(image)
    block, index = divmod(cluster, CLUSTER // 2)
    return (metadata.refcount_table()[block] & qcow2.OFFSET_MASK) + 2 * index


def overwrite(image: Path, at: int, data: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(at)
        file.write(data)


def test_check(image: Path) -> None:
    assert "no errors" in cli("check", image).stdout
    # A cluster at the end that is counted and that nothing refers to.
    end = -(-image.stat().st_size // CLUSTER)
    os.truncate(image, (end + 1) * CLUSTER)
    overwrite(image, refcount_of(image, end), (1).to_bytes(2, "big"))
    assert "1 leaked" in cli("check", image, code=3).stdout
    (record,) = lines(cli("check", "--json", image, code=3).stdout)
    assert (record["leaks"], record["corruptions"]) == (1, 0)
    assert "repaired: 0 corruptions, 1 leaked" in cli("check", "--repair", "leaks", image).stdout
    cli("check", image)
    # A count that is too low.
    overwrite(image, refcount_of(image, 0), bytes(2))
    assert "1 corruption" in cli("check", image, code=2).stdout
    cli("check", "--repair", "all", image)
    qemu.assert_clean(image)


def test_errors_are_one_line_with_the_place(image: Path, tmp_path: Path) -> None:
    line = refused("info", tmp_path / "none.qcow2")
    assert "none.qcow2" in line and "ENOENT" in line
    overwrite(image, 20, (40).to_bytes(4, "big"))
    line = refused("compact", image)
    assert "EUCLEAN" in line and "offset 0x14" in line and "field cluster_bits" in line


def test_an_image_in_use_is_refused(image: Path) -> None:
    with qemu.holding(image):
        assert "EAGAIN" in refused("compact", image)
        assert "EAGAIN" in refused("check", "--repair", "all", image)
    cli("compact", image)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["compact", "discard-zeroes"])
def test_an_interrupt_leaves_a_consistent_image(image: Path, command: str, number: signal.Signals) -> None:
    """Stopped after its first line of progress, or done before the signal came: the image is whole either way."""
    if command == "compact":
        with qcow_recycler.open(image, keep_erased=0) as opened:
            opened.discard(0, 8 * MIB)
    with subprocess.Popen(
        [*COMMAND, command, "--json", str(image)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr
        first = json.loads(process.stdout.readline())
        process.send_signal(number)
        rest, complaint = process.communicate(timeout=60)
    if process.returncode == 130:
        assert complaint == "qcow-recycler: cancelled; the image is consistent\n"
    else:
        events = [first["event"], *(line["event"] for line in lines(rest))]
        assert process.returncode == 0 and events[-1] == "done", (process.returncode, rest, complaint)
    qemu.assert_clean(image)
    qemu.assert_contents(image, EXPECTED)


def test_a_terminal_gets_a_bar(image: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*COMMAND, "discard-zeroes", str(image)], stdout=theirs, stderr=theirs)
    os.close(theirs)
    text = b""
    # The end of the other side is an error here, not an end of file.
    with contextlib.suppress(OSError):
        while more := os.read(ours, 65536):
            text += more
    os.close(ours)
    assert process.wait(60) == 0
    assert b"[###" in text and b"100%" in text and b"8.0 MiB of 16.0 MiB were zeroes" in text
    # What remains on the screen is the result alone.
    assert text.splitlines()[-1].split(b"\x1b[K")[-1].startswith(b"8.0 MiB of")


def test_a_reader_that_leaves_is_no_error_of_ours(image: Path) -> None:
    command = f"{sys.executable} -m qcow_recycler check {image} | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    qemu.assert_clean(image)
