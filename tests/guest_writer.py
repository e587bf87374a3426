"""The verified writer in a guest (guest_writer.c), seen from the host: built, followed and stopped."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from hcd.demo.console import Guest

__all__ = ["build", "image_size", "job", "stop", "wait_for_writes"]

BLOCK = 4096
#: blocks of each thread
SLOTS = 16


def build(directory: Path) -> bytes:
    """The program, linked so that it runs without any library. Needs ``cc``."""
    program = directory / "writer"
    source = Path(__file__).with_name("guest_writer.c")
    command = ["cc", "-O2", "-Wall", "-Werror", "-static", "-pthread", "-o", str(program), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return program.read_bytes()


def image_size(depth: int) -> int:
    """Bytes of a disk on which ``depth`` threads write."""
    return (1 + depth * SLOTS + 7) // 8 * 8 * BLOCK


def job(device: str = "/dev/vda", depth: int = 32) -> str:
    """What the guest runs; the program is there as ``writer``."""
    return f"until_true 30 test -b {device}\nwriter {device} {depth} {SLOTS}"


def wait_for_writes(guest: Guest, count: int, timeout: float = 300) -> int:
    """Until at least ``count`` writes were acknowledged; how many it are then."""
    return int(guest.wait_until("writes", lambda said: int(said) >= count, timeout))


def stop(image: Path) -> None:
    """Put "stop" into the writer's mailbox, behind its back."""
    fd = os.open(image, os.O_WRONLY)
    try:
        os.pwrite(fd, b"stop", 0)
    finally:
        os.close(fd)
