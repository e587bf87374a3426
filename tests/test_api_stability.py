"""Devices written for device API 1 go on working: they are kept as they were written, and so is what they call.

``plugins_api1`` holds whole plug-ins, and in ``signatures.txt`` each public name of ``hcd.device`` with its parameters.
Both only grow while API_VERSION is 1: whoever has to change a line there breaks plug-ins of other people, and has to
raise API_VERSION instead.
"""

from __future__ import annotations

import enum
import hashlib
import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pytest

import hcd.device
from hcd import plugins
from hcd.demo.hcd_process import HcdProcess
from hcd.device import Bell, Counter, Gauge, Histogram, Request, Virtqueue
from hcd.testing import Exchange, Ring, check_device, serve
from hcd.testing.vmm import Vmm

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
FROZEN = Path(__file__).parent / "plugins_api1"
#: the files as they were written
DIGESTS = {
    "vending.py": "58acf82563b1917ba909e856153b64728283e64c58d2d58016151437a985ba7e",
    "slow_vending.py": "d5ee114b3b3865f08ef9d68c50660567da55695df587358023d7a46117cc4d37",
    "lighthouse.py": "26b1225efe5f15503b2bbe137d28dda322f844eb1a40ccd7ad793b4701c74471",
}
TYPES = {
    "vending": "hcd_vending:Vending",
    "slow-vending": "hcd_slow_vending:SlowVending",
    "lighthouse": "hcd_lighthouse:Lighthouse",
}
#: attributes of a device that are hcd's
FOR_HCD = ("instruments", "lines", "change")
#: classes that only hcd makes
NOT_MADE = (Counter, Gauge, Histogram)
#: what compiled classes have for devices
FOR_DEVICES: dict[object, tuple[str, ...]] = {
    Request: tuple(key for key in dir(Request) if not key.startswith("_")),
    Virtqueue: (
        "index", "size", "features", "running", "inflight", "broken", "pop", "pop_many", "complete_many", "flush",
        "passive", "schedule", "enable_kicks", "available", "unpop", "resumed", "stats", "__iter__", "__next__",
    ),
    Bell: ("name",),
}


@pytest.fixture
def site(make_distribution: Callable[..., Path]) -> Path:
    """The plug-ins, installed."""
    modules = {f"hcd_{Path(name).stem}": (FROZEN / name).read_text(encoding="utf-8") for name in DIGESTS}
    return make_distribution("hcd-vending", "1.0", TYPES, modules)


def test_the_plug_ins_are_as_they_were_written() -> None:
    """What is adapted to a new hcd shows nothing."""
    found = {name: hashlib.sha256((FROZEN / name).read_bytes()).hexdigest() for name in DIGESTS}
    assert found == DIGESTS


def parameters(function: Callable[..., object]) -> str:
    return ", ".join(
        ("*" if one.kind is one.VAR_POSITIONAL else "**" if one.kind is one.VAR_KEYWORD else "")
        + name + ("=" if one.default is not one.empty else "")
        for name, one in inspect.signature(function).parameters.items()
    )


def public(name: str, cls: type) -> Iterator[str]:
    """A line for each public name in ``cls``."""
    yield name if issubclass(cls, Protocol) or cls in NOT_MADE else f"{name}({parameters(cls)})"  # type: ignore[arg-type]
    for key, member in inspect.getmembers(cls):
        if not key.startswith("_"):
            plain = inspect.isfunction(member) or inspect.ismethod(member)
            yield f"{name}.{key}({parameters(member)})" if plain else f"{name}.{key}"


def signatures() -> list[str]:
    """Of everything that hcd.device has for plug-ins. Compiled classes have no parameters that Python could see; of
    queues and doorbells only a part is for devices."""
    lines = ["API_VERSION"]
    for name in hcd.device.__all__:
        value = getattr(hcd.device, name)
        if value in FOR_DEVICES:
            lines += [f"{name}.{key}" for key in FOR_DEVICES[value] if hasattr(value, key)]
        elif not isinstance(value, type):
            lines.append(name)
        elif issubclass(value, enum.Enum):
            lines += [f"{name}.{member.name}" for member in value]
        elif issubclass(value, BaseException):
            lines.append(name)
        else:
            lines += public(name, value)
    for cls in (hcd.device.Device, hcd.device.DoorbellDevice):
        lines += [f"{cls.__name__}().{key}" for key in vars(cls("d", {})) if key not in FOR_HCD]
    return sorted(set(lines))


