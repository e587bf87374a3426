"""Rules, alerts and the dashboard name metrics and labels that there are, and do what they say."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hcd.metrics.names import BY_NAME

ROOT = Path(__file__).parent.parent
RULES = sorted((ROOT / "monitoring").glob("*.yml"))
DASHBOARD = ROOT / "monitoring" / "dashboard.json"

#: of Prometheus itself, and of prometheus_client's ProcessCollector
FOREIGN = {"up", "process_cpu_seconds_total", "process_start_time_seconds"}
#: what a target has beside the labels of the family
TARGET_LABELS = {"job", "instance"}
_NAME = re.compile(r"(?<![\w:])(?:hcd|process)_[a-z0-9_]+(?![\w:])")
_RECORDED = re.compile(r"\b[a-z_]+:hcd_[a-z0-9_]+:[a-z0-9_]+")
_USED_LABELS = re.compile(r"\b([a-z_]+)\s*(?:=~|!~|!=|=)\s*\"")
_GROUPED = re.compile(r"\b(?:by|without|on)\s*\(([^)]*)\)")


def dashboard() -> Any:
    return json.loads(DASHBOARD.read_text())


def dashboard_expressions() -> Iterator[str]:
    document = dashboard()
    for panel in document["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in document["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["query"]


def rule_expressions() -> Iterator[str]:
    for file in RULES:
        text = re.sub(r"^\s*#.*$", "", file.read_text(), flags=re.M)
        for match in re.finditer(r"^( +)expr: *(.*(?:\n\1 .*)*)", text, flags=re.M):
            yield match[2].lstrip("|\n ")


def family(name: str) -> str:
    """The family to which a series called ``name`` belongs."""
    base = re.sub(r"_(bucket|sum|count)$", "", name)
    return base if base in BY_NAME and BY_NAME[base].type == "histogram" else name


def expressions() -> list[str]:
    return [*rule_expressions(), *dashboard_expressions()]


def recorded() -> set[str]:
    return {match[1] for file in RULES for match in re.finditer(r"- record: (\S+)", file.read_text())}


def test_every_metric_that_is_named_exists() -> None:
    found = {family(name) for text in expressions() for name in _NAME.findall(text)} - FOREIGN
    assert len(found) > 15, "the patterns find what they should"
    assert found <= BY_NAME.keys()
    assert {name for text in expressions() for name in _RECORDED.findall(text)} <= recorded()


@pytest.mark.parametrize("text", expressions())
def test_every_label_belongs_to_a_metric_of_the_expression(text: str) -> None:
    named = [family(name) for name in _NAME.findall(text)]
    labels = {label for name in named if name in BY_NAME for label in BY_NAME[name].labels}
    used = set(_USED_LABELS.findall(text))
    for group in _GROUPED.findall(text):
        used |= {label.strip() for label in group.split(",")}
    if text.startswith("label_values"):
        used.add(text.rpartition(",")[2].strip(" )"))
    assert used - {"le"} <= labels | TARGET_LABELS


def test_every_family_of_the_data_path_is_on_the_dashboard() -> None:
    shown = {family(name) for text in dashboard_expressions() for name in _NAME.findall(text)}
    assert {name for name, one in BY_NAME.items() if one.hot} <= shown


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_every_alert_says_what_to_do_in_the_manual() -> None:
    manual = (ROOT / "docs" / "operations.md").read_text()
    alerts = re.findall(r"- alert: (\S+)", (ROOT / "monitoring" / "alerts.yml").read_text())
    assert alerts
    assert [alert for alert in alerts if f"`{alert}`" not in manual] == []


# -- with Prometheus's own tool


def promtool(*arguments: str, cwd: Path | None = None) -> None:
    done = subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_promtool_accepts_the_rules(need: Callable[..., None]) -> None:
    need("promtool")
    promtool("check", "rules", "--lint=all", "--lint-fatal", *map(str, RULES))


def test_promtool_parses_the_queries_of_the_dashboard(need: Callable[..., None], tmp_path: Path) -> None:
    need("promtool")
    lines = ["groups:", "- name: dashboard", "  rules:"]
    for index, text in enumerate(dashboard_expressions()):
        if text.startswith("label_values"):
            continue
        query = text.replace("$__rate_interval", "5m").replace("$", "")
        lines += [f"  - record: dashboard:query:{index}", f"    expr: {json.dumps(query)}"]
    (tmp_path / "queries.yml").write_text("\n".join(lines) + "\n")
    promtool("check", "rules", str(tmp_path / "queries.yml"))


#: everything that an alert looks at, once as it should be (fine) and once as it should not (bad)
SERIES = """
  - {series: 'up{job="hcd",instance="fine"}', values: '1x40'}
  - {series: 'up{job="hcd",instance="bad"}', values: '1 0x40'}
  - {series: 'hcd_oldest_request_seconds{device="fine",queue="0"}', values: '0 0 20 0x40'}
  - {series: 'hcd_oldest_request_seconds{device="bad",queue="0"}', values: '0 0 20 80 140 0x40'}
  - {series: 'hcd_requests_total{device="bad",queue="0",op="read",status="ok"}', values: '0+90x40'}
  - {series: 'hcd_requests_total{device="bad",queue="1",op="read",status="error"}', values: '0+10x40'}
  - {series: 'hcd_requests_total{device="fine",queue="0",op="read",status="ok"}', values: '0+90x40'}
  - {series: 'hcd_handler_errors_total{device="fine"}', values: '3x40'}
  - {series: 'hcd_handler_errors_total{device="bad"}', values: '0x18 1x22'}
  - {series: 'hcd_guest_errors_total{device="fine"}', values: '3x40'}
  - {series: 'hcd_guest_errors_total{device="bad"}', values: '0x18 1x22'}
  - {series: 'hcd_protocol_errors_total{device="fine"}', values: '3x40'}
  - {series: 'hcd_protocol_errors_total{device="bad"}', values: '0x18 1x22'}
  - {series: 'hcd_slow_steps_total{device="fine"}', values: '3x40'}
  - {series: 'hcd_slow_steps_total{device="bad"}', values: '0x18 1x22'}
  - {series: 'hcd_connected{device="fine",instance="h"}', values: '1x40'}
  - {series: 'hcd_connected{device="bad",instance="h"}', values: '1 1 0x40'}
  - {series: 'hcd_connected{device="attached",instance="h"}', values: '1x40'}
  - {series: 'hcd_connected{device="never",instance="h"}', values: '0x40'}
  - {series: 'hcd_path_conflicts{device="fine"}', values: '0x40'}
  - {series: 'hcd_path_conflicts{device="bad"}', values: '1x40'}
  - {series: 'hcd_doorbell_registered{device="attached",instance="h",queue="0",path="pio"}', values: '0x40'}
  - {series: 'hcd_doorbell_registered{device="never",instance="h",queue="0",path="pio"}', values: '0x40'}
  - {series: 'hcd_doorbell_registered{device="fine",instance="h",queue="0",path="pio"}', values: '1x40'}
  - {series: 'hcd_doorbell_response_seconds_bucket{device="fine",path="pio",le="0.001"}', values: '0+50x40'}
  - {series: 'hcd_doorbell_response_seconds_bucket{device="fine",path="pio",le="0.1"}', values: '0+50x40'}
  - {series: 'hcd_doorbell_response_seconds_bucket{device="fine",path="pio",le="+Inf"}', values: '0+50x40'}
  - {series: 'hcd_doorbell_response_seconds_bucket{device="bad",path="mmio",le="0.001"}', values: '0+10x40'}
  - {series: 'hcd_doorbell_response_seconds_bucket{device="bad",path="mmio",le="0.1"}', values: '0+50x40'}
  - {series: 'hcd_doorbell_response_seconds_bucket{device="bad",path="mmio",le="+Inf"}', values: '0+50x40'}
  - {series: 'hcd_handovers_total{device="fine",instance="h",outcome="resumed"}', values: '1x40'}
  - {series: 'hcd_handovers_total{device="fine",instance="h",outcome="failed"}', values: '0x40'}
  - {series: 'hcd_handovers_total{device="bad",instance="h",outcome="failed"}', values: '1x40'}
  - {series: 'hcd_handovers_total{device="bad",instance="old",outcome="failed"}', values: '1x40'}
  - {series: 'process_start_time_seconds{instance="h"}', values: '900x40'}
  - {series: 'process_start_time_seconds{instance="old"}', values: '0x40'}
