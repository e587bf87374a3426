"""Wrappers of doorbell devices: what is rung is told of, lost, failed or delayed, on both lanes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
from faulty_bells import Adder, AsyncAdder, Raises
from hcd_protocols.doorbell import Kind, TableComplete

from hcd import config, wrappers
from hcd.config import ConfigProblems
from hcd.demo.hcd_process import HcdProcess
from hcd.device import Bell, DoorbellDecl, DoorbellDevice, Path
from hcd.testing import Ring, ServedDoorbells, Vmm, check_device, serve
from hcd.wrappers.rings import RingWrapper

pytestmark = pytest.mark.usefixtures("no_leaks")


class Counter(Adder):
    """Notes what it hears."""

    def __init__(self, name: str = "dev", options: dict[str, Any] | None = None) -> None:
        super().__init__(name, options or {})
        self.heard: list[tuple[str, int]] = []
        self.calls: list[str] = []

    def handle(self, doorbell: Bell, count: int) -> None:
        self.heard.append((doorbell.name, count))
        self.calls.append("ring")
        super().handle(doorbell, count)

    def disconnect(self) -> None:
        self.calls.append("disconnect")


class AsyncCounter(Counter):
    async def ring(self, doorbell: Bell, count: int) -> None:
        await trio.lowlevel.checkpoint()
        self.handle(doorbell, count)


KINDS = pytest.mark.parametrize("kind", [Counter, AsyncCounter])


def wrapped(served: ServedDoorbells, *texts: str) -> ServedDoorbells:
    """``served`` under wrappers as the command line writes them."""
    host = served.host
    for text in reversed(texts):
        spec = wrappers.parse_text(text, DoorbellDevice)
        made: Any = spec.wrapper(host.device, spec.options, host.log)
        served.run(lambda made=made: host.wrapping.add(made))
    return served


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the wrapper said, without times."""
    found = [record.getMessage() for record in caplog.records if record.name == "hcd.session"]
    return [text.rsplit(",", 1)[0] if text.endswith(" us") else text
            for text in found if text.startswith(("doorbell", "interrupt"))]


@pytest.fixture
def info(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "hcd")
    return caplog


# -- log


@KINDS
def test_log_tells_of_each_ring_and_of_each_interrupt(kind: type[Counter], info: pytest.LogCaptureFixture) -> None:
    """Doorbell, number, count; what was answered; how it ended."""
    with serve(kind) as served:
        with wrapped(served, "log").vmm() as vmm:
            vmm.ring("add", 3)
            vmm.wait_interrupt("done")
            vmm.ring("clear")
            vmm.wait_interrupt("done")
        served.wait_disconnected()
    assert lines(info) == [
        "doorbell add #1: 3 rings",
        "interrupt done: sent, answers doorbell add",
        "doorbell add #1: handled",
        "doorbell clear #2: 1 ring",
        "interrupt done: sent, answers doorbell clear",
        "doorbell clear #2: handled",
    ]


def test_log_tells_the_value_that_rings_and_what_the_device_can_decode(info: pytest.LogCaptureFixture) -> None:
    """A datamatch is the only way to know a value. What describe() raises is said."""

    class Decoder(Counter):
        @property
        def doorbells(self) -> list[DoorbellDecl]:
            return [DoorbellDecl("add", Path.PIO, 0x510, 4, datamatch=0x17), DoorbellDecl("odd", Path.PIO, 0x514)]

        def describe(self, doorbell: Bell, count: int) -> str:
            if doorbell.name == "odd":
                raise LookupError("nothing there")
            assert self.memory is not None
            return f"add {self.memory[0]}, {count} times"

    with serve(Decoder) as served:
        with wrapped(served, "log").vmm() as vmm, vmm.map_memory() as memory:
            memory[0] = 5
            vmm.ring("add", 2)
            vmm.wait_interrupt("done")
            vmm.ring("odd")
        served.wait_disconnected()
    told = lines(info)
    assert told[0] == "doorbell add #1: add 5, 2 times, value 0x17"
    assert "doorbell odd #2: 1 ring (LookupError: nothing there)" in told


def test_log_tells_of_failures_and_of_interrupts_that_reach_nobody(info: pytest.LogCaptureFixture) -> None:
    with serve(Raises) as served, wrapped(served, "log").vmm() as vmm:
        vmm.ring("add")
        vmm.close()
        served.wait_disconnected()
        assert not served.run(lambda: served.device.interrupt("done"))
    assert "doorbell add #1: raised ZeroDivisionError" in lines(info)
    assert lines(info)[-1] == "interrupt done: absent"
    assert served.host.stats.handler_errors == 1


# -- error


@KINDS
def test_lost_rings_never_reach_the_device(kind: type[Counter], info: pytest.LogCaptureFixture) -> None:
    """What is rung at once has one fate. They are counted all the same: the guest rang."""
    with serve(kind) as served:
        with wrapped(served, "log", "error:pattern=.x").vmm() as vmm:
            for count in (1, 2, 3, 4):
                vmm.ring("add", count)
                wait_counted(served, wakeups=count)
        served.wait_disconnected()
        assert served.device.heard == [("add", 1), ("add", 3)]
        assert served.metrics().total("hcd_doorbell_rings_total", queue="add") == 10
        assert served.host.stats.handler_errors == 0
    assert lines(info).count("doorbell add #2: lost") == 1
    assert not [line for line in lines(info) if "#2: handled" in line]


