"""The result for people: facts, a table for each measure, the figures of 2009 beside it, and the warnings."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from hcd.lab.results import EXIT, HISTORY, RING, TRIP, Count, Historic, Report, Row

__all__ = ["render"]

_TITLES = {
    EXIT: "exit: one ring, as it holds the guest up: hcd's eventfd is signalled, hcd woken if it sleeps.",
    RING: "ring: from the guest's stamp to the entry of hcd's handler.",
    TRIP: "round trip: ring, handler, interrupt, guest sees it.",
}
_HEAD = ("path", "kind", "rings", "rings/s", "p50 us", "p99 us", "to pio", "2009 us", "origin")
_WIDTH = 110


def render(report: Report) -> str:
    """The whole text, ending in a newline."""
    parts = [_facts(report)]
    parts += [_measure(measure, report.rows) for measure in _TITLES if any(r.measure == measure for r in report.rows)]
    parts.append(_counts(report.counts))
    parts.append(_warnings(report.warnings))
    return "\n\n".join(part for part in parts if part) + "\n"


def _facts(report: Report) -> str:
    width = max(map(len, report.machine))
    return "\n".join(f"{name:{width}}  {value}" for name, value in report.machine.items())


def _measure(measure: str, rows: Sequence[Row]) -> str:
    mine = [row for row in rows if row.measure == measure]
    done = [_cells(row) for row in mine if not row.why]
    lines = [_TITLES[measure]]
    if done:
        lines += _table([_HEAD, *done])
    for row in mine:
        if row.why:
            lines += _wrapped(f"  {row.path} {row.kind}: ", row.why)
    if measure == EXIT:
        lines += _unmatched(mine)
    notes = list(dict.fromkeys(row.note for row in mine if row.note))
    if len(notes) == 1:
        lines += [f"  {notes[0]}"]
    else:
        lines += [f"  {row.path} {row.kind}: {row.note}" for row in mine if row.note]
    return "\n".join(lines)


def _cells(row: Row) -> tuple[str, ...]:
    then = _historic(row)
    return (
        row.path,
        row.kind,
        f"{row.rings}",
        f"{row.per_second:.0f}",
        _us(row.p50),
        _us(row.p99),
        f"{row.ratio:.2f}" if row.ratio else "-",
        _us(then.seconds) if then else "",
        then.origin if then else "",
    )


def _historic(row: Row) -> Historic | None:
    """What was posted in 2009 for this exit. Then, one kind of doorbell stood for a path."""
    if row.measure != EXIT:
        return None
    kind = "generic" if row.path == "hypercall" and row.kind in ("hyperv", "xen") else row.kind
    return next((one for one in HISTORY if (one.path, one.kind) == (row.path, kind)), None)


def _unmatched(rows: Iterable[Row]) -> list[str]:
    """Figures of 2009 that no row of this machine stands beside."""
    shown = {_historic(row) for row in rows if not row.why}
    return [
        f"  2009, {one.path} {one.kind}: {_us(one.seconds)} us ({one.origin})" for one in HISTORY if one not in shown
    ]


def _table(cells: Sequence[Sequence[str]]) -> list[str]:
    """Names to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        padded = [
            text.ljust(width) if column in (0, 1, len(widths) - 1) else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(padded)).rstrip())
    return lines


def _counts(counts: Sequence[Count]) -> str:
    lines = [
        f"  {one.path:9}  {one.device}/{one.doorbell}: {one.sent} rung, {one.counted} counted"
        f"{'' if one.equal else '   <-- DIFFERENT'}"
        for one in counts
    ]
    return "\n".join(["rings sent by the guest, and hcd_doorbell_rings_total:", *lines]) if lines else ""


def _warnings(warnings: Sequence[str]) -> str:
    if not warnings:
        return ""
    lines = [line for warning in warnings for line in _wrapped("  - ", warning)]
    return "\n".join(["Draw no conclusions about other machines from these figures:", *lines])


def _wrapped(head: str, text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent="    ")


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.2f}"
