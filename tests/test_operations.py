"""docs/operations.md against what it describes."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from hcd.metrics.names import FAMILIES

ROOT = Path(__file__).parent.parent
MANUAL = (ROOT / "docs" / "operations.md").read_text()


def metrics_table() -> str:
    """The table of the manual, made from the table of the code."""
    lines = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for family in FAMILIES:
        labels = ", ".join(family.labels)
        lines.append(f"| `{family.name}` | {family.type} | {labels} | {family.help} |")
    return "\n".join(lines)


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    assert metrics_table() in MANUAL, f"put this into docs/operations.md:\n{metrics_table()}"


@functools.cache
def texts() -> str:
    """Every string constant of hcd, implicitly joined ones as one."""
    nodes = (node for file in (ROOT / "hcd").rglob("*.py") for node in ast.walk(ast.parse(file.read_text())))
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


def log_lines() -> list[str]:
    section = MANUAL[MANUAL.index("## Log") :]
    return re.findall(r"^\| `(.+?)` \|", section, flags=re.M)


@pytest.mark.parametrize("line", log_lines())
def test_every_log_line_that_is_explained_is_written_somewhere(line: str) -> None:
    parts = [part.strip(" :;()") for part in line.split("…")]
    everything = texts()
    assert any(len(part) > 4 for part in parts)
    assert [part for part in parts if part and part not in everything] == []


def test_there_are_log_lines_to_explain() -> None:
    assert len(log_lines()) > 20


def test_every_link_within_the_manual_leads_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", MANUAL, flags=re.M)
    }
    links = set(re.findall(r"\]\(#([^)]+)\)", MANUAL))
    assert links
    assert links <= headings


def test_every_file_that_is_named_is_there() -> None:
    named = set(re.findall(r"`((?:drop-ins|monitoring)/[\w./-]+|[\w-]+\.conf)`", MANUAL))
    assert named
    places = [ROOT, ROOT / "systemd", ROOT / "systemd" / "drop-ins"]
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert missing == []
