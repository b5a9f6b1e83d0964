"""Python objects as block devices: what the library asks of them, and what becomes of what they raise."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import qcow_recycler
import qemu
from qcow_recycler import aio

MIB = 1 << 20
CLUSTER = 64 << 10


class MemoryDevice:
    """A block device with everything, which can be told to fail."""

    def __init__(self, size: int = 0) -> None:
        self.data = bytearray(size)
        self.lock = threading.Lock()
        self.fail: dict[str, BaseException] = {}
        self.calls: dict[str, int] = {}
        self.threads: set[int] = set()

    def _enter(self, method: str) -> None:
        self.calls[method] = self.calls.get(method, 0) + 1
        self.threads.add(threading.get_ident())
        if method in self.fail:
            raise self.fail[method]

    def pread(self, offset: int, buffer: memoryview) -> None:
        self._enter("pread")
        assert not buffer.readonly and offset + len(buffer) <= len(self.data)
        buffer[:] = self.data[offset : offset + len(buffer)]

    def pwrite(self, offset: int, buffer: memoryview) -> None:
        self._enter("pwrite")
        assert buffer.readonly and offset + len(buffer) <= len(self.data)
        self.data[offset : offset + len(buffer)] = buffer

    def flush(self) -> None:
        self._enter("flush")

    def length(self) -> int:
        self._enter("length")
        return len(self.data)

    def truncate(self, length: int) -> None:
        self._enter("truncate")
        with self.lock:
            old = len(self.data)
            if length <= old:
                del self.data[length:]
            else:
                self.data.extend(bytes(length - old))


class OptionalDevice(MemoryDevice):
    """The same with the optional methods."""

    def punch_hole(self, offset: int, length: int) -> None:
        self._enter("punch_hole")
        self.data[offset : offset + length] = bytes(length)

    def write_zeroes(self, offset: int, length: int) -> None:
        self._enter("write_zeroes")
        self.data[offset : offset + length] = bytes(length)

    def copy_range(self, source: int, destination: int, length: int) -> None:
        self._enter("copy_range")
        self.data[destination : destination + length] = self.data[source : source + length]


def fill(image: qcow_recycler.Image, clusters: int) -> bytes:
    data = b"".join(bytes([1 + n % 255]) * CLUSTER for n in range(clusters))
    image.write(0, data)
    image.flush()
    return data


@pytest.mark.parametrize("kind", [MemoryDevice, OptionalDevice])
def test_a_python_block_device(kind: type[MemoryDevice], tmp_path: Path) -> None:
    device = kind()
    qcow_recycler.create_device(device, 16 * MIB)
    with qcow_recycler.open_device(
        device, keep_erased=0, settle_time=0.02, flush_after=0.02, compact_after_unmaps=CLUSTER
    ) as image:
        assert image.name is None and "block device" in repr(image)
        data = fill(image, 64)
        image.start()
        image.discard(0, 48 * CLUSTER)
        image.flush()
        full = len(device.data)
        deadline = time.monotonic() + 60
        while len(device.data) > full // 2:
            assert time.monotonic() < deadline, image.stats
            time.sleep(0.02)
        assert image.read(48 * CLUSTER, 16 * CLUSTER) == data[48 * CLUSTER :]
        assert len(device.threads) > 1
    report = qcow_recycler.check_device(device)
    assert report.is_clean and report.allocated_clusters == 16
    copy = tmp_path / "copy.qcow2"
    copy.write_bytes(device.data)
    qemu.assert_clean(copy)
    qemu.assert_contents(copy, bytes(48 * CLUSTER) + data[48 * CLUSTER :] + bytes(16 * MIB - 64 * CLUSTER))


def test_what_a_device_raises_is_the_cause() -> None:
    device = MemoryDevice()
    qcow_recycler.create_device(device, MIB)
    with qcow_recycler.open_device(device) as image:
        image.write(0, bytes([1]) * 4096)
        image.flush()
        mine = OSError(errno.ENODEV, "unplugged")
        device.fail["pread"] = mine
        with pytest.raises(qcow_recycler.DeviceError) as caught:
            image.read(0, 4096)
        assert caught.value.__cause__ is mine
        assert caught.value.errno == errno.ENODEV and caught.value.offset is not None
        device.fail["pread"] = LookupError("not even an OSError")
        with pytest.raises(qcow_recycler.DeviceError) as caught:
            image.read(0, 4096)
        assert isinstance(caught.value.__cause__, LookupError) and caught.value.errno == errno.EIO
        # An interrupt is not an error of the device.
        device.fail["pread"] = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            image.read(0, 4096)
        device.fail.clear()
        assert image.read(0, 4096) == bytes([1]) * 4096


def test_short_transfers_are_errors() -> None:
    class Short(MemoryDevice):
        moved: object = None

        def pread(self, offset: int, buffer: memoryview) -> object:
            super().pread(offset, buffer)
            return len(buffer) if self.moved is None else self.moved

    device = Short()
    qcow_recycler.create_device(device, MIB)
    with qcow_recycler.open_device(device) as image:
        image.write(0, bytes([1]) * 4096)
        assert image.read(0, 4096) == bytes([1]) * 4096
        device.moved = 512
        with pytest.raises(qcow_recycler.DeviceError) as caught:
            image.read(0, 4096)
        assert isinstance(caught.value.__cause__, EOFError)
        device.moved = "much"
        with pytest.raises(qcow_recycler.DeviceError) as caught:
            image.read(0, 4096)
        assert isinstance(caught.value.__cause__, TypeError)
        device.moved = None


def test_a_kept_buffer_is_harmless() -> None:
    class Hoarder(MemoryDevice):
        def __init__(self) -> None:
            super().__init__()
            self.kept: list[memoryview] = []

        def pread(self, offset: int, buffer: memoryview) -> None:
            super().pread(offset, buffer)
            self.kept.append(buffer)

    device = Hoarder()
    qcow_recycler.create_device(device, MIB)
    with qcow_recycler.open_device(device) as image:
        image.write(0, bytes([1]) * 4096)
        data = image.read(0, 4096)
        for buffer in device.kept:
            buffer[:] = bytes(len(buffer))
        assert data == image.read(0, 4096) == bytes([1]) * 4096


def test_the_interpreter_runs_on_while_a_device_waits() -> None:
    """Two reads are in the device at once, each waiting for the other: only possible without the interpreter's lock."""

    class Meeting(MemoryDevice):
        barrier: threading.Barrier | None = None

        def pread(self, offset: int, buffer: memoryview) -> None:
            super().pread(offset, buffer)
            if self.barrier is not None:
                self.barrier.wait(20)

    device = Meeting()
    qcow_recycler.create_device(device, MIB)
    with qcow_recycler.open_device(device) as image:
        image.write(0, bytes([1]) * 2 * CLUSTER)
        image.read(0, 2 * CLUSTER)
        device.barrier = threading.Barrier(2)
        threads = [threading.Thread(target=image.read, args=(n * CLUSTER, 4096)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert not device.barrier.broken
        device.barrier = None


def test_a_device_without_truncate_keeps_its_length() -> None:
    device = MemoryDevice(8 * MIB)

    class Fixed:
        pread, pwrite, flush, length = device.pread, device.pwrite, device.flush, device.length

    qcow_recycler.create_device(Fixed(), 4 * MIB)
    with qcow_recycler.open_device(Fixed()) as image:
        fill(image, 64)
        image.discard(0, 32 * CLUSTER)
        image.compact()
    assert len(device.data) == 8 * MIB
    assert qcow_recycler.check_device(Fixed()).is_clean


def test_an_object_that_is_no_device() -> None:
    with pytest.raises(qcow_recycler.DeviceError) as caught:
        qcow_recycler.open_device(object())
    assert isinstance(caught.value.__cause__, AttributeError)
    with pytest.raises(ValueError, match="backing_directory"):
        qcow_recycler.open_device(MemoryDevice(), backing="allow")


def test_messages_reach_the_log_function() -> None:
    device = MemoryDevice()
    qcow_recycler.create_device(device, 16 * MIB)
    messages: list[tuple[str, str]] = []
    with qcow_recycler.open_device(
        device,
        keep_erased=0,
        settle_time=0.02,
        flush_after=0.02,
        compact_after_unmaps=CLUSTER,
        log=lambda level, message: messages.append((level, message)),
    ) as image:
        fill(image, 64)
        device.fail["truncate"] = device.fail["pread"] = OSError(errno.EIO, "broken")
        image.start()
        image.discard(0, 48 * CLUSTER)
        image.flush()
        deadline = time.monotonic() + 60
        while not image.stats.background_errors:
            assert time.monotonic() < deadline, image.stats
            time.sleep(0.02)
        device.fail.clear()
    assert {level for level, _ in messages} & {"error", "warning"}
    assert {level for level, _ in messages} <= {"error", "warning", "info", "debug"}


def test_asyncio_on_a_python_block_device() -> None:
    device = OptionalDevice()
    qcow_recycler.create_device(device, 16 * MIB)

    async def work() -> None:
        async with await aio.open_device(device) as image:
            pieces = [bytes([1 + n % 255]) * 4096 for n in range(300)]
            places = [n * 8192 for n in range(300)]
            await asyncio.gather(*map(image.write, places, pieces))
            await image.flush()
            assert await asyncio.gather(*(image.read(at, 4096) for at in places)) == pieces
            device.fail["pread"] = cause = OSError(errno.ENXIO, "gone")
            ended = await asyncio.gather(*(image.read(at, 4096) for at in places), return_exceptions=True)
            for error in ended:
                assert isinstance(error, qcow_recycler.DeviceError) and error.errno == errno.ENXIO
                assert error.__cause__ is cause
            device.fail.clear()
            # Requests that nobody waits for any more, when the loop ends.
            left = [asyncio.ensure_future(image.read(at, 4096)) for at in places]
            await asyncio.sleep(0)
            assert not any(task.done() for task in left)

    asyncio.run(work())
    assert qcow_recycler.check_device(device).is_clean


class SlowDevice(MemoryDevice):
    """A device whose reads take as long as one wishes."""

    def __init__(self) -> None:
        super().__init__()
        self.reading, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def pread(self, offset: int, buffer: memoryview) -> None:
        self.reading.set()
        assert self.go_on.wait(60)
        super().pread(offset, buffer)


async def cancel(task: asyncio.Task[None]) -> None:
    """Cancels it, and lets it take notice."""
    task.cancel()
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("times", [0, 1, 2, 3])
def test_requests_end_however_often_closing_is_cancelled(times: int) -> None:
    device = SlowDevice()
    qcow_recycler.create_device(device, 16 * MIB)

    async def work() -> None:
        image = await aio.open_device(device)
        await image.write(0, bytes([7]) * CLUSTER)
        await image.read(0, 512)
        device.go_on.clear()
        device.reading.clear()
        # More than are under way at once.
        reads = [asyncio.ensure_future(image.read(0, 4096)) for _ in range(300)]
        assert await asyncio.to_thread(device.reading.wait, 20)
        closing = asyncio.ensure_future(image.close())
        while not image.closed:
            await asyncio.sleep(0.001)
        for _ in range(times):
            await cancel(closing)
        device.go_on.set()
        ended = await asyncio.wait_for(asyncio.gather(*reads, return_exceptions=True), 20)
        assert all(end == bytes([7]) * 4096 or isinstance(end, qcow_recycler.Closed) for end in ended), set(ended)
        assert ended[0] == bytes([7]) * 4096
        with contextlib.suppress(asyncio.CancelledError):
            await closing
        assert closing.cancelled() == (times > 0)

    asyncio.run(work())
    assert qcow_recycler.check_device(device).is_clean


def test_a_close_that_is_cancelled_before_a_thread_has_it_still_closes() -> None:
    device = SlowDevice()
    qcow_recycler.create_device(device, 16 * MIB)

    async def work() -> None:
        image = await aio.open_device(device)
        await image.write(0, bytes([7]) * CLUSTER)
        busy = threading.Event()
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        occupied = asyncio.ensure_future(asyncio.to_thread(busy.wait, 60))
        await asyncio.sleep(0)
        closing = asyncio.ensure_future(image.close())
        await asyncio.sleep(0)
        for _ in range(2):
            await cancel(closing)
        assert closing.cancelled() and not image.closed
        busy.set()
        await occupied
        # The only thread comes to this when it has closed the image.
        await asyncio.to_thread(lambda: None)
        assert image.closed

    asyncio.run(work())
    assert qcow_recycler.check_device(device).is_clean