def wait_counted(served: ServedDoorbells, *, rings: int = 0, wakeups: int = 0) -> None:
    """Until hcd has counted so much of "add"."""
    stats = served.host.doorbells["add"].doorbell.stats
    wait_for(lambda: stats.rings >= rings and stats.wakeups >= wakeups)


def wait_for(condition: Callable[[], bool]) -> None:
    """For what has no event."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@KINDS
def test_rings_can_fail_as_if_the_handler_had_raised(kind: type[Counter]) -> None:
    """For alerts on hcd_handler_errors_total; only the doorbell that was named."""
    with serve(kind) as served:
        with wrapped(served, "error:probability=1,fault=raise,doorbell=add").vmm() as vmm:
            vmm.ring("add", 5)
            vmm.ring("clear")
            vmm.wait_interrupt("done")
        served.wait_disconnected()
        assert served.device.heard == [("clear", 1)]
        assert served.host.stats.handler_errors == 1


@KINDS
def test_delayed_rings_come_late(kind: type[Counter]) -> None:
    with serve(kind) as served:
        with wrapped(served, "error:pattern=d,delay-ms=50").vmm() as vmm:
            began = time.monotonic()
            vmm.ring("add", 2)
            vmm.wait_interrupt("done")
            assert time.monotonic() - began >= 0.05
        served.wait_disconnected()
        assert served.device.heard == [("add", 2)]


@KINDS
def test_nothing_is_delayed_beyond_the_end_of_the_connection(kind: type[Counter]) -> None:
    """What a VMM rang is handled before the device is disconnected, whoever delays it, and as often as it was rung."""
    with serve(kind, drain_timeout=30) as served:
        stack = wrapped(served, "error:pattern=d,delay-ms=3600000", "error:pattern=d,delay-ms=3600000")
        for number in range(1, 4):
            with stack.vmm() as vmm:
                vmm.ring("add", 2)
                wait_counted(served, rings=5 * number - 3)
                vmm.ring("add", 3)
                vmm.ring("clear", 5)
            served.wait_disconnected()
            assert sum(count for _, count in served.device.heard) == 10 * number
            assert served.device.calls[-1] == "disconnect"
            assert served.device.calls.count("disconnect") == number


@KINDS
def test_what_is_rung_while_rings_are_delayed_takes_no_room(kind: type[Counter]) -> None:
    """However often a guest rings, there is one batch that waits and one after it."""
    with serve(kind, drain_timeout=30) as served:
        with wrapped(served, "error:pattern=d,delay-ms=3600000").vmm() as vmm:
            for number in range(1, 21):
                vmm.ring("add")
                wait_counted(served, rings=1 if kind.is_async() else number)
        served.wait_disconnected()
        assert served.device.heard == [("add", 1), ("add", 19)]


@KINDS
def test_what_is_rung_while_rings_are_delayed_comes_after_them(kind: type[Counter]) -> None:
    with serve(kind) as served:
        with wrapped(served, "error:pattern=d.,delay-ms=100").vmm() as vmm:
            for number in range(1, 5):
                vmm.ring("add")
                wait_counted(served, rings=1 if kind.is_async() else number)
            wait_for(lambda: len(served.device.heard) > 1)
        served.wait_disconnected()
        assert sum(count for _, count in served.device.heard) == 4
        assert served.host.stats.handler_errors == 0


@KINDS
def test_a_doorbell_that_is_removed_while_its_rings_are_delayed(kind: type[Counter]) -> None:
    """The device does not hear of what it has no longer."""
    with serve(kind) as served:
        with wrapped(served, "error:pattern=d,delay-ms=3600000,doorbell=add").vmm() as vmm:
            vmm.ring("add")
            wait_counted(served, rings=1)
            served.run(lambda: served.device.remove_doorbells(["add"]))
            vmm.until(TableComplete)
            vmm.ring("clear")
            vmm.wait_interrupt("done")
        served.wait_disconnected()
        assert served.device.heard == [("clear", 1)]


def test_probabilities_are_kept_and_a_seed_repeats_them() -> None:
    """One in four or so."""

    def heard(seed: int) -> list[str]:
        with serve(Counter) as served:
            with wrapped(served, f"error:probability=0.25,seed={seed}").vmm() as vmm:
                for number in range(200):
                    vmm.ring("add")
                    wait_counted(served, wakeups=number + 1)
            served.wait_disconnected()
            return [str(len(served.device.heard)), *(one for one, _ in served.device.heard)]

    first = heard(1)
    assert 110 < int(first[0]) < 180
    assert first == heard(1)


# -- all together


@pytest.mark.parametrize("texts", [["log"], ["log", "error:delay-probability=0.3,delay-ms=2,seed=7"]])
@pytest.mark.parametrize("kind", [Adder, AsyncAdder])
def test_a_wrapped_device_keeps_the_contract(
    kind: type[Adder], texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole conformance run."""
    specs = tuple(wrappers.parse_text(text, DoorbellDevice) for text in texts)
    monkeypatch.setattr("hcd.testing.serving.DeviceSpec", lambda **fields: config.DeviceSpec(**fields, wrap=specs))
    check_device(kind, exchanges=[Ring("clear", "done", answer={1: b"\0"})])


