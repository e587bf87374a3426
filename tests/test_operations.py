"""docs/operations.md against what it describes."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
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
    section = MANUAL[MANUAL.index("## Log\n") :]
    return re.findall(r"^\| `(.+?)` \|", section, flags=re.M)


#: parts of hcd that are no daemon: what they say is not in its log
APART = ("bench", "demo", "frontend", "lab", "testing")
LEVELS = ("critical", "error", "exception", "info", "log", "warning")
#: whoever made the text has it in the manual, or it is that of a device type
PASSED_ON = {"%s", "%s: %s", "queue %d: %s"}


def logged() -> Iterator[tuple[str, str]]:
    """What the daemon writes to its log at level info and above: where, and the text with … for what differs."""
    for file in sorted((ROOT / "hcd").rglob("*.py")):
        where = file.relative_to(ROOT)
        if where.parts[1] in APART:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and (text := template(node)) and text not in PASSED_ON:
                yield f"{where}:{node.lineno}", re.sub(r"%[-\d.]*[a-z]", "…", text)


def template(call: ast.Call) -> str:
    """The format of a call of a logger; "" for other calls. A key may stand before it (hcd.log.RateLimited)."""
    function = call.func
    if not (isinstance(function, ast.Attribute) and function.attr in LEVELS):
        return ""
    if not re.search("log|rare", ast.unparse(function.value), re.I):
        return ""
    texts = [one.value for one in call.args[:3] if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    return max(texts, key=len, default="")


def explains(line: str, text: str) -> bool:
    """Whether a line of the manual is (part of) ``text``."""
    position = 0
    for part in line.split("…"):
        position = text.find(part, position)
        if position < 0:
            return False
        position += len(part)
    return True


def test_every_line_that_is_logged_is_explained() -> None:
    lines = log_lines()
    unexplained = [(where, text) for where, text in logged() if not any(explains(line, text) for line in lines)]
    assert unexplained == []


def test_the_lines_that_are_logged_are_found() -> None:
    texts = [text for _, text in logged()]
    assert len(texts) > 60
    for expected in ("ready: …", "reloaded: …", "front end disconnected", "a scrape failed: …: …"):
        assert expected in texts


@pytest.mark.parametrize("line", log_lines())
def test_every_log_line_that_is_explained_is_written_somewhere(line: str) -> None:
    parts = [part.strip(" :;()") for part in line.split("…")]
    everything = texts()
    assert any(len(part) >= 4 for part in parts)
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
