"""The configuration file and the values of options: what is understood, and what every mistake is called."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcd import config, options
from hcd.config import Address, ConfigProblems, DaemonConfig
from hcd.device import Device, Option
from hcd.doorbell import Path as BellPath
from hcd.errors import ConfigError, PluginError

OPTIONS = (
    Option("blk-file", "path", "the image"),
    Option("serial", "str", "", default="hcd"),
    Option("mode", "str", "", default="fast", choices=("fast", "safe")),
    Option("num-queues", "int", "", default=1, minimum=1, maximum=8),
    Option("read-only", "bool", "", default=False),
    Option("ram", "size", "", minimum=512),
    Option("tap-fd", "fd", ""),
    Option("period", "float", "", minimum=0, maximum=10),
    Option("port", "list", "", default=("pty",)),
)


class Disk(Device):
    options = OPTIONS

    def process(self, queue: Any) -> None:
        pass


def find_type(name: str) -> type[Device]:
    if name == "broken":
        raise PluginError('device type "broken" of lampworks 3.1: cannot be imported')
    if name != "disk":
        raise ConfigError(f'no device type "{name}"')
    return Disk


def load(tmp_path: Path, text: str) -> DaemonConfig:
    file = tmp_path / "hcd.toml"
    file.write_text(text)
    return config.load(str(file), find_type)


def problems(tmp_path: Path, text: str) -> list[str]:
    """The problems of a configuration, without the file's name in front."""
    with pytest.raises(ConfigProblems) as caught:
        load(tmp_path, text)
    prefix = f"{tmp_path / 'hcd.toml'}: "
    assert all(line.startswith(prefix) for line in caught.value.problems)
    assert str(caught.value).splitlines() == list(caught.value.problems)
    return [line.removeprefix(prefix) for line in caught.value.problems]


def device(extra: str = "", opts: str = "") -> str:
    text = f'[[device]]\nname = "d0"\ntype = "disk"\nsocket = "/run/d0.sock"\n{extra}\n'
    return text + (f"[device.options]\n{opts}\n" if opts else "")


def test_a_full_configuration_is_read(tmp_path: Path) -> None:
    read = load(
        tmp_path,
        '[daemon]\nmetrics = "127.0.0.1:9847"\npoll_us = 0\ndrain_timeout = 2\n'
        + device('path = "pio"\nbus = "pci"\nqmp = "unix:/run/qmp"', 'blk-file = "/x"\nram = "64M"'),
    )
    assert read.metrics == Address("127.0.0.1", 9847)
    assert (read.poll_us, read.drain_timeout) == (0, 2.0)
    (spec,) = read.devices
    assert (spec.name, spec.type, spec.socket) == ("d0", "disk", "/run/d0.sock")
    assert (spec.path, spec.bus, spec.qmp) == (BellPath.PIO, "pci", "/run/qmp")
    assert spec.options["blk_file"] == "/x"
    assert spec.options["ram"] == 64 << 20


def test_what_is_not_given_has_its_default(tmp_path: Path) -> None:
    read = load(tmp_path, device('path = "auto"'))
    assert (read.metrics, read.poll_us, read.drain_timeout) == (None, 32, 5.0)
    (spec,) = read.devices
    assert (spec.path, spec.bus, spec.qmp) == (None, None, None)
    assert spec.options == {option.key: option.default for option in OPTIONS}


