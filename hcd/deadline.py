"""The end of a process that does not come to an end: code of a device that never returns, for whatever reason.

hcd asks devices to stop and to close, and waits for their lanes. A device that waits itself, or goes round in circles,
would keep the process for ever; service managers kill it after a while, terminals and scripts don't.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable

__all__ = ["EX_STUCK", "Deadline", "leave_threads"]

#: exit status of a process that had to be ended so
EX_STUCK = 70  # sysexits.h, EX_SOFTWARE

_log = logging.getLogger("hcd.daemon")


class Deadline:
    """Ends the process some time after :meth:`start`, unless :meth:`cancel` comes before. ``seconds`` is asked then."""

    def __init__(self, seconds: Callable[[], float], end: Callable[[int], object] = os._exit) -> None:
        self._seconds = seconds
        self._end = end
        self._timer: threading.Timer | None = None

    def start(self) -> None:
        """Once; also from a signal handler, while the main thread hangs."""
        if self._timer is None:
            self._timer = threading.Timer(self._seconds(), self._passed)
            self._timer.daemon = True
            self._timer.start()

    @property
    def running(self) -> bool:
        return self._timer is not None

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _passed(self) -> None:
        assert self._timer is not None
        _log.error("not ended after %g s, ended by force: %s", self._timer.interval, "; ".join(_whereabouts()))
        logging.shutdown()
        self._end(EX_STUCK)


def _whereabouts() -> list[str]:
    """Where each thread is, but for this one: the name of the culprit is among them."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    found = []
    for ident, frame in sys._current_frames().items():
        if ident != threading.get_ident():
            place = traceback.extract_stack(frame)[-1]
            found.append(f"{names.get(ident, 'a thread')} is at {place.filename}:{place.lineno}, {place.name}()")
    return found


def leave_threads(status: int) -> None:
    """End the process with ``status`` if threads of devices, which Python would wait for, are still there."""
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
    left = [thread.name for thread in others if not thread.daemon]
    if left:
        _log.warning("ended while threads of devices run on, which close() should have ended: %s", ", ".join(left))
        logging.shutdown()
        sys.stdout.flush()
        os._exit(status)
