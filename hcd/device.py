"""The public device API: what a plug-in imports.

There are two kinds of devices. A virtio device is a subclass of :class:`Device`: it says what it is (virtio id,
queues, features, configuration space, options) and handles what doorbells bring in :meth:`Device.process`. A doorbell
device is a subclass of :class:`DoorbellDevice`: it declares doorbells and interrupts of its own and is told in
:meth:`DoorbellDevice.ring` that one was rung, and how often.

Life of a device, and on which thread each method runs::

    __init__(name, options)         main      options are checked already
    open(lane)                      main      open files and sockets; ConfigError when that fails
    ┌─ connect(features)            lane      a front end has negotiated; features are the driver's
    │  ┌─ start_queue(queue)        lane      the ring may be used from here on
    │  │   process(queue)           lane      whenever the ring may hold requests
    │  └─ stop_queue(queue)         lane      no new requests; give held ones back (complete them) now
    └─ disconnect()                 lane      the front end is gone, or reset the device
    close()                         main      the daemon ends or the device is removed

and of a doorbell device::

    __init__, open                  main      doorbells and interrupts are read after open
    ┌─ connect()                    lane      a VMM registered what it could; interrupts and memory are there
    │   ring(doorbell, count)       lane      a doorbell was rung, count times since the last call
    └─ disconnect()                 lane      the VMM is gone
    close                           main

The *lane* is chosen by the colour of ``process`` or ``ring``: a plain ``def`` runs in the reactor (one compiled loop
for all devices of the process: never block there), an ``async def`` runs in trio. All methods marked "lane" of one
device run on one thread and never at the same time (those that are async: never in parallel).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from hcd.dataplane.bell import Bell, Interrupt
from hcd.dataplane.virtqueue import Request, Virtqueue
from hcd.doorbell import Path
from hcd.errors import ConfigError, DeviceError, GuestError
from hcd.instruments import Counter, Gauge, Histogram, Instruments, Metric
from hcd.log import DeviceLog
from hcd.sockets import UnixListener

__all__ = [
    "API_VERSION",
    "Bell",
    "ConfigError",
    "Counter",
    "Device",
    "DeviceBase",
    "DeviceError",
    "DoorbellDecl",
    "DoorbellDevice",
    "Gauge",
    "GuestError",
    "Handle",
    "Histogram",
    "InterruptDecl",
    "Lane",
    "Metric",
    "Option",
    "Path",
    "Request",
    "UnixListener",
    "Virtqueue",
]

API_VERSION = 1


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a device, as ``[device.options]`` in the configuration and as ``--name`` on the command line.

    ``kind`` is one of ``str``, ``path``, ``int``, ``bool``, ``size`` (bytes; "64M" and "1G" are understood),
    ``fd`` (an inherited file descriptor number), ``float``, ``list`` (a tuple of strings; on the command line the
    option is given once for each). ``choices`` restricts a ``str``; ``minimum`` and
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
    """Where a device's handlers run; files and timers of the device belong to it too.

    Use it on its own thread, or in ``open``.
    """

    #: what devices of one lane share, by a key of their own (a hub for its ports); gone with the daemon
    shared: dict[str, Any]

    def watch(self, fd: int, callback: Callable[[], None]) -> Handle:
        """Call ``callback`` whenever ``fd`` is readable, closed or in error. The fd stays the caller's."""

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Handle:
        """Call ``callback`` once, ``seconds`` from now."""

    def post(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` on the lane's thread soon. The one method that any thread may use."""


class DeviceBase:
    """What all kinds of devices have in common."""

    api_version: ClassVar[int] = API_VERSION
    #: one line for ``hcd devices``
    description: ClassVar[str] = ""
    options: ClassVar[tuple[Option, ...]] = ()
    #: what the device counts itself, beside what hcd counts for every device
    metrics: ClassVar[tuple[Metric, ...]] = ()
    #: the method that handles what doorbells bring; its colour chooses the lane
    handler: ClassVar[str] = ""
    #: how doorbells come to devices of this kind
    transport: ClassVar[str] = ""

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        self.name = name
        self.option = dict(options)
        #: warnings and errors that repeat are said five times a minute, then counted
        self.log = DeviceLog("hcd.device", name)
        #: for hcd: what /metrics reads
        self.instruments = Instruments(self.metrics)

    def open(self, lane: Lane) -> None:
        """Open what the device needs for as long as it lives."""

    def close(self) -> None:
        """Release what ``open`` took."""

    # -- its own metrics: found once, kept, and used on the lane. LookupError for what ``metrics`` does not declare

    def counter(self, name: str, **labels: str) -> Counter:
        found = self.instruments.find(name, "counter", labels)
        assert isinstance(found, Counter)
        return found

    def gauge(self, name: str, **labels: str) -> Gauge:
        found = self.instruments.find(name, "gauge", labels)
        assert isinstance(found, Gauge)
        return found

    def histogram(self, name: str, **labels: str) -> Histogram:
        found = self.instruments.find(name, "histogram", labels)
        assert isinstance(found, Histogram)
        return found

    @classmethod
    def is_async(cls) -> bool:
        return inspect.iscoroutinefunction(getattr(cls, cls.handler))


class Device(DeviceBase):
    """Base class of every virtio device. Defaults are inert or refuse."""

    handler = "process"
    transport = "vhost-user"
    #: device id of the virtio specification, chapter 5
    virtio_id: ClassVar[int] = 0
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
        super().__init__(name, options)
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

    def storage_size(self) -> int | None:
        """Bytes of storage that the guest sees; None for a device that is no storage. Any thread, while open."""
        return None

    def resize(self, size: int | None) -> int:
        """Let the guest see more storage: ``size`` bytes, or as many as there are by now. Returns how many that are.

        For ``hcd resize``, on the lane's thread. hcd tells the front end. DeviceError where that cannot be.
        """
        raise DeviceError("the device has no storage that can grow")

    def set_mtu(self, mtu: int) -> None:
        """NET_SET_MTU of the front end."""
        raise DeviceError("the device takes no MTU")

    def announce(self, mac: bytes) -> None:
        """SEND_RARP of the front end: ``mac`` (6 bytes) moved to this host."""

    # -- its life

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

    def describe(self, request: Request) -> str:
        """What ``request`` asks for, for the wrapper ``log``: one line, without its payload.

        Called before ``process`` sees the request: read its header by offset, move no cursor.
        """
        return f"{request.readable_size} bytes, room for {request.writable_size}"

    def fail_request(self, request: Request, status: int) -> None:
        """Complete ``request`` as failed. Called for a request during which ``process`` raised."""
        request.complete(0)


@dataclass(frozen=True, slots=True)
class DoorbellDecl:
    """A doorbell that a device wants.

    ``path`` is pio, mmio or hypercall, and says what ``address`` is: an I/O port, a guest-physical address, or for
    hypercalls a Hyper-V connection id (``kind`` "hyperv") or a Xen event channel port (``kind`` "xen"). ``width`` in
    bytes of the write that rings, 0: any. ``datamatch``: only this value rings. ``stamp``: offset in the device's
    shared memory where the guest writes its time-stamp counter (8 bytes) before it rings.
    """

    name: str
    path: Path
    address: int
    width: int = 0
    datamatch: int | None = None
    kind: str = ""
    stamp: int | None = None


@dataclass(frozen=True, slots=True)
class InterruptDecl:
    """An interrupt that a device wants. The VMM decides which one it becomes in the guest."""

    name: str


class DoorbellDevice(DeviceBase):
    """Base class of devices that own raw doorbells. A VMM that owns a virtual machine registers them."""

    handler = "ring"
    transport = "kvm"

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        super().__init__(name, options)
        #: set by hcd: the shared memory while a VMM is attached that maps it, else None
        self.memory: memoryview | None = None
        #: set by hcd: where the guest sees the shared memory
        self.memory_address = 0
        #: set by hcd: what :meth:`interrupt` signals, by name
        self.lines: Mapping[str, Interrupt] = {}
        #: set by hcd: carries out :meth:`add_doorbells` and :meth:`remove_doorbells`
        self.change: Callable[[Sequence[DoorbellDecl], Sequence[str]], None] = _not_open

    # -- what the device is: read once, after open

    @property
    def doorbells(self) -> Sequence[DoorbellDecl]:
        """The doorbells that the device has from the beginning. Names are unique in the device."""
        return ()

    @property
    def interrupts(self) -> Sequence[InterruptDecl]:
        return ()

    @property
    def memory_size(self) -> int:
        """Bytes of memory to share with the guest, for payloads and stamps; whole pages, 0: none."""
        return 0

    @property
    def memory_wanted(self) -> int:
        """The guest-physical address to ask for; 0: the VMM chooses."""
        return 0

    # -- its life

    def connect(self) -> None:
        """A VMM is attached: rings come from here on, interrupts and shared memory can be used."""

    def disconnect(self) -> None:
        """The VMM is gone: interrupt nobody for its rings any more. Keep no view of ``memory``."""

    def ring(self, doorbell: Bell, count: int) -> Any:
        """``doorbell`` (its ``name`` is the declared one) was rung ``count`` times. Plain or ``async``.

        Must be overridden. Calls for one doorbell never overlap; async calls for different ones do.
        """
        raise NotImplementedError

    def describe(self, doorbell: Bell, count: int) -> str:
        """What these rings ask for, for the wrapper ``log`` and for ``hcd trace``: one line, without payload.

        Called before ``ring``.
        """
        return "1 ring" if count == 1 else f"{count} rings"

    # -- what it can do, on its lane

    def interrupt(self, name: str, answers: Bell | None = None) -> bool:
        """Interrupt the guest; never blocks. False when no VMM is attached that registered the interrupt.

        ``answers``: the doorbell whose rings this answers, for ``hcd_doorbell_response_seconds``.
        """
        return self.lines[name].signal(answers)

    def add_doorbells(self, doorbells: Iterable[DoorbellDecl]) -> None:
        """Have more doorbells from now on. ConfigError when one of them cannot be."""
        self.change(tuple(doorbells), ())

    def remove_doorbells(self, names: Iterable[str]) -> None:
        """Have these doorbells no longer: no more rings of them from here on. KeyError when there is no such one."""
        self.change((), tuple(names))


def _not_open(added: Sequence[DoorbellDecl], removed: Sequence[str]) -> None:
    raise RuntimeError("the doorbells of a device change only while it is open")
