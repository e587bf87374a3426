"""The guest machinery without a guest: file trees, command lines, consoles, reports, the demo's verdict."""

from __future__ import annotations

import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from hcd.demo import __main__ as demo
from hcd.demo import jobs, packages, passes, qemu, report, testpmd
from hcd.demo.console import Guest, GuestFailedError
from hcd.demo.hcd_process import Metrics, Resources, is_listening
from hcd.demo.initramfs import Tree, module_order
from hcd.demo.packages import GuestFiles, MissingToolError

# -- kernel modules and file trees


@pytest.fixture
def modules(tmp_path: Path) -> Path:
    """A /lib/modules directory: blk needs ring and core, core needs ring, built-in is in the kernel."""
    root = tmp_path / "6.1.0-test"
    (root / "kernel").mkdir(parents=True)
    for name, depends in {"the-blk": "core,ring", "core": "ring", "ring": ""}.items():
        (root / "kernel" / f"{name}.ko").write_bytes(b"\x7fELF\0license=GPL\0depends=%s\0" % depends.encode())
    (root / "modules.builtin").write_text("kernel/lib/built-in.ko\n")
    return root


def test_modules_load_after_what_they_depend_on(modules: Path) -> None:
    """The names may be spelt with - or _; a built-in module is nothing to load."""
    order = module_order(modules, ["the_blk", "built_in", "core"])
    assert [path.stem for path in order] == ["ring", "core", "the-blk"]


