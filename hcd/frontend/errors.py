"""Errors of the front end: each says which side is to blame."""

from __future__ import annotations

__all__ = ["BackendError", "DeviceRingError", "FrontendError", "RequestFailed", "RingFull"]


class FrontendError(Exception):
    """Base of the errors that the front end raises about the other side or about the clock."""


class BackendError(FrontendError):
    """The back end refused a message, answered nonsense, hung up, or did not answer in time."""


class DeviceRingError(FrontendError):
    """The device put something into a used ring that no driver asked for."""


class RequestFailed(FrontendError):
    """The device completed a request with an error status; ``status`` is the device's code."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class RingFull(Exception):
    """The caller added more than the ring has descriptors for. Take used chains out first."""