def test_nothing_that_a_plug_in_may_call_has_gone_or_changed() -> None:
    """Names may come; parameters may come where they have defaults, and then their line is changed here by hand."""
    kept = (FROZEN / "signatures.txt").read_text(encoding="utf-8").splitlines()
    assert kept
    assert [line for line in kept if line not in signatures()] == []
    assert hcd.device.API_VERSION == 1


def test_they_type_check_as_they_did() -> None:
    """Under mypy's strict rules, in a package of somebody else."""
    environment = os.environ | {"MYPYPATH": f"{ROOT}:{ROOT}/protocols"}
    files = [str(FROZEN / name) for name in DIGESTS]
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir=/dev/null", "--config-file=", *files]
    done = subprocess.run(command, cwd=FROZEN, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.usefixtures("site")
@pytest.mark.parametrize("name", TYPES)
def test_they_load_by_their_names(name: str) -> None:
    assert plugins.load(name).api_version == 1


@pytest.mark.usefixtures("site")
def test_they_keep_the_contract() -> None:
    """The whole conformance run of today."""
    orders = [Exchange(b"\0\0tea", 8, b"TEA"), Exchange(b"\2\0milk", 8, b"MILK"), Exchange(b"\xe8\3ink", 8, b"INK")]
    check_device("vending", {"greeting": "hello"}, exchanges=orders)
    check_device("slow-vending", exchanges=[Exchange(b"tea", 8, b"TEA")])
    check_device("lighthouse", exchanges=[Ring("ship", "light", count=2)])


@pytest.mark.usefixtures("site")
def test_all_that_they_use_works() -> None:
    """Options, news through a watched pipe, a price that the driver changes, metrics, errors."""
    with serve("vending", {"price": 4, "greeting": "hello"}, name="v") as served, served.driver() as driver:
        assert driver.ask(room=64, queue=1) == b"hello"
        os.write(served.device.sink, b"closing soon")  # type: ignore[attr-defined]
        assert driver.ask(room=64, queue=1) == b"closing soon"
        assert driver.config(0, 4) == b"\4\0\1\0"
        driver.write_config(0, b"\5\0")
        assert driver.config(0, 4) == b"\5\0\1\0"
        assert [driver.ask(order, 8) for order in (b"\0\0tea", b"\1\0tea", b"\xe8\3tea")] == [b"TEA"] * 3
        assert driver.ask(b"\xff\xfftea", 8) == b""
        metrics = served.metrics()
        assert metrics.total("hcd_device_vending_sales_total", device="v", how="later") == 2
        assert metrics.total("hcd_device_vending_stock_bytes") == (1 << 20) - 9
        assert metrics.total("hcd_device_vending_size_bytes_count") == 3
        assert metrics.total("hcd_guest_errors_total") == 1
        assert metrics.total("hcd_requests_total", op="thread", status="ok") == 1


def test_they_run_in_a_daemon(
    site: Path, start_hcd: Callable[..., HcdProcess], short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The doorbell device too; its doorbells come and go with the VMM."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")])))
    hcd = start_hcd(
        '[[device]]\nname = "house"\ntype = "lighthouse"\nsocket = "{dir}/house"\n[device.options]\nport = 0x600\n'
        '[[device]]\nname = "v"\ntype = "vending"\nsocket = "{dir}/v"\nwrap = ["log"]\n'
    )
    with Vmm(str(short_dir / "house")) as vmm:
        vmm.ring("ship", 3)
        vmm.wait_interrupt("light")
        with vmm.map_memory() as memory:
            assert memory[:8] == (3).to_bytes(8, "little")
    assert hcd.metrics().total("hcd_device_lighthouse_ships_total", device="house") == 3
