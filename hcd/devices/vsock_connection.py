"""One connection of a guest's port with a port of the host, without its sockets: states, credit, half-close.

Theory of operation (virtio 1.3, 5.10.6).

* Each side has a buffer of ``buf_alloc`` bytes for what the other one sends, and says in every packet how much of it
  was taken out so far (``fwd_cnt``). Counters are 32 bits and wrap. Who has sent as much as the other's buffer holds
  waits; a CREDIT_UPDATE tells of progress when nothing else does, a CREDIT_REQUEST asks for one.
* A guest that sends beyond its credit, or what makes no sense in the state of its connection, loses the connection.
  What it says of its own buffer is believed, and hurts only itself: hcd sends at most what the guest has room for.
* SHUTDOWN carries two promises, not to send and not to receive any more, each for good. When a side has given
  both, the other one answers with RST, and the connection is gone.
* Whatever waits to be said is kept as state, not as a list of packets: a guest without receive buffers makes nothing
  grow. :meth:`Connection.next_op` says what is to be said next.
"""

from __future__ import annotations

import enum

from hcd_protocols.virtio.vsock import HOST_CID, Header, Op, Shutdown, SocketType

__all__ = ["BOTH", "Broken", "Connection", "State", "reset_of"]

_MASK = 0xFFFFFFFF
BOTH = Shutdown.RECEIVE | Shutdown.SEND


class State(enum.Enum):
    """``ASKING``: hcd owes a REQUEST or waits for the answer. ``ACCEPTING``: hcd owes a RESPONSE."""

    ASKING = "asking"
    ACCEPTING = "accepting"
    OPEN = "open"
    GONE = "gone"  # the guest knows no more of it


class Broken(Exception):
    """The guest broke the rules of the connection, which ends with RST."""


