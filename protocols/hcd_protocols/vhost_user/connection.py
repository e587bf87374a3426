"""The back end's side of a vhost-user connection, without a socket.

Bytes and descriptors go in through ``receive_data``, events come out of ``next_event``, answers go back
through ``ack`` and the ``reply_`` methods, and ``data_to_send`` holds what is due to the front end. Each
message passes three checks before anything changes: the table of ``messages`` (size, descriptors,
negotiated features), its own fields (``decode``) and the state of the connection (``state``). A message
that fails one ends the connection.

Answers go out in the order of the requests: the front end matches them by nothing else. An answer that is
ready before an older one waits for it.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from hcd_protocols.codec import Layout
from hcd_protocols.errors import ProtocolError
from hcd_protocols.vhost_user import events, layouts
from hcd_protocols.vhost_user.decode import DECODERS, check_fds, decode
from hcd_protocols.vhost_user.features import ProtocolFeature, TransportFeature
from hcd_protocols.vhost_user.messages import (
    FRONTEND_REQUESTS,
    REPLY_FLAGS,
    Answer,
    FrontendRequest,
    Header,
    build_message,
    describe,
)
from hcd_protocols.vhost_user.saved import SavedSession
from hcd_protocols.vhost_user.state import Limits, SessionState, VringState
from hcd_protocols.vhost_user.stream import Message, MessageStream

__all__ = ["UNSUPPORTED_PROTOCOL_FEATURES", "BackendConnection"]

_R = FrontendRequest
_P = ProtocolFeature

#: No back end can offer these: they change layouts and replies in ways that the connection does not
#: implement.
UNSUPPORTED_PROTOCOL_FEATURES = _P.CRYPTO_SESSION | _P.PAGEFAULT | _P.XEN_MMAP

_NEGOTIATION = frozenset({_R.GET_FEATURES, _R.GET_PROTOCOL_FEATURES})


@dataclass(slots=True, eq=False)
class _Slot:
    """An answer that is due; ``message`` is empty until it is known."""

    event: events.Event | None
    message: bytes = b""
    fds: tuple[int, ...] = ()


class BackendConnection:
    """One connection of a front end.

    ``features`` and ``protocol_features`` are what the back end offers. ``queue_num`` is the answer to
    GET_QUEUE_NUM where it is not the number of rings (network devices may count pairs). ``config_size`` in
    bytes, 0 for none. ValueError if an offered protocol feature cannot be kept.
    """

    def __init__(
        self,
        *,
        features: int,
        protocol_features: int,
        num_queues: int,
        max_mem_slots: int = 509,
        max_queue_size: int = 32768,
        config_size: int = 0,
        queue_num: int | None = None,
    ) -> None:
        impossible = protocol_features & UNSUPPORTED_PROTOCOL_FEATURES
        if impossible:
            raise ValueError(f"protocol features that cannot be offered: {_P(impossible).name}")
        if protocol_features and not features & TransportFeature.PROTOCOL_FEATURES:
            raise ValueError("protocol features need feature PROTOCOL_FEATURES (bit 30)")
        if not 1 <= num_queues <= 256:
            raise ValueError(f"expected 1 to 256 queues, got {num_queues}")
        # Plain numbers: the complement of an IntFlag ends at its highest known bit.
        offered = int(features), int(protocol_features)
        limits = Limits(*offered, num_queues, max_mem_slots, max_queue_size, config_size)
        self._limits = limits
        self._queue_num = num_queues if queue_num is None else queue_num
        self._state = SessionState(limits)
        self._stream = MessageStream(FRONTEND_REQUESTS)
        self._slots: deque[_Slot] = deque()
        self._error: str | None = None

    # -- what was agreed on

    @property
    def features(self) -> int:
        """The driver's features; 0 before SET_FEATURES."""
        return self._state.features

    @property
    def protocol_features(self) -> int:
        """The negotiated protocol features; 0 before SET_PROTOCOL_FEATURES."""
        return self._state.protocol_features

    @property
    def config_size(self) -> int:
        """Bytes of the configuration space."""
        return self._limits.config_size

    @property
    def status(self) -> int:
        """The device status as SET_STATUS set it last."""
        return self._state.status

    @property
    def vrings(self) -> Sequence[VringState]:
        return self._state.vrings

    @property
    def regions(self) -> tuple[events.MemoryRegion, ...]:
        """The memory table."""
        return self._state.regions

    @property
    def failed(self) -> bool:
        """An illegal message came; nothing but closing is left."""
        return self._error is not None

    # -- from one process to the next

    def save(self) -> SavedSession:
        """What another connection can go on from, once the answers that are ready have gone out.

        RuntimeError inside a message, or while an answer is not known yet.
        """
        if any(not slot.message for slot in self._slots) or self._stream.is_cut_short():
            raise RuntimeError("a connection is saved between two messages only")
        return SavedSession.of(self._state)

    def restore(self, saved: SavedSession) -> None:
        """Go on where an earlier connection was saved; this one is new.

        ValueError if that one agreed on more than this one offers; nothing has changed then.
        """
        saved.restore(self._state)

    # -- in

    def message_length(self, header: bytes) -> int:
        """Length in bytes of the message whose first 12 bytes are ``header``, with these 12.

        ProtocolError for an unknown request, wrong version bits, or a size that the request cannot have. The
        connection fails with it, as if the header had been received.
        """
        self._check_alive()
        try:
            return self._stream.message_length(header)
        except ProtocolError as error:
            self._fail(error)
            raise

    def receive_data(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take the next bytes of the stream and the descriptors that came with them. Raises nothing.

        Any chunking will do. Descriptors belong to the last message that begins in ``data``, as the kernel
        has it.
        """
        if self._error is None:
            self._stream.feed(data, fds)
        else:
            self._stream.unclaimed += fds

    def receive_eof(self) -> None:
        """The front end sends nothing more. ProtocolError if a message is incomplete.

        Whole messages can still be read with ``next_event``.
        """
        self._check_alive()
        self._stream.end()
        if self._stream.is_cut_short():
            self.next_event()

    def next_event(self) -> events.Event | None:
        """The next event, or None when more bytes are needed. ProtocolError ends the connection for good."""
        self._check_alive()
        while message := self._next_message():
            event = self._handle(message)
            if event is not None:
                return event
        return None

    def take_unclaimed_fds(self) -> list[int]:
        """Descriptors that no event carried out. The caller closes them."""
        return self._stream.take_unclaimed()

    def close(self) -> list[int]:
        """End the connection; every descriptor that no event carried out, for the caller to close."""
        if self._error is None:
            self._error = "the connection was closed"
        self._stream.discard()
        return self.take_unclaimed_fds()

    # -- out

    def data_to_send(self) -> list[tuple[bytes, tuple[int, ...]]]:
        """Messages for the front end, each with the descriptors that ride on its first byte. Clears them."""
        ready = []
        while self._slots and self._slots[0].message:
            slot = self._slots.popleft()
            ready.append((slot.message, slot.fds))
        return ready

    def ack(self, event: events.Event, ok: bool = True) -> None:
        """Tell the front end how ``event`` went, if it asked. ValueError for an event that wants a reply
        instead.

        A memory request that failed is forgotten: a single region is out of the table again, of a whole table
        nothing is left.
        """
        if FRONTEND_REQUESTS[event.request].answer is Answer.REPLY:
            raise ValueError(f"{describe(event.request)} wants a reply, not a status")
        if event.need_reply:
            self._answer(event, layouts.U64, value=0 if ok else 1)
        if not ok:
            self._state.undo(event)

    def reply_vring_base(self, event: events.GetVringBase, base: int) -> None:
        """``base`` as in SetVringBase."""
        self._answer(event, layouts.VRING_STATE, index=event.index, num=base)
        self._state.vrings[event.index].base = base

    def reply_config(self, event: events.GetConfig, data: bytes) -> None:
        """``data`` has the size that was asked for; empty says that it could not be read."""
        if not data:
            self._put(event, b"")
            return
        if len(data) != event.size:
            raise ValueError(f"expected {event.size} bytes of configuration, got {len(data)}")
        self._answer(event, layouts.CONFIG, offset=event.offset, size=event.size, flags=event.flags, data=data)

    def reply_status(self, event: events.GetStatus, status: int) -> None:
        self._answer(event, layouts.U64, value=status)

    def reply_u64(self, event: events.Event, value: int) -> None:
        """For SetLogBase and CheckDeviceState."""
        self._answer(event, layouts.U64, value=value)

    def reply_inflight(
        self,
        event: events.GetInflightFd,
        mmap_size: int,
        mmap_offset: int,
        num_queues: int,
        queue_size: int,
        fd: int | None,
    ) -> None:
        """The area that tracks requests; size 0 without an fd for none. The fd stays the caller's."""
        self._answer(
            event,
            layouts.INFLIGHT,
            fds=() if fd is None else (fd,),
            mmap_size=mmap_size,
            mmap_offset=mmap_offset,
            num_queues=num_queues,
            queue_size=queue_size,
        )

    def reply_shared_object(self, event: events.GetSharedObject, fd: int | None) -> None:
        """The object's fd, which stays the caller's, or None when there is no such object."""
        self._put(event, b"", () if fd is None else (fd,))

    def reply_device_state(self, event: events.SetDeviceStateFd, error: int = 0, fd: int | None = None) -> None:
        """``error`` 0 to 255, 0 for success; ``fd`` replaces the front end's pipe."""
        value = error | (1 << 8 if fd is None else 0)
        self._answer(event, layouts.U64, fds=() if fd is None else (fd,), value=value)

    def reply_shmem_config(self, event: events.GetShmemConfig, sizes: Mapping[int, int]) -> None:
        """``sizes`` in bytes by the id (0 to 255) of the region."""
        listed = [sizes.get(shmid, 0) for shmid in range(256)]
        nregions = sum(1 for size in listed if size)
        self._answer(event, layouts.SHMEM_CONFIG, nregions=nregions, sizes=listed)

    # -- inside

    def _next_message(self) -> Message | None:
        try:
            return self._stream.next_message()
        except ProtocolError as error:
            self._fail(error)
            raise

    def _handle(self, message: Message) -> events.Event | None:
        try:
            return self._take(message)
        except ProtocolError as error:
            self._stream.unclaimed += message.fds
            self._fail(error, message.header)
            raise

    def _take(self, message: Message) -> events.Event | None:
        """Check ``message``, then act on it. Nothing has changed if it raises."""
        spec = message.header.spec
        request = FrontendRequest(spec.request)
        check_fds(spec, len(message.fds))
        self._state.check_request(spec)
        if request in _SELF_ANSWERED:
            self._answer_now(request)
            return None
        if request not in DECODERS:
            raise ProtocolError(f"{spec.name} is not supported by this back end")
        event = decode(message, self._wants_ack(message.header))
        if isinstance(event, events.GetConfig) and not self._inside_config(event):
            self._slots.append(_Slot(None, build_message(request, flags=REPLY_FLAGS)))
            return None
        self._state.check(event)
        event = self._state.apply(event)
        if event.need_reply != self._wants_ack(message.header):
            # REPLY_ACK begins, or ends, with this very message.
            event = dataclasses.replace(event, need_reply=not event.need_reply)
        if event.need_reply or spec.answer is Answer.REPLY:
            self._slots.append(_Slot(event))
        self._stream.unclaimed += message.fds[len(event.fds_carried) :]
        return event

    def _answer_now(self, request: FrontendRequest) -> None:
        if request in _NEGOTIATION:
            self._state.negotiating = True
        payload = layouts.U64.build(value=_SELF_ANSWERED[request](self))
        self._slots.append(_Slot(None, build_message(request, payload, REPLY_FLAGS)))

    def _wants_ack(self, header: Header) -> bool:
        negotiated = self._state.protocol_features & ProtocolFeature.REPLY_ACK
        return bool(negotiated) and header.need_reply and header.spec.answer is Answer.ACK

    def _inside_config(self, event: events.GetConfig) -> bool:
        return event.size > 0 and event.offset + event.size <= self._limits.config_size

    def _answer(self, event: events.Event, layout: Layout, *, fds: tuple[int, ...] = (), **fields: object) -> None:
        self._put(event, layout.build(**fields), fds)

    def _put(self, event: events.Event, payload: bytes, fds: tuple[int, ...] = ()) -> None:
        for slot in self._slots:
            if slot.event is event and not slot.message:
                slot.message = build_message(event.request, payload, REPLY_FLAGS)
                slot.fds = fds
                return
        raise ValueError(f"{describe(event.request)} was answered already, or is not of this connection")

    def _check_alive(self) -> None:
        if self._error is not None:
            raise ProtocolError(self._error)

    def _fail(self, error: ProtocolError, header: Header | None = None) -> None:
        self._error = str(error)
        if header is not None and self._wants_ack(header):
            payload = layouts.U64.build(value=1)
            request = FrontendRequest(header.spec.request)
            self._slots.append(_Slot(None, build_message(request, payload, REPLY_FLAGS)))
        self._stream.discard()


#: Requests that need nobody else: how each is answered.
_SELF_ANSWERED: Mapping[FrontendRequest, Callable[[BackendConnection], int]] = MappingProxyType(
    {
        _R.GET_FEATURES: lambda connection: connection._limits.features,
        _R.GET_PROTOCOL_FEATURES: lambda connection: connection._limits.protocol_features,
        _R.GET_QUEUE_NUM: lambda connection: connection._queue_num,
        _R.GET_MAX_MEM_SLOTS: lambda connection: connection._limits.max_mem_slots,
    }
)
