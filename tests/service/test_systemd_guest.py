"""The units under systemd: a Debian guest boots with systemd as its init, and uses them as an operator would.

One boot for all tests of this file. What is done in the guest, in which order: ``inside.py``. Each test here judges one
step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import skip_or_fail
from service import guest_root

from hcd.demo import packages, qemu
from hcd.demo.console import Guest

pytestmark = [pytest.mark.guest, pytest.mark.long]

HERE = Path(__file__).parent
#: a minute alone; a machine with other work to do takes longer
SECONDS = 400
#: short, so that the test is; the emulated processor still manages
WATCHDOG = "[Service]\nWatchdogSec=10\n"
UNIT = f"""
[Unit]
After=multi-user.target
[Service]
ExecStart=/usr/bin/{guest_root.PYTHON} /srv/inside.py
"""
PLUGIN = "/usr/lib/hcd/sticky-1.0.dist-info"


def files() -> dict[str, str]:
    """What the guest has beside Debian and hcd: its job, a device type, and a drop-in."""
    return {
        "/srv/inside.py": (HERE / "inside.py").read_text(),
        "/etc/systemd/system/inside.service": UNIT,
        "/etc/systemd/system/hcd@sticky.service.d/watchdog.conf": WATCHDOG,
        "/usr/lib/hcd/sticky.py": (HERE / "plugin.py").read_text(),
        f"{PLUGIN}/METADATA": "Metadata-Version: 2.1\nName: sticky\nVersion: 1.0\n",
        f"{PLUGIN}/entry_points.txt": "[hcd.devices]\nsticky = sticky:Sticky\n",
    }


Steps = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory, need: Callable[..., None]) -> Steps:
    """What every step said."""
    need("qemu-system-x86_64", "apt-get", "dpkg", "make")
    if reason := guest_root.is_available():
        skip_or_fail(reason)
    directory = tmp_path_factory.mktemp("systemd")
    initrd = directory / "initrd.cpio"
    initrd.write_bytes(guest_root.archive(guest_root.stage(directory / "staged"), files()))
    options = "systemd.show_status=0 systemd.wants=inside.service"
    vm = qemu.Vm(memory_mib=768, cpus=2, accel="tcg", kernel_options=options)
    with Guest("systemd", vm.command(packages.guest_files("amd64"), initrd), directory / "console.log") as guest:
        said = guest.wait(SECONDS)
    initrd.unlink()
    return {key: json.loads(value) for key, value in said.items() if value.startswith("{")}


def test_the_account_and_the_directory_are_made_at_boot(steps: Steps) -> None:
    made = steps["accounts"]
    assert (made["home"], made["mode"], made["owner"], made["group"]) == ("/var/lib/hcd", "0o2755", "hcd", "kvm")


def test_the_service_starts_and_is_ready(steps: Steps) -> None:
    started = steps["start"]
    assert (started["Type"], started["ActiveState"]) == ("notify", "active")
    assert started["StatusText"] == "1 device, 0 connected"


def test_it_runs_confined(steps: Steps) -> None:
    found = steps["confined"]
    assert (found["user"], found["capabilities"], found["no_new_privileges"]) == ("hcd", 0, "1")
    assert found["seccomp"] == "2", "a filter"
    assert found["network_of_its_own"]


@pytest.mark.parametrize("name", ["permissions", "activation"])
def test_only_the_group_may_connect(steps: Steps, name: str) -> None:
    assert steps[name]["group"] == "connected"
    assert steps[name]["others"] == "Permission denied"


def test_a_front_end_is_served_and_the_status_says_so(steps: Steps) -> None:
    assert steps["request"]["served"]


def test_hcd_status_finds_the_daemon(steps: Steps) -> None:
    assert steps["snapshot"]["devices"] == ["disk0"]
    assert steps["snapshot"]["pid"] == steps["snapshot"]["main"]
    assert steps["snapshot"]["group"] == "Permission denied", "QEMU's group has no business there"


def test_metrics_come_over_tcp_although_it_has_no_network(steps: Steps) -> None:
    assert steps["metrics"]["requests"] > 0


def test_a_reload_adds_a_device_beside_one_that_notices_nothing(steps: Steps) -> None:
    reloaded = steps["reload"]
    assert reloaded["StatusText"].startswith("2 devices, ")
    assert reloaded["drawn"] == 64
    assert reloaded["served"]


def test_a_bad_reload_changes_nothing(steps: Steps) -> None:
    assert steps["bad_reload"]["ActiveState"] == "active"
    assert steps["bad_reload"]["served"]


def test_a_front_end_does_not_notice_a_restart(steps: Steps) -> None:
    """Its descriptors are in the manager's store meanwhile; it does not even have to connect again."""
    restarted = steps["restart"]
    assert restarted["stored"] > 0
    assert restarted["another"], "it is another process"
    assert (restarted["served"], restarted["error"]) == (True, "")
    assert restarted["drawn"] == 64, "new connections are served too"


def test_a_front_end_does_not_notice_a_crash(steps: Steps) -> None:
    assert (steps["crash"]["served"], steps["crash"]["error"]) == (True, "")


def test_the_journal_knows_the_device_of_each_entry(steps: Steps) -> None:
    entries = steps["log"]
    assert sum("went on with the front end" in message for message in entries["messages"]) == 2
    assert all(message.startswith("disk0: ") for message in entries["messages"])
    assert "6" in entries["priorities"]


def test_a_connection_activates_an_instance(steps: Steps) -> None:
    activated = steps["activation"]
    assert activated["before"] == "inactive"
    assert (activated["ActiveState"], activated["served"]) == ("active", True)
    assert activated["restarted"], "and its front end did not notice"
    assert activated["socket"], "it is the manager's, and stays when the service stops"


def test_the_watchdog_kills_one_that_is_stuck_and_it_is_started_again(steps: Steps) -> None:
    barked = steps["watchdog"]
    assert "nothing used in time" in barked["stuck"]
    assert "Watchdog timeout" in barked["said"]
    assert "'watchdog'" in barked["result"]
    assert barked["another"]
    assert barked["drawn"] == [64, 64]


def test_it_stops_cleanly(steps: Steps) -> None:
    stopped = steps["stop"]
    assert (stopped["ActiveState"], stopped["Result"]) == ("inactive", "success")
    assert stopped["traces"] == []
    assert "disk0.sock" not in stopped["sockets"]


def test_the_front_end_saw_no_error_from_its_first_request_to_its_last(steps: Steps) -> None:
    assert steps["stop"]["error"] == ""
    assert steps["stop"]["went_on"] == 2, "over a restart and a crash"
