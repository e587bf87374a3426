"""Discovery of device types: only what is named is loaded, and a refusal says whose fault it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hcd import plugins
from hcd.errors import ConfigError, PluginError

Make = Callable[..., Path]

HEAD = "from hcd.device import Device, Option, ConfigError\n"
GOOD = (
    HEAD
    + """
class Lamp(Device):
    description = "a lamp"
    def process(self, queue): pass
"""
)


def refusal(make: Make, source: str, where: str = "plug_under_test:Lamp") -> str:
    """The message with which a type made of ``source`` is refused."""
    make("lampworks", "3.1", {"lamp": where}, {"plug_under_test": source})
    with pytest.raises(PluginError) as caught:
        plugins.load("lamp")
    return str(caught.value)


def test_an_installed_type_is_listed_and_loaded(make_distribution: Make) -> None:
    make_distribution("lampworks", "3.1", {"lamp": "lamp_a:Lamp"}, {"lamp_a": GOOD})
    assert "lamp" in plugins.names()
    assert plugins.load("lamp").description == "a lamp"
    assert plugins.create("lamp", "desk", {"x": 1}).name == "desk"


def test_listing_and_loading_one_type_imports_no_other(make_distribution: Make) -> None:
    broken = "raise RuntimeError('must not be imported')"
    modules = {"lamp_a": GOOD, "lamp_b": broken}
    make_distribution("lampworks", "3.1", {"lamp": "lamp_a:Lamp", "dark": "lamp_b:Lamp"}, modules)
    assert "dark" in plugins.names()
    plugins.load("lamp")
    assert "lamp_b" not in sys.modules


def test_what_is_installed_later_is_found_then(make_distribution: Make, tmp_path: Path) -> None:
    """What was found is kept, but not beyond the next installation, into a directory that was looked through before."""
    site = make_distribution("lampworks", "3.1", {"lamp": "lamp_a:Lamp"}, {"lamp_a": GOOD})
    assert "late" not in plugins.names()
    info = site / "lateworks-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lateworks\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hcd.devices]\nlate = lamp_a:Lamp\n")
    assert "late" in plugins.names()
    (info / "entry_points.txt").write_text("[hcd.devices]\nlate = lamp_a:Lamp\nlater = lamp_a:Lamp\n")
    assert plugins.load("later").description == "a lamp", "even where the directories do not tell"


def test_an_unknown_type_is_the_operators_error_with_a_hint(make_distribution: Make) -> None:
    make_distribution("lampworks", "3.1", {"lantern": "lamp_a:Lamp"}, {"lamp_a": GOOD})
    with pytest.raises(ConfigError, match=r'no device type "lanten".*did you mean "lantern"'):
        plugins.load("lanten")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("raise RuntimeError('no such lamp')", "cannot be imported.*RuntimeError: no such lamp"),
        ("import nowhere_to_be_found", "cannot be imported.*ModuleNotFoundError"),
        ("Lamb = 1", "cannot be imported.*AttributeError"),
        ("syntax error", "cannot be imported.*SyntaxError"),
        ("Lamp = 1", "is not a subclass"),
        ("class Lamp: pass", "is not a subclass"),
        (GOOD + "    api_version = 99\n", "device API 99; this hcd has 1"),
        (HEAD + "class Lamp(Device): pass\n", r"does not define process\(\)"),
        ("from hcd.device import DoorbellDevice\nclass Lamp(DoorbellDevice): pass\n", r"does not define ring\(\)"),
        (GOOD + "    options = ('brightness',)\n", "expected a hcd.device.Option"),
        (GOOD + "    options = (Option('watts', 'decimal', ''),)\n", 'unknown kind "decimal"'),
        (GOOD + "    options = (Option('socket_path', 'str', ''),)\n", '"socket_path" is one of hcd'),
        (GOOD + "    options = (Option('a-b', 'str', ''), Option('a_b', 'int', ''))\n", "twice"),
    ],
)
def test_a_defective_type_is_refused_naming_its_distribution(
    make_distribution: Make, source: str, expected: str
) -> None:
    message = refusal(make_distribution, source)
    assert 'device type "lamp" of lampworks 3.1: ' in message
    with pytest.raises(PluginError, match=expected):
        plugins.load("lamp")


def test_two_distributions_that_claim_one_type_are_both_named(make_distribution: Make) -> None:
    make_distribution("lampworks", "3.1", {"lamp": "lamp_a:Lamp"}, {"lamp_a": GOOD})
    make_distribution("darkworks", "0.2", {"lamp": "lamp_b:Lamp"}, {"lamp_b": GOOD})
    with pytest.raises(PluginError, match=r"claimed by (?=.*lampworks 3\.1)(?=.*darkworks 0\.2)"):
        plugins.load("lamp")


def test_a_type_that_refuses_its_options_blames_the_operator(make_distribution: Make) -> None:
    source = GOOD + "    def __init__(self, name, options): raise ConfigError('needs a bulb')\n"
    make_distribution("lampworks", "3.1", {"lamp": "lamp_a:Lamp"}, {"lamp_a": source})
    with pytest.raises(ConfigError, match=r"^needs a bulb$"):
        plugins.create("lamp", "desk", {})


def test_a_type_that_crashes_while_it_is_made_blames_the_plug_in(make_distribution: Make) -> None:
    source = GOOD + "    def __init__(self, name, options): options['bulb']\n"
    make_distribution("lampworks", "3.1", {"lamp": "lamp_a:Lamp"}, {"lamp_a": source})
    with pytest.raises(PluginError, match=r"lampworks 3\.1: cannot be made: KeyError"):
        plugins.create("lamp", "desk", {})
