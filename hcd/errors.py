"""Errors that say who is to blame.

HcdError
 ├── ConfigError      the operator: configuration, command line, a file that cannot be opened
 ├── PluginError      the author of a device plug-in
 ├── ProtocolError    the front end (QEMU or another VMM) broke the vhost-user protocol
 ├── GuestError       the driver in the guest, or the guest memory that it pointed at
 └── DeviceError      the device fails one request; everything else goes on

A front end or a guest can end its own connection or request and nothing else.
``ProtocolError`` lives in ``hcd_protocols`` because the codec raises it and imports nothing of hcd.
"""

from __future__ import annotations

from hcd_protocols.errors import ProtocolError

__all__ = [
    "ConfigError", "DeviceError", "GuestError", "HcdError", "PluginError", "ProtocolError", "contained", "shown",
]


class HcdError(Exception):
    """Base of the errors that hcd itself raises."""


class ConfigError(HcdError):
    """The operator asked for something that cannot be done; the message names file, table and key."""


class PluginError(HcdError):
    """A device plug-in broke its contract; the message names the plug-in."""


class GuestError(HcdError):
    """The driver put something into a ring or a request that the virtio specification forbids."""


class DeviceError(HcdError):
    """The device fails the current request.

    ``status`` is the device's own code (for block devices 1 is IOERR and 2 UNSUPP).
    """

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def contained(error: BaseException) -> Exception:
    """What a plug-in raised, as something that ends no more than what the plug-in was asked for.

    SystemExit and its like are for programs: a device that calls sys.exit() ends neither hcd nor a lane.
    """
    if isinstance(error, Exception):
        return error
    name = type(error).__name__
    return PluginError(f"{name}({_text(error)}), which is for programs, not for devices").with_traceback(
        error.__traceback__
    )


def shown(error: BaseException) -> str:
    """Type and text of ``error`` for a log line, whatever a plug-in made of it."""
    return f"{type(error).__name__}: {_text(error)}"


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return "(it has no text)"
