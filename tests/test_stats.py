"""Histograms, and the text of the hot families."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from hcd.dataplane.stats import BOUNDS_NS, DoorbellStats, Histogram, HotText, QueueStats


@given(st.lists(st.integers(0, 1 << 43)))
def test_buckets_are_exact(values: list[int]) -> None:
    """Each exported bucket counts what is at or below its bound, as Prometheus defines it."""
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    expected = [sum(value <= bound for value in values) for bound in BOUNDS_NS]
    assert histogram.cumulative() == [*expected, len(values)]
    assert (histogram.count, histogram.sum_ns) == (len(values), sum(values))


@given(st.lists(st.integers(1, 1 << 40), min_size=1), st.floats(0.01, 1))
def test_quantiles_are_at_most_a_quarter_off(values: list[int], q: float) -> None:
    """A quantile is the top of the sub-bucket that holds it."""
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    ordered = sorted(values)
    exact = next(v for i, v in enumerate(ordered, 1) if i >= q * len(values))
    assert exact <= histogram.quantile(q) <= max(4, exact * 1.25)


def test_empty_histogram() -> None:
    """Nothing observed is nothing, not an error."""
    assert Histogram().quantile(0.5) == 0.0


def test_text_has_every_family_and_value() -> None:
    """What is counted comes out of the text, under the labels given, with quotes escaped."""
    doorbell, queue, text = DoorbellStats(), QueueStats(("read", "write")), HotText()
    text.add_doorbell('a"b', "0", "pio", doorbell)
    text.add_queue('a"b', "0", queue)
    doorbell.rings, doorbell.wakeups = 12, 3
    doorbell.dispatch.observe(2000)
    queue.latency(1).observe(5000)
    families = {f.name: f for f in text_string_to_metric_families(bytes(text.render()).decode())}
    (rings,) = families["hcd_doorbell_rings"].samples
    assert rings.labels == {"device": 'a"b', "queue": "0", "path": "pio"}
    assert rings.value == 12
    buckets = {s.labels["le"]: s.value for s in families["hcd_doorbell_dispatch_seconds"].samples if "le" in s.labels}
    assert buckets["1.024e-06"] == 0
    assert buckets["2.048e-06"] == buckets["+Inf"] == 1
    assert len(families["hcd_requests"].samples) == 6
    assert families["hcd_doorbell_ring_seconds"].samples == []
    sums = {s.labels["op"]: s.value for s in families["hcd_request_latency_seconds"].samples if s.name.endswith("_sum")}
    assert sums == {"read": 0, "write": pytest.approx(5e-6)}


def test_cached_text_follows_the_counts() -> None:
    """Text is kept between scrapes and redone where a count moved."""
    doorbell, text = DoorbellStats(), HotText()
    text.add_doorbell("d", "0", "pio", doorbell)
    first = bytes(text.render())
    assert text.render() == first
    doorbell.response.observe(10)
    assert b'hcd_doorbell_response_seconds_count{device="d",queue="0",path="pio"} 1' in bytes(text.render())


def test_removed_devices_leave_no_series() -> None:
    """A device's series end with it; the others stay."""
    text = HotText()
    for device in ("a", "b"):
        text.add_doorbell(device, "0", "pio", DoorbellStats())
        text.add_queue(device, "0", QueueStats(("x",)))
    text.remove_device("a")
    rendered = bytes(text.render()).decode()
    assert 'device="a"' not in rendered
    assert 'device="b"' in rendered


def test_too_many_operations() -> None:
    """Operations are labels: a device names a few."""
    with pytest.raises(ValueError, match="1 to 16"):
        QueueStats([str(i) for i in range(17)])
