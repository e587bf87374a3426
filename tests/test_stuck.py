"""Requests in flight for too long: counted, said once, and said again when it is over."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from rings import make_pair

from hcd import cli
from hcd.demo.hcd_process import HcdProcess
from hcd.testing import Driver

#: seconds; the devices of this test say 0.1, but for one
STUCK_AFTER = 0.1

SOURCE = """
from hcd.device import Device


class Keeps(Device):
    '''Answers when it is asked to: the request "go" completes all.'''
    virtio_id = 63
    num_queues = 2
    def __init__(self, name, options):
        super().__init__(name, options)
        self.kept = []
    def process(self, queue):
        for request in queue:
            request.hold()
            self.kept.append(request)
            if request.read() == b"go":
                for one in self.kept:
                    one.complete(0)
                self.kept.clear()
    def stop_queue(self, queue):
        for one in self.kept:
            one.complete(0)
        self.kept.clear()
"""
DEVICES = """
[control]
path = "{dir}/control"
[[device]]
name = "keeper"
type = "keeps"
socket = "{dir}/keeper"
[[device]]
name = "patient"
type = "keeps"
socket = "{dir}/patient"
stuck_after = 0
"""


@pytest.fixture
def hcd(
    make_distribution: Callable[..., Path],
    start_hcd: Callable[..., HcdProcess],
    monkeypatch: pytest.MonkeyPatch,
) -> HcdProcess:
    site = make_distribution("keepworks", "1.0", {"keeps": "keeps:Keeps"}, {"keeps": SOURCE})
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")])))
    return start_hcd(DEVICES, daemon=f"stuck_after = {STUCK_AFTER}")


def until(what: Callable[[], bool]) -> None:
    """A metric has no event to wait for."""
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def stuck(hcd: HcdProcess, device: str) -> float:
    return hcd.metrics().total("hcd_stuck_requests", device=device)


def keep(driver: Driver, queue: int, count: int) -> None:
    for _ in range(count):
        driver.queues[queue].submit(driver.place(b"x"), [])
    driver.queues[queue].kick()


@pytest.mark.long
def test_stuck_requests_are_counted_and_said_until_they_end(hcd: HcdProcess, short_dir: Path) -> None:
    """With device, queue and age; once, although they are looked at again and again."""
    keeper = Driver.open(short_dir / "keeper", queues=2)
    with keeper as driver, Driver.open(short_dir / "patient") as patient:
        keep(driver, 1, 3)
        keep(patient, 0, 1)
        until(lambda: stuck(hcd, "keeper") == 3)
        assert stuck(hcd, "patient") == 0
        driver.ask(b"go", 0)
        until(lambda: "no request is stuck any more" in hcd.log_text)
        assert stuck(hcd, "keeper") == 0
    (age,) = re.findall(r"keeper: queue 1: a request has been in flight for (\S+) s, longer than", hcd.log_text)
    assert float(age) >= STUCK_AFTER
    (lasted,) = re.findall(r"keeper: queue 1: no request is stuck any more; one was .* for (\S+) s", hcd.log_text)
    assert float(lasted) >= float(age)
    assert "patient: queue" not in hcd.log_text


@pytest.mark.long
def test_a_reload_changes_what_counts_as_stuck(hcd: HcdProcess, short_dir: Path) -> None:
    with Driver.open(short_dir / "patient") as driver:
        keep(driver, 0, 1)
        until(lambda: hcd.metrics().total("hcd_requests_inflight", device="patient") == 1)
        file = short_dir / "hcd.toml"
        file.write_text(file.read_text().replace("stuck_after = 0\n", "stuck_after = 0.05\n"))
        assert cli.main(["reload", "--control", str(short_dir / "control")]) == 0
        until(lambda: stuck(hcd, "patient") == 1)
    assert "reloaded: 1 unchanged; adjusted patient" in hcd.log_text
    assert hcd.log_text.count("patient: front end connected") == 1


@pytest.mark.parametrize("packed", [False, True])
def test_a_queue_counts_what_is_older(packed: bool) -> None:
    pair = make_pair(packed=packed)
    for _ in range(3):
        pair.ring.add([], [pair.room(1)])
    pair.ring.publish()
    requests = pair.queue.pop_many(2)
    age = pair.stats.oldest_ns()
    requests += pair.queue.pop_many(1)
    assert pair.queue.older_than(3600 * 10**9) == 0
    assert pair.queue.older_than(0) == 3
    assert pair.queue.older_than(pair.stats.oldest_ns() - age) >= 1
    requests[0].complete()
    assert pair.queue.older_than(0) == 2
    for request in requests[1:]:
        request.complete()
    assert pair.queue.older_than(0) == 0
    pair.close()
