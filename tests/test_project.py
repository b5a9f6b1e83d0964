"""The project's own papers are true: what they name exists, and what exists is named."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import qemu

TOP = Path(__file__).resolve().parent.parent
SOURCES = ["recycler/src", "ffi/src", "python/src"]


def tracked() -> list[Path]:
    """The files of the tree, as git knows them; all of them where there is no git."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=TOP, capture_output=True, check=False)
    if listed.returncode == 0:
        files = [TOP / name for name in listed.stdout.decode().split("\0") if name]
    else:
        skip = {"target", "build", ".venv", ".git"}
        files = [p for p in TOP.rglob("*") if p.is_file() and not skip & set(p.relative_to(TOP).parts)]
    return [f for f in files if f.is_file()]


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def architecture() -> str:
    return text(TOP / "ARCHITECTURE.md")


@pytest.mark.parametrize("top", SOURCES)
def test_architecture_names_every_module(top: str) -> None:
    page = architecture()
    missing = [
        str(path.relative_to(TOP))
        for path in sorted((TOP / top).rglob("*.rs"))
        if not re.search(rf"(?<![\w./]){re.escape(str(path.relative_to(TOP)))}(?!\w)", page)
    ]
    assert not missing, f"ARCHITECTURE.md does not name: {', '.join(missing)}"


def test_architecture_names_nothing_that_is_gone() -> None:
    named = set(
        re.findall(r"(?<![\w/.-])((?:recycler|ffi|python|tests|include|demo|mk)/[\w./-]*\w\.\w+)", architecture())
    )
    gone = sorted(name for name in named if not (TOP / name).exists())
    assert not gone, f"ARCHITECTURE.md names what does not exist: {', '.join(gone)}"


def test_no_paths_of_one_machine() -> None:
    # Put together, so that this file does not find itself.
    home = re.compile("/" + r"(?:home/\w+|root|work|Users/\w+)/")
    found = [
        f"{path.relative_to(TOP)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        if path.suffix not in {".png", ".qcow2", ".lock"}
        for number, line in enumerate(text(path).splitlines(), 1)
        if home.search(line)
    ]
    assert not found, "\n".join(found)


def make_targets() -> set[str]:
    files = [TOP / "Makefile", *sorted((TOP / "mk").glob("*.mk"))]
    targets: set[str] = set()
    for file in files:
        for line in text(file).splitlines():
            if match := re.match(r"^([a-z][\w -]*?)\s*:(?!=)", line):
                targets.update(match.group(1).split())
    return targets


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md", "ARCHITECTURE.md", "Makefile", ".ci/run"])
def test_make_commands_that_are_written_down_exist(page: str) -> None:
    content = text(TOP / page)
    if page.endswith(".md"):
        content = "\n".join(re.findall(r"`([^`\n]+)`", content) + re.findall(r"```\w*\n(.*?)```", content, re.S))
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", content))
    unknown = sorted(named - make_targets())
    assert not unknown, f"{page} names make targets that do not exist: {', '.join(unknown)}"


def test_links_in_the_papers_lead_somewhere() -> None:
    broken = []
    for page in TOP.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text(page)):
            if "://" not in target and not (TOP / target).exists():
                broken.append(f"{page.name}: {target}")
    assert not broken, ", ".join(broken)


def readme_code(language: str) -> str:
    code = re.findall(rf"```{language}\n(.*?)```", text(TOP / "README.md"), re.S)
    assert code
    return "\n".join(code)


@pytest.mark.parametrize("compiler", [["cc", "-std=c99", "-xc"], ["g++", "-std=c++17", "-xc++"]], ids=["c", "c++"])
def test_the_readmes_c_compiles(compiler: list[str]) -> None:
    command = [*compiler, "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only", f"-I{TOP / 'include'}", "-"]
    qemu.run(*command, stdin=readme_code("c").encode())


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python snippet is run as it stands, on an image of the name it uses."""
    qemu.create(tmp_path / "disk.qcow2", 64 << 20)
    qemu.io(tmp_path / "disk.qcow2", "write -P 1 0 16M")
    monkeypatch.chdir(tmp_path)
    exec(compile(readme_code("python"), "README.md", "exec"), {"__name__": "readme"})
    qemu.assert_clean(tmp_path / "disk.qcow2")


def test_versions_agree() -> None:
    (version,) = re.findall(r'^version = "(.+)"$', text(TOP / "Cargo.toml"), re.M)
    header = text(TOP / "include/qcowrecycle.h")
    parts = [re.findall(rf"#define QCR_VERSION_{part}\s+(\d+)", header)[0] for part in ("MAJOR", "MINOR", "PATCH")]
    assert ".".join(parts) == version
    assert re.search(rf"^## .*{re.escape(version)}", text(TOP / "CHANGELOG.md"), re.M), (
        "CHANGELOG.md lacks this version"
    )


def test_what_is_shipped_makes_no_deliberate_mistakes() -> None:
    packages = ("-p", "qcowrecycle-ffi", "-p", "qcow-recycler-python")
    command = ("cargo", "tree", "--locked", *packages, "-e", "normal,build,features")
    tree = subprocess.check_output(command, cwd=TOP, text=True)
    assert 'qcow-recycler feature "default"' in tree
    assert "mutations" not in tree
