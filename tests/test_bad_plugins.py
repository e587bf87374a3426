"""What plug-ins do wrong stays theirs: each mistake ends as docs/devices.md says, and the neighbours serve on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hcd.demo.hcd_process import HcdFailedError, HcdProcess
from hcd.frontend.errors import BackendError
from hcd.testing import Driver

pytestmark = pytest.mark.long

Make = Callable[..., Path]

SOURCE = """
import time
from hcd.device import Device


class Good(Device):
    virtio_id = 63
    asked = 0
    def config(self): return b"four"
    def process(self, queue):
        for request in queue:
            self.answer(request)
    def answer(self, request):
        request.write(request.read().upper())
        request.complete()

class Raises(Good):
    def answer(self, request):
        raise ZeroDivisionError("asked to divide")

class Twice(Good):
    def answer(self, request):
        super().answer(request)
        request.complete()

class Never(Good):
    def answer(self, request):
        pass

class Keeps(Good):
    def answer(self, request):
        request.hold()
        self.kept = request

class Blocks(Good):
    def answer(self, request):
        time.sleep(1)
        super().answer(request)

class Garbage(Good):
    asks = 0
    def config(self):
        self.asks += 1
        return b"four" if self.asks < 5 else "volume=5"

class NoConfig(Good):
    def config(self):
        raise LookupError("no configuration")

class Refuses(Good):
    connects = 0
    def connect(self, features):
        self.connects += 1
        if self.connects == 1:
            raise RuntimeError("not yet")
