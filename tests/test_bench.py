"""hcd bench: loads against real back ends, its errors, and what is made of the figures. Nothing here is timed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hcd_protocols.virtio.net import header_size
from tables import table

from hcd import cli
from hcd.bench import backends, blk, cases, compare, extra, net, results
from hcd.bench.extra_scale import memory_of
from hcd.bench.load import READ, WRITE_ALL, BlkLoad
from hcd.bench.netload import NetLoad
from hcd.bench.second import SecondFrontend
from hcd.demo.hcd_process import HcdProcess
from hcd.errors import ConfigError, HcdError
from hcd.frontend.blk import BLOCK_FEATURES
from hcd.frontend.client import Frontend
from hcd.frontend.errors import BackendError
from hcd.frontend.net import NET_FEATURES, NetDriver

pytestmark = pytest.mark.long


DISK = table("disk", "blk", ram="2M", num_queues=2)
READ_ONLY = table("disk", "blk", blk_file="{dir}/image", read_only=True)
CARDS = table("a", "net") + table("b", "net") + table("c", "net")
SHORT = 0.05
BLK_FIELDS = {
    "requests", "seconds", "per_second", "p50", "p99", "p999", "kicks_per_request", "calls_per_request", "errors",
    "mismatches", "longest_gap", "cpu_per_million", "peak_memory", "case",
}
NET_FIELDS = {
    "sent", "received", "dropped", "wrong", "strangers", "seconds", "sent_per_second", "received_per_second", "p50",
    "p99", "p999", "kicks_per_frame", "calls_per_frame", "cpu_per_million", "peak_memory", "case",
}

StartHcd = Callable[..., HcdProcess]


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run ``hcd bench ...``: exit status, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(["bench", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


Bench = Callable[..., tuple[int, str, str]]


# -- blk


@pytest.mark.parametrize("rw", ["read", "write", "mix"])
@pytest.mark.parametrize("ring", [[], ["--packed"], ["--no-event-idx"], ["--packed", "--no-event-idx"], ["--poll"]])
def test_every_kind_of_ring_moves_what_was_written(
    start_hcd: StartHcd, short_dir: Path, bench: Bench, ring: list[str], rw: str
) -> None:
    start_hcd(DISK)
    words = ["blk", "--socket", f"{short_dir}/disk.sock", "--seconds", str(SHORT), "--verify", "--json", "--rw", rw]
    status, out, err = bench(*words, "--queues", "2", "--depth", "8", *ring)
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert set(found) == BLK_FIELDS
    assert found["requests"] > 0
    assert (found["errors"], found["mismatches"]) == (0, 0)
    assert 0 < found["p50"] <= found["p99"] <= found["p999"]
    assert found["longest_gap"] > 0
    assert found["peak_memory"] > 2 << 20
    assert found["case"]["depth"] == 8


def test_the_back_end_counts_as_many_requests_as_the_load(start_hcd: StartHcd, short_dir: Path) -> None:
    hcd = start_hcd(DISK)
    with Frontend.open(f"{short_dir}/disk.sock", size=128, device=int(BLOCK_FEATURES)) as frontend:
        load = BlkLoad([frontend.queues[0]], 16, 4096, 1 << 20, READ, False, False)
        load.run(SHORT)
        load.sweep(WRITE_ALL)
        counts = load.counts()
    metrics = hcd.metrics()
    assert metrics.total("hcd_requests_total", device="disk", op="write") == 256
    assert metrics.total("hcd_requests_total", device="disk", op="read") == counts["requests"] - 256
    assert metrics.total("hcd_doorbell_rings_total", device="disk") == counts["kicks"]
    assert metrics.total("hcd_interrupts_total", device="disk", outcome="sent") >= counts["calls"]


def test_verify_finds_a_byte_that_was_changed(start_hcd: StartHcd, short_dir: Path) -> None:
    image = short_dir / "image"
    image.write_bytes(bytes(1 << 20))
    start_hcd(table("disk", "blk", blk_file="{dir}/image"))
    with Frontend.open(f"{short_dir}/disk.sock", size=128, device=int(BLOCK_FEATURES)) as frontend:
        load = BlkLoad([frontend.queues[0]], 16, 4096, 1 << 20, READ, False, True)
        load.sweep(WRITE_ALL)
        with image.open("r+b") as file:
            file.seek(5000)
            file.write(b"?")
        load.sweep(READ)
        assert load.counts()["mismatches"] == 1


def test_the_table_for_people(start_hcd: StartHcd, short_dir: Path, bench: Bench) -> None:
    start_hcd(DISK)
    status, out, _ = bench("blk", "--socket", f"{short_dir}/disk.sock", "--seconds", str(SHORT))
    assert status == 0
    names = [line.partition("  ")[0] for line in out.splitlines()]
    assert names[:2] == ["requests/s", "latency p50 p99 p99.9"]
    assert "back end: CPU s per million requests" in names


def test_buffers_in_many_regions(start_hcd: StartHcd, short_dir: Path) -> None:
    start_hcd(DISK)
    for count in (1, 8, 64):
        with memory_of(count, 64, 4096) as memory:
            case = blk.BlkCase(f"{short_dir}/disk.sock", depth=64, seconds=SHORT, verify=True)
            result = blk.run(case, memory)
            used = sum(1 for region in memory.regions if len(region._taken))
        assert used == count
        assert (result.errors, result.mismatches) == (0, 0)


# -- errors are one line and status 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--queues", "3"], "the back end has 2 queue(s), not 3"),
        (["--size", "4M"], "too small for requests of 4194304"),
        (["--span", "1K"], "a span of 1024 bytes is too small for requests of 4096"),
        (["--depth", "1024"], "queue 0 of 4096 entries cannot be started"),
        (["--size", "1000"], "expected a multiple of 512"),
        (["--depth", "64", "--ring-size", "128"], "needs a ring of 192 entries"),
        (["--pin", "8000"], "--pin 8000"),
    ],
)
def test_what_a_back_end_cannot_take(
    start_hcd: StartHcd, short_dir: Path, bench: Bench, words: list[str], message: str
) -> None:
    start_hcd(DISK)
    status, out, err = bench("blk", "--socket", f"{short_dir}/disk.sock", "--seconds", str(SHORT), *words)
    assert (status, out) == (1, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_back_end_that_dies_is_told_from_one_that_is_silent(start_hcd: StartHcd, short_dir: Path) -> None:
    """Both answer nothing."""
    hcd = start_hcd(DISK)
    with Frontend(f"{short_dir}/disk.sock") as frontend:
        with pytest.raises(TimeoutError), blk.naming_the_dead(frontend):
            raise TimeoutError("no answer")
        hcd.kill()
        frontend.wait_hangup(20)
        with pytest.raises(BackendError, match="hung up under load"), blk.naming_the_dead(frontend):
            raise TimeoutError("no answer")
        with pytest.raises(BackendError, match="a port hung up"), blk.naming_the_dead(frontend, "a port"):
            pass  # nobody waited for it


@pytest.mark.parametrize("words", [["--rw", "write"], ["--rw", "mix"], ["--verify"]])
def test_a_read_only_disk_is_not_written_to(
    start_hcd: StartHcd, short_dir: Path, bench: Bench, words: list[str]
) -> None:
    (short_dir / "image").write_bytes(bytes(1 << 20))
    start_hcd(READ_ONLY)
    status, _, err = bench("blk", "--socket", f"{short_dir}/disk.sock", "--seconds", str(SHORT), *words)
    assert (status, "read-only" in err, err.count("\n")) == (1, True, 1)


@pytest.mark.parametrize("kind", ["blk", "net"])
def test_nobody_listens(short_dir: Path, bench: Bench, kind: str) -> None:
    status, out, err = bench(kind, "--socket", f"{short_dir}/none.sock")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert "cannot connect" in err


@pytest.mark.parametrize(
    "words",
    [["blk"], ["blk", "--socket", "x", "--depth", "0"], ["blk", "--socket", "x", "--rw", "erase"],
     ["net", "--socket", "x", "--seconds", "-1"], ["blk", "--socket", "x", "--size", "much"], []],
)
def test_usage_errors(bench: Bench, words: list[str]) -> None:
    status, _, err = bench(*words)
    assert (status, err.count("\n")) == (2, 1)


def test_a_device_that_fails_requests_is_an_error(start_hcd: StartHcd, short_dir: Path, bench: Bench) -> None:
    """The file is cut behind the daemon's back: reads past its new end fail."""
    image = short_dir / "image"
    image.write_bytes(bytes(1 << 20))
    start_hcd(READ_ONLY)
    image.write_bytes(b"")
    status, out, err = bench("blk", "--socket", f"{short_dir}/disk.sock", "--seconds", str(SHORT), "--json")
    assert status == 1
    assert json.loads(out)["errors"] > 0
    assert "errors" in err


