"""The example of docs/doorbells.md, a VMM in C, against a real hcd and a real /dev/kvm."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import skip_or_fail
from tables import table

from hcd.demo.hcd_process import HcdProcess, Resources

EXAMPLES = Path(__file__).resolve().parent.parent / "docs" / "examples"

ECHO = table("echo", "echo", ports="0x510", gpas="0xd0000=0x1234", stamps=True)


@pytest.fixture
def example(need: Callable[..., None], tmp_path: Path) -> Path:
    """The compiled example."""
    need("gcc")
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        skip_or_fail("no access to /dev/kvm")
    if not os.path.exists("/usr/include/linux/kvm.h"):
        skip_or_fail("not installed: linux-libc-dev")
    program = tmp_path / "doorbell_vmm"
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-o", program, EXAMPLES / "doorbell_vmm.c"]
    subprocess.run(command, check=True)
    return program


def run(program: Path, socket: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, socket], capture_output=True, text=True, timeout=60)


def test_the_c_example_rings_and_is_interrupted(
    example: Path,
    start_hcd: Callable[..., HcdProcess],
    expect_settled: Callable[[HcdProcess, Resources], None],
    short_dir: Path,
) -> None:
    """A guest rings by port and by memory and takes both interrupts; hcd counts it, and serves the next machine."""
    hcd = start_hcd(ECHO)
    assert run(example, short_dir / "echo.sock").returncode == 0
    before = hcd.resources()
    for _ in range(2):
        done = run(example, short_dir / "echo.sock")
        assert done.returncode == 0, done.stderr
        assert "doorbell pio0: registered" in done.stdout
        assert "memory: mapped" in done.stdout
        assert "every interrupt came" in done.stdout
    metrics = hcd.metrics()
    for queue, path in (("pio0", "pio"), ("mmio0", "mmio")):
        assert metrics.total("hcd_doorbell_rings_total", queue=queue, path=path) == 3
        assert metrics.total("hcd_interrupts_total", queue=queue, outcome="sent") == 3
        assert metrics.total("hcd_doorbell_info", queue=queue, path=path, source="registered", transport="kvm") == 1
    expect_settled(hcd, before)


def test_the_c_example_names_what_it_cannot_register(
    example: Path, start_hcd: Callable[..., HcdProcess], short_dir: Path
) -> None:
    """A Xen port is beyond the example: it says so to both sides, and the rest works."""
    hcd = start_hcd(ECHO + 'xen-ports = "7"\n')
    done = run(example, short_dir / "echo.sock")
    assert done.returncode == 0, done.stderr
    assert "doorbell xen0: Operation not supported" in done.stdout
    assert "doorbell xen0 (hypercall 0x7) is not registered: EOPNOTSUPP" in hcd.log_text
