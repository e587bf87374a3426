"""Virtio: device ids, feature bits, and the layouts of the devices that hcd implements. All little-endian.

Section numbers are those of "Virtual I/O Device (VIRTIO) Version 1.3".
"""

from __future__ import annotations

from hcd_protocols.virtio.features import BlkFeature, ConsoleFeature, NetFeature, RingFeature, ScsiFeature, VsockFeature
from hcd_protocols.virtio.ids import DeviceId

__all__ = ["BlkFeature", "ConsoleFeature", "DeviceId", "NetFeature", "RingFeature", "ScsiFeature", "VsockFeature"]
