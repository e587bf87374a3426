"""The one error of this package."""

from __future__ import annotations

__all__ = ["ProtocolError"]


class ProtocolError(Exception):
    """The peer sent something that the protocol forbids; the connection cannot go on."""
