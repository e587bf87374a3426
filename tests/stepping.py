"""A device process that is run one machine instruction at a time, so that it can be looked at between any two.

``Stepped`` starts a process with a queue on the memory of a ``Rig`` (crash.py) and carries out operations on it under
ptrace(2) with PTRACE_SINGLESTEP. What memory holds between two instructions is what a kill there would leave.

Run as a program, this module is that process. It reads operations from its standard input, one a line, and stops
itself before and after each.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PTRACE_TRACEME, PTRACE_CONT, PTRACE_SINGLESTEP = 0, 7, 9

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def _ptrace(request: int, pid: int) -> None:
    if _libc.ptrace(request, pid, None, None) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"ptrace: {os.strerror(error)}")


class Stepped:
    """The process with the device's queue. It ends by SIGKILL, as it is there for."""

    def __init__(self, rig: Any, *, resume: bool) -> None:
        region, area, ring = rig.memory.regions[0], rig.area, rig.ring
        fds = region.fd, area.fd
        numbers = [
            *fds, region.gpa, region.size, region.user_addr, area.size, area.queue_size, rig.size, rig.packed,
            rig.event_idx, ring.desc, ring.driver, ring.device, ring.initial_base, resume,
        ]  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, __file__, *(str(int(number)) for number in numbers)],
            stdin=subprocess.PIPE,
            pass_fds=fds,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        self.steps = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def run(self, operation: str, between: Callable[[], object] = lambda: None) -> None:
        """Carry ``operation`` out; ``between`` is called after each instruction of it."""
        stdin, pid = self._process.stdin, self._process.pid
        assert stdin is not None
        stdin.write(f"{operation}\n".encode())
        stdin.flush()
        if self.steps:
            _ptrace(PTRACE_CONT, pid)
        self._expect_stop(signal.SIGSTOP)
        while True:
            _ptrace(PTRACE_SINGLESTEP, pid)
            if self._expect_stop(signal.SIGTRAP, signal.SIGSTOP) == signal.SIGSTOP:
                return
            self.steps += 1
            between()

    def _expect_stop(self, *wanted: signal.Signals) -> int:
        _, status = os.waitpid(self._process.pid, 0)
        assert os.WIFSTOPPED(status), f"the stepped process ended with status {status:#x}"
        assert os.WSTOPSIG(status) in wanted, f"the stepped process was stopped by signal {os.WSTOPSIG(status)}"
        return os.WSTOPSIG(status)


def _serve(arguments: list[int]) -> None:
    from crash import answer
    from rings import EVENT_IDX, INDIRECT_DESC, RING_PACKED, VERSION_1, Scheduler

    from hcd.dataplane.memory import MemoryTable, Region
    from hcd.dataplane.stats import DoorbellStats, QueueStats
    from hcd.dataplane.virtqueue import Inflight, Request, Virtqueue

    (memory_fd, area_fd, gpa, size, user, area_size, entries, ring_size, packed, event_idx, desc, driver, device,
     base, resume) = arguments  # fmt: skip
    queue = Virtqueue(0, DoorbellStats(), QueueStats(("request",)), 1024)
    queue.scheduler = Scheduler()
    queue.set_memory(MemoryTable([Region(gpa, size, user, 0, memory_fd)]))
    queue.set_inflight(Inflight.map(area_fd, 0, area_size, 1, entries), bool(resume))
    features = VERSION_1 | INDIRECT_DESC | EVENT_IDX * event_idx | RING_PACKED * packed
    addresses = [address - gpa + user for address in (desc, driver, device)]
    taken: dict[int, Request] = {}

    def start() -> None:
        queue.start(features, ring_size, *addresses, base)
        queue.set_enabled(True)

    def take() -> None:
        request = queue.pop()
        assert request is not None
        taken[request.u64(0)] = request

    def complete(*which: str) -> None:
        for one in which:
            request = taken.pop(int(one))
            request.complete(answer(request))

    def put_back() -> None:
        queue.unpop(taken.pop(max(taken)))

    operations = {"start": start, "take": take, "complete": complete, "put-back": put_back, "flush": queue.flush}
    _ptrace(PTRACE_TRACEME, 0)
    me = os.getpid()
    while line := sys.stdin.readline():
        name, *words = line.split()
        operation = operations[name]
        os.kill(me, signal.SIGSTOP)
        operation(*words)
        os.kill(me, signal.SIGSTOP)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    _serve([int(argument) for argument in sys.argv[1:]])
