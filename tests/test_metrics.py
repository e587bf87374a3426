"""The metrics: one table of names, text that Prometheus takes, and a server that a stranger cannot hurt."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import socket
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from hcd.dataplane.stats import DeviceStats, HotText, QueueStats
from hcd.doorbell import Doorbell, PathSource, Registry
from hcd.doorbell import Path as BellPath
from hcd.metrics import cold, server
from hcd.metrics.names import BY_NAME, FAMILIES


@dataclass
class Process:
    """What a daemon has of which metrics tell; empty."""

    hot: HotText = field(default_factory=HotText)
    registry: Registry = field(default_factory=Registry)

    def add(self, device: str) -> DeviceStats:
        stats = DeviceStats()
        self.hot.add_device(device, stats)
        return stats

    def render(self) -> str:
        return b"".join(cold.Renderer(self.hot, self.registry)()).decode()


def parsed(text: str) -> dict[str, Metric]:
    """Families by their full name, and no name twice."""
    families = list(text_string_to_metric_families(text))
    names = [f.name + "_total" if f.type == "counter" else f.name for f in families]
    assert len(names) == len(set(names))
    return dict(zip(names, families, strict=True))


def busy() -> Process:
    """One device with a doorbell and a queue, everything counted at least once."""
    process = Process()
    bell = Doorbell("disk0", "0", "vhost-user", kind="legacy", address='unix:/run/"x"\\\n')
    process.registry.add(bell)
    bell.set_path(BellPath.PIO, PathSource.QMP)
    bell.stats.add_rings(3)
    bell.stats.dispatch.observe(2000)
    stats = process.add("disk0")
    queue = QueueStats(("read", "write"), stats)
    process.hot.add_doorbell("disk0", "0", "pio", bell.stats)
    process.hot.add_queue("disk0", "0", queue)
    stats.connected, stats.protocol_errors, stats.slow_steps = 1, 2, 5
    queue.guest_errors += 3
    queue.handler_errors += 3
    stats.add_handler_errors()
    return process


# -- names and text


def test_names_follow_the_conventions() -> None:
    for family in FAMILIES:
        assert re.fullmatch(r"hcd_[a-z_]+", family.name)
        assert (family.type == "counter") == family.name.endswith("_total")
        assert family.type in ("counter", "gauge", "histogram")
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
        assert family.help.endswith(".")
        assert "\n" not in family.help
    assert len(BY_NAME) == len(FAMILIES)


def test_every_family_is_there_while_nothing_feeds_it() -> None:
    families = parsed(Process().render())
    for declared in FAMILIES:
        assert families[declared.name].type == declared.type, declared.name
        assert families[declared.name].documentation == declared.help, declared.name


def test_no_family_is_there_that_the_table_does_not_have() -> None:
    names = {name for name in parsed(busy().render()) if not name.startswith("process_")}
    assert names == set(BY_NAME)


def test_the_hot_families_are_those_of_the_data_plane() -> None:
    assert set(parsed(b"".join(HotText().render()).decode())) == {family.name for family in FAMILIES if family.hot}


def test_samples_have_the_labels_of_the_table() -> None:
    for name, family in parsed(busy().render()).items():
        for sample in family.samples if name in BY_NAME else ():
            assert set(sample.labels) - {"le"} == set(BY_NAME[name].labels), name


def test_values_reach_the_text() -> None:
    families = parsed(busy().render())

    def value(name: str) -> float:
        (sample,) = families[name].samples
        return sample.value

    assert value("hcd_connected") == 1
    assert value("hcd_protocol_errors_total") == 2
    assert value("hcd_guest_errors_total") == 3
    assert value("hcd_handler_errors_total") == 4
    assert value("hcd_path_conflicts") == 0
    assert value("hcd_doorbell_rings_total") == 3
    assert value("hcd_slow_steps_total") == 5


def test_what_is_told_of_a_doorbell_follows_it() -> None:
    """Its text is kept between scrapes: whatever changes has to be noticed."""
    process, bell = Process(), Doorbell("dev", "go", "kvm", kind="datamatch")
    text = cold.ColdText(process.registry)

    def told(name: str) -> list[tuple[dict[str, str], float]]:
        samples = parsed(text.render().decode())[name].samples
        return [(sample.labels, sample.value) for sample in samples]

    assert told("hcd_doorbell_info") == []
    process.registry.add(bell)
    ((labels, _),) = told("hcd_doorbell_info")
    assert (labels["path"], labels["source"], labels["kind"]) == ("unknown", "none", "datamatch")
    bell.set_path(BellPath.MMIO, PathSource.REGISTERED, kind="any")
    ((labels, _),) = told("hcd_doorbell_info")
    assert (labels["path"], labels["source"], labels["kind"]) == ("mmio", "registered", "any")
    bell.set_address("0xfe000000")
    ((labels, _),) = told("hcd_doorbell_info")
    assert labels["address"] == "0xfe000000"
    place = {"device": "dev", "queue": "go", "path": "mmio"}
    assert told("hcd_doorbell_registered") == [(place, 0)]
    bell.set_registered(True)
    assert told("hcd_doorbell_registered") == [(place, 1)]
    bell.set_registered(None)
    assert told("hcd_doorbell_registered") == [(place, 0)]
    process.registry.remove_device("dev")
    assert told("hcd_doorbell_info") == told("hcd_doorbell_registered") == []


def test_the_info_of_a_doorbell_says_path_source_and_address() -> None:
    (sample,) = parsed(busy().render())["hcd_doorbell_info"].samples
    assert sample.value == 1
    assert sample.labels == {
        "device": "disk0",
        "queue": "0",
        "path": "pio",
        "source": "qmp",
        "kind": "legacy",
        "transport": "vhost-user",
        "address": 'unix:/run/"x"\\\n',
    }


def test_a_device_that_is_gone_leaves_no_info() -> None:
    process = busy()
    process.registry.remove_device("disk0")
    assert parsed(process.render())["hcd_doorbell_info"].samples == []


def test_a_conflict_of_paths_is_a_gauge() -> None:
    process = Process()
    process.add("disk0").path_conflict = True
    (sample,) = parsed(process.render())["hcd_path_conflicts"].samples
    assert sample.value == 1


def test_sessions_of_an_earlier_process_are_counted_by_outcome() -> None:
    process = Process()
    stats = process.add("disk0")
    stats.handover_ready, stats.handovers_resumed, stats.handovers_failed = True, 2, 1
    families = parsed(process.render())
    counts = {sample.labels["outcome"]: sample.value for sample in families["hcd_handovers_total"].samples}
    assert counts == {"resumed": 2, "failed": 1}
    assert [sample.value for sample in families["hcd_handover_ready"].samples] == [1]


def test_the_build_is_told() -> None:
    (sample,) = parsed(Process().render())["hcd_build_info"].samples
    assert sample.value == 1
    assert set(sample.labels) == {"version", "python"}


def test_two_daemons_in_one_process_do_not_meet() -> None:
    process = Process()
    process.add("disk0")
    assert len(parsed(process.render())["hcd_connected"].samples) == 1
    assert len(parsed(Process().render())["hcd_connected"].samples) == 0


@pytest.mark.parametrize("full", [False, True])
def test_promtool_has_nothing_to_say(full: bool) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        if os.environ.get("HCD_REQUIRE") == "1":
            pytest.fail("promtool is not installed")
        pytest.skip("promtool is not installed")
    text = (busy() if full else Process()).render()
    done = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- requests


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"GET /metrics HTTP/1.1\r\nHost: x", server.Head("GET", "/metrics", True)),
        (b"GET /metrics?x=1 HTTP/1.1\r\nHost: x", server.Head("GET", "/metrics", True)),
        (b"HEAD / HTTP/1.1\r\nConnection: Close", server.Head("HEAD", "/", False)),
        (b"GET / HTTP/1.1\r\nConnection: TE, close", server.Head("GET", "/", False)),
        (b"GET / HTTP/1.0", server.Head("GET", "/", False)),
        (b"GET / HTTP/1.0\r\nConnection: keep-alive", server.Head("GET", "/", True)),
        (b"POST / HTTP/1.1\r\nContent-Length: 0", server.Head("POST", "/", True)),
    ],
)
def test_a_head_is_understood(data: bytes, expected: server.Head) -> None:
    assert server.parse_head(data) == expected


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"", 400),
        (b"GET", 400),
        (b"GET /metrics", 400),
        (b"GET  HTTP/1.1", 400),
        (b"GET / / HTTP/1.1", 400),
        (b"GET /metrics HTTP/1.1 ", 400),
        (b"\x16\x03\x01\x02\x00\x01", 400),
        (b"GET /\xff HTTP/1.1", 400),
        (b"GET / SMTP/1.1", 400),
        (b"GET / HTTP/2.0", 505),
        (b"GET / HTTP/1.1\r\nno colon", 400),
        (b"GET / HTTP/1.1\r\n: nameless", 400),
        (b"GET / HTTP/1.1\r\nHost : x", 400),
        (b"GET / HTTP/1.1\r\n folded: x", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 5", 413),
        (b"GET / HTTP/1.1\r\nContent-Length: -1", 413),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked", 413),
    ],
)
def test_a_head_that_is_not_http_is_refused(data: bytes, status: int) -> None:
    with pytest.raises(server.BadRequest) as caught:
        server.parse_head(data)
    assert caught.value.status == status


# -- the server


class Scraper:
    """One connection to the server under test."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.buffer = b""

    async def ask(self, request: bytes, *, body: bool = True) -> tuple[int, dict[str, str], bytes]:
        await self.stream.send_all(request)
        return await self.answer(body=body)

    async def answer(self, *, body: bool = True) -> tuple[int, dict[str, str], bytes]:
        while b"\r\n\r\n" not in self.buffer:
            await self.more()
        head, self.buffer = self.buffer.split(b"\r\n\r\n", 1)
        line, *fields = head.decode().split("\r\n")
        headers = dict(field.lower().split(": ", 1) for field in fields)
        length = int(headers["content-length"]) if body else 0
        while len(self.buffer) < length:
            await self.more()
        content, self.buffer = self.buffer[:length], self.buffer[length:]
        return int(line.split()[1]), headers, content

    async def more(self) -> None:
        data = await self.stream.receive_some()
        assert data, "the server hung up"
        self.buffer += data

    async def ended(self) -> bool:
        return await self.stream.receive_some() == b""


