"""Booting guests. What a guest does and says: hcd/demo/jobs.py."""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from hcd.demo import jobs, packages, qemu, uml
from hcd.demo.console import Guest
from hcd.demo.hcd_process import HcdProcess
from hcd.demo.initramfs import Tree
from hcd.demo.packages import MissingToolError
from hcd.qemu.version import version_of

E2FSPROGS = (("mkfs.ext4", "e2fsprogs"), ("fsck.ext4", "e2fsprogs"))


@functools.cache
def _archive(arch: str, modules: tuple[str, ...], tools: tuple[tuple[str, str], ...]) -> bytes:
    return jobs.base_tree(packages.guest_files(arch), modules, tools=tools).cpio()


def with_programs(tree: Tree, programs: Mapping[str, bytes] | None) -> Tree:
    for name, data in (programs or {}).items():
        tree.add_file(f"/bin/{name}", data, executable=True)
    return tree


@pytest.fixture
def compile_static(tmp_path: Path, need: Callable[..., None]) -> Callable[[str], bytes]:
    """``compile_static("x.c")`` builds a program from this directory that runs without libraries."""

    def build(source: str) -> bytes:
        need("gcc")
        program = tmp_path / Path(source).stem
        path = Path(__file__).parent / source
        command = ["gcc", "-static", "-pthread", "-O2", "-Wall", "-o", str(program), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return program.read_bytes()

    return build


#: the first QEMU that has a front end for any device, and the release of Debian to take one from
NEWER_VERSION, NEWER_SUITE = (10, 2), "forky"


@pytest.fixture
def newer_qemu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, need: Callable[..., None]) -> None:
    """Guests that the test boots have a QEMU that can do more than Debian 12's: the installed one, or Debian's next."""
    installed = shutil.which("qemu-system-x86_64")
    if installed is not None and version_of(installed) >= NEWER_VERSION:
        return
    need("apt-get", "dpkg")
    suite = NEWER_SUITE
    try:
        root = packages.unpacked(f"qemu-{suite}", lambda _: ["qemu-system-x86"], suite=suite, whole=True)
    except (RuntimeError, MissingToolError) as error:
        pytest.skip(f"no QEMU {NEWER_VERSION} is installed, and none can be had: {error}")
    program = tmp_path / "bin" / "qemu-system-x86_64"
    program.parent.mkdir()
    share = root / "usr" / "share"
    # With its own libraries and its own loader: they are newer than those of this machine.
    program.write_text(
        f'#!/bin/sh\nexec {root}/usr/lib64/ld-linux-x86-64.so.2 --library-path {root}/usr/lib/x86_64-linux-gnu '
        f'{root}/usr/bin/qemu-system-x86_64 -L {share}/qemu -L {share}/seabios "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    assert version_of(str(program)) >= NEWER_VERSION


@pytest.fixture
def boot(short_dir: Path, need: Callable[..., None]) -> Iterator[Callable[..., Guest]]:
    """``boot(vm, job, modules)`` starts a guest in QEMU; all that were started end with the test.

    ``programs`` are more programs for the guest, by their names.
    """
    guests: list[Guest] = []

    def start(
        vm: qemu.Vm,
        job: str,
        modules: Sequence[str],
        *,
        tools: bool = False,
        programs: Mapping[str, bytes] | None = None,
    ) -> Guest:
        need(vm.kind.program, "apt-get", "dpkg")
        archive = _archive(vm.kind.arch, (*vm.kind.bus_modules, *modules), E2FSPROGS if tools is True else tools or ())
        name = f"guest{len(guests)}"
        initrd = short_dir / f"{name}.cpio"
        initrd.write_bytes(archive + with_programs(jobs.job_tree(job), programs).cpio())
        command = vm.command(packages.guest_files(vm.kind.arch), initrd)
        guests.append(Guest(name, command, short_dir / f"{name}.log"))
        return guests[-1]

    yield start
    for guest in guests:
        guest.close()


@pytest.fixture
def boot_uml(short_dir: Path, need: Callable[..., None]) -> Iterator[Callable[..., Guest]]:
    """``boot_uml(job, devices)`` starts user-mode Linux; ``devices`` are (socket, virtio id)."""
    guests: list[Guest] = []

    def start(
        job: str,
        devices: Sequence[tuple[Path, int]],
        modules: Sequence[str] = jobs.BLOCK,
        *,
        programs: Mapping[str, bytes] | None = None,
    ) -> Guest:
        need("linux.uml", "busybox")
        root = short_dir / f"root{len(guests)}"
        root.mkdir()
        with_programs(Tree(), programs).write_to(root)
        try:
            command = uml.command(root, job, devices, modules=modules)
        except MissingToolError as exc:
            pytest.fail(str(exc))
        name = f"uml{len(guests)}"
        guests.append(Guest(name, command, short_dir / f"{name}.log", cwd=short_dir))
        return guests[-1]

    yield start
    for guest in guests:
        guest.close()


@pytest.fixture
def disk_image(tmp_path: Path) -> Callable[[int], Path]:
    """``disk_image(mib)`` makes a sparse file of that size."""

    def make(mib: int) -> Path:
        path = tmp_path / f"disk{mib}.img"
        with path.open("wb") as file:
            file.truncate(mib << 20)
        return path

    return make


@pytest.fixture
def expect_rings() -> Callable[..., None]:
    """``expect_rings(hcd, device, path, source)``: the device was rung, over this path and no other."""

    def check(hcd: HcdProcess, device: str, path: str, source: str) -> None:
        metrics = hcd.metrics()
        by_path: dict[str, float] = {}
        for labels, count in metrics.series("hcd_doorbell_rings_total", device=device):
            by_path[labels["path"]] = by_path.get(labels["path"], 0) + count
        rung = {name for name, count in by_path.items() if count}
        assert rung == {path}, f"{device} was rung over {by_path}"
        known = [labels for labels, _ in metrics.series("hcd_doorbell_info", device=device)]
        assert known
        assert {(labels["path"], labels["source"]) for labels in known} == {(path, source)}
        if source == "qmp":
            assert len({labels["address"] for labels in known} - {""}) == len(known), known
        assert metrics.total("hcd_requests_total", device=device) > 0
        assert metrics.total("hcd_protocol_errors_total", device=device) == 0
        assert metrics.total("hcd_guest_errors_total", device=device) == 0
        assert metrics.total("hcd_handler_errors_total", device=device) == 0

    return check


class Qmp:
    """A QMP client for tests: one command at a time, events are dropped."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("r")
        json.loads(self._lines.readline())
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        request = {"execute": command, "arguments": arguments}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        for line in self._lines:
            answer = json.loads(line)
            if "error" in answer:
                raise AssertionError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise AssertionError(f"{command}: QEMU hung up")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


@pytest.fixture
def open_qmp() -> Iterator[Callable[[Path], Qmp]]:
    """``open_qmp(path)`` connects to a QMP socket of a running QEMU."""
    clients: list[Qmp] = []

    def connect(path: Path) -> Qmp:
        clients.append(Qmp(path))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


@pytest.fixture
def run_tool(need: Callable[..., None]) -> Callable[..., str]:
    """``run_tool("debugfs", ...)``: its standard output; the test fails when the tool does."""

    def run(*command: str) -> str:
        need(command[0])
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
