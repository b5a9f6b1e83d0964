"""Two guests that keep using the disk through the library, and believe nothing that they do not find as it must be."""

from __future__ import annotations

import mmap
import random
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import qcow_recycler
from ext4 import BLOCK, Run
from programs import DemoError

PAUSE = 0.0005
"""Between two requests of a guest, in seconds."""
WRITES_PER_FLUSH = 64
_ZERO = bytes(BLOCK)


class Sample(NamedTuple):
    """One request."""

    began: float
    took: float
    kind: str


class Changes:
    """What the filesystem's own work may have changed at any moment: the reader's second look at a block that differs.

    The work comes in waves, numbered from 1. Before a wave begins a block holds what the waves before it left there;
    once the wave has ended, what the wave made of it; in between, either.
    """

    def __init__(self) -> None:
        self._versions: dict[int, list[tuple[int, bytes]]] = {}
        self.ended = 0
        """The last wave that has ended."""

    def announce(self, wave: int, rewritten: dict[int, bytes], discarded: list[Run]) -> None:
        """Say what `wave` is going to do, before it does any of it."""
        for part in discarded:
            for block in range(part.first, part.end):
                self._versions[block] = [*self._versions.get(block, []), (wave, _ZERO)]
        for block, data in rewritten.items():
            self._versions[block] = [*self._versions.get(block, []), (wave, data)]

    def allows(self, block: int, data: bytes, original: bytes, ended_at_start: int) -> bool:
        """Whether a read that began after the wave `ended_at_start` had ended may return `data`."""
        settled = original
        for wave, version in self._versions.get(block, []):
            if wave <= ended_at_start:
                settled = version
            elif data == version:
                return True
        return data == settled

    def apply(self, model: mmap.mmap) -> None:
        """Make the changes in the model, when nobody compares with it any more."""
        for block, versions in self._versions.items():
            model[block * BLOCK : (block + 1) * BLOCK] = versions[-1][1]


class Guest(threading.Thread):
    """A thread that issues one verified request after the other until it is told to stop."""

    def __init__(self, name: str, image: qcow_recycler.Image, seed: int) -> None:
        super().__init__(name=name, daemon=True)
        self.image = image
        self.chance = random.Random(seed)
        self.samples: list[Sample] = []
        self.bytes = 0
        self.failure: BaseException | None = None
        self._stop_asked = threading.Event()

    def run(self) -> None:
        try:
            while not self._stop_asked.is_set():
                self.request()
                time.sleep(PAUSE)
            self.finish()
        except BaseException as failure:
            self.failure = failure

    def request(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        pass

    def timed(self, kind: str, call: Callable[..., object], *args: object) -> object:
        began = time.perf_counter()
        result = call(*args)
        self.samples.append(Sample(began, time.perf_counter() - began, kind))
        return result

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()

    def verify(self) -> None:
        """Raise what has gone wrong in the thread, if anything has."""
        if self.failure is not None:
            raise DemoError(f"the {self.name} has failed: {self.failure}") from self.failure


class Reader(Guest):
    """Reads random pieces of what the filesystem uses, and compares every byte."""

    def __init__(
        self, image: qcow_recycler.Image, model: mmap.mmap, used: list[Run], changes: Changes, seed: int
    ) -> None:
        super().__init__("reader", image, seed)
        self.model = model
        self.changes = changes
        self.pieces = [Run(first, min(16, run.end - first)) for run in used for first in range(run.first, run.end, 16)]

    def request(self) -> None:
        piece = self.chance.choice(self.pieces)
        ended = self.changes.ended
        data = self.timed("read", self.image.read, piece.offset, piece.length)
        assert isinstance(data, bytes)
        self.bytes += len(data)
        original = self.model[piece.offset : piece.offset + piece.length]
        # Nothing has ended yet, so what was there may still be.
        if data == original and not ended:
            return
        for at in range(0, piece.length, BLOCK):
            block = (piece.offset + at) // BLOCK
            if not self.changes.allows(block, data[at : at + BLOCK], original[at : at + BLOCK], ended):
                raise DemoError(f"block {block} of the filesystem reads as something that it must not hold")


class Writer(Guest):
    """Overwrites one file inside the filesystem, reads back what it wrote, and keeps the model in step."""

    def __init__(self, image: qcow_recycler.Image, model: mmap.mmap, live: list[Run], seed: int) -> None:
        super().__init__("writer", image, seed)
        self.model = model
        self.live = live
        self.writes = 0

    def request(self) -> None:
        run = self.chance.choice(self.live)
        count = min(self.chance.choice((1, 1, 2, 4, 8)), run.size)
        piece = Run(run.first + self.chance.randrange(run.size - count + 1), count)
        data = self.chance.randbytes(piece.length)
        # No other request of a guest overlaps this one, so the model may lead.
        self.model[piece.offset : piece.offset + piece.length] = data
        self.timed("write", self.image.write, piece.offset, data)
        self.bytes += len(data)
        self.writes += 1
        if self.writes % 4 == 0:
            self.look(self.chance.choice(self.live))
        if self.writes % WRITES_PER_FLUSH == 0:
            self.timed("flush", self.image.flush)

    def look(self, run: Run) -> None:
        count = min(8, run.size)
        piece = Run(run.first + self.chance.randrange(run.size - count + 1), count)
        if self.image.read(piece.offset, piece.length) != self.model[piece.offset : piece.offset + piece.length]:
            raise DemoError(f"the live file reads back differently at block {piece.first}")
        self.bytes += piece.length

    def finish(self) -> None:
        for run in self.live:
            if self.image.read(run.offset, run.length) != self.model[run.offset : run.offset + run.length]:
                raise DemoError("the live file reads back differently at the end")
        self.image.flush()
