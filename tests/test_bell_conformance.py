"""The conformance check finds what is wrong with a doorbell device, and nothing wrong with a good one."""

from __future__ import annotations

from typing import Any

import faulty_bells
import pytest

from hcd import device
from hcd.devices.echo import Echo
from hcd.devices.nullio import NullIo
from hcd.testing import BackendError, ConformanceError, Exchange, Ring, check_device, find_faults, serve

pytestmark = pytest.mark.long

SUMS = (
    Ring("clear", "done", answer={1: b"\0"}),
    Ring("add", "done", count=3, memory={0: b"\x05\x01"}, answer={0: b"\x05\x10"}),
)
EVERYWHERE = {"ports": "0x510/2=7,0x510/2=8", "gpas": "0xd0000", "any-gpas": "0xd1000", "connections": "32"}


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize("kind", faulty_bells.GOOD)
def test_a_good_device_passes(kind: type[faulty_bells.Adder]) -> None:
    """In the reactor and in trio, and when it interrupts by itself."""
    exchanges = (Ring("add", "done"),) if kind is faulty_bells.Ticker else SUMS
    check_device(kind, exchanges=exchanges)


@pytest.mark.parametrize("kind", faulty_bells.FAULTY)
def test_a_seeded_mistake_is_found(kind: type[faulty_bells.Adder], monkeypatch: pytest.MonkeyPatch) -> None:
    """The finding names the rule that the mistake breaks."""
    monkeypatch.setattr("hcd.testing.conformance.DRAIN_TIMEOUT", 0.1)
    assert kind.BREAKS in {finding.rule for finding in find_faults(kind, exchanges=SUMS, timeout=0.1)}


@pytest.mark.parametrize(
    ("kind", "options", "exchanges"),
    [
        ("nullio", EVERYWHERE, []),
        ("echo", EVERYWHERE, [Ring("pio1", "pio1", count=5), Ring("hyperv0", "hyperv0")]),
        (Echo, {"gpas": "0xd0000,0xd0004", "stamps": True}, [Ring("mmio1", "mmio1"), Ring("mmio0", "mmio0")]),
        (NullIo("n", dict(EVERYWHERE, stamps=True)), None, []),
    ],
)
def test_devices_of_hcd_pass(kind: Any, options: dict[str, Any], exchanges: list[Ring]) -> None:
    """By name, by class and made already."""
    check_device(kind, options, exchanges=exchanges)


def test_the_error_shows_every_finding() -> None:
    with pytest.raises(ConformanceError, match=r"(?s)Later breaks .*late: a VMM that rang nothing") as caught:
        check_device(faulty_bells.Later, exchanges=SUMS)
    assert "late" in {finding.rule for finding in caught.value.findings}


def test_a_rule_can_be_skipped() -> None:
    """An author who knows better says so in the test."""
    with pytest.raises(ConformanceError, match=r"CannotClose breaks 1 .*\n  life: close\(\) raised OSError: stuck"):
        check_device(faulty_bells.CannotClose, exchanges=SUMS)
    check_device(faulty_bells.CannotClose, exchanges=SUMS, skip={"life"})


def test_exchanges_are_of_the_kind_of_the_device() -> None:
    with pytest.raises(TypeError, match=r"exchanges of Adder are instances of hcd\.testing\.Ring"):
        check_device(faulty_bells.Adder, exchanges=[Exchange(b"x")])


@pytest.mark.usefixtures("no_leaks")
@pytest.mark.parametrize(
    ("ring", "text"),
    [
        (Ring("subtract", "done"), 'no doorbell "subtract"; it has add, clear'),
        (Ring("add", "ready"), 'no interrupt "ready"; it has done'),
        (Ring("add", "done", memory={4095: b"ab"}), "2 bytes at 0xfff; the shared memory has 4096 bytes"),
        (Ring("add", "done", answer={-1: b"a"}), "1 bytes at -0x1; the shared memory"),
    ],
)
def test_exchanges_about_what_is_not_there_are_refused(ring: Ring, text: str) -> None:
    """The test is wrong, not the device."""
    with pytest.raises(ValueError, match=text):
        check_device(faulty_bells.Adder, exchanges=[ring])


def test_serving_for_a_test_of_ones_own() -> None:
    """A plug-in's test in a few lines, with metrics."""
    with serve(faulty_bells.Adder, name="sums") as served:
        with served.vmm() as vmm, vmm.map_memory() as memory:
            memory[0] = 7
            vmm.ring("add", 2)
            assert vmm.wait_interrupt("done") == 1
            assert memory[1] == 14
            with pytest.raises(BackendError, match=r"interrupt done did not come in 0\.01 s"):
                vmm.wait_interrupt("done", 0.01)
        served.wait_disconnected()
        assert served.metrics().total("hcd_doorbell_rings_total", device="sums", queue="add", path="pio") == 2
        assert served.run(lambda: served.device.memory) is None


def test_the_fixture_serves_doorbell_devices_too(hcd_serve: Any) -> None:
    with hcd_serve("echo", {"ports": "0x510"}).vmm() as vmm:
        vmm.ring("pio0")
        vmm.wait_interrupt("pio0")


def test_a_describe_that_raises_says_what_it_would_have_said() -> None:
    assert device.DoorbellDevice("x", {}).describe(None, 1) == "1 ring"  # type: ignore[arg-type]
    assert device.DoorbellDevice("x", {}).describe(None, 2) == "2 rings"  # type: ignore[arg-type]
