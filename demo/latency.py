"""What the guests felt: the latency of their requests while the recycler worked, and while it did not."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import NamedTuple

from guests import Sample


class Latency(NamedTuple):
    """Of one kind of request; in seconds."""

    requests: int
    median: float
    p99: float
    worst: float


class Window(NamedTuple):
    """A stretch of time, on the clock of the samples."""

    began: float
    ended: float


def summarise(samples: Iterable[Sample], windows: list[Window]) -> dict[str, Latency]:
    """Return the latencies of the requests that began inside the windows, by kind."""
    starts = [window.began for window in windows]
    found: dict[str, list[float]] = {}
    for sample in samples:
        at = bisect_right(starts, sample.began) - 1
        if at >= 0 and sample.began < windows[at].ended:
            found.setdefault(sample.kind, []).append(sample.took)
    return {kind: _latency(sorted(took)) for kind, took in sorted(found.items())}


def _latency(took: list[float]) -> Latency:
    return Latency(len(took), took[len(took) // 2], took[min(len(took) - 1, len(took) * 99 // 100)], took[-1])


def total(windows: list[Window]) -> float:
    return sum(window.ended - window.began for window in windows)
