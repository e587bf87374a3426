"""What is shown of a snapshot: pure functions, no daemon."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from snapshots import device, doorbell, peer, queue, snapshot, times

from hcd.control.snapshot import Errors, LastReload, Snapshot, from_json, to_json
from hcd.views import text
from hcd.views.doorbells import doorbells
from hcd.views.problems import find_problems
from hcd.views.status import DEVICE_COLUMNS, QUEUE_COLUMNS, status
from hcd.views.top import COLUMNS, WIDTH, activities, top
from hcd.views.trace import trace_line

# -- the shape


def full() -> Snapshot:
    return snapshot(device(), device("net0", peer=None, queues=[]), reload=LastReload(990.0, False, "no"))


def test_a_snapshot_survives_the_wire() -> None:
    assert from_json(json.loads(json.dumps(to_json(full())))) == full()


def test_keys_of_a_later_version_are_ignored() -> None:
    data = to_json(full())
    data["moon"] = "full"
    data["devices"][0]["queues"][0]["moon"] = [1]
    assert from_json(data) == full()


@pytest.mark.parametrize("spoil", [{}, {"devices": [{}]}, {"devices": 3}, {"reload": 1}])
def test_what_is_no_snapshot_is_refused(spoil: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a snapshot"):
        from_json({**to_json(full()), **spoil} if spoil else {})


# -- problems


def test_all_is_well_with_a_busy_healthy_daemon() -> None:
    assert find_problems(snapshot(device(queues=[queue(inflight=32, oldest=0.5)]))) == []


def test_errors_of_the_past_are_no_present_problem() -> None:
    assert find_problems(snapshot(device(errors=Errors(3, 4, 5)))) == []


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (snapshot(answers=False), "does not answer"),
        (snapshot(unserved=["disk7"]), "disk7: is in the configuration and is not served"),
        (snapshot(reload=LastReload(940.0, False, "a: b\nc: d")), "the last reload, 60 s ago, was refused; all is as"),
        (snapshot(device(path_conflict=True)), "disk0: QEMU says another path"),
        (snapshot(device(queues=[queue(oldest=34.2)])), "disk0: queue 0: a request has been in flight for 34 s"),
        (snapshot(device(queues=[queue(state="broken", broken="a loop")])), "disk0: queue 0: a loop; no requests"),
        (snapshot(device(queues=[queue(state="draining", inflight=3)])), "is being stopped and waits for 3 requests"),
        (snapshot(device(doorbells=[doorbell(registered=False)])), "doorbell 0: the VMM could not register it"),
    ],
)
def test_what_is_wrong_is_said_once_with_its_place(shown: Snapshot, expected: str) -> None:
    (problem,) = find_problems(shown)
    assert expected in problem


# -- status


def test_status_begins_with_the_daemon_and_what_is_wrong() -> None:
    lines = status(snapshot(device(), device("net0", peer=None), unserved=["x"]))
    assert lines[0] == "hcd 0.1.0, pid 42, up 15 min, /etc/hcd/hcd.toml: 2 devices, 1 connected"
    assert lines[1] == "wrong:"
    assert lines[2].startswith("    x: is in the configuration")
    assert status(snapshot(device()))[1] == "all is well"


def test_status_has_a_row_for_each_device_and_each_live_queue() -> None:
    idle = device("net0", peer=None, queues=[queue(state="none", requests={})], capacity=None)
    lines = status(snapshot(device(), idle))
    devices = lines.index("") + 1
    assert lines[devices].split("  ")[0] == "DEVICE"
    assert lines[devices + 1].split() == [
        "disk0", "blk", "qemu-system-x86", "(4711)", "mmio", "qmp", "10", "0", "0", "1.0G", "/run/hcd/disk0.sock",
    ]
    assert lines[devices + 2].split()[:3] == ["net0", "blk", "-"]
    queues = lines.index("", devices) + 1
    assert lines[queues + 1].split() == [
        "disk0", "0", "running", "split", "128", "0", "-", "10", "0", "10", "us", "10", "us",
    ]
    assert not lines[queues + 2 : queues + 3] or not lines[queues + 2].startswith("net0")


def test_status_tells_what_was_negotiated_and_whose_errors_there_were() -> None:
    shown = "\n".join(status(snapshot(device(errors=Errors(1, 2, 0)))))
    assert "disk0: connected for 100 s" in shown
    assert "features: EVENT_IDX VERSION_1" in shown
    assert "protocol: MQ" in shown
    assert "disk0: errors since the start: 1 of the front end, 2 of the guest" in shown


def test_a_threshold_of_its_own_says_when_a_request_is_stuck() -> None:
    slow = [queue(oldest=12.0, inflight=1)]
    assert find_problems(snapshot(device(queues=slow))) == []
    assert find_problems(snapshot(device(queues=slow, stuck_after=0.0))) == []
    assert len(find_problems(snapshot(device(queues=slow, stuck_after=10.0)))) == 1


def test_status_tells_of_limits_and_what_they_do() -> None:
    limited = device(limits={"requests_per_second": 100}, queues=[queue(throttled=2.5), queue(throttled=1.0)])
    assert "disk0: limits: requests_per_second=100; they have held it back for 2.5 s" in status(snapshot(limited))


def test_names_that_others_chose_steer_no_terminal() -> None:
    evil = device(peer=peer(command="\x1b[2Jroot\n"), queues=[queue(state="broken", broken="\x07bell")])
    for lines in (status(snapshot(evil)), top(None, snapshot(evil)), doorbells(snapshot(evil))):
        assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("columns", [DEVICE_COLUMNS, QUEUE_COLUMNS])
def test_columns_have_names_of_their_own(columns: tuple[str, ...]) -> None:
    assert len(set(columns)) == len(columns)


# -- doorbells


def test_doorbells_tell_the_path_its_source_and_how_quickly_they_are_answered() -> None:
    bells = [doorbell(), doorbell(path="unknown", current=False, rings=1), doorbell(name="1", registered=False)]
    header, *rows = doorbells(snapshot(device(doorbells=bells)))
    assert header.split() == ["DEVICE", "QUEUE", "PATH", "SOURCE", "KIND", "ADDRESS", "RINGS", "WAKEUPS", "P50", "P99"]
    assert rows[0].split() == ["disk0", "0", "mmio", "qmp", "modern", "-", "7", "6", "20", "us", "20", "us"]
    assert rows[1].split()[2:4] == ["unknown", "before"]
    assert rows[2].split()[3] == "refused"


# -- top


def later(seconds: float = 2.0) -> tuple[Snapshot, Snapshot]:
    """Two devices, of which "slow" had the longer requests and "quick" the more."""
    before = snapshot(device("quick"), device("slow"))
    quick = queue(requests={"read": [1010, 0, 0]}, bytes_to_guest=5130 + (2 << 20), latency=times(1010, 10e-6))
    slow = queue(requests={"read": [20, 4, 0]}, inflight=3, latency=replace(times(24, 0.5, 20), sum=2.0 + 100e-6))
    now = snapshot(
        device("quick", queues=[quick], doorbells=[doorbell(rings=107)]), device("slow", queues=[slow]),
        now=before.now + seconds,
    )
    return before, now


def test_top_shows_what_went_on_between_two_snapshots_the_busiest_first() -> None:
    slow, quick = activities(*later())
    assert (slow.name, quick.name) == ("slow", "quick")
    assert slow.load == pytest.approx(1.0)
    assert (slow.errors, slow.inflight) == (4, 3)
    assert slow.p99 == pytest.approx(2**30 / 1e9)
    assert quick.requests == pytest.approx(500)
    assert quick.rings == pytest.approx(50)
    assert quick.to_guest == pytest.approx(1 << 20)
    assert quick.p99 == pytest.approx(2**14 / 1e9)


def test_top_fits_a_terminal_whatever_there_is_to_show() -> None:
    counts = {"read": [10**12, 10**9, 0]}
    huge = queue(requests=counts, inflight=1024, bytes_to_guest=10**15, latency=times(10**12, 3.0, 22))
    names = [f"a-device-with-a-long-name-{i}" for i in range(40)]
    before = snapshot(*(device(name, type="a-long-type") for name in names))
    bells = [doorbell(path="hypercall", rings=10**10)]
    now = snapshot(*(device(name, type="a-long-type", queues=[huge], doorbells=bells) for name in names), now=1001.0)
    lines = top(before, now, 24)
    assert max(map(len, lines)) <= WIDTH
    assert len(lines) == 24
    assert lines[-1] == "... and 20 more"
    assert all(column in lines[2] for column in COLUMNS), lines[2]


def test_top_shows_a_problem_above_the_table() -> None:
    before, now = later()
    assert top(before, replace(now, answers=False))[1].startswith("! the thread that serves the rings does not answer")


def test_top_begins_anew_with_another_daemon_and_with_another_device_of_the_same_name() -> None:
    before, now = later()
    assert sum(one.errors for one in activities(before, now)) == 4
    restarted = snapshot(device("slow"), pid=43, started=1001.0, now=1002.0)
    (one,) = activities(before, restarted)
    assert one.requests == pytest.approx(10)
    replaced = snapshot(device("quick", queues=[queue(requests={"read": [4, 0, 0]})], doorbells=[]), now=1002.0)
    (one,) = activities(before, replaced)
    assert one.requests == pytest.approx(2)
    assert one.rings == 0


# -- trace


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        ({"what": "request", "queue": 1, "number": 7, "text": "read sector 8"}, "queue 1 #7: read sector 8"),
        (
            {"what": "done", "queue": 1, "number": 7, "op": "read", "status": "ok", "written": 513, "seconds": 4e-5},
            "queue 1 #7: read ok, wrote 513, 40 us",
        ),
        ({"what": "message", "direction": "in", "text": "SET_OWNER"}, "-> SET_OWNER"),
        ({"what": "message", "direction": "out", "text": "SET_OWNER ok"}, "<- SET_OWNER ok"),
        ({"what": "message", "direction": "back", "text": "CONFIG"}, "<= back channel: CONFIG"),
        ({"what": "lost", "lines": 12}, "... 12 lines more were dropped"),
        ({"what": "connected", "pid": 5, "command": "q\x1b"}, "front end connected (pid 5 q\\x1b)"),
        ({"what": "tracing", "device": "d", "pid": None}, "tracing d, no front end is connected"),
        ({"what": "of later", "x": 1}, "{'at': 0.25, 'what': 'of later', 'x': 1}"),
    ],
)
def test_a_trace_has_a_line_for_each_event(event: dict[str, object], expected: str) -> None:
    line = trace_line({"at": 0.25, **event})
    assert line.partition(" ")[0].endswith(":00.250000")
    assert line.partition(" ")[2] == expected


# -- numbers


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (None, "-"), (0, "-"), (3e-7, "0.3 us"), (9.94e-6, "9.9 us"), (12e-6, "12 us"), (0.0034, "3.4 ms"),
        (0.9996, "1.0 s"), (34, "34 s"), (119, "119 s"), (300, "5 min"), (86400 * 3, "3 d 0 h"),
    ],
)  # fmt: skip
def test_durations_are_short(seconds: float | None, expected: str) -> None:
    assert text.duration(seconds) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [(None, "-"), (0, "0B"), (1023, "1023B"), (1024, "1.0K"), (1 << 30, "1.0G"), (150 << 20, "150M")],
)
def test_sizes_are_short(size: float | None, expected: str) -> None:
    assert text.bytes_(size) == expected
