"""Encrypted images: what QEMU wrote is read, what is written QEMU reads, wherever clusters move."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import guest
import qcow_recycler
import qemu
from clib import SOURCES, Installed
from damage import digest
from qcow2 import COPIED, OFFSET_MASK, Qcow2
from qcow_recycler import aio

PASSPHRASE = "open sesame"
CONFIG = "keep_erased=0;compact_after_unmaps=0;runtime_asserts=true"
EXTENSION_CRYPTO = 0x0537BE77

# The methods of encryption, with other options of an image.
KINDS: dict[str, dict[str, object]] = {
    "luks": {},
    "luks-small": {"cluster_size": 4096},
    "luks-subclusters": {"extended_l2": "on"},
    "luks-lazy": {"lazy_refcounts": "on", "refcount_bits": 64},
    "luks-old": {"encrypt.cipher-alg": "aes-128", "encrypt.cipher-mode": "cbc", "encrypt.ivgen-alg": "essiv",
                 "encrypt.ivgen-hash-alg": "sha256", "encrypt.hash-alg": "sha1"},
    "luks-cbc": {"encrypt.cipher-mode": "cbc", "encrypt.ivgen-alg": "plain64", "encrypt.hash-alg": "sha512"},
    "luks-aes-128": {"encrypt.cipher-alg": "aes-128", "encrypt.ivgen-alg": "plain"},
    "aes": {},
    "aes-small": {"cluster_size": 4096},
    "aes-version-2": {"compat": "0.10"},
}  # fmt: skip


@functools.cache
def new_image(size: int, kind: str, passphrase: str) -> bytes:
    """QEMU measures for seconds how fast the machine is when it makes one with LUKS, so each is made once."""
    method = kind.split("-")[0]
    options = {"encrypt.format": method, "encrypt.key-secret": "s", **KINDS[kind]}
    if method == "luks":
        options["encrypt.iter-time"] = 10
    named = ",".join(f"{k}={v}" for k, v in options.items())
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "new.qcow2"
        secret = f"secret,id=s,data={passphrase}"
        qemu.img("create", "-q", "-f", "qcow2", "--object", secret, "-o", named, path, size)
        return path.read_bytes()


def create(path: Path, size: int, kind: str = "luks") -> guest.Disk:
    path.write_bytes(new_image(size, kind, PASSPHRASE))
    return guest.Disk(size, int(str(KINDS[kind].get("cluster_size", 65536))))


def verify(path: Path, disk: guest.Disk) -> None:
    qemu.assert_clean(path, passphrase=PASSPHRASE)
    qemu.assert_contents(path, disk.bytes, passphrase=PASSPHRASE)


def open_image(path: Path, **options: object) -> qcow_recycler.Image:
    given: dict[str, object] = {"config": CONFIG, "passphrase": PASSPHRASE, **options}
    return qcow_recycler.open(path, **given)  # type: ignore[arg-type]


def crypto_header(path: Path) -> tuple[int, int]:
    """Where the LUKS header is, and its length, in bytes."""
    meta = Qcow2(path)
    at = meta.get("header_length")
    while (kind := int.from_bytes(meta.bytes_at(at, 4), "big")) != EXTENSION_CRYPTO:
        assert kind, "no encryption header"
        at += 8 + -(-int.from_bytes(meta.bytes_at(at + 4, 4), "big") // 8) * 8
    return int.from_bytes(meta.bytes_at(at + 8, 8), "big"), int.from_bytes(meta.bytes_at(at + 16, 8), "big")


def patch(path: Path, at: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), content, at)


@pytest.mark.parametrize("kind", KINDS)
def test_qemu_and_the_library_work_on_one_image_in_turn(image_path: Path, kind: str) -> None:
    for seed in guest.seeds(1):
        rng = random.Random(f"{kind}{seed}")
        image_path.unlink(missing_ok=True)
        disk = create(image_path, 4 << 20, kind)
        for _ in range(2):
            guest.qemu_session(image_path, disk, rng, 25, passphrase=PASSPHRASE)
            with open_image(image_path) as image:
                assert image.info.encryption == kind.split("-")[0]
                guest.assert_reads(image, disk)
                guest.our_session(image, disk, rng, 60)
                guest.assert_reads(image, disk)
                assert image.check().is_clean
            verify(image_path, disk)


@pytest.mark.parametrize("kind", ["luks", "luks-subclusters", "aes"])
def test_what_is_around_a_first_write_reads_as_before(image_path: Path, kind: str) -> None:
    disk = create(image_path, 1 << 20, kind)
    with open_image(image_path) as image:
        # New clusters, in part; one that was zeroed and kept its place; one that was discarded.
        for at, length in ((512, 512), (131072 - 512, 1024), (1 << 18, 512), ((1 << 20) - 512, 512)):
            content = random.Random(at).randbytes(length)
            image.write(at, content)
            disk.write(at, content)
        image.write_zeroes(1 << 18, 65536, may_unmap=False)
        disk.zero(1 << 18, 65536)
        image.write((1 << 18) + 4096, b"\x77" * 512)
        disk.write((1 << 18) + 4096, b"\x77" * 512)
        image.discard(65536, 65536)
        guest.discarded(image, disk, 65536, 65536)
        image.write(65536 + 1024, b"\x78" * 512)
        disk.write(65536 + 1024, b"\x78" * 512)
        guest.assert_reads(image, disk)
    verify(image_path, disk)
    raw = image_path.read_bytes()
    assert b"\x77" * 512 not in raw and b"\x78" * 512 not in raw, "stored as it is"


@pytest.mark.parametrize("kind", ["luks", "luks-small", "luks-subclusters", "aes"])
def test_compacting_while_a_guest_writes(image_path: Path, kind: str) -> None:
    disk = create(image_path, 24 << 20, kind)
    rng = random.Random(kind)
    with open_image(image_path, keep_erased=1 << 20) as image:
        content = guest.data(rng, 2 << 20) * 12
        image.write(0, content)
        disk.write(0, content)
        # Every other 256 KiB goes; the guest works on the last of those that stay.
        for at in range(0, 24 << 20, 512 << 10):
            image.discard(at, 256 << 10)
            disk.zero(at, 256 << 10)
        image.flush()
        written, mine = 0, random.Random(1)

        def step() -> None:
            nonlocal written
            at = (20 << 20) + (256 << 10) + mine.randrange(8) * (512 << 10) + mine.randrange(64) * 4096
            if at + 4096 <= 24 << 20:
                piece = guest.data(mine, 4096)
                image.write(at, piece)
                disk.write(at, piece)
                written += 1

        with guest.at_work(step):
            for _ in range(3):
                image.compact()
        report = image.compact()
        assert written > 0 and image.stats.moved_bytes > 0
        guest.assert_reads(image, disk)
    verify(image_path, disk)
    header = crypto_header(image_path)[1] if kind != "aes" else 0
    assert report.file_size_after <= (12 << 20) + header + (3 << 20), "the file is longer than what is in it"
    assert image_path.stat().st_size <= (12 << 20) + header + (1 << 20)


@pytest.mark.parametrize("kind", ["luks", "luks-subclusters", "aes"])
def test_what_snapshots_hold_moves_too(image_path: Path, kind: str) -> None:
    disk = create(image_path, 8 << 20, kind)
    rng = random.Random(kind)
    with open_image(image_path) as image:
        content = guest.data(rng, 2 << 20) * 3
        image.write(0, content)
        disk.write(0, content)
    qemu.img("snapshot", "-c", "one", *qemu.named(image_path, PASSPHRASE))
    before = bytes(disk.bytes)
    with open_image(image_path) as image:
        # The disk's own copies, and holes before them when the snapshot's first clusters are the disk's no more.
        image.write(1 << 20, content[: 1 << 20])
        disk.write(1 << 20, content[: 1 << 20])
        image.write(6 << 20, content[: 1 << 20])
        disk.write(6 << 20, content[: 1 << 20])
        image.discard(6 << 20, 1 << 20)
        disk.zero(6 << 20, 1 << 20)
        image.discard(1 << 20, 1 << 20)
        disk.zero(1 << 20, 1 << 20)
        image.compact()
    verify(image_path, disk)
    qemu.assert_contents(image_path, before, snapshot="one", passphrase=PASSPHRASE)
    # Without the snapshot what only it held is free: what the disk shares with nobody any more moves.
    name = qemu.named(image_path, PASSPHRASE)
    with open_image(image_path) as image:
        image.write(7 << 20, content[: 1 << 20])
        disk.write(7 << 20, content[: 1 << 20])
    qemu.img("snapshot", "-c", "two", *name)
    second = bytes(disk.bytes)
    qemu.img("snapshot", "-d", "one", *name)
    with open_image(image_path) as image:
        assert image.compact().moved > 0
        guest.assert_reads(image, disk)
    verify(image_path, disk)
    qemu.assert_contents(image_path, second, snapshot="two", passphrase=PASSPHRASE)


@pytest.mark.parametrize("encrypted", [True, False])
def test_backing_files(tmp_path: Path, encrypted: bool) -> None:
    """An encrypted image behind an encrypted one, or behind one that is not."""
    base, overlay = tmp_path / "base.qcow2", tmp_path / "overlay.qcow2"
    disk = create(base, 1 << 20, "luks-small")
    with open_image(base) as image:
        image.write(0, b"\x31" * (512 << 10))
        disk.write(0, b"\x31" * (512 << 10))
    if encrypted:
        create(overlay, 1 << 20)
        qemu.img("rebase", "-q", "-u", "-b", base, "-F", "qcow2", *qemu.named(overlay, PASSPHRASE))
    else:
        qemu.img("create", "-q", "-f", "qcow2", "-u", "-b", base, "-F", "qcow2", overlay, 1 << 20)
    wrong = qcow_recycler.WrongPassphrase if encrypted else qcow_recycler.BackingError
    with pytest.raises(wrong) as failed:
        open_image(overlay, backing="allow", passphrase="no")
    assert failed.value.errno == errno.EKEYREJECTED
    with open_image(overlay, backing="allow") as image:
        for at in (512, 65536, (512 << 10) - 512, (1 << 20) - 512):
            image.write(at, b"\x32" * 512)
            disk.write(at, b"\x32" * 512)
        guest.assert_reads(image, disk)
        image.discard(131072, 65536)
        disk.zero(131072, 65536)
        image.compact()
        guest.assert_reads(image, disk)
    qcow_recycler.commit(overlay, passphrase=PASSPHRASE)
    verify(base, disk)
    with open_image(overlay, backing="allow") as image:
        guest.assert_reads(image, disk)


def test_bitmaps_and_resizing(image_path: Path) -> None:
    disk = create(image_path, (1 << 20) + 512)
    with open_image(image_path) as image:
        image.add_bitmap("backup")
        image.write(0, b"\x41" * 65536)
        disk.write(0, b"\x41" * 65536)
        image.write(1 << 20, b"\x42" * 512)
        disk.write(1 << 20, b"\x42" * 512)
    with open_image(image_path) as image:
        assert [image.next_dirty("backup", 0), image.next_dirty("backup", 65536)] == [(0, 65536), (1 << 20, 512)]
        # What becomes visible of the last cluster reads as zeroes.
        image.resize(2 << 20)
        disk.resize(2 << 20)
        image.resize((1 << 20) - 4096, shrink=True)
        disk.resize((1 << 20) - 4096)
        image.resize(1 << 20)
        disk.resize(1 << 20)
        guest.assert_reads(image, disk)
    verify(image_path, disk)


def test_many_requests_at_a_time(image_path: Path) -> None:
    disk = create(image_path, 16 << 20)
    places = random.Random(3).sample(range(0, 16 << 20, 4096), 300)
    pieces = [guest.data(random.Random(at), 4096) for at in places]

    async def work() -> None:
        async with await aio.open(image_path, passphrase=PASSPHRASE) as image:
            await asyncio.gather(*map(image.write, places, pieces))
            await asyncio.gather(*map(image.write, places, pieces), image.flush())
            assert await asyncio.gather(*(image.read(at, 4096) for at in places)) == pieces
        image = await aio.open(image_path)
        async with image:
            with pytest.raises(qcow_recycler.PassphraseNeeded):
                await image.read(places[0], 4096)
            with pytest.raises(qcow_recycler.PassphraseNeeded):
                await image.write(places[0], pieces[0])

    asyncio.run(work())
    for at, piece in zip(places, pieces, strict=True):
        disk.write(at, piece)
    verify(image_path, disk)


# --- passphrases ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passphrase", ["wrong", "", PASSPHRASE + "\n", PASSPHRASE.encode()[:-1]])
def test_a_wrong_passphrase_changes_nothing(image_path: Path, passphrase: str | bytes) -> None:
    create(image_path, 1 << 20)
    # Not closed cleanly: the right one would recover it.
    Qcow2(image_path)
    patch(image_path, 72, (1).to_bytes(8, "big"))
    before = digest(image_path)
    with pytest.raises(qcow_recycler.WrongPassphrase) as failed:
        open_image(image_path, passphrase=passphrase)
    assert failed.value.errno == errno.EKEYREJECTED
    assert digest(image_path) == before
    open_image(image_path, passphrase=PASSPHRASE.encode()).close()


def test_a_passphrase_for_an_image_that_is_not_encrypted_is_refused(image_path: Path) -> None:
    """Somebody may have put it where the encrypted one was."""
    qemu.create(image_path, 1 << 20)
    with pytest.raises(qcow_recycler.BadOption) as failed:
        open_image(image_path)
    assert failed.value.field == "passphrase"


def test_a_passphrase_is_text_or_bytes(image_path: Path) -> None:
    create(image_path, 1 << 20)
    with pytest.raises(TypeError):
        open_image(image_path, passphrase=5)
    with open_image(image_path, passphrase=None) as image, pytest.raises(qcow_recycler.PassphraseNeeded):
        image.read(0, 512)


def test_each_key_slot_opens_the_image(image_path: Path) -> None:
    disk = create(image_path, 1 << 20)
    qemu.img(
        "amend", "-q", "--object", f"secret,id=s,data={PASSPHRASE}", "--object", "secret,id=n,data=other",
        "-o", "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10,encrypt.keyslot=5",
        "--image-opts", f"driver=qcow2,encrypt.key-secret=s,file.filename={image_path}",
    )  # fmt: skip
    for passphrase in (PASSPHRASE, "other"):
        with open_image(image_path, passphrase=passphrase) as image:
            guest.assert_reads(image, disk)
            image.write(0, passphrase.encode().ljust(512))
            disk.write(0, passphrase.encode().ljust(512))
    verify(image_path, disk)


@pytest.mark.parametrize("kind", ["luks", "luks-subclusters", "aes"])
def test_without_a_passphrase_there_is_work_on_metadata(image_path: Path, kind: str) -> None:
    disk = create(image_path, 8 << 20, kind)
    content = guest.data(random.Random(kind), 1 << 20) * 8
    with open_image(image_path) as image:
        image.write(0, content)
        disk.write(0, content)
    with open_image(image_path, passphrase=None) as image:
        pinned = " ".join(image.info.pinned)
        assert ("no passphrase" in pinned) == (kind != "aes"), "what depends on its place stays there"
        for refused in (
            lambda: image.read(0, 512),
            lambda: image.write(0, b"\x55" * 512),
            lambda: image.write(0, b"\x55" * 65536),
            lambda: image.discard(512, 1024),
            lambda: image.write_zeroes(512, 1024),
        ):
            with pytest.raises(qcow_recycler.PassphraseNeeded) as failed:
                refused()
            assert failed.value.errno == errno.ENOKEY
        # Holes in the middle, and a tail.
        image.discard(1 << 20, 2 << 20)
        disk.zero(1 << 20, 2 << 20)
        image.discard(6 << 20, 2 << 20)
        disk.zero(6 << 20, 2 << 20)
        assert image.check().is_clean
        image.compact()
        assert image.check().is_clean
    verify(image_path, disk)
    header = crypto_header(image_path)[1] if kind != "aes" else 0
    left = 4 << 20 if kind == "aes" else 6 << 20
    assert image_path.stat().st_size <= left + header + (1 << 20)
    with open_image(image_path) as image:
        assert "no passphrase" not in " ".join(image.info.pinned)
        assert ("LUKS" in " ".join(image.info.pinned)) == (kind != "aes")
        image.compact()
        guest.assert_reads(image, disk)
    verify(image_path, disk)
    assert image_path.stat().st_size <= (4 << 20) + header + (1 << 20)


def test_images_that_were_not_closed_are_recovered_without_a_passphrase(image_path: Path) -> None:
    disk = create(image_path, 4 << 20, "luks-small")
    script = (
        "import os, sys, qcow_recycler\n"
        "image = qcow_recycler.open(sys.argv[1], passphrase=sys.argv[2])\n"
        "image.write(0, b'\\x51' * (1 << 20))\n"
        "image.flush()\n"
        "image.discard(0, 1 << 19)\n"
        "image.flush()\n"
        "os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", script, image_path, PASSPHRASE], check=True, timeout=60)
    disk.write(1 << 19, b"\x51" * (1 << 19))
    open_image(image_path, passphrase=None).close()
    verify(image_path, disk)


# --- what cannot be ---------------------------------------------------------------------------------------------------

SLOT = 208
HOSTILE: dict[str, tuple[int, bytes, str]] = {
    "magic": (0, b"SKUL", "LUKS magic"),
    "version": (6, b"\x00\x00", "LUKS version"),
    "key-bytes": (108, b"\x00\x00\x00\x21", "LUKS key-bytes"),
    "key-bytes-huge": (108, b"\xff\xff\xff\xff", "LUKS key-bytes"),
    "digest-iterations": (164, b"\xff\xff\xff\xff", "LUKS mk-digest-iter"),
    "no-digest-iterations": (164, b"\x00\x00\x00\x00", "LUKS mk-digest-iter"),
    "active": (SLOT, b"\x12\x34\x56\x78", "LUKS key slot active"),
    "iterations": (SLOT + 4, b"\xff\xff\xff\xff", "LUKS key slot iterations"),
    "no-iterations": (SLOT + 4, b"\x00\x00\x00\x00", "LUKS key slot iterations"),
    "material-in-header": (SLOT + 40, b"\x00\x00\x00\x00", "LUKS key slot key-material-offset"),
    "material-outside": (SLOT + 40, b"\x7f\xff\xff\xff", "LUKS key slot key-material-offset"),
    "stripes": (SLOT + 44, b"\xff\xff\xff\xff", "LUKS key slot stripes"),
    "no-stripes": (SLOT + 44, b"\x00\x00\x00\x00", "LUKS key slot stripes"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_header_is_refused_by_field(image_path: Path, what: str) -> None:
    create(image_path, 1 << 20)
    at, content, field = HOSTILE[what]
    start, _ = crypto_header(image_path)
    patch(image_path, start + at, content)
    before = digest(image_path)
    with pytest.raises(qcow_recycler.InvalidImage) as failed:
        open_image(image_path)
    assert (failed.value.field, failed.value.offset) == (field, start + at)
    assert digest(image_path) == before
    # Nobody reads it without a passphrase.
    with open_image(image_path, passphrase=None) as image:
        assert image.check().is_clean


@pytest.mark.parametrize("at", [208 + 8, 112, 132], ids=["slot's salt", "digest", "digest's salt"])
def test_what_is_damaged_opens_nothing(image_path: Path, at: int) -> None:
    create(image_path, 1 << 20)
    patch(image_path, crypto_header(image_path)[0] + at, b"\x01\x02\x03\x04")
    with pytest.raises(qcow_recycler.WrongPassphrase):
        open_image(image_path)


def test_what_is_not_supported_is_named(image_path: Path) -> None:
    create(image_path, 1 << 20)
    start, _ = crypto_header(image_path)
    for at, name, words in (
        (8, b"blowfish", "blowfish-xts-plain64"),
        (40, b"ctr-plain64", "blowfish-ctr-plain64"),
        (72, b"whirlpool", "whirlpool"),
    ):
        patch(image_path, start + at, name.ljust(32, b"\0"))
        with pytest.raises(qcow_recycler.Unsupported, match=words):
            open_image(image_path)


def test_no_slot_in_use(image_path: Path) -> None:
    create(image_path, 1 << 20)
    patch(image_path, crypto_header(image_path)[0] + SLOT, b"\x00\x00\xde\xad")
    with pytest.raises(qcow_recycler.WrongPassphrase):
        open_image(image_path)


def test_a_guest_cannot_be_led_to_the_keys(image_path: Path) -> None:
    """A damaged table maps a cluster of the encryption header to the guest, or damaged counts offer it for reuse."""
    create(image_path, 1 << 20)
    with open_image(image_path) as image:
        image.write(0, b"\x11" * 131072)
    start, length = crypto_header(image_path)
    keys = image_path.read_bytes()[start : start + length]
    entry, _ = Qcow2(image_path).mapping(65536)
    patch(image_path, entry, (start | COPIED).to_bytes(8, "big"))
    with open_image(image_path) as image:
        with pytest.raises(qcow_recycler.InvalidImage, match="own tables"):
            image.write(65536, b"\x12" * 65536)
        with contextlib.suppress(qcow_recycler.InvalidImage):
            image.compact()
    assert image_path.read_bytes()[start : start + length] == keys
    block = Qcow2(image_path).refcount_table()[0] & OFFSET_MASK
    patch(image_path, block + start // 65536 * 2, bytes(2))
    for passphrase in (PASSPHRASE, None):
        with pytest.raises(qcow_recycler.InvalidImage, match="not counted"):
            open_image(image_path, passphrase=passphrase)


# --- the command, and C -----------------------------------------------------------------------------------------------


def command(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qcow_recycler.cli", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_command_reads_the_passphrase_from_a_file(image_path: Path, tmp_path: Path) -> None:
    disk = create(image_path, 8 << 20)
    with open_image(image_path) as image:
        image.write(0, bytes(4 << 20))
        image.write(4 << 20, b"\x61" * (4 << 20))
        disk.write(4 << 20, b"\x61" * (4 << 20))
    right, wrong = tmp_path / "right", tmp_path / "wrong"
    right.write_text(PASSPHRASE)
    wrong.write_text(PASSPHRASE + "\n")
    shown = command("info", image_path)
    assert shown.returncode == 0 and "luks" in shown.stdout and "no passphrase" in shown.stdout, shown
    failed = command("discard-zeroes", image_path)
    assert failed.returncode == 1 and "ENOKEY" in failed.stderr, failed
    failed = command("compact", "--passphrase-file", wrong, image_path)
    assert failed.returncode == 1 and "EKEYREJECTED" in failed.stderr, failed
    failed = command("compact", "--passphrase-file", tmp_path / "none", image_path)
    assert failed.returncode == 1 and "ENOENT" in failed.stderr, failed
    for name in ("discard-zeroes", "compact"):
        done = command(name, "--passphrase-file", right, image_path)
        assert done.returncode == 0, done
    verify(image_path, disk)
    assert image_path.stat().st_size <= (4 << 20) + crypto_header(image_path)[1] + (1 << 20)


@pytest.mark.parametrize("language", ["c99", "c++17"])
def test_c(installed: Installed, language: str, image_path: Path, tmp_path: Path) -> None:
    disk = create(image_path, 1 << 20)
    program = installed.compile(SOURCES / "encrypted.c", tmp_path / "encrypted", language)
    installed.run(program, image_path, PASSPHRASE)
    disk.write(512, b"\x5a" * 1024)
    verify(image_path, disk)


@pytest.mark.parametrize("kind", ["luks", "aes", "none"])
def test_requests_of_no_length_change_nothing(image_path: Path, kind: str) -> None:
    """Anywhere, also at the end of the disk, where there is no cluster."""
    size = 1 << 20
    if kind == "none":
        qemu.create(image_path, size)
    else:
        image_path.write_bytes(new_image(size, kind, PASSPHRASE))
    options = {} if kind == "none" else {"passphrase": PASSPHRASE}
    with qcow_recycler.open(image_path, config=CONFIG, **options) as image:
        image.write(0, b"\x11" * (64 << 10))
        image.discard(0, 64 << 10)
        image.write(128 << 10, b"\x22" * 512)
        image.flush()
        for at in (0, 64 << 10, 256 << 10, 512, size):
            image.write(at, b"")
            image.discard(at, 0)
            image.write_zeroes(at, 0)
            assert image.read(at, 0) == b""
        expected = bytes(128 << 10) + b"\x22" * 512 + bytes(size - (128 << 10) - 512)
        assert image.read(0, size) == expected
    qemu.assert_contents(image_path, expected, **options)
    qemu.assert_clean(image_path, **options)
