"""The path experiment: on the real /dev/kvm with a real hcd, and its parts without either."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import skip_or_fail

from hcd.demo.hcd_process import HcdProcess, Metrics, Resources
from hcd.errors import ConfigError
from hcd.kvm.attach import Attachment
from hcd.kvm.vm import Kvm
from hcd.lab import cli as lab_cli
from hcd.lab import code, facts, plot, report, results
from hcd.lab.child import VmmFailed, VmmProcess
from hcd.lab.devices import configuration
from hcd.lab.experiment import ROUNDS, Experiment
from hcd.lab.machine import Machine, Ring
from hcd.lab.metrics import Scrape, histogram_rows, interpolate
from hcd.lab.results import EXIT, HISTORY, RING, TRIP, Count, Report, Row
from hcd.lab.vmm import hypercall_instruction

pytestmark = pytest.mark.long


KERNEL_BELLS = {("pio", "fixed"), ("mmio", "datamatch"), ("mmio", "any-length")}


@pytest.fixture
def kvm() -> None:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        skip_or_fail("no usable /dev/kvm")


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The experiment keeps its result here, and a daemon finds it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "hcd/lab.json"


def hcd_lab(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hcd", "lab", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


def for_ever(function: Callable[..., object], *arguments: object, **options: object) -> None:
    while True:
        function(*arguments, **options)


def rows_of(document: dict[str, Any], measure: str) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["path"], row["kind"]): row for row in document["rows"] if row["measure"] == measure}


# -- the whole


def check(document: dict[str, Any], rings: int, trips: int) -> None:
    """What holds on any host: counts agree, every path has a row with figures or a reason."""
    counts = {f"{one['device']}/{one['doorbell']}": (one["sent"], one["counted"]) for one in document["counts"]}
    for name in ("pio0", "mmio0", "any0"):
        assert counts[f"count/{name}"] == (rings, rings)
        assert counts[f"answer/{name}"] == (trips, trips)
    exits, trip_rows, ring_rows = (rows_of(document, measure) for measure in (EXIT, TRIP, RING))
    assert exits.keys() >= KERNEL_BELLS | {("pio", "vmm"), ("mmio", "vmm"), ("hypercall", "hyperv")}
    for path in KERNEL_BELLS:
        assert exits[path]["why"] == trip_rows[path]["why"] == ""
        assert 0 < trip_rows[path]["quantiles"]["0.5"] <= trip_rows[path]["quantiles"]["0.99"]
        if not ring_rows[path]["why"]:
            assert 0 < ring_rows[path]["quantiles"]["0.5"] <= trip_rows[path]["quantiles"]["0.5"]
    for kind in ("hyperv", "xen", "null"):
        row = exits["hypercall", kind]
        assert bool(row["why"]) != bool(row["quantiles"])


def test_the_lab_ends_and_counts_agree(kvm: None, state: Path, tmp_path: Path) -> None:
    """The command as anyone runs it, shorter: a table, a file, and the kept result."""
    done = hcd_lab("--rings", "3000", "--json", str(tmp_path / "lab.json"))
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "lab.json").read_text())
    check(document, 3000, 300)
    assert json.loads(state.read_text()) == document
    for words in ("round trip:", "2009", "extrapolated: pio - 0.35 us", "count/pio0: 3000 rung, 3000 counted"):
        assert words in done.stdout


@pytest.mark.slow
def test_a_hundred_thousand_rings(kvm: None, state: Path) -> None:
    """As many as the command sends when nothing is said; a process that takes longer than two minutes fails."""
    done = hcd_lab("--json", "-")
    assert done.returncode == 0, done.stderr
    check(json.loads(done.stdout), 100_000, 10_000)


def test_some_paths_of_a_running_hcd(
    kvm: None, state: Path, short_dir: Path, start_hcd: Callable[..., HcdProcess]
) -> None:
    """--socket attaches to a daemon that is there, --paths picks, and the daemon exports what was found."""
    text, sockets = configuration(short_dir)
    hcd = start_hcd(text)
    assert not hcd.metrics().series("hcd_path_cost_seconds")
    done = hcd_lab(
        *(f"--socket={socket}" for socket in sockets),
        f"--metrics=unix:{hcd.metrics_at}",
        *("--paths", "pio,mmio/any-length", "--rings", "500", "--trips", "100"),
    )
    assert done.returncode == 0, done.stderr
    kept = json.loads(state.read_text())
    assert set(rows_of(kept, TRIP)) == {("pio", "fixed"), ("mmio", "any-length")}
    metrics = hcd.metrics()
    assert metrics.total("hcd_doorbell_rings_total", device="count", path="pio") == 500
    assert metrics.total("hcd_doorbell_rings_total", device="count", queue="mmio0") == 0
    assert {labels["source"] for labels, _ in metrics.series("hcd_doorbell_info")} == {"registered"}
    costs = {(labels["path"], labels["kind"]): cost for labels, cost in metrics.series("hcd_path_cost_seconds")}
    assert costs == {key: row["quantiles"]["0.5"] for key, row in rows_of(kept, TRIP).items()}


def test_without_metrics_nothing_is_made_up(kvm: None, state: Path, short_dir: Path) -> None:
    """No counts and no ring times, and the rows say why."""
    text, sockets = configuration(short_dir)
    with HcdProcess.from_config(short_dir, text):
        done = hcd_lab(f"--socket={sockets[1]}", "--rings", "100", "--no-save", "--paths", "pio", "--json", "-")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["counts"] == []
    why = rows_of(document, RING)["pio", "fixed"]["why"]
    assert "--metrics" in why or "TSC" in why
    assert not state.exists()


def test_a_vmm_that_is_killed_is_replaced(kvm: None, short_dir: Path) -> None:
    """The path that took it along has a row that says so; hcd serves the next VMM; the others are counted."""
    text, sockets = configuration(short_dir)
    with HcdProcess.from_config(short_dir, text) as hcd:
        started: list[VmmProcess] = []

        def start() -> VmmProcess:
            started.append(VmmProcess())
            return started[-1]

        with Experiment(start, lambda: Scrape(hcd.metrics().text)) as experiment:
            experiment.attach(str(sockets[0]))
            experiment.keep_only(["pio", "mmio"])
            victim = experiment.targets[0]
            killed = threading.Event()

            def ask(do: str, **arguments: Any) -> Any:
                if arguments.get("ring") == victim.ring and not killed.is_set():
                    killed.set()
                    os.kill(started[0].pid, signal.SIGKILL)
                return VmmProcess.ask(started[0], do, **arguments)

            started[0].ask = ask  # type: ignore[method-assign]
            rows, counts = experiment.run(300, 30)
    assert len(started) == 2
    assert "died" in rows[0].why or "ended" in rows[0].why
    assert [one.doorbell for one in counts] == ["mmio0", "any0"]
    assert all(one.equal and one.sent == 300 for one in counts)


def test_hcd_forgets_a_vmm_that_is_killed(
    kvm: None,
    short_dir: Path,
    start_hcd: Callable[..., HcdProcess],
    expect_settled: Callable[[HcdProcess, Resources], None],
) -> None:
    """Killed in the middle of its rings, again and again: every descriptor is given back, and the next is served."""
    text, sockets = configuration(short_dir)
    hcd = start_hcd(text)
    before = hcd.resources()
    for _ in range(3):
        with VmmProcess() as vmm:
            for socket in sockets:
                vmm.ask("attach", socket=str(socket), timeout=10)
            ring = {"device": "count", "doorbell": "pio0"}
            threading.Timer(0.2, os.kill, (vmm.pid, signal.SIGKILL)).start()
            with pytest.raises(VmmFailed, match=r"died|ended"):
                for_ever(vmm.ask, "exits", ring=ring, count=1000, timeout=20)
    expect_settled(hcd, before)
    assert hcd.metrics().total("hcd_doorbell_rings_total", device="count", path="pio") > 0


def test_a_vmm_outlives_its_hcd(kvm: None, short_dir: Path) -> None:
    """hcd is killed: the library reports it and unregisters. The next hcd gets the same eventfds by their ids."""
    text, sockets = configuration(short_dir)
    gone: list[str] = []
    with Kvm() as opened, Machine(opened, hypercall=hypercall_instruction()) as machine:
        attachment = Attachment(machine.vm, str(sockets[0]), route_of=lambda _: machine.route, on_end=gone.append)
        ring = Ring(code.write_port(0x510, 0, 4))
        with attachment:
            first = HcdProcess.from_config(short_dir, text)
            attachment.connect()
            kept = attachment.doorbell("pio0").fd
            assert machine.run_exits(ring, 100, 20).why == ""
            first.kill()
            assert attachment.wait(20)
            assert machine.run_exits(ring, 1, 20).why == "out at port 0x510, 4 bytes"
            assert "hung up" in gone[0]
            with HcdProcess.from_config(short_dir, text) as second:
                attachment.connect()
                assert attachment.doorbell("pio0").fd == kept
                assert machine.run_exits(ring, 250, 20).why == ""
                while (rings := second.metrics().total("hcd_doorbell_rings_total", device="count")) < 250:
                    assert attachment.wait(0) is False
                assert rings == 250


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--paths", "smoke"], "expected some of pio, mmio, hypercall"),
        (["--rings", "0"], "expected a number from 1 to 18350080"),
        (["--pin", "a"], "expected processors like 2,3"),
        (["--metrics", "nowhere"], "HOST:PORT"),
        (["--pin", "9999", "--rings", "1", "--no-save"], "--pin: cannot run on 9999"),
        (["--socket", "/nonexistent.sock", "--rings", "1", "--no-save"], "nonexistent"),
        (["--socket", "x", "--metrics", "192.0.2.1:80", "--rings", "1"], "beside its hcd"),
    ],
)
def test_wrong_arguments(kvm: None, arguments: list[str], words: str) -> None:
    """One line that says what was expected; no traceback."""
    done = hcd_lab(*arguments)
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr


# -- the VMM process


@pytest.fixture
def vmm(kvm: None) -> Iterator[VmmProcess]:
    with VmmProcess() as process:
        yield process


def test_the_vmm_refuses_and_goes_on(vmm: VmmProcess) -> None:
    """A request that cannot be done is answered; the next one is served."""
    with pytest.raises(VmmFailed, match="No such file"):
        vmm.ask("attach", socket="/nonexistent.sock")
    with pytest.raises(VmmFailed, match="elephant"):
        vmm.ask("exits", ring={"bare": "elephant"}, count=1, timeout=1)
    result = vmm.ask("exits", ring={"bare": "pio"}, count=50, timeout=20)
    assert (len(result["ticks"]), result["why"]) == (50, "")
    assert vmm.ask("host")["capabilities"]["IOEVENTFD"] > 0


def test_a_dead_vmm_is_noticed(vmm: VmmProcess) -> None:
    """Its death is an error of the request, and of each one after it."""
    os.kill(vmm.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(VmmFailed, match=r"died|ended|killed"):
            vmm.ask("host")
    assert not vmm.alive


# -- parts


@pytest.mark.parametrize("total", [1, 2, 10, 11, 13, 3000])
def test_as_many_are_rung_as_were_asked_for(total: int) -> None:
    """The probe, the warm-up and all rounds together; all but those two are measured."""

    class Vmm:
        alive = True

        def ask(self, do: str, **arguments: Any) -> Any:
            if do == "host":
                return {"tsc_khz": 1000, "tsc_offset": None}
            return {"ticks": [5] * arguments["count"], "status": 0, "why": ""}

    experiment = Experiment(Vmm, None)  # type: ignore[arg-type]
    experiment.add_comparisons()
    rows, _ = experiment.run(total, 1)
    assert {target.sent for target in experiment.targets} == {total}
    measured = total - max(1, total // (ROUNDS + 1))
    assert {row.rings for row in rows} == {measured}
    assert all(bool(row.why) != bool(measured) for row in rows)


def test_quantiles_of_ticks() -> None:
    """The value below or at which that share lies."""
    ordered = list(range(1, 101))
    assert [results.quantile(ordered, q) for q in (0, 0.5, 0.99, 1)] == [1, 51, 100, 100]
    assert results.quantile([7], 0.99) == 7


def test_interpolated_quantiles() -> None:
    """As Prometheus has it: evenly inside a bucket, and the last bound where there is no end."""
    buckets = [(1.0, 10.0), (2.0, 30.0), (float("inf"), 40.0)]
    assert interpolate(buckets, 0.25) == 1.0
    assert interpolate(buckets, 0.5) == 1.5
    assert interpolate(buckets, 0.99) == 2.0


METRICS = """
# TYPE hcd_doorbell_ring_seconds histogram
hcd_doorbell_ring_seconds_bucket{{device="d",queue="q",path="pio",le="1e-06"}} {a}
hcd_doorbell_ring_seconds_bucket{{device="d",queue="q",path="pio",le="2e-06"}} {b}
hcd_doorbell_ring_seconds_bucket{{device="d",queue="q",path="pio",le="+Inf"}} {b}
hcd_doorbell_ring_seconds_sum{{device="d",queue="q",path="pio"}} {c}
hcd_doorbell_ring_seconds_count{{device="d",queue="q",path="pio"}} {b}
# TYPE hcd_doorbell_dispatch_seconds histogram
hcd_doorbell_dispatch_seconds_bucket{{device="d",queue="q",path="pio",le="+Inf"}} {b}
hcd_doorbell_dispatch_seconds_sum{{device="d",queue="q",path="pio"}} {d}
hcd_doorbell_dispatch_seconds_count{{device="d",queue="q",path="pio"}} {b}
"""


def test_ring_times_are_those_of_this_run() -> None:
    """What hcd had measured before is subtracted; the way to the handler is added."""
    before = Scrape(METRICS.format(a=100, b=100, c=5e-5, d=1e-3))
    after = Scrape(METRICS.format(a=100, b=110, c=6.5e-5, d=1e-3 + 10 * 1e-6))
    row = Row(RING, "pio", "fixed")
    histogram_rows(row, {"device": "d", "doorbell": "q"}, before, after)
    assert row.rings == 10
    assert row.p50 == pytest.approx(2.5e-6)
    assert row.mean == pytest.approx(2.5e-6)
    nothing = Row(RING, "pio", "fixed")
    histogram_rows(nothing, {"device": "d", "doorbell": "q"}, after, after)
    assert "no sense" in nothing.why


def test_loops_jump_to_their_beginning() -> None:
    """The distance counts from behind the jump."""
    body = code.add_memory(0x2000, 0xFF)
    made = code.loop(body)
    assert made[: len(body)] == body
    assert made[len(body) : len(body) + 2] == b"\x0f\x85"
    assert int.from_bytes(made[-4:], "little", signed=True) == -len(made)
    assert code.write_port(0x510, 7, 2) == bytes.fromhex("ba10050000 b807000000 66ef")
    assert code.write_memory(0xD0000000, 5, 4) == bytes.fromhex("bb000000d0 b805000000 8903")


# -- the result


def a_report() -> Report:
    quantiles = {"0.5": 2e-6, "0.99": 5e-6}
    return Report(
        taken="2026-01-01T00:00:00+00:00",
        machine={"cpu": "Test CPU", "kernel": "1.2"},
        warnings=["this host is itself a guest"],
        rows=[
            Row(EXIT, "pio", "fixed", rings=10, per_second=5e5, mean=2e-6, quantiles=quantiles, ratio=1.0),
            Row(EXIT, "hypercall", "hyperv", why="this kernel does not have it"),
            Row(TRIP, "pio", "fixed", rings=10, per_second=5e5, mean=2e-6, quantiles=quantiles, ratio=1.0),
            Row(TRIP, "mmio", "datamatch", why="no interrupt came back"),
        ],
        counts=[Count("count", "pio0", "pio", 10, 10), Count("count", "mmio0", "mmio", 10, 9)],
    )


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Figures beside those of 2009, reasons where there are none, differing counts marked, warnings last."""
    text = report.render(a_report())
    lines = text.splitlines()
    pio = next(line for line in lines if line.split()[:2] == ["pio", "fixed"])
    assert pio.split() == ["pio", "fixed", "10", "500000", "2.00", "5.00", "1.00", "2.72", "measured"]
    assert "  hypercall hyperv: this kernel does not have it" in lines
    assert "  2009, hypercall generic: 2.37 us (extrapolated: pio - 0.35 us)" in lines
    assert "10 rung, 9 counted   <-- DIFFERENT" in text
    assert lines[-1] == "  - this host is itself a guest"


