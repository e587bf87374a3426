"""The server of the control socket in this process, where time can be made to pass; and the feed of a trace."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import snapshots as make
import trio
import trio.testing
from faulty_devices import AsyncShout, Shout

from hcd.control import server, settings
from hcd.control.protocol import Call, CallError, encode
from hcd.control.server import LINE_TIMEOUT, SNAPSHOT_BURST, SNAPSHOT_RATE, SNAPSHOT_SHARE, TRACE_TIMEOUT, Pace
from hcd.control.settings import ControlSpec, bind
from hcd.control.snapshot import to_json
from hcd.control.trace import LOST_PAUSE, ROOM, Feed, trace
from hcd.device import Device
from hcd.errors import ConfigError
from hcd.sockets import UnixListener
from hcd.testing import serve


class Calls:
    """What a daemon would do."""

    def __init__(self) -> None:
        self.feed: Feed | None = None
        self.traces = 0

    async def answer(self, call: Call) -> dict[str, Any]:
        if call.name == "reload":
            raise RuntimeError("a defect")
        if call.name == "resize":
            raise CallError("refused", "no")
        return {"answers": True}

    @asynccontextmanager
    async def trace(self, call: Call) -> AsyncIterator[Feed]:
        self.feed = Feed()
        self.traces += 1
        try:
            yield self.feed
        finally:
            self.traces -= 1


@pytest.fixture
async def served(short_dir: Path, nursery: trio.Nursery) -> AsyncIterator[tuple[str, Calls]]:
    calls, listener = Calls(), UnixListener(str(short_dir / "control.sock"))
    nursery.start_soon(server.serve, listener.socket, calls.answer, calls.trace)
    yield listener.path, calls
    nursery.cancel_scope.cancel()
    listener.close()


async def received(stream: trio.SocketStream) -> list[Any]:
    """Everything until the server hangs up; then we do."""
    data = b""
    async with stream:
        while piece := await stream.receive_some(65536):
            data += piece
    return [json.loads(line) for line in data.splitlines()]


async def test_a_line_that_does_not_come_to_an_end_ends_the_connection(
    served: tuple[str, Calls], autojump_clock: trio.testing.MockClock
) -> None:
    stream = await trio.open_unix_socket(served[0])
    await stream.send_all(b'{"call": ')
    began = trio.current_time()
    assert len(await received(stream)) == 1, "the greeting"
    assert trio.current_time() - began == pytest.approx(LINE_TIMEOUT, abs=1)


async def test_a_defect_in_a_call_is_an_answer_and_the_next_call_is_served(
    served: tuple[str, Calls], caplog: pytest.LogCaptureFixture
) -> None:
    stream = await trio.open_unix_socket(served[0])
    await stream.send_all(b'{"call": "reload"}\n{"call": "resize", "device": "x"}\n{"call": "snapshot"}\n')
    await stream.send_eof()
    _, defect, refused, answer = await received(stream)
    assert defect["error"] == {"kind": "failed", "text": "a defect of hcd: RuntimeError: a defect"}
    assert refused["error"] == {"kind": "refused", "text": "no"}
    assert answer == {"result": {"answers": True}}
    assert "a call on the control socket failed" in caplog.text


async def test_a_trace_ends_when_its_reader_hangs_up_although_nothing_happens(
    served: tuple[str, Calls], autojump_clock: trio.testing.MockClock
) -> None:
    """Half a hang-up is none."""
    path, calls = served
    stream = await trio.open_unix_socket(path)
    await stream.send_all(b'{"call": "trace", "device": "x", "id": 1}\n')
    await stream.send_eof()
    await stream.receive_some()
    await trio.sleep(60)
    assert calls.traces == 1
    assert calls.feed is not None
    calls.feed.put("request", text="read")
    event = json.loads(await stream.receive_some())
    assert (event["id"], event["event"]["text"]) == (1, "read")
    await stream.aclose()
    await trio.sleep(5)
    assert calls.traces == 0


async def test_a_trace_whose_reader_takes_nothing_is_given_up(
    served: tuple[str, Calls], autojump_clock: trio.testing.MockClock
) -> None:
    path, calls = served
    stream = await trio.open_unix_socket(path)
    await stream.send_all(b'{"call": "trace", "device": "x"}\n')
    await stream.receive_some()
    await trio.sleep(1)
    assert calls.feed is not None
    for _ in range(20):
        for _ in range(ROOM):
            calls.feed.put("request", text="x" * 100)
        await trio.sleep(0.1)
    await trio.sleep(TRACE_TIMEOUT + 5)
    assert calls.traces == 0
    await stream.aclose()


async def test_snapshots_have_a_pace_that_a_person_does_not_notice(autojump_clock: trio.testing.MockClock) -> None:
    pace = Pace(SNAPSHOT_RATE, SNAPSHOT_SHARE, SNAPSHOT_BURST)
    await trio.sleep(100)
    began = trio.current_time()
    for _ in range(SNAPSHOT_BURST):
        await pace.wait()
    assert trio.current_time() - began < 0.1
    for _ in range(40):
        await pace.wait()
    assert trio.current_time() - began == pytest.approx(40 / SNAPSHOT_RATE, rel=0.1)
    pace.took(0.1)
    await pace.wait()
    began = trio.current_time()
    await pace.wait()
    assert trio.current_time() - began == pytest.approx(0.1 / SNAPSHOT_SHARE)


# -- the feed


async def test_a_feed_keeps_its_order_and_tells_what_it_dropped_in_its_place() -> None:
    feed = Feed()
    for number in range(ROOM + 7):
        feed.put("request", number=number)
    lines = await feed.take()
    assert [line["number"] for line in lines[:ROOM]] == list(range(ROOM))
    assert (lines[ROOM]["what"], lines[ROOM]["lines"]) == ("lost", 7)
    feed.put("request", number=1)
    assert [line["what"] for line in await feed.take()] == ["request"]


async def test_a_feed_admits_so_many_a_second(autojump_clock: trio.testing.MockClock) -> None:
    """What was lost is told of even if nothing comes after it."""
    now = 50.0
    feed = Feed(10, clock=lambda: now)
    assert sum(feed.admits() for _ in range(100)) == 10
    began = trio.current_time()
    assert [(line["what"], line["lines"]) for line in await feed.take()] == [("lost", 90)]
    assert trio.current_time() - began <= LOST_PAUSE + 0.1
    now += 0.55
    assert sum(feed.admits() for _ in range(100)) == 5


def test_a_large_snapshot_is_written_down_without_copies_of_it() -> None:
    """What goes over the socket is what the shape says."""
    whole = make.snapshot(*(make.device(f"d{number}") for number in range(3)))
    assert json.loads(encode({"result": whole}))["result"] == json.loads(json.dumps(to_json(whole)))


# -- who may connect


@pytest.mark.parametrize(
    ("spec", "mode"),
    [(ControlSpec("x"), 0o660), (ControlSpec("x", mode=0o600), 0o600), (ControlSpec("x", mode=0o666), 0o666)],
)
def test_the_socket_has_the_permissions_of_the_configuration(spec: ControlSpec, mode: int, short_dir: Path) -> None:
    made = bind(spec, str(short_dir / "control.sock"))
    status = Path(made.path).stat()
    made.close()
    assert (status.st_mode & 0o777, status.st_gid) == (mode, os.getegid())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give groups away")
def test_the_group_of_a_directory_is_not_let_in_by_accident(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/run/hcd is set-group-id for QEMU's group, and the units may not change groups."""
    os.chown(short_dir, -1, 12345)
    short_dir.chmod(0o2755)

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "chown", refuse)
        made = bind(ControlSpec(), str(short_dir / "control.sock"))
    status = Path(made.path).stat()
    made.close()
    assert (status.st_mode & 0o777, status.st_gid) == (0o600, 12345)
    made = bind(ControlSpec(), str(short_dir / "control.sock"))
    status = Path(made.path).stat()
    made.close()
    assert (status.st_mode & 0o777, status.st_gid) == (0o660, os.getegid())


