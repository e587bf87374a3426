"""A short fuzz of every target in a process of its own; ``python -m tests.fuzz`` has long ones.

The seed is a new one each time and stands in the output: a failure that shows only now and then can be had again.
HCD_FUZZ_SECONDS is for all targets together.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hcd import plugins
from tests.fuzz.__main__ import TARGETS
from tests.fuzz.devices import DEVICES

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
SECONDS = float(os.environ.get("HCD_FUZZ_SECONDS", "60"))


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_but_documented_errors_comes_out(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each target for its part of the time: a crash, a hang or a surprise fails it."""
    seconds = SECONDS / len(TARGETS)
    command = [sys.executable, "-m", "tests.fuzz", target, "--seconds", f"{seconds:g}"]
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds + 120
    )
    with capsys.disabled():
        print(f"\n{done.stdout.rstrip()}")
    assert done.returncode == 0, done.stdout


def test_every_device_is_fuzzed() -> None:
    """A device that comes into the tree gets its line in ``DEVICES``."""
    in_tree = {name for name in plugins.names() if plugins.distribution(name)[0] == "hcd"}
    assert {line.type for line in DEVICES} == in_tree
