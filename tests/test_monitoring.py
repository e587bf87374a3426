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
FOREIGN = {"up", "process_cpu_seconds_total"}
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


CASES = """
rule_files: [{rules}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - {{series: 'hcd_oldest_request_seconds{{device="disk0",queue="0"}}', values: '0 0 20 80 140 0 0'}}
      - {{series: 'hcd_connected{{device="disk0",instance="h"}}', values: '1x40'}}
      - {{series: 'hcd_connected{{device="disk1",instance="h"}}', values: '1 1 0x40'}}
      - {{series: 'hcd_connected{{device="never",instance="h"}}', values: '0x40'}}
      - {{series: 'hcd_doorbell_registered{{device="disk0",instance="h",queue="0",path="pio"}}', values: '0x40'}}
      - {{series: 'hcd_doorbell_registered{{device="disk1",instance="h",queue="0",path="pio"}}', values: '0x40'}}
      - {{series: 'hcd_requests_total{{device="disk0",queue="0",op="read",status="ok"}}', values: '0+90x40'}}
      - {{series: 'hcd_requests_total{{device="disk0",queue="1",op="read",status="error"}}', values: '0+10x40'}}
      - {{series: 'hcd_requests_total{{device="disk1",queue="0",op="read",status="ok"}}', values: '0+90x40'}}
      - {{series: 'hcd_doorbell_response_seconds_bucket{{device="d",path="pio",le="0.001"}}', values: '0+50x40'}}
      - {{series: 'hcd_doorbell_response_seconds_bucket{{device="d",path="pio",le="+Inf"}}', values: '0+50x40'}}
    promql_expr_test:
      - expr: path:hcd_doorbell_response_seconds:p99_5m
        eval_time: 10m
        exp_samples: [{{labels: 'path:hcd_doorbell_response_seconds:p99_5m{{path="pio"}}', value: 0.00099}}]
    alert_rule_test:
      - {{alertname: HcdRequestStuck, eval_time: 2m, exp_alerts: []}}
      - {{alertname: HcdRequestStuck, eval_time: 4m, exp_alerts: [
          {{exp_labels: {{severity: critical, device: disk0, queue: "0"}}, exp_annotations: {{
            summary: "disk0: a request on queue 0 is 2m 20s old",
            description: "The storage or the network behind the device does not answer. Guests wait for it."}}}}]}}
      - {{alertname: HcdRequestStuck, eval_time: 6m, exp_alerts: []}}
      - {{alertname: HcdFrontEndLost, eval_time: 20m, exp_alerts: [
          {{exp_labels: {{severity: info, device: disk1, instance: h}}, exp_annotations: {{
            summary: "disk1: its front end has gone and has not come back",
            description: "Normal when the virtual machine was stopped."}}}}]}}
      - {{alertname: HcdDoorbellNotRegistered, eval_time: 20m, exp_alerts: [
          {{exp_labels: {{severity: warning, device: disk0, instance: h, queue: "0", path: pio}}, exp_annotations: {{
            summary: "disk0: doorbell 0 is not registered with the VMM",
            description: "Rings of the guest there reach nobody. The log has the VMM's reason."}}}}]}}
      - {{alertname: HcdRequestErrors, eval_time: 20m, exp_alerts: [
          {{exp_labels: {{severity: warning, device: disk0}}, exp_annotations: {{
            summary: "disk0: 10% of the requests fail",
            description: "The guest sees I/O errors. The log of hcd names the cause."}}}}]}}
"""


def test_alerts_fire_when_they_should_and_only_then(need: Callable[..., None], tmp_path: Path) -> None:
    need("promtool")
    (tmp_path / "cases.yml").write_text(CASES.format(rules=", ".join(map(str, RULES))))
    promtool("test", "rules", "cases.yml", cwd=tmp_path)