def test_the_figures_of_2009() -> None:
    """What was measured then, and what was only computed."""
    known = {(one.path, one.kind): (one.seconds, one.origin.split(":")[0]) for one in HISTORY}
    assert known == {
        ("pio", "fixed"): (2.72e-6, "measured"),
        ("mmio", "datamatch"): (5.00e-6, "measured"),
        ("hypercall", "generic"): (2.37e-6, "extrapolated"),
        ("mmio", "vmm"): (9.09e-6, "measured"),
        ("pio", "vmm"): (6.53e-6, "extrapolated"),
    }


def test_the_last_result_is_kept_and_found(tmp_path: Path) -> None:
    """Round trips with figures only; whatever else lies there is no result, and no error."""
    place = tmp_path / "state/hcd/lab.json"
    assert results.load_saved([place]) == {}
    results.save(a_report(), [place])
    assert results.load_saved([tmp_path / "none", place]) == {("pio", "fixed"): 2e-6}
    assert [path.name for path in place.parent.iterdir()] == ["lab.json"]
    for garbage in ("", "[]", '{"format": 99, "rows": []}', '{"format": 1, "rows": [{"measure": "trip"}]}', "\0"):
        place.write_text(garbage)
        assert results.load_saved([place]) == {}


def test_where_the_result_is_kept() -> None:
    """The operator's own place counts first."""
    assert results.saved_candidates({"XDG_STATE_HOME": "/state"}) == [Path("/state/hcd/lab.json")]
    assert Path("/var/lib/hcd/lab.json") in results.saved_candidates({})


