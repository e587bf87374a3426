"""Everything that parses what a peer sent: both ends of vhost-user and its back channel, both ends of the doorbell
protocol, and the head of an HTTP request.

A case is one message of a valid conversation, with mutations. What holds:

* ``ProtocolError`` (``BadRequest`` for HTTP) is all that comes out, and it ends the connection for good.
* Each descriptor that went in comes out once: with an event, or unclaimed.
* A message that is refused changed nothing of what was negotiated before it.
* Where messages still have the length that their headers tell, cutting the stream into other pieces changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from hcd_protocols.doorbell import Added, Capability, HostConnection, Removed, VmmConnection
from hcd_protocols.doorbell.text import message_text
from hcd_protocols.errors import ProtocolError
from hcd_protocols.vhost_user import (
    BackChannel,
    BackendConnection,
    FrontendConnection,
    events,
)
from hcd_protocols.vhost_user.channel import BackChannelPeer
from hcd_protocols.vhost_user.messages import FRONTEND_REQUESTS, Answer, build_message
from hcd_protocols.vhost_user.messages import BackendRequest as Asked

from hcd.metrics.server import BadRequest, Head, parse_head
from tests.fuzz import conversations
from tests.fuzz.mutate import Heard, chunks, mutate

__all__ = ["CodecFuzz"]

HEADER = 12
HTTP_HEADS = (
    b"GET /metrics HTTP/1.1\r\nHost: localhost:9847\r\nUser-Agent: Prometheus/2.42.0\r\nAccept: text/plain",
    b"HEAD /metrics?x=1 HTTP/1.0\r\nConnection: keep-alive",
    b"GET / HTTP/1.1\r\nContent-Length: 0\r\nConnection: Upgrade, close\r\nX-Prometheus-Scrape-Timeout-Seconds: 10",
    b"POST /metrics HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 4",
)


class Books:
    """Descriptors in and out. Here they are just numbers."""

    def __init__(self) -> None:
        self.given: list[int] = []
        self.back: list[int] = []

    def give(self, count: int) -> list[int]:
        fds = list(range(100 + len(self.given), 100 + len(self.given) + count))
        self.given += fds
        return fds

    def check(self) -> None:
        assert sorted(self.back) == self.given, f"descriptors in {self.given}, out {sorted(self.back)}"


class CodecFuzz:
    """The target ``codec``."""

    name = "codec"

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.cases = self.accepted = self.refused = 0

    def close(self) -> None: ...

    def describe(self) -> str:
        return f"{self.accepted} messages taken, {self.refused} conversations refused"

    def run_one(self, number: int) -> None:
        chance = random.Random(f"{self.seed}/{number}")
        kind = chance.random()
        for most, play in _PLAYS:
            if kind < most:
                play(self, chance)
                break

    # -- vhost-user

    def backend(self, chance: random.Random) -> None:
        said, framed = mutate(chance.choice(conversations.front_end()), chance, HEADER)
        whole = self._play_backend(said, chance)
        if framed and chance.random() < 0.3:
            pieces = self._play_backend(chunks(said, chance), chance)
            assert pieces == whole, f"cut into pieces: {pieces}; whole: {whole}"
        elif not framed:
            self._play_backend(chunks(said, chance), chance)

    def _play_backend(self, said: Sequence[Heard], chance: random.Random) -> list[object]:
        """What came of it: the events, descriptors left out, and the error."""
        link, books = conversations.make_backend(), Books()
        seen: list[object] = []
        for position, one in enumerate(said):
            link.receive_data(one.data, books.give(one.fds))
            if not self._take_events(link, books, seen, chance):
                self._check_dead_backend(link, books, said[position + 1 :], chance)
                break
        else:
            try:
                link.receive_eof()
            except ProtocolError as error:
                seen.append(str(error))
        books.back += link.take_unclaimed_fds()
        books.back += link.close()
        books.check()
        return seen

    def _take_events(
        self, link: BackendConnection, books: Books, seen: list[object], chance: random.Random
    ) -> bool:
        while True:
            before = _agreed(link)
            self.cases += 1
            event, why = None, ""
            try:
                event = link.next_event()
            except ProtocolError as error:
                why = str(error) or "an error without words"
            if why:
                assert _agreed(link) == before, "a message that was refused changed something"
                seen.append(why)
                self.refused += 1
                return False
            if event is None:
                return True
            self.accepted += 1
            books.back += event.fds_carried
            if isinstance(event, events.SetMemTable):
                assert len(event.fds) == len(event.regions)
            seen.append((type(event).__name__, event.need_reply, len(event.fds_carried), _fields(event)))
            _answer(link, event)
            for data, fds in link.data_to_send():
                assert len(data) >= HEADER
                assert not fds

    def _check_dead_backend(
        self, link: BackendConnection, books: Books, rest: Sequence[Heard], chance: random.Random
    ) -> None:
        """The error stays, and what still comes is nobody's."""
        before = _agreed(link)
        assert link.failed
        for one in rest[:2]:
            link.receive_data(one.data, books.give(one.fds))
        for dead in (link.next_event, link.receive_eof, lambda: link.message_length(bytes(HEADER))):
            try:
                dead()
            except ProtocolError:
                continue
            raise AssertionError("a connection that failed goes on")
        assert _agreed(link) == before
        link.data_to_send()
        assert not link.data_to_send(), "there is no end of answers after an error"

    def frontend(self, chance: random.Random) -> None:
        said, framed = mutate(conversations.back_end()[0], chance, HEADER)
        whole = self._play_frontend(said)
        if framed:
            assert self._play_frontend(chunks(said, chance)) == whole

    def _play_frontend(self, said: Sequence[Heard]) -> list[object]:
        front, books = FrontendConnection(), Books()
        conversations.ask(front)
        front.data_to_send()
        seen: list[object] = []
        try:
            for one in said:
                front.receive_data(one.data, books.give(one.fds))
                self.cases += 1
                while (reply := front.next_reply()) is not None:
                    books.back += reply.fds
                    self.accepted += 1
                    seen.append((reply.request, reply.payload, len(reply.fds), reply.is_ack))
                    _read_reply(reply)
            front.receive_eof()
        except ProtocolError as error:
            self.refused += 1
            seen.append(str(error))
            _expect_dead(front.next_reply)
        books.back += front.take_unclaimed_fds()
        books.back += front.close()
        books.check()
        return seen

    def back_channel(self, chance: random.Random) -> None:
        said, framed = mutate(conversations.back_channel()[0], chance, HEADER)
        whole = self._play_back_channel(said)
        if framed:
            assert self._play_back_channel(chunks(said, chance)) == whole

    def _play_back_channel(self, said: Sequence[Heard]) -> list[object]:
        peer, books = BackChannelPeer(), Books()
        seen: list[object] = []
        try:
            for one in said:
                peer.receive_data(one.data, books.give(one.fds))
                self.cases += 1
                while (message := peer.next_message()) is not None:
                    self.accepted += 1
                    books.back += message.fds
                    seen.append((message.request, message.payload, len(message.fds)))
                    peer.reply(message)
        except ProtocolError as error:
            self.refused += 1
            seen.append(str(error))
        rest = peer.take_unclaimed_fds()
        peer._stream.discard()
        books.back += rest + peer.take_unclaimed_fds()
        books.check()
        return seen

    def back_channel_replies(self, chance: random.Random) -> None:
        channel, books = BackChannel(), Books()
        channel.config_change(True)
        channel.shared_object(Asked.SHARED_OBJECT_LOOKUP, bytes(16))
        channel.vring_err(0, True)
        asked = (Asked.CONFIG_CHANGE_MSG, Asked.SHARED_OBJECT_LOOKUP, Asked.VRING_ERR)
        spoken = [(build_message(one, bytes(8), 5), int(one is asked[1])) for one in asked]
        said, _ = mutate(spoken, chance, HEADER)
        try:
            for one in chunks(said, chance):
                channel.receive_data(one.data, books.give(one.fds))
                self.cases += 1
                while (reply := channel.next_reply()) is not None:
                    self.accepted += 1
                    books.back += reply.fds
        except ProtocolError:
            self.refused += 1
        rest = channel.take_unclaimed_fds()
        channel._stream.discard()
        books.back += rest + channel.take_unclaimed_fds()
        books.check()

    # -- doorbells: packets, whose header ends in the size of the whole

    def doorbell_host(self, chance: random.Random) -> None:
        said, _ = mutate(chance.choice(conversations.doorbell_vmm()), chance, 8)
        link, books = HostConnection(), Books()
        link.welcome("bells", doorbells=3, interrupts=1, memory=1)
        for items in conversations.items():
            link.add(items, [1] * len(items))
        link.end()
        try:
            for one in said:
                packet = _sized(one, chance)
                assert message_text(packet).isprintable()
                link.receive_data(packet, books.give(one.fds))
                self.cases += 1
                while (event := link.next_event()) is not None:
                    self.accepted += 1
                    books.back += [held.fd for held in getattr(event, "held", ())]
                    link.data_to_send()
        except ProtocolError as error:
            self.refused += 1
            link.send_error(str(error))
            assert len(link.data_to_send()) == 1
            _expect_dead(link.next_event)
        books.back += link.take_unclaimed_fds()
        books.check()

    def doorbell_vmm(self, chance: random.Random) -> None:
        said, _ = mutate(conversations.doorbell_host()[0], chance, 8)
        link, books = VmmConnection("qemu", Capability(0xFF)), Books()
        try:
            for one in said:
                link.receive_data(_sized(one, chance), books.give(one.fds))
                self.cases += 1
                while (event := link.next_event()) is not None:
                    self.accepted += 1
                    if isinstance(event, Added):
                        books.back += [fd for fd in event.fds if fd is not None]
                        link.answer([0] * len(event.items))
                    elif isinstance(event, Removed):
                        link.answer([5] * len(event.references))
        except ProtocolError:
            self.refused += 1
            _expect_dead(link.next_event)
        books.back += link.take_unclaimed_fds()
        books.check()

    # -- HTTP

    def http(self, chance: random.Random) -> None:
        for _ in range(8):
            data = bytearray(chance.choice(HTTP_HEADS))
            for _ in range(chance.choice((0, 1, 2, 6))):
                at = chance.randrange(len(data) + 1)
                what = chance.randrange(3)
                if what == 0:
                    data[at:at] = chance.choice((b"\r\n", b" ", b":", b"\0", b"\xff", b"\t", b",", b"\r", b"\n"))
                elif what == 1:
                    del data[at : at + chance.randrange(1, 9)]
                else:
                    data[at : at + 1] = chance.randbytes(1)
            self.cases += 1
            try:
                found: Head | BadRequest = parse_head(bytes(data))
            except BadRequest as error:
                found = error
            if isinstance(found, Head):
                assert found.path.isascii()
                assert " " not in found.path
                self.accepted += 1
            else:
                assert 400 <= found.status < 600
                self.refused += 1


