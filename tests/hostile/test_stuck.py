"""Devices that hang, in a real hcd process: a request that never completes, and a reactor that never returns."""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hcd.demo.hcd_process import HcdProcess
from hcd.testing import Driver

pytestmark = pytest.mark.long

#: seconds
DRAIN_TIMEOUT = 0.7
WATCHDOG = 0.2

SOURCE = """
from hcd.device import Device, Option


class Good(Device):
    virtio_id = 63
    def process(self, queue):
        for request in queue:
            request.write(request.read().upper())
            request.complete()


class Keeps(Good):
    '''Never answers.'''
    kept = ()
    def process(self, queue):
        for request in queue:
            request.hold()
            self.kept += (request,)


class Hangs(Good):
    '''Reads a FIFO in the reactor, at each request.'''
    options = (Option("fifo", "path", "what it reads"),)
    def process(self, queue):
        for request in queue:
            with open(self.option["fifo"]) as fifo:
                request.write(fifo.read().encode())
            request.complete()
"""

DEVICES = """
[[device]]
name = "keeper"
type = "keeps"
socket = "{dir}/keeper"
[[device]]
name = "hanger"
type = "hangs"
socket = "{dir}/hanger"
[device.options]
fifo = "{dir}/fifo"
[[device]]
name = "good"
type = "good"
socket = "{dir}/good"
"""


@pytest.fixture
def hcd(
    make_distribution: Callable[..., Path],
    start_hcd: Callable[..., HcdProcess],
    short_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> HcdProcess:
    types = {name: f"stuck:{name.capitalize()}" for name in ("good", "keeps", "hangs")}
    site = make_distribution("stuckworks", "1.0", types, {"stuck": SOURCE})
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")])))
    os.mkfifo(short_dir / "fifo")
    return start_hcd(DEVICES, daemon=f"drain_timeout = {DRAIN_TIMEOUT}")


@pytest.fixture
def manager(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The service manager's end of NOTIFY_SOCKET; it wants to hear from hcd every WATCHDOG seconds."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(short_dir / "notify"))
        notify.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(short_dir / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", f"{WATCHDOG * 1e6:.0f}")
        yield notify


def test_a_request_that_never_completes_holds_its_queue_up_for_drain_timeout(hcd: HcdProcess, short_dir: Path) -> None:
    """GET_VRING_BASE is answered then; the log names device, queue, how many, and the age of the oldest."""
    with Driver.open(short_dir / "keeper") as driver, Driver.open(short_dir / "good") as good:
        for _ in range(3):
            driver.queues[0].submit(driver.place(b"x"), [])
        assert good.ask(b"hello", 8) == b"HELLO"  # on the same thread, so the requests were taken
        began = time.monotonic()
        assert driver.stop_queue(0) == 3
        assert time.monotonic() - began >= DRAIN_TIMEOUT
        assert not driver.queues[0].used()
        assert good.ask(b"hello", 8) == b"HELLO"
        driver.start_queue(0)
        assert good.ask(b"hello", 8) == b"HELLO"
    said = r" keeper: queue 0: 3 requests did not end within 0.7 s, the oldest has been there for (\S+) s;"
    found = re.search(said, hcd.log_text)
    assert found, hcd.log_text
    assert float(found[1]) >= DRAIN_TIMEOUT


def hear(notify: socket.socket, seconds: float) -> list[bytes]:
    """What is said in the next so many seconds."""
    heard = []
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        notify.settimeout(left)
        try:
            heard.append(notify.recv(4096))
        except TimeoutError:
            break
    notify.settimeout(30)
    return heard


def until_pinged(notify: socket.socket) -> None:
    while notify.recv(4096) != b"WATCHDOG=1":
        pass


def test_the_watchdog_hears_nothing_while_the_reactor_hangs(
    manager: socket.socket, hcd: HcdProcess, short_dir: Path
) -> None:
    """Trio is well and answers; the pings stop when a handler hangs, and come again when it has returned."""
    until_pinged(manager)
    until_pinged(manager)
    with Driver.open(short_dir / "hanger") as driver:
        token = driver.queues[0].submit([], driver.make_room(8))
        driver.queues[0].kick()
        hear(manager, 2 * WATCHDOG)  # what was on its way
        assert hcd.metrics().total("hcd_build_info") == 1
        assert b"WATCHDOG=1" not in hear(manager, 4 * WATCHDOG)
        release = threading.Thread(target=(short_dir / "fifo").write_text, args=("go on",))
        release.start()
        until_pinged(manager)
        until_pinged(manager)
        release.join()
        assert driver.queues[0].wait_for(token) == 5
