"""vhost-user, sans-IO: messages, feature bits, the back end's connection, the front end's, and the back
channel.

``BackendConnection`` takes bytes and file descriptors in and gives events out; ``FrontendConnection`` is
its mirror; ``BackChannel`` speaks on the socket that SET_BACKEND_REQ_FD brings. None of them touches a
socket. Layouts of single payloads are in ``hcd_protocols.vhost_user.layouts``, the events in ``.events``.
"""

from __future__ import annotations

from hcd_protocols.errors import ProtocolError
from hcd_protocols.vhost_user.channel import BackChannel, BackChannelPeer, BackendMessage
from hcd_protocols.vhost_user.connection import BackendConnection
from hcd_protocols.vhost_user.events import Event, MemoryRegion
from hcd_protocols.vhost_user.features import ProtocolFeature, TransportFeature
from hcd_protocols.vhost_user.frontend import FrontendConnection, Reply
from hcd_protocols.vhost_user.layouts import HEADER_SIZE, MAX_PAYLOAD
from hcd_protocols.vhost_user.messages import BackendRequest, FrontendRequest
from hcd_protocols.vhost_user.saved import SavedSession, SavedVring
from hcd_protocols.vhost_user.state import RingState, VringState

__all__ = [
    "HEADER_SIZE",
    "MAX_PAYLOAD",
    "BackChannel",
    "BackChannelPeer",
    "BackendConnection",
    "BackendMessage",
    "BackendRequest",
    "Event",
    "FrontendConnection",
    "FrontendRequest",
    "MemoryRegion",
    "ProtocolError",
    "ProtocolFeature",
    "Reply",
    "RingState",
    "SavedSession",
    "SavedVring",
    "TransportFeature",
    "VringState",
]