def test_a_configuration_cannot_be_changed(tmp_path: Path) -> None:
    read = load(tmp_path, device())
    with pytest.raises(dataclasses.FrozenInstanceError):
        read.devices[0].name = "other"  # type: ignore[misc]


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        '[daemon]\npoll_us = -1\nmetrics = "9847"\n'
        + device('path = "isa"', "num-queues = 9\nmode = 3")
        + '[[device]]\nname = "d1"\n',
    )
    assert len(found) == 7
    for expected in ("poll_us", "metrics", "path", "options.num-queues", "options.mode", "type", "socket"):
        assert any(expected in line.partition(": ")[0] for line in found), expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x =", "is not valid TOML"),
        ('a = "\x00"', "is not valid TOML"),
        ("", "[[device]]: is missing; expected at least one device"),
        ("device = 3", "[[device]]: expected tables"),
        ("device = [3]", "[[device]]: expected tables"),
        ('[device]\nname = "x"', "expected tables, each headed [[device]]"),
        ("daemon = 3\n" + device(), "[daemon]: expected a table, found 3"),
        ("[deamon]\n" + device(), 'deamon: is not a known key; expected daemon, control, device; did'),
        ("[daemon]\npoll-us = 3\n" + device(), '[daemon] poll-us: is not a known key;'),
        ('[daemon]\npoll_us = "3"\n' + device(), 'expected an integer from 0 to 1000000, found "3"'),
        ("[daemon]\npoll_us = true\n" + device(), "found true"),
        ("[daemon]\npoll_us = 1.5\n" + device(), "found 1.5"),
        ("[daemon]\ndrain_timeout = nan\n" + device(), "[daemon] drain_timeout: expected a number"),
        ("[daemon]\ndrain_timeout = -1\n" + device(), "[daemon] drain_timeout: expected a number"),
        ("[daemon]\nmetrics = 9847\n" + device(), "[daemon] metrics: expected a string, found 9847"),
        ('[daemon]\nmetrics = ":9847"\n' + device(), "[daemon] metrics: expected \"HOST:PORT\""),
        ('[daemon]\nmetrics = "h:65536"\n' + device(), "[daemon] metrics: expected \"HOST:PORT\""),
        ('[daemon]\nmetrics = "unix:"\n' + device(), "[daemon] metrics: expected the path of a unix socket"),
        ('[daemon]\nmetrics = "::1:9847"\n' + device(), "[daemon] metrics: expected \"HOST:PORT\""),
        ('[[device]]\ntype = "disk"\nsocket = "/x"', "[[device]] number 1 name: is missing"),
        ('[[device]]\nname = ""\ntype = "disk"\nsocket = "/x"', "number 1 name: expected letters"),
        ('[[device]]\nname = "a b"\ntype = "disk"\nsocket = "/x"', 'name: expected letters'),
        ('[[device]]\nname = "a"\nsocket = "/x"', '[[device]] "a" type: is missing'),
        ('[[device]]\nname = "a"\ntype = "dusk"\nsocket = "/x"', '"a" type: no device type "dusk"'),
        ('[[device]]\nname = "a"\ntype = "broken"\nsocket = "/x"', "type \"broken\" of lampworks 3.1"),
        ('[[device]]\nname = "a"\ntype = "disk"', '[[device]] "a" socket: is missing'),
        ('[[device]]\nname = "a"\ntype = "disk"\nsocket = 3', '"a" socket: expected a string, found 3'),
        (f'[[device]]\nname = "a"\ntype = "disk"\nsocket = "/{"x" * 107}"', "at most 107 bytes"),
        (device('path = "page"'), 'path: expected "auto" or one of pio, mmio, hypercall, direct'),
        (device('bus = "isa"'), "bus: expected one of pci, mmio, ccw"),
        (device('qmp = "unix:"'), "qmp: expected the path of a unix socket"),
        (device('sokcet = "/y"'), 'sokcet: is not a known key; expected name, type, socket'),
        (device('sokcet = "/y"'), 'did you mean "socket"?'),
        (device("options = 3"), 'options: expected a table, found 3'),
        (device("", "num_queue = 1"), 'options.num_queue: is not an option of type "disk"'),
        (device("", "num_queue = 1"), 'did you mean "num-queues"?'),
        (device("", "num-queues = 1\nnum_queues = 2"), "options.num_queues: is given twice"),
        (device() + device().replace("/run/d0", "/run/d1"), '"d0" name: is used by an earlier device'),
        (device() + device().replace('"d0"', '"d1"'), '"d1" socket: is used by [[device]] "d0"'),
        (device() + device().replace('"d0"', '"d1"').replace("/run", "/run/../run"), "socket: is used by"),
        ('[daemon]\nmetrics = "unix:/run/d0.sock"\n' + device(), "socket: is used by [daemon] metrics too"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place_and_what_was_expected(tmp_path: Path, text: str, expected: str) -> None:
    assert any(expected in line for line in problems(tmp_path, text)), problems(tmp_path, text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigProblems, match=r"nope\.toml: cannot be read: No such file or directory"):
        config.load(str(tmp_path / "nope.toml"), find_type)
    with pytest.raises(ConfigProblems, match="cannot be read: Is a directory"):
        config.load(str(tmp_path), find_type)
    (tmp_path / "latin.toml").write_bytes(b'x = "\xff"')
    with pytest.raises(ConfigProblems, match="is not valid TOML"):
        config.load(str(tmp_path / "latin.toml"), find_type)
    (tmp_path / "deep.toml").write_text("x = " + "[" * 100_000)
    with pytest.raises(ConfigProblems, match="is nested too deeply"):
        config.load(str(tmp_path / "deep.toml"), find_type)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:9847", Address("127.0.0.1", 9847)),
        ("localhost:0", Address("localhost", 0)),
        ("[::1]:9847", Address("::1", 9847)),
        ("[fe80::1%eth0]:1", Address("fe80::1%eth0", 1)),
        ("unix:/run/hcd/metrics.sock", Address(path="/run/hcd/metrics.sock")),
    ],
)
def test_an_address_is_understood_and_shown_as_it_was_written(text: str, address: Address) -> None:
    assert config.parse_address(text) == address
    assert str(address) == text


