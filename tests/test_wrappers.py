"""Wrappers: what any device can be run under, from the configuration and from the command line."""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faulty_devices import AsyncShout, LaterShout, Shout

from hcd import config, wrappers
from hcd.config import ConfigProblems
from hcd.demo.hcd_process import HcdProcess
from hcd.device import Device
from hcd.frontend.blk import BlockDriver
from hcd.frontend.client import Frontend
from hcd.frontend.errors import RequestFailed
from hcd.testing import Exchange, ServedDevice, check_device, serve
from hcd.wrappers import RequestStack
from hcd.wrappers.registry import WRAPPERS

KINDS = pytest.mark.parametrize("kind", [Shout, AsyncShout, LaterShout])
READ = struct.pack("<IIQ", 0, 0, 16)


def wrapped(served: ServedDevice, *texts: str) -> ServedDevice:
    """``served`` under wrappers as the command line writes them."""
    host = served.host
    host.spec = replace(host.spec, wrap=tuple(map(wrappers.parse_text, texts)))
    host.wrapping = RequestStack(host.spec.wrap, host.device, host.lane, host.log)
    return served


@KINDS
def test_log_tells_of_each_request_and_its_end(kind: type[Device], caplog: pytest.LogCaptureFixture) -> None:
    """On both lanes; sizes, not payload."""
    caplog.set_level(logging.INFO, "hcd")
    with serve(kind) as served, wrapped(served, "log").driver() as driver:
        assert driver.ask(b"secret", 64) == b"SECRET"
        assert driver.ask(b"again", 8) == b"AGAIN"
        driver.stop_queue(0)
    lines = [record.getMessage() for record in caplog.records if "#" in record.getMessage()]
    assert lines[0] == "queue 0 #1: 6 bytes, room for 64"
    assert lines[1].startswith("queue 0 #1: shout ok, wrote 6, ")
    assert lines[2] == "queue 0 #2: 5 bytes, room for 8"
    assert lines[3].startswith("queue 0 #2: shout ok, wrote 5, ")
    assert "secret" not in caplog.text


def test_log_decodes_what_the_device_can_decode(caplog: pytest.LogCaptureFixture) -> None:
    """Also what a guest made up."""
    caplog.set_level(logging.INFO, "hcd")
    with serve("blk", {"ram": "1M"}) as served, wrapped(served, "log").driver() as driver:
        driver.ask(READ, 513)
        driver.ask(struct.pack("<IIQ", 77, 0, 0), 1)
        driver.ask(b"x", 1)
        driver.stop_queue(0)
    assert "#1: read sector 16, 512 bytes" in caplog.text
    assert "#2: type 77" in caplog.text
    assert "#3: 1 bytes, room for 1 (GuestError: " in caplog.text
    assert "#3: read error" in caplog.text


@KINDS
@pytest.mark.parametrize("packed", [False, True])
def test_error_follows_its_pattern(kind: type[Device], packed: bool) -> None:
    """The device never sees what fails; the others are served."""
    with serve(kind) as served, wrapped(served, "error:pattern=.x.").driver(packed=packed) as driver:
        answers = [driver.ask(b"a", 8) for _ in range(6)]
        assert answers == [b"A", b"", b"A"] * 2
        assert served.metrics().total("hcd_requests_total", status="error") == 2
        assert served.host.stats.handler_errors == 0


def test_error_fails_with_the_status_of_the_device() -> None:
    """A disk says IOERR, or whatever was asked for, in the byte where it belongs."""
    with serve("blk", {"ram": "1M"}) as served:
        with wrapped(served, "error:probability=1").driver() as driver, pytest.raises(RequestFailed) as caught:
            BlockDriver(driver.memory, driver.queues[0]).read(0, 512)
        assert caught.value.status == 1
        served.wait_disconnected()
        with wrapped(served, "error:probability=1,status=2").driver() as driver, pytest.raises(RequestFailed) as caught:
            BlockDriver(driver.memory, driver.queues[0]).read(0, 512)
        assert caught.value.status == 2


@KINDS
def test_delayed_requests_come_late_and_the_queue_waits_for_them_when_it_stops(kind: type[Device]) -> None:
    """They are in flight meanwhile; others overtake them."""
    with serve(kind) as served, wrapped(served, "error:pattern=d..,delay-ms=50").driver() as driver:
        queue = driver.queues[0]
        began = time.monotonic()
        rooms = [driver.make_room(8) for _ in range(3)]
        tokens = [queue.submit(driver.place(b"a"), room) for room in rooms]
        order: list[int] = []
        while len(order) < 3:
            order += [used.token for used in queue.wait()]
        assert time.monotonic() - began >= 0.05
        assert order[-1] in tokens
        if kind is not LaterShout:
            assert order[-1] == tokens[0]
        queue.submit(driver.place(b"b"), rooms[0])
        while not served.metrics().total("hcd_requests_inflight"):
            time.sleep(0.001)
        assert driver.stop_queue(0) == 4
        assert len(queue.used()) == 1


