"""Metrics that devices declare: on /metrics from the beginning, and gone with the device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from hcd import dump, plugins
from hcd.device import Device, Metric, Virtqueue
from hcd.errors import PluginError
from hcd.instruments import MAX_SERIES, Instruments, faults
from hcd.metrics.own import OwnCollector
from hcd.testing import serve

LABELS = {"to": ("on", "off"), "by": ("a", "b")}
TURNS = Metric("lamp_turns_total", "counter", "How often it was turned.", labels=LABELS)
LEVEL = Metric("lamp_level", "gauge", "How bright.")
LIT = Metric("lamp_lit_seconds", "histogram", "For how long it was on.", buckets=(0.1, 1, 10))


class Lamp(Device):
    virtio_id = 63
    metrics = (TURNS, LEVEL, LIT)

    def process(self, queue: Virtqueue) -> None:
        for request in queue:
            self.counter("lamp_turns_total", to="on", by="b").inc()
            self.gauge("lamp_level").set(7)
            self.histogram("lamp_lit_seconds").observe(1)
            request.complete()


def test_every_series_is_there_before_anything_happened() -> None:
    """And holds what the device counted, afterwards."""
    with serve(Lamp, name="l0") as served, served.driver() as driver:
        metrics = served.metrics()
        turns = metrics.series("hcd_device_lamp_turns_total")
        assert sorted((labels["device"], labels["to"], labels["by"], value) for labels, value in turns) == [
            ("l0", to, by, 0) for to in ("off", "on") for by in ("a", "b")
        ]
        assert metrics.series("hcd_device_lamp_level") == [({"device": "l0"}, 0)]
        driver.ask(b"x", 1)
        metrics = served.metrics()
        assert metrics.total("hcd_device_lamp_turns_total", to="on", by="b") == 1
        assert metrics.total("hcd_device_lamp_turns_total") == 1
        assert metrics.total("hcd_device_lamp_level") == 7
        buckets = {labels["le"]: value for labels, value in metrics.series("hcd_device_lamp_lit_seconds_bucket")}
        assert buckets == {"0.1": 0, "1.0": 1, "10.0": 1, "+Inf": 1}
        assert metrics.total("hcd_device_lamp_lit_seconds_count") == 1
        assert metrics.total("hcd_device_lamp_lit_seconds_sum") == 1


@pytest.mark.parametrize(
    ("kind", "name", "labels", "expected"),
    [
        ("counter", "lamp_turn_total", {}, 'no metric "lamp_turn_total" is declared; declared are: lamp_turns_total, '),
        ("gauge", "lamp_turns_total", {"to": "on", "by": "a"}, "declared as a counter, not a gauge"),
        ("counter", "lamp_turns_total", {"to": "on"}, "has no series"),
        ("counter", "lamp_turns_total", {"to": "up", "by": "a"}, "has no series"),
        ("gauge", "lamp_level", {"to": "on"}, "has no series"),
    ],
)
def test_only_what_is_declared_is_found(kind: str, name: str, labels: dict[str, str], expected: str) -> None:
    with pytest.raises(LookupError, match=expected):
        Instruments(Lamp.metrics).find(name, kind, labels)


def test_a_counter_never_falls() -> None:
    counter = Lamp("l", {}).counter("lamp_turns_total", to="on", by="a")
    with pytest.raises(ValueError, match="never falls"):
        counter.inc(-1)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (Metric("Lamp", "gauge", "x"), "a name that is none"),
        (Metric("lamp__x", "gauge", "x"), "a name that is none"),
        (Metric("lamp_x", "summary", "x"), 'unknown kind "summary"'),
        (Metric("lamp_x", "counter", "x"), "_total"),
        (Metric("lamp_total", "gauge", "x"), "_total"),
        (Metric("lamp_x", "histogram", "x", buckets=(2, 1)), "do not ascend"),
        (Metric("lamp_x", "histogram", "x", buckets=()), "do not ascend"),
        (Metric("lamp_x", "gauge", ""), "no help"),
        (Metric("lamp_x", "gauge", "x", labels={"device": ("a",)}), "not for devices"),
        (Metric("lamp_x", "gauge", "x", labels={"to": ()}), "no values"),
        (Metric("lamp_x", "gauge", "x", labels={"to": ("a", "a")}), "one twice"),
        (Metric("lamp_x", "gauge", "x", labels={"to": tuple(map(str, range(MAX_SERIES + 1)))}), "series"),
        ("lamp_x", "expected a hcd.device.Metric"),
    ],
)
def test_what_is_declared_wrongly_is_said(metric: object, expected: str) -> None:
    assert any(expected in text for text in faults([metric]))
    assert not list(faults(Lamp.metrics))
    assert any("twice" in text for text in faults([LEVEL, LEVEL]))


def test_a_type_with_bad_declarations_is_refused(make_distribution: Callable[..., Path]) -> None:
    """When it is loaded; and scripts can ask what a good one declares."""
    source = (
        "from hcd.device import Device, Metric\n"
        "class Good(Device):\n    virtio_id = 63\n    metrics = (Metric('lamp_x', 'gauge', 'Brightness.'),)\n"
        "    def process(self, queue): pass\n"
        "class Bad(Good):\n    metrics = (Metric('lamp_x', 'counter', 'Brightness.'),)\n"
    )
    make_distribution("lamps", "2.0", {"lamp-g": "lamp_m:Good", "lamp-b": "lamp_m:Bad"}, {"lamp_m": source})
    with pytest.raises(PluginError, match=r'"lamp-b" of lamps 2\.0: metric "lamp_x" has a name that ends in _total'):
        plugins.load("lamp-b")
    said = list(dump.dump("lamp-g"))
    assert "metrics=lamp_x" in said
    assert "metric.lamp_x.kind=gauge" in said


def test_devices_of_one_type_share_a_family_and_leave_it(caplog: pytest.LogCaptureFixture) -> None:
    """Two types that declare a name differently cannot both have it: the first one does, the log says so once."""
    another = Metric("lamp_level", "histogram", "Another.")
    devices = [(name, Instruments((LEVEL,))) for name in "ab"] + [("c", Instruments((another, TURNS)))]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(OwnCollector(lambda: devices))
    for _ in range(2):
        families = {f.name: f for f in text_string_to_metric_families(generate_latest(registry).decode())}
        assert [sample.labels["device"] for sample in families["hcd_device_lamp_level"].samples] == ["a", "b"]
        assert len(families["hcd_device_lamp_turns"].samples) == 4
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == [
        "hcd_device_lamp_level of device c is left out: another device type declares it otherwise"
    ]
    del devices[0]
    text = generate_latest(registry).decode()
    assert 'device="a"' not in text
    assert 'device="b"' in text


@pytest.mark.parametrize("value", ["much", None])
def test_what_is_no_number_hides_one_series_and_no_other(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A plug-in that puts something into an instrument must not take /metrics from everybody."""
    name = f"lamp-{value}"
    devices = [(name, Instruments((LEVEL, LIT))), ("b", Instruments((LEVEL,)))]
    (gauge,) = [series[()] for metric, series in devices[0][1].families() if metric is LEVEL]
    gauge.value = value  # type: ignore[union-attr]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(OwnCollector(lambda: devices))
    text = generate_latest(registry).decode()
    assert 'hcd_device_lamp_level{device="b"} 0.0' in text
    assert f'hcd_device_lamp_lit_seconds_sum{{device="{name}"}} 0.0' in text
    assert f'hcd_device_lamp_level{{device="{name}"}}' not in text
    assert f"hcd_device_lamp_level of device {name} is left out: what it counted is no number" in caplog.text
    with pytest.raises((TypeError, ValueError)):
        Instruments((LEVEL,)).find("lamp_level", "gauge", {}).set(value)  # type: ignore[union-attr]


@pytest.mark.parametrize("buckets", [("a", "b"), (1, float("nan")), (1, float("inf")), (2, 1), ()])
def test_buckets_are_numbers_that_ascend(buckets: Any) -> None:
    """Infinity is there without being named."""
    assert list(faults([Metric("lamp_x", "histogram", "Of lamps.", buckets=buckets)]))