def test_unknown_module_is_named(modules: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no module nonsense"):
        module_order(modules, ["nonsense"])


def sample_tree() -> Tree:
    tree = Tree()
    tree.add_file("/bin/tool", b"#!/bin/sh\n", executable=True)
    tree.add_file("/etc/odd", b"12345")
    tree.add_link("/bin/sh", "tool")
    tree.add_directory("/proc")
    return tree


def test_archive_is_read_by_cpio(tmp_path: Path, need: Callable[..., None]) -> None:
    """GNU cpio unpacks what we packed: names, contents, modes, links."""
    need("cpio")
    command = ["cpio", "-i", "--quiet", "--no-absolute-filenames"]
    subprocess.run(command, input=sample_tree().cpio(), cwd=tmp_path, check=True)
    assert (tmp_path / "etc/odd").read_bytes() == b"12345"
    assert stat.S_IMODE((tmp_path / "bin/tool").stat().st_mode) == 0o755
    assert os.readlink(tmp_path / "bin/sh") == "tool"
    assert (tmp_path / "proc").is_dir()


def test_tree_in_a_directory_is_the_same(tmp_path: Path) -> None:
    sample_tree().write_to(tmp_path)
    assert (tmp_path / "etc/odd").read_bytes() == b"12345"
    assert os.access(tmp_path / "bin/tool", os.X_OK)
    assert os.readlink(tmp_path / "bin/sh") == "tool"
    assert (tmp_path / "proc").is_dir()


def test_archives_are_aligned_so_that_another_can_follow() -> None:
    assert len(sample_tree().cpio()) % 4 == 0


def test_absent_host_tool_names_its_package() -> None:
    with pytest.raises(MissingToolError, match=r"no-such-tool.*package nothing"):
        Tree().add_host_tool("no-such-tool", "nothing")


def test_shell_of_the_guest_is_valid(tmp_path: Path) -> None:
    """The init script, the functions and the demo's job parse."""
    for script in (jobs.INIT, jobs.FUNCTIONS, passes.JOB):
        subprocess.run(["sh", "-n"], input=script.encode(), check=True)


# -- the cache


def test_cache_directory_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HCD_CACHE", str(tmp_path / "mine"))
    assert packages.cache_directory() == tmp_path / "mine"
    monkeypatch.delenv("HCD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert packages.cache_directory() == tmp_path / "xdg" / "hcd"


def test_cached_guest_files_need_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With everything in the cache, neither apt nor dpkg is called: PATH is empty."""
    monkeypatch.setenv("HCD_CACHE", str(tmp_path))
    root = tmp_path / "debian-amd64"
    for directory in ("boot", "lib/modules/6.1.0-7", "bin"):
        (root / directory).mkdir(parents=True)
    (root / "boot/vmlinuz-6.1.0-7").touch()
    (root / "bin/busybox").touch()
    monkeypatch.setenv("PATH", "")
    files = packages.guest_files("amd64")
    assert files.release == "6.1.0-7"
    assert files.busybox == root / "bin/busybox"


# -- QEMU's command lines

FILES = GuestFiles("amd64", Path("/k/vmlinuz"), Path("/k/modules"), Path("/k/busybox"))


@pytest.mark.parametrize(
    ("bus", "wanted", "unwanted"),
    [
        ("legacy", ["vhost-user-blk-pci", "disable-modern=on"], ["modern-pio-notify"]),
        ("modern", ["vhost-user-blk-pci", "disable-legacy=on"], ["modern-pio-notify"]),
        ("pio", ["vhost-user-blk-pci", "modern-pio-notify=on"], ["disable-modern"]),
        ("mmio", ["vhost-user-blk,"], ["-pci", "legacy", "modern", "romfile"]),
    ],
)
def test_bus_chooses_the_device(bus: str, wanted: list[str], unwanted: list[str]) -> None:
    device = qemu.block("/s", bus, queues=4, packed=True)[-1]
    assert all(word in device for word in [*wanted, "num-queues=4", "packed=on"])
    assert not any(word in device for word in unwanted)


def test_network_card_has_vectors_only_with_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU without KVM dies of vhost-user network cards that use MSI-X."""
    monkeypatch.setenv("HCD_ACCEL", "tcg")
    assert "vectors=0" in qemu.net("/s", "modern", queues=2)[-1]
    monkeypatch.setenv("HCD_ACCEL", "kvm")
    assert "vectors=6" in qemu.net("/s", "modern", queues=2)[-1]


def test_there_is_no_legacy_entropy_device() -> None:
    with pytest.raises(ValueError, match="no legacy"):
        qemu.rng("/s", "legacy")


def test_guest_memory_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without share=on the back end would map private copies."""
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    command = " ".join(qemu.Vm("q35", memory_mib=64).command(FILES, Path("/initrd")))
    assert "memory-backend-memfd,id=ram,size=64M,share=on" in command
    assert "memory-backend=ram" in command


def test_absent_qemu_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(MissingToolError, match=r"qemu-system-s390x.*qemu-system-misc"):
        qemu.Vm("s390x").command(FILES, Path("/initrd"))


# -- consoles: a shell in the place of a guest


def shell_guest(tmp_path: Path, script: str, **options: object) -> Guest:
    return Guest("sh", ["sh", "-c", script], tmp_path / "log", **options)  # type: ignore[arg-type]


def test_guest_reports_values_as_they_come(tmp_path: Path, no_leaks: None) -> None:
    """Kernel messages may stand before the mark; the log has every byte."""
    seen: list[tuple[str, str]] = []
    script = "echo noise; echo '[ 1.0] kernel: HCD: a=1=2'; echo HCD: status=0"
    with shell_guest(tmp_path, script, on_value=lambda key, value: seen.append((key, value))) as guest:
        assert guest.wait() == {"a": "1=2", "status": "0"}
    assert seen == [("a", "1=2"), ("status", "0")]
    assert (tmp_path / "log").read_text().startswith("noise\n")


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo HCD: status=3", "status 3"),
        ("echo goodbye; exit 7", r"ended \(exit status 7\)(.|\n)*goodbye"),
        ("echo 'Kernel panic - not syncing'; exec sleep 100", "panicked"),
        ("exec sleep 100", "within 0.05 s"),
    ],
    ids=["job failed", "died", "panic", "silent"],
)
def test_guest_that_fails_is_told_apart(tmp_path: Path, no_leaks: None, script: str, expected: str) -> None:
    """Each message has the reason and the end of the console; nothing keeps running."""
    with shell_guest(tmp_path, script) as guest, pytest.raises(GuestFailedError, match=expected):
        guest.wait(0.05 if "within" in expected else 60)
    assert guest.process.poll() is not None


def test_guest_that_never_says_a_value_fails_when_it_is_done(tmp_path: Path) -> None:
    with shell_guest(tmp_path, "echo HCD: status=0") as guest, pytest.raises(GuestFailedError, match="never said"):
        guest.wait_for("plug")


# -- testpmd

TESTPMD_OUTPUT = """
  ######################## NIC statistics for port 0  ########################
  RX-packets: 1 RX-missed: 0 RX-bytes: 0
  ---------------------- Forward statistics for port 0  ----------------------
  RX-packets: 169525088      RX-dropped: 0             RX-total: 169525088
  TX-packets: 169527520      TX-dropped: 0             TX-total: 169527520
  ---------------------- Forward statistics for port 1  ----------------------
  RX-packets: 7              RX-dropped: 0             RX-total: 7
  TX-packets: 8              TX-dropped: 0             TX-total: 8
  +++++++++++++++ Accumulated forward statistics for all ports+++++++++++++++
  RX-packets: 339052576      RX-dropped: 0             RX-total: 339052576
"""


def test_final_statistics_of_testpmd_are_read() -> None:
    stats = testpmd.parse(TESTPMD_OUTPUT)
    assert stats == {0: testpmd.PortStats(169525088, 169527520), 1: testpmd.PortStats(7, 8)}


def test_testpmd_that_dies_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_leaks: None) -> None:
    program = tmp_path / "dpdk-testpmd"
    program.write_text("#!/bin/sh\necho no such socket\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(testpmd.TestpmdFailedError, match="no such socket"):
        testpmd.run(["/nowhere"], tmp_path / "log")


# -- scrapes, the table and the verdict


def scrape(rings: int, requests: int, path: str = "pio", source: str = "qmp") -> Metrics:
    labels = f'device="disk",queue="0",path="{path}"'
    return Metrics(
        "# TYPE hcd_doorbell_info gauge\n"
        f'hcd_doorbell_info{{{labels},source="{source}"}} 1\n'
        "# TYPE hcd_doorbell_rings_total counter\n"
        f"hcd_doorbell_rings_total{{{labels}}} {rings}\n"
        "# TYPE hcd_requests_total counter\n"
        f'hcd_requests_total{{device="disk",queue="0",op="read",status="ok"}} {requests}\n'
        "# TYPE hcd_doorbell_dispatch_seconds histogram\n"
        f'hcd_doorbell_dispatch_seconds_bucket{{{labels},le="1e-05"}} {rings // 2}\n'
        f'hcd_doorbell_dispatch_seconds_bucket{{{labels},le="0.002"}} {rings}\n'
        f'hcd_doorbell_dispatch_seconds_bucket{{{labels},le="+Inf"}} {rings}\n'
    )


def test_row_is_what_happened_between_two_scrapes() -> None:
    (row,) = report.rows_since(scrape(2, 10), scrape(10, 30), ["disk"], "pio")
    assert (row.rings, row.requests, row.source) == (8, 20, "qmp")
    assert row.dispatch == (1e-05, 0.002)
    assert row.response == (None, None)
    last = report.table([row]).splitlines()[-1].split()
    assert last[:3] == ["disk", "pio", "qmp"]
    assert "<=10" in last
    assert last[-1] == "-"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (2e-05, "<=20 us"), (0.002, "<=2 ms"), (1.0, "<=1 s"), (float("inf"), ">1 s")],
)
def test_bounds_are_printed_in_the_unit_that_reads_best(seconds: float | None, text: str) -> None:
    assert report.bound(seconds) == text


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (scrape(5, 5), None),
        (scrape(0, 5), "0 of 0 rings"),
        (scrape(5, 5, path="mmio"), "0 of 5 rings"),
        (scrape(5, 5, source="declared"), "known from 'declared'"),
    ],
    ids=["fine", "not rung", "rung over another path", "known from elsewhere"],
)
def test_demo_finds_what_was_rung_wrongly(after: Metrics, expected: str | None) -> None:
    before = Metrics("")
    wrong = demo.misrung(report.rows_since(before, after, ["disk"], "pio"), before, after, "qmp")
    assert (expected is None and not wrong) or (expected or "") in " ".join(wrong)
    assert bool(wrong) == (expected is not None)


FINE = {
    "file-written": "aa",
    "file-read": "aa",
    "fsck": "clean",
    "random-bytes": "4096",
    "random-gzipped": "4119",
    "ping": f"{passes.PINGS}/{passes.PINGS}",
}


def test_demo_accepts_a_guest_that_compared_equal() -> None:
    assert passes.unequal(FINE) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("file-read", "bb"),
        ("file-written", ""),
        ("fsck", "dirty"),
        ("random-bytes", "0"),
        ("random-gzipped", "40"),
        ("ping", "20/19"),
    ],
)
def test_demo_finds_what_differs(key: str, value: str) -> None:
    assert passes.unequal({**FINE, key: value})


def test_demo_without_qemu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "QEMU is not installed" in demo._no_guest()


# -- what a process holds


def test_leaked_descriptor_is_named(no_leaks: None) -> None:
    before = Resources()
    reader, writer = os.pipe()
    growth = Resources().growth_since(before)
    os.close(reader)
    os.close(writer)
    assert "2 descriptors" in growth
    assert "pipe:" in growth
    assert not Resources().growth_since(before)


def test_listening_socket_is_told_from_a_bound_one(short_dir: Path) -> None:
    import socket

    path = short_dir / "s"
    with socket.socket(socket.AF_UNIX) as server:
        assert not is_listening(path)
        server.bind(str(path))
        assert not is_listening(path)
        server.listen(1)
        assert is_listening(path)


def test_microvm_is_told_its_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel cannot measure it on a busy host, and hangs."""
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(qemu, "_clock_words", lambda: ["tsc_early_khz=1"])
    assert "tsc_early_khz=1" in " ".join(qemu.Vm("microvm").command(FILES, Path("/initrd")))
    assert "tsc_early_khz" not in " ".join(qemu.Vm("q35").command(FILES, Path("/initrd")))