# -- the machine


def fake_root(tmp_path: Path, flags: str, clocksource: str, *modules: str) -> Path:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"model name\t: Test CPU\nflags\t\t: {flags}\n\nflags\t: other\n")
    sources = tmp_path / "sys/devices/system/clocksource/clocksource0"
    sources.mkdir(parents=True)
    (sources / "current_clocksource").write_text(f"{clocksource}\n")
    for module in modules:
        (tmp_path / "sys/module" / module).mkdir(parents=True)
    return tmp_path


def test_a_machine_that_is_fit(tmp_path: Path) -> None:
    """Hardware with VMX and a good TSC: nothing to warn of but noise."""
    root = fake_root(tmp_path, "vmx constant_tsc nonstop_tsc", "tsc", "kvm_intel")
    machine = facts.look(root)
    assert (machine.cpu, machine.module, machine.hypervisor) == ("Test CPU", "kvm_intel", "none")
    fit = facts.Machine(**{**_fields(machine), "cpus": 4, "load": 0.1})
    assert facts.warnings(fit, {"exit pio": 1.1}) == []
    assert "exit pio 2.00" in facts.warnings(fit, {"exit pio": 2.0})[0]


def test_a_machine_that_is_not(tmp_path: Path) -> None:
    """Each defect has its own sentence."""
    machine = facts.look(fake_root(tmp_path, "hypervisor", "jiffies", "kvm_pvm"))
    unfit = facts.Machine(**{**_fields(machine), "cpus": 1, "load": 5.0, "hypervisor": "kvm"})
    text = " ".join(facts.warnings(unfit, {}))
    for words in ("itself a guest (of kvm)", "page-table based", "not said to be constant", "jiffies", "one processor"):
        assert words in text
    emulated = facts.Machine(**{**_fields(machine), "hypervisor": "qemu"})
    assert "emulated by QEMU" in facts.warnings(emulated, {})[0]


