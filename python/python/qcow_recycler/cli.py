"""The command ``qcow-recycler``."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Literal, NoReturn

from . import _api
from ._ext import Image, __version__
from .errors import Error
from .records import CheckReport, CommitReport, Info, Progress, Snapshot
from .zeroes import ZeroScan, discard_zeroes

OK = 0
FAILED = 1
CORRUPT = 2
LEAKED = 3
USAGE = 64
INTERRUPTED = 128 + signal.SIGINT

EPILOG = f"""\
exit codes:
  {OK}    done; for check: nothing is wrong, or everything wrong was repaired
  {FAILED}    the work failed; standard error says why in one line
  {CORRUPT}    check: corruptions are left
  {LEAKED}    check: leaked clusters are left, no corruption
  {USAGE}   the command line was not understood
  {INTERRUPTED}  cancelled with Ctrl-C; the image is consistent

Backing files are opened by commit only, external data files with --data-file only: the image names them. An image
that a running virtual machine uses is refused.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # argparse's own code, 2, says "corrupt" here.
        self.print_usage(sys.stderr)
        self.exit(USAGE, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qcow-recycler",
        description="Look at, check and shrink qcow2 images.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"qcow-recycler {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, among: Any = commands
    ) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = among.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.add_argument("image", metavar="IMAGE", help="path of the qcow2 file")
        sub.add_argument("--json", action="store_true", help="write JSON to standard output, one object a line")
        sub.set_defaults(run=run)
        return sub

    command("info", _info, "show what an image is")
    check = command("check", _check, "check an image for corruptions and leaked clusters")
    check.add_argument("--repair", choices=["leaks", "all"], default="no", help="what to repair")
    compact = command("compact", _compact, "move clusters from the end of the file into its holes, and cut it")
    compact.add_argument("--compress", action="store_true", help="compress what the disk holds before")
    bitmap = command("bitmap", _bitmap, "list the persistent bitmaps of an image, or change one")
    bitmap.add_argument("name", metavar="NAME", nargs="?", help="the bitmap that is to be changed")
    what = bitmap.add_mutually_exclusive_group()
    what.add_argument("--add", action="store_true", help="add an empty one that marks what is written")
    what.add_argument("--remove", action="store_true", help="remove it")
    what.add_argument("--clear", action="store_true", help="take all marks off it")
    what.add_argument("--enable", action="store_true", help="let it mark what is written")
    what.add_argument("--disable", action="store_true", help="let it mark nothing any more")
    what.add_argument("--merge", metavar="SOURCE", help="mark in it whatever SOURCE marks")
    bitmap.add_argument("--granularity", type=int, default=65536, help="for --add: bytes that one bit stands for")
    text = "list, make, delete and apply the internal snapshots of an image"
    snapshot = commands.add_parser("snapshot", help=text, description=text[0].upper() + text[1:] + ".")
    actions = snapshot.add_subparsers(dest="action", required=True, metavar="ACTION")
    command("list", _snapshot, "list the snapshots", actions)
    create = command("create", _snapshot, "make a snapshot of the disk", actions)
    create.add_argument("name", metavar="NAME", help="what it is to be called")
    apply = command(
        "apply", _snapshot, "let the disk be what it was when a snapshot was made, and lose what it is", actions
    )
    delete = command("delete", _snapshot, "delete a snapshot", actions)
    for action in apply, delete:
        action.add_argument("name", metavar="SNAPSHOT", help="its ID or, if none has that, its name")
    commit = command("commit", _commit, "write what an image holds into its backing file, and empty the image")
    commit.add_argument(
        "--backing-format", choices=["raw", "qcow2"], help="of backing files whose format is not recorded"
    )
    commit.add_argument("--data-file", action="store_true", help="open the external data files that images name")
    command("upgrade", _upgrade, "make an image of version 2 of the format one of version 3")
    text = "find clusters that hold only zeroes, and free them for compact"
    zeroes = command("discard-zeroes", _discard_zeroes, text)
    zeroes.add_argument("--data-file", action="store_true", help="open the external data file that the image names")
    for sub in (compact, commit, zeroes):
        sub.add_argument(
            "--passphrase-file",
            metavar="FILE",
            help="holds the passphrase of an encrypted image, and nothing else: a line's end would be part of it",
        )
    return parser


def _passphrase(args: argparse.Namespace) -> bytes | None:
    """Return what the user named a file for: arguments and the environment of a process are for everybody to see."""
    if args.passphrase_file is None:
        return None
    with open(args.passphrase_file, "rb") as file:
        return file.read()


class _Meter:
    """Shows how far the work is: a bar on a terminal, or JSON lines; ten times a second at most."""

    PERIOD = 0.1
    WIDTH = 30

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._bar = not as_json and sys.stderr.isatty()
        self._next = 0.0

    def show(self, done: int, total: int, note: str, record: dict[str, Any]) -> None:
        now = time.monotonic()
        if now < self._next and done < total:
            return
        self._next = now + self.PERIOD
        if self._as_json:
            _emit({"event": "progress", **record})
        elif self._bar:
            share = min(done / total, 1.0) if total else 1.0
            filled = round(share * self.WIDTH)
            bar = "#" * filled + "." * (self.WIDTH - filled)
            print(f"\r[{bar}] {share:4.0%}  {note}\x1b[K", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._bar:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _emit(record: dict[str, Any]) -> None:
    print(json.dumps(record), flush=True)


def size_text(size: int) -> str:
    """Return `size` (bytes) for people."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def _data_file(args: argparse.Namespace) -> Literal["refuse", "allow"]:
    return "allow" if args.data_file else "refuse"


def _info(args: argparse.Namespace) -> int:
    with _api.open(args.image, read_only=True, backing="skip", data_file="skip") as image:
        info: Info = image.info
    if args.json:
        _emit(dataclasses.asdict(info))
        return OK
    rows = [
        ("version", str(info.version)),
        ("virtual size", f"{size_text(info.virtual_size)} ({info.virtual_size} bytes)"),
        ("file length", f"{size_text(info.file_size)} ({info.file_size} bytes)"),
        ("cluster size", size_text(info.cluster_size)),
        ("refcount bits", str(info.refcount_bits)),
        ("lazy refcounts", "yes" if info.lazy_refcounts else "no"),
        ("extended L2", "yes" if info.extended_l2 else "no"),
        ("encryption", info.encryption or "no"),
        ("snapshots", str(info.snapshots)),
    ]
    if info.backing_file is not None:
        rows.append(("backing file", f"{info.backing_file} ({info.backing_format or 'format not recorded'})"))
    if info.data_file is not None:
        rows.append(("data file", f"{info.data_file or 'not named'}{' (raw)' if info.data_file_raw else ''}"))
    rows += [("pinned", reason) for reason in info.pinned]
    for name, text in rows:
        print(f"{name + ':':16}{text}")
    return OK


def _check(args: argparse.Namespace) -> int:
    report: CheckReport = _api.check(args.image, args.repair)
    corruptions = report.corruptions - report.corruptions_fixed
    leaks = report.leaks - report.leaks_fixed
    if args.json:
        _emit(dataclasses.asdict(report))
    else:
        for message in report.messages:
            print(message)
        if report.corruptions_fixed or report.leaks_fixed:
            print(f"repaired: {report.corruptions_fixed} corruptions, {report.leaks_fixed} leaked clusters")
        print(f"left: {corruptions} corruptions, {leaks} leaked clusters" if corruptions or leaks else "no errors")
        print(f"{report.allocated_clusters} of {report.total_clusters} clusters allocated; ", end="")
        print(f"the last one in use ends at {report.image_end_offset}")
    return CORRUPT if corruptions else LEAKED if leaks else OK


def _compact(args: argparse.Namespace) -> int:
    meter = _Meter(as_json=args.json)

    def show(now: Progress) -> None:
        meter.show(now.done, now.total, f"the file has {size_text(now.file_size)}", now._asdict())

    try:
        with _api.open(
            args.image, backing="skip", data_file="skip", keep_erased=0, passphrase=_passphrase(args)
        ) as image:
            before = image.info.file_size
            if args.compress:
                image.compress(show)
            report = dataclasses.replace(image.compact(show), file_size_before=before)
        # Closing drops what the work itself needed.
        length = os.stat(args.image).st_size
    finally:
        meter.clear()
    if args.json:
        _emit({"event": "done", **dataclasses.asdict(report), "file_size": length})
    else:
        print(f"{size_text(report.file_size_before)} -> {size_text(length)}, {size_text(report.moved)} moved")
    return OK


def _bitmap(args: argparse.Namespace) -> int:
    changes: list[tuple[object, Callable[[Image], None]]] = [
        (args.add, lambda image: image.add_bitmap(args.name, args.granularity)),
        (args.remove, lambda image: image.remove_bitmap(args.name)),
        (args.clear, lambda image: image.clear_bitmap(args.name)),
        (args.enable, lambda image: image.record_bitmap(args.name, True)),
        (args.disable, lambda image: image.record_bitmap(args.name, False)),
        (args.merge, lambda image: image.merge_bitmap(args.name, args.merge)),
    ]
    wanted = [change for given, change in changes if given]
    if bool(wanted) != (args.name is not None):
        print("qcow-recycler: bitmap: a NAME goes with what is to be done with it", file=sys.stderr)
        return USAGE
    with _api.open(args.image, read_only=not wanted, backing="skip", data_file="skip", keep_erased=0) as image:
        for change in wanted:
            change(image)
        found = image.bitmaps()
    for bitmap in found:
        if args.json:
            _emit(dataclasses.asdict(bitmap))
            continue
        state = "inconsistent" if bitmap.inconsistent else "recording" if bitmap.recording else "not recording"
        marked = f"{size_text(bitmap.dirty)} marked"
        print(f"{bitmap.name}: {state}, {marked}, in units of {size_text(bitmap.granularity)}")
    return OK


def _snapshot(args: argparse.Namespace) -> int:
    # Whoever makes one, or goes back to one, has no use for a pool.
    with _api.open(args.image, read_only=args.action == "list", backing="skip", keep_erased=0) as image:
        if args.action == "create":
            shown: tuple[Snapshot, ...] = (image.create_snapshot(args.name),)
        elif args.action == "list":
            shown = image.snapshots()
        else:
            change = image.apply_snapshot if args.action == "apply" else image.delete_snapshot
            change(args.name)
            shown = ()
    for snapshot in shown:
        if args.json:
            _emit(dataclasses.asdict(snapshot))
            continue
        made = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(snapshot.created))
        state = f", with {size_text(snapshot.vm_state_size)} of VM state" if snapshot.vm_state_size else ""
        print(f"{snapshot.id}: {snapshot.name}, {made}, a disk of {size_text(snapshot.virtual_size)}{state}")
    return OK


def _commit(args: argparse.Namespace) -> int:
    meter = _Meter(as_json=args.json)

    def show(now: CommitReport) -> None:
        meter.show(now.done, now.total, f"{size_text(now.written)} written", now._asdict())

    try:
        report = _api.commit(
            args.image,
            show,
            backing_format=args.backing_format,
            data_file=_data_file(args),
            passphrase=_passphrase(args),
        )
    finally:
        meter.clear()
    if args.json:
        _emit({"event": "done", **report._asdict()})
    else:
        print(f"{size_text(report.written)} written to the backing file, {size_text(report.zeroed)} made zero there")
    return OK


def _upgrade(args: argparse.Namespace) -> int:
    _api.upgrade(args.image)
    if args.json:
        _emit({"event": "done"})
    return OK


def _discard_zeroes(args: argparse.Namespace) -> int:
    meter = _Meter(as_json=args.json)

    def show(now: ZeroScan) -> None:
        meter.show(now.scanned, now.total, f"{size_text(now.discarded)} were zeroes", now._asdict())

    try:
        with _api.open(
            args.image, backing="skip", data_file=_data_file(args), keep_erased=0, passphrase=_passphrase(args)
        ) as image:
            result = discard_zeroes(image, show)
    finally:
        meter.clear()
    if args.json:
        _emit({"event": "done", **result._asdict()})
    else:
        print(f"{size_text(result.discarded)} of {size_text(result.total)} were zeroes and are free now")
    return OK


def _error_line(error: OSError) -> str:
    """Return what went wrong, and where, in one line."""
    parts = [f"{error.filename}: " if error.filename else "", error.strerror or str(error)]
    place = []
    if isinstance(error.errno, int):
        place.append(errno.errorcode.get(error.errno, str(error.errno)))
    if isinstance(error, Error):
        if error.offset is not None:
            place.append(f"offset {error.offset:#x}")
        if error.field is not None:
            place.append(f"field {error.field}")
    if place:
        parts.append(f" [{', '.join(place)}]")
    return "qcow-recycler: " + " ".join("".join(parts).split())


def _terminated(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("qcow-recycler: cancelled; the image is consistent", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        print(_error_line(error), file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
