"""Sessions outlive the process: a stand-in for systemd's manager restarts hcd, the front end sees no disconnect."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hcd_protocols.virtio.blk import RequestType
from manager import Manager

from hcd.frontend.blk import BlockDriver, BlockRequest
from hcd.frontend.client import Frontend

pytestmark = pytest.mark.long

DISK = """
[[device]]
name = "disk:0"
type = "blk"
socket = "{dir}/disk.sock"
[device.options]
blk-file = "{dir}/disk.img"
"""

Start = Callable[..., Manager]


@pytest.fixture
def manage(short_dir: Path) -> Iterator[Start]:
    """``manage(devices)``: hcd with these tables under a manager, ready."""
    managers: list[Manager] = []

    def start(devices: str, **how: object) -> Manager:
        config = short_dir / "hcd.toml"
        config.write_text(devices.replace("{dir}", str(short_dir)))
        (short_dir / "disk.img").write_bytes(bytes(1 << 20))
        manager = Manager(short_dir, [sys.executable, "-m", "hcd", "run", str(config)], **how)  # type: ignore[arg-type]
        managers.append(manager)
        manager.start()
        return manager

    yield start
    for manager in managers:
        print(manager.log_tail())
        manager.close()


@pytest.mark.parametrize("packed", [False, True])
def test_a_front_end_goes_on_over_restarts(manage: Start, short_dir: Path, packed: bool) -> None:
    manager = manage(DISK)
    with Frontend.open(short_dir / "disk.sock", packed=packed, timeout=30) as front:
        disk = BlockDriver(front.memory, front.queues[0], timeout=30)
        disk.write(0, b"a" * 512)
        for turn in range(1, 4):
            manager.restart()
            assert disk.read(turn - 1, 512) == bytes([96 + turn]) * 512
            disk.write(turn, bytes([97 + turn]) * 512)
        front.sync()
        assert front.config(0, 8) == (2048).to_bytes(8, "little")
        assert manager.dropped == {"duplicate": [], "full": [], "hung up": []}
    manager.until(lambda: manager.names() == [], "empty store")
    assert manager.kill(signal.SIGTERM) == 0


@pytest.mark.parametrize("packed", [False, True])
def test_requests_in_flight_when_it_is_killed_are_served_by_the_next_process(
    manage: Start, short_dir: Path, packed: bool
) -> None:
    manager = manage(DISK)
    with Frontend.open(short_dir / "disk.sock", packed=packed, timeout=30) as front:
        disk = BlockDriver(front.memory, front.queues[0], timeout=30)
        for turn in range(4):
            sectors = range(turn * 64, turn * 64 + 32)
            for sector in sectors:
                disk.submit(BlockRequest(RequestType.OUT, sector, bytes([turn * 50 + sector % 50]) * 512))
            manager.restart(signal.SIGKILL)
            while disk.inflight:
                for done in disk.wait():
                    done.check()
            for sector in sectors:
                assert disk.read(sector, 512) == bytes([turn * 50 + sector % 50]) * 512
        assert manager.dropped == {"duplicate": [], "full": [], "hung up": []}