# -- net


@pytest.mark.parametrize("ring", [[], ["--packed"], ["--no-event-idx"], ["--poll", "--packed"]])
@pytest.mark.parametrize("size", [60, 64, 1514])
def test_frames_arrive_whole_and_in_order(
    start_hcd: StartHcd, short_dir: Path, bench: Bench, ring: list[str], size: int
) -> None:
    start_hcd(CARDS)
    words = ["net", "--socket", f"{short_dir}/a.sock", "--peer", f"{short_dir}/b.sock", "--seconds", str(SHORT)]
    status, out, err = bench(*words, "--verify", "--json", "--size", str(size), *ring)
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert set(found) == NET_FIELDS
    assert found["sent"] == found["received"] > 0
    assert (found["dropped"], found["wrong"], found["strangers"]) == (0, 0, 0)


def test_both_directions_at_once(start_hcd: StartHcd, short_dir: Path) -> None:
    start_hcd(CARDS)
    found = net.run(net.NetCase(f"{short_dir}/a.sock", f"{short_dir}/b.sock", seconds=SHORT, duplex=True, verify=True))
    assert found.sent == found.received > 0
    assert (found.dropped, found.wrong) == (0, 0)


def test_without_a_peer_frames_are_sent_and_not_waited_for(start_hcd: StartHcd, short_dir: Path, bench: Bench) -> None:
    start_hcd(CARDS)
    status, out, _ = bench("net", "--socket", f"{short_dir}/a.sock", "--seconds", str(SHORT))
    assert status == 0
    assert out.startswith("frames/s sent")
    found = net.run(net.NetCase(f"{short_dir}/a.sock", seconds=SHORT))
    assert (found.sent > 0, found.received, found.dropped) == (True, 0, 0)


