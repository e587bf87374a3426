"""A process ends although code of a device never returns; and says where it is."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hcd.deadline import EX_STUCK, Deadline

Make = Callable[..., Path]

SOURCE = """
import threading, time
from hcd.device import Device

class Good(Device):
    virtio_id = 63
    def process(self, queue):
        for request in queue:
            request.complete()

class Thread(Good):
    def open(self, lane):
        threading.Thread(target=time.sleep, args=(1000,), name="forgotten", daemon=False).start()

class Close(Good):
    def close(self):
        time.sleep(1000)

class AsyncOpen(Good):
    def open(self, lane):
        print("hanging", flush=True)
        time.sleep(1000)
    async def process(self, queue):
        pass
"""


def test_it_ends_the_process_and_says_where_each_thread_is(caplog: pytest.LogCaptureFixture) -> None:
    """The culprit is among them."""
    statuses: list[int] = []
    ended, go = threading.Event(), threading.Event()

    def end(status: int) -> None:
        statuses.append(status)
        ended.set()

    def hang_in_a_device() -> None:
        go.wait()

    culprit = threading.Thread(target=hang_in_a_device, name="culprit")
    culprit.start()
    deadline = Deadline(lambda: 0.01, end)
    deadline.start()
    deadline.start()
    assert ended.wait(60)
    go.set()
    culprit.join()
    assert statuses == [EX_STUCK]
    assert "not ended after 0.01 s" in caplog.text
    assert "culprit is at " in caplog.text


def test_it_does_nothing_when_it_is_cancelled() -> None:
    """Nor leaves a thread behind."""
    before = threading.active_count()
    deadline = Deadline(lambda: 3600, lambda status: None)
    deadline.cancel()
    assert not deadline.running
    deadline.start()
    deadline.cancel()
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(60)
    assert threading.active_count() == before


@pytest.fixture
def environment(make_distribution: Make) -> dict[str, str]:
    types = {name.lower(): f"lamp_hang:{name}" for name in ("Good", "Thread", "Close", "AsyncOpen")}
    site = make_distribution("hangworks", "1.0", types, {"lamp_hang": SOURCE})
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))}


def device(kind: str, *words: str) -> list[str]:
    return [sys.executable, "-m", "hcd", "device", kind, "--drain-timeout=0.1", *words]


@pytest.mark.long
def test_threads_of_a_device_do_not_keep_the_process(environment: dict[str, str]) -> None:
    """Its exit status is what it would have been."""
    command = device("thread", "--", "sh", "-c", "exit 7 # {socket}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 7
    assert "threads of devices run on, which close() should have ended: forgotten" in done.stderr


@pytest.mark.long
def test_a_second_signal_ends_it_while_a_device_hangs_in_trio(environment: dict[str, str], short_dir: Path) -> None:
    """Ctrl-C twice, say, in a terminal."""
    command = device("asyncopen", f"--socket-path={short_dir}/s")
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "hanging\n"
        process.send_signal(signal.SIGINT)
        while True:
            try:
                process.wait(0.5)
                break
            except subprocess.TimeoutExpired:  # the first one may have come before the second was waited for
                process.send_signal(signal.SIGINT)
    assert process.returncode == -signal.SIGINT


@pytest.mark.slow
def test_a_device_that_never_closes_is_left_behind(environment: dict[str, str]) -> None:
    """After what its draining and closing may take."""
    command = device("close", "--", "true", "{socket}")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == EX_STUCK
    assert re.search(r"MainThread is at \S+lamp_hang\.py:\d+, close\(\)", done.stderr)
