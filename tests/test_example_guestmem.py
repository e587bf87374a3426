"""docs/examples/hcd-guestmem: a package of somebody else, whose device QEMU knows nothing of."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from hcd import scaffold

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "docs" / "examples" / "hcd-guestmem"


@pytest.mark.parametrize(
    "command",
    [
        ("pytest", "-q", "-p", "no:cacheprovider"),
        ("mypy", "--cache-dir=/dev/null"),
        ("ruff", "check", "--no-cache", "."),
    ],
    ids=["pytest", "mypy", "ruff"],
)
def test_it_passes_its_own_tests_mypy_and_ruff(command: Sequence[str]) -> None:
    environment = os.environ | {"MYPYPATH": f"{ROOT}:{ROOT}/protocols", "PYTHONPATH": f"{ROOT}:{ROOT}/protocols"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=PACKAGE, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_its_readme_tells_qemu_what_the_device_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers on the command line are those of the device."""
    monkeypatch.syspath_prepend(str(PACKAGE / "src"))
    from hcd_guestmem import GuestMemory

    from hcd.options import defaults

    device = GuestMemory("m", defaults(GuestMemory.options))
    (given,) = re.findall(r"-device vhost-user-test-device-pci,(\S+)", (PACKAGE / "README.md").read_text())
    told = dict(word.split("=") for word in given.split(","))
    assert told["virtio-id"] == str(device.virtio_id)
    assert told["num_vqs"] == str(device.num_queues)
    assert told["config_size"] == str(len(device.config()))


def test_new_packages_say_how_any_device_reaches_a_guest() -> None:
    """Where QEMU has no front end of its own."""
    assert "vhost-user-test-device" in scaffold.files("mydev")["README.md"]
