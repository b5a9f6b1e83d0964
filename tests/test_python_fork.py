"""Python programs that fork: the parent's image is the parent's, whatever the child does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import qcow_recycler
import qemu

MIB = 1 << 20
CLUSTER = 64 << 10

COMMON = """
import asyncio, gc, os, signal, sys, time
import qcow_recycler
from qcow_recycler import aio

CLUSTER = 64 << 10
path = sys.argv[1]

def contents():
    with open(path, "rb") as file:
        return file.read()

def refused(call):
    try:
        call()
    except qcow_recycler.Closed as error:
        assert "fork" in str(error) and error.filename == path, error
    else:
        raise AssertionError("the child could use the image")

def fork(child):
    pid = os.fork()
    if pid == 0:
        child()
        sys.exit(0)
    deadline = time.monotonic() + 60
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            sys.exit("the child hangs")
        time.sleep(0.01)
    if ended[1]:
        sys.exit(f"the child ended with status {os.waitstatus_to_exitcode(ended[1])}")
"""

SYNCHRONOUS = """
image = qcow_recycler.open(path)
START
image.write(0, b"1" * 8 * CLUSTER)
image.flush()
image.write(8 * CLUSTER, b"2" * 8 * CLUSTER)
walk = image.extents()

def child():
    global image
    CHILD

# Only a recycler would change anything meanwhile.
quiet = not image.stats.recycler_running
before = contents() if quiet else None
fork(child)
assert not quiet or contents() == before
for n in range(16, 80):
    image.write(n * CLUSTER, b"3" * CLUSTER)
image.flush()
assert image.read(0, 8 * CLUSTER) == b"1" * 8 * CLUSTER
image.close()
"""

QUEUE = """
from qcow_recycler._ext import Queue

class Promise:
    ended = False
    def done(self): return self.ended
    def set_result(self, result): self.ended = True
    def set_exception(self, exception): raise exception

image = qcow_recycler.open(path)
queue = Queue(image)

def write(first, last, byte):
    promises = [Promise() for _ in range(first, last)]
    for n, promise in zip(range(first, last), promises):
        queue.write(promise, n * CLUSTER, byte * CLUSTER)
    return promises

def wait(promises):
    while not all(promise.ended for promise in promises):
        queue.reap()

wait(write(0, 8, b"1"))
under_way = write(8, 16, b"2")

def child():
    global image, queue
    refused(queue.reap)
    refused(queue.fileno)
    refused(lambda: write(8, 9, b"x"))
    refused(lambda: queue.flush(Promise()))
    queue.finish()
    del queue, image
    gc.collect()

fork(child)
wait(under_way)
wait(write(16, 80, b"3"))
flushed = Promise()
queue.flush(flushed)
wait([flushed])
queue.finish()
image.close()
"""

ASYNCHRONOUS = """
async def write(first, last, byte):
    await asyncio.gather(*(image.write(n * CLUSTER, byte * CLUSTER) for n in range(first, last)))

loop = asyncio.new_event_loop()
image = loop.run_until_complete(aio.open(path))
loop.run_until_complete(image.start())
loop.run_until_complete(write(0, 8, b"1"))
loop.run_until_complete(write(8, 16, b"2"))

def child():
    global image
    refused(lambda: asyncio.run(image.read(0, 512)))
    refused(lambda: asyncio.run(image.flush()))
    refused(lambda: asyncio.run(image.stop()))
    asyncio.run(image.close())
    del image
    gc.collect()
    # Python's loops do damage to the parent's when they end in a child.
    os._exit(0)

fork(child)
loop.run_until_complete(write(16, 80, b"3"))
loop.run_until_complete(image.close())
loop.close()
"""

# A child's own images are as good as any.
OWN = """
    global own
    other = path + ".own"
    qcow_recycler.create(other, 16 * CLUSTER)
    own = qcow_recycler.open(other)
    own.write(0, b"4" * CLUSTER)
    fork(own.close)
    assert not own.closed and own.read(0, 512) == b"4" * 512
"""

CHILDREN = {
    "exits": "pass",
    "closes": "image.close(); assert image.closed",
    "leaves the block": """
    with image:
        pass""",
    "drops": "del image; gc.collect()",
    "uses": """
    for call in (
        lambda: image.read(0, 512),
        lambda: image.write(0, b"x" * CLUSTER),
        lambda: image.discard(0, 8 * CLUSTER),
        lambda: next(walk),
        lambda: image.info,
        lambda: image.stats,
        image.flush,
        image.compact,
        image.start,
        image.stop,
        image.extents,
    ):
        refused(call)
    assert image.closed and "closed" in repr(image)""",
}


@pytest.fixture
def path(image_path: Path) -> Path:
    qcow_recycler.create(image_path, 16 * MIB)
    return image_path


def run(program: str, path: Path) -> None:
    # Newer Pythons warn of any fork() of a process with threads.
    warnings = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]
    command = [sys.executable, *warnings, "-c", COMMON + program, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    qemu.assert_clean(path)
    written = b"1" * 8 * CLUSTER + b"2" * 8 * CLUSTER + b"3" * 64 * CLUSTER
    qemu.assert_contents(path, written.ljust(16 * MIB, b"\0"))


@pytest.mark.parametrize("start", ["", "image.start()"], ids=["without the recycler", "with the recycler"])
@pytest.mark.parametrize("child", CHILDREN.values(), ids=CHILDREN.keys())
def test_a_child_leaves_the_image_alone(child: str, start: str, path: Path) -> None:
    run(SYNCHRONOUS.replace("START", start).replace("CHILD", child), path)


def test_a_child_leaves_a_queue_alone(path: Path) -> None:
    run(QUEUE, path)


def test_a_child_leaves_an_asynchronous_image_alone(path: Path) -> None:
    run(ASYNCHRONOUS, path)


def test_a_child_may_have_images_of_its_own(path: Path) -> None:
    run(SYNCHRONOUS.replace("START", "").replace("CHILD", OWN.strip()), path)
    own = path.with_name(path.name + ".own")
    qemu.assert_clean(own)
    qemu.assert_contents(own, b"4" * CLUSTER + bytes(15 * CLUSTER))