BY_NAME = {option.name: option for option in OPTIONS}


@pytest.mark.parametrize(
    ("name", "toml", "text", "value"),
    [
        ("blk-file", "/x", "/x", "/x"),
        ("serial", "", "", ""),
        ("mode", "safe", "safe", "safe"),
        ("num-queues", 8, "8", 8),
        ("num-queues", 8, "0x8", 8),
        ("read-only", True, "on", True),
        ("read-only", True, "true", True),
        ("read-only", False, "no", False),
        ("ram", 4096, "4096", 4096),
        ("ram", "64M", "64M", 64 << 20),
        ("ram", "1g", "1g", 1 << 30),
        ("ram", "2T", "2T", 2 << 40),
        ("tap-fd", 7, "7", 7),
        ("period", 3, "3", 3.0),
        ("period", 0.25, "0.25", 0.25),
        ("port", "a,b", "a,b", ("a,b",)),
    ],
)
def test_a_value_means_the_same_in_the_file_and_on_the_command_line(
    name: str, toml: object, text: str, value: object
) -> None:
    for read in (options.from_toml(BY_NAME[name], toml), options.from_text(BY_NAME[name], text)):
        assert read == value
        assert type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("blk-file", "", "expected a path"),
        ("blk-file", 3, "expected a path, found 3"),
        ("serial", True, "expected a string, found true"),
        ("serial", "a\0b", "expected a string"),
        ("mode", "slow", 'expected one of fast, safe, found "slow"'),
        ("num-queues", 0, "expected an integer from 1 to 8, found 0"),
        ("num-queues", 9, "found 9"),
        ("num-queues", "1", 'found "1"'),
        ("num-queues", True, "found true"),
        ("num-queues", 1.0, "found 1.0"),
        ("read-only", 1, "expected true or false, found 1"),
        ("read-only", "on", "expected true or false"),
        ("ram", 511, "of at least 512, found 511"),
        ("ram", -1, "found -1"),
        ("ram", "1.5G", 'found "1.5G"'),
        ("ram", "64MB", 'found "64MB"'),
        ("tap-fd", -1, "expected the number of an inherited file descriptor, found -1"),
        ("period", float("nan"), "expected a number from 0 to 10, found nan"),
        ("period", float("inf"), "found inf"),
        ("period", [1], "found a list"),
        ("period", {}, "found a table"),
        ("serial", ["x"] * 99, "found a list"),
        ("port", [1], "expected a string, or a list of strings, found a list"),
        ("port", ["a", ""], "found a list"),
        ("port", ["a\0"], "found a list"),
        ("port", {}, "found a table"),
    ],
)
def test_a_wrong_value_in_the_file_is_refused(name: str, value: object, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        options.from_toml(BY_NAME[name], value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("blk-file", ""),
        ("mode", "FAST"),
        ("num-queues", ""),
        ("num-queues", "1_0"),
        ("num-queues", "٣"),
        ("num-queues", "nine"),
        ("read-only", "maybe"),
        ("read-only", ""),
        ("ram", "-1"),
        ("ram", "M"),
        ("tap-fd", "stdin"),
        ("period", "nan"),
        ("period", "soon"),
    ],
)
def test_a_wrong_value_on_the_command_line_is_refused(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"^expected .*, found "):
        options.from_text(BY_NAME[name], text)


def test_a_list_has_its_items_in_order() -> None:
    assert options.from_toml(BY_NAME["port"], ["b", "a", "b"]) == ("b", "a", "b")


def test_a_long_value_is_cut_short_in_the_message() -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        options.from_text(BY_NAME["mode"], "x" * 10_000)
    assert len(str(caught.value)) < 120


@given(st.integers(0, 1 << 20), st.sampled_from([("", 0), ("K", 10), ("M", 20), ("G", 30), ("T", 40)]))
def test_a_size_is_its_number_times_its_unit(number: int, unit: tuple[str, int]) -> None:
    assert options.parse_size(f"{number}{unit[0]}") == number << unit[1]


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "type", "socket", "path", "bus", "qmp", "options", "ram", "metrics", "x"]),
            inner,
            max_size=4,
        )
    ),
)


@given(st.dictionaries(st.sampled_from(["daemon", "device", "x"]), _VALUES | st.lists(_VALUES, max_size=3)))
def test_any_document_is_either_read_or_refused_with_its_problems(document: dict[str, Any]) -> None:
    try:
        read = config.parse(document, "hcd.toml", find_type)
    except ConfigProblems as exc:
        count = len(exc.problems)
    else:
        count = len(read.devices)
    assert count > 0
