"""What is asked of a handler's turn when it is over, on either lane."""

from __future__ import annotations

import inspect
from typing import Any

from hcd.dataplane.virtqueue import Virtqueue
from hcd.errors import PluginError

__all__ = ["check_turn"]


def check_turn(queue: Virtqueue, left: Any) -> None:
    """Raise PluginError where the next turn would be like this one, and so on for ever.

    ``left`` is what the handler returned: a generator or coroutine did nothing at all.
    """
    if inspect.isgenerator(left) or inspect.iscoroutine(left) or inspect.isasyncgen(left):
        if not inspect.isasyncgen(left):
            left.close()
        raise PluginError(f"it returned a {type(left).__name__}, which nobody runs: it is neither a plain function nor "
                          "an async def")
    if queue.stalled():
        raise PluginError("it returned and took none of the requests in the ring (a queue whose device can take no "
                          "more just now is passive)")
