"""hcd does all that it should under the restrictions of its unit, as far as they can be had without systemd."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import skip_or_fail
from tables import table

from hcd.demo import own_frontend
from hcd.demo.hcd_process import Metrics

ROOT = Path(__file__).parent.parent
UNIT = ROOT / "systemd" / "hcd.service"
CONFINE = Path(__file__).parent / "confine.py"

CONFIG = "".join([
    '[daemon]\nmetrics = "unix:{dir}/metrics.sock"\n\n',
    table("disk", "blk", 'path = "direct"', blk_file="{dir}/disk.raw"),
    table("rng", "rng"),
    table("net0", "net"),
    table("net1", "net"),
])


@pytest.fixture
def confined(need: Callable[..., None], short_dir: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a program of Python's under the restrictions of the unit; it may write to ``short_dir``."""
    need("systemd-analyze")
    if os.getuid() != 0:
        pytest.skip("only root can take so much away")
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(CONFINE), str(UNIT), str(short_dir), sys.executable, *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


Confined = Callable[..., "subprocess.Popen[str]"]


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, text = process.communicate(timeout=60)
    if process.returncode == 77:
        skip_or_fail(f"cannot be confined here: {text}")
    return process.returncode, text


FORBIDDEN = {
    "a TCP socket": "import socket; socket.socket(socket.AF_INET)",
    "memory to write and execute": "import mmap; mmap.mmap(-1, 4096, prot=7)",
    "a file elsewhere": "import tempfile; tempfile.TemporaryFile(dir='/var/tmp')",
    "the clock": "import time; time.clock_settime(time.CLOCK_REALTIME, time.time())",
    "a file system": "import ctypes, os; ctypes.CDLL(None, use_errno=True).umount(b'/') and os.abort()",
    "a priority": "import os; os.setpriority(os.PRIO_PROCESS, 0, -5)",
    "another account": "import os; os.setuid(1)",
}


@pytest.mark.parametrize("what", list(FORBIDDEN))
def test_the_restrictions_are_real(confined: Confined, what: str) -> None:
    assert ended(confined("-c", FORBIDDEN[what]))[0] not in (0, 77)


def test_what_is_left_suffices_for_python(confined: Confined, short_dir: Path) -> None:
    status, text = ended(confined("-c", f"import trio; open('{short_dir}/x', 'w').write('y')"))
    assert (status, text) == (0, "")


def test_every_device_works_under_them(confined: Confined, short_dir: Path) -> None:
    ended(confined("-c", "pass"))  # skips where nothing can be confined
    (short_dir / "hcd.toml").write_text(CONFIG.format(dir=short_dir))
    with (short_dir / "disk.raw").open("wb") as image:
        image.truncate(32 << 20)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.settimeout(60)
        notify.bind(str(short_dir / "notify"))
        hcd = confined(
            "-m", "hcd", "run", str(short_dir / "hcd.toml"),
            NOTIFY_SOCKET=str(short_dir / "notify"), WATCHDOG_USEC="30000000", FDSTORE="0",
        )

        def until(start: bytes) -> None:
            while not notify.recv(4096).startswith(start):
                pass

        try:
            until(b"READY=1")
            until(b"WATCHDOG=1")
        except TimeoutError:
            hcd.kill()
            pytest.fail(f"never ready: {ended(hcd)}")
        said: list[str] = []
        assert own_frontend.run(short_dir, said.append), said
        hcd.send_signal(signal.SIGHUP)
        until(b"RELOADING=1")
        until(b"READY=1")
        text = scrape(short_dir / "metrics.sock")
        metrics = Metrics(text)
        assert metrics.total("hcd_requests_total", device="disk", status="ok") > 0
        assert metrics.total("process_start_time_seconds") > 0
        hcd.send_signal(signal.SIGTERM)
        status, log = ended(hcd)
    assert status == 0, log
    assert "reloaded: 4 unchanged" in log
    assert "Traceback" not in log
    assert "error" not in log


def scrape(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(str(path))
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        with client.makefile("rb") as stream:
            return stream.read().partition(b"\r\n\r\n")[2].decode()
