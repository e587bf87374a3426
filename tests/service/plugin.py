"""Device type "sticky", installed in the guest: entropy that blocks its thread once if the file "block" asks for it."""

from __future__ import annotations

import os
import time

from hcd.device import Device, Virtqueue

BLOCK = "/run/hcd/sticky/block"


class Sticky(Device):
    virtio_id = 4
    vhost_user_type = "rng"
    description = "blocks its thread"
    operations = ("draw",)

    def process(self, queue: Virtqueue) -> None:
        if os.path.exists(BLOCK):
            os.unlink(BLOCK)
            time.sleep(3600)
        for request in queue:
            request.write(bytes(min(64, request.writable)))
            request.complete()
