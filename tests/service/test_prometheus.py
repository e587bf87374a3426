"""A real Prometheus scrapes a daemon under load: what it can be asked, and what the rules make of it.

Every path is rung: front ends of this process drive disks whose path is declared, a VMM without a virtual machine rings
hypercall doorbells behind stamps, and a real QEMU contradicts a declared path. Nobody waits for a fixed time: a
question is repeated until it has an answer.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import socket
import struct
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lamps import hung_up
from qtest import PCI_SLOT, QtestVm
from tables import table
from test_monitoring import RULES, dashboard_expressions, recorded
from tsc import measure_tsc

from hcd.demo.hcd_process import HcdProcess
from hcd.frontend.blk import BlockDriver, BlockRequest
from hcd.frontend.client import Frontend
from hcd.lab.results import TRIP, Report, Row, save
from hcd.testing.vmm import Vmm

pytestmark = [pytest.mark.guest, pytest.mark.long]

DEVICES = "".join([
    table("port", "blk", 'path = "pio"', ram="1M"),
    table("memory", "blk", 'path = "mmio"', ram="1M"),
    table("call", "echo", connections="0x21", stamps=True),
    table("wrong", "blk", 'path = "pio"', 'qmp = "{dir}/qmp.sock"', ram="1M"),
    table("rude", "rng", 'path = "direct"'),
])
CONFIG = """
global: {{scrape_interval: 500ms, evaluation_interval: 500ms}}
rule_files: {rules}
scrape_configs:
  - job_name: hcd
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""
#: what Grafana puts in place of its variables: everything, and a few scrapes
VARIABLES = {"$__rate_interval": "10s", "$job": ".*", "$instance": ".*", "$device": ".*"}
PATIENCE = 60.0
OUT = 1
STAMPS = "constant_tsc" in Path("/proc/cpuinfo").read_text(errors="replace")


class Prometheus:
    """A server of its own, and its HTTP API."""

    def __init__(self, directory: Path, target: int, log: Path) -> None:
        self.port = free_port()
        config = directory / "prometheus.yml"
        config.write_text(CONFIG.format(rules=json.dumps([str(file) for file in RULES]), port=target))
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={config}",
                    f"--storage.tsdb.path={directory / 'tsdb'}",
                    f"--web.listen-address=127.0.0.1:{self.port}",
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.log = log

    def ask(self, what: str, **parameters: str) -> Any:
        """The data of one answer; AssertionError for a question that it does not understand."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{what}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            if error.code != 503:
                pytest.fail(f"{what} {parameters}: {error.read().decode()}")
            raise

    def until(self, check: Callable[[], Any]) -> Any:
        """What ``check`` returns, once that is not empty; None if it never is."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(OSError):  # it is still starting
                if found := check():
                    return found
            time.sleep(0.1)
        return None

    def query(self, text: str) -> Any:
        """The series of an expression once there are any that are numbers, as (labels, value)."""

        def check() -> list[tuple[dict[str, str], float]]:
            found = self.ask("query", query=text)["result"]
            values = [(one["metric"], float(one["value"][1])) for one in found]
            return [(labels, value) for labels, value in values if not math.isnan(value)]

        return self.until(check)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# -- the load


