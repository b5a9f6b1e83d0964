"""Shared by all tests: where images go."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def image_path(tmp_path: Path) -> Path:
    """A path for an image that does not exist yet."""
    return tmp_path / "disk.qcow2"
