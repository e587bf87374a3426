"""The socket on which a back end tells its front end something unasked (SET_BACKEND_REQ_FD)."""

from __future__ import annotations

import os
import socket

import trio
from hcd_protocols.vhost_user import BackChannel

from hcd.errors import ProtocolError
from hcd.host import DeviceHost

__all__ = ["open_back_channel"]


def open_back_channel(host: DeviceHost, fd: int) -> socket.socket:
    """Have the device's ``notify_config_change`` tell the front end, over the socket ``fd``, which becomes ours.

    ProtocolError, with ``fd`` closed, when it is no socket.
    """
    try:
        channel = socket.socket(fileno=fd)
    except OSError as error:
        os.close(fd)
        raise ProtocolError(f"the back channel's descriptor is no socket: {error.strerror}") from None
    channel.setblocking(False)
    messages = BackChannel()
    token = trio.lowlevel.current_trio_token()

    def notify() -> None:
        message = messages.config_change()
        try:
            channel.send(message, socket.MSG_NOSIGNAL)
        except OSError as error:
            host.rare_log.warning("the back channel", "the front end was not told of a configuration change: %s",
                                  error.strerror)
        else:
            token.run_sync_soon(host.observe, "back", message)

    host.device.notify_config_change = notify
    return channel
