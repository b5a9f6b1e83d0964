"""The Python package: what its calls take, return and raise. What the engine does is other files' business."""

from __future__ import annotations

import array
import asyncio
import errno
import gc
import inspect
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import qcow_recycler
import qemu
from qcow_recycler import aio

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 64 * KIB


@pytest.fixture
def path(image_path: Path) -> Path:
    qcow_recycler.create(image_path, 16 * MIB)
    return image_path


def fill(image: qcow_recycler.Image, clusters: int) -> bytes:
    data = b"".join(bytes([1 + n % 255]) * CLUSTER for n in range(clusters))
    image.write(0, data)
    image.flush()
    return data


# --- values -----------------------------------------------------------------------------------------------------


def test_what_is_promised_is_there() -> None:
    for name in qcow_recycler.__all__:
        assert hasattr(qcow_recycler, name)
    for name in qcow_recycler.errors.__all__:
        error = getattr(qcow_recycler, name)
        assert issubclass(error, qcow_recycler.Error) and issubclass(error, OSError)
    with pytest.raises(TypeError):
        qcow_recycler.Image()


def test_exceptions_survive_pickling() -> None:
    error = qcow_recycler.InvalidImage(errno.EUCLEAN, "bad", "disk.qcow2", offset=40, field="l1_table_offset")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is qcow_recycler.InvalidImage
    assert (copy.errno, copy.strerror, copy.filename) == (errno.EUCLEAN, "bad", "disk.qcow2")
    assert (copy.offset, copy.field) == (40, "l1_table_offset")
    assert str(qcow_recycler.BackingError(errno.ENOENT, "it")) == f"[Errno {errno.ENOENT}] it"


def test_info_and_stats(path: Path) -> None:
    with qcow_recycler.open(path, id="disk0") as image:
        info = image.info
        assert (info.version, info.virtual_size, info.cluster_size) == (3, 16 * MIB, CLUSTER)
        assert (info.refcount_bits, info.snapshots, info.read_only) == (16, 0, False)
        assert (info.backing_file, info.lazy_refcounts, info.extended_l2) == (None, False, False)
        image.write(0, bytes(512))
        stats = image.stats
        assert (stats.guest_writes, stats.guest_write_bytes, stats.virtual_size) == (1, 512, 16 * MIB)
        text = image.prometheus()
        assert 'qcowrecycle_guest_writes_total{id="disk0"} 1' in text
        # Every gauge and counter that the library has is in the record, and nothing else.
        names = {line.split("{")[0].removeprefix("qcowrecycle_") for line in text.splitlines() if line[0] != "#"}
        assert {name.removesuffix("_total") for name in names} == set(qcow_recycler.Stats.__dataclass_fields__)


def test_the_id_is_the_path_by_default(path: Path) -> None:
    with qcow_recycler.open(path) as image:
        assert f'{{id="{path}"}}' in image.prometheus()
        assert image.name == str(path)


# --- reading and writing ----------------------------------------------------------------------------------------


def test_round_trip_as_qemu_reads_it(path: Path) -> None:
    with qcow_recycler.open(path) as image:
        data = os.urandom(3 * CLUSTER)
        assert image.write(CLUSTER - 512, data) == len(data)
        assert image.read(CLUSTER - 512, len(data)) == data
        assert image.read(0, 512) == bytes(512)
        image.write_zeroes(2 * CLUSTER, 512)
        image.flush()
    expected = bytearray(16 * MIB)
    expected[CLUSTER - 512 : CLUSTER - 512 + len(data)] = data
    expected[2 * CLUSTER : 2 * CLUSTER + 512] = bytes(512)
    qemu.assert_contents(path, expected)
    qemu.assert_clean(path)


