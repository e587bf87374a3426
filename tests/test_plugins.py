"""Discovery of device types: only what is named is loaded, and a refusal says whose fault it is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hcd import declaration, plugins
from hcd.cli import _device_parser
from hcd.device import Device
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
        ("raise SystemExit(7)", "cannot be imported.*SystemExit: 7"),
        (GOOD + "    api_version = 99\n", "device API 99; this hcd has 1"),
        (GOOD + "    api_version = '1'\n", "device API '1'; this hcd has 1"),
        (GOOD + "    process = None\n", r"does not define process\(\)"),
        (GOOD + "    def process(self, queue): yield\n", r"process\(\) has a yield in it.*nothing would run it"),
        (GOOD + "    async def process(self, queue): yield\n", r"process\(\) has a yield in it"),
        (GOOD + "    async def open(self, lane): pass\n", r"open\(\) is async.*nothing would await it"),
        (GOOD + "    async def storage_size(self): pass\n", r"storage_size\(\) is async"),
        (GOOD + "    virtio_id = 'lamp'\n", "virtio_id is 'lamp'; expected the device's number"),
        (GOOD + "    virtio_id = property(lambda self: 63)\n", "virtio_id is <property .*; expected the device"),
        (GOOD + "    virtio_id = 1 << 16\n", "virtio_id is 65536; expected the device's number"),
        (GOOD + "    description = None\n", "description is None; expected a text"),
        (GOOD + "    vhost_user_type = 5\n", "vhost_user_type is 5; expected a text"),
        (GOOD + "    vhost_user_features = None\n", "vhost_user_features are None; expected a tuple of names"),
        (GOOD + "    vhost_user_features = 'dimmer'\n", "vhost_user_features are 'dimmer'; expected a tuple"),
        (GOOD + "    transport = 'pigeon'\n", "declares transport, which is for hcd to say"),
        (GOOD + "    handler = 'fly'\n", "declares handler, which is for hcd to say"),
        (GOOD + "    is_async = None\n", "declares is_async, which is for hcd to say"),
        (GOOD + "    operations = ()\n", "operations has 0 names"),
        (GOOD + "    operations = tuple('abcdefghijklmnopq')\n", r"operations has 17 names .*expected 1 to 16"),
        (GOOD + "    operations = 'read'\n", "operations are 'read'; expected a tuple of names"),
        (GOOD + "    operations = ('a', 'a')\n", r"operations has 2 names \(1 different\)"),
        (GOOD + "    max_queue_size = 100\n", "max_queue_size is 100; expected a power of two"),
        (GOOD + "    max_queue_size = 'large'\n", "max_queue_size is 'large'"),
        (GOOD + "    options = None\n", "declares None as an option"),
        (GOOD + "    options = (Option('two words', 'str', 'x'),)\n", '"two words" has a name that nobody can give'),
        (GOOD + "    options = (Option('control', 'str', 'x'),)\n", '"control" is one of hcd.s own'),
        (GOOD + "    metrics = None\n", "declares None as a metric"),
        (GOOD + "    options = (Option(None, 'str', 'x'),)\n", "what .*Lamp declares cannot be read: TypeError"),
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


@pytest.mark.parametrize("raised", ["SystemExit(3)", "KeyError('wick')"])
def test_whatever_a_type_raises_while_it_is_made_is_its_own_fault(make_distribution: Make, raised: str) -> None:
    """Also what is for programs to raise."""
    source = GOOD + f"    def __init__(self, name, options): raise {raised}\n"
    make_distribution("lampworks", "3.1", {"lamp": "lamp_exits:Lamp"}, {"lamp_exits": source})
    with pytest.raises(PluginError, match=r"lampworks 3\.1: cannot be made: (SystemExit|KeyError): "):
        plugins.create("lamp", "desk", {})


def test_a_type_that_does_not_initialise_its_base_class_is_refused(make_distribution: Make) -> None:
    """It would be served, and break /metrics for every device."""
    source = GOOD + "    def __init__(self, name, options): self.lit = True\n"
    make_distribution("lampworks", "3.1", {"lamp": "lamp_base:Lamp"}, {"lamp_base": source})
    with pytest.raises(PluginError, match=r"does not call super\(\).__init__\(name, options\)"):
        plugins.create("lamp", "desk", {})


def test_hcds_own_options_are_not_for_types() -> None:
    """Each option that ``hcd device`` has for every type is among those that a type cannot declare."""

    class Bare(Device):
        pass

    own = {word[2:] for action in _device_parser("bare", Bare)._actions for word in action.option_strings}
    assert {name for name in own if len(name) > 1} <= declaration.RESERVED
