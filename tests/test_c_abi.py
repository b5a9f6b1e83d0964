"""The C interface as a C programmer gets it: installed, found by pkg-config, compiled as C99 and as C++17."""

from __future__ import annotations

import ctypes
import errno
import os
import re
from pathlib import Path

import pytest

from clib import COMPILERS, EXAMPLES, HEADER, ROOT, SOURCES, STRICT, Installed, run

# Compiling the library the first time takes its time; every command has a limit of its own.
pytestmark = pytest.mark.timeout(1900)

VALGRIND = [
    "valgrind",
    "--quiet",
    "--error-exitcode=99",
    "--leak-check=full",
    "--show-leak-kinds=definite,indirect",
    "--errors-for-leak-kinds=definite,indirect",
    "--fair-sched=yes",
]


@pytest.fixture(scope="session")
def with_hooks(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """A library that can be made to panic, apart from the one that users get."""
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")).resolve() / "test-hooks"
    prefix = tmp_path_factory.mktemp("hooks")
    run("make", "-f", "mk/ffi.mk", "install", "QCR_PROFILE=dev", "FEATURES=test-hooks", f"TARGET_DIR={target}",
        f"PREFIX={prefix}", env={"CARGO_TARGET_DIR": str(target)}, timeout=1800)  # fmt: skip
    return Installed(prefix)


@pytest.fixture(params=COMPILERS)
def language(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def symbols() -> list[str]:
    return (SOURCES / "symbols.txt").read_text().split()


def structs() -> dict[str, list[str]]:
    """The structs that the header defines, with their members."""
    found = {}
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    for name, body in re.findall(r"^struct (\w+) \{(.*?)^\};", text, flags=re.DOTALL | re.MULTILINE):
        members = (re.search(r"\(\*(\w+)\)|(\w+)(\[\d+\])?$", part.strip()) for part in body.split(";") if part.strip())
        found[name] = [m.group(1) or m.group(2) for m in members if m]
    return found


# The header


def test_header_compiles_alone(installed: Installed, language: str, tmp_path: Path) -> None:
    source = tmp_path / "alone.c"
    source.write_text("#include <qcowrecycle.h>\nint main(void) { return qcr_version() == 0; }\n")
    program = installed.compile(source, tmp_path / "alone", language)
    installed.run(program)


def test_header_declares_what_the_library_exports(installed: Installed) -> None:
    listed = run("nm", "-D", "--defined-only", "--format=posix", installed.library / "libqcowrecycle.so")
    exported = sorted(line.split()[0].split("@")[0] for line in listed.splitlines())
    assert exported == symbols(), "tests/c/symbols.txt lists the ABI: nothing may ever leave it"
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    assert sorted(re.findall(r"^[\w \*]*?\b(qcr_\w+)\(", text, flags=re.MULTILINE)) == exported


def test_every_function_is_asked_to_refuse_null() -> None:
    asked = set(re.findall(r"\b(qcr_\w+)\(", (SOURCES / "null.c").read_text()))
    assert asked == set(symbols())


def test_layout_is_the_same_in_c(installed: Installed, language: str, tmp_path: Path) -> None:
    lines = []
    for name, members in structs().items():
        for member in members:
            size = f"sizeof((({'struct ' + name} *)0)->{member})"
            lines.append(f'printf("{name} {member} %zu %zu\\n", offsetof(struct {name}, {member}), {size});')
        lines.append(f'printf("{name} - 0 %zu\\n", sizeof(struct {name}));')
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <stdio.h>\n#include <qcowrecycle.h>\nint main(void) {\n" + "\n".join(lines) + "\nreturn 0;\n}\n"
    )
    printed = installed.run(installed.compile(source, tmp_path / "layout", language))
    assert sorted(printed.splitlines()) == sorted((SOURCES / "layout.txt").read_text().splitlines())


# The installed files


def test_soname_and_links(installed: Installed) -> None:
    dynamic = run("readelf", "-d", installed.library / "libqcowrecycle.so")
    assert "[libqcowrecycle.so.0]" in dynamic
    assert "NODELETE" in dynamic
    version = run("pkg-config", "--modversion", "qcowrecycle", env=installed.env).strip()
    real = installed.library / f"libqcowrecycle.so.{version}"
    for name in ("libqcowrecycle.so", "libqcowrecycle.so.0"):
        assert (installed.library / name).resolve() == real.resolve()


def test_destdir_is_no_part_of_the_paths(installed: Installed, tmp_path: Path) -> None:
    run("make", "-f", "mk/ffi.mk", "install", f"DESTDIR={tmp_path}/root", "PREFIX=/opt/qcr", timeout=1800)
    placed = tmp_path / "root/opt/qcr"
    assert (placed / "include/qcowrecycle.h").read_bytes() == HEADER.read_bytes()
    for file in ("lib/pkgconfig/qcowrecycle.pc", "lib/cmake/qcowrecycle/qcowrecycle-config.cmake"):
        text = (placed / file).read_text()
        assert "/opt/qcr/lib" in text
        assert str(tmp_path) not in text
        assert "@" not in text


def test_static_library_needs_what_pkg_config_says(installed: Installed, language: str, tmp_path: Path) -> None:
    private = [flag for flag in installed.flags("--static", "--libs") if flag != "-lqcowrecycle"]
    compiler = [*COMPILERS[language], *STRICT, f"-I{SOURCES}", *installed.flags("--cflags")]
    none = ["-x", "none"] if language == "c++17" else []
    program = tmp_path / "static"
    archive = installed.library / "libqcowrecycle.a"
    run(*compiler, SOURCES / "null.c", *none, archive, *private, "-o", program)
    run(program, env={"LD_LIBRARY_PATH": ""})


def test_cmake_finds_it(installed: Installed, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.16)\nproject(user C)\nfind_package(qcowrecycle 0.1 REQUIRED)\n"
        "foreach(kind qcowrecycle static)\n"
        f"  add_executable(user-${{kind}} {SOURCES}/null.c)\n"
        "  target_link_libraries(user-${kind} qcowrecycle::${kind} pthread)\n"
        "endforeach()\n"
    )
    run("cmake", "-S", tmp_path, "-B", tmp_path / "out", f"-DCMAKE_PREFIX_PATH={installed.prefix}")
    run("cmake", "--build", tmp_path / "out")
    for kind in ("qcowrecycle", "static"):
        installed.run(tmp_path / "out" / f"user-{kind}")


