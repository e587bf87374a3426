"""``hcd device TYPE -- COMMAND``: a device for as long as a command runs; and ``hcd devices --dump``."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hcd.cli import main

pytestmark = pytest.mark.long

Make = Callable[..., Path]

CLIENT = """
import sys
from hcd.testing import Driver

with Driver.open(sys.argv[1]) as driver:
    print(len(driver.ask(room=16)), "bytes from", sys.argv[2])
"""


def hcd(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hcd", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def test_a_command_uses_the_device(tmp_path: Path) -> None:
    """Its socket is there when the command starts, and gone afterwards; every {socket} is filled in."""
    done = hcd("device", "rng", "--", sys.executable, "-c", CLIENT, "{socket}", "path={socket}")
    assert (done.returncode, done.stderr) == (0, "")
    count, _, path = done.stdout.strip().partition(" bytes from path=")
    assert count == "16"
    assert not Path(path).parent.exists()


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("kill -9 $$", 137), ("exit 0", 0)])
def test_the_exit_status_of_the_command_is_passed_on(script: str, status: int) -> None:
    """A signal as shells tell it."""
    assert hcd("device", "rng", "--", "sh", "-c", f"{script} # {{socket}}").returncode == status


def test_a_socket_of_ones_own_is_used(short_dir: Path) -> None:
    """For a second client, or a VMM that is started elsewhere."""
    done = hcd("device", "rng", f"--socket-path={short_dir}/s", "--", "sh", "-c", "test -S $0 && echo $0", "{socket}")
    assert done.stdout == f"{short_dir}/s\n"


@pytest.mark.parametrize(
    ("words", "status", "expected"),
    [
        (("rng", "--", "true"), 1, "{socket} is missing"),
        (("rng", "--fd=3", "--", "true", "{socket}"), 2, "do not go with a command"),
        (("rng", "--exit-on-disconnect", "--", "true", "{socket}"), 2, "do not go with a command"),
        (("rng", "--", "no-such-vmm", "{socket}"), 127, "cannot run no-such-vmm: No such file"),
        (("blk", "--", "true", "{socket}"), 1, "expected exactly one of blk-file and ram"),
    ],
)
def test_what_cannot_work_is_said(words: tuple[str, ...], status: int, expected: str) -> None:
    """And nothing is left running."""
    done = hcd("device", *words)
    assert (done.returncode, expected in done.stderr) == (status, True), done.stderr


def test_a_command_ends_with_hcd(short_dir: Path) -> None:
    """SIGTERM to hcd reaches the command, which may clean up; the status says that it was cut short."""
    script = "trap 'echo cleaned; exit 0' TERM; echo ready {socket}; while :; do sleep 0.05; done"
    process = subprocess.Popen(
        [sys.executable, "-m", "hcd", "device", "rng", "--", "sh", "-c", script],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready")
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert (out, process.returncode) == ("cleaned\n", 128 + signal.SIGTERM), err


# -- hcd devices --dump

SOURCE = """
from hcd.device import Device, Metric, Option

class Lamp(Device):
    virtio_id = 63
    description = "a lamp"
    metrics = (Metric("lamp_watts_total", "counter", "Watts.", labels={"to": ("wall", "floor")}),)
    operations = ("on", "off")
    in_order = True
    options = (
        Option("watts", "int", "how bright", default=40, minimum=1),
        Option("dimmer", "bool", "has one", default=False),
        Option("note", "str", "what it says", default="a\\\\b\\nc"),
    )
    async def process(self, queue): pass
"""


def test_dump_tells_scripts_about_a_type(make_distribution: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines of key=value; keys stay."""
    make_distribution("lampworks", "3.1", {"lamp": "lamp_dump:Lamp"}, {"lamp_dump": SOURCE})
    assert main(["devices", "--dump", "lamp"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "name=lamp",
        "description=a lamp",
        "distribution=lampworks",
        "version=3.1",
        "class=lamp_dump:Lamp",
        "api_version=1",
        "hcd_api_version=1",
        "transport=vhost-user",
        "lane=trio",
        "virtio_id=63",
        "vhost_user_type=",
        "max_queue_size=1024",
        "in_order=yes",
        "operations=on,off",
        "options=watts,dimmer,note",
        "option.watts.kind=int",
        "option.watts.default=40",
        "option.watts.expected=an integer of at least 1",
        "option.watts.help=how bright",
        "option.dimmer.kind=bool",
        "option.dimmer.default=false",
        "option.dimmer.expected=true or false",
        "option.dimmer.help=has one",
        "option.note.kind=str",
        "option.note.default=a\\\\b\\nc",
        "option.note.expected=a string",
        "option.note.help=what it says",
        "metrics=lamp_watts_total",
        "metric.lamp_watts_total.kind=counter",
        "metric.lamp_watts_total.labels=to",
        "metric.lamp_watts_total.help=Watts.",
    ]


@pytest.mark.parametrize("name", ["blk", "console", "scsi", "net", "rng", "nullio", "echo"])
def test_dump_knows_every_type_of_hcd(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Also those with doorbells of their own."""
    assert main(["devices", "--dump", name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("=" in line for line in lines)
    assert f"name={name}" in lines
    assert "distribution=hcd" in lines


def test_dump_of_a_defective_type_names_its_distribution(
    make_distribution: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that needs another hcd, or cannot be imported."""
    make_distribution("lampworks", "3.1", {"lamp": "lamp_old:Lamp"}, {"lamp_old": SOURCE + "    api_version = 9\n"})
    make_distribution("darkworks", "0.2", {"dark": "lamp_gone:Lamp"}, {"lamp_gone": "import nowhere_at_all"})
    assert main(["devices", "--dump", "lamp"]) == 1
    assert "lampworks 3.1: is written for device API 9; this hcd has 1" in capsys.readouterr().err
    assert main(["devices", "--dump", "dark"]) == 1
    assert "darkworks 0.2: cannot be imported" in capsys.readouterr().err
    assert main(["devices", "--dump", "drak"]) == 1
    assert 'did you mean "dark"' in capsys.readouterr().err