Connect = Callable[[], Any]


@contextlib.asynccontextmanager
async def serving(
    path: Path, text: Callable[[], Sequence[bytes | memoryview]] = lambda: [b"te", memoryview(b"xt\n")]
) -> AsyncIterator[Connect]:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.bind(str(path / "metrics.sock"))
        raw.listen()

        async def connect() -> Scraper:
            stream = await trio.open_unix_socket(str(path / "metrics.sock"))
            return Scraper(await stack.enter_async_context(stream))

        async with contextlib.AsyncExitStack() as stack, trio.open_nursery() as nursery:
            nursery.start_soon(server.serve, [raw], text)
            yield connect
            nursery.cancel_scope.cancel()


GET = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


async def test_a_scrape_brings_the_text(tmp_path: Path) -> None:
    async with serving(tmp_path) as connect:
        scraper = await connect()
        status, headers, body = await scraper.ask(GET)
    assert (status, body) == (200, b"text\n")
    assert headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"


async def test_a_connection_serves_many_scrapes_and_pipelined_ones(tmp_path: Path) -> None:
    numbers = iter(range(100))
    async with serving(tmp_path, lambda: [b"%d" % next(numbers)]) as connect:
        scraper = await connect()
        assert (await scraper.ask(GET))[2] == b"0"
        assert (await scraper.ask(GET + GET))[2] == b"1"
        assert (await scraper.answer())[2] == b"2"


