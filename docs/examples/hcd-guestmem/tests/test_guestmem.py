"""The device type "guestmem", without a virtual machine."""

from __future__ import annotations

import time

import pytest
from hcd.testing import Driver, Exchange, ServedDevice, check_device, serve

from hcd_guestmem import CONFIG, DEFLATE, ENTRY, INFLATE, STATISTICS, GuestMemory


def report(**values: int) -> bytes:
    tags = {"swapped_in": 0, "major": 2, "minor": 3, "free": 4, "total": 5, "other": 99}
    return b"".join(ENTRY.pack(tags[name], value) for name, value in values.items())


def tell(driver: Driver, data: bytes) -> int:
    """The guest's report; the token of its buffer, which the device keeps."""
    return driver.queues[STATISTICS].submit(driver.place(data), [])


def value(served: ServedDevice, name: str, **labels: str) -> float:
    return served.metrics().total(f"hcd_device_guestmem_{name}", device="mem", **labels)


def test_a_report_becomes_metrics_and_the_next_one_is_asked_for() -> None:
    with serve(GuestMemory, {"interval": 0.01}, name="mem") as served, served.driver() as driver:
        assert CONFIG.unpack(driver.config(0, 8)) == (0, 0)
        queue = driver.queues[STATISTICS]
        queue.wait_for(tell(driver, report(free=100, total=500, minor=7, other=1)))
        assert value(served, "bytes", kind="free") == 100
        assert value(served, "bytes", kind="total") == 500
        assert value(served, "faults_total", kind="minor") == 7
        queue.wait_for(tell(driver, report(free=90, total=500, minor=9)))
        assert value(served, "bytes", kind="free") == 90
        assert value(served, "faults_total", kind="minor") == 9
        queue.wait_for(tell(driver, report(minor=2)))  # a guest that was restarted counts from the beginning
        assert value(served, "faults_total", kind="minor") == 11
        assert value(served, "reports_total") == 3


def test_the_buffer_is_kept_until_it_is_time_and_given_back_when_the_queue_stops() -> None:
    with serve(GuestMemory, {"interval": 3600.0}, name="mem") as served, served.driver() as driver:
        tell(driver, report(free=1))
        while value(served, "reports_total") == 0:
            time.sleep(0.001)
        assert not driver.queues[STATISTICS].used()
        assert driver.stop_queue(STATISTICS) == 1
        assert len(driver.queues[STATISTICS].used()) == 1


@pytest.mark.parametrize("data", [b"x", bytes(11), bytes(10 * 65)])
def test_a_report_that_is_none_is_the_guests_error(data: bytes) -> None:
    with serve(GuestMemory, name="mem") as served, served.driver() as driver:
        driver.queues[STATISTICS].wait_for(tell(driver, data))
        assert served.metrics().total("hcd_guest_errors_total") == 1
        assert value(served, "reports_total") == 0


def test_the_device_keeps_the_contract() -> None:
    pages = [Exchange(bytes(8), queue=queue) for queue in (INFLATE, DEFLATE)]
    check_device(GuestMemory, {"interval": 0.001}, exchanges=[*pages, Exchange(report(free=1), queue=STATISTICS)])
