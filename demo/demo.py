"""The main job on real input: an image shrinks while it is used.

A real ext4 filesystem, made of files of this machine, lives in a qcow2 image that qemu-img made. Half of its files are
deleted, and the blocks that ext4 then calls free are discarded, while two guests keep reading and writing and verify
every byte; the recycler makes the file smaller meanwhile. QEMU and e2fsck have the last word. With --image the job is
done on a copy of an image of yours: discard what is zero, compact, verify.

Exit code: 0 if every verification held, 1 otherwise.
"""

from __future__ import annotations

import argparse
import mmap
import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import ext4
import latency
import oracle
import own_image
import qcow_recycler
from guests import Changes, Guest, Reader, Writer
from latency import Window
from programs import DemoError, run

MIB = 1 << 20
BASELINE = 10.0
"""How long the guests are measured without the recycler, in seconds."""
WAVES = 6
"""In how many goes the files are deleted."""
SETTLE = 0.3
"""How long the recycler waits for more discards before it compacts, in seconds."""
REST = 1.0
"""How long it must have done nothing to be at rest, in seconds."""
PATIENCE = 60.0
"""How long it may take to come to rest, in seconds."""
POLL = 0.02


@dataclass
class Course:
    """What was measured on the way."""

    before: oracle.Size
    quiet: list[Window] = field(default_factory=list)
    busy: list[Window] = field(default_factory=list)
    stats: qcow_recycler.Stats | None = None
    guests: list[Guest] = field(default_factory=list)


def say(text: str) -> None:
    print(text, flush=True)


def mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"


@contextmanager
def step(text: str) -> Iterator[None]:
    began = time.monotonic()
    print(f"{text} ... ", end="", flush=True)
    yield
    say(f"{time.monotonic() - began:.1f} s")