@pytest.mark.parametrize("dies", ["a", "b"])
def test_the_port_that_dies_under_load_is_named(start_hcd: StartHcd, short_dir: Path, dies: str) -> None:
    """Of two back ends; nothing waits for the one that only receives."""
    (short_dir / "b").mkdir()
    other = HcdProcess.from_config(short_dir / "b", table("b", "net"))
    try:
        ports = {"a": start_hcd(table("a", "net")), "b": other}
        killer = threading.Timer(0.5, ports[dies].kill)
        killer.start()
        with pytest.raises(BackendError, match=f"/{dies}.sock hung up under load"):
            net.run(net.NetCase(f"{short_dir}/a.sock", f"{short_dir}/b/b.sock", seconds=1.5))
        killer.join()
    finally:
        other.kill()


def test_two_directions_need_two_ports(short_dir: Path, bench: Bench) -> None:
    status, _, err = bench("net", "--socket", f"{short_dir}/a.sock", "--duplex")
    assert (status, err.count("\n"), "--peer" in err) == (1, 1, True)


def card(path: Path) -> Frontend:
    frontend = Frontend(str(path))
    frontend.negotiate(device=int(NET_FEATURES))
    blk.start(frontend, 2, 64)
    return frontend


def test_frames_that_never_arrive_count_as_dropped(start_hcd: StartHcd, short_dir: Path) -> None:
    """The receive queue belongs to a card that no frame is sent to: the hub knows where the station really is."""
    start_hcd(CARDS)
    station, wrong = b"\x02\0\0\0\0\x0b", b"\x02\0\0\0\0\x0a"
    with card(short_dir / "a.sock") as a, card(short_dir / "b.sock") as b, card(short_dir / "c.sock") as c:
        driver = NetDriver(b.memory, b.queues[0], b.queues[1], features=b.features)
        driver.send(station * 2 + b"\x88\xb6" + bytes(50))
        load = NetLoad([(a.queues[1], c.queues[0], station, wrong)], 8, 64, header_size(a.features), False, True)
        load.send_some(0, 20)
        counts = load.counts(0)
        arrived = driver.pending()
    assert (counts["sent"], counts["received"], counts["dropped"]) == (20, 0, 20)
    assert len(arrived) == 20


