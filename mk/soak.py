"""A soak: every part of soak.toml, on every core, for so many minutes in all; then one sum of what was done.

    python mk/soak.py MINUTES [SEED] [--only WORD]

A part is a program. It finds in its environment how long it may take (QCR_SOAK_MINUTES, or `{seconds}` in its command)
and a seed of its own (QCR_SOAK_SEED), and says what it did in lines that hold, anywhere in them,

    soak: crash_images=1234 histories=56

Equal names are added up, over all lines of all parts; a new name needs no announcement. A part that ends with an
error, or that does not end, is a failure, and so is what it reports as `failures=n`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

TOP = Path(__file__).resolve().parent.parent
LOGS = TOP / "build" / "soak"
COUNTS = re.compile(r"\bsoak:((?:\s+[a-z_]+=\d+)+)")
# What libFuzzer prints at its end.
EXECUTIONS = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
# Shown first, in this order, even if nothing was done; then whatever else was reported.
ALWAYS = {
    "histories": "histories",
    "crash_images": "crash images tested",
    "crash_images_qemu": "crash images cross-checked by qemu-img",
    "faults": "faults injected",
    "schedules": "schedules explored",
    "kills": "kills survived",
    "fuzz_executions": "fuzz executions",
}


@dataclass
class Part:
    """One program, and its share of the time."""

    name: str
    weight: float
    command: list[str]
    prepare: list[str] = field(default_factory=list)
    # A test program of a Rust package instead of a command, and which of its tests.
    rust: str = ""
    tests: str = ""
    package: str = "qcow-recycler"
    # Without this many minutes it is left out.
    least: float = 0
    copies: int = 1
    number: int = 0
    minutes: float = 0
    unprepared: bool = False


@dataclass
class Result:
    """What a part came to."""

    part: Part
    counts: Counter[str]
    problem: str
    log: Path


def load() -> list[Part]:
    """The parts, each as often as it is to run."""
    parts = []
    for entry in tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))["part"]:
        part = Part(**{"command": [], **entry})
        for copy in range(part.copies):
            name = part.name if part.copies == 1 else f"{part.name} {copy + 1}"
            parts.append(Part(**{**entry, "command": part.command, "name": name, "copies": 1}))
    return parts


def share_out(parts: list[Part], minutes: float, lanes: int) -> list[list[Part]]:
    """Gives every part its minutes and its lane; every lane lasts `minutes`."""
    total = sum(p.weight for p in parts)
    left_out = [p for p in parts if p.weight / total * minutes * lanes < p.least]
    for part in left_out:
        print(f"left out, too short a soak: {part.name}", flush=True)
    parts = [p for p in parts if p not in left_out]
    plan: list[list[Part]] = [[] for _ in range(lanes)]
    for part in sorted(parts, key=lambda p: -p.weight):
        min(plan, key=lambda lane: sum(p.weight for p in lane)).append(part)
    for lane in plan:
        weight = sum(p.weight for p in lane)
        for part in lane:
            part.minutes = part.weight / weight * minutes
    return [lane for lane in plan if lane]


def build(parts: list[Part]) -> None:
    """Builds what the parts run, so that building takes none of their time."""
    cargo = os.environ.get("CARGO", "cargo")
    for package in sorted({p.package for p in parts if p.rust}):
        wanted = [p for p in parts if p.rust and p.package == package]
        command = [cargo, "test", "--release", "--locked", "-q", "--no-run", "--message-format=json", "-p", package]
        command += [word for test in sorted({p.rust for p in wanted}) for word in ("--test", test)]
        built = subprocess.run(command, cwd=TOP, stdout=subprocess.PIPE, text=True, check=True).stdout
        messages = [json.loads(line) for line in built.splitlines() if line.startswith("{")]
        programs = {m["target"]["name"]: m["executable"] for m in messages if m.get("executable")}
        for part in wanted:
            # One thread: the parts share the cores out between them.
            part.command = [programs[part.rust], "--include-ignored", "--nocapture", "--test-threads=1", part.tests]
    for prepare in {tuple(p.prepare) for p in parts if p.prepare}:
        if subprocess.run(prepare, cwd=TOP, check=False).returncode != 0:
            for part in parts:
                part.unprepared = part.unprepared or tuple(part.prepare) == prepare


def run(part: Part, seed: int) -> Result:
    """Runs a part to its end, or kills it when it is far too late."""
    log = LOGS / f"{part.number:02}-{part.name.replace(' ', '-')}.log"
    if part.unprepared:
        log.write_text(f"{' '.join(part.prepare)} failed\n", encoding="utf-8")
        return Result(part, Counter(failures=1), "could not be prepared", log)
    seconds = part.minutes * 60
    command = [word.replace("{seconds}", str(max(1, int(seconds)))) for word in part.command]
    command = [sys.executable if word == "{python}" else word for word in command]
    environment = {**os.environ, "QCR_SOAK_MINUTES": f"{part.minutes:.4f}", "QCR_SOAK_SEED": str(seed)}
    problem = ""
    with log.open("wb") as out:
        out.write(f"{' '.join(command)}, seed {seed}, {part.minutes:.1f} minutes\n".encode())
        out.flush()
        package = TOP / "recycler" if part.rust and part.package == "qcow-recycler" else TOP
        with subprocess.Popen(
            command,
            cwd=package,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        ) as child:
            try:
                status = child.wait(seconds * 1.5 + 300)
                problem = f"ended with {status}" if status else ""
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                problem = "did not end"
    # Without the line above.
    _, _, text = log.read_text(encoding="utf-8", errors="replace").partition("\n")
    counts: Counter[str] = Counter()
    for found in COUNTS.findall(text):
        for word in found.split():
            name, count = word.split("=")
            counts[name] += int(count)
    counts["fuzz_executions"] += sum(int(n) for n in EXECUTIONS.findall(text))
    counts["failures"] += bool(problem) and not counts["failures"]
    return Result(part, +counts, problem, log)


def words(counts: Counter[str]) -> str:
    """Counts on one line."""
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))


def main() -> int:
    """The command."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("minutes", type=float)
    options.add_argument("seed", type=int, nargs="?", default=int(time.time()))
    options.add_argument("--only", default="", help="only the parts that have this in their names")
    asked = options.parse_args()
    LOGS.mkdir(parents=True, exist_ok=True)
    for old in LOGS.glob("*.log"):
        old.unlink()
    parts = [p for p in load() if asked.only in p.name]
    lanes = share_out(parts, asked.minutes, min(os.cpu_count() or 1, max(1, len(parts))))
    build([p for lane in lanes for p in lane])
    print(f"soak: seed {asked.seed}, {asked.minutes:g} minutes, logs in {LOGS.relative_to(TOP)}", flush=True)

    results: list[Result] = []
    began = time.monotonic()

    def work(lane: list[Part]) -> None:
        for part in lane:
            # Seeds far from one another, since a part counts up from its own.
            result = run(part, asked.seed * 64 + part.number)
            results.append(result)
            print(
                f"  {(time.monotonic() - began) / 60:5.1f} min: {part.name}: {result.problem or 'good'}; "
                f"{words(result.counts)}",
                flush=True,
            )
            if result.problem:
                tail = result.log.read_text(encoding="utf-8", errors="replace").splitlines()[-80:]
                print("\n".join(f"      {line}" for line in tail), flush=True)

    for number, part in enumerate(p for lane in lanes for p in lane):
        part.number = number
    threads = [threading.Thread(target=work, args=(lane,)) for lane in lanes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    total = sum((r.counts for r in results), Counter())
    failures = total.pop("failures", 0)
    print(f"soak of {(time.monotonic() - began) / 60:.1f} minutes, seed {asked.seed}:")
    others = {name: name.replace("_", " ") for name in sorted(total) if name not in ALWAYS}
    for name, label in {**ALWAYS, **others}.items():
        print(f"  {label}: {total[name]:,}")
    print(f"  failures: {failures}")
    for result in results:
        if result.problem:
            print(f"  failed: {result.part.name} ({result.problem}): {result.log.relative_to(TOP)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
