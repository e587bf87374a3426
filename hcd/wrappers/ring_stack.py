"""The wrappers of one doorbell device: the way of its rings from the doorbell to the handler.

Theory of operation. Without wrappers the handler of each doorbell is the device's own, and the only cost is one
comparison an interrupt. With some, the handler is here. A batch of rings is shown to one wrapper after the other, and
each may have it wait: a plain device is called by a timer then, an async one's handler sleeps. What is rung meanwhile
comes after it, as one batch: a guest rings as often as it likes, and must not fill hcd's memory with that. When the VMM
has gone nothing waits any more: the device hears of what was rung before it is disconnected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import trio

from hcd.dataplane.bell import Bell, Interrupt
from hcd.device import DoorbellDevice, Handle
from hcd.errors import contained
from hcd.wrappers.base import Log, StackBase, Timers, WrapSpec
from hcd.wrappers.rings import LOST, Batch, InjectedFault, RingWrapper

__all__ = ["RingStack"]


class RingStack(StackBase[RingWrapper]):
    def __init__(self, specs: Sequence[WrapSpec], device: DoorbellDevice, lane: Timers, log: Log) -> None:
        super().__init__(RingWrapper, specs, device, lane, log)
        self._device = device
        self._bells: dict[str, tuple[Bell, int | None]] = {}  # those that are served, and their values
        self._lines: list[Interrupt] = []
        self._waiting: dict[Batch, Handle] = {}
        self._hurry = False

    # -- what is seen

    def attach(self, bell: Bell, value: int | None) -> None:
        """Be what handles ``bell``; ``value``: its datamatch."""
        self._bells[bell.name] = bell, value
        bell.handler = self._handler

    def detach(self, bell: Bell) -> None:
        """``bell`` is served no more. The device does not hear of rings that wait."""
        if self._serves(bell):
            self.withdraw(bell.name)

    def withdraw(self, name: str) -> None:
        """The device has this doorbell no longer; its VMM may not know that yet."""
        if (found := self._bells.pop(name, None)) is not None:
            self.ignore(found[0])

    def ignore(self, bell: Bell) -> None:
        """Let rings of ``bell`` be counted, and nothing else."""
        bell.handler = _nothing_async if self._device.is_async() else _nothing

    def _serves(self, bell: Bell) -> bool:
        return self._bells.get(bell.name, (None,))[0] is bell

    def watch(self, line: Interrupt) -> None:
        """See what becomes of an interrupt."""
        self._lines.append(line)
        line.on_signal = self._interrupted if self._wrappers else None

    def add(self, wrapper: RingWrapper) -> None:
        super().add(wrapper)
        self._wire()

    def remove(self, wrapper: RingWrapper) -> None:
        super().remove(wrapper)
        self._wire()

    @property
    def _handler(self) -> Callable[[Bell, int], Any]:
        if not self._wrappers:
            return self._device.ring
        return self._ring_async if self._device.is_async() else self._ring

    def _wire(self) -> None:
        for bell, _ in self._bells.values():
            bell.handler = self._handler
        for line in self._lines:
            line.on_signal = self._interrupted if self._wrappers else None

    # -- a connection

    def begin(self) -> None:
        """A VMM is attached."""
        self._hurry = False

    def end(self) -> None:
        """The VMM is gone: hand over now what waits, and what still comes."""
        self._hurry = True
        for batch in list(self._waiting):
            self._waiting.pop(batch).cancel()
            if not self._device.is_async():
                self._go_on(batch)

    # -- the way of a batch

    def _ring(self, bell: Bell, count: int) -> None:
        if (waits := next((one for one in self._waiting if one.bell is bell), None)) is not None:
            waits.more += count
        else:
            self._pass(self._batch(bell, count))

    def _pass(self, batch: Batch) -> None:
        try:
            while delay := self._show(batch):
                if not self._hurry:
                    self._waiting[batch] = self._lane.call_later(delay, partial(self._waited, batch))
                    return
            if not batch.lost:
                self._device.ring(batch.bell, batch.count)
        except BaseException as error:
            self._tell_end(batch, error)
            raise
        self._tell_end(batch, None)

    def _waited(self, batch: Batch) -> None:
        if self._waiting.pop(batch, None) is not None:
            self._go_on(batch)

    def _go_on(self, batch: Batch) -> None:
        """Outside of the handler: what is raised goes where the handler's goes."""
        try:
            self._pass(batch)
        except BaseException as error:
            assert batch.bell.on_error is not None
            batch.bell.on_error(batch.bell, contained(error))
        if batch.more and batch not in self._waiting and self._serves(batch.bell):
            self._go_on(self._batch(batch.bell, batch.more))

    async def _ring_async(self, bell: Bell, count: int) -> None:
        batch = self._batch(bell, count)
        try:
            while delay := self._show(batch):
                if not self._hurry:
                    await self._wait(batch, delay)
            if not batch.lost:
                await self._device.ring(bell, count)
        except BaseException as error:  # also when it is cancelled
            self._tell_end(batch, error)
            raise
        self._tell_end(batch, None)

    async def _wait(self, batch: Batch, delay: float) -> None:
        try:
            with trio.move_on_after(delay) as self._waiting[batch]:
                await trio.sleep_forever()
        finally:
            self._waiting.pop(batch, None)

    # -- wrappers

    def _batch(self, bell: Bell, count: int) -> Batch:
        return Batch(bell, count, self._bells[bell.name][1], self._wrappers)

    def _show(self, batch: Batch) -> float:
        """Show ``batch`` to the wrappers that have not seen it; for how long (seconds) it has to wait now."""
        batch.lost = batch.lost or not self._serves(batch.bell)
        while batch.seen < len(batch.wrappers) and not batch.lost:
            wrapper = batch.wrappers[batch.seen]
            batch.seen += 1
            try:
                delay = wrapper.rung(batch)
            except InjectedFault:
                raise
            except Exception:  # a wrapper must not be worse than the faults that it makes
                self._log.exception("a wrapper failed")
                continue
            batch.lost = delay == LOST
            if delay and not batch.lost:
                return delay
        return 0.0

    def _tell_end(self, batch: Batch, error: BaseException | None) -> None:
        for wrapper in batch.wrappers[: batch.seen][::-1]:
            try:
                wrapper.handled(batch, error)
            except Exception:
                self._log.exception("a wrapper failed")

    def _interrupted(self, line: Interrupt, answers: Bell | None, outcome: str) -> None:
        for wrapper in self._wrappers[::-1]:
            try:
                wrapper.interrupted(line.name, answers, outcome)
            except Exception:
                self._log.exception("a wrapper failed")


def _nothing(bell: Bell, count: int) -> None:
    pass


async def _nothing_async(bell: Bell, count: int) -> None:
    pass
