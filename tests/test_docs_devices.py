"""docs/devices.md: its code runs, and its tables and diagrams are those of the code.

Its commands are run in order, in a clean environment, by test_wheels.py.
"""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

import hcd.device
from hcd import scaffold
from hcd.device import Device, DeviceBase, DoorbellDevice
from hcd.testing import Exchange, check_device, conformance, ring_rules, rules, serve
from hcd.wrappers.registry import WRAPPERS

pytestmark = pytest.mark.long


PAGE = (Path(__file__).parent.parent / "docs" / "devices.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def load(source: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A snippet as a module."""
    module = types.ModuleType("snippet")
    monkeypatch.setitem(sys.modules, "snippet", module)
    exec(compile(source, "docs/devices.md", "exec"), module.__dict__)
    return module


def devices_of(module: types.ModuleType) -> list[type[Device]]:
    found = (value for value in vars(module).values() if isinstance(value, type) and issubclass(value, DeviceBase))
    return [cls for cls in found if cls.__module__ == "snippet"]


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_code_of_the_page_runs(index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tests pass, and every device in it keeps the contract."""
    module = load(SNIPPETS[index], monkeypatch)
    devices = devices_of(module)
    assert devices
    for cls in devices:
        check_device(cls)
    for name, value in vars(module).items():
        if name.startswith("test_"):
            value()


def snippet(name: str, monkeypatch: pytest.MonkeyPatch) -> type[Device]:
    (source,) = (text for text in SNIPPETS if f"class {name}(" in text)
    (cls,) = devices_of(load(source, monkeypatch))
    return cls


def test_timers_answer_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the section on requests says."""
    slow = snippet("Slow", monkeypatch)
    check_device(slow, exchanges=[Exchange(b"\0\0abc", 8, b"cba"), Exchange(b"\2\0abcd", 8, b"dcba")])
    with serve(slow) as served, served.driver() as driver:
        assert driver.ask(b"\xff\xffabc", 8) == b""
        assert served.metrics().total("hcd_guest_errors_total") == 1
        driver.ask(b"\1\0abc", 8)
        assert served.metrics().total("hcd_requests_total", op="wait", status="ok") == 1


def test_watched_files_call_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the section on timers and files says."""
    import os

    with serve(snippet("Pipe", monkeypatch)) as served, served.driver() as driver:
        room = driver.make_room(16)
        driver.queues[0].submit([], room)
        served.run(lambda: None)  # the queue runs
        os.write(served.device.sink, b"a line\n")  # type: ignore[attr-defined]
        ((_, written),) = driver.queues[0].wait()
        assert driver.gather(room)[:written] == b"a line\n"


def test_async_handlers_and_configuration_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """As their sections say."""
    check_device(snippet("Patient", monkeypatch), exchanges=[Exchange(b"abc", 8, b"ABC")])
    with serve(snippet("Volume", monkeypatch)) as served, served.driver() as driver:
        driver.write_config(0, b"\7\0")
        assert driver.config(0, 4) == b"\7\0\13\0"


def test_the_first_device_is_the_one_that_new_device_writes() -> None:
    """In thirty lines at most."""
    assert scaffold.files("mydev")["src/hcd_mydev/__init__.py"] == SNIPPETS[0]
    assert len(SNIPPETS[0].splitlines()) <= 30


def test_the_lifecycle_is_the_one_of_the_code() -> None:
    """The diagram stands in hcd.device too."""
    assert hcd.device.__doc__ is not None
    diagram = re.search(r"^```\n(__init__.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert diagram is not None
    assert [line.strip() for line in diagram[1].splitlines()] == [
        line.strip() for line in hcd.device.__doc__.partition("runs::\n\n")[2].partition("\n\n")[0].splitlines()
    ]


def test_every_rule_is_explained() -> None:
    """And no other."""
    section = PAGE.partition("## Testing")[2].partition("\n## ")[0]
    explained = set(re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE))
    others = {"declaration", "life", "leaks", "blocking", "answer"}
    assert explained == {*rules.RULES, *others, *(rule for _, rule in conformance.RULE_BY_TEXT)} - {"memory"}


def test_every_rule_for_doorbell_devices_is_explained() -> None:
    section = PAGE.partition("## Doorbell devices")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", section, re.MULTILINE)) == {*ring_rules.RULES, "memory"}


@pytest.mark.parametrize("kind", [Device, DoorbellDevice])
def test_every_option_of_the_wrappers_is_named(kind: type[DeviceBase]) -> None:
    section = PAGE.partition("## Wrappers")[2].partition("\n## ")[0]
    for name, wrapper in WRAPPERS[kind].items():
        assert f"`{name}`" in section
        assert [one.name for one in wrapper.options if not re.search(rf"`{one.name}\b", section)] == []


def test_the_api_version_is_the_one_of_the_code() -> None:
    assert f"`hcd.device.API_VERSION` is {hcd.device.API_VERSION}." in PAGE