def test_probabilities_are_kept_and_a_seed_repeats_them() -> None:
    """One in four or so."""

    def failures(seed: int) -> list[bool]:
        with serve(Shout) as served, wrapped(served, f"error:probability=0.25,seed={seed}").driver() as driver:
            return [driver.ask(b"a", 8) == b"" for _ in range(200)]

    first = failures(1)
    assert 20 < sum(first) < 90
    assert first == failures(1)
    assert first != failures(2)


def test_the_outer_wrapper_sees_what_the_inner_one_does(caplog: pytest.LogCaptureFixture) -> None:
    """In the other order the log does not hear of requests that fail before it."""
    caplog.set_level(logging.INFO, "hcd")
    with serve(Shout) as served:
        with wrapped(served, "log", "error:probability=1").driver() as driver:
            driver.ask(b"a", 8)
            driver.stop_queue(0)
        assert "#1: shout error, wrote 0" in caplog.text
        served.wait_disconnected()
        caplog.clear()
        with wrapped(served, "error:probability=1", "log").driver() as driver:
            driver.ask(b"a", 8)
            driver.stop_queue(0)
        assert "#1" not in caplog.text


@pytest.mark.parametrize("wrap", [["log"], ["log", "error:delay-probability=0.2,delay-ms=1"]])
@pytest.mark.parametrize("kind", [Shout, AsyncShout])
def test_a_wrapped_device_keeps_the_contract(
    kind: type[Shout], wrap: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole conformance run, in every kind of ring."""
    specs = tuple(map(wrappers.parse_text, wrap))
    monkeypatch.setattr("hcd.testing.serving.DeviceSpec", lambda **fields: config.DeviceSpec(**fields, wrap=specs))
    check_device(kind, exchanges=[Exchange(b"hello", 64, b"HELLO")])


def test_a_network_card_can_be_wrapped(caplog: pytest.LogCaptureFixture) -> None:
    """Its frames are moved by compiled code, which takes requests the same way."""
    caplog.set_level(logging.INFO, "hcd")
    with serve("net") as served, wrapped(served, "log", "error:pattern=.x,queue=1").driver() as driver:
        for _ in range(4):
            driver.ask(bytes(72), queue=1)
        driver.stop_queue(1)
    assert sum("tx error" in record.getMessage() for record in caplog.records) == 2
    assert sum("tx ok" in record.getMessage() for record in caplog.records) == 2


# -- how they are written


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("log", 'expected a list such as \\["log"\\], found "log"'),
        ([1], "expected a wrapper's name"),
        (["lgo"], 'no wrapper "lgo"; expected error, log; did you mean "log"'),
        ([{"log": {}, "error": {}}], "expected a wrapper's name"),
        ([{"log": {"level": 3}}], '"level" is not an option of wrapper "log"; it has none'),
        (["error"], "nothing would ever happen"),
        ([{"error": {"probability": 2}}], "error probability: expected a number from 0 to 1, found 2"),
        ([{"error": {"probability": 0.5, "pattern": "x"}}], "not both"),
        ([{"error": {"pattern": "..y"}}], 'expected a pattern of "."'),
        ([{"error": {"probabilty": 0.5}}], 'did you mean "probability"'),
    ],
)
def test_what_is_wrong_is_said(value: object, expected: str) -> None:
    """As for every other part of a configuration."""
    with pytest.raises(ValueError, match=expected):
        wrappers.parse(value)


def document(kind: str, wrap: object) -> Mapping[str, Any]:
    return {"device": [{"name": "d", "type": kind, "socket": "/run/d", "wrap": wrap}]}


def test_a_configuration_names_them() -> None:
    """A list; the first one is the outermost."""
    (spec,) = config.parse(document("rng", ["log", {"error": {"pattern": "x"}}]), "f").devices
    assert [one.wrapper for one in spec.wrap] == [WRAPPERS[Device]["log"], WRAPPERS[Device]["error"]]
    assert spec.wrap[1].options["delay_ms"] == 100
    with pytest.raises(ConfigProblems, match='"d" wrap: no wrapper "lgo"'):
        config.parse(document("rng", ["lgo"]), "f")


def test_a_daemon_runs_wrapped_devices(start_hcd: Callable[..., HcdProcess], short_dir: Path) -> None:
    """From the configuration file to the line in the log."""
    hcd = start_hcd(
        '[[device]]\nname = "disk"\ntype = "blk"\nsocket = "{dir}/s"\n'
        'wrap = ["log", { error = { pattern = ".x" } }]\n[device.options]\nram = "1M"\n'
    )
    with Frontend.open(short_dir / "s") as front:
        disk = BlockDriver(front.memory, front.queues[0])
        disk.read(8, 512)
        with pytest.raises(RequestFailed):
            disk.read(8, 512)
    assert "disk: queue 0 #1: read sector 8, 512 bytes" in hcd.log_text
    assert "disk: queue 0 #2: read error, wrote 1" in hcd.log_text
