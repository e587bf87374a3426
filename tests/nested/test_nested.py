"""hcd and the lab on a stock Debian kernel with a KVM of its own: QEMU emulates a processor with SVM.

The guest mounts the host's root read-only by 9p and runs the very Python and project that this test runs. What an
emulated processor's exits cost means nothing; what arrives, and how often, does: hypercall doorbells most of all, which
many hosts cannot register.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hcd.demo import jobs, packages, qemu
from hcd.demo.console import Guest
from hcd.demo.hcd_process import Metrics
from hcd.lab.metrics import interpolate

pytestmark = pytest.mark.guest

RINGS, TRIPS = 2000, 300
#: it takes a minute of a machine that does nothing else, and several of one that does
SECONDS = 480
MODULES = ("virtio_pci", "9p", "9pnet_virtio", "kvm_amd")
ROOT, RESULTS = "/host", "/results"

JOB = """
mkdir -p {root} {results}
mount -t 9p -o trans=virtio,version=9p2000.L,cache=loose,msize=262144,ro hostroot {root}
mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 results {results}
for directory in proc sys dev; do mount -o bind /$directory {root}/$directory; done
mount -t tmpfs scratch {root}{scratch}
say kvm=$(test -c /dev/kvm && echo there)
mkdir {root}{scratch}/results
export PYTHONDONTWRITEBYTECODE=1 XDG_STATE_HOME={scratch}/state TMPDIR={scratch} PATH=/usr/bin:/bin:/usr/sbin:/sbin
status=0
chroot {root} {python} {script} {scratch}/results {rings} {trips} || status=$?
cp {root}{scratch}/results/* {results}/
say lab=$status
export PATH=/bin:/sbin
"""


def scratch_directory() -> str:
    """A directory of the host that the guest may cover with memory: nothing that it runs lies below it."""
    needed = [Path(__file__).resolve(), Path(sys.executable), Path(sys.base_prefix), Path(sys.prefix)]
    for candidate in ("/tmp", "/mnt", "/media", "/srv", "/opt"):
        if Path(candidate).is_dir() and not any(path.is_relative_to(candidate) for path in needed):
            return candidate
    raise AssertionError("every directory that could be covered holds this checkout or its Python")


@dataclass(frozen=True)
class Outcome:
    """What came out of the guest."""

    said: dict[str, str]
    report: dict[str, Any]
    metrics: Metrics
    text: str
    kvm_tests: str

    def row(self, measure: str, path: str, kind: str) -> dict[str, Any]:
        return next(
            row for row in self.report["rows"] if (row["measure"], row["path"], row["kind"]) == (measure, path, kind)
        )


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory, need: Callable[..., None]) -> Outcome:
    """One boot for all tests of this file."""
    need("qemu-system-x86_64", "apt-get", "dpkg")
    directory = tmp_path_factory.mktemp("nested")
    results = directory / "results"
    results.mkdir()
    job = JOB.format(
        root=ROOT,
        results=RESULTS,
        scratch=scratch_directory(),
        python=shlex.quote(sys.executable),
        script=shlex.quote(str(Path(__file__).with_name("inside.py"))),
        rings=RINGS,
        trips=TRIPS,
    )
    files = packages.guest_files("amd64-full")
    initrd = directory / "initrd.cpio"
    initrd.write_bytes(jobs.base_tree(files, MODULES).cpio() + jobs.job_tree(job).cpio())
    vm = qemu.Vm(
        memory_mib=768,
        cpus=2,
        # One thread for both processors: with one each, QEMU 7.2 now and then leaves a processor that has run a nested
        # guest with its interrupts pending for ever, and Debian's kernel stands still.
        accel="tcg,thread=single",
        cpu="EPYC,+svm,+npt",
        devices=[*qemu.share("hostroot", "/"), *qemu.share("results", results, writable=True)],
    )
    with Guest("nested", vm.command(files, initrd), directory / "console.log") as guest:
        said = guest.wait(SECONDS)
    text = (results / "lab.txt").read_text()
    assert said["lab"] in ("0", "1"), f"the lab failed:\n{text}"
    report = json.loads((results / "lab.json").read_text())
    metrics = Metrics((results / "metrics.txt").read_text())
    return Outcome(said, report, metrics, text, (results / "test_kvm.txt").read_text())


def test_every_ring_is_counted(outcome: Outcome) -> None:
    """PIO, MMIO with datamatch and of any length, and HvSignalEvent: sent and counted are the same numbers."""
    assert outcome.said["kvm"] == "there"
    counts = {f"{one['device']}/{one['doorbell']}": (one["sent"], one["counted"]) for one in outcome.report["counts"]}
    exits = {f"count/{name}": (RINGS, RINGS) for name in ("pio0", "mmio0", "any0", "hyperv0")}
    trips = {f"answer/{name}": (TRIPS, TRIPS) for name in ("pio0", "mmio0", "any0", "hyperv0")}
    assert counts == exits | trips, outcome.text
    assert outcome.said["lab"] == "0"


def test_hypercalls_ring_and_are_answered(outcome: Outcome) -> None:
    """The rows exist: HvSignalEvent alone, there and back through an irqfd, and the null hypercall."""
    for measure, kind in (("exit", "hyperv"), ("trip", "hyperv"), ("exit", "null")):
        row = outcome.row(measure, "hypercall", kind)
        assert (row["why"], row["quantiles"]["0.5"] > 0) == ("", True), outcome.text
    assert outcome.row("exit", "hypercall", "xen")["why"]


def test_interrupts_come_back_on_every_path(outcome: Outcome) -> None:
    """The tiny guest's own handler saw an interrupt for each ring of a round trip."""
    for path, kind in (("pio", "fixed"), ("mmio", "datamatch"), ("mmio", "any-length"), ("hypercall", "hyperv")):
        assert outcome.row("trip", path, kind)["why"] == "", outcome.text
    sent = outcome.metrics.total("hcd_interrupts_total", device="answer", outcome="sent")
    assert sent == 4 * TRIPS


def test_the_daemons_metrics_say_the_same(outcome: Outcome) -> None:
    """Rings by path, known because hcd's doorbells were registered by their VMM."""
    for path, doorbells in (("pio", 1), ("mmio", 2), ("hypercall", 1)):
        for device, rings in (("count", RINGS), ("answer", TRIPS)):
            name = "hcd_doorbell_rings_total"
            assert outcome.metrics.total(name, device=device, path=path) == doorbells * rings
    known = outcome.metrics.series("hcd_doorbell_info")
    assert {labels["source"] for labels, _ in known} == {"registered"}
    assert {labels["path"] for labels, _ in known} == {"pio", "mmio", "hypercall"}


def test_ring_times_are_within_round_trips(outcome: Outcome) -> None:
    """Where the kernel tells the guest's TSC offset; otherwise every row says that it does not."""
    rows = [row for row in outcome.report["rows"] if row["measure"] == "ring" and row["kind"] != "xen"]
    assert len(rows) == 4
    for row in rows:
        if row["why"]:
            assert "TSC" in row["why"]
            continue
        trip = outcome.row("trip", row["path"], row["kind"])
        buckets: dict[float, float] = {}
        bells = {"fixed": "pio0", "datamatch": "mmio0", "any-length": "any0", "hyperv": "hyperv0"}
        series = outcome.metrics.series(
            "hcd_doorbell_ring_seconds_bucket", device="answer", queue=bells[row["kind"]], path=row["path"]
        )
        for labels, count in series:
            buckets[float(labels["le"])] = count
        assert 0 < interpolate(sorted(buckets.items()), 0.5) <= trip["quantiles"]["0.5"], outcome.text


def test_the_machine_is_said_to_be_emulated(outcome: Outcome) -> None:
    """Figures of an emulated processor come with a warning."""
    assert any("emulated" in warning or "itself a guest" in warning for warning in outcome.report["warnings"])


def test_hcd_kvm_works_on_a_stock_kernel(outcome: Outcome) -> None:
    """The tests of the wrapper pass on this KVM too, Hyper-V's eventfds included."""
    assert outcome.kvm_tests.endswith("exit status 0\n"), outcome.kvm_tests
