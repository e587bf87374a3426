"""What the doctor found: what is wrong, how one sees it, what to do."""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

__all__ = ["Finding", "Severity", "error", "note", "report", "report_json", "status", "warning"]

_INDENT = "    "


class Severity(enum.StrEnum):
    """An error keeps a device from working, a warning will at some time; a note is good to know."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding. ``check`` is its stable name for scripts; ``evidence`` and ``todo`` are sentences, or ""."""

    severity: Severity
    check: str
    what: str
    evidence: str = ""
    todo: str = ""


def error(check: str, what: str, evidence: str = "", todo: str = "") -> Finding:
    return Finding(Severity.ERROR, check, what, evidence, todo)


def warning(check: str, what: str, evidence: str = "", todo: str = "") -> Finding:
    return Finding(Severity.WARNING, check, what, evidence, todo)


def note(check: str, what: str, evidence: str = "", todo: str = "") -> Finding:
    return Finding(Severity.NOTE, check, what, evidence, todo)


def status(findings: Iterable[Finding]) -> int:
    """The exit status: 1 when something keeps a device from working."""
    return int(any(finding.severity is Severity.ERROR for finding in findings))


def report(findings: Sequence[Finding], looked_at: Iterable[str]) -> str:
    """For people: errors first, then what was looked at."""
    order = list(Severity)
    lines = []
    for finding in sorted(findings, key=lambda finding: order.index(finding.severity)):
        lines.append(f"{finding.severity}: {finding.what} [{finding.check}]")
        lines += [f"{_INDENT}{line}" for line in finding.evidence.splitlines()]
        lines += [f"{_INDENT}-> {line}" for line in finding.todo.splitlines()]
    lines.append(f"looked at: {', '.join(dict.fromkeys(looked_at))}")
    if not status(findings):
        lines.append("nothing was found that keeps a device from working")
    return "\n".join(lines)


def report_json(findings: Iterable[Finding], looked_at: Iterable[str]) -> str:
    """For programs: an object with "findings" and "looked_at"."""
    found = [asdict(finding) for finding in findings]
    return json.dumps({"findings": found, "looked_at": list(dict.fromkeys(looked_at))}, indent=2)