"""


@pytest.fixture
def start(
    make_distribution: Make, start_hcd: Callable[..., HcdProcess], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], HcdProcess]:
    """Starts hcd with a device of the class given, called "bad", and one that works, "good"."""
    classes = [word.split("(")[0] for word in SOURCE.split("\nclass ")[1:]]
    types = {name.lower(): f"lamp_bad:{name}" for name in classes} | {"gone": "lamp_nowhere:Gone"}
    site = make_distribution("badworks", "6.6", types, {"lamp_bad": SOURCE})
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")])))

    def run(kind: str) -> HcdProcess:
        return start_hcd(
            f'[[device]]\nname = "bad"\ntype = "{kind}"\nsocket = "{{dir}}/bad"\n'
            '[[device]]\nname = "good"\ntype = "good"\nsocket = "{dir}/good"\n',
            daemon="drain_timeout = 0.2",
        )

    return run


def neighbour_serves(directory: Path) -> None:
    with Driver.open(directory / "good") as driver:
        assert driver.ask(b"hello", 8) == b"HELLO"


@pytest.mark.parametrize(
    ("kind", "answer", "line"),
    [
        ("raises", b"", "the handler of Raises failed: ZeroDivisionError: asked to divide"),
        ("twice", b"HELLO", "the handler of Twice failed: ValueError: the request is completed already"),
    ],
)
def test_a_handler_that_raises_fails_its_request_alone(
    kind: str, answer: bytes, line: str, start: Callable[[str], HcdProcess], short_dir: Path
) -> None:
    """Counted, and told with one traceback."""
    hcd = start(kind)
    with Driver.open(short_dir / "bad") as driver:
        assert [driver.ask(b"hello", 8) for _ in range(3)] == [answer] * 3
        neighbour_serves(short_dir)
    assert hcd.metrics().total("hcd_handler_errors_total", device="bad") == 3
    assert hcd.metrics().total("hcd_handler_errors_total", device="good") == 0
    assert line in hcd.log_text
    assert hcd.log_text.count("Traceback") == 1
    hcd.kill()  # the traceback is what was asked for; a stop would find fault with it


def test_a_request_that_is_never_completed_fails_when_its_queue_stops(
    start: Callable[[str], HcdProcess], short_dir: Path
) -> None:
    """At once: nobody holds it."""
    hcd = start("never")
    with Driver.open(short_dir / "bad") as driver:
        driver.queues[0].submit(driver.place(b"x"), [])
        neighbour_serves(short_dir)
        assert driver.stop_queue(0) == 1
        assert len(driver.queues[0].used()) == 1
    assert hcd.metrics().total("hcd_handler_errors_total", device="bad") == 1
    assert "Never never completed 1 requests" in hcd.log_text


def test_a_request_that_is_kept_is_taken_away(start: Callable[[str], HcdProcess], short_dir: Path) -> None:
    """After drain_timeout; its queue can be used again."""
    hcd = start("keeps")
    with Driver.open(short_dir / "bad") as driver:
        driver.queues[0].submit(driver.place(b"x"), [])
        neighbour_serves(short_dir)  # on the same thread, so the request is taken by then
        assert driver.stop_queue(0) == 1
        assert not driver.queues[0].used()
        neighbour_serves(short_dir)
    assert "1 requests did not end within 0.2 s" in hcd.log_text


def test_a_handler_that_blocks_is_named(start: Callable[[str], HcdProcess], short_dir: Path) -> None:
    """It holds the others up, who serve on afterwards; the metrics show how long it took."""
    hcd = start("blocks")
    with Driver.open(short_dir / "bad") as driver:
        assert driver.ask(b"hello", 8) == b"HELLO"
        neighbour_serves(short_dir)
    assert "bad: the handler of queue 0 took 1" in hcd.log_text
    slowest = hcd.metrics().quantile("hcd_request_latency_seconds", 1.0, device="bad")
    assert slowest is not None
    assert slowest >= 1


def test_garbage_for_a_configuration_space_is_not_handed_on(
    start: Callable[[str], HcdProcess], short_dir: Path
) -> None:
    """The front end is told that there is none; requests are served all the same."""
    hcd = start("garbage")
    with Driver.open(short_dir / "bad") as driver:
        answers: list[bytes | None] = []
        for _ in range(4):
            try:
                answers.append(driver.config(0, 4))
            except BackendError:
                answers.append(None)
        assert answers[-1] is None
        assert set(answers) <= {b"four", None}
        assert driver.ask(b"hello", 8) == b"HELLO"
        neighbour_serves(short_dir)
    assert hcd.metrics().total("hcd_handler_errors_total", device="bad") == answers.count(None)
    assert "Garbage: config() raised ValueError: str for a configuration space of 4 bytes" in hcd.log_text
    hcd.kill()


def test_a_device_that_cannot_say_what_it_is_loses_its_front_ends(
    start: Callable[[str], HcdProcess], short_dir: Path
) -> None:
    """Every one, and nobody else's."""
    hcd = start("noconfig")
    for _ in range(2):
        with pytest.raises(BackendError):
            Driver.open(short_dir / "bad", timeout=5)
    neighbour_serves(short_dir)
    assert hcd.metrics().total("hcd_handler_errors_total", device="bad") == 2
    assert "LookupError: no configuration" in hcd.log_text
    hcd.kill()


def test_a_device_that_raises_in_connect_loses_this_connection(
    start: Callable[[str], HcdProcess], short_dir: Path
) -> None:
    """The next one is served."""
    hcd = start("refuses")
    with pytest.raises(BackendError, match="hung up"):
        Driver.open(short_dir / "bad")
    with Driver.open(short_dir / "bad") as driver:
        assert driver.ask(b"hello", 8) == b"HELLO"
    neighbour_serves(short_dir)
    assert hcd.metrics().total("hcd_handler_errors_total", device="bad") == 1
    assert "RuntimeError: not yet" in hcd.log_text
    hcd.kill()


def test_a_plug_in_that_cannot_be_imported_is_refused_before_anything_is_served(
    start: Callable[[str], HcdProcess]
) -> None:
    """Naming who to write to."""
    with pytest.raises(HcdFailedError, match=r"badworks 6\.6: cannot be imported from lamp_nowhere:Gone"):
        start("gone")
