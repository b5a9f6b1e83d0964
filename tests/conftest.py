"""Shared by all tests: where images go, and the C library."""

from __future__ import annotations

from pathlib import Path

import pytest

from clib import SOURCES, Installed, run


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    """A path for an image that does not exist yet."""
    return tmp_path / "disk.qcow2"


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The C library, installed. Compiling it the first time takes its time."""
    prefix = tmp_path_factory.mktemp("installed")
    run("make", "-f", "mk/ffi.mk", "install", f"PREFIX={prefix}", timeout=1800)
    return Installed(prefix)


@pytest.fixture(scope="session")
def crash_guest(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C program that works on an image until it is killed."""
    return installed.compile(SOURCES / "guest.c", tmp_path_factory.mktemp("guest") / "guest")
