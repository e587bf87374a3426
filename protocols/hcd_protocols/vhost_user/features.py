"""Feature bits of vhost-user: the protocol's own, and the virtio-level bits whose meaning the protocol
depends on.

vhost-user.rst "Protocol features"; the device-independent virtio bits are virtio 1.3 chapter 6.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from types import MappingProxyType

from hcd_protocols.virtio.features import RingFeature

__all__ = [
    "DEPENDENCIES",
    "QEMU_7_2_MASK",
    "UNFILTERED",
    "ProtocolFeature",
    "TransportFeature",
    "missing_dependencies",
]


class ProtocolFeature(enum.IntFlag):
    """Bits of GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM = 1 << 22
    GET_VRING_BASE_SKIP_DRAIN = 1 << 23


class TransportFeature(enum.IntFlag):
    """Bits of GET_FEATURES and SET_FEATURES that steer the protocol, whatever the device is: those of virtio that back
    ends look at, and two in its reserved range."""

    NOTIFY_ON_EMPTY = RingFeature.NOTIFY_ON_EMPTY
    #: VHOST_F_LOG_ALL: every write to guest memory is to be logged
    LOG_ALL = 1 << 26
    ANY_LAYOUT = RingFeature.ANY_LAYOUT
    INDIRECT_DESC = RingFeature.INDIRECT_DESC
    EVENT_IDX = RingFeature.EVENT_IDX
    #: VHOST_USER_F_PROTOCOL_FEATURES: messages 15 and 16 are understood, and rings begin disabled
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = RingFeature.VERSION_1
    #: VIRTIO_F_IOMMU_PLATFORM of old: ring addresses are IOVAs, and IOTLB messages come
    ACCESS_PLATFORM = RingFeature.ACCESS_PLATFORM
    RING_PACKED = RingFeature.RING_PACKED
    IN_ORDER = RingFeature.IN_ORDER
    RING_RESET = RingFeature.RING_RESET


#: Features that make sense only together with others; a front end that takes the first without the rest is
#: wrong.
DEPENDENCIES: Mapping[ProtocolFeature, ProtocolFeature] = MappingProxyType(
    {
        ProtocolFeature.INBAND_NOTIFICATIONS: ProtocolFeature.REPLY_ACK | ProtocolFeature.BACKEND_REQ,
        ProtocolFeature.GET_VRING_BASE_INFLIGHT: ProtocolFeature.INFLIGHT_SHMFD,
        ProtocolFeature.GET_VRING_BASE_SKIP_DRAIN: (
            ProtocolFeature.INFLIGHT_SHMFD | ProtocolFeature.GET_VRING_BASE_INFLIGHT
        ),
    }
)

#: QEMU 7.2 takes over exactly these of what a back end offers.
QEMU_7_2_MASK = ProtocolFeature((1 << 17) - 1)

#: QEMU asks the back end only about the bits of a list that each device model keeps. What is missing there
#: reaches the driver, and SET_FEATURES, whether or not the back end offered it. These are the ones that a
#: ring can live with.
UNFILTERED = (
    TransportFeature.NOTIFY_ON_EMPTY
    | TransportFeature.ANY_LAYOUT
    | TransportFeature.INDIRECT_DESC
    | TransportFeature.EVENT_IDX
    | TransportFeature.RING_RESET
)


def missing_dependencies(features: int) -> tuple[ProtocolFeature, ProtocolFeature] | None:
    """The first feature of ``features`` whose company is incomplete, with what it lacks; None when all is
    well.
    """
    for feature, company in DEPENDENCIES.items():
        missing = company & ~features
        if feature & features and missing:
            return feature, missing
    return None