def test_a_directory_in_tmp_that_somebody_else_made_is_not_used(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "TEMPORARY", str(short_dir))
    path = short_dir / "hcd-1000" / "control.sock"
    bind(ControlSpec(), str(path)).close()
    path.parent.chmod(0o777)
    with pytest.raises(ConfigError, match="belongs to somebody else"):
        bind(ControlSpec(), str(path))
    path.parent.rmdir()
    path.parent.symlink_to("/tmp")
    with pytest.raises(ConfigError, match="belongs to somebody else"):
        bind(ControlSpec(), str(path))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (ControlSpec("x", owner="no-such-account"), '[control] owner: there is no account "no-such-account"'),
        (ControlSpec("x", group="no-such-group"), '[control] group: there is no group "no-such-group"'),
    ],
)
def test_accounts_that_are_not_there_are_named(spec: ControlSpec, said: str, short_dir: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        bind(spec, str(short_dir / "control.sock"))
    assert str(caught.value) == said
    assert list(short_dir.iterdir()) == [], "nothing stays behind"


# -- off means off


@pytest.mark.parametrize("kind", [Shout, AsyncShout])
def test_without_a_trace_the_queues_have_no_hooks(kind: type[Device]) -> None:
    """On both lanes; they come and go while a front end is connected, and are there for the next one."""
    with serve(kind) as served:

        def hooks() -> set[bool]:
            assert served.host.session is not None
            queues = served.host.session.queues()
            return {queue.on_take is not None or queue.on_settle is not None for queue in queues}

        async def traced() -> list[str]:
            async with trace(served.host) as feed:
                seen.append(hooks())
                return [line["what"] for line in await feed.take()]

        seen: list[set[bool]] = []
        with served.driver() as driver:
            assert driver.ask(b"a", 8) == b"A"
            assert hooks() == {False}
            told = trio.from_thread.run(traced, trio_token=served._token)
            assert told == ["tracing"]
            assert seen == [{True}]
            assert hooks() == {False}
            assert served.host.observers == []
            assert driver.ask(b"b", 8) == b"B"
