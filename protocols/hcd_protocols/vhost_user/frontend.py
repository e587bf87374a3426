"""The front end's side of a vhost-user connection, without a socket: the mirror of ``connection``.

Each method queues one request for ``data_to_send``. Requests that are answered are remembered, and
``next_reply`` gives the answers back in the order of the requests. ``need_reply=True`` asks for a status
where the request has no reply of its own; it is waited for only if REPLY_ACK was negotiated. The back end's
offers are taken from its replies.

The connection checks what the back end sends, not what its own side says: tests say illegal things on
purpose. Descriptors that go out stay the caller's, who may close them once they are sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from hcd_protocols.errors import ProtocolError
from hcd_protocols.vhost_user import layouts
from hcd_protocols.vhost_user.events import MemoryRegion
from hcd_protocols.vhost_user.features import ProtocolFeature
from hcd_protocols.vhost_user.messages import (
    FLAG_NEED_REPLY,
    FRONTEND_REQUESTS,
    NO_FD,
    REPLY_FLAGS,
    VERSION,
    Answer,
    FrontendRequest,
    build_message,
    describe,
)
from hcd_protocols.vhost_user.stream import Message, MessageStream

__all__ = ["FrontendConnection", "Reply"]

_R = FrontendRequest

#: Payload sizes of replies that are not a u64; an empty one stands for "no" where the protocol says so.
_REPLY_SIZES: dict[FrontendRequest, tuple[int, ...]] = {
    _R.GET_VRING_BASE: (8,),
    _R.GET_VRING_BASE_SKIP_DRAIN: (8,),
    _R.GET_INFLIGHT_FD: (20, 24),
    _R.GET_SHARED_OBJECT: (0, 8),
    _R.GET_SHMEM_CONFIG: (2056,),
    _R.SET_LOG_BASE: (0, 8, 16),
}
_MAY_CARRY_FD = frozenset({_R.GET_INFLIGHT_FD, _R.GET_SHARED_OBJECT, _R.SET_DEVICE_STATE_FD, _R.POSTCOPY_ADVISE})


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one request. Its descriptors belong to whoever took it.

    The properties read the payload; each is for the requests that its text names, ValueError for others.
    """

    request: FrontendRequest
    payload: bytes
    fds: tuple[int, ...] = ()
    #: a status that ``need_reply`` asked for
    is_ack: bool = False

    @property
    def value(self) -> int:
        """The u64 of GET_FEATURES, GET_STATUS and their like, and of a status."""
        if len(self.payload) != layouts.U64.min_size:
            raise ValueError(f"the reply to {describe(self.request)} is no u64")
        return int(layouts.U64.parse(self.payload)["value"])

    @property
    def ok(self) -> bool:
        """Whether a status says success."""
        return self.value == 0

    @property
    def vring_base(self) -> int:
        """The base of GET_VRING_BASE."""
        self._expect(_R.GET_VRING_BASE, _R.GET_VRING_BASE_SKIP_DRAIN)
        return int(layouts.VRING_STATE.parse(self.payload)["num"])

    @property
    def config(self) -> bytes | None:
        """The bytes of GET_CONFIG; None when the back end could not read them."""
        self._expect(_R.GET_CONFIG)
        return bytes(layouts.CONFIG.parse(self.payload)["data"]) if self.payload else None

    @property
    def inflight(self) -> tuple[int, int, int, int]:
        """mmap_size, mmap_offset, num_queues and queue_size of GET_INFLIGHT_FD."""
        self._expect(_R.GET_INFLIGHT_FD)
        fields = layouts.INFLIGHT.parse(self.payload)
        return fields["mmap_size"], fields["mmap_offset"], fields["num_queues"], fields["queue_size"]

    @property
    def shmem_sizes(self) -> dict[int, int]:
        """Sizes in bytes by region id, of GET_SHMEM_CONFIG."""
        self._expect(_R.GET_SHMEM_CONFIG)
        sizes = layouts.SHMEM_CONFIG.parse(self.payload)["sizes"]
        return {shmid: int(size) for shmid, size in enumerate(sizes) if size}

    def _expect(self, *requests: FrontendRequest) -> None:
        if self.request not in requests or self.is_ack:
            raise ValueError(f"not in a reply to {describe(self.request)}")


@dataclass(frozen=True, slots=True)
class _Outstanding:
    request: FrontendRequest
    is_ack: bool
    #: exact size of a GET_CONFIG reply
    config_size: int = 0


