"""``hcd qemu-args``: what QEMU and libvirt are told of a configuration."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hcd import cli, config, plugins
from hcd import options as opt
from hcd.config import DeviceSpec
from hcd.device import Device, DeviceBase, DoorbellDevice
from hcd.devices.blk import Block
from hcd.doorbell import Path as BellPath
from hcd.errors import ConfigError
from hcd.qemu import version
from hcd.qemu.arguments import device_arguments, option, qemu_id
from hcd.qemu.devices import TABLE
from hcd.qemu.plugs import Wishes, make_plug

CONFIG = """
[[device]]
name = "disk0"
type = "blk"
socket = "/run/hcd/disk0.sock"
[device.options]
ram = "64M"
num-queues = 4

[[device]]
name = "net0"
type = "net"
socket = "/run/hcd/net0.sock"
[device.options]
mac = "52:54:00:12:34:57"
mtu = 1400
queue-pairs = 2

[[device]]
name = "rng0"
type = "rng"
socket = "/run/hcd/rng0.sock"
"""
NO_QEMU = ("--accel", "kvm", "--qemu-version", "7.2")
Print = Callable[..., str]


@pytest.fixture
def printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Print:
    """``printed(config, *arguments)``: what the command prints."""

    def run(text: str, *arguments: str, status: int = 0) -> str:
        file = tmp_path / "hcd.toml"
        file.write_text(text)
        assert cli.main(["qemu-args", str(file), *arguments]) == status
        said = capsys.readouterr()
        return said.out if status == 0 else said.err

    return run


def blk(**changed: object) -> DeviceSpec:
    options = opt.defaults(Block.options) | {"ram": 1 << 20}
    given: dict[str, object] = {"name": "d", "type": "blk", "socket": "/run/d.sock", "options": options}
    return DeviceSpec(**(given | changed))  # type: ignore[arg-type]


def device_of(words: Sequence[str]) -> dict[str, str]:
    """The properties of the one ``-device`` in ``words``; its driver under ""."""
    head, *pairs = words[list(words).index("-device") + 1].split(",")
    return {"": head, **dict(pair.split("=", 1) for pair in pairs)}


def test_everything_that_qemu_needs_is_printed(printed: Print) -> None:
    """One option and its value a line; a shell and shlex read the same words."""
    text = printed(CONFIG, *NO_QEMU, "--memory", "512M")
    assert text.splitlines() == [
        "-m 512M",
        "-object memory-backend-memfd,id=hcd-memory,size=512M,share=on",
        "-machine memory-backend=hcd-memory",
        "-chardev socket,id=disk0-socket,path=/run/hcd/disk0.sock,reconnect=1",
        "-device vhost-user-blk-pci,id=disk0,chardev=disk0-socket,num-queues=4",
        "-chardev socket,id=net0-socket,path=/run/hcd/net0.sock,reconnect=1",
        "-netdev vhost-user,id=net0-peer,chardev=net0-socket,queues=2",
        "-device virtio-net-pci,id=net0,netdev=net0-peer,mq=on,mac=52:54:00:12:34:57,host_mtu=1400",
        "-chardev socket,id=rng0-socket,path=/run/hcd/rng0.sock",
        "-device vhost-user-rng-pci,id=rng0,chardev=rng0-socket",
    ]
    assert json.loads(printed(CONFIG, *NO_QEMU, "--memory", "512M", "--json")) == shlex.split(text)


def test_devices_are_chosen_by_name(printed: Print) -> None:
    text = printed(CONFIG, "rng0", "disk0", "rng0", *NO_QEMU)
    assert [line.split()[1].split(",")[0] for line in text.splitlines() if line.startswith("-device")] == [
        "vhost-user-rng-pci",
        "vhost-user-blk-pci",
    ]
    mixed = printed(CONFIG, "rng0", *NO_QEMU, "disk0", "--packed")
    assert mixed == printed(CONFIG, *NO_QEMU, "--packed", "rng0", "disk0")
    assert 'no device "disk" in the configuration; did you mean "disk0"?' in printed(CONFIG, "disk", status=1)


@pytest.mark.parametrize(
    ("of", "spelling"),
    [("7.2", "reconnect=1"), ("9.1", "reconnect=1"), ("9.2", "reconnect-ms=1000"), ("11.0.1", "reconnect-ms=1000")],
)
def test_reconnect_is_spelt_as_the_version_reads_it(printed: Print, of: str, spelling: str) -> None:
    lines = printed(CONFIG, "disk0", "--qemu-version", of).splitlines()
    assert lines[3].endswith(f",{spelling}")
    assert "reconnect" not in printed(CONFIG, "disk0", "--qemu-version", of, "--no-reconnect")


def test_only_devices_that_wait_for_their_chardev_reconnect() -> None:
    """QEMU 7.2 aborts when vhost-user-rng gets a chardev with reconnect."""
    waits = {int(ident): front.reconnects for ident, front in TABLE.items()}
    assert waits[1] == waits[2] == (0, 0)
    assert waits[8] == (8, 2)
    assert waits[4] > (100, 0)


@pytest.mark.parametrize(
    ("changed", "driver", "properties"),
    [
        ({}, "vhost-user-blk-pci", {}),
        ({"path": BellPath.PIO}, "vhost-user-blk-pci", {"modern-pio-notify": "on", "disable-legacy": "on"}),
        ({"path": BellPath.MMIO}, "vhost-user-blk-pci", {"disable-legacy": "on"}),
        ({"bus": "mmio"}, "vhost-user-blk", {"queue-size": "1024"}),
        ({"bus": "mmio", "path": BellPath.MMIO}, "vhost-user-blk", {"queue-size": "1024"}),
    ],
)
def test_the_device_rings_over_the_declared_path(
    changed: dict[str, object], driver: str, properties: dict[str, str]
) -> None:
    plug = make_plug(blk(**changed), Wishes((7, 2)))
    found = device_of(device_arguments(plug, (7, 2)))
    assert found == {"": driver, "id": "d", "chardev": "d-socket", "num-queues": "1", **properties}


def test_rings_are_packed_and_sized_on_demand(printed: Print) -> None:
    text = printed(CONFIG, *NO_QEMU, "--packed", "--queue-size", "256")
    disk, net, rng = (device_of(["-device", line.split()[1]]) for line in text.splitlines() if "-device" in line)
    assert disk["queue-size"] == net["rx_queue_size"] == net["tx_queue_size"] == "256"
    assert disk["packed"] == net["packed"] == rng["packed"] == "on"
    assert "takes 256 to 1024" in printed(CONFIG, "net0", *NO_QEMU, "--queue-size", "128", status=1)
    assert "type blk takes 1024" in printed(CONFIG, "disk0", *NO_QEMU, "--queue-size", "2048", status=1)
    assert "expected a power of two" in printed(CONFIG, *NO_QEMU, "--queue-size", "100", status=2)


def test_a_network_card_without_kvm_has_no_vectors(printed: Print) -> None:
    """QEMU 7.2 dies of MSI-X there."""
    assert ",vectors=0" in printed(CONFIG, "net0", "--accel", "tcg", "--qemu-version", "7.2")
    assert "vectors" not in printed(CONFIG, "net0", *NO_QEMU)


@pytest.mark.parametrize(
    ("changed", "of", "why"),
    [
        ({"bus": "ccw"}, (7, 2), "QEMU has no vhost-user-blk-pci for ccw; it goes on pci and mmio"),
        ({"path": BellPath.HYPERCALL, "bus": "pci"}, (7, 2), 'path "hypercall" is that of bus "ccw", not "pci"'),
        ({"type": "echo", "options": {}}, (10, 1), "vhost-user-test-device-pci comes with 10.2"),
    ],
)
def test_what_qemu_does_not_have_is_said(
    changed: dict[str, object], of: tuple[int, int], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(Device):
        virtio_id = 40

        def process(self, queue: object) -> None: ...

        def config(self) -> bytes:
            return bytes(12)

    create = plugins.create
    monkeypatch.setattr(plugins, "create", lambda kind, *rest: Odd("d", {}) if kind == "echo" else create(kind, *rest))
    with pytest.raises(ConfigError, match=why):
        make_plug(blk(**changed), Wishes(of))
    if of == (10, 1):
        found = device_of(device_arguments(make_plug(blk(**changed), Wishes((10, 2))), (10, 2)))
        assert found == {
            "": "vhost-user-test-device-pci", "id": "d", "chardev": "d-socket",
            "virtio-id": "40", "num_vqs": "1", "config_size": "12",
        }  # fmt: skip


def test_values_are_written_as_qemu_and_the_shell_read_them(printed: Print, tmp_path: Path) -> None:
    """A comma is doubled, a space is quoted; relative sockets begin where hcd was started."""
    text = printed(CONFIG.replace("/run/hcd/rng0.sock", "a, b.sock"), "rng0", *NO_QEMU)
    chardev = shlex.split(text)[7]
    assert chardev == f"socket,id=rng0-socket,path={Path.cwd()}/a,, b.sock"
    assert option("x", path="a,b") == "x,path=a,,b"
    assert [qemu_id(name) for name in ("disk0", "0disk", "a:b")] == ["disk0", "hcd-0disk", "a_b"]


def test_the_qmp_sockets_of_the_configuration_are_made_once_each(printed: Print) -> None:
    """hcd asks there for the path of the doorbells."""
    text = CONFIG.replace('.sock"\n', '.sock"\nqmp = "/run/vm/q,0.sock"\n')
    words = json.loads(printed(text, *NO_QEMU, "--json"))
    assert words[-2:] == ["-qmp", "unix:/run/vm/q,,0.sock,server=on,wait=off"]
    assert words.count("-qmp") == 1
    root = ET.fromstring(printed(text, "disk0", *NO_QEMU, "--libvirt"))
    found = [arg.get("value") for arg in root.iter("{http://libvirt.org/schemas/domain/qemu/1.0}arg")]
    assert found == words[-2:]


def test_raw_doorbells_are_left_out(printed: Print, monkeypatch: pytest.MonkeyPatch) -> None:
    lamps = '[[device]]\nname = "lamps"\ntype = "lamps"\nsocket = "/run/l.sock"\n'

    class Lamps(DoorbellDevice):
        def ring(self, doorbell: object, count: int) -> None: ...

    def find(name: str) -> type[DeviceBase]:
        return Lamps if name == "lamps" else load(name)

    load = plugins.load
    monkeypatch.setattr(plugins, "load", find)
    monkeypatch.setattr(config.load, "__defaults__", (find,))
    assert "lamps" not in printed(CONFIG + lamps, *NO_QEMU)
    assert "no device of the configuration is one for QEMU" in printed(lamps, *NO_QEMU, status=1)


# -- libvirt


def test_libvirt_is_told_in_its_own_words(printed: Print) -> None:
    """Disks and cards are elements; the rest are arguments, the same that QEMU gets."""
    root = ET.fromstring(printed(CONFIG, *NO_QEMU, "--libvirt", "--packed", "--queue-size", "512"))
    assert root.get("type") == "kvm"
    assert root.find("memoryBacking/access[@mode='shared']") is not None
    assert root.find("memoryBacking/source[@type='memfd']") is not None
    disk, card = root.find("devices/disk"), root.find("devices/interface")
    assert disk is not None
    assert card is not None
    assert disk.find("driver").attrib == {  # type: ignore[union-attr]
        "name": "qemu", "type": "raw", "queues": "4", "queue_size": "512", "packed": "on",
    }  # fmt: skip
    assert disk.find("source").get("path") == "/run/hcd/disk0.sock"  # type: ignore[union-attr]
    assert disk.find("source/reconnect[@timeout='1']") is not None
    assert disk.find("target").attrib == {"dev": "vda", "bus": "virtio"}  # type: ignore[union-attr]
    assert card.find("mac").get("address") == "52:54:00:12:34:57"  # type: ignore[union-attr]
    assert card.find("mtu").get("size") == "1400"  # type: ignore[union-attr]
    assert card.find("driver").get("queues") == "2"  # type: ignore[union-attr]
    words = [arg.get("value") for arg in root.iter("{http://libvirt.org/schemas/domain/qemu/1.0}arg")]
    assert words == json.loads(printed(CONFIG, "rng0", *NO_QEMU, "--packed", "--json"))[6:]


def test_a_disk_with_a_declared_path_goes_past_libvirt(printed: Print) -> None:
    """libvirt cannot say modern-pio-notify."""
    text = CONFIG.replace('socket = "/run/hcd/disk0.sock"', 'socket = "/run/hcd/disk0.sock"\npath = "pio"')
    root = ET.fromstring(printed(text, "disk0", *NO_QEMU, "--libvirt"))
    assert root.find("devices") is None
    words = [arg.get("value") or "" for arg in root.iter("{http://libvirt.org/schemas/domain/qemu/1.0}arg")]
    assert device_of(words)["modern-pio-notify"] == "on"


# -- the QEMU that is installed


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7)\nCopyright", (7, 2)),
        ("QEMU emulator version 10.0.50 (v10.0.0-1-g)", (10, 0)),
    ],
)
def test_the_version_is_asked_for(tmp_path: Path, said: str, found: tuple[int, int]) -> None:
    fake = tmp_path / "qemu"
    fake.write_text(f"#!/bin/sh\ncat <<END\n{said}\nEND\n")
    fake.chmod(0o755)
    assert version.version_of(str(fake)) == found


def test_a_program_that_is_no_qemu_is_named(printed: Print, tmp_path: Path) -> None:
    assert "cannot be run: No such file" in printed(CONFIG, "--qemu", str(tmp_path / "none"), status=1)
    assert "does not name a version" in printed(CONFIG, "--qemu", "/bin/echo", status=1)
    assert "--version failed" in printed(CONFIG, "--qemu", "/bin/false", status=1)
    assert "expected a version of QEMU such as 7.2" in printed(CONFIG, "--qemu-version", "new", status=2)


def test_the_installed_qemu_has_the_device(printed: Print, need: Callable[..., None], tmp_path: Path) -> None:
    """A wrong row in the table, or a QEMU that was built without the device, is found before it is started."""
    need("qemu-system-x86_64")
    for front in TABLE.values():
        installed = version.devices_of("qemu-system-x86_64")
        assert {name for bus, name in front.names.items() if bus != "ccw"} <= installed
    fake = tmp_path / "qemu"
    fake.write_text("#!/bin/sh\necho 'QEMU emulator version 7.2.0'\necho 'name \"virtio-net-pci\", bus PCI'\n")
    fake.chmod(0o755)
    assert "has no device vhost-user-blk-pci" in printed(CONFIG, "--qemu", str(fake), status=1)
    assert "virtio-net-pci" in printed(CONFIG, "net0", "--qemu", str(fake))


def test_nothing_heavy_is_loaded_for_it() -> None:
    """It is run in scripts: neither trio nor prometheus_client is imported."""
    code = "import sys, hcd.qemu.cli; print([m for m in ('trio', 'prometheus_client') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_manual_shows_what_is_printed(printed: Print) -> None:
    manual = (Path(__file__).parent.parent / "docs" / "operations.md").read_text()
    text = CONFIG.replace("num-queues = 4", "")
    for more in (["--memory", "2G"], ["--libvirt"]):
        shown = printed(text, "disk0", "rng0", *NO_QEMU, *more)
        assert "".join(f"    {line}\n" for line in shown.splitlines()) in manual