"""
#: alert: when (minutes), and the labels with which it fires then beside its severity; none: it does not
FIRINGS: dict[str, list[tuple[int, dict[str, str] | None]]] = {
    "HcdDown": [(2, None), (20, {"job": "hcd", "instance": "bad"})],
    "HcdRequestStuck": [(2, None), (4, {"device": "bad", "queue": "0"}), (6, None)],
    "HcdRequestErrors": [(4, None), (20, {"device": "bad"})],
    "HcdHandlerErrors": [(15, None), (20, {"device": "bad"}), (35, None)],
    "HcdGuestErrors": [(15, None), (20, {"device": "bad"}), (35, None)],
    "HcdProtocolErrors": [(15, None), (20, {"device": "bad"}), (35, None)],
    "HcdSlowSteps": [(15, None), (20, {"device": "bad"}), (35, None)],
    "HcdFrontEndLost": [(1, None), (20, {"device": "bad", "instance": "h"})],
    "HcdPathConflict": [(4, None), (20, {"device": "bad"})],
    "HcdDoorbellNotRegistered": [(0, None), (20, {"device": "attached", "instance": "h", "queue": "0", "path": "pio"})],
    "HcdSlowResponse": [(9, None), (20, {"device": "bad", "path": "mmio"})],
    "HcdHandoverFailed": [(20, {"device": "bad", "instance": "h", "outcome": "failed"}), (40, None)],
}
CASES = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
- interval: 1m
  input_series: {series}
  promql_expr_test:
  - expr: path:hcd_doorbell_response_seconds:p99_5m{{path="pio"}}
    eval_time: 10m
    exp_samples: [{{labels: 'path:hcd_doorbell_response_seconds:p99_5m{{path="pio"}}', value: 0.00099}}]
  alert_rule_test: {alerts}
"""


