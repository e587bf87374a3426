"""The conformance check finds what is wrong with a device, and nothing wrong with a good one."""

from __future__ import annotations

import struct
import threading
from typing import Any

import faulty_devices
import pytest

from hcd.device import Device
from hcd.testing import ConformanceError, Exchange, Ring, check_device, find_faults

pytestmark = pytest.mark.long


SHOUTS = (Exchange(b"hello", 64, b"HELLO"), Exchange(b"world wide", 64, b"WORLD WIDE"))
READ_SECTOR_0 = struct.pack("<IIQ", 0, 0, 0)
WRITE_SECTOR_8 = struct.pack("<IIQ", 1, 0, 8) + b"x" * 512
GET_ID = struct.pack("<IIQ", 8, 0, 0)


@pytest.mark.parametrize("kind", faulty_devices.GOOD)
def test_a_good_device_passes(kind: type[Device]) -> None:
    """In the reactor, in trio, in order and out of it."""
    check_device(kind, exchanges=SHOUTS)


@pytest.mark.parametrize("kind", faulty_devices.FAULTY)
def test_a_seeded_mistake_is_found(kind: type[faulty_devices.Shout], monkeypatch: pytest.MonkeyPatch) -> None:
    """The finding names the rule that the mistake breaks."""
    monkeypatch.setattr("hcd.testing.conformance.DRAIN_TIMEOUT", 0.05)
    exchanges: tuple[Exchange, ...] = SHOUTS
    if kind is faulty_devices.FirstQueueOnly:
        exchanges += (Exchange(b"second", 64, b"SECOND", queue=1),)
    findings = find_faults(kind, exchanges=exchanges, timeout=0.2)
    assert kind.BREAKS in {finding.rule for finding in findings}, findings


@pytest.mark.parametrize(
    ("kind", "options", "exchanges"),
    [
        ("rng", {}, [Exchange(b"", 64)]),
        ("rng", {"max-bytes": 64, "period": 10}, []),
        (
            "blk",
            {"ram": "1M", "serial": "disk"},
            [
                Exchange(READ_SECTOR_0, 513, bytes(513)),
                Exchange(WRITE_SECTOR_8, 1, b"\0"),
                Exchange(GET_ID, 21, b"disk".ljust(21, b"\0")),
            ],
        ),
        ("net", {}, [Exchange(bytes(72), queue=1)]),
        ("net", {"queue-pairs": 2, "mac": "52:54:00:12:34:56"}, []),
    ],
)
def test_devices_of_hcd_pass(kind: str, options: dict[str, Any], exchanges: list[Exchange]) -> None:
    """What hcd ships keeps the contract that it asks of others."""
    check_device(kind, options, exchanges=exchanges)


def test_the_error_shows_every_finding() -> None:
    """A failing test of a plug-in says which rule was broken and how."""
    with pytest.raises(ConformanceError, match=r"(?s)ConfigGrows breaks.*config: .*must not change its size") as caught:
        check_device(faulty_devices.ConfigGrows, exchanges=SHOUTS)
    assert caught.value.findings


@pytest.mark.parametrize("queue", [1, -1])
def test_an_exchange_on_a_queue_that_is_not_there_is_refused(queue: int) -> None:
    """The test is wrong, not the device."""
    with pytest.raises(ValueError, match=f"on queue {queue}: the device has 1, "):
        check_device(faulty_devices.Shout, exchanges=[Exchange(b"hello", 64, queue=queue)])


def test_an_exchange_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="room for -1 bytes"):
        Exchange(b"hello", -1)
    with pytest.raises(ValueError, match="add is rung 0 times"):
        Ring("add", "done", count=0)
    with pytest.raises(ValueError, match="with room for 67108864 on queue 0: no 67108864 bytes of guest memory"):
        check_device(faulty_devices.Shout, exchanges=[Exchange(b"hello", 64 << 20)])


def test_a_rule_can_be_skipped() -> None:
    """An author who knows better says so in the test."""
    check_device(faulty_devices.ConfigGrows, exchanges=SHOUTS, skip={"config"})


def test_a_device_that_never_closes_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its open() is not to blame."""
    ended = threading.Event()

    class NeverCloses(faulty_devices.Shout):
        def close(self) -> None:
            ended.wait(60)

    def lose_patience(run: object) -> None:
        monkeypatch.setattr("hcd.testing.serving.PATIENCE", 0.1)

    monkeypatch.setattr("hcd.testing.rules.RULES", {"last": lose_patience})
    try:
        texts = [finding.text for finding in find_faults(NeverCloses) if finding.rule == "life"]
    finally:
        ended.set()
        for thread in threading.enumerate():
            if thread.name == "hcd-testing":
                thread.join()
    assert texts == ["TimeoutError: the device could not be closed: a handler of it never returns"]


def test_a_device_that_cannot_be_opened_is_a_finding() -> None:
    """So is one that fails to close."""

    class Closed(faulty_devices.Shout):
        def open(self, lane: object) -> None:
            raise OSError("no such lamp")

    class Open(faulty_devices.Shout):
        def close(self) -> None:
            raise OSError("no such lamp")

    for kind, method in ((Closed, "open"), (Open, "close")):
        (finding,) = find_faults(kind)
        assert (finding.rule, finding.text) == ("life", f"{method}() raised OSError: no such lamp")


def test_a_device_that_exits_when_it_is_asked_for_its_configuration_is_a_finding() -> None:
    """The check goes on, and so do other tests."""

    class Exits(faulty_devices.Shout):
        def config(self) -> bytes:
            raise SystemExit(3)

    assert [str(finding) for finding in find_faults(Exits)] == ["life: SystemExit: 3"]
