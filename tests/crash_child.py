"""Run by tests of crashes, and killed by them: works on an image for ever, and tells on standard output what it does.

    crash_child.py IMAGE SEED FIRST_VERSION CONFIG

Lines, each told by one write, which a kill cannot tear from the pipe's reader's point of view:

    w OFFSET LENGTH VERSION THREAD   about to write: each sector holds its own offset and the version
    z OFFSET LENGTH THREAD           about to discard or zero whole clusters
    f THREAD                         about to flush
    F THREAD                         the flush has completed: what was completed before its `f` is durable

There is one thread here, 0; `c/guest.c` has several, each with a part of the disk to itself. A thread has completed
what it told when it tells something else. Ends with status 3 when the image fails it.
"""

from __future__ import annotations

import os
import random
import struct
import sys

import qcow_recycler

SECTOR = 512


def sectors(offset: int, length: int, version: int) -> bytes:
    """Data that knows where on the disk it belongs, and which write it came from."""
    return b"".join(struct.pack("<QQ", at, version) * (SECTOR // 16) for at in range(offset, offset + length, SECTOR))


def tell(line: str) -> None:
    os.write(1, line.encode() + b"\n")


def main(path: str, seed: int, version: int, config: str) -> None:
    rng = random.Random(seed)
    image = qcow_recycler.open(path, config=config)
    info = image.info
    clusters = info.virtual_size // info.cluster_size
    image.start()
    tell("open")
    while True:
        kind = rng.choices(["write", "cluster", "discard", "zeroes", "flush", "compact"], [6, 4, 5, 1, 2, 0.5])[0]
        if kind == "write":
            length = rng.randint(1, 16) * SECTOR
            offset = rng.randrange((info.virtual_size - length) // SECTOR) * SECTOR
            version += 1
            tell(f"w {offset} {length} {version} 0")
            image.write(offset, sectors(offset, length, version))
        elif kind == "flush":
            tell("f 0")
            image.flush()
            tell("F 0")
        elif kind == "compact":
            image.compact()
        else:
            first = rng.randrange(clusters)
            count = min(clusters - first, rng.randint(1, 1 + clusters // 16))
            offset, length = first * info.cluster_size, count * info.cluster_size
            if kind == "cluster":
                length = min(length, 256 << 10)
                version += 1
                tell(f"w {offset} {length} {version} 0")
                image.write(offset, sectors(offset, length, version))
            else:
                tell(f"z {offset} {length} 0")
                if kind == "discard":
                    image.discard(offset, length)
                else:
                    image.write_zeroes(offset, length)


if __name__ == "__main__":
    try:
        main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    except qcow_recycler.Error as e:
        print(e, file=sys.stderr)
        os._exit(3)
