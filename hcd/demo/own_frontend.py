"""The demo's I/O without a guest: hcd's own front end in the place of QEMU and Linux.

It writes the kick eventfds itself, so the path is ``direct``, and it is declared.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

from hcd_protocols.virtio.blk import SECTOR_SIZE

from hcd.frontend.blk import BlockDriver
from hcd.frontend.client import Frontend
from hcd.frontend.net import NetDriver
from hcd.frontend.rng import EntropyDriver

__all__ = ["run"]

CHUNK = 64 << 10
BLOCK_BYTES = 16 << 20
FRAMES = 200

Say = Callable[[str], None]


def run(directory: Path, say: Say) -> bool:
    """Block, entropy and network I/O on the sockets in ``directory``; whether everything compared equal."""
    return all([_block(directory, say), _entropy(directory, say), _network(directory, say)])


def _block(directory: Path, say: Say) -> bool:
    written, read = hashlib.sha256(), hashlib.sha256()
    with Frontend.open(directory / "disk.sock") as frontend:
        disk = BlockDriver(frontend.memory, frontend.queues[0])
        for offset in range(0, BLOCK_BYTES, CHUNK):
            data = os.urandom(CHUNK)
            written.update(data)
            disk.write(offset // SECTOR_SIZE, data)
        disk.flush()
        for offset in range(0, BLOCK_BYTES, CHUNK):
            read.update(disk.read(offset // SECTOR_SIZE, CHUNK))
    equal = written.digest() == read.digest()
    say(f"disk: {BLOCK_BYTES >> 20} MiB written and read back, {'equal' if equal else 'DIFFERENT'}")
    return equal


def _entropy(directory: Path, say: Say) -> bool:
    with Frontend.open(directory / "rng.sock") as frontend:
        entropy = EntropyDriver(frontend.memory, frontend.queues[0])
        first, second = entropy.read(4096), entropy.read(4096)
    fine = len(first) == len(second) == 4096 and first != second
    say(f"rng: {len(first) + len(second)} bytes drawn{'' if fine else ', NOT random'}")
    return fine


def _network(directory: Path, say: Say) -> bool:
    macs = [bytes([0x52, 0x54, 0, 0, 0, number]) for number in (1, 2)]
    arrived = 0
    with (
        Frontend.open(directory / "net0.sock", queues=2) as left,
        Frontend.open(directory / "net1.sock", queues=2) as right,
    ):
        ports = [NetDriver(end.memory, end.queues[0], end.queues[1], features=end.features) for end in (left, right)]
        for number in range(FRAMES):
            sender = number % 2
            body = number.to_bytes(4, "big") + os.urandom(196)
            frame = macs[1 - sender] + macs[sender] + b"\x88\xb5" + body
            ports[sender].send(frame)
            arrived += ports[1 - sender].receive() == frame
    say(f"net0, net1: {arrived} of {FRAMES} frames crossed the hub unchanged")
    return arrived == FRAMES
