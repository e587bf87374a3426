"""hcd.testing, as the author of a plug-in uses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import trio
from faulty_devices import AsyncShout, Shout

from hcd.device import ConfigError, Lane
from hcd.errors import PluginError
from hcd.testing import BackendError, serve

TYPES = pytest.mark.parametrize("kind", [Shout, AsyncShout])

TEN_LINES = """
import pytest
from hcd.testing import check_device, serve
from faulty_devices import Shout

def test_answers_in_capitals():
    with serve(Shout) as served, served.driver() as driver:
        assert driver.ask(b"hello", 64) == b"HELLO"

@pytest.mark.usefixtures("hcd_packed")
def test_fixtures(hcd_serve, hcd_packed):
    with hcd_serve(Shout).driver(packed=hcd_packed) as driver:
        assert driver.ask(b"again", 64) == b"AGAIN"
        assert driver.queues[0].ring.packed == hcd_packed
"""


@TYPES
@pytest.mark.parametrize("packed", [False, True])
def test_a_driver_asks_in_any_shape(kind: type[Shout], packed: bool, no_leaks: None) -> None:
    """Whole requests, on both lanes, over both kinds of rings; the room for the answer may be short."""
    with serve(kind) as served, served.driver(packed=packed) as driver:
        assert driver.ask(b"hello", 64) == b"HELLO"
        assert driver.ask(b"hello", 64, pieces=(1, 2), indirect=True) == b"HELLO"
        assert driver.ask(b"hello", 3) == b"HEL"
        assert driver.ask(b"", 3) == b""
        assert driver.config(0, 4) == b"\5\0\t\0"


@TYPES
def test_metrics_show_what_a_driver_did(kind: type[Shout]) -> None:
    """The same families as in the daemon."""
    with serve(kind, name="lamp0") as served:
        with served.driver() as driver:
            driver.ask(b"hello", 64)
            assert served.metrics().total("hcd_connected", device="lamp0") == 1
        served.wait_disconnected()
        metrics = served.metrics()
        assert metrics.total("hcd_requests_total", device="lamp0", op="shout", status="ok") == 1
        assert metrics.total("hcd_connected", device="lamp0") == 0


def test_code_runs_on_the_lane_of_the_device() -> None:
    """Where its state may be looked at; exceptions come back."""
    with serve(AsyncShout) as served:
        assert served.run(lambda: trio.lowlevel.current_task().name)
        with pytest.raises(ZeroDivisionError):
            served.run(lambda: 1 // 0)
    with serve(Shout) as served, pytest.raises(RuntimeError, match="async context"):
        served.run(trio.lowlevel.current_task)


def test_an_installed_type_is_served_by_name_with_options() -> None:
    """Options are checked as in a configuration."""
    with serve("blk", {"ram": "1M", "serial": "s1"}) as served, served.driver() as driver:
        assert driver.ask(b"\10" + bytes(15), 21)[:2] == b"s1"
    with pytest.raises(ValueError, match='no option "colour"'):
        serve("blk", {"colour": "red"})
    with pytest.raises(ValueError, match="expected a size"):
        serve("blk", {"ram": "much"})


def test_what_open_raises_reaches_the_test(no_leaks: None) -> None:
    """And nothing is left behind."""

    class Closed(Shout):
        def open(self, lane: Lane) -> None:
            raise ConfigError("no lamp")

    with pytest.raises(ConfigError, match="no lamp"), serve(Closed):
        pytest.fail("it was served")


def test_a_request_without_an_answer_fails_the_test_in_time() -> None:
    """Not after the patience of a build server."""

    class Mute(Shout):
        def answer(self, request: object) -> None:
            self.kept = request

        def stop_queue(self, queue: object) -> None:
            super().answer(self.kept)  # type: ignore[arg-type]

    with serve(Mute) as served, served.driver(timeout=0.05) as driver, pytest.raises(BackendError, match="in time"):
        driver.ask(b"hello", 64)


def test_the_pytest_plugin_gives_fixtures(tmp_path: Path) -> None:
    """A test file of ten lines runs by itself."""
    (tmp_path / "test_shout.py").write_text(TEN_LINES)
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "hcd.pytest_plugin", "-p", "no:cacheprovider", "."],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env={"PYTHONPATH": f"{root}:{root}/protocols:{root}/tests", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def test_the_pytest_plugin_costs_nothing_where_it_is_not_used() -> None:
    """It is loaded in every pytest of the environment: it imports neither trio nor the data plane."""
    code = "import sys, hcd.pytest_plugin; print([m for m in sys.modules if m.startswith(('hcd.', 'trio'))])"
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['hcd.pytest_plugin']"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("num_queues", "two", "num_queues is 'two'; expected 1 to 256"),
        ("num_queues", -1, "num_queues is -1"),
        ("num_queues", 2.0, "num_queues is 2.0"),
        ("features", -1, "features has bits -1; 0 to 23 and 50 to 63 are the device's"),
        ("features", 1 << 33, "features has bits 0x200000000"),
        ("features", 1 << 70, "features has bits 0x4"),
        ("features", "all", "features has bits 'all'"),
        ("protocol_features", None, "protocol_features is None"),
    ],
)
def test_a_device_that_nobody_could_be_served_with_is_not_opened(name: str, value: object, expected: str) -> None:
    """The author is told which property it is, and the device is closed again."""
    closed: list[Shout] = []

    def close(self: Shout) -> None:
        closed.append(self)

    odd = type("Odd", (Shout,), {name: value, "close": close})
    with pytest.raises(PluginError, match=f"Odd: {expected}"), serve(odd):
        pass
    assert len(closed) == 1


def test_a_device_that_raises_when_it_is_asked_what_it_is_is_not_opened() -> None:
    """Not even with what is for programs."""

    class Odd(Shout):
        @property
        def num_queues(self) -> int:
            raise SystemExit(3)

    with pytest.raises(PluginError, match="Odd, asked what it is: SystemExit: 3"), serve(Odd):
        pass


def test_what_open_raises_for_programs_is_the_plug_ins_error() -> None:
    """Neither the lane nor the daemon ends with it."""

    class Odd(Shout):
        def open(self, lane: Lane) -> None:
            raise SystemExit(3)

    with pytest.raises(PluginError, match=r"SystemExit\(3\), which is for programs"), serve(Odd):
        pass
