"""Wrappers and traces of doorbell devices with a real guest: a daemon, and a virtual machine that KVM runs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import skip_or_fail

from hcd.demo.hcd_process import HcdProcess
from hcd.kvm.attach import Attachment
from hcd.kvm.vm import Kvm
from hcd.lab import code
from hcd.lab.machine import Machine, Ring

pytestmark = pytest.mark.usefixtures("no_leaks")

Start = Callable[..., HcdProcess]

PORT, ADDRESS, VALUE = 0x510, 0xD0000000, 7
BELLS = f"""
[[device]]
name = "bells"
type = "echo"
socket = "{{dir}}/bells.sock"
wrap = [WRAP]
[device.options]
ports = "{PORT:#x}/4={VALUE}"
gpas = "{ADDRESS:#x}"
"""
BY_PORT = Ring(code.write_port(PORT, VALUE, 4))
BY_ADDRESS = Ring(code.write_memory(ADDRESS, VALUE, 4))


@pytest.fixture
def machine() -> Iterator[Machine]:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        skip_or_fail("no usable /dev/kvm")
    with Kvm() as kvm, Machine(kvm) as made:
        yield made


@pytest.fixture
def start(start_hcd: Start, short_dir: Path) -> Callable[[str], HcdProcess]:
    def begin(wrap: str) -> HcdProcess:
        return start_hcd(BELLS.replace("WRAP", wrap), daemon=f'[control]\npath = "{short_dir}/control"')

    return begin


def attach(machine: Machine, directory: Path) -> Attachment:
    made = Attachment(machine.vm, str(directory / "bells.sock"), route_of=lambda _: machine.route)
    made.connect()
    return made


def rings(hcd: HcdProcess, doorbell: str) -> float:
    return hcd.metrics().total("hcd_doorbell_rings_total", device="bells", queue=doorbell)


def test_every_ring_of_a_guest_is_logged(
    machine: Machine, start: Callable[[str], HcdProcess], short_dir: Path
) -> None:
    """Each trip is a ring, an interrupt and an end, in this order and with the value that rang."""
    hcd = start('"log"')
    with attach(machine, short_dir):
        result = machine.run_trips(BY_PORT, 50, 60)
        assert (result.why, len(result.ticks)) == ("", 50)
    while " disconnected" not in hcd.log_text:  # the log comes through a pipe
        time.sleep(0.01)
    text = hcd.log_text
    for number in range(1, 51):
        began = text.index(f"bells: doorbell pio0 #{number}: 1 ring, value {VALUE:#x}\n")
        answered = text.index("bells: interrupt pio0: sent, answers doorbell pio0\n", began)
        assert text.index(f"bells: doorbell pio0 #{number}: handled, ", began) > answered
    assert text.count("interrupt pio0: sent") == 50


def test_a_guest_waits_for_an_answer_that_is_lost_or_late(
    machine: Machine, start: Callable[[str], HcdProcess], short_dir: Path
) -> None:
    """What is lost was rung, and only the doorbell that was named suffers."""
    hcd = start('{ error = { pattern = "d..x", delay-ms = 100, doorbell = "pio0" } }')
    with attach(machine, short_dir):
        began = time.monotonic()
        result = machine.run_trips(BY_PORT, 3, 60)
        assert time.monotonic() - began >= 0.1
        assert (result.why, len(result.ticks)) == ("", 3)
        assert "does not return" in machine.run_trips(BY_PORT, 1, 0.5).why
        result = machine.run_trips(BY_ADDRESS, 20, 60)
        assert (result.why, len(result.ticks)) == ("", 20)
        assert (rings(hcd, "pio0"), rings(hcd, "mmio0")) == (4, 20)
    assert hcd.metrics().total("hcd_handler_errors_total", device="bells") == 0


def test_a_trace_shows_a_vmm_from_its_first_message_to_its_last(
    machine: Machine, start: Callable[[str], HcdProcess], short_dir: Path
) -> None:
    """And every ring of its guest in between."""
    start("")
    command = [sys.executable, "-m", "hcd", "trace", "bells", "--control", str(short_dir / "control")]
    with (
        subprocess.Popen([*command, "--json"], stdout=subprocess.PIPE, text=True) as tracing,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as shown,
    ):
        assert tracing.stdout is not None
        assert shown.stdout is not None
        assert json.loads(tracing.stdout.readline())["what"] == "tracing"
        assert shown.stdout.readline().endswith(" tracing bells, no VMM is connected\n")
        with attach(machine, short_dir) as attachment:
            assert machine.run_trips(BY_PORT, 10, 60).why == ""
            assert attachment.device == "bells"
        seen: list[dict[str, Any]] = []
        while not seen or seen[-1]["what"] != "disconnected":
            seen.append(json.loads(tracing.stdout.readline()))
        lines = [shown.stdout.readline().split(" ", 1)[1].rstrip("\n") for _ in seen]
        for process in (tracing, shown):
            process.send_signal(signal.SIGINT)
    assert (seen[0]["what"], seen[0]["pid"], seen[0]["transport"]) == ("connected", os.getpid(), "kvm")
    texts = [(event["direction"], event["text"]) for event in seen if event["what"] == "message"]
    assert texts[0][0] == "in"
    assert texts[0][1].startswith('HELLO "hcd-kvm" versions=1-1 capabilities=0x')
    assert "(PIO|MMIO|" in texts[0][1]
    assert ("out", 'WELCOME "bells" version=1 doorbells=2 interrupts=2 memory=0') in texts
    assert ("out", "INTERRUPTS [1 pio0, 2 mmio0] fds=2") in texts
    assert ("out", f"DOORBELLS [1 pio0 pio {PORT:#x}/4={VALUE:#x}, 2 mmio0 mmio {ADDRESS:#x}/4] fds=2") in texts
    assert ("in", "STATUS [1 ok, 2 ok]") in texts
    events = [event for event in seen if event["what"] in ("rung", "interrupt", "handled")]
    assert [event["what"] for event in events] == ["rung", "interrupt", "handled"] * 10
    assert [event["number"] for event in events if event["what"] == "rung"] == list(range(1, 11))
    assert {event["text"] for event in events if event["what"] == "rung"} == {f"1 ring, value {VALUE:#x}"}
    assert {(event["interrupt"], event["answers"]) for event in events[1::3]} == {("pio0", "pio0")}
    assert f"doorbell pio0 #3: 1 ring, value {VALUE:#x}" in lines
    assert lines.count("interrupt pio0: sent, answers doorbell pio0") == 10
    assert any(line.startswith("doorbell pio0 #10: handled, ") for line in lines)
    assert lines[0] == f"VMM connected (pid {os.getpid()} {Path('/proc/self/comm').read_text().strip()})"
    assert '<- WELCOME "bells" version=1 doorbells=2 interrupts=2 memory=0' in lines
