"""What a reload costs the devices that it does not touch."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from hcd.bench import blk
from hcd.bench.extra import Context, Daemon, Measured, judged, median_of
from hcd.demo.hcd_process import HcdFailedError

__all__ = ["reload"]

OTHERS = 10
LIMIT = 0.02
#: between one reload and the next (seconds)
PAUSE = 0.1
#: how often the log is looked at for the end of a reload (seconds)
GLANCE = 0.02
PATIENCE = 30.0


def _table(directory: Path, name: str) -> str:
    image = directory / f"{name}.raw"
    if not image.exists():
        image.write_bytes(bytes(1 << 20))
    return (
        f'[[device]]\nname = "{name}"\ntype = "blk"\nsocket = "{directory}/{name}.sock"\n'
        f'options = {{ blk-file = "{image}" }}\n'
    )


def _busy(directory: Path) -> str:
    return f'[[device]]\nname = "busy"\ntype = "blk"\nsocket = "{directory}/busy.sock"\noptions = {{ ram = "64M" }}\n'


class _Hangups:
    """Sends SIGHUP again and again on a thread of its own: ten devices come, then ten others in their place."""

    def __init__(self, hcd: Daemon) -> None:
        self.count = 0
        self.failure = ""
        self._hcd = hcd
        self._end = threading.Event()
        config = hcd.directory / "hcd.toml"
        self._config = config
        head = config.read_text()
        sets = [[_table(hcd.directory, f"{name}{i}") for i in range(OTHERS)] for name in "ab"]
        self._texts = [head + "".join(tables) for tables in sets]
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> _Hangups:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self.failure:
            raise HcdFailedError(self.failure)

    def _run(self) -> None:
        while not self._end.wait(PAUSE):
            self._config.write_text(self._texts[self.count % 2])
            os.kill(self._hcd.pid, signal.SIGHUP)
            self.count += 1
            deadline = time.monotonic() + PATIENCE
            while self._hcd.process.log_text.count("reloaded: ") < self.count:
                if time.monotonic() > deadline:
                    self.failure = f"no end of reload {self.count}:\n{self._hcd.process.log_text[-2000:]}"
                    return
                time.sleep(GLANCE)


def reload(context: Context) -> Sequence[Measured]:
    """The longest time in which a busy device (depth 32) finished nothing: alone, and while ten devices beside it
    come and ten others go."""
    alone, beside, reloads, failed = [], [], 0, 0
    for _ in range(context.rounds):
        with context.daemon(_busy) as hcd:
            case = blk.BlkCase(f"{hcd.directory}/busy.sock", depth=32, seconds=3 * context.seconds)
            alone.append(blk.run(case).longest_gap)
            with _Hangups(hcd) as running:
                result = blk.run(case)
            beside.append(result.longest_gap)
            reloads += running.count
            failed += result.errors
    more = [one - other for one, other in zip(beside, alone, strict=True)]
    gaps = f"longest gap {max(beside) * 1e3:.1f} ms, {max(alone) * 1e3:.1f} ms without"
    median = f"median of the rounds {median_of(beside) * 1e3:.1f} and {median_of(alone) * 1e3:.1f} ms"
    return [
        judged(
            f"{reloads} reloads that exchange {OTHERS} devices, beside a busy one",
            f"{gaps}; {median}; {failed} requests failed",
            "at most 20 ms more, none failed",
            max(beside) - max(alone) <= LIMIT and not failed,
            beside=max(beside),
            alone=max(alone),
            most=max(more),
            failed=failed,
            reloads=reloads,
        )
    ]
