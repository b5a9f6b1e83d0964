#!/usr/bin/env python3
"""Makes the seeds in corpus/ anew, with qemu-img and qemu-io: small images of every shape, and the inputs that follow.

An input of the target `image` is 8 bytes that choose the requests, then an image file: `tail -c +9 INPUT` is the image.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus")
SIZE = 96 << 10
LIMIT = 1 << 20

# name: options of qemu-img create, size of the disk, requests of qemu-io, names of snapshots taken half-way
SHAPES: dict[str, tuple[str, int, list[str], list[str]]] = {
    "plain": ("", SIZE, [], []),
    "empty-disk": ("", 0, [], []),
    "version-2": ("compat=0.10", SIZE, [], []),
    "version-2-snapshot": ("compat=0.10", SIZE, [], ["one"]),
    "refcounts-1": ("refcount_bits=1", SIZE, [], []),
    "refcounts-2-snapshots": ("refcount_bits=2", SIZE, [], ["one", "two"]),
    "refcounts-8": ("refcount_bits=8", SIZE, [], []),
    "refcounts-64": ("refcount_bits=64", SIZE, [], ["a longer name of a snapshot"]),
    "lazy": ("lazy_refcounts=on", SIZE, [], []),
    "lazy-dirty": ("lazy_refcounts=on", SIZE, ["abort"], []),
    "snapshots": ("", SIZE, [], ["one", "two", "three"]),
    "preallocated": ("preallocation=metadata", SIZE // 4, [], []),
    "clusters-4k": ("cluster_size=4k", 192 << 10, [], []),
    "clusters-4k-snapshot": ("cluster_size=4k", 192 << 10, [], ["one"]),
    "clusters-16k-extended": ("cluster_size=16k,extended_l2=on", 96 << 10, [], []),
    "zstd": ("cluster_size=1k,compression_type=zstd", SIZE, [], []),
    "bitmap": ("cluster_size=1k", SIZE, [], []),
    "backing": ("", SIZE, [], []),
    "data-file": ("", SIZE, [], []),
    "aes": ("encrypt.format=aes,encrypt.key-secret=s", SIZE, [], []),
    "compressed": ("cluster_size=4k", 128 << 10, [], []),
    "compressed-snapshot": ("cluster_size=4k", 128 << 10, [], ["one"]),
}

# Fractions of the disk in 24ths: writes, then (after the snapshots) overwrites, zeroes, kept zeroes and discards.
FIRST = ["write -P 17 {0} {2}", "write -P 34 {5} {1}", "write -P 51 {8} {2}", "write -P 68 {22} {2}"]
SECOND = ["write -P 85 {1} {2}", "write -z {6} {1}", "write -z -u {8} {1}", "discard {22} {1}", "write -P 102 {14} {1}"]


def run(*command: str | Path, status: Iterable[int] = (0,)) -> None:
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if result.returncode not in status:
        raise SystemExit(f"{command}: {result.stdout}{result.stderr}")


def requests(lines: list[str], size: int, version_2: bool) -> list[str]:
    # A multiple of 1 KiB, so that most requests end on no cluster but some do.
    places = [size // 24 * n // 1024 * 1024 for n in range(24)]
    keep = [line for line in lines if not (version_2 and "-z" in line)]
    return [argument for line in keep for argument in ("-c", line.format(*places))] if size else []


def image(directory: Path, name: str) -> Path:
    options, size, more, snapshots = SHAPES[name]
    path = directory / f"{name}.qcow2"
    options = ",".join(filter(None, ["" if "cluster_size" in options else "cluster_size=512", options]))
    create: list[str | Path] = ["qemu-img", "create", "-q", "-f", "qcow2"]
    if name == "aes":
        create += ["--object", "secret,id=s,data=secret"]
    if name == "backing":
        run("qemu-img", "create", "-q", "-f", "raw", directory / "base.raw", str(size // 2))
        create += ["-b", "base.raw", "-F", "raw"]
    if name == "data-file":
        options += f",data_file={directory / 'data.raw'}"
    if name.startswith("compressed"):
        words = b"".join(b"%d bottles of beer\n" % n for n in range(9000))
        (directory / "words.raw").write_bytes(words[: size // 2].ljust(size, b"\0"))
        run("qemu-img", "convert", "-q", "-c", "-O", "qcow2", "-o", options, directory / "words.raw", path)
    else:
        run(*create, "-o", options, path, str(size))
    if name == "aes":
        return path
    version_2 = "0.10" in options
    first = [] if name.startswith("compressed") else requests(FIRST, size, version_2)
    if first:
        run("qemu-io", "-f", "qcow2", "-d", "unmap", *first, path)
    if name == "zstd":
        shutil.copy(path, directory / "plain.copy")
        run("qemu-img", "convert", "-q", "-c", "-O", "qcow2", "-o", options, directory / "plain.copy", path)
    for snapshot in snapshots:
        run("qemu-img", "snapshot", "-c", snapshot, path)
    if name == "bitmap":
        run("qemu-img", "bitmap", "--add", path, "b0")
    second = requests(SECOND, size, version_2) + [a for line in more for a in ("-c", line)]
    if second and name != "zstd":
        run("qemu-io", "-f", "qcow2", "-d", "unmap", *second, path, status=(0, -6, 134))
    return path


def write(target: str, name: str, data: bytes) -> None:
    place = CORPUS / target / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)


def entry_seeds() -> None:
    """Shape of the image (4 bytes), L2 entries, then what else is in the file: see src/entries.rs."""
    copied, compressed, zero = 1 << 63, 1 << 62, 1

    def table(*entries: int) -> bytes:
        return b"".join(e.to_bytes(8, "big") for e in entries)

    for bits in (9, 12, 16):
        data = 5 << bits
        shift = 62 - (bits - 8)
        entries = {
            "data": [copied | data, data, copied | data + (1 << bits), 0, copied],
            "zero": [zero, copied | data | zero, data | zero, copied | zero],
            "compressed": [compressed | data, compressed | 1 << shift | data + 17, compressed | copied | data],
            "metadata": [copied | n << bits for n in range(6)],
            "beyond": [copied | 1 << 50, 1 << 55, compressed | (1 << 62) - 1, 1 << 61],
        }
        for name, values in entries.items():
            for version in (2, 3):
                shape = bytes([bits, version, 4, 0])
                write("entries", f"{name}-{bits}-{version}", shape + table(*values))


def main() -> None:
    shutil.rmtree(CORPUS, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        previous = Path.cwd()
        os.chdir(scratch)
        for number, name in enumerate(SHAPES):
            data = image(Path(scratch), name).read_bytes()
            # A path of this machine is of no use elsewhere.
            data = data.replace(scratch.encode(), b"/" * len(scratch))
            write("image", name, number.to_bytes(8, "big") + data)
            cluster = 1 << int.from_bytes(data[20:24], "big")
            write(
                "header", name, len(data).to_bytes(8, "big") + data[: max(cluster, 512)].rstrip(b"\0").ljust(512, b"\0")
            )
        os.chdir(previous)
    entry_seeds()
    for name, config in {
        "origin": "discard=true;compact_after_unmaps=262144;keep_erased=262144;runtime_asserts=false;id=disk0;",
        "all": "read_only=1;check_on_connect=0;settle_ms=5000;flush_ms=1;rate_limit=1048576;l2_cache=0",
        "limits": "keep_erased=18446744073709551615;settle_ms=18446744073709551615",
        "spaces": " discard = true ; ; id = a=b ;",
        "unknown": "nonsense=1;=;id",
    }.items():
        write("options", name, config.encode())
    total = sum(f.stat().st_size for f in CORPUS.rglob("*") if f.is_file())
    assert total < LIMIT, f"the corpus has grown to {total} bytes"
    print(f"{total} bytes in {sum(f.is_file() for f in CORPUS.rglob('*'))} files")


if __name__ == "__main__":
    main()
