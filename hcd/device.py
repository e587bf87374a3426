"""The public device API: what a plug-in imports.

A device is a subclass of :class:`Device`. It says what it is (virtio id, queues, features, configuration
space, options) and handles what doorbells bring in :meth:`Device.process`.

Life of a device, and on which thread each method runs::

    __init__(name, options)         main      options are checked already
    open(lane)                      main      open files and sockets; ConfigError when that fails
    ┌─ connect(features)            lane      a front end has negotiated; features are the driver's
    │  ┌─ start_queue(queue)        lane      the ring may be used from here on
    │  │   process(queue)           lane      whenever the ring may hold requests
    │  └─ stop_queue(queue)         lane      no new requests; give held ones back (complete them) now
    └─ disconnect()                 lane      the front end is gone, or reset the device
    close()                         main      the daemon ends or the device is removed

The *lane* is chosen by the colour of ``process``: a plain ``def`` runs in the reactor (one compiled loop for all
devices of the process: never block there), an ``async def`` runs in trio. All methods marked "lane" of one device
run on one thread and never at the same time.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from hcd.dataplane.virtqueue import Request, Virtqueue
from hcd.errors import ConfigError, DeviceError, GuestError

__all__ = [
    "API_VERSION",
    "ConfigError",
    "Device",
    "DeviceError",
    "GuestError",
    "Handle",
    "Lane",
    "Option",
    "Request",
    "Virtqueue",
]

API_VERSION = 1


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a device, as ``[device.options]`` in the configuration and as ``--name`` on the command line.

    ``kind`` is one of ``str``, ``path``, ``int``, ``bool``, ``size`` (bytes; "64M" and "1G" are understood),
    ``fd`` (an inherited file descriptor number), ``float``. ``choices`` restricts a ``str``; ``minimum`` and
    ``maximum`` bound the numbers. ``default`` is None for an option that is absent unless given.
    """

    name: str
    kind: str
    help: str
    default: Any = None
    choices: tuple[str, ...] = ()
    minimum: int | None = None
    maximum: int | None = None

    @property
    def key(self) -> str:
        """The key under which the device finds the value: the name with "-" as "_"."""
        return self.name.replace("-", "_")


class Handle(Protocol):
    """A file-descriptor watch or a timer of a lane."""

    def cancel(self) -> None:
        """Stop it. Harmless when it has ended already."""


class Lane(Protocol):
    """Where a device's handlers run; files and timers of the device belong to it too. Use it on its own thread."""

    #: what devices of one lane share, by a key of their own (a hub for its ports); gone with the daemon
    shared: dict[str, Any]

    def watch(self, fd: int, callback: Callable[[], None]) -> Handle:
        """Call ``callback`` whenever ``fd`` is readable, closed or in error. The fd stays the caller's."""

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Handle:
        """Call ``callback`` once, ``seconds`` from now."""

    def post(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` on the lane's thread soon. The one method that any thread may use."""


class Device:
    """Base class of every virtio device. Defaults are inert or refuse."""

    api_version: ClassVar[int] = API_VERSION
    #: device id of the virtio specification, chapter 5
    virtio_id: ClassVar[int] = 0
    #: one line for ``hcd devices``
    description: ClassVar[str] = ""
    options: ClassVar[tuple[Option, ...]] = ()
    #: names of what ``request.op`` counts, for the metrics; index 0 is the default
    operations: ClassVar[tuple[str, ...]] = ("request",)
    #: the largest ring that the device takes
    max_queue_size: ClassVar[int] = 1024
    #: offer IN_ORDER: completions leave in the order of the requests, whatever the order of ``complete``
    in_order: ClassVar[bool] = False
    #: what QEMU's back-end convention calls this type ("block", "net", "rng"); "" where it has no name for it
    vhost_user_type: ClassVar[str] = ""
    #: what ``--print-capabilities`` adds under "features"
    vhost_user_features: ClassVar[tuple[str, ...]] = ()

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.name = name
        self.option = dict(options)
        self.log = logging.LoggerAdapter(logging.getLogger("hcd.device"), {"device": name})
        #: set by hcd: tells the front end that the configuration space changed (any thread)
        self.notify_config_change: Callable[[], None] = lambda: None

    # -- what the device is

    @property
    def num_queues(self) -> int:
        """How many virtqueues the device has. Constant from ``open`` on."""
        return 1

    @property
    def features(self) -> int:
        """Device feature bits to offer (0 to 23, and 50 up). hcd adds those of rings and transport."""
        return 0

    @property
    def protocol_features(self) -> int:
        """vhost-user protocol features that only some devices need (MTU, RARP). hcd adds the common ones."""
        return 0

    def config(self) -> bytes:
        """The configuration space, little-endian, whole. Empty: the device has none."""
        return b""

    @property
    def serves_config(self) -> bool:
        """Whether the front end reads the configuration space here. QEMU has its own for some types (net)."""
        return bool(self.config())

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver writes ``data`` at ``offset`` (inside the configuration space). May raise DeviceError."""
        raise DeviceError("the configuration space is read-only")

    def set_mtu(self, mtu: int) -> None:
        """NET_SET_MTU of the front end."""
        raise DeviceError("the device takes no MTU")

    def announce(self, mac: bytes) -> None:
        """SEND_RARP of the front end: ``mac`` (6 bytes) moved to this host."""

    # -- its life

    def open(self, lane: Lane) -> None:
        """Open what the device needs for as long as it lives."""

    def close(self) -> None:
        """Release what ``open`` took."""

    def connect(self, features: int) -> None:
        """A driver acknowledged ``features``. May come again with others without a disconnect between."""

    def disconnect(self) -> None:
        """The front end went away or reset the device. Every queue is stopped already."""

    def start_queue(self, queue: Virtqueue) -> None:
        """``queue`` is started and enabled."""

    def stop_queue(self, queue: Virtqueue) -> None:
        """``queue`` will be stopped when its last request is completed: complete those that wait for an event."""

    def process(self, queue: Virtqueue) -> Any:
        """Handle the requests of ``queue``: ``for request in queue: ... request.complete(n)``.

        Must be overridden; plain or ``async``. Called again whenever the ring may hold more.
        """
        raise NotImplementedError

    def fail_request(self, request: Request, status: int) -> None:
        """Complete ``request`` as failed. Called for a request during which ``process`` raised."""
        request.complete(0)

    @classmethod
    def is_async(cls) -> bool:
        return inspect.iscoroutinefunction(cls.process)