class Load:
    """Threads that keep devices busy until they are told to stop."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.errors: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._guarded, args=one) for one in self._jobs()]
        for thread in self._threads:
            thread.start()

    def _jobs(self) -> list[tuple[Callable[..., None], tuple[str, ...]]]:
        return [(self._disk, ("port",)), (self._disk, ("memory",)), (self._calls, ())]

    def _guarded(self, job: Callable[..., None], arguments: tuple[str, ...]) -> None:
        try:
            job(*arguments)
        except Exception as error:
            self.errors.append(f"{job.__name__}{arguments}: {error!r}")

    def _disk(self, name: str) -> None:
        """Writes, reads, and now and then a request beyond the end, which fails."""
        with Frontend.open(self.directory / f"{name}.sock", timeout=PATIENCE) as frontend:
            driver = BlockDriver(frontend.memory, frontend.queues[0], timeout=PATIENCE)
            while not self._stop.wait(0.002):
                driver.write(8, bytes(4096))
                driver.read(8, 4096)
                assert driver.run(BlockRequest(OUT, 1 << 20, bytes(512))).status == 1

    def _calls(self) -> None:
        khz, tsc = measure_tsc()
        with Vmm(str(self.directory / "call.sock")) as vmm, vmm.map_memory() as memory:
            vmm.conn.set_clock(tsc_khz=khz, tsc_offset=0)
            vmm.send()
            while not self._stop.wait(0.002):
                struct.pack_into("<Q", memory, 0, tsc())
                vmm.ring("hyperv0")
                vmm.wait_interrupt("hyperv0")

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@contextlib.contextmanager
def contradicting_qemu(directory: Path) -> Iterator[None]:
    """Its guest rings the device "wrong" by memory, which the configuration declares to be rung by port."""
    disk = f"vhost-user-blk-pci,disable-legacy=on,chardev=disk,addr={PCI_SLOT}"
    devices = ["-chardev", f"socket,id=disk,path={directory / 'wrong.sock'}", "-device", disk]
    with QtestVm(directory, "pc", devices) as vm:
        vm.start_modern_pci(by_port=False)
        yield


def keep_a_path_cost() -> None:
    """As `hcd lab` does; what it cost does not matter here."""
    row = Row(TRIP, "pio", "fixed", quantiles={"0.5": 3e-6})
    save(Report("now", {}, [], [row], []))


def break_the_protocol(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(path))
        client.sendall(struct.pack("<III", 9999, 1, 0))
        assert hung_up(client)


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory, need: Callable[..., None]) -> Iterator[Prometheus]:
    """One of each for all tests of this file."""
    need("prometheus", "qemu-system-x86_64")
    log = tmp_path_factory.mktemp("prometheus") / "prometheus.log"
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        short = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hcd-", ignore_cleanup_errors=True)))
        patch.setenv("XDG_STATE_HOME", str(short))
        keep_a_path_cost()
        hcd = stack.enter_context(HcdProcess.from_config(short, DEVICES, metrics_port=free_port()))
        stack.enter_context(contradicting_qemu(short))
        load = Load(short)
        stack.callback(load.stop)
        assert isinstance(hcd.metrics_at, int)
        server = Prometheus(short, hcd.metrics_at, log)
        stack.callback(server.process.wait)
        stack.callback(server.process.terminate)
        assert server.query('hcd_protocol_errors_total{device="rude"} == 0'), "it is scraped"
        break_the_protocol(short / "rude.sock")
        yield server
        assert load.errors == []


# -- the questions


def test_the_p99_of_the_response_is_known_by_path(prometheus: Prometheus) -> None:
    text = "histogram_quantile(0.99, sum by (path, le) (rate(hcd_doorbell_response_seconds_bucket[10s])))"
    paths = {"pio", "mmio", "hypercall"}

    def every_path() -> dict[str, float]:
        found = {labels["path"]: value for labels, value in prometheus.query(text) or ()}
        return found if found.keys() == paths else {}

    answers = prometheus.until(every_path)
    assert answers is not None, prometheus.query(text)
    assert all(0 < value < 1 for value in answers.values()), answers


def dashboard_queries() -> list[str]:
    found = []
    for text in dashboard_expressions():
        for name, value in VARIABLES.items():
            text = text.replace(name, value)
        found.append(text)
    return found


@pytest.mark.parametrize("text", dashboard_queries())
def test_every_query_of_the_dashboard_has_an_answer(prometheus: Prometheus, text: str) -> None:
    if "hcd_doorbell_ring_seconds" in text and not STAMPS:
        pytest.skip("the kernel does not call this machine's TSC constant")
    if match := re.fullmatch(r"label_values\((.+), (\w+)\)", text):
        series, label = match.groups()
        assert prometheus.until(lambda: prometheus.ask(f"label/{label}/values", **{"match[]": series}))
    else:
        assert prometheus.query(text)


@pytest.mark.parametrize("name", sorted(recorded()))
def test_every_recording_rule_records(prometheus: Prometheus, name: str) -> None:
    if "hcd_doorbell_ring_seconds" in name and not STAMPS:
        pytest.skip("the kernel does not call this machine's TSC constant")
    assert prometheus.query(name)


def test_every_rule_is_evaluated_without_error(prometheus: Prometheus) -> None:
    def evaluated() -> list[dict[str, Any]]:
        rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
        return rules if all(rule["health"] != "unknown" for rule in rules) else []

    rules = prometheus.until(evaluated)
    assert rules is not None
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []
    assert len(rules) > len(recorded())


def test_an_alert_fires_for_a_front_end_that_broke_the_protocol(prometheus: Prometheus) -> None:
    def firing() -> list[dict[str, Any]]:
        alerts = prometheus.ask("alerts")["alerts"]
        return [one for one in alerts if one["labels"]["alertname"] == "HcdProtocolErrors" and one["state"] == "firing"]

    alerts = prometheus.until(firing)
    assert alerts is not None
    assert [one["labels"]["device"] for one in alerts] == ["rude"]
    assert "rude" in alerts[0]["annotations"]["summary"]


def test_the_errors_of_the_load_are_counted(prometheus: Prometheus) -> None:
    """A third of the requests of each disk fails, and no other device has failures."""
    answers = prometheus.query("device:hcd_request_errors:ratio_rate5m > 0")
    assert {labels["device"] for labels, _ in answers} == {"port", "memory"}
    assert all(0.2 < value < 0.5 for _, value in answers)
