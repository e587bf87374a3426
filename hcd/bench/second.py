"""The other front end: a C program of the source tree that shares no code with hcd's."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from hcd.demo.packages import MissingToolError
from hcd.errors import HcdError

__all__ = ["SOURCE", "SecondFrontend", "SecondResult"]

SOURCE = Path(__file__).resolve().parents[2] / "tests" / "bench" / "second_frontend.c"


@dataclass(frozen=True, slots=True)
class SecondResult:
    """As far as it measures; latencies in seconds."""

    requests: int
    per_second: float
    p50: float
    p99: float
    kicks_per_request: float
    calls_per_request: float


class SecondFrontend:
    """Compiled into ``directory`` when it is made. MissingToolError without the source tree or a compiler."""

    def __init__(self, directory: Path) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None or not SOURCE.exists():
            raise MissingToolError("the second front end needs a checkout of hcd and a C compiler")
        self._program = directory / "second_frontend"
        done = subprocess.run(
            [compiler, "-O2", "-o", str(self._program), str(SOURCE)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise HcdError(f"the second front end cannot be compiled: {done.stderr.strip()}")

    def run(self, socket: Path, *, rw: str, depth: int, size: int, seconds: float) -> SecondResult:
        """One load, on the processors of this process. HcdError when it fails."""
        command = [str(self._program), str(socket), rw, str(depth), str(size), f"{seconds:g}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 30)
        if done.returncode:
            raise HcdError(f"second front end: {done.stderr.strip() or f'status {done.returncode}'}")
        requests, per_second, p50, p99, kicks, calls = map(float, done.stdout.split())
        return SecondResult(
            int(requests), per_second, p50 / 1e6, p99 / 1e6, kicks / max(requests, 1), calls / max(requests, 1)
        )
