"""Wrappers: what any device can be run under, from the configuration, without knowing it.

::

    [[device]]
    wrap = ["log", { error = { probability = 0.01, delay-ms = 20 } }]

The first one named is the outermost: it sees a request first and its completion last. Wrappers live between a queue
and its device, on the device's lane: the queue shows each request before the device gets it, and each completion before
the driver sees it. They cost two Python calls a request where they are used, and one comparison where they are not.
With doorbell devices the same is true of what is rung at once, which is shown before and after the device handles it,
and of interrupts. :mod:`hcd.wrappers.requests` and :mod:`hcd.wrappers.ring_stack` have the two ways.
"""

from __future__ import annotations

from hcd.wrappers.base import Wrapper, WrapSpec
from hcd.wrappers.registry import parse, parse_text
from hcd.wrappers.requests import RequestStack, RequestWrapper

__all__ = ["RequestStack", "RequestWrapper", "WrapSpec", "Wrapper", "parse", "parse_text"]
