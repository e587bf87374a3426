"""docs/operations.md against what it describes."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import manual_examples as examples
import pytest

from hcd.control.protocol import CALLS
from hcd.control.snapshot import (
    DeviceState,
    DoorbellState,
    Errors,
    LastReload,
    PeerState,
    QueueState,
    Snapshot,
    Times,
)
from hcd.metrics.names import FAMILIES
from hcd.views.doorbells import COLUMNS as BELL_COLUMNS
from hcd.views.doorbells import doorbells
from hcd.views.status import DEVICE_COLUMNS, QUEUE_COLUMNS, status
from hcd.views.top import COLUMNS as TOP_COLUMNS
from hcd.views.top import top

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


def test_the_contents_name_every_section_in_order() -> None:
    listed = re.findall(r"^- \[(.+)\]\(#", MANUAL, flags=re.M)
    assert listed == re.findall(r"^## (.+)$", MANUAL, flags=re.M)


def test_every_file_that_is_named_is_there() -> None:
    named = set(re.findall(r"`((?:drop-ins|monitoring)/[\w./-]+|[\w-]+\.conf)`", MANUAL))
    assert named
    places = [ROOT, ROOT / "systemd", ROOT / "systemd" / "drop-ins"]
    missing = [name for name in named if not any((place / name).exists() for place in places)]
    assert missing == []


# -- what the commands print


def example(command: str) -> list[str]:
    """What the manual shows of ``command``, without the indentation."""
    match = re.search(rf"^    \$ hcd {re.escape(command)}\n((?:    .*\n|\n(?=    ))*)", MANUAL, flags=re.M)
    assert match is not None, f"no example of hcd {command}"
    return [line.removeprefix("    ") for line in match[1].splitlines()]


def columns(header: str) -> list[str]:
    return re.split(r"  +", header.strip())


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("status", [DEVICE_COLUMNS, QUEUE_COLUMNS]),
        ("doorbells", [BELL_COLUMNS]),
        ("top --once", [TOP_COLUMNS]),
    ],
)
def test_the_tables_in_the_manual_have_the_columns_of_the_code(
    command: str, expected: list[tuple[str, ...]]
) -> None:
    headers = [line for line in example(command) if line.startswith("DEVICE ")]
    assert [columns(header) for header in headers] == [list(one) for one in expected]


def test_the_examples_of_the_manual_are_what_the_code_prints() -> None:
    """The same tables, made of the numbers that stand there: not a space differs."""
    shown = examples.snapshot()
    assert example("status") == status(shown)
    assert example("doorbells") == doorbells(shown)
    before, now = examples.a_second_later(shown)
    assert example("top --once") == top(before, now)
    assert example("trace disk0")[0].endswith(" tracing disk0, pid 2147 qemu-system-x86")
    times = [line.partition(" ")[0] for line in example("trace disk0")]
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d\.\d{6}", one) for one in times)


def test_every_key_of_a_snapshot_is_in_the_manual() -> None:
    section = MANUAL[MANUAL.index("### For programs") : MANUAL.index("## Restart and upgrade")]
    kinds = (Snapshot, LastReload, DeviceState, Errors, PeerState, QueueState, DoorbellState, Times)
    keys = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    assert keys <= set(re.findall(r"`(\w+)`", section))


def test_every_call_of_the_protocol_is_in_the_manual() -> None:
    section = MANUAL[MANUAL.index("### For programs") : MANUAL.index("## Restart and upgrade")]
    for call, arguments in CALLS.items():
        (row,) = re.findall(rf"^\| `{call}` \|(.*?)\|", section, flags=re.M)
        assert re.findall(r"`(\w+)`", row) == [key.strip("()") for key in arguments]
