"""What plug-ins do wrong stays theirs: each mistake ends as docs/devices.md says, and the neighbours serve on.

On a daemon as an operator runs it, on both lanes, with a neighbour on the same lane that is asked all the time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hcd_protocols.vhost_user.features import ProtocolFeature

from hcd.demo.hcd_process import HcdFailedError, HcdProcess
from hcd.frontend.errors import BackendError
from hcd.testing import Driver

pytestmark = pytest.mark.long

Make = Callable[..., Path]

SOURCE = """
import os
import sys
import time
from hcd.device import Device


class Good(Device):
    virtio_id = 63
    def config(self): return b"four"
    if os.environ["LANE"] == "trio":
        async def process(self, queue):
            for request in queue:
                self.answer(request)
    else:
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

class Callback(Good):
    def open(self, lane):
        self.lane = lane
    def answer(self, request):
        self.lane.call_later(0, self.fails)
        super().answer(request)
    def fails(self):
        raise ZeroDivisionError("late")

class Clumsy(Good):
    def stop_queue(self, queue):
        raise ZeroDivisionError("cannot stop")
    def disconnect(self):
        raise ZeroDivisionError("cannot leave")

class Garbage(Good):
    asks = 0
    def config(self):
        self.asks += 1
        return b"four" if self.asks < 5 else "volume=5"

class NoConfig(Good):
    def config(self):
        raise LookupError("no configuration")

class Nothing(Good):
    def config(self):
        pass

class Vast(Good):
    def config(self):
        return bytes(300)

class Leaves(Good):
    def config(self):
        sys.exit(4)

class Exits(Good):
    def __init__(self, name, options):
        super().__init__(name, options)
        self.where = ""
    def open(self, lane):
        self.lane = lane
        self.source, self.sink = os.pipe()
        lane.watch(self.source, lambda: (os.read(self.source, 1), sys.exit("watch")))
    def answer(self, request):
        self.where = request.read().decode()
        if self.where == "timer":
            self.lane.call_later(0, lambda: sys.exit("timer"))
        elif self.where == "post":
            self.lane.post(lambda: sys.exit("post"))
        elif self.where == "watch":
            os.write(self.sink, b"x")
        elif self.where in ("process", "fail"):
            sys.exit("process")
        elif self.where == "interrupt":
            raise KeyboardInterrupt
        elif self.where == "group":
            raise BaseExceptionGroup("several", [SystemExit("group"), ValueError("and more")])
        request.write(b"done")
        request.complete()
    def fail_request(self, request, status):
        if self.where == "fail":
            sys.exit("fail")
        super().fail_request(request, status)
    def write_config(self, offset, data):
        sys.exit("write_config")
    def stop_queue(self, queue):
        sys.exit("stop_queue")
    def disconnect(self):
        sys.exit("disconnect")
    def storage_size(self):
        sys.exit("storage_size")
    def close(self):
        sys.exit("close")

class Odd(Good):
    operations = ("a", "b")
    def answer(self, request):
        request.op, request.status = {b"op": (7, 0), b"less": (-1, 0), b"status": (0, 9)}[request.read()]
        request.complete()

class Dropped(Good):
    def answer(self, request):
        request.hold()
        raise ZeroDivisionError("with a request in its hands")

class Refusing(Good):
    if os.environ["LANE"] == "trio":
        async def process(self, queue):
            raise ZeroDivisionError("before it took anything")
    else:
        def process(self, queue):
            raise ZeroDivisionError("before it took anything")

class Idle(Good):
    if os.environ["LANE"] == "trio":
        async def process(self, queue):
            pass
    else:
        def process(self, queue):
            pass

class Coroutine(Good):
    def process(self, queue):
        return self.later()
    async def later(self):
        pass

class Closes(Good):
    def open(self, lane):
        self.lane = lane
    def answer(self, request):
        what = request.read()
        if what == b"closed":
            self.watch = self.lane.watch(os.pipe()[0], print)
            os.close(self.watch.fd)
        elif what == b"file":
            self.lane.watch(os.open("/dev/null", os.O_RDONLY), print)
        elif what == b"nothing":
            self.lane.watch(-1, print)
        elif what == b"twice":
            source = os.pipe()[0]
            self.lane.watch(source, print)
            self.lane.watch(source, print)
        elif what == b"nan":
            self.lane.call_later(float("nan"), print)
        elif what == b"text":
            self.lane.call_later("1", print)
        elif what == b"past":
            self.lane.call_later(-1, print)
        elif what == b"never":
            self.lane.call_later(float("inf"), print)
            self.lane.call_later(1e10, print)
        request.write(b"done")
        request.complete()

class Mute(Good):
    class Error(Exception):
        def __str__(self):
            sys.exit("no text")
    def answer(self, request):
        raise self.Error

