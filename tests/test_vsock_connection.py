"""Streams of the socket device as states and counters: packets, credit, half-close, nonsense."""

from __future__ import annotations

import random

import pytest
from hcd_protocols.virtio.vsock import CONFIG, HEADER_SIZE, HOST_CID, Header, Op, Shutdown, SocketType

from hcd.devices.vsock_connection import BOTH, Broken, Connection, State, reset_of

CID, GUEST, HOST = 3, 1024, 5000
ALLOC = 1000


def packet(op: int, size: int = 0, *, alloc: int = 4096, fwd: int = 0, flags: int = 0) -> Header:
    return Header(CID, HOST_CID, GUEST, HOST, size, SocketType.STREAM, op, flags, alloc, fwd)


def accepted(alloc: int = ALLOC) -> Connection:
    """What the guest asked for, and got."""
    connection = Connection(CID, GUEST, HOST, State.ACCEPTING, alloc)
    connection.learn_credit(packet(Op.REQUEST))
    assert connection.next_op() is Op.RESPONSE
    said = connection.header(Op.RESPONSE)
    assert (said.src_cid, said.dst_cid, said.src_port, said.dst_port) == (HOST_CID, CID, HOST, GUEST)
    assert (said.buf_alloc, said.type, said.len) == (alloc, SocketType.STREAM, 0)
    return connection


def test_header_and_configuration_space_are_those_of_the_specification() -> None:
    """44 bytes, little-endian (virtio 1.3, 5.10.6), written out by hand."""
    raw = bytes.fromhex(
        "0300000000000000 0200000000000000 00040000 88130000 05000000 0100 0500 00000000 00000400 07000000"
    )
    header = Header(3, 2, 1024, 5000, 5, 1, 5, 0, 0x40000, 7)
    assert HEADER_SIZE == len(raw) == 44
    assert header.to_bytes() == raw
    assert Header.from_bytes(raw + b"hello") == header
    assert CONFIG.pack(3) == b"\3" + bytes(7)
    with pytest.raises(ValueError, match="44 bytes at least, not 43"):
        Header.from_bytes(raw[:43])
    with pytest.raises(ValueError, match="socket packet"):
        Header(1 << 64, 2, 0, 0, 0, 1, 1).to_bytes()


def test_a_host_that_asks_is_answered_once() -> None:
    connection = Connection(CID, GUEST, HOST, State.ASKING, ALLOC)
    assert connection.next_op() is Op.REQUEST
    connection.header(Op.REQUEST)
    assert connection.next_op() is None
    assert not connection.may_send
    connection.receive(packet(Op.RESPONSE))
    assert connection.state is State.OPEN
    assert connection.may_send
    with pytest.raises(Broken, match="op 2 on an open connection"):
        connection.receive(packet(Op.RESPONSE))


@pytest.mark.parametrize("op", [Op.REQUEST, Op.RW, Op.SHUTDOWN, Op.CREDIT_UPDATE, Op.CREDIT_REQUEST, 0, 8, 65535])
def test_only_an_answer_answers(op: int) -> None:
    """Nothing else opens a connection, and an answer before the question does not either."""
    connection = Connection(CID, GUEST, HOST, State.ASKING, ALLOC)
    with pytest.raises(Broken):
        connection.receive(packet(Op.RESPONSE))
    connection.header(Op.REQUEST)
    with pytest.raises(Broken):
        connection.receive(packet(op))
    assert connection.state == State.ASKING
    connection.receive(packet(Op.RST))
    assert connection.state == State.GONE
    assert connection.next_op() is None


@pytest.mark.parametrize("op", [Op.REQUEST, Op.RESPONSE, Op.INVALID, 8, 65535])
def test_an_open_connection_takes_no_nonsense(op: int) -> None:
    with pytest.raises(Broken, match=f"op {op} on"):
        accepted().receive(packet(op))


# -- the guest's credit with hcd


def test_a_guest_has_the_credit_that_it_was_told_and_not_a_byte_more() -> None:
    connection = accepted()
    connection.receive(packet(Op.RW, ALLOC))
    with pytest.raises(Broken, match="1 bytes more than its credit"):
        connection.receive(packet(Op.RW, 1))
    connection.forwarded(400)
    connection.receive(packet(Op.RW, 400))
    with pytest.raises(Broken, match="more than its credit"):
        connection.receive(packet(Op.RW, 0xFFFFFFFF))


