"""The socket of a front end: one request at a time, with its file descriptors, and the answer to it.

Replies are read one message at a time, never beyond it, so that file descriptors stay with their message.
"""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import ParamSpec

from hcd_protocols.vhost_user import HEADER_SIZE, FrontendConnection, ProtocolError, ProtocolFeature, Reply

from hcd.frontend.errors import BackendError

__all__ = ["Link"]

MAX_FDS = 8
P = ParamSpec("P")


class Link:
    """A connected socket (which the link owns) and the protocol's state on it.

    ``timeout`` in seconds bounds every wait. ``acks`` asks for a status with every message
    once REPLY_ACK is negotiated.
    """

    def __init__(self, sock: socket.socket, *, timeout: float, acks: bool) -> None:
        self.sock = sock
        self.timeout = timeout
        self.connection = FrontendConnection()
        self._acks = acks
        sock.settimeout(timeout)

    @classmethod
    def connect(cls, path: str, *, timeout: float, acks: bool) -> Link:
        """BackendError if nobody listens at ``path``."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            sock.settimeout(timeout)
            sock.connect(path)
        except OSError as error:
            sock.close()
            raise BackendError(f"cannot connect to {path}: {error.strerror or error}") from error
        return cls(sock, timeout=timeout, acks=acks)

    def close(self) -> None:
        self._close_fds(self.connection.close())
        self.sock.close()

    def ask(self, request: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> Reply:
        """Send a request that has a reply of its own; ``request`` is a method of ``self.connection``.

        BackendError when the back end hangs up, is silent or answers out of turn.
        """
        request(*args, **kwargs)
        reply = self._exchange()
        assert reply is not None, "requests without a reply go through tell()"
        return reply

    def tell(self, request: Callable[..., None], *args: object) -> None:
        """Send a request that has no reply of its own, and wait for its status if there will be one.

        BackendError also when the back end refuses. libvhost-user copies NEED_REPLY into replies, where it
        does not belong; so it is set only where it has a meaning.
        """
        acked = self._acks and bool(self.connection.protocol_features & ProtocolFeature.REPLY_ACK)
        request(*args, need_reply=acked)
        reply = self._exchange()
        if reply is not None and not reply.ok:
            raise BackendError(f"the back end refused {reply.request.name} with status {reply.value:#x}")

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send ``data`` as it is; the file descriptors ride on its first byte and stay the caller's.

        BackendError when the back end hung up or does not read.
        """
        try:
            sent = socket.send_fds(self.sock, [data], list(fds)) if fds else 0
            if sent < len(data):  # else whoever read it may have hung up already
                self.sock.sendall(data[sent:])
        except TimeoutError as error:
            raise BackendError("the back end does not read") from error
        except OSError as error:
            raise BackendError(f"the back end hung up: {error.strerror}") from error

    def receive_raw(self, length: int) -> bytes:
        """Exactly ``length`` bytes. BackendError when the back end hangs up or is silent."""
        data, fds = self._receive_exactly(length)
        self._close_fds(fds)
        return data

    def wait_hangup(self, timeout: float | None = None) -> bytes:
        """Wait until the back end has hung up; returns what it still sent. BackendError if it does not."""
        deadline = time.monotonic() + (self.timeout if timeout is None else timeout)
        data = b""
        poller = select.poll()
        poller.register(self.sock, select.POLLIN)
        while poller.poll(max(0.0, deadline - time.monotonic()) * 1000):
            try:
                piece = self.sock.recv(65536)
            except ConnectionError:
                return data
            if not piece:
                return data
            data += piece
        raise BackendError("the back end did not hang up")

    def hung_up(self) -> bool:
        """Whether the back end has."""
        poller = select.poll()
        poller.register(self.sock, select.POLLRDHUP)
        return bool(poller.poll(0))

    # -- inside

    def _exchange(self) -> Reply | None:
        """Send what is queued; the answer to the last request, None if it has none."""
        for data, fds in self.connection.data_to_send():
            self.send_raw(data, fds)
        reply = None
        while self.connection.outstanding:
            reply = self._receive()
        return reply

    def _receive(self) -> Reply | None:
        try:
            header, fds = self._receive_exactly(HEADER_SIZE)
            self.connection.receive_data(header, fds)
            rest, fds = self._receive_exactly(self.connection.message_length(header) - HEADER_SIZE)
            self.connection.receive_data(rest, fds)
            reply = self.connection.next_reply()
        except ProtocolError as error:
            raise BackendError(f"the back end answered nonsense: {error}") from error
        finally:
            self._close_fds(self.connection.take_unclaimed_fds())
        return reply

    def _receive_exactly(self, length: int) -> tuple[bytes, list[int]]:
        data, fds = b"", []
        while len(data) < length:
            try:
                piece, more, _, _ = socket.recv_fds(self.sock, length - len(data), MAX_FDS)
            except TimeoutError as error:
                raise BackendError("the back end does not answer") from error
            except OSError as error:
                raise BackendError(f"the back end hung up: {error.strerror}") from error
            if not piece:
                raise BackendError("the back end hung up")
            data += piece
            fds += more
        return data, fds

    @staticmethod
    def _close_fds(fds: Sequence[int]) -> None:
        for fd in fds:
            os.close(fd)
