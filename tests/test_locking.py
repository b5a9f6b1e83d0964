"""Two users of one image: whoever comes second is told so, whether that is QEMU, the library, or something else."""

from __future__ import annotations

import errno
import fcntl
import struct
import subprocess
import sys
from pathlib import Path

import pytest

import qcow_recycler
import qemu


@pytest.fixture
def image(image_path: Path) -> Path:
    qemu.create(image_path, 4 << 20)
    qemu.io(image_path, "write -P 1 0 1M")
    return image_path


def assert_locked(path: Path, *, read_only: bool) -> str:
    """Opening fails as locked, and changes nothing; gives the message."""
    before = path.read_bytes()
    with pytest.raises(qcow_recycler.Error) as e:
        qcow_recycler.open(path, read_only=read_only)
    assert e.value.errno == errno.EAGAIN, e.value
    assert "lock" in str(e.value).lower() or "in use" in str(e.value).lower(), e.value
    assert path.read_bytes() == before
    return str(e.value)


def assert_qemu_locked(path: Path, *options: str) -> None:
    with pytest.raises(qemu.ToolFailed, match="lock"):
        qemu.run("qemu-io", "-f", "qcow2", *options, "-c", "read 0 512", path)


def test_qemu_io_writes(image: Path) -> None:
    with qemu.holding(image):
        message = assert_locked(image, read_only=False)
        assert_locked(image, read_only=True)
        assert image.name in message, "the message does not say which image"
    with qcow_recycler.open(image) as ours:
        assert ours.read(0, 512) == b"\1" * 512


def test_qemu_nbd_serves(image: Path) -> None:
    with qemu.nbd_export(image):
        assert_locked(image, read_only=False)
        assert_locked(image, read_only=True)


def test_qemu_only_reads(image: Path) -> None:
    """A reader is disturbed by a writer, but not by another reader."""
    with qemu.holding(image, "-r"):
        assert_locked(image, read_only=False)
        with qcow_recycler.open(image, read_only=True) as ours:
            assert ours.read(0, 512) == b"\1" * 512


def test_we_write(image: Path) -> None:
    with qcow_recycler.open(image) as ours:
        ours.write(0, b"\2" * 512)
        assert_qemu_locked(image)
        assert_qemu_locked(image, "-r")
        with pytest.raises(qemu.ToolFailed, match="lock"):
            qemu.img("check", "-r", "all", "-f", "qcow2", image)
        assert_locked(image, read_only=False)
        assert_locked(image, read_only=True)
        with pytest.raises(qcow_recycler.Error) as e:
            qcow_recycler.check(image, repair="all")
        assert e.value.errno == errno.EAGAIN
    qemu.io(image, "read -P 2 0 512")


def test_we_only_read(image: Path) -> None:
    with qcow_recycler.open(image, read_only=True), qcow_recycler.open(image, read_only=True) as ours:
        assert ours.read(0, 512) == b"\1" * 512
        qemu.run("qemu-io", "-f", "qcow2", "-r", "-c", "read 0 512", image)
        assert_qemu_locked(image)
        assert_locked(image, read_only=False)


def test_a_whole_file_lock_is_respected(image: Path) -> None:
    """cloud-hypervisor locks the file from end to end."""
    with open(image, "r+b") as file:
        lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        assert_locked(image, read_only=False)
        assert_locked(image, read_only=True)
    with qcow_recycler.open(image) as ours:
        with open(image, "r+b") as file, pytest.raises(BlockingIOError):
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        ours.flush()


def test_locks_end_with_their_process(image: Path) -> None:
    """Killed, not closed: nobody has to clear anything up."""
    program = (
        "import sys, time, qcow_recycler\n"
        f"image = qcow_recycler.open({str(image)!r})\n"
        "print('open', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        assert child.stdout and child.stdout.readline() == b"open\n"
        assert str(child.pid) in assert_locked(image, read_only=False), "the message does not say who holds the lock"
        assert_qemu_locked(image)
        child.kill()
    with qcow_recycler.open(image) as ours:
        assert ours.read(0, 512) == b"\1" * 512
    qemu.assert_clean(image)


def test_a_failed_open_leaves_no_lock(image: Path) -> None:
    """Also when the image is refused for what is in it."""
    content = image.read_bytes()
    image.write_bytes(b"\0" * 512 + content[512:])
    with pytest.raises(qcow_recycler.Error) as e:
        qcow_recycler.open(image)
    image.write_bytes(content)
    qemu.io(image, "read -P 1 0 512")
    assert e.value.errno == errno.EUCLEAN


def test_an_overlay_keeps_writers_off_its_backing_file(tmp_path: Path, image_path: Path) -> None:
    """Two overlays of one base are open at once, QEMU's and ours; nobody may write to the base meanwhile."""
    base, theirs = tmp_path / "base.qcow2", tmp_path / "theirs.qcow2"
    qemu.create(base, 4 << 20)
    qemu.io(base, "write -q -P 1 0 1M")
    for overlay in (image_path, theirs):
        qemu.create(overlay, 4 << 20, backing=base.name)
    with qcow_recycler.open(image_path, backing="allow") as ours:
        with qemu.holding(theirs) as holder:
            holder.command("write -q -P 2 0 64k")
            ours.write(65536, b"\3" * 65536)
            ours.compact()
            holder.command("read -q -P 1 64k 64k")
            assert ours.read(0, 65536) == b"\1" * 65536
        assert_locked(base, read_only=False)
        assert_qemu_locked(base)
        with qcow_recycler.open(base, read_only=True) as reader:
            assert reader.read(0, 512) == b"\1" * 512
        # The reader has gone, and the overlay is still there.
        assert_qemu_locked(base)
    with qemu.holding(base), pytest.raises(qcow_recycler.Error) as e:
        qcow_recycler.open(image_path, backing="allow")
    assert e.value.errno == errno.EAGAIN and base.name in str(e.value)
    with qcow_recycler.open(base), pytest.raises(qcow_recycler.Error) as e:
        qcow_recycler.open(image_path, backing="allow")
    assert e.value.errno == errno.EAGAIN
    for overlay in (image_path, theirs, base):
        qemu.assert_clean(overlay)


def test_an_image_by_another_name(tmp_path: Path, image: Path) -> None:
    link = tmp_path / "link.qcow2"
    link.symlink_to(image.name)
    hard = tmp_path / "hard.qcow2"
    hard.hardlink_to(image)
    for one, other in ((image, link), (link, image), (hard, link)):
        with qemu.holding(one):
            assert_locked(other, read_only=False)
        with qcow_recycler.open(one):
            assert_locked(other, read_only=True)
            assert_qemu_locked(other)


def test_one_of_two_readers_in_a_process_goes(image: Path) -> None:
    """Locks that belonged to the process would go with the first of them."""
    first = qcow_recycler.open(image, read_only=True)
    with qcow_recycler.open(image, read_only=True) as second:
        first.close()
        assert_qemu_locked(image)
        assert second.read(0, 512) == b"\1" * 512
    qemu.io(image, "write -q -P 2 0 512")
