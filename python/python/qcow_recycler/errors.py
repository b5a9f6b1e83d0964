"""The exceptions of the package: one base class, and a subclass for each thing a caller can act on."""

from __future__ import annotations


class Error(OSError):
    """A failure of the library: an :class:`OSError` that also knows the place.

    ``errno`` and ``strerror`` are always set, ``filename`` when the image was opened by its path. ``offset`` is in
    bytes: in the image file, or on the virtual disk for :class:`OutOfRange` and :class:`Misaligned`; ``field`` is the
    name of the header field, table entry or option. Both are None where there is no such place.
    """

    offset: int | None
    field: str | None

    def __init__(
        self,
        errno: int,
        strerror: str,
        filename: str | None = None,
        *,
        offset: int | None = None,
        field: str | None = None,
    ) -> None:
        # OSError counts its arguments, and shows a filename that is None.
        if filename is None:
            super().__init__(errno, strerror)
        else:
            super().__init__(errno, strerror, filename)
        self.offset = offset
        self.field = field


class DeviceError(Error):
    """The image file or block device failed a transfer; what a Python block device raised is the ``__cause__``."""


class NotFound(DeviceError, FileNotFoundError):
    """There is no such image file."""


class PermissionDenied(DeviceError, PermissionError):
    """The system does not permit it."""


class AlreadyExists(DeviceError, FileExistsError):
    """The image file to be created exists."""


class InvalidImage(Error):
    """The image contradicts the format, or itself; ``offset`` and ``field`` say where."""


class Unsupported(Error):
    """The image or the device needs something that is not supported; nothing was changed."""


class ReadOnly(Error):
    """A change to an image that was opened read-only."""


class Failed(Error):
    """An earlier failure left the image read-only; what was not flushed may be lost. Open it again."""


class OutOfRange(Error, ValueError):
    """The request reaches past the end of the virtual disk."""


class Misaligned(Error, ValueError):
    """The request is not aligned to 512 bytes."""


class Locked(Error):
    """Somebody else uses the image file."""


class BackingNotAllowed(Error):
    """The image has a backing file, and opening it was not allowed."""


class DataFileNotAllowed(Error):
    """The image has an external data file, and opening it was not allowed."""


class BadOption(Error, ValueError):
    """An option with an unknown name or an unusable value; ``field`` is its name."""


class PassphraseNeeded(Error):
    """The image is encrypted, and was opened without its passphrase."""


class WrongPassphrase(Error):
    """The passphrase opens none of the image's key slots; nothing was changed."""


class Closed(Error, ValueError):
    """The image is closed, or was opened before fork() and belongs to the parent of this process."""


class Cancelled(Error):
    """The caller cancelled the work; the image is consistent."""


class BackingError(Error):
    """The backing file could not be opened, or is no image that can be."""


class DataFileError(Error):
    """The external data file could not be opened or created."""


__all__ = [
    "AlreadyExists",
    "BackingError",
    "BackingNotAllowed",
    "BadOption",
    "Cancelled",
    "Closed",
    "DataFileError",
    "DataFileNotAllowed",
    "DeviceError",
    "Error",
    "Failed",
    "InvalidImage",
    "Locked",
    "Misaligned",
    "NotFound",
    "OutOfRange",
    "PassphraseNeeded",
    "PermissionDenied",
    "ReadOnly",
    "Unsupported",
    "WrongPassphrase",
]