def alerts() -> dict[str, dict[str, str]]:
    """Severity and annotations of each alert, as they stand in the file."""
    found: dict[str, dict[str, str]] = {}
    for text in (ROOT / "monitoring" / "alerts.yml").read_text().split("- alert: ")[1:]:
        fields = dict(re.findall(r'^\s+(summary|description): "(.*)"$', text, flags=re.M))
        found[text.split()[0]] = fields | {"severity": re.findall(r"severity: (\w+)", text)[0]}
    return found


#: what stands in a text where the alert has its value, at the times of FIRINGS
VALUES = {"HcdRequestStuck": "2m 20s", "HcdRequestErrors": "10%", "HcdSlowResponse": "98.76ms"}


def expected(name: str) -> list[dict[str, Any]]:
    """The cases of one alert, for promtool."""
    alert, cases = alerts()[name], []
    for minute, labels in FIRINGS[name]:
        firing = []
        if labels is not None:
            texts = {key: filled(alert[key], labels, VALUES.get(name, "")) for key in ("summary", "description")}
            firing = [{"exp_labels": {"severity": alert["severity"], **labels}, "exp_annotations": texts}]
        cases.append({"alertname": name, "eval_time": f"{minute}m", "exp_alerts": firing})
    return cases


def filled(text: str, labels: dict[str, str], value: str) -> str:
    text = re.sub(r"{{ \$labels\.(\w+) }}", lambda match: labels[match[1]], text)
    return re.sub(r"{{ \$value .*?}}", value, text)


def test_each_alert_has_cases() -> None:
    assert FIRINGS.keys() == alerts().keys()
    for name, cases in FIRINGS.items():
        assert {labels is None for _, labels in cases} == {True, False}, name


def test_alerts_fire_when_they_should_and_only_then(need: Callable[..., None], tmp_path: Path) -> None:
    need("promtool")
    cases = [case for name in FIRINGS for case in expected(name)]
    text = CASES.format(rules=", ".join(map(str, RULES)), series=SERIES, alerts=json.dumps(cases))
    (tmp_path / "cases.yml").write_text(text)
    promtool("test", "rules", "cases.yml", cwd=tmp_path)