async def test_a_request_may_come_byte_by_byte(tmp_path: Path) -> None:
    async with serving(tmp_path) as connect:
        scraper = await connect()
        for n in range(len(GET)):
            await scraper.stream.send_all(GET[n : n + 1])
            await trio.testing.wait_all_tasks_blocked()
        assert (await scraper.answer())[0] == 200


async def test_head_brings_the_length_and_no_body(tmp_path: Path) -> None:
    async with serving(tmp_path) as connect:
        scraper = await connect()
        request = b"HEAD /metrics HTTP/1.1\r\nConnection: close\r\n\r\n"
        status, headers, _ = await scraper.ask(request, body=False)
        assert (status, headers["content-length"]) == (200, "5")
        assert await scraper.ended()
        assert scraper.buffer == b""


async def test_what_is_not_there_is_404_and_what_is_not_offered_405(tmp_path: Path) -> None:
    async with serving(tmp_path) as connect:
        scraper = await connect()
        assert (await scraper.ask(b"GET / HTTP/1.1\r\n\r\n"))[0] == 404
        assert (await scraper.ask(b"DELETE /nothing HTTP/1.1\r\n\r\n"))[0] == 404
        status, headers, _ = await scraper.ask(b"POST /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n")
        assert (status, headers["allow"]) == (405, "get, head")
        assert (await scraper.ask(GET))[0] == 200, "the connection goes on"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET /metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\nand a body", 413),
        (b"GET /" + b"x" * 9000, 431),
        (b"GET /metrics HTTP/1.1\r\n" + b"X: y\r\n" * 2000 + b"\r\n", 431),
    ],
)
async def test_a_bad_request_is_answered_and_ends_its_connection_only(
    tmp_path: Path, request_: bytes, status: int
) -> None:
    async with serving(tmp_path) as connect:
        bad, good = await connect(), await connect()
        answered, headers, _ = await bad.ask(request_)
        assert (answered, headers["connection"]) == (status, "close")
        assert (await good.ask(GET))[0] == 200