def test_buffers_of_all_kinds(path: Path) -> None:
    with qcow_recycler.open(path) as image:
        words = array.array("I", range(256))
        assert image.write(0, words) == 1024
        assert image.read(0, 1024) == words.tobytes()
        into = array.array("I", bytes(1024))
        assert image.readinto(0, into) == 1024
        assert into == words
        target = bytearray(2048)
        assert image.readinto(0, memoryview(target)[512:1536]) == 1024
        assert target == bytes(512) + words.tobytes() + bytes(512)
        assert image.write(4096, memoryview(bytes(range(256)) * 4).cast("B", (4, 256))) == 1024
        assert image.read(4096, 1024) == bytes(range(256)) * 4
        assert image.write(0, b"") == 0 and image.read(0, 0) == b""
        with pytest.raises(BufferError):
            image.readinto(0, bytes(512))
        with pytest.raises(BufferError):
            image.write(0, memoryview(bytes(1024))[::2])
        with pytest.raises(TypeError):
            image.write(0, "text")
        # A buffer that a request holds cannot be resized, and is let go afterwards.
        target.extend(b"x")


def test_requests_out_of_place(path: Path) -> None:
    with qcow_recycler.open(path) as image:
        for length in (1024, 2 * MIB, 1 << 62):
            with pytest.raises(qcow_recycler.OutOfRange) as caught:
                image.read(16 * MIB - 512, length)
            assert (caught.value.offset, caught.value.errno) == (16 * MIB - 512, errno.EINVAL)
            assert isinstance(caught.value, ValueError)
        with pytest.raises(qcow_recycler.Misaligned):
            image.write(1, bytes(512))
        with pytest.raises(qcow_recycler.OutOfRange):
            image.extents(0, 17 * MIB)
        with pytest.raises(OverflowError):
            image.read(-512, 512)


def test_extents(path: Path) -> None:
    with qcow_recycler.open(path) as image:
        image.write(CLUSTER, bytes([1]) * CLUSTER)
        image.write(2 * CLUSTER, bytes([2]) * CLUSTER)
        image.write_zeroes(8 * CLUSTER, CLUSTER)
        found = list(image.extents())
        assert found[0].offset == 0 and found[0].kind == "unallocated" and found[0].host_offset is None
        ends = [extent.offset + extent.length for extent in found]
        assert [extent.offset for extent in found[1:]] == ends[:-1] and ends[-1] == 16 * MIB
        data = [extent for extent in found if extent.kind == "data"]
        assert sum(extent.length for extent in data) == 2 * CLUSTER
        assert all(extent.host_offset % CLUSTER == 0 for extent in data)
        assert next(image.extents(CLUSTER, 512)).length == 512
        assert list(image.extents(CLUSTER, 0)) == []
        walk = image.extents()
    with pytest.raises(qcow_recycler.Closed):
        next(walk)


def test_resize(path: Path) -> None:
    with qcow_recycler.open(path) as image:
        image.resize(32 * MIB)
        assert image.info.virtual_size == 32 * MIB
        image.write(32 * MIB - 512, bytes([7]) * 512)
        with pytest.raises(OSError):
            image.resize(MIB)
        assert image.info.virtual_size == 32 * MIB
        image.resize(MIB, shrink=True)
        assert image.info.virtual_size == MIB
    qemu.assert_clean(path)
    assert qemu.info(path)["virtual-size"] == MIB


def test_compaction_makes_the_file_shorter(path: Path) -> None:
    with qcow_recycler.open(path, keep_erased=0) as image:
        data = fill(image, 128)
        image.discard(0, 96 * CLUSTER)
        image.flush()
        seen: list[qcow_recycler.Progress] = []
        report = image.compact(seen.append)
        assert report.file_size_after < report.file_size_before
        assert report.moved >= 16 * CLUSTER
        assert seen and all(isinstance(now, qcow_recycler.Progress) and now.done <= now.total for now in seen)
        assert image.read(96 * CLUSTER, 32 * CLUSTER) == data[96 * CLUSTER :]
    assert path.stat().st_size <= (32 + 8) * CLUSTER
    qemu.assert_contents(path, bytes(96 * CLUSTER) + data[96 * CLUSTER :] + bytes(16 * MIB - 128 * CLUSTER))
    qemu.assert_clean(path)


