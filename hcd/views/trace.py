"""``hcd trace``: one event, one line."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from hcd.views.text import duration, printable

__all__ = ["trace_line"]

#: how messages are marked: to hcd, from hcd, from hcd on the back channel
_ARROWS = {"in": "->", "out": "<-", "back": "<= back channel:"}


def trace_line(event: Mapping[str, Any]) -> str:
    """"12:34:56.123456 queue 0 #17: read sector 64, 4096 bytes"; local time."""
    at = float(event["at"])
    clock = time.strftime("%H:%M:%S", time.localtime(at)) + f"{at % 1:.6f}"[1:]
    return printable(f"{clock} {_text(event)}")


def _text(event: Mapping[str, Any]) -> str:
    match event["what"]:
        case "message":
            return f"{_ARROWS.get(event['direction'], '--')} {event['text']}"
        case "request":
            return f"queue {event['queue']} #{event['number']}: {event['text']}"
        case "done":
            wrote, took = event["written"], duration(event["seconds"])
            return f"queue {event['queue']} #{event['number']}: {event['op']} {event['status']}, wrote {wrote}, {took}"
        case "rung":
            return f"doorbell {event['doorbell']} #{event['number']}: {event['text']}"
        case "handled":
            return f"doorbell {event['doorbell']} #{event['number']}: {event['outcome']}, {duration(event['seconds'])}"
        case "interrupt":
            answers = f", answers doorbell {event['answers']}" if event["answers"] else ""
            return f"interrupt {event['interrupt']}: {event['outcome']}{answers}"
        case "lost":
            return f"... {event['lines']} lines more were dropped"
        case "tracing":
            return f"tracing {event['device']}, {_peer(event)}"
        case "connected" | "disconnected" as what:
            return f"{_kind(event)} {what} ({_peer(event)})"
    return str(dict(event))  # of a later hcd


def _kind(event: Mapping[str, Any]) -> str:
    """Who connects to the device."""
    return "VMM" if event.get("transport") == "kvm" else "front end"


def _peer(event: Mapping[str, Any]) -> str:
    if event["pid"] is None:
        return f"no {_kind(event)} is connected"
    return " ".join(filter(None, [f"pid {event['pid']}", event.get("command", "")]))
