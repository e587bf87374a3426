"""The entropy device on a reactor, driven through split and packed rings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from hcd_protocols.virtio.features import RingFeature

from hcd.devices.rng import CHUNK, Entropy
from hcd.frontend.local import LocalDevice, LocalLane
from hcd.frontend.ring import Used
from hcd.frontend.rng import EntropyDriver
from hcd.options import defaults

V1 = int(RingFeature.VERSION_1)
PACKED = V1 | int(RingFeature.RING_PACKED)


@pytest.fixture
def lane() -> Iterator[LocalLane]:
    lane = LocalLane()
    yield lane
    lane.close()
    assert lane.errors == []


def entropy(**options: Any) -> Entropy:
    return Entropy("rng0", {option.key: option.default for option in Entropy.options} | options)


@pytest.mark.parametrize("features", [V1, V1 | int(RingFeature.EVENT_IDX), PACKED, 0])
def test_driver_draws_random_bytes(lane: LocalLane, features: int) -> None:
    with LocalDevice(entropy(), lane, features=features, size=4) as device:
        driver = EntropyDriver(device.memory, device.queues[0].driver, size=4096)
        drawn = {driver.read(size) for size in (1, 16, 4096, 4095)}
        assert sorted(map(len, drawn)) == [1, 16, 4095, 4096]
        large = driver.read(100_000)
        assert len(set(large)) == 256
        assert not device.queues[0].errors


def test_large_request_gets_one_chunk(lane: LocalLane) -> None:
    with LocalDevice(entropy(), lane) as device:
        driver = EntropyDriver(device.memory, device.queues[0].driver, size=1 << 20)
        assert len(driver.draw(1 << 20)) == CHUNK


def test_request_without_room_fails_and_the_ring_goes_on(lane: LocalLane) -> None:
    with LocalDevice(entropy(), lane) as device:
        queue = device.queues[0]
        gpa = device.memory.alloc(16)
        assert queue.driver.wait_for(queue.driver.submit([(gpa, 16)], [])) == 0
        assert queue.stats.requests(0, 1) == 1
        assert len(EntropyDriver(device.memory, queue.driver).draw(16)) == 16


def test_limit_gives_what_is_left_and_then_waits_for_the_period(lane: LocalLane) -> None:
    with LocalDevice(entropy(max_bytes=100, period=50), lane) as device:
        driver = EntropyDriver(device.memory, device.queues[0].driver)
        began = time.monotonic()
        sizes = [len(driver.draw(60)) for _ in range(6)]
        elapsed = time.monotonic() - began
        assert sum(sizes) <= 100 * (1 + elapsed // 0.05 + 1)
        assert sizes[0] == 60
        assert all(1 <= size <= 60 for size in sizes)
        assert len(driver.read(500)) == 500


def test_waiting_requests_are_answered_in_order(lane: LocalLane) -> None:
    with LocalDevice(entropy(max_bytes=8, period=20), lane) as device:
        queue = device.queues[0].driver
        gpa = device.memory.alloc(256)
        tokens = [queue.submit([], [(gpa + 16 * n, 8)]) for n in range(6)]
        done: list[Used] = []
        while len(done) < 6:
            done += queue.wait()
        assert [each.token for each in done] == tokens
        assert [each.written for each in done] == [8] * 6


def test_stopped_queue_gives_waiting_requests_a_byte_each(lane: LocalLane) -> None:
    device = LocalDevice(entropy(max_bytes=16, period=3_600_000), lane)
    with device:
        queue = device.queues[0]
        gpa = device.memory.alloc(256)
        tokens = [queue.driver.submit([], [(gpa + 16 * n, 16)]) for n in range(4)]
        assert queue.driver.wait_for(tokens[0]) == 16
        while lane.run(lambda: queue.device.inflight) < 3:
            pass
        device.stop_queue(queue)
        assert [done.written for done in queue.driver.used()] == [1, 1, 1]
        assert queue.device.inflight == 0


def test_options_have_the_defaults_of_no_limit() -> None:
    assert defaults(Entropy.options) == {"max_bytes": None, "period": 1000}
