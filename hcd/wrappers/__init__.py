"""Wrappers: what any virtio device can be run under, from the configuration, without knowing it.

::

    [[device]]
    wrap = ["log", { error = { probability = 0.01, delay-ms = 20 } }]

The first one named is the outermost: it sees a request first and its completion last. Wrappers live between a queue
and its device, on the device's lane: the queue shows each request before the device gets it, and each completion before
the driver sees it. They cost two Python calls a request where they are used, and one comparison where they are not.
"""

from __future__ import annotations

from hcd.wrappers.base import Stack, Wrapper, WrapSpec
from hcd.wrappers.registry import parse, parse_text

__all__ = ["Stack", "WrapSpec", "Wrapper", "parse", "parse_text"]
