"""Running the programs that the demo builds on: e2fsprogs and qemu-utils."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable

# Debian keeps e2fsprogs where only root's path looks.
_ENVIRONMENT = {**os.environ, "LC_ALL": "C", "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}


class DemoError(Exception):
    """Something that ends the demo: a program that failed, or a verification that did not hold."""


def run(*command: str, accept: Iterable[int] = (0,)) -> str:
    """Run `command` and return its standard output; an exit code outside `accept` ends the demo."""
    try:
        done = subprocess.run(command, env=_ENVIRONMENT, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError:
        raise DemoError(f"{command[0]} is not installed: it comes with e2fsprogs or qemu-utils") from None
    if done.returncode not in accept:
        words = (done.stderr.strip() or done.stdout.strip())[-1000:]
        raise DemoError(f"{' '.join(command)} failed with code {done.returncode}:\n{words}")
    return done.stdout
