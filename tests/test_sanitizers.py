"""The C programs under sanitizers, which see into the library as well: `make sanitize` builds what this needs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from clib import COMPILERS, EXAMPLES, HEADER, SOURCES, STRICT, run

SANITIZER = os.environ.get("QCR_SANITIZER", "")

pytestmark = [
    pytest.mark.skipif(not SANITIZER, reason="make sanitize runs these"),
    pytest.mark.timeout(900),
]

# What the compiler puts into the C code, and the run-time library that both sides share.
KINDS = {"address": ("address,undefined", "asan"), "thread": ("thread", "tsan")}
# Programs that need no file, with what they are told.
PROGRAMS = {
    SOURCES / "null.c": [],
    SOURCES / "sizes.c": [],
    SOURCES / "open_null.c": [],
    SOURCES / "lifetimes.c": [],
    SOURCES / "reentry.c": [],
    SOURCES / "stubborn.c": ["60"],
    SOURCES / "threads.c": ["1000"],
    SOURCES / "queue.c": ["threads", "2000"],
    EXAMPLES / "memory_disk.c": [],
}
QUEUES = ["uring", "threads", "refused"]


def build(source: Path, program: Path) -> Path:
    flags, runtime = KINDS[SANITIZER]
    sysroot = Path(run("rustc", "+nightly", "--print", "sysroot").strip())
    (library,) = sysroot.glob(f"lib/rustlib/x86_64-unknown-linux-gnu/lib/librustc-nightly_rt.{runtime}.a")
    # Undefined behaviour ends the program on the spot: that sanitizer's own run-time is not needed.
    code = [f"-fsanitize={flags}", "-fsanitize-undefined-trap-on-error", "-O1", f"-I{SOURCES}", f"-I{HEADER.parent}"]
    run(*COMPILERS["c99"], *STRICT, *code, "-c", source, "-o", program.with_suffix(".o"))
    libraries = ["-Wl,--whole-archive", library, "-Wl,--no-whole-archive", "-lpthread", "-lm", "-ldl", "-lrt"]
    run("g++", program.with_suffix(".o"), os.environ["QCR_SANITIZED"], *libraries, "-o", program)
    return program


# A guest may overwrite what is being copied: the copy is not used then.
SUPPRESSED = "race:memory_copy_range\n"


def execute(suppressions: Path, *command: str | Path) -> str:
    suppressions.write_text(SUPPRESSED)
    # Addresses that are not random: where the sanitizer's own memory is to be there is room then.
    options = {
        "ASAN_OPTIONS": "detect_stack_use_after_return=1",
        "TSAN_OPTIONS": f"halt_on_error=1 second_deadlock_stack=1 suppressions={suppressions}",
        "RUST_BACKTRACE": "0",
    }
    return run(shutil.which("setarch") or "setarch", "-R", *command, env=options, timeout=800)


@pytest.mark.parametrize("source", PROGRAMS, ids=lambda source: source.stem)
def test_program(source: Path, tmp_path: Path) -> None:
    execute(tmp_path / "suppressions", build(source, tmp_path / source.stem), *PROGRAMS[source])


@pytest.mark.parametrize("how", QUEUES)
def test_queue_on_a_file(how: str, image_path: Path, tmp_path: Path) -> None:
    execute(tmp_path / "suppressions", build(SOURCES / "queue.c", tmp_path / "queue"), how, "2000", image_path)
    run("qemu-img", "check", "-q", image_path)


@pytest.mark.parametrize("name", ["paths", "snapshots", "data_file"])
def test_images_in_files(name: str, tmp_path: Path) -> None:
    program = build(SOURCES / f"{name}.c", tmp_path / name)
    place = tmp_path / "place"
    place.mkdir()
    execute(tmp_path / "suppressions", program, place)


def test_example_host_file(image_path: Path, tmp_path: Path) -> None:
    execute(tmp_path / "suppressions", build(EXAMPLES / "host_file.c", tmp_path / "host_file"), image_path)