# -- other back ends, other front ends


@pytest.mark.guest
@pytest.mark.parametrize("aio", ["io_uring", "threads"])
def test_qemu_storage_daemon_is_loaded_unchanged(
    tmp_path: Path, short_dir: Path, need: Callable[..., None], bench: Bench, aio: str
) -> None:
    need(backends.QSD)
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    image = backends.Image(path, 1 << 20, "unknown")
    with backends.qsd(short_dir, "qsd", image, min(os.sched_getaffinity(0)), aio=aio, queues=2) as running:
        case = blk.BlkCase(str(running.socket), depth=8, queues=2, rw="mix", seconds=SHORT, verify=True)
        found = blk.run(case)
        assert (found.errors, found.mismatches) == (0, 0)
        assert found.requests > 0
        assert found.peak_memory > 0
        status, _, err = bench("blk", "--socket", str(running.socket), "--packed")
        assert (status, err.count("\n")) == (1, 1)
        assert "does not offer RING_PACKED" in err
    assert path.read_bytes() != bytes(1 << 20)


def test_the_second_front_end(start_hcd: StartHcd, short_dir: Path, need: Callable[..., None]) -> None:
    need("gcc")
    hcd = start_hcd(DISK)
    second = SecondFrontend(short_dir)
    for rw in ("read", "write"):
        found = second.run(short_dir / "disk.sock", rw=rw, depth=4, size=4096, seconds=SHORT)
        assert found.requests > 0
        assert 0 < found.p50 <= found.p99
    metrics = hcd.metrics()
    assert metrics.total("hcd_requests_total", device="disk", op="write", status="ok") > 0
    with pytest.raises(HcdError, match="cannot connect"):
        second.run(short_dir / "none.sock", rw="read", depth=1, size=4096, seconds=SHORT)


# -- the comparison


def test_cases_are_chosen_by_pattern() -> None:
    assert [case.name for case in cases.choose("read-4k-d1,*-64k-*")] == [
        "read-4k-d1", "read-64k-d16", "write-64k-d16",
    ]
    assert len(cases.choose("*")) == len(cases.CASES) == len({case.name for case in cases.CASES})
    with pytest.raises(ConfigError, match="no case is called nothing"):
        cases.choose("read-4k-d1,nothing")


def test_ratios_are_paired() -> None:
    assert compare.ratio([10, 30, 20], [10, 10, 10]) == compare.Ratio(2.0, 1.0, 3.0)
    assert compare.ratio([10, 100], [5, 50]) == compare.Ratio(2.0, 2.0, 2.0)
    assert math.isnan(compare.ratio([1.0, math.nan], [1.0, 1.0]).median)


