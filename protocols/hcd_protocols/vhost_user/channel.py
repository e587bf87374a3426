"""The back channel: requests of the back end to the front end, and both ends of it.

vhost-user.rst "Back-end message types". ``BackChannel`` is the back end's end, ``BackChannelPeer`` the
front end's. Its socket comes with SET_BACKEND_REQ_FD; QEMU closes it for good after one message that it
cannot read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from hcd_protocols.errors import ProtocolError
from hcd_protocols.vhost_user import layouts
from hcd_protocols.vhost_user.decode import check_fds
from hcd_protocols.vhost_user.messages import (
    BACKEND_REQUESTS,
    FLAG_NEED_REPLY,
    NO_FD,
    REPLY_FLAGS,
    VERSION,
    Answer,
    BackendRequest,
    build_message,
    describe,
)
from hcd_protocols.vhost_user.stream import MessageStream

__all__ = ["BackChannel", "BackChannelPeer", "BackendMessage", "BackendReply"]

_R = BackendRequest


@dataclass(frozen=True, slots=True)
class BackendReply:
    """A front end's answer; ``status`` 0 is success. ``fds`` only for a shared object that was looked up."""

    request: BackendRequest
    status: int
    fds: tuple[int, ...] = ()


class BackChannel:
    """The back end's end. Each method gives the bytes of one message; descriptors go along with its first
    byte.

    ``need_reply`` may be set only if REPLY_ACK was negotiated. Nothing is answered otherwise.
    """

    def __init__(self) -> None:
        self._stream = MessageStream(BACKEND_REQUESTS, reply=True)
        self._outstanding: deque[BackendRequest] = deque()

    def config_change(self, need_reply: bool = False) -> bytes:
        """The configuration space changed."""
        return self._request(_R.CONFIG_CHANGE_MSG, b"", need_reply)

    def iotlb(self, iova: int, perm: int, kind: int, need_reply: bool = False) -> bytes:
        """A miss (1) or an access failure (4) at ``iova``."""
        payload = layouts.IOTLB.build(iova=iova, size=0, uaddr=0, perm=perm, type=kind)
        return self._request(_R.IOTLB_MSG, payload, need_reply)

    def host_notifier(self, index: int, size: int, offset: int, has_fd: bool, need_reply: bool = False) -> bytes:
        """A page that serves as the doorbell of ring ``index``; without an fd it is taken back."""
        vring = index | (0 if has_fd else NO_FD)
        payload = layouts.VRING_AREA.build(vring=vring, size=size, offset=offset)
        return self._request(_R.VRING_HOST_NOTIFIER_MSG, payload, need_reply)

    def vring_call(self, index: int, need_reply: bool = False) -> bytes:
        """An in-band interrupt."""
        return self._request(_R.VRING_CALL, layouts.VRING_STATE.build(index=index, num=0), need_reply)

    def vring_err(self, index: int, need_reply: bool = False) -> bytes:
        """An in-band notice of a broken ring."""
        return self._request(_R.VRING_ERR, layouts.VRING_STATE.build(index=index, num=0), need_reply)

    def shared_object(self, request: BackendRequest, uuid: bytes, need_reply: bool = False) -> bytes:
        """``request``: SHARED_OBJECT_ADD, SHARED_OBJECT_REMOVE or SHARED_OBJECT_LOOKUP."""
        if BACKEND_REQUESTS[request].layout is not layouts.SHARED_OBJECT:
            raise ValueError(f"{describe(request)} is not about a shared object")
        return self._request(request, layouts.SHARED_OBJECT.build(uuid=uuid), need_reply)

    def shmem_map(
        self, shmid: int, fd_offset: int, shm_offset: int, size: int, writable: bool, need_reply: bool = False
    ) -> bytes:
        """Map ``size`` bytes of an fd, which goes along, into a shared-memory region."""
        payload = layouts.MMAP.build(
            shmid=shmid, fd_offset=fd_offset, shm_offset=shm_offset, len=size, flags=int(writable)
        )
        return self._request(_R.SHMEM_MAP, payload, need_reply)

    def shmem_unmap(self, shmid: int, shm_offset: int, size: int, need_reply: bool = False) -> bytes:
        payload = layouts.MMAP.build(shmid=shmid, fd_offset=0, shm_offset=shm_offset, len=size, flags=0)
        return self._request(_R.SHMEM_UNMAP, payload, need_reply)

    def receive_data(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take bytes of the front end. Raises nothing."""
        self._stream.feed(data, fds)

    def next_reply(self) -> BackendReply | None:
        """The next answer, or None. ProtocolError: the channel is of no use any more, close it."""
        message = self._stream.next_message()
        if message is None:
            return None
        name = message.header.spec.name
        most = 1 if message.header.spec.request is _R.SHARED_OBJECT_LOOKUP else 0
        if (
            not self._outstanding
            or message.header.spec.request is not self._outstanding[0]
            or message.header.size != layouts.U64.min_size
            or len(message.fds) > most
        ):
            self._stream.unclaimed += message.fds
            self._stream.discard()
            expected = describe(self._outstanding[0]) if self._outstanding else "nothing"
            raise ProtocolError(
                f"reply to {name}: expected a u64 for {expected}, got {message.header.size} bytes "
                f"and {len(message.fds)} file descriptors"
            )
        request = self._outstanding.popleft()
        return BackendReply(request, int(layouts.U64.parse(message.payload)["value"]), message.fds)

    def take_unclaimed_fds(self) -> list[int]:
        """Descriptors that no reply carried out. The caller closes them."""
        return self._stream.take_unclaimed()

    def _request(self, request: BackendRequest, payload: bytes, need_reply: bool) -> bytes:
        if need_reply or BACKEND_REQUESTS[request].answer is Answer.REPLY:
            self._outstanding.append(request)
        return build_message(request, payload, VERSION | (FLAG_NEED_REPLY if need_reply else 0))


@dataclass(frozen=True, slots=True)
class BackendMessage:
    """A request of the back end. Its descriptors belong to whoever took it."""

    request: BackendRequest
    payload: bytes
    fds: tuple[int, ...]
    need_reply: bool


class BackChannelPeer:
    """The front end's end: requests in, statuses out."""

    def __init__(self) -> None:
        self._stream = MessageStream(BACKEND_REQUESTS)

    def message_length(self, header: bytes) -> int:
        """Length in bytes of the message that begins with ``header``. ProtocolError if it is illegal."""
        return self._stream.message_length(header)

    def receive_data(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take bytes of the back end. Raises nothing."""
        self._stream.feed(data, fds)

    def next_message(self) -> BackendMessage | None:
        """The next request, or None. ProtocolError: close the channel."""
        message = self._stream.next_message()
        if message is None:
            return None
        spec = message.header.spec
        try:
            check_fds(spec, len(message.fds))
        except ProtocolError:
            self._stream.unclaimed += message.fds
            self._stream.discard()
            raise
        need_reply = message.header.need_reply or spec.answer is Answer.REPLY
        return BackendMessage(BackendRequest(spec.request), message.payload, message.fds, need_reply)

    def reply(self, message: BackendMessage, status: int = 0) -> bytes:
        """The bytes of the answer to ``message``; empty when none is wanted."""
        if not message.need_reply:
            return b""
        return build_message(message.request, layouts.U64.build(value=status), REPLY_FLAGS)

    def take_unclaimed_fds(self) -> list[int]:
        """Descriptors that no request carried out. The caller closes them."""
        return self._stream.take_unclaimed()
