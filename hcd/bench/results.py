"""What ``make bench`` leaves: one JSON file, and the tables of docs/performance.md between two marks."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hcd.bench.backends import Image, qsd_version
from hcd.bench.compare import CaseResult, Ratio
from hcd.lab import facts
from hcd.version import VERSION

__all__ = ["environment", "marked", "table", "write_docs", "write_json"]


def environment(image: Image | None) -> dict[str, str]:
    """What a reader has to know to judge the figures."""
    machine = facts.look()
    found = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "processor": f"{machine.cpu} ({machine.cpus} online)",
        "kernel": machine.kernel,
        "hypervisor below": machine.hypervisor,
        "hcd": VERSION,
        "Python": platform.python_version(),
        "qemu-storage-daemon": qsd_version(),
    }
    if image is not None:
        found["file"] = f"{image.size >> 20} MiB on {image.filesystem}"
    return found


def write_json(path: Path, found: dict[str, str], results: Sequence[CaseResult], extra: Sequence[Any]) -> None:
    """Everything, every round. What the file has of the part that was not measured now (cases, extra) stays."""
    old = _read(path)
    document = {
        "environment": found,
        "cases": [_case(result) for result in results] or old.get("cases", []),
        "extra": [dataclasses.asdict(one) for one in extra] or old.get("extra", []),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_finite(document), indent=1) + "\n", encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _case(result: CaseResult) -> dict[str, Any]:
    ratios = {other: {key: dataclasses.asdict(one) for key, one in of.items()} for other, of in result.ratios.items()}
    return {"case": dataclasses.asdict(result.case), "runs": dict(result.runs), "ratios": ratios}


def _finite(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- tables


def table(found: dict[str, str], results: Sequence[CaseResult]) -> str:
    """Markdown: the environment, then a row for each case and each back end that it was compared with."""
    head = ["case", "compared", "requests/s", "ratio", "p50 us", "ratio", "CPU s per million", "ratio"]
    rows = [_row(result, other) for result in results for other in result.case.backends[1:]]
    facts_lines = [f"- {key}: {value}" for key, value in found.items() if value]
    return "\n".join([*facts_lines, "", *_markdown(head, rows)]) + "\n"


def _row(result: CaseResult, other: str) -> list[str]:
    first = result.case.backends[0]

    def both(measure: str, scale: float, form: str) -> str:
        return " / ".join(format(result.median(name, measure) * scale, form) for name in (first, other))

    ratios = result.ratios[other]
    return [
        result.case.name,
        f"{first} / {other}",
        both("per_second", 1, ",.0f"),
        _shown(ratios["per_second"]),
        both("p50", 1e6, ".1f"),
        _shown(ratios["p50"]),
        both("cpu_per_million", 1, ".2f"),
        _shown(ratios["cpu_per_million"]),
    ]


def _shown(one: Ratio) -> str:
    """Median and spread."""
    if math.isnan(one.median):
        return "-"
    return f"**{one.median:.2f}** ({one.lowest:.2f} to {one.highest:.2f})"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def extra_table(found: dict[str, str], extra: Sequence[Any]) -> str:
    """Markdown of the single measurements."""
    rows = [[one.name, one.value, one.limit, one.verdict] for one in extra]
    facts_lines = [f"- {key}: {value}" for key, value in found.items() if value]
    return "\n".join([*facts_lines, "", *_markdown(["what", "measured", "to be", ""], rows)]) + "\n"


# -- docs/performance.md


def marked(text: str, mark: str, content: str) -> str:
    """``text`` with what stands between the marks replaced; the marks are added at its end if they are missing."""
    begin, end = f"<!-- {mark}: begin, written by python -m hcd.bench -->", f"<!-- {mark}: end -->"
    if begin not in text or end not in text:
        text = f"{text.rstrip()}\n\n{begin}\n{end}\n"
    head, _, rest = text.partition(begin)
    _, _, tail = rest.partition(end)
    return f"{head}{begin}\n{content}{end}{tail}"


def write_docs(path: Path, mark: str, content: str) -> None:
    text = path.read_text(encoding="utf-8") if path.exists() else "# Performance\n"
    path.write_text(marked(text, mark, content), encoding="utf-8")
