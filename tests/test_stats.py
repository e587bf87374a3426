"""Histograms, and the text of the hot families."""

from __future__ import annotations

import operator

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


def whole(text: HotText) -> bytes:
    return b"".join(text.render())


def test_text_has_every_family_and_value() -> None:
    """What is counted comes out of the text, under the labels given, with quotes escaped."""
    doorbell, queue, text = DoorbellStats(), QueueStats(("read", "write")), HotText()
    text.add_doorbell('a"b', "0", "pio", doorbell)
    text.add_queue('a"b', "0", queue)
    for rings in (1, 4, 7):
        doorbell.add_rings(rings)
    doorbell.dispatch.observe(2000)
    queue.latency(1).observe(5000)
    families = {f.name: f for f in text_string_to_metric_families(whole(text).decode())}
    (rings,) = families["hcd_doorbell_rings"].samples
    assert rings.labels == {"device": 'a"b', "queue": "0", "path": "pio"}
    assert rings.value == 12
    buckets = {s.labels["le"]: s.value for s in families["hcd_doorbell_dispatch_seconds"].samples if "le" in s.labels}
    assert buckets["1.024e-06"] == 0
    assert buckets["2.048e-06"] == buckets["+Inf"] == 1
    assert len(families["hcd_requests"].samples) == 6
    assert families["hcd_doorbell_ring_seconds"].samples == []
    sums = {s.labels["op"]: s.value for s in families["hcd_request_latency_seconds"].samples if s.name.endswith("_sum")}
    assert sums == {"write": pytest.approx(5e-6)}, "an operation that never was has no histogram"


def test_cached_text_follows_the_counts() -> None:
    """Text is kept between scrapes and redone where a count moved."""
    doorbell, text = DoorbellStats(), HotText()
    text.add_doorbell("d", "0", "pio", doorbell)
    first = whole(text)
    assert whole(text) == first
    doorbell.response.observe(10)
    assert b'hcd_doorbell_response_seconds_count{device="d",queue="0",path="pio"} 1' in whole(text)


def test_removed_devices_leave_no_series() -> None:
    """A device's series end with it; the others stay."""
    text = HotText()
    for device in ("a", "b"):
        text.add_doorbell(device, "0", "pio", DoorbellStats())
        text.add_queue(device, "0", QueueStats(("x",)))
    text.remove_device("a")
    rendered = whole(text).decode()
    assert 'device="a"' not in rendered
    assert 'device="b"' in rendered


def test_too_many_operations() -> None:
    """Operations are labels: a device names a few."""
    with pytest.raises(ValueError, match="1 to 16"):
        QueueStats([str(i) for i in range(17)])


def changes(stats: DoorbellStats, queue: QueueStats, times: int) -> None:
    queue.guest_errors += times
    for _ in range(times):
        stats.add_rings(1)
        stats.response.observe(stats.rings * 700)
        queue.latency(0).observe(stats.rings * 90)


def fresh(*series: tuple[str, DoorbellStats, QueueStats]) -> bytes:
    """The text of somebody who renders for the first time."""
    text = HotText()
    for device, doorbell, queue in series:
        text.add_doorbell(device, "0", "pio", doorbell)
        text.add_queue(device, "0", queue)
        text.add_device(device, queue.device)
    return whole(text)


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 120)), max_size=12))
def test_a_patched_document_is_what_a_new_one_would_be(steps: list[tuple[str, int]]) -> None:
    """Whether texts keep their length or not, grow a digit, or a device comes and goes in between."""
    text = HotText()
    kept = {name: (DoorbellStats(), QueueStats(("read", "write"))) for name in "ab"}
    there: list[str] = []
    for name, times in steps:
        if name in there and times % 7 == 3:
            text.remove_device(name)
            there.remove(name)
        elif name not in there:
            text.add_doorbell(name, "0", "pio", kept[name][0])
            text.add_queue(name, "0", kept[name][1])
            text.add_device(name, kept[name][1].device)
            there.append(name)
        changes(*kept[name], times)
        assert whole(text) == fresh(*((one, *kept[one]) for one in there))


def test_a_document_in_somebodys_hands_does_not_change() -> None:
    """A slow scraper gets the text of its scrape, whatever is counted and whoever scrapes meanwhile."""
    doorbell, text = DoorbellStats(), HotText()
    text.add_doorbell("d", "0", "pio", doorbell)
    doorbell.add_rings(1)
    held = text.render()
    before = b"".join(held)
    doorbell.add_rings(1)
    other = text.render()
    assert b"".join(held) == before
    assert b"".join(other) != before
    text.remove_device("d")
    assert b'device="d"' not in whole(text)
    assert b"".join(held) == before


def test_a_text_that_grows_is_built_anew_and_no_other() -> None:
    """A gauge that gets a digit must not cost a copy of megabytes."""
    doorbell, text = DoorbellStats(), HotText()
    text.add_doorbell("d", "0", "pio", doorbell)
    documents = [view.obj for view in text.render()]
    for rings, same in ((9, len(documents)), (1, len(documents) - 1)):  # "0" to "9", and then to "10"
        doorbell.add_rings(rings)
        before, documents = documents, [view.obj for view in text.render()]
        assert sum(map(operator.is_, before, documents)) == same