class FrontendConnection:
    """One connection to a back end. ``ack_all`` sets NEED_REPLY on every request, as user-mode Linux does."""

    def __init__(self, *, ack_all: bool = False) -> None:
        self._ack_all = ack_all
        self._stream = MessageStream(FRONTEND_REQUESTS, reply=True)
        self._outstanding: deque[_Outstanding] = deque()
        self._to_send: list[tuple[bytes, tuple[int, ...]]] = []
        self._error: str | None = None
        #: what the back end offers; None until its reply came
        self.offered_features: int | None = None
        self.offered_protocol_features: int | None = None
        #: what was sent with set_features and set_protocol_features
        self.features = 0
        self.protocol_features = 0

    # -- requests

    def get_features(self) -> None:
        self._send(_R.GET_FEATURES)

    def set_features(self, features: int, *, need_reply: bool = False) -> None:
        self.features = features
        self._send_u64(_R.SET_FEATURES, features, need_reply)

    def get_protocol_features(self) -> None:
        self._send(_R.GET_PROTOCOL_FEATURES)

    def set_protocol_features(self, features: int, *, need_reply: bool = False) -> None:
        self.protocol_features = features
        self._send_u64(_R.SET_PROTOCOL_FEATURES, features, need_reply)

    def set_owner(self, *, need_reply: bool = False) -> None:
        self._send(_R.SET_OWNER, need_reply=need_reply)

    def reset_owner(self, *, need_reply: bool = False) -> None:
        self._send(_R.RESET_OWNER, need_reply=need_reply)

    def reset_device(self, *, need_reply: bool = False) -> None:
        self._send(_R.RESET_DEVICE, need_reply=need_reply)

    def get_queue_num(self) -> None:
        self._send(_R.GET_QUEUE_NUM)

    def get_max_mem_slots(self) -> None:
        self._send(_R.GET_MAX_MEM_SLOTS)

    def set_mem_table(self, regions: Sequence[MemoryRegion], fds: Sequence[int], *, need_reply: bool = False) -> None:
        """The whole table; ``fds[i]`` backs ``regions[i]``."""
        payload = layouts.MEM_TABLE.build(nregions=len(regions), regions=[_region_fields(region) for region in regions])
        self._send(_R.SET_MEM_TABLE, payload, tuple(fds), need_reply=need_reply)

    def add_mem_reg(self, region: MemoryRegion, fd: int, *, need_reply: bool = False) -> None:
        payload = layouts.SINGLE_REGION.build(region=_region_fields(region))
        self._send(_R.ADD_MEM_REG, payload, (fd,), need_reply=need_reply)

    def rem_mem_reg(self, region: MemoryRegion, fd: int | None = None, *, need_reply: bool = False) -> None:
        """``fd``: only old front ends send one."""
        payload = layouts.SINGLE_REGION.build(region=_region_fields(region))
        self._send(_R.REM_MEM_REG, payload, () if fd is None else (fd,), need_reply=need_reply)

    def set_vring_num(self, index: int, num: int, *, need_reply: bool = False) -> None:
        self._send_state(_R.SET_VRING_NUM, index, num, need_reply)

    def set_vring_addr(
        self,
        index: int,
        desc: int,
        used: int,
        avail: int,
        *,
        flags: int = 0,
        log: int = 0,
        need_reply: bool = False,
    ) -> None:
        """Front-end addresses. Packed: desc is the ring, avail the driver's area, used the device's."""
        payload = layouts.VRING_ADDR.build(index=index, flags=flags, desc=desc, used=used, avail=avail, log=log)
        self._send(_R.SET_VRING_ADDR, payload, need_reply=need_reply)

    def set_vring_base(self, index: int, base: int, *, need_reply: bool = False) -> None:
        self._send_state(_R.SET_VRING_BASE, index, base, need_reply)

    def get_vring_base(self, index: int) -> None:
        self._send_state(_R.GET_VRING_BASE, index, 0, False)

    def get_vring_base_skip_drain(self, index: int) -> None:
        self._send_state(_R.GET_VRING_BASE_SKIP_DRAIN, index, 0, False)

    def set_vring_kick(self, index: int, fd: int | None, *, need_reply: bool = False) -> None:
        self._send_vring_fd(_R.SET_VRING_KICK, index, fd, need_reply)

    def set_vring_call(self, index: int, fd: int | None, *, need_reply: bool = False) -> None:
        self._send_vring_fd(_R.SET_VRING_CALL, index, fd, need_reply)

    def set_vring_err(self, index: int, fd: int | None, *, need_reply: bool = False) -> None:
        self._send_vring_fd(_R.SET_VRING_ERR, index, fd, need_reply)

    def set_vring_enable(self, index: int, enable: bool, *, need_reply: bool = False) -> None:
        self._send_state(_R.SET_VRING_ENABLE, index, int(enable), need_reply)

    def set_vring_endian(self, index: int, big: bool, *, need_reply: bool = False) -> None:
        self._send_state(_R.SET_VRING_ENDIAN, index, int(big), need_reply)

    def vring_kick(self, index: int, *, need_reply: bool = False) -> None:
        self._send_state(_R.VRING_KICK, index, 0, need_reply)

    def get_config(self, offset: int, size: int, *, flags: int = 0) -> None:
        payload = layouts.CONFIG.build(offset=offset, size=size, flags=flags, data=bytes(size))
        self._send(_R.GET_CONFIG, payload, config_size=len(payload))

    def set_config(self, offset: int, data: bytes, *, flags: int = 0, need_reply: bool = False) -> None:
        payload = layouts.CONFIG.build(offset=offset, size=len(data), flags=flags, data=data)
        self._send(_R.SET_CONFIG, payload, need_reply=need_reply)

    def set_status(self, status: int, *, need_reply: bool = False) -> None:
        self._send_u64(_R.SET_STATUS, status, need_reply)

    def get_status(self) -> None:
        self._send(_R.GET_STATUS)

    def set_backend_req_fd(self, fd: int, *, need_reply: bool = False) -> None:
        self._send(_R.SET_BACKEND_REQ_FD, fds=(fd,), need_reply=need_reply)

    def send_rarp(self, mac: bytes, *, need_reply: bool = False) -> None:
        """``mac``: 6 bytes."""
        self._send(_R.SEND_RARP, mac + bytes(2), need_reply=need_reply)

    def net_set_mtu(self, mtu: int, *, need_reply: bool = False) -> None:
        self._send_u64(_R.NET_SET_MTU, mtu, need_reply)

    def set_log_base(self, size: int, offset: int, fd: int) -> None:
        payload = layouts.LOG.build(mmap_size=size, mmap_offset=offset)
        self._send(_R.SET_LOG_BASE, payload, (fd,))

    def set_log_fd(self, fd: int, *, need_reply: bool = False) -> None:
        self._send(_R.SET_LOG_FD, fds=(fd,), need_reply=need_reply)

    def iotlb_msg(self, iova: int, size: int, uaddr: int, perm: int, kind: int, *, need_reply: bool = True) -> None:
        payload = layouts.IOTLB.build(iova=iova, size=size, uaddr=uaddr, perm=perm, type=kind)
        self._send(_R.IOTLB_MSG, payload, need_reply=need_reply)

    def get_inflight_fd(self, num_queues: int, queue_size: int) -> None:
        self._send(_R.GET_INFLIGHT_FD, _inflight(0, 0, num_queues, queue_size))

    def set_inflight_fd(
        self,
        mmap_size: int,
        mmap_offset: int,
        num_queues: int,
        queue_size: int,
        fd: int,
        *,
        need_reply: bool = False,
    ) -> None:
        payload = _inflight(mmap_size, mmap_offset, num_queues, queue_size)
        self._send(_R.SET_INFLIGHT_FD, payload, (fd,), need_reply=need_reply)

    def get_shared_object(self, uuid: bytes) -> None:
        self._send(_R.GET_SHARED_OBJECT, layouts.SHARED_OBJECT.build(uuid=uuid))

    def set_device_state_fd(self, direction: int, phase: int, fd: int) -> None:
        payload = layouts.DEVICE_STATE.build(direction=direction, phase=phase)
        self._send(_R.SET_DEVICE_STATE_FD, payload, (fd,))

    def check_device_state(self) -> None:
        self._send(_R.CHECK_DEVICE_STATE)

    def get_shmem_config(self) -> None:
        self._send(_R.GET_SHMEM_CONFIG)

    # -- out and in

    def data_to_send(self) -> list[tuple[bytes, tuple[int, ...]]]:
        """Messages for the back end, each with the descriptors that ride on its first byte. Clears them."""
        ready, self._to_send = self._to_send, []
        return ready

    @property
    def outstanding(self) -> int:
        """How many answers are still due."""
        return len(self._outstanding)

    def message_length(self, header: bytes) -> int:
        """Length in bytes of the reply whose first 12 bytes are ``header``. ProtocolError if it is
        illegal.
        """
        return self._stream.message_length(header)

    def receive_data(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take the next bytes of the stream and the descriptors that came with them. Raises nothing."""
        if self._error is None:
            self._stream.feed(data, fds)
        else:
            self._stream.unclaimed += fds

    def receive_eof(self) -> None:
        """The back end sends nothing more. ProtocolError in the middle of a message."""
        self._check_alive()
        self._stream.end()
        if self._stream.is_cut_short():
            self.next_reply()

    def next_reply(self) -> Reply | None:
        """The next answer, or None when more bytes are needed. ProtocolError ends the connection for good."""
        self._check_alive()
        message: Message | None = None
        try:
            message = self._stream.next_message()
            return self._handle(message) if message else None
        except ProtocolError as error:
            if message is not None:
                self._stream.unclaimed += message.fds
            self._error = str(error)
            self._stream.discard()
            raise

    def take_unclaimed_fds(self) -> list[int]:
        """Descriptors that no reply carried out. The caller closes them."""
        return self._stream.take_unclaimed()

    def close(self) -> list[int]:
        """End the connection; every descriptor that no reply carried out, for the caller to close."""
        if self._error is None:
            self._error = "the connection was closed"
        self._stream.discard()
        return self.take_unclaimed_fds()

    # -- inside

    def _check_alive(self) -> None:
        if self._error is not None:
            raise ProtocolError(self._error)

    def _handle(self, message: Message) -> Reply:
        header = message.header
        if not self._outstanding:
            raise ProtocolError(f"reply to {header.spec.name}: expected none, no answer is due")
        wanted = self._outstanding[0]
        if header.spec.request is not wanted.request:
            raise ProtocolError(f"reply to {header.spec.name}: expected one to {describe(wanted.request)}")
        if header.flags != REPLY_FLAGS:
            raise ProtocolError(f"reply to {header.spec.name}: expected flags {REPLY_FLAGS:#x}, got {header.flags:#x}")
        sizes = _reply_sizes(wanted)
        if header.size not in sizes:
            expected = " or ".join(str(size) for size in sizes)
            raise ProtocolError(f"reply to {header.spec.name}: expected {expected} bytes, got {header.size}")
        most = 1 if wanted.request in _MAY_CARRY_FD and not wanted.is_ack else 0
        if len(message.fds) > most:
            raise ProtocolError(
                f"reply to {header.spec.name}: expected at most {most} file descriptors, got {len(message.fds)}"
            )
        self._outstanding.popleft()
        reply = Reply(wanted.request, message.payload, message.fds, wanted.is_ack)
        if reply.request is _R.GET_FEATURES:
            self.offered_features = reply.value
        elif reply.request is _R.GET_PROTOCOL_FEATURES:
            self.offered_protocol_features = reply.value
        return reply

    def _send(
        self,
        request: FrontendRequest,
        payload: bytes = b"",
        fds: tuple[int, ...] = (),
        *,
        need_reply: bool = False,
        config_size: int = 0,
    ) -> None:
        answer = FRONTEND_REQUESTS[request].answer
        need_reply = need_reply or self._ack_all
        flags = VERSION | (FLAG_NEED_REPLY if need_reply else 0)
        self._to_send.append((build_message(request, payload, flags), fds))
        acked = need_reply and bool(self.protocol_features & ProtocolFeature.REPLY_ACK)
        if answer is Answer.REPLY:
            self._outstanding.append(_Outstanding(request, False, config_size))
        elif answer is Answer.ACK and acked:
            self._outstanding.append(_Outstanding(request, True))

    def _send_u64(self, request: FrontendRequest, value: int, need_reply: bool) -> None:
        self._send(request, layouts.U64.build(value=value), need_reply=need_reply)

    def _send_state(self, request: FrontendRequest, index: int, num: int, need_reply: bool) -> None:
        self._send(request, layouts.VRING_STATE.build(index=index, num=num), need_reply=need_reply)

    def _send_vring_fd(self, request: FrontendRequest, index: int, fd: int | None, need_reply: bool) -> None:
        value = index | (NO_FD if fd is None else 0)
        payload = layouts.U64.build(value=value)
        self._send(request, payload, () if fd is None else (fd,), need_reply=need_reply)


def _reply_sizes(wanted: _Outstanding) -> tuple[int, ...]:
    if wanted.is_ack:
        return (8,)
    if wanted.request is _R.GET_CONFIG:
        return (wanted.config_size, 0)
    return _REPLY_SIZES.get(wanted.request, (8,))


def _region_fields(region: MemoryRegion) -> dict[str, int]:
    return {
        "guest_addr": region.guest_addr,
        "size": region.size,
        "user_addr": region.user_addr,
        "mmap_offset": region.mmap_offset,
    }


def _inflight(mmap_size: int, mmap_offset: int, num_queues: int, queue_size: int) -> bytes:
    return layouts.INFLIGHT.build(
        mmap_size=mmap_size, mmap_offset=mmap_offset, num_queues=num_queues, queue_size=queue_size
    )
