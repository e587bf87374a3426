"""One hcd process with several devices, and what tells whether a bad guest or front end did it harm.

The process serves a whole module of tests, so whatever one of them leaves behind shows in it or in a later one. Each
test has a victim of its own in it: hcd says only so much about one device in a minute.
"""

from __future__ import annotations

import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tables import table

from hcd.demo.hcd_process import HcdProcess, Resources, fetch
from hcd.frontend.blk import BLOCK_FEATURES, BlockDriver
from hcd.frontend.client import Frontend
from hcd.frontend.errors import FrontendError

QUEUES = 2
SECTOR = 512
#: the longest that anything here may take (seconds); waits end as soon as their condition holds
PATIENCE = 30.0

#: more than any module has tests
VICTIMS = 160

OTHERS = "".join([
    table("bystander", "blk", blk_file="{dir}/bystander.img"),
    table("file", "blk", blk_file="{dir}/file.img", num_queues=2),
    table("entropy", "rng"),
    table("slow", "rng", max_bytes=1, period=3_600_000),
    table("net0", "net", backend="hub"),
    table("net1", "net", backend="hub"),
])


def wait_until(condition: Callable[[], object], what: Callable[[], str], patience: float = PATIENCE) -> None:
    """Poll ``condition``: for what another process does and nobody announces."""
    deadline = time.monotonic() + patience
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {patience:g} s: {what()}")
        time.sleep(0.002)


class Bystander(threading.Thread):
    """Verified I/O on another device for as long as the module's tests run."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.rounds = 0
        self.failure: str | None = None
        self._path = path
        self._ending = threading.Event()

    def run(self) -> None:
        try:
            with Frontend.open(self._path, device=BLOCK_FEATURES, timeout=PATIENCE) as frontend:
                disk = BlockDriver(frontend.memory, frontend.queues[0], timeout=PATIENCE)
                while not self._ending.is_set():
                    self._round(disk)
        except FrontendError as error:
            self.failure = str(error)

    def _round(self, disk: BlockDriver) -> None:
        data = self.rounds.to_bytes(8, "little") * 512
        sector = self.rounds % 200 * 8
        disk.write(sector, data)
        if disk.read(sector, len(data)) != data:
            self.failure = f"round {self.rounds}: read other bytes than were written"
            self._ending.set()
        self.rounds += 1

    def check(self, patience: float = PATIENCE) -> None:
        """Wait for two more rounds: the second began after now."""
        seen = self.rounds
        wait_until(lambda: self.failure or self.rounds >= seen + 2, lambda: "I/O on another device", patience)
        assert self.failure is None, f"another device suffered: {self.failure}"

    def end(self) -> None:
        self._ending.set()
        self.join()


class Hostile:
    """A daemon under attack, a bystander, and the questions that the tests ask."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("bystander", "file"):
            (directory / f"{name}.img").write_bytes(bytes(1 << 20))
        victims = "".join(table(f"victim{n}", "blk", 'path = "mmio"', ram="1M", num_queues=2) for n in range(VICTIMS))
        self.hcd = HcdProcess.from_config(directory, victims + OTHERS, daemon="drain_timeout = 2.0")
        self.victim = "victim0"
        self._count = 0
        self.bystander = Bystander(self.socket("bystander"))
        self.bystander.start()
        try:
            self.use(self.victim)
            self.bystander.check()
        except BaseException:
            self.hcd.kill()
            raise
        self._first_line = 0
        self._before = self._resources()

    wait_until = staticmethod(wait_until)

    def close(self) -> None:
        self.bystander.end()
        self.hcd.stop()

    def socket(self, name: str = "") -> Path:
        """Where the device of that name is served; the victim if none is given, here and below."""
        return self.directory / f"{name or self.victim}.sock"

    def frontend(self, name: str = "", **options: Any) -> Frontend:
        """Connected, not negotiated."""
        return Frontend(self.socket(name), timeout=PATIENCE, **options)

    def open(self, name: str = "", **options: Any) -> Frontend:
        """Everything done: two queues that run."""
        options = {"queues": QUEUES, "device": BLOCK_FEATURES, **options}
        return Frontend.open(self.socket(name), timeout=PATIENCE, **options)

    def use(self, device: str) -> None:
        """Verified I/O through every queue of a block device, on a connection of its own."""
        with self.open(device) as frontend:
            for index, queue in frontend.queues.items():
                disk = BlockDriver(frontend.memory, queue, timeout=PATIENCE)
                data = os.urandom(SECTOR)
                disk.write(index, data)
                assert disk.read(index, SECTOR) == data

    def resident(self) -> int:
        """Resident memory of the daemon in bytes."""
        status = Path(f"/proc/{self.hcd.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return int(found[1]) * 1024

    def guest_errors(self, name: str) -> int:
        """hcd_guest_errors_total of one device."""
        return self._counted("hcd_guest_errors_total", name)

    def protocol_errors(self, name: str = "") -> int:
        """hcd_protocol_errors_total of one device, the victim if none is given."""
        return self._counted("hcd_protocol_errors_total", name or self.victim)

    def _counted(self, family: str, name: str) -> int:
        """Over all queues. Parsing all metrics of so many devices would take a second."""
        assert self.hcd.metrics_at is not None
        text = fetch(self.hcd.metrics_at, "/metrics")
        counts = re.findall(rf'^{family}{{[^}}]*device="{name}"[^}}]*}} ([0-9.e+]+)$', text, re.MULTILINE)
        assert counts
        return int(sum(map(float, counts)))

    # -- the log

    @property
    def log(self) -> list[str]:
        """The lines of this test."""
        return self.hcd.log_text.splitlines()[self._first_line :]

    def begin(self) -> None:
        """A new test, a new victim."""
        self._count += 1
        self.victim = f"victim{self._count}"
        self._first_line = len(self.hcd.log_text.splitlines())

    def expect_log(self, *patterns: str, device: str = "", most: int = 12) -> None:
        """A line about ``device`` (the victim) comes that matches every pattern; with at most ``most`` lines."""
        device = device or self.victim

        def said() -> bool:
            lines = [line for line in self.log if f" {device}: " in line]
            return any(all(re.search(pattern, line) for pattern in patterns) for line in lines)

        wait_until(said, lambda: f"a line about {device} with {patterns} in\n" + "\n".join(self.log))
        assert len(self.log) <= most, "a flood of logs:\n" + "\n".join(self.log)

    # -- the end of each test

    def check_healthy(self) -> None:
        """Every device serves, nothing was left behind, no traceback was logged."""
        assert self.hcd.process.poll() is None, "the daemon ended:\n" + "\n".join(self.log)
        self.bystander.check()
        self.use(self.victim)
        wait_until(lambda: not self._growth(), lambda: f"hcd gives back {self._growth()}")
        assert "Traceback" not in "\n".join(self.log)

    def _growth(self) -> str:
        return self._resources().growth_since(self._before)

    def _resources(self) -> Resources:
        """What hcd holds, but for the bystander's I/O threads: they come with its load, and stay."""
        resources = self.hcd.resources()
        resources.threads = [name for name in resources.threads if name != "hcd-block"]
        return resources


@pytest.fixture(scope="module")
def _hostile() -> Iterator[Hostile]:
    with tempfile.TemporaryDirectory(prefix="hostile-", dir="/tmp") as path:
        served = Hostile(Path(path))
        yield served
        served.close()


@pytest.fixture
def hostile(_hostile: Hostile) -> Iterator[Hostile]:
    """The module's daemon; after the test it must be as healthy as before."""
    _hostile.begin()
    yield _hostile
    _hostile.check_healthy()