def test_the_recycler_works_in_the_background(path: Path) -> None:
    with qcow_recycler.open(
        path, keep_erased=0, compact_after_unmaps=CLUSTER, settle_time=0.05, flush_after=0.05
    ) as image:
        fill(image, 128)
        image.start()
        image.start()
        before = image.stats.file_size
        image.discard(0, 96 * CLUSTER)
        image.flush()
        deadline = time.monotonic() + 60
        while image.stats.file_size > before // 2:
            assert time.monotonic() < deadline, image.stats
            time.sleep(0.02)
        assert image.stats.recycler_running == 1
        image.pause()
        image.resume()
        image.stop()
        assert image.stats.recycler_running == 0
        image.stop()
        assert image.check().is_clean
    qemu.assert_clean(path)


def test_times_may_be_longer_than_any_clock_counts(path: Path) -> None:
    messages: list[tuple[str, str]] = []
    with qcow_recycler.open(
        path,
        settle_time=sys.maxsize,
        flush_after=sys.maxsize,
        keep_erased=0,
        compact_after_unmaps=CLUSTER,
        log=lambda level, message: messages.append((level, message)),
    ) as image:
        image.start()
        data = fill(image, 32)
        # Now the recycler waits: until it may flush, and until the free space has settled.
        image.discard(0, 16 * CLUSTER)
        image.flush()
        image.discard(16 * CLUSTER, 8 * CLUSTER)
        time.sleep(0.3)
        image.write(0, data[:CLUSTER])
        image.flush()
        assert image.stats.recycler_running == 1
        assert image.read(24 * CLUSTER, 8 * CLUSTER) == data[24 * CLUSTER :]
    assert not [message for level, message in messages if level == "error"]
    qemu.assert_clean(path)


# --- the life of an image ---------------------------------------------------------------------------------------


def test_a_closed_image_lets_the_file_go(path: Path) -> None:
    image = qcow_recycler.open(path)
    assert not image.closed
    with pytest.raises(qcow_recycler.Locked) as caught:
        qcow_recycler.open(path)
    assert caught.value.errno == errno.EAGAIN and caught.value.filename == str(path)
    image.close()
    image.close()
    assert image.closed and "closed" in repr(image)
    # QEMU wants the locks while the object still exists.
    qemu.io(path, "write 0 64k")
    for call in (
        lambda: image.read(0, 512),
        lambda: image.write(0, bytes(512)),
        image.flush,
        image.compact,
        image.start,
        lambda: image.info,
        lambda: image.stats,
        image.extents,
    ):
        with pytest.raises(qcow_recycler.Closed) as closed:
            call()
        assert closed.value.errno == errno.EBADF and isinstance(closed.value, ValueError)
    with pytest.raises(qcow_recycler.Closed):
        with image:
            image.flush()


def test_a_forgotten_image_is_closed_with_a_warning(path: Path) -> None:
    image = qcow_recycler.open(path)
    image.write(0, bytes([9]) * 512)
    with pytest.warns(ResourceWarning, match="not closed"):
        del image
        gc.collect()
    qemu.assert_contents(path, bytes([9]) * 512 + bytes(16 * MIB - 512))


