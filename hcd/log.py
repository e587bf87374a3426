"""Logging, in the form that whoever reads it understands.

Where stderr ends in the journal (JOURNAL_STREAM names it), records go there as fields (:mod:`hcd.journal`). If it does
not take them, they are lines on stderr that start with "<N>", the syslog priority, and carry no time because the
journal has its own. Elsewhere a line on stderr is "hcd: warning: disk0: text". The device comes from
``LoggerAdapter(logger, {"device": name})``; lines about a queue begin with "queue N:".
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import IO, Any

from hcd import journal
from hcd.journal import JournalHandler
from hcd.log_lines import Formatter

__all__ = ["LEVELS", "DeviceLog", "Formatter", "RateLimited", "journal_reads", "setup"]

LEVELS = ("debug", "info", "warning", "error")

Logger = logging.Logger | logging.LoggerAdapter  # type: ignore[type-arg]

#: where an argument goes
_PLACE = re.compile(r"%[-+ #0]*[\d.]*[a-zA-Z]")
#: more keys than any sane daemon has; beyond it the one that was silent longest is forgotten
_MAX_KEYS = 1024


class RateLimited:
    """Says at most ``limit`` lines a ``period`` (seconds) for one key, then how many it kept back.

    The number comes with the first line of a later period, or with :meth:`flush`. A key is whatever
    repeats: a cause, a (queue, cause) pair. Any thread.
    """

    def __init__(
        self,
        logger: Logger,
        limit: int = 5,
        period: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._logger = logger
        self._limit = limit
        self._period = period
        self._clock = clock
        self._lock = threading.Lock()
        self._keys: OrderedDict[Hashable, _Window] = OrderedDict()

    def log(self, level: int, key: Hashable, message: str, *args: object) -> bool:
        """Log ``message % args`` unless ``key`` has used up its lines; returns whether it was logged."""
        return self._say(level, key, message, args)

    def _say(self, level: int, key: Hashable, message: str, args: tuple[object, ...]) -> bool:
        allowed = self.admits(level, key)
        if allowed:
            self._logger.log(level, message, *args, stacklevel=3)  # the place of who called us
        return allowed

    def admits(self, level: int, key: Hashable) -> bool:
        """Whether ``key`` has a line left; it is used up then. Says first what was kept back before."""
        with self._lock:
            now = self._clock()
            window = self._keys.get(key)
            suppressed = 0
            if window is None or now - window.start >= self._period:
                suppressed = window.suppressed if window else 0
                window = self._keys[key] = _Window(now, level)
            self._keys.move_to_end(key)
            if len(self._keys) > _MAX_KEYS:
                self._keys.popitem(last=False)
            allowed = window.said < self._limit
            window.said += allowed
            window.suppressed += not allowed
        if suppressed:
            self._report(level, key, suppressed)
        return allowed

    def warning(self, key: Hashable, message: str, *args: object) -> bool:
        return self._say(logging.WARNING, key, message, args)

    def error(self, key: Hashable, message: str, *args: object) -> bool:
        return self._say(logging.ERROR, key, message, args)

    def flush(self) -> None:
        """Say what was kept back and forget everything; for the end of a connection."""
        with self._lock:
            left = [(key, window) for key, window in self._keys.items() if window.suppressed]
            self._keys.clear()
        for key, window in left:
            self._report(window.level, key, window.suppressed)

    def _report(self, level: int, key: Hashable, suppressed: int) -> None:
        what = key if isinstance(key, str) else "this"
        self._logger.log(level, "%d more lines about %s were suppressed", suppressed, what)


class DeviceLog(logging.LoggerAdapter):  # type: ignore[type-arg]
    """The log of one device. A guest may cause its warnings and errors: those that repeat are limited, by their text
    before arguments are put in."""

    def __init__(self, logger: str, device: str) -> None:
        super().__init__(logging.getLogger(logger), {"device": device})
        self._limit = RateLimited(logging.LoggerAdapter(self.logger, self.extra))

    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        if level < logging.WARNING or self._limit.admits(level, _PLACE.sub("…", str(msg))):
            super().log(level, msg, *args, **kwargs | {"stacklevel": kwargs.get("stacklevel", 1) + 1})


class _Window:
    __slots__ = ("level", "said", "start", "suppressed")

    def __init__(self, start: float, level: int) -> None:
        self.start = start
        self.level = level
        self.said = 0
        self.suppressed = 0


def setup(level: str = "info", stream: IO[str] | None = None, journal_socket: str = journal.SOCKET) -> None:
    """Send the log of hcd and its plug-ins to ``stream`` (stderr), or to the journal if that is where ``stream`` ends.
    Replaces an earlier set-up."""
    target = sys.stderr if stream is None else stream
    in_journal = journal_reads(target)
    handler = JournalHandler(target, journal_socket) if in_journal else logging.StreamHandler(target)
    handler.setFormatter(Formatter(journal=in_journal))
    root = logging.getLogger()
    for old in list(root.handlers):
        if isinstance(old.formatter, Formatter):
            root.removeHandler(old)
            old.close()
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.raiseExceptions = False  # a full or closed stderr must not end in tracebacks


def journal_reads(stream: IO[str]) -> bool:
    """Whether ``stream`` ends in the journal (systemd.exec(5), JOURNAL_STREAM: "device:inode")."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError, AttributeError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"
