"""hcd as a process, with a device type made for the tests: a lamp."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import pytest

SOURCE = """
from hcd.device import ConfigError, Device, Option

class Lamp(Device):
    virtio_id = 18
    description = "a lamp"
    options = (
        Option("fault", "str", "what open() does", default="none"),
        Option("level", "int", "how bright", default=1, minimum=0, maximum=9),
        Option("block", "str", "a FIFO that its lane reads, and waits for", default=""),
    )

    def open(self, lane):
        fault = self.option["fault"]
        if fault == "operator":
            raise ConfigError("no bulb")
        if fault == "system":
            open("/proc/none/such")
        if fault == "defect":
            raise KeyError("bulb")
        if self.option["block"]:
            lane.post(lambda: open(self.option["block"]).read())
        self.log.info("on at %d", self.option["level"])

    def close(self):
        self.log.info("off")

    def process(self, queue):
        pass
"""

GET_FEATURES = struct.pack("<III", 1, 0x1, 0)


class Process:
    """One hcd, for a minute at most. Its log is read line by line; ``end`` says how it ended."""

    def __init__(
        self,
        site: Path,
        arguments: tuple[str, ...],
        fds: tuple[int, ...] = (),
        extra: Mapping[str, str] | None = None,
        launcher: tuple[str, ...] = (),
    ) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sys.path]), **(extra or {})}
        environment.pop("JOURNAL_STREAM", None)
        command = [*launcher, sys.executable, "-m", "hcd", *arguments]
        self.popen = subprocess.Popen(
            command, env=environment, pass_fds=fds, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self.watchdog = threading.Timer(60, self.popen.kill)
        self.watchdog.start()

    def stop(self) -> None:
        self.watchdog.cancel()
        self.popen.kill()

    @property
    def stderr(self) -> IO[str]:
        assert self.popen.stderr is not None
        return self.popen.stderr

    def until(self, pattern: str) -> str:
        """The first match in the log from here on."""
        for line in self.stderr:
            self.lines.append(line)
            if match := re.search(pattern, line):
                return match[0]
        pytest.fail(f"ended with {self.popen.wait(30)} before {pattern!r}:\n{''.join(self.lines)}")

    def end(self, number: int | None = None) -> tuple[int, str]:
        """Exit status and the whole log, after ``signal`` number if one is given."""
        if number is not None:
            self.popen.send_signal(number)
        self.lines.extend(self.stderr)
        return self.popen.wait(30), "".join(self.lines)


def served(client: socket.socket) -> bool:
    """Whether a back end answers; False when it hangs up."""
    try:
        client.sendall(GET_FEATURES)
        answer = client.recv(20, socket.MSG_WAITALL)
    except (ConnectionResetError, BrokenPipeError):
        return False
    if not answer:
        return False
    assert struct.unpack("<III", answer[:12]) == (1, 0x5, 8)
    return True


def hung_up(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:  # it did so before it had read everything
        return True


def write(tmp_path: Path, settings: str = "", options: str = "", names: tuple[str, ...] = ("desk",)) -> str:
    text = f"[daemon]\n{settings}\n"
    for name in names:
        text += f'[[device]]\nname = "{name}"\ntype = "lamp"\nsocket = "{tmp_path}/{name}.sock"\n'
        text += f"[device.options]\n{options}\n"
    file = tmp_path / "hcd.toml"
    file.write_text(text)
    return str(file)
