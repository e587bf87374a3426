"""The part of a session that keeps it for the next process: what is done around each of its messages."""

from __future__ import annotations

from collections.abc import Callable

from hcd_protocols.vhost_user import BackendConnection, events

from hcd.backend import Backend
from hcd.dataplane.virtqueue import Inflight
from hcd.errors import ProtocolError
from hcd.handover.fdstore import StoreError
from hcd.handover.keeper import Keeper
from hcd.handover.record import fingerprint
from hcd.host import DeviceHost, LeavingSession
from hcd.transports.message_socket import Answers, MessageSocket

__all__ = ["Keeping"]


class Keeping:
    """Keeps one session up to date, for as long as that works: from then on every method does nothing.

    ``config`` is the configuration space as the front end read it last.
    """

    def __init__(
        self, host: DeviceHost, connection: BackendConnection, link: MessageSocket, keeper: Keeper | None, config: bytes
    ) -> None:
        self.config = config
        self._host = host
        self._connection = connection
        self._link = link
        self._keeper = keeper

    async def begin(self, session: LeavingSession, backend: Backend) -> None:
        """``session`` has begun: keep it from now on, if there is somebody who does."""
        host = self._host
        if host.store is None or not host.store.usable:
            return
        try:
            self._keeper = Keeper.begin(host.store, host.spec.name, fingerprint(host.spec), self._link.fileno())
            area = Inflight.create(host.device.num_queues, host.device.max_queue_size)
            await host.lane.run(lambda: backend.set_inflight(area, own=True))
            self._keeper.take_own_inflight(area)
        except (StoreError, ProtocolError, OSError) as error:
            self._give_up(error)
            return
        host.kept = session
        await self.commit()
        self._idle()

    def message_comes(self) -> None:
        """To be called before anything of a message is taken off the socket. Dying from here on ends the session."""
        if self._keeper is not None:
            self._keeper.busy = True

    def take(self, event: events.Event) -> None:
        """Keep what ``event`` brings, before it takes effect."""
        self._try(lambda keeper: keeper.take(event))

    def accepted(self, event: events.Event) -> None:
        """The device took what the driver or the front end told it."""
        self._try(lambda keeper: keeper.accepted(event))

    def set_spurious(self, index: int, spurious: bool) -> None:
        """Whether the value of the kick eventfd of ring ``index`` counts a ring that nobody rang."""
        self._try(lambda keeper: keeper.set_spurious(index, spurious))

    async def answer(self, answers: Answers) -> None:
        """Keep what the session is now, then answer. Dying between the two leaves the answer to the next process."""
        if any(fds for _, fds in answers):  # but an answer with descriptors cannot be left to it
            await self.commit()
            await self._link.send(answers)
            answers = ()
        else:
            await self.commit(b"".join(data for data, _ in answers))
        if self._keeper is None:
            await self._link.send(answers)
        else:
            self._idle()
            await self._link.send_file(*self._keeper.unsent(), answers)

    async def catch_up(self) -> None:
        """Send what the process before this one did not get round to."""
        await self.commit()
        if self._keeper is not None:
            await self._link.send_file(*self._keeper.unsent())

    async def commit(self, answer: bytes = b"") -> None:
        """The next process would go on from here."""
        if self._keeper is not None and not self._connection.failed:
            try:
                await self._keeper.commit(self._connection.save(), self.config, answer)
            except StoreError as error:
                self._give_up(error)

    def stop(self, *, leave: bool) -> None:
        """``leave``: the next process goes on with the session. It does not if this one was in a message."""
        self._host.kept = None
        if self._keeper is not None:
            if leave:
                self._keeper.leave()
            else:
                self._keeper.end()
            self._keeper = None

    def _idle(self) -> None:
        if self._keeper is not None:
            self._keeper.busy = False

    def _try(self, action: Callable[[Keeper], None]) -> None:
        if self._keeper is not None:
            try:
                action(self._keeper)
            except StoreError as error:
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._host.rare_log.warning("not kept", "a restart of hcd will end this connection: %s", error)
        self.stop(leave=False)