def result() -> compare.CaseResult:
    case = cases.Case("read-x", "read", 1, backends=("hcd", "other"))
    run = {"per_second": 200.0, "p50": 1e-5, "p99": 2e-5, "cpu_per_million": math.nan}
    runs = {"hcd": [run, run], "other": [run | {"per_second": 100.0}] * 2}
    one = compare.Ratio(2.0, 1.9, 2.1)
    ratios = {"other": dict.fromkeys(compare.COMPARED, one) | {"cpu_per_million": compare.Ratio(*[math.nan] * 3)}}
    return compare.CaseResult(case, runs, ratios)


def test_the_documents_table_shows_median_and_spread() -> None:
    text = results.table({"date": "2026-01-01", "empty": ""}, [result()])
    assert "- date: 2026-01-01" in text
    assert "empty" not in text
    row = text.splitlines()[-1]
    assert "| read-x | hcd / other | 200 / 100 | **2.00** (1.90 to 2.10) |" in row
    assert row.endswith("| nan / nan | - |")


def test_the_json_file_has_every_round_and_keeps_the_other_part(tmp_path: Path) -> None:
    path = tmp_path / "bench" / "results.json"
    measured = extra.judged("idle", "3/s", "< 5/s", True, rate=3.0)
    results.write_json(path, {"date": "x"}, [result()], ())
    results.write_json(path, {"date": "y"}, (), [measured])
    found = json.loads(path.read_text())
    assert found["environment"] == {"date": "y"}
    assert len(found["cases"][0]["runs"]["hcd"]) == 2
    assert found["cases"][0]["runs"]["hcd"][0]["cpu_per_million"] is None
    assert found["extra"][0]["verdict"] == "met"


def test_marks_keep_the_rest_of_the_document(tmp_path: Path) -> None:
    path = tmp_path / "performance.md"
    path.write_text("# Performance\n\nmethod\n")
    for content in ("first\n", "second\n"):
        results.write_docs(path, "comparison", content)
    results.write_docs(path, "single", "third\n")
    text = path.read_text()
    assert text.startswith("# Performance\n\nmethod\n")
    assert "first" not in text
    assert text.index("second") < text.index("third")


def test_single_measurements_are_chosen_by_pattern() -> None:
    assert [one.name for one in extra.choose("idle,hub")] == ["idle", "hub"]
    with pytest.raises(ConfigError, match="nothing is called x"):
        extra.choose("x")


def test_a_handler_of_a_plug_in_is_measured(tmp_path: Path, short_dir: Path) -> None:
    """The whole way of one measurement: a distribution, a daemon with it, a load, rows with a verdict."""
    rows = extra.run(extra.choose("handler"), short_dir, rounds=1, seconds=SHORT, say=lambda _: None)
    assert len(rows) == 4
    assert all(row.numbers["per_second"] > 0 for row in rows)
    assert {row.verdict for row in rows} <= {"met", "MISSED", ""}


def test_no_request_fails_while_devices_come_and_go_beside_a_busy_one(short_dir: Path) -> None:
    """At depth 32, by what measures the gaps; how long they are is not judged here."""
    (row,) = extra.run(extra.choose("reload"), short_dir, rounds=1, seconds=0.4, say=lambda _: None)
    assert row.numbers["failed"] == 0
    assert row.numbers["reloads"] >= 2
    assert row.numbers["beside"] > 0


# -- probing


def test_print_capabilities_imports_no_trio() -> None:
    """A management layer probes often: what a probe imports is what it waits for."""
    code = (
        "import sys; from hcd import cli; status = cli.main(['device', 'blk', '--print-capabilities']);"
        "print(sorted({name.partition('.')[0] for name in sys.modules})); sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded: list[Any] = json.loads(done.stdout.splitlines()[1].replace("'", '"'))
    assert "hcd" in loaded
    assert not {"trio", "prometheus_client"} & set(loaded)
