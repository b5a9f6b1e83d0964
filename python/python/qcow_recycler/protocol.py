"""What a Python object must offer to be the block device that an image lives on.

All offsets and lengths are in bytes. Calls may come from several threads at once, among them one of the library's own;
two calls whose ranges overlap never run at once if one of them writes, unless the guest itself does so. Transfers are
whole: a method that cannot move every byte raises. What it raises reaches the caller as the cause of a
:class:`~qcow_recycler.errors.DeviceError`, with its ``errno``.

What a completed write did may be lost until a ``flush`` that began after it has completed; nothing else is assumed.
Buffers are only valid during the call.

Do not let the device refer to the image that lives on it: such a cycle is never collected. Close the image.
"""

from __future__ import annotations

from typing import Protocol


class FixedBlockDevice(Protocol):
    """A device whose length cannot change."""

    def pread(self, offset: int, buffer: memoryview, /) -> int | None:
        """Fill the writable `buffer` from `offset`. A count that is returned must be the whole length."""

    def pwrite(self, offset: int, buffer: memoryview, /) -> int | None:
        """Store `buffer` at `offset`. A count that is returned must be the whole length."""

    def flush(self) -> object:
        """Make everything that completed before this call durable."""

    def length(self) -> int:
        """Return the length of the device."""
        ...


class BlockDevice(FixedBlockDevice, Protocol):
    """A device that can grow and shrink."""

    def truncate(self, length: int, /) -> object:
        """Make the device `length` bytes long; what is added reads as zeroes, also where other bytes were cut off."""


class FullBlockDevice(BlockDevice, Protocol):
    """A device with everything that the library can make use of; each of these methods is optional by itself."""

    def punch_hole(self, offset: int, length: int, /) -> object:
        """Make a range read as zeroes and give its space back."""

    def write_zeroes(self, offset: int, length: int, /) -> object:
        """Make a range read as zeroes, keeping its space."""

    def copy_range(self, source: int, destination: int, length: int, /) -> object:
        """Copy `length` bytes inside the device; the ranges do not overlap."""


__all__ = ["BlockDevice", "FixedBlockDevice", "FullBlockDevice"]
