"""An async device written for device API 1. Not to be changed: see test_api_stability.py."""

from __future__ import annotations

import trio

from hcd.device import Device, Virtqueue


class SlowVending(Device):
    """Says in capitals, a little later, what it is told."""

    api_version = 1
    virtio_id = 63
    operations = ("sell",)

    async def process(self, queue: Virtqueue) -> None:
        for request in queue:
            request.hold()
            await trio.sleep(0.001)
            request.write(request.read().upper())
            request.complete()