class Connection:
    """The host's end of one connection. ``state`` is ACCEPTING for what the guest asked for, else ASKING."""

    def __init__(
        self,
        guest_cid: int,
        guest_port: int,
        host_port: int,
        state: State,
        buf_alloc: int,
        kind: SocketType = SocketType.STREAM,
    ) -> None:
        self.kind = kind
        self.guest_cid = guest_cid
        self.guest_port = guest_port
        self.host_port = host_port
        self.state = state
        #: what each side has promised
        self.guest_shut = Shutdown(0)
        self.host_shut = Shutdown(0)
        self._told_shut = Shutdown(0)
        self._asked = False  # REQUEST is sent
        self._abort = False  # RST is owed
        # the guest's bytes: received, taken out of the buffer, and as far as the guest was told
        self._buf_alloc = buf_alloc
        self._received = 0
        self._forwarded = 0
        self._told = 0
        self._update_owed = False
        # the host's bytes
        self._guest_alloc = 0
        self._guest_forwarded = 0
        self._sent = 0
        #: data wait for credit; a CREDIT_REQUEST is owed, or sent
        self.short = False
        self._question_owed = False

    @property
    def key(self) -> tuple[int, int]:
        return self.guest_port, self.host_port

    # -- from the guest

    def learn_credit(self, header: Header) -> None:
        """Every packet of the guest says how much room it has."""
        self._guest_alloc = header.buf_alloc
        self._guest_forwarded = header.fwd_cnt
        if self.credit:
            self.short = self._question_owed = False

    def receive(self, header: Header) -> None:
        """Take a packet of the guest. Broken when it has no place here.

        The payload of RW is the caller's to keep, ``header.len`` bytes of it; see :meth:`forwarded`.
        """
        if header.type != self.kind:
            raise Broken(f"a packet of type {header.type} in a connection of type {self.kind}")
        self.learn_credit(header)
        if header.op == Op.RST:
            self.state = State.GONE
            return
        if self.state is State.ASKING:
            self._answered(header)
        elif self.state is State.OPEN:
            self._continued(header)
        else:
            raise Broken(f"op {header.op} before the connection was accepted")

    def _answered(self, header: Header) -> None:
        if header.op != Op.RESPONSE or not self._asked:
            raise Broken(f"op {header.op} while the guest is asked to accept the connection")
        self.state = State.OPEN

    def _continued(self, header: Header) -> None:
        match header.op:
            case Op.RW:
                self._take(header.len)
            case Op.CREDIT_UPDATE:
                pass  # every header has it
            case Op.CREDIT_REQUEST:
                self._update_owed = True
            case Op.SHUTDOWN:
                self.guest_shut |= Shutdown(header.flags & BOTH)
            case _:
                raise Broken(f"op {header.op} on an open connection")

    def _take(self, size: int) -> None:
        if self.guest_shut & Shutdown.SEND:
            raise Broken("data after the guest said that there will be none")
        if self._received - self._forwarded + size > self._buf_alloc:
            raise Broken(f"{size} bytes more than its credit")
        self._received += size

    @property
    def room(self) -> int:
        """Bytes of the whole buffer for the guest's data."""
        return self._buf_alloc

    @property
    def unforwarded(self) -> int:
        """Bytes of the guest that are in the buffer."""
        return self._received - self._forwarded

    def forwarded(self, size: int) -> None:
        """``size`` bytes of the guest left the buffer."""
        self._forwarded += size
        told_room = self._buf_alloc - (self._received - self._told)
        if self._forwarded != self._told and told_room <= self._buf_alloc // 2:
            self._update_owed = True

    # -- from the host

    def shut(self, promise: Shutdown) -> None:
        """The host will not do this any more."""
        self.host_shut |= promise

    def abort(self) -> None:
        """End it with RST."""
        self._abort = True

    @property
    def ending(self) -> bool:
        """Whether RST is owed: nothing that the guest says matters any more."""
        return self._abort or self.guest_shut == BOTH

    @property
    def credit(self) -> int:
        """How many bytes the guest has room for."""
        in_flight = (self._sent - self._guest_forwarded) & _MASK
        return max(0, self._guest_alloc - in_flight)

    @property
    def guest_room(self) -> int:
        """Bytes of the guest's whole buffer: a longer message never arrives."""
        return self._guest_alloc

    @property
    def may_send(self) -> bool:
        """Whether data of the host may be sent, as far as the guest has room for them."""
        return self.state is State.OPEN and not self.guest_shut & Shutdown.RECEIVE and not self.ending

    def out_of_credit(self) -> None:
        """There are data for the guest, and no credit: ask for it, once."""
        if not self.short:
            self.short = self._question_owed = True

    # -- to the guest

    def next_op(self) -> Op | None:
        """What is to be said to the guest before more data; None: nothing. See :meth:`header`."""
        if self.state is State.GONE:
            return None
        if self.ending:
            return Op.RST
        if self.state is State.ASKING:
            return None if self._asked else Op.REQUEST
        if self.state is State.ACCEPTING:
            return Op.RESPONSE
        if self.host_shut != self._told_shut:
            return Op.SHUTDOWN
        if self._update_owed:
            return Op.CREDIT_UPDATE
        return Op.CREDIT_REQUEST if self._question_owed else None

    def header(self, op: Op, size: int = 0, flags: int = 0) -> Header:
        """The header of a packet that is sent now; ``size`` bytes of payload and ``flags`` for RW."""
        match op:
            case Op.REQUEST:
                self._asked = True
            case Op.RESPONSE:
                self.state = State.OPEN
            case Op.SHUTDOWN:
                flags = int(self.host_shut)
                self._told_shut = self.host_shut
            case Op.RST:
                self.state = State.GONE
            case Op.CREDIT_REQUEST:
                self._question_owed = False
            case Op.RW:
                self._sent += size
        self._told = self._forwarded
        self._update_owed = False
        return Header(
            HOST_CID, self.guest_cid, self.host_port, self.guest_port, size, self.kind, op, flags,
            self._buf_alloc, self._forwarded & _MASK,
        )


def reset_of(header: Header) -> Header:
    """The RST that answers a packet which belongs to no connection."""
    return Header(header.dst_cid, header.src_cid, header.dst_port, header.src_port, 0, header.type, Op.RST)
