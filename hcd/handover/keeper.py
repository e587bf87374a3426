"""Keeps the store and the state file of one session up to date, message by message."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from hcd_protocols.vhost_user import MemoryRegion, SavedSession, events

from hcd.dataplane.virtqueue import Inflight
from hcd.handover.fdstore import Entry, FdStore, StoreError
from hcd.handover.record import VERSION, InflightRecord, Record, RingRecord
from hcd.handover.statefile import StateFile

__all__ = ["Keeper"]

RegionKey = tuple[int, int, int]

#: one front end may use up this part of the store and no more: the others want to be kept too
SHARE = 2


@dataclass(slots=True)
class _Ring:
    """QEMU goes to and fro between two call eventfds as the guest masks interrupts: the last one stays in the store,
    or each time would be a message to the manager, and to wait for its answer."""

    kick: Entry | None = None
    call: Entry | None = None
    err: Entry | None = None
    last_call: Entry | None = None
    spurious: bool = False


@dataclass(slots=True)
class _Held:
    """The entries that a session uses now."""

    regions: dict[RegionKey, Entry] = field(default_factory=dict)
    rings: dict[int, _Ring] = field(default_factory=dict)
    channel: Entry | None = None
    inflight: Entry | None = None


class Keeper:
    """The store and the state file of one session of ``device``.

    In trio. The session's part: :attr:`busy` around each message; :meth:`take` with each event before it takes effect;
    :meth:`commit` when it has, before it is answered; :meth:`end` when the front end is gone, :meth:`leave` when it is
    to be served by the next process.
    """

    def __init__(self, store: FdStore, device: str, fingerprint: str, file: StateFile) -> None:
        self._store = store
        self._device = device
        self._fingerprint = fingerprint
        self._file = file
        self._own: list[Entry] = []  # the state file and the connection
        self._held = _Held()
        self._unwanted: list[Entry] = []  # named by what is written now, but not by what will be
        self._inflight: InflightRecord | None = None
        self._mtu: int | None = None
        self._config_writes: dict[int, bytes] = {}
        self._answer = (0, 0)
        self._written = b""

    # -- beginning

    @classmethod
    def begin(cls, store: FdStore, device: str, fingerprint: str, connection: int) -> Keeper:
        """For a new ``connection``. StoreError when it cannot be kept."""
        keeper = cls(store, device, fingerprint, StateFile.create(VERSION))
        try:
            keeper.busy = True  # nothing is written yet
            keeper._own.append(store.put(keeper._file.fd, device, "state"))
            keeper._own.append(store.put(connection, device, "connection", poll=True))
        except StoreError:
            keeper.end()
            raise
        return keeper

    @classmethod
    def resume(cls, store: FdStore, record: Record, file: StateFile, state: str) -> Keeper:
        """For the session that an earlier process wrote as ``record`` into ``file``, which is kept as ``state``."""
        keeper = cls(store, record.device, record.fingerprint, file)

        def use(name: str) -> Entry | None:
            return store.use(name) if name else None

        for name in (state, record.connection):
            if (entry := use(name)) is not None:
                keeper._own.append(entry)
        held = keeper._held
        for region, name in zip(record.session.regions, record.region_names, strict=True):
            if (entry := use(name)) is not None:
                held.regions[_key(region)] = entry
        for index, ring in enumerate(record.rings):
            held.rings[index] = _Ring(use(ring.kick), use(ring.call), use(ring.err), spurious=ring.spurious)
        held.channel = use(record.channel)
        if record.inflight is not None:
            held.inflight = use(record.inflight.name)
            keeper._inflight = record.inflight
        keeper._mtu, keeper._config_writes = record.mtu, dict(record.config_writes)
        keeper._answer = record.answer
        return keeper

    # -- around a message

    @property
    def busy(self) -> bool:
        return self._file.busy

    @busy.setter
    def busy(self, busy: bool) -> None:
        self._file.busy = busy

    def take(self, event: events.Event) -> None:
        """Store what ``event`` brings, while its descriptors are still there. StoreError."""
        match event:
            case events.SetMemTable(regions=regions, fds=fds):
                self._set_regions(zip(regions, fds, strict=True))
            case events.AddMemReg(region=region, fd=fd):
                self._held.regions[_key(region)] = self._put(fd, "memory")
            case events.RemMemReg(region=region):
                self._release(self._held.regions.pop(_key(region), None))
            case events.SetVringKick() | events.SetVringCall() | events.SetVringErr():
                self._set_ring_fd(event)
            case events.SetBackendReqFd(fd=fd):
                self._release(self._held.channel)
                self._held.channel = self._put(fd, "back-channel")
            case events.SetInflightFd(fd=fd, mmap_size=size, mmap_offset=offset):
                self._set_inflight(fd, size, offset, event.num_queues, event.queue_size, own=False)
            case events.ResetDevice() | events.ResetOwner():
                self._mtu = None  # as Device.disconnect has it
            case _:
                pass

    def accepted(self, event: events.Event) -> None:
        """The device took what the driver or the front end told it: the next process tells its own device."""
        if isinstance(event, events.SetConfig):
            self._config_writes[event.offset] = event.data
        elif isinstance(event, events.NetSetMtu):
            self._mtu = event.mtu

    def set_spurious(self, index: int, spurious: bool) -> None:
        """Whether the value of the kick eventfd of ring ``index`` counts a ring that nobody rang."""
        self._ring(index).spurious = spurious

    def take_own_inflight(self, area: Inflight) -> None:
        """hcd records the requests in flight by itself, for as long as the front end gives it no region. StoreError."""
        self._set_inflight(area.fd, area.size, area.offset, area.num_queues, area.queue_size, own=True)

    async def commit(self, session: SavedSession, config: bytes, answer: bytes = b"") -> None:
        """The session is this now, and ``answer`` is due to the front end. StoreError if that could not be kept."""
        await self._store.settle()
        self._forget_kicks(session)
        if answer:
            self._answer = self._file.stage(answer), len(answer)
        data = self._record(session, config).encode()
        if data != self._written:
            self._file.write(data)
            self._written = data
        for entry in self._unwanted:
            self._store.drop(entry)
        self._unwanted.clear()

    def unsent(self) -> tuple[int, int]:
        """The descriptor from which sendfile(2) takes the rest of the answer that is due, and its bytes."""
        at, length = self._answer
        return self._file.fd, max(0, length - self._file.sent_since(at))

    # -- end

    def end(self) -> None:
        """Nothing of the session is to be kept."""
        for entry in self._entries():
            self._store.drop(entry)
        self._own, self._unwanted, self._held = [], [], _Held()
        self._file.close()

    def leave(self) -> None:
        """The next process goes on with the session: everything stays where it is."""
        self._file.close()

    # -- inside

    def _put(self, fd: int, role: str) -> Entry:
        limit = self._store.limit
        if limit is not None and self._count() >= limit // SHARE:
            raise StoreError(f"it uses {limit // SHARE} descriptors, which is as many as one session may")
        return self._store.put(fd, self._device, role)

    def _count(self) -> int:
        return sum(1 for _ in self._entries())

    def _entries(self) -> Iterator[Entry]:
        """Everything that the session uses, as often as it uses it."""
        held = self._held
        found: list[Entry | None] = [*self._own, *self._unwanted, *held.regions.values(), held.channel, held.inflight]
        for ring in held.rings.values():
            found += [ring.kick, ring.call, ring.err, ring.last_call]
        return (entry for entry in found if entry is not None)

    def _release(self, entry: Entry | None) -> None:
        """Drop ``entry`` once the state that names it has been replaced."""
        if entry is not None:
            self._unwanted.append(entry)

    def _ring(self, index: int) -> _Ring:
        return self._held.rings.setdefault(index, _Ring())

    def _set_regions(self, table: Iterable[tuple[MemoryRegion, int]]) -> None:
        for entry in self._held.regions.values():
            self._release(entry)
        self._held.regions = {}
        for region, fd in table:
            self._held.regions[_key(region)] = self._put(fd, "memory")

    def _set_ring_fd(self, event: events.SetVringKick | events.SetVringCall | events.SetVringErr) -> None:
        ring, index = self._ring(event.index), event.index
        match event:
            case events.SetVringKick(fd=fd):
                self._release(ring.kick)
                ring.kick = None if fd is None else self._put(fd, f"kick{index}")
            case events.SetVringCall(fd=fd):
                self._release(ring.last_call)
                ring.last_call = ring.call
                ring.call = None if fd is None else self._put(fd, f"call{index}")
            case events.SetVringErr(fd=fd):
                self._release(ring.err)
                ring.err = None if fd is None else self._put(fd, f"err{index}")

    def _set_inflight(
        self, fd: int, mmap_size: int, mmap_offset: int, num_queues: int, queue_size: int, *, own: bool
    ) -> None:
        self._release(self._held.inflight)
        entry = self._held.inflight = self._put(fd, "inflight")
        self._inflight = InflightRecord(entry.name, mmap_size, mmap_offset, num_queues, queue_size, own)

    def _forget_kicks(self, session: SavedSession) -> None:
        """A ring that was stopped has no kick any more."""
        for index, saved in enumerate(session.vrings):
            ring = self._held.rings.get(index)
            if ring is not None and ring.kick is not None and not saved.kicked:
                self._release(ring.kick)
                ring.kick, ring.spurious = None, False

    def _record(self, session: SavedSession, config: bytes) -> Record:
        held = self._held
        return Record(
            device=self._device,
            fingerprint=self._fingerprint,
            session=session,
            connection=self._own[1].name,
            region_names=tuple(held.regions[_key(region)].name for region in session.regions),
            rings=tuple(self._ring_record(index) for index in range(len(session.vrings))),
            channel=_name(held.channel),
            inflight=self._inflight,
            mtu=self._mtu,
            config_writes=self._config_writes,
            config=config,
            answer=self._answer,
        )

    def _ring_record(self, index: int) -> RingRecord:
        ring = self._ring(index)
        return RingRecord(_name(ring.kick), _name(ring.call), _name(ring.err), ring.spurious)


def _key(region: MemoryRegion) -> RegionKey:
    return region.guest_addr, region.size, region.user_addr


def _name(entry: Entry | None) -> str:
    return entry.name if entry is not None else ""
