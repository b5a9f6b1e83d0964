"""The calls that wait, for asyncio.

Requests go through a queue, many at a time, and the event loop is told when they have ended; other calls run on
threads of its default pool. Requests that are under way together are carried out in any order; one that must see
another is made when the other has ended.

A cancelled task does not stop a request that is under way, it only stops waiting for it; so a buffer stays in use until
then. The same goes for :meth:`AsyncImage.close`: the image is closed, and every request ends. A cancelled
:meth:`AsyncImage.compact` (or `compress`) cancels the work, and waits until the image is at rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
import weakref
from asyncio import AbstractEventLoop, Future
from collections.abc import AsyncIterator, Callable, MutableMapping
from itertools import islice
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, Unpack, final

from . import _api
from ._ext import Image, Queue
from .errors import Closed
from .options import CreateOptions, OpenOptions
from .protocol import FixedBlockDevice
from .records import CheckReport, CompactReport, Extent, Info, Progress, Snapshot, Stats

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

_EXTENTS_AT_ONCE = 256
_Result = TypeVar("_Result")


def _let_go(queues: MutableMapping[AbstractEventLoop, Queue]) -> None:
    """Nobody has the image any more: what its event loops have of it goes, too."""
    for loop, queue in queues.items():
        # It may be closed already, or just now by its own thread. In a child process, both are the parent's.
        with contextlib.suppress(RuntimeError, Closed):
            loop.call_soon_threadsafe(loop.remove_reader, queue.fileno())


def _begin(call: Callable[[], object]) -> Future[Any]:
    """Has a thread make a call that goes on whatever is cancelled, so long as the future is only awaited with a shield.

    It is no task: a loop that ends cancels those.
    """
    return asyncio.get_running_loop().run_in_executor(None, contextvars.copy_context().run, call)


@final
class AsyncImage:
    """An open image: the asynchronous twin of :class:`qcow_recycler.Image`."""

    __slots__ = ("__weakref__", "_queues", "image")

    def __init__(self, image: Image) -> None:
        self.image = image
        self._queues: MutableMapping[AbstractEventLoop, Queue] = weakref.WeakKeyDictionary()
        weakref.finalize(self, _let_go, self._queues)

    def _ask(self) -> tuple[Queue, Future[Any]]:
        """The running loop's queue, and a future for its next request."""
        loop = asyncio.get_running_loop()
        queue = self._queues.get(loop)
        if queue is None:
            queue = Queue(self.image)
            loop.add_reader(queue.fileno(), queue.reap)
            self._queues[loop] = queue
        return queue, loop.create_future()

    async def read(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset`."""
        queue, future = self._ask()
        queue.read(future, offset, length)
        return await future  # type: ignore[no-any-return]

    async def readinto(self, offset: int, buffer: WriteableBuffer) -> int:
        """Fill a writable buffer from `offset`; return its length."""
        queue, future = self._ask()
        queue.readinto(future, offset, buffer)
        return await future  # type: ignore[no-any-return]

    async def write(self, offset: int, buffer: ReadableBuffer) -> int:
        """Store a buffer at `offset`; return its length."""
        queue, future = self._ask()
        queue.write(future, offset, buffer)
        return await future  # type: ignore[no-any-return]

    async def write_compressed(self, offset: int, buffer: ReadableBuffer) -> int:
        """Store whole clusters, compressed as far as that saves room; return the buffer's length."""
        return await asyncio.to_thread(self.image.write_compressed, offset, buffer)

    async def discard(self, offset: int, length: int) -> None:
        """Free a range."""
        queue, future = self._ask()
        queue.discard(future, offset, length)
        await future

    async def write_zeroes(self, offset: int, length: int, may_unmap: bool = True) -> None:
        """Make a range read as zeroes."""
        queue, future = self._ask()
        queue.write_zeroes(future, offset, length, may_unmap)
        await future

    async def flush(self) -> None:
        """Make every completed write durable."""
        queue, future = self._ask()
        queue.flush(future)
        await future

    async def resize(self, size: int, shrink: bool = False) -> None:
        """Change the size of the virtual disk."""
        await asyncio.to_thread(self.image.resize, size, shrink)

    async def extents(self, offset: int = 0, length: int | None = None) -> AsyncIterator[Extent]:
        """Iterate over how a range is stored."""
        found = await asyncio.to_thread(self.image.extents, offset, length)
        while batch := await asyncio.to_thread(lambda: list(islice(found, _EXTENTS_AT_ONCE))):
            for extent in batch:
                yield extent

    async def compact(self, progress: Callable[[Progress], object] | None = None) -> CompactReport:
        """Compact the image; `progress` is called on another thread than the event loop's."""
        return await self._watched(self.image.compact, progress)

    async def compress(self, progress: Callable[[Progress], object] | None = None) -> int:
        """Compress what the disk holds plainly; return how many bytes. `progress` as for :meth:`compact`."""
        return await self._watched(self.image.compress, progress)

    async def _watched(
        self,
        call: Callable[[Callable[[Progress], bool]], _Result],
        progress: Callable[[Progress], object] | None,
    ) -> _Result:
        """Long work on a thread of its own, which ends early when the task is cancelled."""
        cancelled = threading.Event()

        def watch(now: Progress) -> bool:
            answer = None if progress is None else progress(now)
            return not cancelled.is_set() and (answer is None or bool(answer))

        work = asyncio.ensure_future(asyncio.to_thread(call, watch))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            cancelled.set()
            await asyncio.wait([work])
            # Looked at, so that nothing complains of an exception that nobody has seen.
            if not work.cancelled():
                work.exception()
            raise

    def snapshots(self) -> tuple[Snapshot, ...]:
        """The internal snapshots, in the image's order."""
        return self.image.snapshots()

    async def create_snapshot(self, name: str) -> Snapshot:
        """Make a snapshot of the disk, inside the image, and return its description."""
        return await asyncio.to_thread(self.image.create_snapshot, name)

    async def delete_snapshot(self, id_or_name: str) -> None:
        """Delete the snapshot with this ID or, if there is none, this name."""
        await asyncio.to_thread(self.image.delete_snapshot, id_or_name)

    async def apply_snapshot(self, id_or_name: str) -> None:
        """Let the disk be what it was when a snapshot was made, its size included. The guest must not be running."""
        await asyncio.to_thread(self.image.apply_snapshot, id_or_name)

    async def check(self) -> CheckReport:
        """Check the image while it is open."""
        return await asyncio.to_thread(self.image.check)

    async def start(self) -> None:
        """Start the recycler."""
        await asyncio.to_thread(self.image.start)

    def pause(self) -> None:
        """Let the recycler finish its step, then rest."""
        self.image.pause()

    def resume(self) -> None:
        """Let a paused recycler go on."""
        self.image.resume()

    async def stop(self) -> None:
        """Stop the recycler and wait until it has ended."""
        await asyncio.to_thread(self.image.stop)

    async def close(self) -> None:
        """Close the image. It is closed, and every request ends, also if this is cancelled meanwhile."""
        closing = _begin(self.image.close)
        try:
            await asyncio.shield(closing)
        finally:
            loop = asyncio.get_running_loop()
            queue = self._queues.pop(loop, None)
            if queue is not None:
                loop.remove_reader(queue.fileno())
                finishing = _begin(queue.finish)
                # Not after the await, which another cancellation may end before the requests have.
                finishing.add_done_callback(lambda _: queue.reap())
                await asyncio.shield(finishing)

    @property
    def closed(self) -> bool:
        """Whether close() has been called."""
        return self.image.closed

    @property
    def stats(self) -> Stats:
        """What the image and its recycler are doing."""
        return self.image.stats

    @property
    def info(self) -> Info:
        """What the image is."""
        return self.image.info

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


async def open(path: str | PathLike[str], **options: Unpack[OpenOptions]) -> AsyncImage:
    """Open the image file `path`: see :func:`qcow_recycler.open`."""
    return AsyncImage(await asyncio.to_thread(lambda: _api.open(path, **options)))


async def open_device(
    device: FixedBlockDevice, data: FixedBlockDevice | None = None, **options: Unpack[OpenOptions]
) -> AsyncImage:
    """Open the image that lives on `device`, whose methods are called on other threads than the event loop's."""
    return AsyncImage(await asyncio.to_thread(lambda: _api.open_device(device, data, **options)))


async def create(path: str | PathLike[str], size: int, **options: Unpack[CreateOptions]) -> None:
    """Create an image file: see :func:`qcow_recycler.create`."""
    await asyncio.to_thread(lambda: _api.create(path, size, **options))


async def check(path: str | PathLike[str], repair: Literal["no", "leaks", "all"] = "no") -> CheckReport:
    """Check an image file: see :func:`qcow_recycler.check`."""
    return await asyncio.to_thread(_api.check, path, repair)


__all__ = ["AsyncImage", "check", "create", "open", "open_device"]
