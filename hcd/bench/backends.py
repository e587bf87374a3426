"""The back ends that ``make bench`` compares, as child processes on one processor, serving one file."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hcd.demo.hcd_process import HcdProcess, is_listening
from hcd.demo.packages import MissingToolError
from hcd.errors import ConfigError

__all__ = ["QSD", "Image", "Running", "hcd_blk", "make_image", "on_processors", "pin", "qsd", "qsd_version"]

QSD = "qemu-storage-daemon"
QUEUES = 4
START_SECONDS = 20
#: file systems whose page cache behaves as that of a real machine's disk
REAL = ("ext4", "xfs")
CHUNK = 4 << 20


@dataclass(frozen=True, slots=True)
class Image:
    """The file that all back ends serve."""

    path: Path
    size: int
    filesystem: str


def make_image(directory: Path, size: int, name: str = "disk") -> Image:
    """A file of ``size`` bytes, all of them on disk and in the page cache. ConfigError on another file system than
    ext4 or xfs: page-cache reads without waiting are not what they are there."""
    filesystem = _filesystem(directory)
    if filesystem not in REAL:
        raise ConfigError(f"{directory} is on {filesystem}; expected {' or '.join(REAL)} (choose with --directory)")
    path = directory / f"{name}.raw"
    with path.open("wb") as file:
        for _ in range(size // CHUNK):
            file.write(os.urandom(CHUNK))
        file.flush()
        os.fsync(file.fileno())
    return Image(path, path.stat().st_size, filesystem)


def _filesystem(directory: Path) -> str:
    """By the longest mount point above ``directory``."""
    best, kind = "", "unknown"
    where = str(directory.resolve())
    for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, mount, found, *_ = line.split()
        if (where + "/").startswith(mount.rstrip("/") + "/") and len(mount) >= len(best):
            best, kind = mount, found
    return kind


@dataclass(frozen=True, slots=True)
class Running:
    """A back end that listens."""

    socket: Path
    pid: int


# -- processors


def on_processors() -> tuple[int, int]:
    """One processor for the front end, one for the back end. ConfigError where there is only one."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise ConfigError("two processors are needed: one for the front end, one for the back end")
    return cpus[-1], cpus[0]


@contextlib.contextmanager
def pin(cpu: int) -> Iterator[None]:
    """This process, and those that it starts meanwhile, run on ``cpu`` alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


# -- back ends


@contextlib.contextmanager
def hcd_blk(directory: Path, name: str, image: Image, cpu: int, *, direct: bool = False) -> Iterator[Running]:
    """``hcd device blk`` with its defaults; yields where."""
    socket = directory / f"{name}.sock"
    words = [f"--blk-file={image.path}", f"--num-queues={QUEUES}", *(["--direct"] if direct else [])]
    arguments = ["device", "blk", f"--socket-path={socket}", "--log-level=warning", *words]
    with pin(cpu):
        process = HcdProcess(arguments, directory / f"{name}.log", sockets=[socket])
    with process:
        yield Running(socket, process.process.pid)


@contextlib.contextmanager
def qsd(
    directory: Path, name: str, image: Image, cpu: int, *, aio: str, direct: bool = False, queues: int = QUEUES
) -> Iterator[Running]:
    """qemu-storage-daemon; ``aio`` is io_uring, threads or (with ``direct``) native. Yields where."""
    program = shutil.which(QSD)
    if program is None:
        raise MissingToolError(f"{QSD} is missing (Debian package qemu-system-common or qemu-utils)")
    socket = directory / f"{name}.sock"
    file = f"driver=file,node-name=f,filename={image.path},aio={aio},cache.direct={'on' if direct else 'off'}"
    export = f"type=vhost-user-blk,id=e,addr.type=unix,addr.path={socket},node-name=d,writable=on,num-queues={queues}"
    words = [program, "--blockdev", file, "--blockdev", "driver=raw,file=f,node-name=d", "--export", export]
    log = directory / f"{name}.log"
    with pin(cpu), log.open("wb") as output:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
    try:
        _wait(process, socket, log)
        yield Running(socket, process.pid)
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], socket: Path, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not is_listening(socket):
        if process.poll() is not None or time.monotonic() > deadline:
            raise ConfigError(f"{QSD} does not start: {log.read_text(errors='replace').strip()}")
        time.sleep(0.01)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def qsd_version() -> str:
    """One line; "" where it is not installed."""
    return _first_line([QSD, "--version"])


def _first_line(command: Sequence[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.partition("\n")[0].strip()
