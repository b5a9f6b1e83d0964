"""The functions of the package."""

from __future__ import annotations

import atexit
import sys
import weakref
from collections.abc import Callable
from os import PathLike
from typing import Literal, Unpack

from . import _ext
from ._ext import Image
from .options import CreateOptions, OpenOptions
from .protocol import FixedBlockDevice
from .records import CheckReport, CommitReport

# The recycler's thread may call Python; it must be gone before the interpreter is. In a child process, closing does
# nothing to images that its parent opened.
_open_images: weakref.WeakSet[Image] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for image in list(_open_images):
        try:
            image.close()
        except OSError as error:
            print(f"qcow_recycler: closing {image!r} at exit failed: {error}", file=sys.stderr)


def open(path: str | PathLike[str], **options: Unpack[OpenOptions]) -> Image:
    """Open the image file `path`: see :class:`OpenOptions` for the keyword arguments.

    The recycler is not running yet: see :meth:`Image.start`. Use the image as a context manager, or close it.
    """
    image = _ext.open_path(path, options)
    _open_images.add(image)
    return image


def open_device(
    device: FixedBlockDevice, data: FixedBlockDevice | None = None, **options: Unpack[OpenOptions]
) -> Image:
    """Open the image that lives on `device`, a Python object: see :mod:`qcow_recycler.protocol`.

    If the guest's data is in an external data file, `data` is the device of that.
    """
    image = _ext.open_device(device, data, options)
    _open_images.add(image)
    return image


def create(path: str | PathLike[str], size: int, **options: Unpack[CreateOptions]) -> None:
    """Create the image file `path`, which must not exist, for a disk of `size` bytes: see :class:`CreateOptions`.

    An external data file that the options name is created with it.
    """
    _ext.create_path(path, size, options)


def create_device(
    device: FixedBlockDevice, size: int, data: FixedBlockDevice | None = None, **options: Unpack[CreateOptions]
) -> None:
    """Create an image on `device`, with its external data file on `data` if it has one, whatever they held before."""
    _ext.create_device(device, data, size, options)


def check(path: str | PathLike[str], repair: Literal["no", "leaks", "all"] = "no") -> CheckReport:
    """Check the image file `path`, which nobody may be using, and repair what `repair` allows."""
    return _ext.check_path(path, repair)


def check_device(device: FixedBlockDevice, repair: Literal["no", "leaks", "all"] = "no") -> CheckReport:
    """Check, and repair, the image that lives on `device`."""
    return _ext.check_device(device, repair)


def commit(
    path: str | PathLike[str],
    progress: Callable[[CommitReport], object] | None = None,
    **options: Unpack[OpenOptions],
) -> CommitReport:
    """Write what the image file `path` holds into its backing file, and empty the image; the disk reads as before.

    Nobody may be using either file, and no other image may have the same backing file. `progress` is called between
    pieces of the work; when it returns False, :class:`Cancelled` is raised and the image still holds everything.
    """
    given: OpenOptions = {"backing": "allow", **options}
    return _ext.commit_path(path, given, progress)


def upgrade(path: str | PathLike[str]) -> None:
    """Make the image file `path`, which nobody may be using, one of version 3 of the format."""
    _ext.upgrade_path(path)