def _sized(one: Heard, chance: random.Random) -> bytes:
    """With the size that the doorbell protocol wants in the header, mostly."""
    if len(one.data) < 8 or chance.random() < 0.1:
        return one.data
    return one.data[:4] + len(one.data).to_bytes(4, "little") + one.data[8:]


def _agreed(link: BackendConnection) -> object:
    """All that was negotiated."""
    rings = [(r.num, r.base, r.addr, r.kicked, r.enabled, r.big_endian) for r in link.vrings]
    return link.features, link.protocol_features, link.status, link.regions, rings


def _fields(event: events.Event) -> object:
    """What an event says, apart from its descriptors, whose numbers follow from how they arrived."""
    return tuple(
        getattr(event, name)
        for name in getattr(type(event), "__match_args__", ())
        if name not in ("fd", "fds", "need_reply")
    )


def _answer(link: BackendConnection, event: events.Event) -> None:
    """As a back end does."""
    match event:
        case events.GetVringBase() | events.GetVringBaseSkipDrain():
            if isinstance(event, events.GetVringBase):
                link.reply_vring_base(event, 3)
        case events.GetConfig():
            link.reply_config(event, bytes(event.size))
        case events.GetStatus():
            link.reply_status(event, link.status)
        case events.SetMemTable(regions=(region, *_)) | events.AddMemReg(region=region):
            link.ack(event, region.guest_addr >> 24 != 4)  # some cannot be mapped
        case _ if FRONTEND_REQUESTS[event.request].answer is Answer.ACK:
            link.ack(event)


def _read_reply(reply: Any) -> None:
    for name in ("value", "ok", "vring_base", "config", "inflight", "shmem_sizes"):
        try:
            getattr(reply, name)
        except ValueError:
            continue


def _expect_dead(ask: Callable[[], object]) -> None:
    try:
        ask()
    except ProtocolError:
        return
    raise AssertionError("a connection that failed goes on")


_PLAYS: tuple[tuple[float, Callable[[CodecFuzz, random.Random], None]], ...] = (
    (0.55, CodecFuzz.backend),
    (0.67, CodecFuzz.frontend),
    (0.73, CodecFuzz.back_channel),
    (0.77, CodecFuzz.back_channel_replies),
    (0.85, CodecFuzz.doorbell_host),
    (0.93, CodecFuzz.doorbell_vmm),
    (1.0, CodecFuzz.http),
)