def test_an_update_is_owed_when_the_guest_may_wait_for_it() -> None:
    """Not for each byte; and not when nothing has changed."""
    connection = accepted()
    connection.receive(packet(Op.RW, 100))
    connection.forwarded(100)
    assert connection.next_op() is None
    connection.receive(packet(Op.RW, 900))
    assert connection.next_op() is None
    connection.forwarded(10)
    assert connection.next_op() is Op.CREDIT_UPDATE
    assert connection.header(Op.CREDIT_UPDATE).fwd_cnt == 110
    assert connection.next_op() is None
    connection.forwarded(890)
    assert connection.header(Op.RW, 1).fwd_cnt == ALLOC  # every packet tells
    assert connection.next_op() is None
    connection.receive(packet(Op.CREDIT_REQUEST))
    assert connection.next_op() is Op.CREDIT_UPDATE


@pytest.mark.parametrize("seed", range(20))
def test_a_guest_that_keeps_to_its_credit_is_never_stuck(seed: int) -> None:
    """Whatever it sends at a time, and however the host reads, over the wrap of the counters: a model guest."""
    rng = random.Random(seed)
    alloc = rng.choice([1, 2, 100, 4096])
    connection = accepted(alloc)
    start = connection._received = connection._forwarded = connection._told = 0xFFFFFFFF - rng.randrange(3 * alloc)
    sent, known = start, start
    for _ in range(2000):
        room = alloc - (sent - known)
        if room and rng.random() < 0.6:
            size = rng.randint(1, room)
            connection.receive(packet(Op.RW, size))
            sent += size
        elif connection.unforwarded and rng.random() < 0.6:
            connection.forwarded(rng.randint(1, connection.unforwarded))
        if connection.next_op() is Op.CREDIT_UPDATE:
            told = connection.header(Op.CREDIT_UPDATE).fwd_cnt
            known += (told - known) & 0xFFFFFFFF
        assert connection.unforwarded <= alloc
        if not connection.unforwarded:
            assert alloc - (sent - known) > 0  # all is read, so there must be credit
    assert sent > 0xFFFFFFFF


# -- hcd's credit with the guest


def test_hcd_sends_what_the_guest_has_room_for() -> None:
    connection = accepted()
    connection.receive(packet(Op.CREDIT_UPDATE, alloc=100))
    assert connection.credit == 100
    connection.header(Op.RW, 60)
    assert connection.credit == 40
    connection.header(Op.RW, 40)
    assert connection.credit == 0
    connection.out_of_credit()
    assert connection.next_op() is Op.CREDIT_REQUEST
    connection.header(Op.CREDIT_REQUEST)
    connection.out_of_credit()
    assert connection.next_op() is None  # asked once
    connection.receive(packet(Op.CREDIT_UPDATE, alloc=100, fwd=30))
    assert connection.credit == 30
    connection.header(Op.RW, 30)
    connection.out_of_credit()
    assert connection.next_op() is Op.CREDIT_REQUEST


@pytest.mark.parametrize(("alloc", "fwd"), [(100, 200), (100, 0xFFFFFF00), (0, 0), (50, 0)])
def test_a_guest_that_lies_about_its_room_gets_nothing(alloc: int, fwd: int) -> None:
    """More taken out than was sent, less room than before: no credit, and no harm."""
    connection = accepted()
    connection.receive(packet(Op.CREDIT_UPDATE, alloc=100))
    connection.header(Op.RW, 60)
    connection.receive(packet(Op.CREDIT_UPDATE, alloc=alloc, fwd=fwd))
    assert connection.credit == 0


# -- the end


def test_each_direction_ends_for_itself() -> None:
    connection = accepted()
    connection.receive(packet(Op.SHUTDOWN, flags=Shutdown.SEND))
    with pytest.raises(Broken, match="data after the guest said"):
        connection.receive(packet(Op.RW, 1))
    assert connection.may_send
    connection.shut(Shutdown.SEND)
    assert connection.next_op() is Op.SHUTDOWN
    assert connection.header(Op.SHUTDOWN).flags == Shutdown.SEND
    assert connection.next_op() is None
    connection.shut(Shutdown.RECEIVE)
    assert connection.header(Op.SHUTDOWN).flags == BOTH
    assert connection.next_op() is None
    connection.receive(packet(Op.SHUTDOWN, flags=Shutdown.RECEIVE | 0xF0))
    assert not connection.may_send
    assert connection.next_op() is Op.RST  # both promises are answered
    assert connection.header(Op.RST).op == Op.RST
    assert connection.state is State.GONE
    assert connection.next_op() is None


def test_an_abort_comes_before_everything_else() -> None:
    connection = Connection(CID, GUEST, HOST, State.ACCEPTING, ALLOC)
    connection.shut(BOTH)
    connection.abort()
    assert connection.next_op() is Op.RST


def test_the_answer_to_a_stranger_goes_back_where_it_came_from() -> None:
    stray = reset_of(Header(3, 99, 1, 2, 500, 77, Op.RW, 1, 2, 3))
    assert stray == Header(99, 3, 2, 1, 0, 77, Op.RST)
