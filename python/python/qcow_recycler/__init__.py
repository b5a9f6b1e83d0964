"""Read, write and recycle qcow2 images: the file stays as small as its live data while it is in use.

>>> import qcow_recycler
>>> with qcow_recycler.open("disk.qcow2") as image:
...     image.start()
...     image.discard(0, 1 << 20)

All offsets, lengths and sizes are in bytes. Every failure is an :class:`Error`, which is an :class:`OSError`.
"""

from . import errors, options, protocol, records
from ._api import check, check_device, commit, create, create_device, open, open_device, upgrade
from ._ext import Image, __version__
from .errors import (
    AlreadyExists,
    BackingError,
    BackingNotAllowed,
    BadOption,
    Cancelled,
    Closed,
    DataFileError,
    DataFileNotAllowed,
    DeviceError,
    Error,
    Failed,
    InvalidImage,
    Locked,
    Misaligned,
    NotFound,
    OutOfRange,
    PassphraseNeeded,
    PermissionDenied,
    ReadOnly,
    Unsupported,
    WrongPassphrase,
)
from .options import CreateOptions, OpenOptions
from .protocol import BlockDevice, FixedBlockDevice, FullBlockDevice
from .records import Bitmap, CheckReport, CommitReport, CompactReport, Extent, Info, Progress, Snapshot, Stats
from .zeroes import ZeroScan, discard_zeroes

__all__ = [
    "AlreadyExists",
    "BackingError",
    "BackingNotAllowed",
    "BadOption",
    "Bitmap",
    "BlockDevice",
    "Cancelled",
    "CheckReport",
    "Closed",
    "CommitReport",
    "CompactReport",
    "CreateOptions",
    "DataFileError",
    "DataFileNotAllowed",
    "DeviceError",
    "Error",
    "Extent",
    "Failed",
    "FixedBlockDevice",
    "FullBlockDevice",
    "Image",
    "Info",
    "InvalidImage",
    "Locked",
    "Misaligned",
    "NotFound",
    "OpenOptions",
    "OutOfRange",
    "PassphraseNeeded",
    "PermissionDenied",
    "Progress",
    "ReadOnly",
    "Snapshot",
    "Stats",
    "Unsupported",
    "WrongPassphrase",
    "ZeroScan",
    "__version__",
    "check",
    "check_device",
    "commit",
    "create",
    "create_device",
    "discard_zeroes",
    "errors",
    "open",
    "open_device",
    "options",
    "protocol",
    "records",
    "upgrade",
]
