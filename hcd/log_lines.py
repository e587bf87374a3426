"""How a record becomes lines: a prefix that tells priority and device, and nothing that could steer a terminal."""

from __future__ import annotations

import logging

__all__ = ["Formatter", "printable", "priority"]


class Formatter(logging.Formatter):
    """One prefix for every line, so that a traceback keeps its priority and its device."""

    def __init__(self, *, journal: bool = False) -> None:
        super().__init__()
        self.journal = journal

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        prefix = f"<{priority(record.levelno)}>" if self.journal else f"hcd: {record.levelname.lower()}: "
        device = getattr(record, "device", "")
        if device:
            prefix += f"{device}: "
        return "\n".join(prefix + printable(line) for line in text.splitlines() or [""])


def priority(level: int) -> int:
    """The syslog priority of a level of :mod:`logging`."""
    if level >= logging.CRITICAL:
        return 2
    if level >= logging.ERROR:
        return 3
    if level >= logging.WARNING:
        return 4
    return 6 if level >= logging.INFO else 7


def printable(line: str) -> str:
    """``line`` with control characters escaped: a guest or front end may have chosen them."""
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape").decode() for c in line)
