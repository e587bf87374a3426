"""The VMM process as its parent sees it: requests with a deadline, and a kill when it is over."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from types import TracebackType
from typing import Any, Self

from hcd.errors import HcdError

__all__ = ["VmmFailed", "VmmProcess"]

#: on top of what a request itself may take (seconds)
_GRACE = 15.0


class VmmFailed(HcdError):
    """The VMM refused a request; it goes on."""


class VmmProcess:
    """``python -m hcd.lab.vmm``. ``alive`` is False once it had to be killed. HcdError when there is no KVM."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hcd.lab.vmm"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._buffer = b""
        self.alive = True
        try:
            self._answer(_GRACE)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._process.kill()
        self.close()

    def ask(self, do: str, *, timeout: float = 0, **arguments: Any) -> Any:
        """Make a request that may take ``timeout`` seconds. VmmFailed: it cannot be done, or the VMM is dead now."""
        if not self.alive:
            raise VmmFailed("the VMM was killed because a guest did not come back")
        request = json.dumps({"do": do, "timeout": timeout, **arguments}) + "\n"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            self.alive = False
            raise VmmFailed("the VMM has ended") from None
        return self._answer(timeout + _GRACE)

    def close(self) -> None:
        """Ask it to end by the end of its input; kill it if it does not."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        if not self.alive:
            self._process.kill()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a vCPU that not even SIGKILL gets out of KVM
                self._process.wait(_GRACE)
        self._process.stdout.close()
        self.alive = False

    def _answer(self, timeout: float) -> Any:
        line = self._read_line(time.monotonic() + timeout)
        if not line:
            self.alive = False
            raise VmmFailed("the VMM died, or its guest did not come back and it was killed")
        answer = json.loads(line)
        if "error" in answer:
            raise VmmFailed(answer["error"])
        return answer["ok"]

    def _read_line(self, deadline: float) -> bytes:
        """One line; empty when the process ended or the deadline passed: then it is killed."""
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(fd, 1 << 20) if ready else b""
            if not data:
                self._process.kill()
                return b""
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line
