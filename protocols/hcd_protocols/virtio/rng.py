"""Entropy device (virtio 1.3 5.4): one queue, no features, no configuration space.

A request (5.4.6) is a chain of device-writable buffers; the device fills as much as it likes, at least one
byte, and says how much. There is no header.
"""

from __future__ import annotations

__all__ = ["NUM_QUEUES"]

#: requestq (5.4.2)
NUM_QUEUES = 1
