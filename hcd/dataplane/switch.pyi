"""A learning Ethernet switch among virtqueues, callbacks and files. All of it belongs to the reactor's thread."""

from collections.abc import Callable

from hcd.dataplane.virtqueue import Buffer, Virtqueue

MIN_FRAME: int  # bytes: addresses and type
MAX_FRAME: int

class Port:
    """An end of a cable: frames go out of it by its own means, and come in from others."""

    @property
    def name(self) -> str: ...
    @property
    def up(self) -> bool: ...  # somebody is there to receive
    @property
    def drops(self) -> int: ...  # frames for this port that were not delivered

class QueuePort(Port):
    """The queues of a network device (virtio 1.3, 5.1). ``limit``: bytes of the largest frame that is delivered.

    ``rx_op`` and ``tx_op`` are what requests count as (indices into ``Device.operations``). Frames that cannot be
    delivered count as drops of their receive queue.
    """

    def __init__(self, name: str, *, limit: int = ..., rx_op: int = 0, tx_op: int = 0) -> None: ...
    limit: int
    def start(self, index: int, queue: Virtqueue) -> None: ...  # a receive queue; makes it passive
    def stop(self, queue: Virtqueue) -> None: ...
    @property
    def blocked(self) -> bool: ...  # part of a frame waits for the stream to take it
    # Of a transmit queue: this turn's frames into the switch; outside a switch they are dropped.
    def drain(self, queue: Virtqueue) -> int: ...
    def inject(self, frame: Buffer) -> None: ...  # into the switch, as if the guest had sent it
    # Non-blocking fds. ``header`` bytes stand before each frame of a packet fd (a tap's virtio header): zero on the way
    # out, ignored on the way in. Both return how many frames they took, ``receive`` also whether the guest has too few
    # buffers for another one. OSError when the fd fails; frames that it does not take are drops.
    def send(self, queue: Virtqueue, fd: int, header: int = 0) -> int: ...
    def receive(self, index: int, fd: int, header: int = 0, most: int = 64) -> tuple[int, bool]: ...
    # A stream has the length (u32, big-endian) before each frame. ``send_stream`` keeps what the stream does not take
    # and takes no more frames until ``flush_stream`` is through; ``forget_stream`` gives that up.
    def send_stream(self, queue: Virtqueue, fd: int) -> int: ...
    def put_stream(self, frame: Buffer, fd: int) -> None: ...  # one frame from elsewhere; ValueError while blocked
    def flush_stream(self, fd: int) -> bool: ...  # False: there is still something to be taken
    def forget_stream(self) -> None: ...
    # Frames of a stream to the guest: bytes used up, and whether the guest has no buffers for the next one. ValueError
    # when a length cannot be that of a frame.
    def feed(self, data: Buffer) -> tuple[int, bool]: ...

class FramePort(Port):
    """Bytes in, bytes out. ``callback`` gets each frame; what it raises is logged once and counts as a drop."""

    def __init__(self, name: str, callback: Callable[[bytes], object]) -> None: ...
    def send(self, frame: Buffer) -> None: ...  # into the switch; ValueError for a size that no frame has

class Switch:
    """Learns where addresses are (``size`` of them at most, forgotten after ``ageing`` seconds of silence).

    Unknown, broadcast and multicast destinations go to every other port, nothing goes back where it came from.
    """

    def __init__(self, name: str = "", *, ageing: float = 300.0, size: int = 4096) -> None: ...
    @property
    def name(self) -> str: ...
    @property
    def ports(self) -> tuple[Port, ...]: ...
    @property
    def forwarded(self) -> int: ...  # frames to one port
    @property
    def flooded(self) -> int: ...  # frames to all other ports
    @property
    def filtered(self) -> int: ...  # frames whose destination is where they came from
    def add(self, port: Port) -> None: ...
    def remove(self, port: Port) -> None: ...
    def addresses(self) -> dict[bytes, Port]: ...  # those that are not forgotten
