"""What a handover is made of: which descriptors are one file, the state file, what is written into it."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hcd_protocols.vhost_user import BackendConnection, MemoryRegion, SavedSession, SavedVring
from manager import same_file

from hcd.handover.fdstore import identity
from hcd.handover.record import InflightRecord, Record, RingRecord
from hcd.handover.statefile import ANSWER, SLOT, StateError, StateFile

VERSION = 7
#: in the file: where slots begin, and the head of one (sequence, length, checksum)
SLOTS_AT, HEAD = 64, struct.Struct("=QII")

RINGS = (
    SavedVring(num=128, base=5, addr=(0, 1 << 40, 2 << 40, 3 << 40, 0), kicked=True, enabled=True, big_endian=False),
    SavedVring(num=0, base=0, addr=None, kicked=False, enabled=False, big_endian=False),
)
SESSION = SavedSession(
    features=1 << 32 | 1 << 30,
    protocol_features=1 << 3,
    status=15,
    negotiating=True,
    vrings=RINGS,
    regions=(MemoryRegion(0, 1 << 20, 1 << 40, 0), MemoryRegion(1 << 32, (1 << 63) - 1, (1 << 64) - 4096, 4096)),
)
RECORD = Record(
    device="disk:0",
    fingerprint="x",
    session=SESSION,
    connection="hcd/2/disk_0/connection",
    region_names=("hcd/3/disk_0/memory", "hcd/3/disk_0/memory"),
    rings=(RingRecord("k", "c", "", True), RingRecord()),
    inflight=InflightRecord("i", 4096, 0, 2, 128, True),
    mtu=1400,
    config_writes={32: b"\0"},
    config=bytes(60),
    answer=(70000, 20),
)


@pytest.fixture
def state() -> Iterator[StateFile]:
    made = StateFile.create(VERSION)
    yield made
    made.close()


def again(state: StateFile) -> StateFile:
    """The file as the next process opens it."""
    return StateFile.open(os.dup(state.fd), VERSION)


# -- one file or two

def test_descriptors_of_one_open_file_are_one_and_others_are_not(tmp_path: Path) -> None:
    """Whatever systemd takes for one (kcmp) must be one; two that are one must be as good as each other."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    with ExitStack() as stack:
        pair = socket.socketpair()
        made = [
            os.eventfd(0), os.eventfd(0), os.memfd_create("a"), os.memfd_create("a"), *os.pipe(),
            pair[0].detach(), pair[1].detach(), os.open(path, os.O_RDONLY), os.open(path, os.O_RDWR),
        ]
        made += [os.dup(fd) for fd in made]
        for fd in made:
            stack.callback(os.close, fd)
        for one in made:
            for other in made:
                assert (identity(one) == identity(other)) == same_file(one, other)


# -- the state file

def test_the_last_state_is_read(state: StateFile) -> None:
    for number in range(5):
        state.write(b"state %d" % number * 100)
        with_next = again(state)
        assert with_next.read() == b"state %d" % number * 100
        with_next.close()


@pytest.mark.parametrize("cut", ["head", "data", "all"])
def test_a_write_that_was_cut_off_leaves_the_state_before_it(state: StateFile, cut: str) -> None:
    state.write(b"before")
    state.write(b"afterwards")  # sequence 2, so into the first slot
    where = {"head": (0, HEAD.pack(0, 0, 0)), "data": (HEAD.size + 3, b"?"), "all": (0, bytes(64))}[cut]
    os.pwrite(state.fd, where[1], SLOTS_AT + where[0])
    found = again(state)
    assert found.read() == b"before"
    found.write(b"the next one")
    assert found.read() == b"the next one"
    found.close()


def test_nothing_written_and_other_files_are_told(state: StateFile) -> None:
    found = again(state)
    with pytest.raises(StateError, match="nothing whole"):
        found.read()
    found.close()
    fd = os.memfd_create("other")
    try:
        with pytest.raises(StateError, match="no state file"):
            StateFile.open(fd, VERSION)
        with pytest.raises(StateError, match="version is 7"):
            StateFile.open(state.fd, VERSION + 1)
    finally:
        os.close(fd)


def test_what_does_not_fit_changes_nothing(state: StateFile) -> None:
    state.write(b"before")
    with pytest.raises(ValueError, match="fit"):
        state.write(bytes(SLOT))
    with pytest.raises(ValueError, match="an answer of"):
        state.stage(bytes(ANSWER + 1))
    assert state.read() == b"before"


def test_the_mark_of_a_message_is_seen_by_the_next_process(state: StateFile) -> None:
    for busy in (True, False):
        state.busy = busy
        found = again(state)
        assert found.busy is busy
        found.close()


def test_how_much_of_an_answer_went_out_is_seen_by_the_next_process(state: StateFile) -> None:
    """Sent in two parts by two processes; the next answer has a place of its own."""
    one, other = socket.socketpair()
    with one, other:
        for answer in (b"first answer", b"second"):
            at = state.stage(answer)
            assert state.sent_since(at) == 0
            os.sendfile(one.fileno(), state.fd, None, 4)
            found = again(state)
            assert found.sent_since(at) == 4
            os.sendfile(one.fileno(), found.fd, None, len(answer) - 4)
            assert state.sent_since(at) == len(answer)
            found.close()
            assert other.recv(100) == answer


# -- the record

def test_a_record_comes_back_as_it_was_written() -> None:
    assert Record.decode(RECORD.encode()) == RECORD
    assert RECORD.names == {"hcd/2/disk_0/connection", "hcd/3/disk_0/memory", "k", "c", "i"}


@pytest.mark.parametrize(
    "damage",
    [
        (b"{", b"["), (b'"status":15', b'"status":-1'), (b'"status":15', b'"status":"15"'), (b'"num":128,', b""),
        (b'"rings":[', b'"rings":[{},'), (b'"mtu"', b'"mtv"'), (b'"regions":[', b'"regions":[5,'),
    ],
)
def test_a_damaged_record_is_told(damage: tuple[bytes, bytes]) -> None:
    assert damage[0] in RECORD.encode()
    with pytest.raises(StateError, match="makes no sense"):
        Record.decode(RECORD.encode().replace(*damage, 1))


# -- the connection

def connection(
    *, features: int = 1 << 32 | 1 << 30, protocol: int = 1 << 3, queues: int = 2, size: int = 256
) -> BackendConnection:
    return BackendConnection(features=features, protocol_features=protocol, num_queues=queues, max_queue_size=size)


def test_a_connection_goes_on_as_another_was_saved() -> None:
    made = connection()
    made.restore(SESSION)
    assert made.save() == SESSION
    assert made.vrings[0].started
    assert not made.vrings[1].started


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (connection(features=1 << 30), "features 0x100000000 were agreed on"),
        (connection(protocol=0), "protocol features 0x8 were agreed on"),
        (connection(queues=1), "has 2 queues, the device has 1"),
        (connection(size=64), "128 entries"),
    ],
    ids=["features", "protocol features", "queues", "queue size"],
)
def test_a_connection_that_offers_less_does_not_go_on(other: BackendConnection, why: str) -> None:
    fresh = other.save()
    with pytest.raises(ValueError, match=why):
        other.restore(SESSION)
    assert other.save() == fresh
