"""The C library as a C programmer gets it: installed, found by pkg-config."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "tests" / "c"
EXAMPLES = ROOT / "ffi" / "examples"
HEADER = ROOT / "include" / "qcowrecycle.h"

STRICT = ["-Wall", "-Wextra", "-Werror", "-pedantic", "-g", "-pthread"]
COMPILERS = {"c99": ["gcc", "-std=c99"], "c++17": ["g++", "-std=c++17", "-x", "c++"]}


def run(*command: str | Path, env: dict[str, str] | None = None, timeout: float = 240) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


class Installed:
    """The library where `make install` put it."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.library = prefix / "lib"
        self.env = {
            "PKG_CONFIG_PATH": str(self.library / "pkgconfig"),
            "LD_LIBRARY_PATH": str(self.library),
            "RUST_BACKTRACE": "0",
        }

    def flags(self, *what: str) -> list[str]:
        return run("pkg-config", *what, "qcowrecycle", env=self.env).split()

    def compile(self, source: Path, program: Path, language: str = "c99", *more: str) -> Path:
        compiler = [*COMPILERS[language], *STRICT, f"-I{SOURCES}"]
        if language == "c++17":
            more = ("-x", "none", *more)
        run(*compiler, *self.flags("--cflags"), source, *more, *self.flags("--libs"), "-o", program)
        return program

    def run(self, *command: str | Path) -> str:
        return run(*command, env=self.env)