def test_an_image_left_open_at_exit_is_closed(path: Path) -> None:
    program = """
import os, sys, qcow_recycler
class Device:
    def __init__(self, path): self.fd = os.open(path, os.O_RDWR)
    def pread(self, offset, buffer): return os.preadv(self.fd, [buffer], offset)
    def pwrite(self, offset, buffer): return os.pwritev(self.fd, [buffer], offset)
    def flush(self): os.fdatasync(self.fd)
    def truncate(self, length): os.ftruncate(self.fd, length)
    def length(self): return os.fstat(self.fd).st_size
device = Device(sys.argv[1])
image = qcow_recycler.open_device(device, log=lambda level, message: None, settle_time=0.01, compact_after_unmaps=1)
image.start()
image.write(0, b"9" * 131072)
image.discard(0, 65536)
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, path], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    qemu.assert_clean(path)
    qemu.assert_contents(path, bytes(CLUSTER) + b"9" * CLUSTER + bytes(16 * MIB - 2 * CLUSTER))


def test_many_threads_share_an_image(path: Path) -> None:
    failures: list[BaseException] = []

    def guest(image: qcow_recycler.Image, number: int) -> None:
        try:
            for turn in range(50):
                data = bytes([number * 50 + turn + 1]) * 4096
                image.write(number * MIB + turn * 4096, data)
                assert image.read(number * MIB + turn * 4096, 4096) == data
        except BaseException as failure:
            failures.append(failure)

    with qcow_recycler.open(path) as image:
        threads = [threading.Thread(target=guest, args=(image, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    qemu.assert_clean(path)


# --- options and errors -----------------------------------------------------------------------------------------


def test_options(path: Path) -> None:
    with qcow_recycler.open(path, config="read_only=true;id=a", read_only=None, id="b") as image:
        assert image.info.read_only and 'id="b"' in image.prometheus()
        with pytest.raises(qcow_recycler.ReadOnly) as caught:
            image.write(0, bytes(512))
        assert caught.value.errno == errno.EROFS
    with qcow_recycler.open(path, discard=False) as image:
        with pytest.raises(qcow_recycler.Unsupported):
            image.discard(0, CLUSTER)
    with pytest.raises(qcow_recycler.BadOption) as bad:
        qcow_recycler.open(path, config="keep_erased=much")
    assert bad.value.field == "keep_erased"
    for options, kind in (
        ({"nonsense": 1}, TypeError),
        ({"keep_erased": "1"}, TypeError),
        ({"keep_erased": -1}, OverflowError),
        ({"backing": "yes"}, ValueError),
        ({"log": 1}, TypeError),
    ):
        with pytest.raises(kind):
            qcow_recycler.open(path, **options)
    for option in ("settle_time", "flush_after"):
        for seconds in (-1.0, -1, float("nan"), float("inf"), float("-inf"), 2.0**64):
            with pytest.raises(ValueError, match=f"{option} must be .* not "):
                qcow_recycler.open(path, **{option: seconds})
    # None of them has left the file open.
    qemu.io(path, "write 0 64k")


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(qcow_recycler.NotFound) as caught:
        qcow_recycler.open(tmp_path / "none.qcow2")
    assert isinstance(caught.value, FileNotFoundError) and caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(tmp_path / "none.qcow2")
    with pytest.raises(qcow_recycler.Error):
        qcow_recycler.open(tmp_path)
    junk = tmp_path / "junk"
    junk.write_bytes(b"no image" * 1000)
    with pytest.raises(qcow_recycler.InvalidImage) as invalid:
        qcow_recycler.open(junk)
    assert (invalid.value.field, invalid.value.offset, invalid.value.errno) == ("magic", 0, errno.EUCLEAN)
    with pytest.raises(qcow_recycler.AlreadyExists):
        qcow_recycler.create(junk, MIB)
    assert junk.read_bytes() == b"no image" * 1000


def test_create(tmp_path: Path) -> None:
    path = tmp_path / "new.qcow2"
    with pytest.raises(qcow_recycler.BadOption) as caught:
        qcow_recycler.create(path, MIB, cluster_size=1000)
    assert caught.value.field and not path.exists()
    with pytest.raises(TypeError):
        qcow_recycler.create(path, MIB, clustersize=512)
    with pytest.raises(ValueError):
        qcow_recycler.create(path, MIB, backing_file="base")
    qcow_recycler.create(path, MIB, cluster_size=4096, refcount_bits=1, lazy_refcounts=True)
    info = qemu.info(path)
    assert (info["virtual-size"], info["cluster-size"]) == (MIB, 4096)
    assert info["format-specific"]["data"]["refcount-bits"] == 1
    assert info["format-specific"]["data"]["lazy-refcounts"] is True
    qemu.assert_clean(path)
    old = tmp_path / "old.qcow2"
    qcow_recycler.create(old, MIB, version=2)
    assert qemu.info(old)["format-specific"]["data"]["compat"] == "0.10"


def test_backing_files_need_permission(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes([5]) * MIB)
    path = tmp_path / "top.qcow2"
    qcow_recycler.create(path, MIB, backing_file="base.raw", backing_format="raw")
    with pytest.raises(qcow_recycler.BackingNotAllowed) as caught:
        qcow_recycler.open(path)
    assert caught.value.errno == errno.EPERM
    with qcow_recycler.open(path, backing="allow") as image:
        assert image.info.backing_file == "base.raw" and image.info.backing_format == "raw"
        assert image.read(0, 512) == bytes([5]) * 512
    with qcow_recycler.open(path, backing="skip") as image:
        with pytest.raises(qcow_recycler.Error):
            image.read(0, 512)
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "top.qcow2")
    with pytest.raises(qcow_recycler.Error):
        qcow_recycler.open(moved, backing="allow")
    with qcow_recycler.open(moved, backing="allow", backing_directory=tmp_path) as image:
        assert image.read(0, 512) == bytes([5]) * 512


def test_check_and_repair(path: Path) -> None:
    with qcow_recycler.open(path) as image:
        fill(image, 16)
        assert image.check().is_clean
    report = qcow_recycler.check(path)
    assert report.is_clean and report.allocated_clusters == 16 and report.total_clusters == 256
    # Leak a cluster: QEMU is killed before it writes the table that would refer to it.
    with path.open("r+b") as file:
        file.seek(48)
        table = int.from_bytes(file.read(8), "big")
        file.seek(table)
        block = int.from_bytes(file.read(8), "big")
        length = file.seek(0, 2)
        file.truncate(length + CLUSTER)
        file.seek(block + 2 * (length // CLUSTER))
        file.write((1).to_bytes(2, "big"))
    report = qcow_recycler.check(path, repair="no")
    assert (report.corruptions, report.leaks, report.is_clean) == (0, 1, False) and report.messages
    report = qcow_recycler.check(path, repair="leaks")
    assert (report.leaks, report.leaks_fixed, report.is_clean) == (1, 1, True)
    qemu.assert_clean(path)
    with pytest.raises(ValueError):
        qcow_recycler.check(path, repair="everything")


# --- cancelling -------------------------------------------------------------------------------------------------


@pytest.fixture
def holey(path: Path):
    with qcow_recycler.open(path, keep_erased=0) as image:
        fill(image, 200)
        image.discard(0, 100 * CLUSTER)
        image.flush()
        yield image
    qemu.assert_clean(path)


def test_returning_false_cancels(holey: qcow_recycler.Image) -> None:
    with pytest.raises(qcow_recycler.Cancelled) as caught:
        holey.compact(lambda _: False)
    assert caught.value.errno == errno.ECANCELED
    assert holey.check().is_clean
    assert holey.compact(lambda _: None).moved > 0


def test_raising_cancels(holey: qcow_recycler.Image) -> None:
    def fail(_: qcow_recycler.Progress) -> None:
        raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        holey.compact(fail)
    assert holey.check().is_clean


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handling of Ctrl-C: a shell's background jobs start with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_cancels(path: Path) -> None:
    with qcow_recycler.open(path, keep_erased=0, rate_limit=MIB) as image:
        fill(image, 200)
        image.discard(0, 100 * CLUSTER)
        image.flush()

        def interrupt() -> None:
            while not image.stats.copies:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt, daemon=True)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            image.compact()
        thread.join()
        assert image.check().is_clean
    qemu.assert_clean(path)


# --- zeroes, asyncio, types ---------------------------------------------------------------------------


def test_zero_clusters_are_given_back(path: Path) -> None:
    with qcow_recycler.open(path) as image:
        data = bytearray(fill(image, 64))
        for first, count in ((0, 8), (20, 1), (40, 24)):
            image.write(first * CLUSTER, bytes(count * CLUSTER))
            data[first * CLUSTER : (first + count) * CLUSTER] = bytes(count * CLUSTER)
        seen: list[qcow_recycler.ZeroScan] = []
        result = qcow_recycler.discard_zeroes(image, seen.append)
        assert result.discarded == 33 * CLUSTER and result.scanned == result.total >= 33 * CLUSTER
        assert seen[-1] == result
        assert sum(e.length for e in image.extents() if e.kind == "data") == 31 * CLUSTER
    qemu.assert_contents(path, bytes(data) + bytes(16 * MIB - len(data)))
    qemu.assert_clean(path)


def test_zero_clusters_over_a_backing_file_still_read_as_zeroes(tmp_path: Path) -> None:
    (tmp_path / "base.raw").write_bytes(bytes([5]) * MIB)
    path = tmp_path / "top.qcow2"
    qemu.create(path, MIB, backing="base.raw", backing_format="raw")
    qemu.io(path, "write -P 0 0 128k", "write -P 7 128k 64k")
    with qcow_recycler.open(path, backing="allow") as image:
        assert qcow_recycler.discard_zeroes(image).discarded == 128 * KIB
        assert image.read(0, 128 * KIB) == bytes(128 * KIB)
    qemu.assert_contents(path, bytes(128 * KIB) + bytes([7]) * CLUSTER + bytes([5]) * (MIB - 192 * KIB))


def test_asyncio(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"

    async def work() -> None:
        await aio.create(path, 16 * MIB)
        async with await aio.open(path, keep_erased=0) as image:
            data = os.urandom(MIB)
            assert await image.write(0, data) == MIB
            into = bytearray(MIB)
            await asyncio.gather(image.readinto(0, into), image.read(0, MIB))
            assert into == data
            await image.write_zeroes(MIB, CLUSTER)
            await image.discard(0, 8 * CLUSTER)
            await image.flush()
            await image.start()
            image.pause()
            image.resume()
            await image.stop()
            kinds = [extent.kind async for extent in image.extents()]
            assert "data" in kinds and "unallocated" in kinds
            assert (await image.compact()).file_size_after <= image.stats.file_size
            assert (await image.check()).is_clean
            await image.resize(32 * MIB)
            assert image.info.virtual_size == 32 * MIB
        assert image.closed
        assert (await aio.check(path)).is_clean

    asyncio.run(work())


def test_asyncio_has_many_requests_under_way(path: Path) -> None:
    """More than the queue holds at once, and without a thread for each."""

    async def work() -> None:
        async with await aio.open(path) as image:
            pieces = [os.urandom(4096) for _ in range(600)]
            places = [n * 8192 for n in range(600)]
            assert await asyncio.gather(*map(image.write, places, pieces)) == [4096] * 600
            threads = len(os.listdir("/proc/self/task"))
            assert await asyncio.gather(*(image.read(at, 4096) for at in places)) == pieces
            into = [bytearray(4096) for _ in places]
            await asyncio.gather(image.flush(), *map(image.readinto, places, into))
            assert into == pieces
            assert len(os.listdir("/proc/self/task")) <= threads + 1
            await asyncio.gather(*(image.discard(at, 4096) for at in places), image.read(0, 0))

    asyncio.run(work())
    qemu.assert_clean(path)


def test_asyncio_tells_of_failures(path: Path) -> None:
    async def work() -> None:
        image = await aio.open(path)
        size = image.info.virtual_size
        with pytest.raises(qcow_recycler.OutOfRange) as raised:
            await image.read(size, 512)
        assert raised.value.filename == str(path) and raised.value.offset == size
        with pytest.raises(qcow_recycler.OutOfRange):
            await image.read(0, 1 << 40)
        with pytest.raises(qcow_recycler.Misaligned):
            await image.write(1, bytes(512))
        with pytest.raises(BufferError):
            await image.readinto(0, bytes(512))
        with pytest.raises(TypeError):
            await image.write(0, "text")  # type: ignore[arg-type]
        await image.close()
        await image.close()
        with pytest.raises(qcow_recycler.Closed):
            await image.read(0, 512)

    asyncio.run(work())


def test_a_cancelled_task_leaves_its_buffer_in_use_and_the_image_usable(path: Path) -> None:
    async def work() -> None:
        async with await aio.open(path) as image:
            await image.write(0, bytes([9]) * MIB)
            for _ in range(20):
                tasks = [asyncio.create_task(image.readinto(n * CLUSTER, bytearray(CLUSTER))) for n in range(16)]
                await asyncio.sleep(0)
                for task in tasks[::2]:
                    task.cancel()
                ended = await asyncio.gather(*tasks, return_exceptions=True)
                assert ended[1::2] == [CLUSTER] * 8
            assert await image.read(0, MIB) == bytes([9]) * MIB

    asyncio.run(work())


def test_closing_ends_requests_and_lets_the_file_go(path: Path) -> None:
    async def work() -> None:
        image = await aio.open(path)
        tasks = [asyncio.create_task(image.write(n * CLUSTER, bytes([n]) * CLUSTER)) for n in range(64)]
        await asyncio.sleep(0)
        await image.close()
        for end in await asyncio.gather(*tasks, return_exceptions=True):
            assert end == CLUSTER or isinstance(end, qcow_recycler.Closed)
        # In use still, it would be locked.
        async with await aio.open(path) as again:
            for n, task in enumerate(tasks):
                if task.exception() is None:
                    assert await again.read(n * CLUSTER, CLUSTER) == bytes([n]) * CLUSTER

    asyncio.run(work())
    qemu.assert_clean(path)


def test_an_asynchronous_image_outlives_an_event_loop(path: Path) -> None:
    image = asyncio.run(aio.open(path))
    assert asyncio.run(image.write(0, bytes([3]) * 512)) == 512
    assert asyncio.run(image.read(0, 512)) == bytes([3]) * 512

    asyncio.run(image.close())


def test_an_asynchronous_image_that_is_forgotten_lets_the_file_go(path: Path) -> None:
    async def work() -> None:
        image = await aio.open(path)
        await image.read(0, 512)
        with pytest.warns(ResourceWarning):
            del image
            for _ in range(3):
                await asyncio.sleep(0)
                gc.collect()
        async with await aio.open(path) as again:
            assert await again.read(0, 512) == bytes(512)

    asyncio.run(work())


def test_a_cancelled_task_cancels_the_compaction(path: Path) -> None:
    async def work() -> None:
        async with await aio.open(path, keep_erased=0) as image:
            await image.write(0, os.urandom(200 * CLUSTER))
            await image.discard(0, 100 * CLUSTER)
            await image.flush()
            begun, go_on = threading.Event(), threading.Event()

            def progress(_: qcow_recycler.Progress) -> None:
                begun.set()
                go_on.wait(20)

            task = asyncio.create_task(image.compact(progress))
            await asyncio.to_thread(begun.wait, 20)
            task.cancel()
            await asyncio.sleep(0)
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await image.check()).is_clean

    asyncio.run(work())
    qemu.assert_clean(path)


def test_the_asynchronous_twins_take_the_same_arguments() -> None:
    for name, twin in inspect.getmembers(aio.AsyncImage, inspect.isfunction):
        if not name.startswith("_"):
            original = inspect.signature(getattr(qcow_recycler.Image, name))
            assert list(inspect.signature(twin).parameters) == list(original.parameters), name


def test_the_package_is_typed() -> None:
    directory = Path(qcow_recycler.__file__).parent
    assert (directory / "py.typed").exists() and (directory / "_ext.pyi").exists()