# Behaviour, natively in both languages and once under valgrind

PROGRAMS = {
    "null": [],
    "sizes": [],
    "open_null": [],
    "lifetimes": [],
    "reentry": [],
    "stubborn": ["200"],
    "threads": ["3000"],
    "submit": [],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_behaviour(installed: Installed, language: str, name: str, tmp_path: Path) -> None:
    program = installed.compile(SOURCES / f"{name}.c", tmp_path / name, language)
    installed.run(program, *PROGRAMS[name])


@pytest.mark.parametrize("checked", [[], VALGRIND], ids=["native", "valgrind"])
@pytest.mark.parametrize("name", ["paths", "snapshots"])
def test_images_in_files(installed: Installed, language: str, checked: list[str], name: str, tmp_path: Path) -> None:
    program = installed.compile(SOURCES / f"{name}.c", tmp_path / name, language)
    place = tmp_path / "place"
    place.mkdir()
    installed.run(*checked, program, place)


@pytest.mark.parametrize("checked", [[], VALGRIND], ids=["native", "valgrind"])
def test_data_files(installed: Installed, language: str, checked: list[str], tmp_path: Path) -> None:
    program = installed.compile(SOURCES / "data_file.c", tmp_path / "data_file", language)
    place = tmp_path / "place"
    place.mkdir()
    installed.run(*checked, program, place)
    # QEMU takes the data file's name relative to its own working directory.
    run("env", f"--chdir={place}", "qemu-img", "check", "-q", "image.qcow2")


@pytest.mark.parametrize("name", PROGRAMS)
def test_behaviour_under_valgrind(installed: Installed, name: str, tmp_path: Path) -> None:
    program = installed.compile(SOURCES / f"{name}.c", tmp_path / name)
    installed.run(*VALGRIND, program, *(["60"] if PROGRAMS[name] else []))


# How transfers are done, whether the kernel is to do them, and whether the image is in memory.
QUEUES = {
    "uring": ("uring", True),
    "threads": ("threads", False),
    "refused": ("refused", False),
    "refused-later": ("late", True),
}


@pytest.mark.parametrize("how", QUEUES)
def test_queues(installed: Installed, language: str, how: str, image_path: Path, tmp_path: Path) -> None:
    program = installed.compile(SOURCES / "queue.c", tmp_path / "queue", language)
    argument, uring = QUEUES[how]
    printed = installed.run(program, argument, "6000", image_path)
    if not uring:
        assert printed == "queues on io_uring: 0\n"
    run("qemu-img", "check", "-q", image_path)


def test_queues_use_io_uring_where_the_kernel_has_it(installed: Installed, image_path: Path, tmp_path: Path) -> None:
    # By its number (io_uring_setup), without the struct that a kernel that has it, and allows it, then wants to read.
    has_it = ctypes.CDLL(None, use_errno=True).syscall(425, 0, None) == -1 and ctypes.get_errno() == errno.EFAULT
    program = installed.compile(SOURCES / "queue.c", tmp_path / "queue")
    assert installed.run(program, "uring", "100", image_path) == f"queues on io_uring: {3 if has_it else 0}\n"


def test_queues_on_callbacks(installed: Installed, language: str, tmp_path: Path) -> None:
    program = installed.compile(SOURCES / "queue.c", tmp_path / "queue", language)
    installed.run(program, "uring", "6000")


@pytest.mark.parametrize("callbacks", ["submit", "submit-only"])
def test_queues_on_asynchronous_callbacks(installed: Installed, language: str, callbacks: str, tmp_path: Path) -> None:
    program = installed.compile(SOURCES / "queue.c", tmp_path / "queue", language)
    installed.run(program, callbacks, "6000")


def test_asynchronous_callbacks_under_address_sanitizer(installed: Installed, tmp_path: Path) -> None:
    sanitized = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
    for name, arguments in {"submit": [], "queue": ["submit-only", "2000"]}.items():
        program = installed.compile(SOURCES / f"{name}.c", tmp_path / name, "c99", *sanitized)
        installed.run(program, *arguments)


def test_queues_under_valgrind(installed: Installed, image_path: Path, tmp_path: Path) -> None:
    program = installed.compile(SOURCES / "queue.c", tmp_path / "queue")
    # What the kernel writes by io_uring is unknown to valgrind, so threads do it here.
    installed.run(*VALGRIND, program, "threads", "300", image_path)
    installed.run(*VALGRIND, program, "uring", "300")
    installed.run(*VALGRIND, program, "submit-only", "300")


def test_a_panic_is_contained(with_hooks: Installed, language: str, tmp_path: Path) -> None:
    program = with_hooks.compile(SOURCES / "panic.c", tmp_path / "panic", language)
    with_hooks.run(program)
    if language == "c99":
        with_hooks.run(*VALGRIND, program)


def test_hooks_are_not_in_what_users_get(installed: Installed) -> None:
    assert b"qcr_test_" not in (installed.library / "libqcowrecycle.so").read_bytes()


def test_loading_and_unloading(installed: Installed, image_path: Path, tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", image_path, "4M")
    program = tmp_path / "dl"
    run(*COMPILERS["c99"], *STRICT, f"-I{HEADER.parent}", SOURCES / "dl.c", "-ldl", "-o", program)
    run(program, installed.library / "libqcowrecycle.so", image_path)


# Details of errors


@pytest.fixture
def details(installed: Installed, tmp_path: Path) -> Path:
    return installed.compile(SOURCES / "details.c", tmp_path / "details")


@pytest.mark.parametrize(
    ("offset", "content", "field"),
    [
        (0, b"QFI\x00", "magic"),
        (4, (9).to_bytes(4, "big"), "version"),
        (20, (40).to_bytes(4, "big"), "cluster_bits"),
        (24, (1 << 63).to_bytes(8, "big"), "size"),
        (36, (0x7FFFFFFF).to_bytes(4, "big"), "l1_size"),
        (40, (0x12345).to_bytes(8, "big"), "l1_table_offset"),
        (48, (0x12345).to_bytes(8, "big"), "refcount_table_offset"),
        (56, (0x7FFFFFFF).to_bytes(4, "big"), "refcount_table_clusters"),
        (96, (99).to_bytes(4, "big"), "refcount_order"),
    ],
)
def test_details_of_a_hostile_image(
    installed: Installed, details: Path, image_path: Path, offset: int, content: bytes, field: str
) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", image_path, "4M")
    with image_path.open("r+b") as image:
        image.seek(offset)
        image.write(content)
    before = image_path.read_bytes()
    result, code, place, named, message = installed.run(details, image_path).split("\n", 4)
    assert int(result) == int(code) < 0
    assert (named, int(place)) == (field, offset), message
    assert message.strip()
    assert image_path.read_bytes() == before


def test_details_of_a_backing_file_that_is_not_allowed(installed: Installed, details: Path, image_path: Path) -> None:
    base = image_path.with_name("base.raw")
    base.write_bytes(bytes(1 << 20))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", image_path)
    result, _, place, _, message = installed.run(details, image_path).split("\n", 4)
    assert (int(result), int(place)) == (-1, -1)
    assert str(base) in message


def test_versions_agree(installed: Installed) -> None:
    library = ctypes.CDLL(str(installed.library / "libqcowrecycle.so"))
    library.qcr_version_string.restype = ctypes.c_char_p
    assert (
        library.qcr_version_string().decode()
        == run("pkg-config", "--modversion", "qcowrecycle", env=installed.env).strip()
    )


# The examples


@pytest.mark.parametrize("checked", [[], VALGRIND], ids=["native", "valgrind"])
def test_example_host_file(
    installed: Installed, language: str, checked: list[str], image_path: Path, tmp_path: Path
) -> None:
    program = installed.compile(EXAMPLES / "host_file.c", tmp_path / "host_file", language)
    printed = installed.run(*checked, program, image_path)
    assert "corruptions: 0, leaks: 0" in printed
    run("qemu-img", "check", "-q", image_path)
    # Four MiB of data, their metadata, and what the recycler keeps erased (8192 sectors).
    assert image_path.stat().st_size <= (4 + 4 + 1) << 20


@pytest.mark.parametrize("checked", [[], VALGRIND], ids=["native", "valgrind"])
def test_example_memory_disk(installed: Installed, language: str, checked: list[str], tmp_path: Path) -> None:
    program = installed.compile(EXAMPLES / "memory_disk.c", tmp_path / "memory_disk", language)
    printed = installed.run(*checked, program)
    assert printed.count("the device is not needed any more") == 1
