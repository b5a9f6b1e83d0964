"""Run by test_hostile.py in a process of its own with little memory: meets an image, and tells what happened.

    hostile_child.py MODE IMAGE [GUEST_OFFSET]

MODE is `open`, `write-open`, `checked-open`, `check`, or `use`: open for writing, read everything, write and discard at
GUEST_OFFSET, compact, close. Prints one JSON object: for each step the seconds of processor time that it took (how
busy the machine is must not matter) and its error, if any; and by how many bytes the process grew at most.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable

# The interpreter and the library's own code and stacks take some 100 MiB of address space.
MEMORY = 512 << 20
resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))

import qcow_recycler  # noqa: E402  (under the limit)

steps: dict[str, dict[str, object]] = {}


def step(name: str, what: Callable[[], object]) -> object:
    """Runs one step; an error of the library is a result, anything else ends this process."""
    start = time.process_time()
    result, found = None, {}
    try:
        result = what()
    except qcow_recycler.Error as e:
        found = {"type": type(e).__name__, "errno": e.errno, "field": e.field, "offset": e.offset, "message": str(e)}
    steps[name] = {"seconds": time.process_time() - start, "error": found or None}
    return result


def read_all(image: qcow_recycler.Image) -> None:
    """Every cluster is tried; the first error is told."""
    first = None
    for offset in range(0, min(image.info.virtual_size, 64 << 20), 4096):
        try:
            image.read(offset, min(4096, image.info.virtual_size - offset))
        except qcow_recycler.Error as e:
            first = first or e
    if first:
        raise first


def main(mode: str, path: str, guest_offset: int) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if mode == "check":
        report = step("check", lambda: qcow_recycler.check(path))
        if report is not None:
            steps["check"]["corruptions"] = report.corruptions
            steps["check"]["leaks"] = report.leaks
            steps["check"]["messages"] = list(report.messages)
    else:
        checked = mode == "checked-open"
        image = step("open", lambda: qcow_recycler.open(path, read_only=mode == "open", check_on_connect=checked))
        if image is not None:
            step("read", lambda: read_all(image))
            if mode == "use":
                step("write", lambda: image.write(guest_offset, b"\xee" * 4096))
                step("part", lambda: image.write(guest_offset, b"\xdd" * 512))
                step("flush", image.flush)
                step("discard", lambda: image.discard(guest_offset, 4096))
                step("compact", image.compact)
            step("close", image.close)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"steps": steps, "grown": grown << 10}))


main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else 0)