class Hides(Good):
    asks = 0
    @property
    def features(self):
        self.asks += 1
        if self.asks == 2:
            sys.exit("features")
        return 0

class Refuses(Good):
    connects = 0
    def connect(self, features):
        self.connects += 1
        if self.connects == 1:
            raise RuntimeError("not yet")
"""


class Neighbour:
    """Asks the device "good" without a break, from a thread of its own; every answer must be right."""

    def __init__(self, path: Path) -> None:
        self._driver = Driver.open(path)
        self._answers = 0
        self._wrong: BaseException | None = None
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._ask, name="neighbour")
        self._thread.start()

    def _ask(self) -> None:
        try:
            while not self._ended:
                text = b"hello %d" % self._answers
                assert self._driver.ask(text, 32) == text.upper()
                with self._changed:
                    self._answers += 1
                    self._changed.notify()
        except BaseException as error:
            with self._changed:
                self._wrong = error
                self._changed.notify()

    def serves_on(self) -> None:
        """It gets answers to what it asks from now on."""
        with self._changed:
            wanted = self._answers + 5
            assert self._changed.wait_for(lambda: self._wrong or self._answers >= wanted, 10)
            assert self._wrong is None

    def close(self) -> None:
        self._ended = True
        self._thread.join()
        self._driver.close()
        assert self._wrong is None


class Bad:
    """The daemon and the neighbour."""

    def __init__(self, hcd: HcdProcess, directory: Path) -> None:
        self.hcd = hcd
        self.neighbour = Neighbour(directory / "good")

    def errors(self, device: str = "bad") -> float:
        return self.hcd.metrics().total("hcd_handler_errors_total", device=device)


@pytest.fixture(params=["reactor", "trio"])
def start(
    request: pytest.FixtureRequest,
    make_distribution: Make,
    start_hcd: Callable[..., HcdProcess],
    short_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[str], Bad]]:
    """Starts hcd with a device of the class given, called "bad", and one that works, "good", on the same lane.

    The test looks at hcd's log and metrics; in the end the neighbour was served all the time.
    """
    classes = [word.split("(")[0] for word in SOURCE.split("\nclass ")[1:]]
    types = {name.lower(): f"lamp_bad:{name}" for name in classes} | {"gone": "lamp_nowhere:Gone"}
    site = make_distribution("badworks", "6.6", types, {"lamp_bad": SOURCE})
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")])))
    monkeypatch.setenv("LANE", request.param)
    started: list[Bad] = []

    def run(kind: str) -> Bad:
        hcd = start_hcd(
            f'[[device]]\nname = "bad"\ntype = "{kind}"\nsocket = "{{dir}}/bad"\n'
            '[[device]]\nname = "good"\ntype = "good"\nsocket = "{dir}/good"\n',
            daemon="drain_timeout = 0.2",
        )
        started.append(Bad(hcd, short_dir))
        return started[-1]

    yield run
    for bad in started:
        bad.neighbour.serves_on()
        bad.neighbour.close()
        assert bad.errors("good") == 0
        bad.hcd.kill()  # tracebacks are what was asked for here; a stop would find fault with them


@pytest.mark.parametrize(
    ("kind", "answer", "line"),
    [
        ("raises", b"", "the handler of Raises failed: ZeroDivisionError: asked to divide"),
        ("mute", b"", "the handler of Mute failed: Error: (it has no text)"),
        ("twice", b"HELLO", "the handler of Twice failed: ValueError: the request is completed already"),
    ],
)
def test_a_handler_that_raises_fails_its_request_alone(
    kind: str, answer: bytes, line: str, start: Callable[[str], Bad], short_dir: Path
) -> None:
    """Counted, and told with one traceback."""
    bad = start(kind)
    with Driver.open(short_dir / "bad") as driver:
        assert [driver.ask(b"hello", 8) for _ in range(3)] == [answer] * 3
        bad.neighbour.serves_on()
    assert bad.errors() == 3
    assert line in bad.hcd.log_text
    assert bad.hcd.log_text.count("Traceback") == 1


def test_a_callback_that_raises_is_its_devices_error(start: Callable[[str], Bad], short_dir: Path) -> None:
    """Counted, and told with one traceback; the device serves on."""
    bad = start("callback")
    with Driver.open(short_dir / "bad") as driver:
        for _ in range(3):
            assert driver.ask(b"hello", 8) == b"HELLO"
        while bad.errors() < 3:
            bad.neighbour.serves_on()
    assert "Callback: a timer's callback raised ZeroDivisionError: late" in bad.hcd.log_text
    assert bad.hcd.log_text.count("Traceback") == 1


def test_a_request_that_is_never_completed_fails_when_its_queue_stops(
    start: Callable[[str], Bad], short_dir: Path
) -> None:
    """At once: nobody holds it."""
    bad = start("never")
    with Driver.open(short_dir / "bad") as driver:
        driver.queues[0].submit(driver.place(b"x"), [])
        bad.neighbour.serves_on()  # on the same thread, so the request is taken by then
        assert driver.stop_queue(0) == 1
        assert len(driver.queues[0].used()) == 1
    assert bad.errors() == 1
    assert "Never never completed 1 requests" in bad.hcd.log_text


def test_a_request_that_is_kept_is_taken_away(start: Callable[[str], Bad], short_dir: Path) -> None:
    """After drain_timeout; its queue can be used again."""
    bad = start("keeps")
    with Driver.open(short_dir / "bad") as driver:
        driver.queues[0].submit(driver.place(b"x"), [])
        bad.neighbour.serves_on()
        assert driver.stop_queue(0) == 1
        assert not driver.queues[0].used()
    assert bad.errors() == 1
    assert "1 requests did not end within 0.2 s" in bad.hcd.log_text


def test_a_device_that_raises_while_it_stops_is_stopped_all_the_same(
    start: Callable[[str], Bad], short_dir: Path
) -> None:
    """The queue goes on from where it was; the connection ends, and the next one is served."""
    bad = start("clumsy")
    with Driver.open(short_dir / "bad") as driver:
        assert driver.ask(b"hello", 8) == b"HELLO"
        driver.hand_over(driver.queues[0], driver.stop_queue(0))
        assert driver.ask(b"hello", 8) == b"HELLO"
        assert bad.errors() == 1
    with Driver.open(short_dir / "bad") as driver:
        assert driver.ask(b"hello", 8) == b"HELLO"
        assert bad.errors() == 3  # one for the queue, one for the connection
    assert "Clumsy: disconnect() raised ZeroDivisionError: cannot leave" in bad.hcd.log_text
    assert bad.hcd.log_text.count("Traceback") == 1


def test_a_handler_that_blocks_is_named_and_counted(start: Callable[[str], Bad], short_dir: Path) -> None:
    """It holds the others of its lane up, who serve on afterwards; the metrics show how often and for how long."""
    bad = start("blocks")
    with Driver.open(short_dir / "bad") as driver:
        assert driver.ask(b"hello", 8) == b"HELLO"
        bad.neighbour.serves_on()
    assert "bad: the handler of queue 0 took 1" in bad.hcd.log_text
    metrics = bad.hcd.metrics()
    assert metrics.total("hcd_slow_steps_total", device="bad") == 1
    slowest = metrics.quantile("hcd_request_latency_seconds", 1.0, device="bad")
    assert slowest is not None
    assert slowest >= 1


def test_garbage_for_a_configuration_space_is_not_handed_on(start: Callable[[str], Bad], short_dir: Path) -> None:
    """The front end is told that there is none; requests are served all the same."""
    bad = start("garbage")
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
    assert bad.errors() == answers.count(None)
    assert "Garbage: config() raised ValueError: it returned str; expected bytes" in bad.hcd.log_text


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("noconfig", "NoConfig: config() raised LookupError: no configuration"),
        ("nothing", "Nothing: config() raised ValueError: it returned NoneType; expected bytes"),
        ("vast", "Vast: config() raised ValueError: it returned 300 bytes; vhost-user carries 256 at most"),
        ("leaves", "Leaves: config() raised PluginError: SystemExit(4), which is for programs, not for devices"),
    ],
)
def test_a_device_without_a_sensible_configuration_space_is_served_without_one(
    kind: str, line: str, start: Callable[[str], Bad], short_dir: Path
) -> None:
    """Front ends are told that there is none; requests are served."""
    bad = start(kind)
    for errors in (1, 2):
        with Driver.open(short_dir / "bad") as driver:
            assert not driver.has(ProtocolFeature.CONFIG)
            assert driver.ask(b"hello", 8) == b"HELLO"
            assert bad.errors() == errors
    assert line in bad.hcd.log_text


def test_a_device_that_raises_in_connect_loses_this_connection(start: Callable[[str], Bad], short_dir: Path) -> None:
    """The next one is served."""
    bad = start("refuses")
    with pytest.raises(BackendError, match="hung up"):
        Driver.open(short_dir / "bad")
    with Driver.open(short_dir / "bad") as driver:
        assert driver.ask(b"hello", 8) == b"HELLO"
    assert bad.errors() == 1
    assert "RuntimeError: not yet" in bad.hcd.log_text


def test_a_device_that_calls_exit_ends_nothing_but_what_it_was_asked_for(
    start: Callable[[str], Bad], short_dir: Path
) -> None:
    """Wherever it does, and also with other exceptions that are not errors."""
    bad = start("exits")
    with Driver.open(short_dir / "bad") as driver:
        for where in ("timer", "post", "watch"):
            before = bad.errors()
            assert driver.ask(where.encode(), 8) == b"done"
            while bad.errors() == before:
                bad.neighbour.serves_on()
            assert f'raised PluginError: SystemExit({where})' in bad.hcd.log_text
        for where in ("process", "fail", "interrupt", "group"):
            before = bad.errors()
            assert driver.ask(where.encode(), 8) == b""
            assert bad.errors() == before + (2 if where == "fail" else 1)
            bad.neighbour.serves_on()
        before = bad.errors()
        with pytest.raises(BackendError, match="refuse"):
            driver.write_config(0, b"x")
        driver.hand_over(driver.queues[0], driver.stop_queue(0))
        assert bad.errors() == before + 2
        assert driver.ask(b"now what", 8) == b"done"
    with Driver.open(short_dir / "bad") as driver:
        assert driver.ask(b"hello", 8) == b"done"


def test_a_device_that_exits_when_it_is_asked_what_it_is_loses_this_connection(
    start: Callable[[str], Bad], short_dir: Path
) -> None:
    """The next one is served."""
    bad = start("hides")
    with pytest.raises(BackendError, match="hung up"):
        Driver.open(short_dir / "bad")
    with Driver.open(short_dir / "bad") as driver:
        assert driver.ask(b"hello", 8) == b"HELLO"
    assert bad.errors() == 1
    line = "Hides: what it is asked when a front end connects, raised PluginError: SystemExit(features)"
    assert line in bad.hcd.log_text


def test_an_operation_or_status_that_does_not_exist_fails_the_request(
    start: Callable[[str], Bad], short_dir: Path
) -> None:
    """The device hears of it from complete(), and may not do it again while the request is ended for it."""
    bad = start("odd")
    with Driver.open(short_dir / "bad") as driver:
        for what in (b"op", b"less", b"status"):
            assert driver.ask(what, 8) == b""
        bad.neighbour.serves_on()
    assert bad.errors() == 3
    assert "ValueError: no operation 7 or no status 0" in bad.hcd.log_text


def test_a_request_that_a_handler_held_when_it_raised_is_failed(start: Callable[[str], Bad], short_dir: Path) -> None:
    """While the queue runs: nobody is left who could complete it."""
    bad = start("dropped")
    with Driver.open(short_dir / "bad") as driver:
        assert [driver.ask(b"hello", 8) for _ in range(3)] == [b""] * 3
    assert bad.errors() == 3


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("refusing", "the handler of Refusing failed: ZeroDivisionError: before it took anything"),
        ("idle", "the handler of Idle failed: PluginError: it returned and took none of the requests in the ring"),
        ("coroutine", "the handler of Coroutine failed: PluginError: it returned a coroutine, which nobody runs"),
    ],
)
def test_a_handler_that_takes_no_requests_does_not_go_round_for_ever(
    kind: str, line: str, start: Callable[[str], Bad], short_dir: Path
) -> None:
    """Each turn that leads nowhere fails one request, so the driver hears of it and the lane has peace."""
    bad = start(kind)
    with Driver.open(short_dir / "bad") as driver:
        assert [driver.ask(b"hello", 8) for _ in range(3)] == [b""] * 3
        bad.neighbour.serves_on()
        assert bad.errors() in (3, 4)  # when a queue starts it has a turn, whether its ring holds anything or not
    assert line in bad.hcd.log_text


def test_what_cannot_be_watched_or_timed_is_refused_to_the_device(start: Callable[[str], Bad], short_dir: Path) -> None:
    """A closed descriptor's number may be anybody's next; times are what they are."""
    bad = start("closes")
    with Driver.open(short_dir / "bad") as driver:
        for what in (b"closed", b"past", b"never", b"closed"):
            assert driver.ask(what, 8) == b"done"
        assert bad.errors() == 0
        for what in (b"file", b"nothing", b"twice", b"nan", b"text"):
            assert driver.ask(what, 8) == b""
        assert bad.errors() == 5
    for _ in range(3):  # the numbers are hcd's now
        with Driver.open(short_dir / "bad") as driver:
            assert driver.ask(b"hello", 8) == b"done"
    assert ": Operation not permitted" in bad.hcd.log_text
    assert bad.errors() == 5


def test_a_plug_in_that_cannot_be_imported_is_refused_before_anything_is_served(start: Callable[[str], Bad]) -> None:
    """Naming who to write to."""
    with pytest.raises(HcdFailedError, match=r"badworks 6\.6: cannot be imported from lamp_nowhere:Gone"):
        start("gone")