class Demo:
    """The filesystem, its image and its guests."""

    def __init__(self, directory: Path, budget: int, seed: int, rate_limit: int) -> None:
        self.seed = seed
        self.budget = budget
        self.rate_limit = rate_limit
        self.chance = random.Random(seed)
        self.directory = directory
        self.raw = directory / "filesystem.raw"
        self.model_path = directory / "model.raw"
        self.edited = directory / "edited.raw"
        self.image_path = directory / "disk.qcow2"
        self.changes = Changes()
        self.files: list[tuple[str, int]] = []
        self.began = 0.0

    def build(self) -> None:
        with step("choosing files of this machine"):
            self.files = ext4.machine_files(self.budget, self.chance)
        total = sum(size for _, size in self.files)
        if len(self.files) < 100:
            raise DemoError("this machine has too few files to make a filesystem of")
        say(f"  {len(self.files)} files, {mib(total)}")
        with step("making an ext4 filesystem of them (mke2fs)"):
            ext4.build(self.raw, self.directory / "stage", self.files, 24 * MIB)
        with step("making a qcow2 image of that (qemu-img convert)"):
            run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(self.raw), str(self.image_path))

    def recycle(self) -> Course:
        """Do the whole job on the open image, and close it."""
        shutil.copyfile(self.raw, self.model_path)
        course = Course(oracle.size(self.image_path))
        live = ext4.blocks_of(self.raw, ext4.LIVE_FILE)
        with self.model_path.open("r+b") as model_file, mmap.mmap(model_file.fileno(), 0) as model:
            with qcow_recycler.open(
                self.image_path,
                keep_erased=MIB,
                compact_after_unmaps=MIB,
                settle_time=SETTLE,
                flush_after=SETTLE,
                rate_limit=self.rate_limit,
                log=self.log,
            ) as image:
                course.guests = [
                    Reader(image, model, self.used_blocks(live), self.changes, self.seed + 1),
                    Writer(image, model, live, self.seed + 2),
                ]
                for guest in course.guests:
                    guest.start()
                try:
                    with step("reading the filesystem through the library"):
                        export(image, self.edited)
                    self.measure_quiet(course)
                    self.delete_in_waves(image, course)
                finally:
                    for guest in course.guests:
                        guest.stop()
                for guest in course.guests:
                    guest.verify()
                course.stats = image.stats
            self.changes.apply(model)
        return course

    @staticmethod
    def log(level: str, message: str) -> None:
        if level in ("error", "warning"):
            print(f"{level}: {message}", file=sys.stderr, flush=True)

    def used_blocks(self, live: list[ext4.Run]) -> list[ext4.Run]:
        """Everything in use but the file that the writer overwrites."""
        taken = sorted([*ext4.free_blocks(self.raw), *live])
        used, at = [], 0
        for part in [*taken, ext4.Run(self.raw.stat().st_size // ext4.BLOCK, 0)]:
            if part.first > at:
                used.append(ext4.Run(at, part.first - at))
            at = part.end
        return used

    def delete_in_waves(self, image: qcow_recycler.Image, course: Course) -> None:
        """Delete half of the files while the recycler runs, and let it come to rest after each wave."""
        victims = [path for path, _ in self.chance.sample(self.files, len(self.files) // 2)]
        say(f"deleting {len(victims)} files in {WAVES} waves while the recycler runs:")
        self.began = time.perf_counter()
        image.start()
        free: list[ext4.Run] = []
        for wave in range(1, WAVES + 1):
            free = self.delete(image, wave, victims[wave - 1 :: WAVES], free)
            self.watch(image, course)
        image.stop()
        stats = image.stats
        if stats.background_errors:
            raise DemoError(f"the recycler had {stats.background_errors} errors")
        # What came free since the last automatic round.
        image.compact()

    def delete(
        self, image: qcow_recycler.Image, wave: int, victims: list[str], free_before: list[ext4.Run]
    ) -> list[ext4.Run]:
        """Delete files as a guest would: change the filesystem's own blocks, then discard what is free, as fstrim does.

        Runs of free blocks that were there before the wave are not discarded again. Return what is free now.
        """
        pristine = self.directory / "pristine.raw"
        run("cp", "--sparse=always", "--reflink=auto", str(self.edited), str(pristine))
        ext4.delete(self.edited, victims)
        rewritten = dict(ext4.changed_blocks(pristine, self.edited))
        pristine.unlink()
        free, known = ext4.free_blocks(self.edited), set(free_before)
        # Whole free runs, so that a cluster that came free bit by bit is given back when its last bit does.
        discarded = [part for part in free if part not in known]
        self.changes.announce(wave, rewritten, discarded)
        for part in ext4.runs_of(sorted(rewritten)):
            image.write(part.offset, b"".join(rewritten[block] for block in range(part.first, part.end)))
        # A filesystem discards only what it has durably freed.
        image.flush()
        for part in discarded:
            image.discard(part.offset, part.length)
        image.flush()
        self.changes.ended = wave
        return free

    def measure_quiet(self, course: Course) -> None:
        with step("the guests alone"):
            began = time.perf_counter()
            time.sleep(BASELINE)
            course.quiet = [Window(began, time.perf_counter())]
        for guest in course.guests:
            guest.verify()

    def watch(self, image: qcow_recycler.Image, course: Course) -> None:
        """Show the file's length until the recycler is at rest, and note when it worked.

        This thread sleeps meanwhile, so the guests have the machine as they had it when they were alone.
        """
        began = at = last_work = time.perf_counter()
        previous, compactions, line_due = image.stats, image.stats.compactions, began
        while True:
            time.sleep(POLL)
            stats, now = image.stats, time.perf_counter()
            if _work(stats) != _work(previous) or stats.moves_copying or stats.moves_copied:
                last_work = now
                # Windows that touch are one.
                if course.busy and course.busy[-1].ended == at:
                    course.busy[-1] = Window(course.busy[-1].began, now)
                else:
                    course.busy.append(Window(at, now))
            previous, at = stats, now
            at_rest = now - last_work > REST and (stats.compactions > compactions or stats.junk <= MIB)
            if now >= line_due or at_rest:
                line_due = now + 1.0
                self.show(now - self.began, course.before.length, stats)
                for guest in course.guests:
                    guest.verify()
            if at_rest:
                return
            if now - began > PATIENCE:
                raise DemoError(f"the recycler is not at rest after {PATIENCE:.0f} s: {stats}")

    @staticmethod
    def show(seconds: float, before: int, stats: qcow_recycler.Stats) -> None:
        width = 40
        filled = min(width, round(width * stats.file_size / before))
        bar = "#" * filled + "." * (width - filled)
        say(
            f"  {seconds:5.1f} s  |{bar}| {mib(stats.file_size):>10} long, {mib(stats.junk + stats.freed)} free in it, "
            f"{mib(stats.moved_bytes)} moved"
        )

    def verify(self, course: Course) -> tuple[oracle.Size, oracle.Needed, str, int]:
        after = oracle.size(self.image_path)
        with step("qemu-img check"):
            oracle.check(self.image_path)
        final = self.directory / "final.raw"
        with step("reading the disk through QEMU, e2fsck -fn"):
            run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(self.image_path), str(final))
            summary = ext4.check(final)
        with step("comparing every block with what was written"):
            with self.model_path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as model:
                compared = oracle.compare(final, model)
        needed = oracle.needed(self.image_path)
        if needed is None:
            raise DemoError("the image has snapshots that nobody made")
        return after, needed, summary, compared


def _work(stats: qcow_recycler.Stats) -> tuple[int, ...]:
    return (stats.moved_bytes, stats.moves_cancelled, stats.erased_bytes, stats.truncated_bytes)


def export(image: qcow_recycler.Image, raw: Path) -> None:
    """Write what the disk reads as to a sparse file."""
    with raw.open("wb") as file:
        file.truncate(image.info.virtual_size)
        for extent in image.extents():
            if extent.kind == "data":
                for offset in range(extent.offset, extent.offset + extent.length, MIB):
                    file.seek(offset)
                    file.write(image.read(offset, min(MIB, extent.offset + extent.length - offset)))


def report(course: Course, after: oracle.Size, needed: oracle.Needed, summary: str, compared: int) -> None:
    stats = course.stats
    assert stats is not None
    issued = sum(len(guest.samples) for guest in course.guests)
    checked = sum(guest.bytes for guest in course.guests)
    say("")
    say(f"{'':24}{'before':>14}{'after':>14}")
    say(f"{'file length':24}{mib(course.before.length):>14}{mib(after.length):>14}")
    say(f"{'disk usage':24}{mib(course.before.on_disk):>14}{mib(after.on_disk):>14}")
    say("")
    say(f"clusters needed         {mib(needed.bytes)} ({needed.live} live, {needed.metadata} metadata)")
    say(f"bound on the length     {mib(needed.bound)}: {'held' if after.length <= needed.bound else 'EXCEEDED'}")
    say(f"moved by the recycler   {mib(stats.moved_bytes)}, {stats.moves_cancelled} moves gave way to the guests")
    say(f"flushes                 {stats.device_flushes} of the file, {stats.guest_flushes} asked for by the guests")
    say(f"guests                  {issued} requests, {mib(checked)}, every byte verified")
    say(f"content through QEMU    {mib(compared)} compared, all equal")
    say(f"e2fsck                  {summary}")
    say("")
    samples = sorted(sample for guest in course.guests for sample in guest.samples)
    quiet = latency.summarise(samples, course.quiet)
    busy = latency.summarise(samples, course.busy)
    say(f"{'guest latency (ms)':26}{'requests':>10}{'median':>10}{'p99':>10}{'worst':>10}")
    for kind in sorted({*quiet, *busy}):
        for name, part in (("recycler at rest", quiet), ("recycler working", busy)):
            if kind in part:
                requests, *times = part[kind]
                cells = "".join(f"{1000 * seconds:>10.3f}" for seconds in times)
                say(f"{kind:6}{name:20}{requests:>10}{cells}")
    say(f"(at rest for {latency.total(course.quiet):.1f} s, working for {latency.total(course.busy):.1f} s)")


def real_input(directory: Path, budget: int, seed: int, rate_limit: int) -> None:
    began = time.monotonic()
    demo = Demo(directory, budget, seed, rate_limit)
    demo.build()
    course = demo.recycle()
    after, needed, summary, compared = demo.verify(course)
    report(course, after, needed, summary, compared)
    if after.length > needed.bound:
        raise DemoError(f"the file is {mib(after.length)} long, more than the bound of {mib(needed.bound)}")
    say(f"\nAll verified, in {time.monotonic() - began:.0f} s.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--directory", type=Path, default=Path("build/demo"), help="where to work (emptied first)")
    parser.add_argument("--image", type=Path, help="an image of yours; it is copied, and only the copy is changed")
    parser.add_argument("--mib", type=int, default=384, help="how much of this machine's files to take (MiB)")
    parser.add_argument("--seed", type=int, default=1, help="chooses the files and what the guests do")
    parser.add_argument(
        "--rate-limit", type=int, default=0, help="bytes a second that the recycler may copy; 0: no limit"
    )
    parser.add_argument("--keep", action="store_true", help="leave the files where they are")
    args = parser.parse_args()
    # A guest that comes back from a request should not wait for another thread's time slice.
    sys.setswitchinterval(0.0002)
    shutil.rmtree(args.directory, ignore_errors=True)
    args.directory.mkdir(parents=True)
    try:
        if args.image is not None:
            own_image.recycle(args.image, args.directory)
        else:
            real_input(args.directory, args.mib * MIB, args.seed, args.rate_limit)
        return 0
    except (DemoError, qcow_recycler.Error) as failure:
        print(f"\nFAILED: {failure}", file=sys.stderr)
        if failure.__cause__ is not None:
            print(f"  because of: {failure.__cause__!r}", file=sys.stderr)
        return 1
    finally:
        if not args.keep:
            with suppress(OSError):
                shutil.rmtree(args.directory)


if __name__ == "__main__":
    sys.exit(main())