async def test_a_scraper_that_leaves_in_the_middle_harms_nobody(tmp_path: Path) -> None:
    async with serving(tmp_path, lambda: [b"x" * (8 << 20)]) as connect:
        for request in (b"", b"GET /met", GET):
            scraper = await connect()
            await scraper.stream.send_all(request)
            await scraper.stream.aclose()
        assert (await (await connect()).ask(GET))[0] == 200


async def test_a_request_that_does_not_end_runs_out_of_time(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(tmp_path) as connect:
        scraper = await connect()
        status, headers, _ = await scraper.ask(b"GET /metr")
        assert (status, headers["connection"]) == (408, "close")
        assert await scraper.ended()


async def test_a_connection_that_asks_nothing_is_closed_in_the_end(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with serving(tmp_path) as connect:
        silent, former = await connect(), await connect()
        started = trio.current_time()
        assert (await former.ask(b"\r\n\r\n" + GET))[0] == 200, "empty lines may come first"
        assert await silent.ended()
        assert trio.current_time() - started == pytest.approx(server.REQUEST_TIMEOUT)
        assert await former.ended()
        assert trio.current_time() - started == pytest.approx(server.IDLE_TIMEOUT)


async def test_a_scraper_that_does_not_read_is_dropped(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with serving(tmp_path, lambda: [b"x" * (8 << 20)]) as connect:
        scraper = await connect()
        await scraper.stream.send_all(GET)
        await trio.sleep(server.REQUEST_TIMEOUT + 1)
        got = 0
        while data := await scraper.stream.receive_some(1 << 20):
            got += len(data)
        assert got < 8 << 20


async def test_connections_without_end_leave_room_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path) as connect:
        held = [await connect() for _ in range(server.MAX_CONNECTIONS)]
        for scraper in held:
            assert (await scraper.ask(GET))[0] == 200
        assert await (await connect()).ended(), "one too many"
        assert "turned away" in caplog.text
        await held[0].stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        assert (await (await connect()).ask(GET))[0] == 200


async def test_a_client_that_never_stops_sending_leaves_turns_to_others(tmp_path: Path) -> None:
    """Nothing of what it sends has to be waited for."""
    async with serving(tmp_path) as connect:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(tmp_path / "metrics.sock"))
            await trio.testing.wait_all_tasks_blocked()  # it is accepted, and what it asks is waited for
            sock.setblocking(False)
            sent = turns = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    sent += sock.send(b"\r\n" * 2048)
            while int.from_bytes(fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)), sys.byteorder):
                await trio.lowlevel.checkpoint()
                turns += 1
            assert turns > sent // server.MAX_HEAD // 2
        assert (await (await connect()).ask(GET))[0] == 200


async def test_requests_over_tcp_are_acknowledged_before_they_are_answered() -> None:
    """A delayed acknowledgement leaves a timer on the scraper's processor, which costs what runs there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve, [listener], lambda: [b"text\n"])
            stream = await trio.open_tcp_stream(*listener.getsockname())
            async with stream:
                scraper = Scraper(stream)
                await scraper.ask(GET)
                before = segments_in(stream.socket)
                for _ in range(50):
                    assert (await scraper.ask(GET))[2] == b"text\n"
                assert segments_in(stream.socket) - before == 100
            nursery.cancel_scope.cancel()


def segments_in(sock: trio.socket.SocketType) -> int:
    """How many the connection has had."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    return int.from_bytes(info[140:144], sys.byteorder)  # tcpi_segs_in of struct tcp_info, linux/tcp.h


async def test_a_scrape_that_fails_is_logged_and_the_next_one_works(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers = iter([b"", b"text\n"])

    def text() -> list[bytes]:
        answer = next(answers)
        if not answer:
            raise RuntimeError("no text today")
        return [answer]

    async with serving(tmp_path, text) as connect:
        scraper = await connect()
        await scraper.stream.send_all(GET)
        assert await scraper.ended()
        assert "no text today" in caplog.text
        assert (await (await connect()).ask(GET))[0] == 200
