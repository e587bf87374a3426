"""What a vhost-user front end is offered: the device's own feature bits, and those of hcd's rings and messages."""

from __future__ import annotations

from hcd_protocols.vhost_user.features import ProtocolFeature, TransportFeature

from hcd.host import DeviceHost

__all__ = ["offered_features", "offered_protocol_features"]


def offered_features(host: DeviceHost) -> int:
    """The feature bits that GET_FEATURES answers for the device of ``host``."""
    ring = (
        TransportFeature.ANY_LAYOUT
        | TransportFeature.INDIRECT_DESC
        | TransportFeature.EVENT_IDX
        | TransportFeature.PROTOCOL_FEATURES
        | TransportFeature.VERSION_1
        | TransportFeature.RING_PACKED
    )
    if host.device.in_order:
        ring |= TransportFeature.IN_ORDER
    return host.device.features | int(ring)


def offered_protocol_features(host: DeviceHost, has_config: bool) -> int:
    """The protocol features that GET_PROTOCOL_FEATURES answers for the device of ``host``."""
    common = (
        ProtocolFeature.MQ
        | ProtocolFeature.REPLY_ACK
        | ProtocolFeature.BACKEND_REQ
        | ProtocolFeature.CROSS_ENDIAN
        | ProtocolFeature.INFLIGHT_SHMFD
        | ProtocolFeature.RESET_DEVICE
        | ProtocolFeature.CONFIGURE_MEM_SLOTS
        | ProtocolFeature.STATUS
    )
    if has_config:
        common |= ProtocolFeature.CONFIG
    return host.device.protocol_features | int(common)