def _fields(machine: facts.Machine) -> dict[str, Any]:
    return {name: getattr(machine, name) for name in facts.Machine.__slots__}


def test_processors_are_split() -> None:
    """The guest has the first for itself, unless there is no other."""
    assert lab_cli._split([2, 3, 4]) == ({2}, {3, 4})
    assert lab_cli._split([2]) == ({2}, {2})
    assert lab_cli._split(None) == (set(), set())


def test_plot_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """The optional extra is named before anything is measured."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"hcd\[plot\]"):
        lab_cli.run(argparse.Namespace(plot="x.png"))


def test_plot(tmp_path: Path) -> None:
    """A picture, where matplotlib is installed; a kind of file that it does not know is the operator's mistake."""
    pytest.importorskip("matplotlib")
    plot.draw(a_report().rows, str(tmp_path / "lab.svg"), "title")
    assert "<svg" in (tmp_path / "lab.svg").read_text()
    with pytest.raises(ConfigError, match="cannot write"):
        plot.draw(a_report().rows, str(tmp_path / "lab.elephant"), "title")


def test_metrics_name_the_doorbell() -> None:
    """The experiment asks for a device and a doorbell, as the labels are called."""
    text = '# TYPE hcd_doorbell_rings counter\nhcd_doorbell_rings_total{device="d",queue="q",path="pio"} 5\n'
    assert Scrape(text).rings({"device": "d", "doorbell": "q"}) == 5
    assert isinstance(Scrape(text).metrics, Metrics)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--paths", "pio/banana"), "nothing to ring over pio/banana; there is hypercall, "),
        (("--rings", "99999999"), "expected a number from 1 to 18350080, found '99999999'"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    kvm: None, state: Path, arguments: tuple[str, ...], expected: str
) -> None:
    """And the kept result stays as it was."""
    done = hcd_lab(*arguments)
    assert (done.returncode != 0, expected in done.stderr) == (True, True), done.stderr
    assert not state.exists()
