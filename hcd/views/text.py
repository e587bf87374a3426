"""Tables, and numbers as people read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["align", "bytes_", "count", "cut", "duration", "printable", "rate", "time_ago", "wrap_words"]

_BYTES = ("B", "K", "M", "G", "T", "P")
_COUNTS = ("", "k", "M", "G", "T")


def align(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[str] = (), gap: str = "  "
) -> list[str]:
    """A table, ``gap`` between columns, those named in ``right`` flush right. Cells are made printable."""
    table = [list(header), *([printable(cell) or "-" for cell in row] for row in rows)]
    widths = [max(len(row[at]) for row in table) for at in range(len(header))]
    flush = [name in set(right) for name in header]
    return [
        gap.join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, flush, strict=True)
        ).rstrip()
        for row in table
    ]


def printable(text: str) -> str:
    """Control characters escaped: a peer's name must not steer the terminal."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def cut(text: str, width: int) -> str:
    """``text`` in ``width`` columns; a "~" at the end says that there was more."""
    return text if len(text) <= width else text[: width - 1] + "~"


def duration(seconds: float | None) -> str:
    """Of a request: "12 us", "3.4 ms", "1.2 s", "5 min"; "-" for None and for nothing."""
    if not seconds:
        return "-"
    for unit, size in (("us", 1e-6), ("ms", 1e-3), ("s", 1.0)):
        value = seconds / size
        if value < 9.95:
            return f"{value:.1f} {unit}"
        if value < 999.5 and not (unit == "s" and value >= 120):
            return f"{value:.0f} {unit}"
    return time_ago(seconds)


def time_ago(seconds: float) -> str:
    """A long time: "42 s", "13 min", "2 h 13 min", "5 d 2 h"."""
    whole = max(0, round(seconds))
    if whole < 120:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes // 60
    if hours < 48:
        return f"{hours} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"


def bytes_(value: float | None) -> str:
    """ "512B", "4.0K", "1.5G"; "-" for None."""
    return "-" if value is None else _scaled(value, 1024, _BYTES)


def count(value: float) -> str:
    """ "0", "999", "12.3k"."""
    return _scaled(value, 1000, _COUNTS)


def rate(value: float) -> str:
    """Of something a second: "-" for nothing at all."""
    return "-" if value <= 0 else f"{value:.1f}" if value < 9.95 else count(value)


def _scaled(value: float, step: int, units: Sequence[str]) -> str:
    at = 0
    while value >= step * 0.9995 and at < len(units) - 1:
        value /= step
        at += 1
    if at == 0:
        return f"{value:.0f}{units[0]}"
    return f"{value:.1f}{units[at]}" if value < 99.95 else f"{value:.0f}{units[at]}"


def wrap_words(head: str, words: Iterable[str], width: int = 100) -> list[str]:
    """``head`` and words after it, continued below the first one."""
    lines = [head]
    for word in words:
        if len(lines[-1]) + 1 + len(word) > width:
            lines.append(" " * len(head))
        lines[-1] += f" {word}"
    return lines