@KINDS
def test_wrappers_come_and_go_while_rings_are_handled(kind: type[Counter]) -> None:
    """As a trace does. No ring is lost or heard twice."""
    with serve(kind) as served, served.vmm() as vmm:
        done = threading.Event()

        def keep_ringing() -> None:
            for _ in range(2000):
                vmm.ring("add")
            done.set()

        thread = threading.Thread(target=keep_ringing)
        thread.start()
        while not done.is_set():
            spec = wrappers.parse_text("error:pattern=d.,delay-ms=1", DoorbellDevice)
            one: Any = spec.wrapper(served.device, spec.options, served.host.log)
            served.run(lambda one=one: served.host.wrapping.add(one))  # type: ignore[misc]
            served.run(lambda one=one: served.host.wrapping.remove(one))  # type: ignore[misc]
        thread.join()
        vmm.close()
        served.wait_disconnected()
        assert sum(count for _, count in served.device.heard) == 2000
        assert served.run(lambda: all(one.line.on_signal is None for one in served.host.interrupts.values()))


def test_a_wrapper_that_fails_is_no_worse_than_the_device(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(RingWrapper):
        def rung(self, batch: object) -> float:
            raise KeyError("rung")

        handled = interrupted = rung

    with serve(Counter) as served, served.vmm() as vmm:
        served.run(lambda: served.host.wrapping.add(Broken(served.device, {}, served.host.log)))
        vmm.ring("add")
        vmm.wait_interrupt("done")
        vmm.close()
        served.wait_disconnected()
        assert served.device.heard == [("add", 1)]
    assert caplog.text.count("a wrapper failed") == 3


# -- how they are written


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("error:pattern=x,status=2", '"status" is not an option of wrapper "error" of a doorbell device; expected'),
        ("error:pattern=x,queue=0", '"queue" is not an option of wrapper "error" of a doorbell device'),
        ("error:pattern=x,fault=crash", "error fault: expected .*lose.*raise"),
        ("error", "nothing would ever happen"),
        ("log:x=1", '"x" is not an option of wrapper "log" of a doorbell device; it has none'),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        wrappers.parse_text(text, DoorbellDevice)


def test_options_of_rings_are_not_for_requests() -> None:
    with pytest.raises(ValueError, match='"doorbell" is not an option of wrapper "error"; expected'):
        wrappers.parse_text("error:pattern=x,doorbell=a")


def document(wrap: object) -> dict[str, Any]:
    table = {"name": "d", "type": "echo", "socket": "/run/d", "wrap": wrap, "options": {"ports": "0x510"}}
    return {"device": [table]}


def test_a_configuration_names_them() -> None:
    """With the type of the device it is known which options there are."""
    (spec,) = config.parse(document(["log", {"error": {"pattern": "x", "doorbell": "pio0"}}]), "f").devices
    assert spec.wrap[1].options["doorbell"] == "pio0"
    with pytest.raises(ConfigProblems, match='"d" wrap: "queue" is not an option of wrapper "error" of a doorbell'):
        config.parse(document([{"error": {"queue": 0}}]), "f")


@pytest.fixture
def echo(start_hcd: Callable[..., HcdProcess], short_dir: Any) -> Iterator[tuple[HcdProcess, Vmm]]:
    hcd = start_hcd(
        '[[device]]\nname = "bells"\ntype = "echo"\nsocket = "{dir}/s"\n'
        'wrap = ["log", { error = { pattern = ".x", doorbell = "pio0" } }, '
        '{ error = { pattern = "x", doorbell = "p" } }]\n'
        '[device.options]\nports = "0x510=7"\ngpas = "0xd0000"\n'
    )
    with Vmm(short_dir / "s") as vmm:
        yield hcd, vmm


def test_a_daemon_runs_wrapped_devices(echo: tuple[HcdProcess, Vmm]) -> None:
    """From the configuration file to the line in the log, which also names a doorbell that is not there."""
    hcd, vmm = echo
    assert vmm.names(Kind.DOORBELL) == ["pio0", "mmio0"]
    vmm.ring("pio0", 4)
    vmm.wait_interrupt("pio0")
    vmm.ring("pio0")
    wait_for(lambda: "bells: doorbell pio0 #2: lost" in hcd.log_text)
    vmm.ring("mmio0")
    vmm.wait_interrupt("mmio0")
    assert "bells: doorbell pio0 #1: 4 rings, value 0x7" in hcd.log_text
    assert "bells: interrupt pio0: sent, answers doorbell pio0" in hcd.log_text
    assert 'bells: the wrapper error is for doorbell "p", which there is not; expected pio0, mmio0' in hcd.log_text
