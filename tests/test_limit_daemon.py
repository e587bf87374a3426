"""Limits of a configured device: carried out, seen in the metrics, changed by a reload under the front end's nose."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tables import table

from hcd import cli
from hcd.bench import blk
from hcd.bench.load import READ, BlkLoad
from hcd.demo.hcd_process import HcdProcess
from hcd.frontend.blk import BLOCK_FEATURES
from hcd.frontend.client import Frontend

pytestmark = pytest.mark.long

DISK = table("disk", "blk", "LIMITS", ram="16M", num_queues=2)
CONTROL = '\n[control]\npath = "{dir}/control.sock"\n'
SIZE = 4096
REQUEST = SIZE + 16 + 1


class Daemon:
    """A daemon with a limited disk, and a driver that keeps both queues busy."""

    def __init__(self, hcd: HcdProcess, directory: Path, packed: bool) -> None:
        self.hcd = hcd
        self.directory = directory
        self.frontend = Frontend(str(directory / "disk.sock"), memory_size=16 << 20)
        self.frontend.negotiate(packed=packed, device=int(BLOCK_FEATURES))
        blk.start(self.frontend, 2, 128)
        self.began = time.monotonic()
        queues = [self.frontend.queues[index] for index in range(2)]
        self._load = BlkLoad(queues, 16, SIZE, 1 << 20, READ, False, False)

    def load(self, seconds: float) -> None:
        self._load.run(seconds)
        assert self._load.counts()["errors"] == 0

    def served(self) -> list[float]:
        """Requests by queue."""
        metrics = self.hcd.metrics()
        return [metrics.total("hcd_requests_total", device="disk", queue=str(index)) for index in range(2)]

    def reload(self, limits: str) -> None:
        config = self.directory / "hcd.toml"
        text = config.read_text()
        head, _, rest = text.partition("# limits\n")
        config.write_text(f"{head}# limits\n{limits}" + rest[rest.index("[device.options]") :])
        assert cli.main(["reload", "--control", str(self.directory / "control.sock")]) == 0


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def daemon(
    request: pytest.FixtureRequest, short_dir: Path, start_hcd: Callable[..., HcdProcess]
) -> Iterator[Callable[..., Daemon]]:
    made: list[Daemon] = []

    def start(limits: str, settings: str = "") -> Daemon:
        devices = (CONTROL + DISK).replace("LIMITS", f"# limits\n[device.limits]\n{limits}")
        hcd = start_hcd(devices, daemon=settings)
        made.append(Daemon(hcd, short_dir, request.param))
        return made[-1]

    yield start
    for each in made:
        each.frontend.close()


@pytest.mark.parametrize("poll_us", [0, 200])
def test_a_disk_serves_no_more_requests_than_its_limit_and_by_halves(
    daemon: Callable[..., Daemon], poll_us: int
) -> None:
    """Whatever time it took, there were no more than that time and one burst allow; both queues got the same."""
    disk = daemon("requests_per_second = 2000\nrequests_burst = 50\n", f"poll_us = {poll_us}")
    disk.load(1.0)
    first, second = disk.served()
    assert first + second <= 50 + 2000 * (time.monotonic() - disk.began)
    assert abs(first - second) <= 0.3 * (first + second)
    metrics = disk.hcd.metrics()
    assert metrics.total("hcd_throttled_seconds_total", device="disk") > 0
    assert metrics.total("hcd_requests_inflight", device="disk") == 0


def test_a_reload_changes_a_limit_and_the_front_end_stays(daemon: Callable[..., Daemon]) -> None:
    disk = daemon('bytes_per_second = "4M"\nbytes_burst = "64K"\n')
    disk.load(0.5)
    slow = sum(disk.served())
    moved = disk.hcd.metrics().total("hcd_request_bytes_total", device="disk")
    assert moved <= 65536 + REQUEST + (4 << 20) * (time.monotonic() - disk.began)
    disk.reload("")
    disk.load(0.5)
    throttled = disk.hcd.metrics().total("hcd_throttled_seconds_total", device="disk")
    free = sum(disk.served()) - slow
    assert free > slow
    disk.reload("[device.limits]\nrequests_per_second = 100\nrequests_burst = 1\n")
    began, before = time.monotonic(), sum(disk.served())
    disk.load(0.3)
    assert sum(disk.served()) - before <= 1 + 100 * (time.monotonic() - began) + 1
    assert disk.hcd.metrics().total("hcd_throttled_seconds_total", device="disk") > throttled
    log = disk.hcd.log_text
    assert log.count("reloaded: 0 unchanged; adjusted disk") == 2
    assert log.count("front end connected") == 1
    assert "disconnected" not in log
