"""A guest draws random bytes from hcd's entropy device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tables import table

from hcd.demo import jobs, qemu
from hcd.demo.console import Guest
from hcd.demo.hcd_process import HcdProcess, Resources

pytestmark = pytest.mark.guest

DEVICE = table("entropy", "rng", 'qmp = "{dir}/qmp.sock"', socket="{dir}/rng.sock")


@pytest.mark.parametrize("bus", ["modern", "pio"])
def test_guest_draws_random_bytes(
    bus: str,
    short_dir: Path,
    start_hcd: Callable[..., HcdProcess],
    boot: Callable[..., Guest],
    expect_rings: Callable[..., None],
    expect_settled: Callable[[HcdProcess, Resources], None],
) -> None:
    """The guest's own hwrng core names the device as its source; the bytes do not compress."""
    hcd = start_hcd(DEVICE)
    before = hcd.resources()
    vm = qemu.Vm("q35", devices=qemu.rng(short_dir / "rng.sock", bus), qmp=[short_dir / "qmp.sock"])
    said = boot(vm, "draw_random 4096", jobs.RNG).wait()
    assert said["rng"].startswith("virtio_rng")
    assert said["random-bytes"] == "4096"
    assert int(said["random-gzipped"]) >= 4096
    expect_rings(hcd, "entropy", qemu.BUS_PATHS[bus], "qmp")
    assert hcd.metrics().total("hcd_request_bytes_total", device="entropy") >= 4096
    expect_settled(hcd, before)
