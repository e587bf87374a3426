"""hcd itself as a child process, as an operator would start it: a configuration, a log, a metrics socket."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from prometheus_client.parser import text_string_to_metric_families

__all__ = ["HcdFailedError", "HcdProcess", "Metrics", "Resources"]

_START_SECONDS = 60


class HcdFailedError(Exception):
    """hcd did not start, or did not end as it should; the message has the end of its log."""


class Metrics:
    """One scrape of /metrics."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = list(text_string_to_metric_families(text))
        self._samples = [sample for family in self.families for sample in family.samples]

    def series(self, name: str, **labels: str) -> list[tuple[dict[str, str], float]]:
        """Every sample called ``name`` whose labels include ``labels``."""
        return [
            (sample.labels, sample.value)
            for sample in self._samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]

    def total(self, name: str, **labels: str) -> float:
        """The sum of ``series``; 0 where there is none."""
        return sum(value for _, value in self.series(name, **labels))

    def quantile(self, name: str, q: float, **labels: str) -> float | None:
        """The upper bound of the bucket in which quantile ``q`` lies; None for an empty histogram."""
        buckets: dict[float, float] = {}
        for found, count in self.series(f"{name}_bucket", **labels):
            bound = float(found["le"])
            buckets[bound] = buckets.get(bound, 0) + count
        total = max(buckets.values(), default=0)
        if not total:
            return None
        return next(bound for bound, count in sorted(buckets.items()) if count >= q * total)


class Resources:
    """What a process holds, as /proc shows it: descriptors, threads, mappings of guest memory.

    Trio keeps idle worker threads for a few seconds; they are not counted.
    """

    def __init__(self, pid: int | str = "self") -> None:
        proc = Path("/proc") / str(pid)
        self.fds = _links(proc / "fd")
        self.threads = sorted(name for name in _thread_names(proc / "task") if not name.startswith("Trio"))
        self.memory_files = [line for line in (proc / "maps").read_text().splitlines() if "memfd:" in line]

    def growth_since(self, earlier: Resources) -> str:
        """What there is more of than ``earlier``, in words; empty when there is nothing."""
        found = []
        if len(self.fds) > len(earlier.fds):
            new = [f"{fd} -> {target}" for fd, target in self.fds.items() if earlier.fds.get(fd) != target]
            found.append(f"{len(self.fds) - len(earlier.fds)} descriptors ({', '.join(new)})")
        if len(self.threads) > len(earlier.threads):
            found.append(f"{len(self.threads) - len(earlier.threads)} threads")
        if len(self.memory_files) > len(earlier.memory_files):
            found.append("mappings:\n" + "\n".join(self.memory_files))
        return "; ".join(found)


def _links(directory: Path) -> dict[str, str]:
    links = {}
    for path in directory.iterdir():
        try:
            links[path.name] = os.readlink(path)
        except FileNotFoundError:  # the descriptor with which the directory is read
            continue
    return links


def _thread_names(directory: Path) -> list[str]:
    names = []
    for path in directory.iterdir():
        try:
            names.append((path / "comm").read_text().strip())
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
    return names


class HcdProcess:
    """``hcd`` with ``arguments``. As a context manager it stops the daemon and checks how it ends.

    ``metrics`` is where the arguments or the configuration make it serve /metrics: a unix socket, or a port
    of 127.0.0.1.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        metrics: Path | int | None = None,
        sockets: Sequence[Path] = (),
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.log = log
        self.metrics_at = metrics
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "hcd", *arguments],
                # not the machine's control socket; the configuration may name another
                env={**os.environ, "HCD_CONTROL": ""},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=pass_fds,
            )
        try:
            self._wait_until_listening([*sockets, *([] if metrics is None else [metrics])])
        except BaseException:
            self.kill()
            raise

    @classmethod
    def from_config(cls, directory: Path, devices: str, *, daemon: str = "", metrics_port: int | None = None) -> Self:
        """``hcd run`` with the ``[[device]]`` tables of ``devices``; its files are in ``directory``.

        ``{dir}`` in the text stands for the directory. ``daemon`` is more lines for the table ``[daemon]``.
        Metrics are on ``metrics.sock`` in the directory, or on ``metrics_port`` of 127.0.0.1.
        """
        metrics = directory / "metrics.sock" if metrics_port is None else metrics_port
        address = f"unix:{metrics}" if metrics_port is None else f"127.0.0.1:{metrics}"
        head = f'[daemon]\nmetrics = "{address}"\n{daemon}\n'
        body = devices.replace("{dir}", str(directory))
        config = directory / "hcd.toml"
        config.write_text(head + body)
        sockets = [Path(path) for path in re.findall(r'^\s*socket\s*=\s*"([^"]+)"', body, re.MULTILINE)]
        return cls(["run", str(config)], directory / "hcd.log", metrics=metrics, sockets=sockets)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()

    @property
    def log_text(self) -> str:
        return self.log.read_text(errors="replace")

    def metrics(self) -> Metrics:
        """Scrape it now."""
        assert self.metrics_at is not None
        return Metrics(fetch(self.metrics_at, "/metrics"))

    def resources(self) -> Resources:
        return Resources(self.process.pid)

    def stop(self, timeout: float = 60) -> None:
        """SIGTERM. HcdFailedError unless it exits with 0, in time, without a traceback in its log."""
        self.process.send_signal(signal.SIGTERM)
        self.wait(timeout)

    def wait(self, timeout: float = 60) -> None:
        """The same checks for a daemon that ends by itself."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            raise self._failure(f"did not end within {timeout:g} s") from None
        if status != 0:
            raise self._failure(f"ended with status {status}")
        if "Traceback" in self.log_text:
            raise self._failure("logged a traceback")

    def kill(self) -> None:
        """End it at once, without questions. Harmless when repeated."""
        self.process.kill()
        self.process.wait()

    def _wait_until_listening(self, sockets: Sequence[Path | int]) -> None:
        """hcd says nothing that a parent could wait for, so the kernel's socket table is asked."""
        deadline = time.monotonic() + _START_SECONDS
        while not all(is_listening(path) for path in sockets):
            if self.process.poll() is not None:
                raise self._failure(f"ended with status {self.process.returncode} while starting")
            if time.monotonic() > deadline:
                raise self._failure(f"does not listen after {_START_SECONDS} s")
            time.sleep(0.01)

    def _failure(self, what: str) -> HcdFailedError:
        tail = "\n".join(self.log_text.splitlines()[-40:])
        return HcdFailedError(f"hcd {what} (log: {self.log})\n{tail}")


def is_listening(where: Path | int) -> bool:
    """Whether some process listens on a unix socket, or on a port of 127.0.0.1.

    Nothing connects to the unix socket to find out: that would be a front end.
    """
    if isinstance(where, int):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", where)) == 0
    accepting = "00010000"  # __SO_ACCEPTCON in the column "Flags"
    for line in Path("/proc/net/unix").read_text().splitlines():
        words = line.split()
        if words[-1] == str(where) and words[3] == accepting:
            return True
    return False


def fetch(where: Path | int, url: str) -> str:
    """The body of an HTTP GET (unix socket or port of 127.0.0.1). HcdFailedError unless the status is 200."""
    connection = (
        http.client.HTTPConnection("127.0.0.1", where, timeout=10) if isinstance(where, int) else _UnixConnection(where)
    )
    try:
        connection.request("GET", url)
        response = connection.getresponse()
        body = response.read().decode()
    finally:
        connection.close()
    if response.status != 200:
        raise HcdFailedError(f"GET {url}: status {response.status}\n{body}")
    return body


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=10)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))
