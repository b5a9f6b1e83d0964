"""What writes of zeroes do to the image besides what a guest reads: which tables change, and what is allocated."""

from __future__ import annotations

from pathlib import Path

import pytest

import qcow_recycler
import qemu
from damage import digest
from qcow2 import OFFSET_MASK, ZERO, Qcow2

CLUSTER = 64 << 10


@pytest.mark.parametrize("unmap", [False, True])
def test_zeroes_where_zeroes_are_change_nothing(image_path: Path, unmap: bool) -> None:
    """Whole clusters that read as zeroes, whether by their entry or for want of one; and parts of clusters."""
    qemu.create(image_path, 8 << 20)
    qemu.io(image_path, "write -q -P 1 0 1M", "write -q -z 1M 1M", "write -q -z -u 2M 1M", "discard -q 512k 128k")
    before = digest(image_path)
    with qcow_recycler.open(image_path) as image:
        for at, length in ((1 << 20, 1 << 20), (2 << 20, 1 << 20), (4 << 20, 2 << 20), (512 << 10, 128 << 10)):
            if not unmap and at < 1 << 20:
                continue  # what was discarded may be given a cluster back
            image.write_zeroes(at, length, may_unmap=unmap)
            image.write_zeroes(at + 512, 4096, may_unmap=unmap)
        image.flush()
    assert digest(image_path) == before


@pytest.mark.parametrize("unmap", [False, True])
def test_zeroes_give_clusters_back_only_when_told(image_path: Path, unmap: bool) -> None:
    qemu.create(image_path, 8 << 20)
    qemu.io(image_path, "write -q -P 1 0 1M")
    hosts = {at: Qcow2(image_path).mapping(at)[1] & OFFSET_MASK for at in range(0, 1 << 20, CLUSTER)}
    with qcow_recycler.open(image_path) as image:
        image.write_zeroes(0, 1 << 20, may_unmap=unmap)
    for at, host in hosts.items():
        assert Qcow2(image_path).mapping(at)[1] in ((ZERO, 0) if unmap else (host | ZERO | 1 << 63,))
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, bytes(8 << 20))
    if unmap:
        return
    # A write to such a cluster has its old place, and what was there does not show.
    with qcow_recycler.open(image_path) as image:
        image.write(CLUSTER + 4096, b"\7" * 512)
        image.write(4 * CLUSTER, b"\7" * 2 * CLUSTER)
    expected = bytearray(8 << 20)
    expected[CLUSTER + 4096 : CLUSTER + 4608] = b"\7" * 512
    expected[4 * CLUSTER : 6 * CLUSTER] = b"\7" * 2 * CLUSTER
    for at in (CLUSTER, 4 * CLUSTER, 5 * CLUSTER):
        assert Qcow2(image_path).mapping(at)[1] == hosts[at] | 1 << 63
    qemu.assert_clean(image_path)
    qemu.assert_contents(image_path, expected)


def test_zeroes_in_an_old_overlay_hide_what_is_beneath(tmp_path: Path) -> None:
    """Version 2 knows no zero clusters: what may not be unmapped must be written, with data before or without."""
    base, overlay = tmp_path / "base.raw", tmp_path / "overlay.qcow2"
    base.write_bytes(b"\5" * (1 << 20))
    qemu.create(overlay, 1 << 20, backing=base, backing_format="raw", compat="0.10")
    with qcow_recycler.open(overlay, backing="allow") as image:
        image.write(0, b"\6" * 2 * CLUSTER)
        for _ in range(2):
            image.write(0, b"\6" * 2 * CLUSTER)
            image.write_zeroes(CLUSTER, CLUSTER, may_unmap=True)
        image.write_zeroes(4 * CLUSTER, 2 * CLUSTER, may_unmap=True)
        expected = b"\6" * CLUSTER + bytes(CLUSTER) + b"\5" * 2 * CLUSTER + bytes(2 * CLUSTER)
        assert image.read(0, 6 * CLUSTER) == expected
    qemu.assert_clean(overlay)
    qemu.assert_contents(overlay, expected + b"\5" * 10 * CLUSTER)
