"""hcd.kvm on the real /dev/kvm: doorbells, interrupts, a run loop that cannot hang, and the VMM's side of a table."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import skip_or_fail
from hcd_protocols import kvm as abi
from hcd_protocols.doorbell import (
    MAX_MESSAGE,
    Answers,
    Attach,
    Capability,
    DoorbellItem,
    HostConnection,
    InterruptItem,
    MemoryItem,
    Outcome,
    Place,
)
from hcd_protocols.kvm import Cap, Exit, Ioctl

from hcd.errors import HcdError
from hcd.kvm.attach import AttachError, Attachment, capabilities
from hcd.kvm.errors import KvmError, meaning
from hcd.kvm.vm import IrqchipRoute, Kvm, Vm
from hcd.lab import code
from hcd.lab.machine import Machine, Ring
from hcd.lab.vmm import hypercall_instruction

PORT, ADDRESS = 0x510, 0xD0000000


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        skip_or_fail("no usable /dev/kvm")
    with Kvm() as opened:
        yield opened


@pytest.fixture
def vm(kvm: Kvm, no_leaks: None) -> Iterator[Vm]:
    with kvm.create_vm() as made:
        yield made


@pytest.fixture
def machine(kvm: Kvm, no_leaks: None) -> Iterator[Machine]:
    with Machine(kvm, hypercall=hypercall_instruction()) as made:
        yield made


@pytest.fixture
def eventfd() -> Iterator[Callable[[], int]]:
    made: list[int] = []

    def make() -> int:
        made.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        return made[-1]

    yield make
    for fd in made:
        os.close(fd)


def rings(fd: int) -> int:
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


# -- without KVM


def test_no_kvm_is_an_error_that_says_so() -> None:
    """The operator learns what is missing."""
    with pytest.raises(HcdError, match=r"cannot open /nonexistent/kvm: .*this kernel has no KVM"):
        Kvm("/nonexistent/kvm")


def test_an_errno_means_something_at_its_ioctl() -> None:
    """The same number is another problem elsewhere, and an unknown one keeps the system's words."""
    assert "another doorbell" in meaning(Ioctl.IOEVENTFD, errno.EEXIST)
    assert "vCPU" in meaning(Ioctl.CREATE_VCPU, errno.EEXIST)
    assert meaning(Ioctl.IRQFD, errno.EOVERFLOW) == os.strerror(errno.EOVERFLOW)
    error = KvmError(Ioctl.IRQFD, errno.EBUSY, 'interrupt "rx" (GSI 24)')
    assert str(error).startswith('KVM_IRQFD for interrupt "rx" (GSI 24): EBUSY: the eventfd raises another')


# -- doorbells


@pytest.mark.parametrize(
    ("ring", "width", "datamatch", "pio"),
    [
        (code.write_port(PORT, 7, 4), 4, None, True),
        (code.write_port(PORT, 7, 2), 2, 7, True),
        (code.write_port(PORT, 9, 1), 0, None, True),
        (code.write_memory(ADDRESS, 7, 4), 4, None, False),
        (code.write_memory(ADDRESS, 5, 2), 2, 5, False),
        (code.write_memory(ADDRESS, 1, 1), 0, None, False),
    ],
    ids=["pio", "pio datamatch", "pio any", "mmio", "mmio datamatch", "mmio any"],
)
def test_every_ring_is_counted(
    machine: Machine,
    eventfd: Callable[[], int],
    ring: bytes,
    width: int,
    datamatch: int | None,
    pio: bool,
) -> None:
    """The eventfd's value is the number of the guest's writes, without an exit to us."""
    fd = eventfd()
    address = PORT if pio else ADDRESS
    bell = machine.vm.ioeventfd(fd, address, pio=pio, width=width, datamatch=datamatch, name="bell")
    result = machine.run_exits(Ring(ring), 3000, 20)
    assert (result.why, len(result.ticks), rings(fd)) == ("", 3000, 3000)
    bell.close()
    result = machine.run_exits(Ring(ring), 3, 20)
    assert rings(fd) == 0
    assert f"{address:#x}" in result.why


def test_a_datamatch_tells_values_apart(machine: Machine, eventfd: Callable[[], int]) -> None:
    """Two doorbells at one address; a third value belongs to neither and comes to the VMM."""
    five, six = eventfd(), eventfd()
    machine.vm.ioeventfd(five, ADDRESS, pio=False, width=4, datamatch=5)
    machine.vm.ioeventfd(six, ADDRESS, pio=False, width=4, datamatch=6)
    machine.run_exits(Ring(code.write_memory(ADDRESS, 5, 4)), 10, 20)
    machine.run_exits(Ring(code.write_memory(ADDRESS, 6, 4)), 20, 20)
    assert (rings(five), rings(six)) == (10, 20)
    assert "write at 0xd0000000, 4 bytes" in machine.run_exits(Ring(code.write_memory(ADDRESS, 7, 4)), 1, 20).why


def test_writes_that_the_vmm_answers(machine: Machine, eventfd: Callable[[], int]) -> None:
    """The comparison's loop takes ports and memory, and stops at the guest's end."""
    for ring in (code.write_port(PORT, 1, 4), code.write_memory(ADDRESS, 1, 4)):
        result = machine.run_exits(Ring(ring, answered_here=True), 500, 20)
        assert (result.why, len(result.ticks)) == ("", 500)


@pytest.mark.parametrize(
    ("second", "code_", "words"),
    [
        ({"width": 4}, errno.EEXIST, r"doorbell \"second\" \(port 0x510, 4 bytes\): EEXIST: another doorbell"),
        ({"width": 0, "datamatch": 1}, errno.EINVAL, "any width, value 0x1.*cannot have a datamatch"),
        ({"width": 3}, errno.EINVAL, "3 bytes.*0 .any., 1, 2, 4 or 8"),
    ],
)
def test_refused_doorbells(
    vm: Vm, eventfd: Callable[[], int], second: dict[str, int], code_: int, words: str
) -> None:
    """The error names the ioctl, the doorbell and what the errno means here."""
    vm.ioeventfd(eventfd(), PORT, pio=True, width=4, name="first")
    with pytest.raises(KvmError, match=f"KVM_IOEVENTFD for .*{words}") as caught:
        vm.ioeventfd(eventfd(), PORT, pio=True, name="second", **second)
    assert caught.value.errno == code_


def test_another_process_cannot_register(vm: Vm, eventfd: Callable[[], int]) -> None:
    """A child with the same descriptors gets EIO: why hcd hands out eventfds instead."""
    fd = eventfd()
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            try:
                vm.ioeventfd(fd, PORT, pio=True)
            except KvmError as exc:
                status = 0 if exc.errno == errno.EIO and "another process" in str(exc) else 2
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_hyperv_doorbells_or_why_not(kvm: Kvm, vm: Vm, eventfd: Callable[[], int]) -> None:
    """Where the kernel has them they can be made and undone; elsewhere the error says what is missing."""
    fd = eventfd()
    if kvm.check_extension(Cap.HYPERV_EVENTFD):
        bell = vm.hyperv_eventfd(fd, 5, name="event")
        with pytest.raises(KvmError, match="another doorbell has this connection id"):
            vm.hyperv_eventfd(fd, 5)
        bell.close()
        bell.close()
    else:
        with pytest.raises(KvmError, match=r'KVM_HYPERV_EVENTFD for doorbell "event" \(Hyper-V connection 0x5\)'):
            vm.hyperv_eventfd(fd, 5, name="event")


# -- interrupts


def test_an_interrupt_reaches_the_guest(machine: Machine, eventfd: Callable[[], int]) -> None:
    """Ring, answer by irqfd, and the guest's handler runs, as often as it rang."""
    bell, line = eventfd(), eventfd()
    os.set_blocking(bell, True)
    machine.vm.ioeventfd(bell, PORT, pio=True, width=4)
    gsi = machine.vm.free_gsi()
    machine.vm.route({gsi: machine.route})
    irq = machine.vm.irqfd(line, gsi, name="answer")

    def answer() -> None:
        seen = 0
        while seen < 500:
            seen += os.eventfd_read(bell)
            os.eventfd_write(line, 1)

    thread = threading.Thread(target=answer)
    thread.start()
    result = machine.run_trips(Ring(code.write_port(PORT, 7, 4)), 500, 30, stamp=0x7000)
    thread.join()
    assert (result.why, len(result.ticks)) == ("", 500)
    assert machine.memory.read(0x7000, 8) != bytes(8)
    irq.close()
    assert "does not return" in machine.run_trips(Ring(code.write_port(PORT, 7, 4)), 1, 0.2).why


def test_an_eventfd_raises_one_interrupt(machine: Machine, eventfd: Callable[[], int]) -> None:
    """KVM's rule; the error says it."""
    line = eventfd()
    machine.vm.irqfd(line, 5)
    with pytest.raises(KvmError, match=r'interrupt "b" \(GSI 6\): EBUSY: the eventfd raises another interrupt'):
        machine.vm.irqfd(line, 6, name="b")


def test_irqfd_needs_an_interrupt_controller(vm: Vm, eventfd: Callable[[], int]) -> None:
    """Without one in the kernel the error says so."""
    with pytest.raises(KvmError, match=r"no interrupt controller|not ready"):
        vm.irqfd(eventfd(), 5)


def test_routes_can_go_and_come(machine: Machine) -> None:
    """A GSI is free again when its route is gone, and pins can be routed anew."""
    gsi = machine.vm.free_gsi()
    machine.vm.route({gsi: machine.route})
    assert machine.vm.free_gsi() == gsi + 1
    machine.vm.route({gsi: None, 4: IrqchipRoute(2, 4)})
    assert machine.vm.free_gsi() == gsi


# -- the run loop


def test_a_guest_that_spins_is_stopped(machine: Machine) -> None:
    """Its deadline ends the run; the same vCPU runs the next program."""
    forever = Ring(code.set_memory(0x7000, 0) + code.spin_while_zero(0x7000))
    assert "does not return" in machine.run_exits(forever, 1, 0.2).why
    assert machine.run_exits(Ring(b""), 10, 20).why == ""


def test_the_null_hypercall_returns_or_is_stopped(machine: Machine) -> None:
    """A hypervisor that does not know the instruction must not hang us."""
    result = machine.run_exits(machine.null_hypercall(), 100, 0.5)
    if result.why:
        assert "does not return" in result.why or "shut down" in result.why
    else:
        assert (len(result.ticks), result.status) == (100, 0)
    assert machine.run_exits(Ring(b""), 10, 20).why == ""


def test_a_kick_that_is_not_the_deadline_is_no_end(machine: Machine) -> None:
    """Kicks of others, and signals of the process, interrupt KVM_RUN; the guest goes on."""
    stop = threading.Event()
    hits: list[int] = []
    old = signal.signal(signal.SIGUSR1, lambda *_: hits.append(1))

    def disturb() -> None:
        while not stop.is_set():
            machine.vcpu.kick()
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        result = machine.run_exits(Ring(code.write_port(PORT, 1, 4), answered_here=True), 3000, 60)
    finally:
        stop.set()
        thread.join()
        signal.signal(signal.SIGUSR1, old)
    assert (result.why, len(result.ticks)) == ("", 3000)
    assert hits


def test_the_kick_signal_is_left_as_it_was(machine: Machine) -> None:
    """The signal mask of the thread is its owner's."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    machine.run_exits(Ring(code.set_memory(0x7000, 0) + code.spin_while_zero(0x7000)), 1, 0.1)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_runs_off_the_main_thread(machine: Machine) -> None:
    """No signal handler is needed, so any thread can run a vCPU and is stopped."""
    why: list[str] = []
    forever = Ring(code.set_memory(0x7000, 0) + code.spin_while_zero(0x7000))
    thread = threading.Thread(target=lambda: why.append(machine.run_exits(forever, 1, 0.2).why))
    thread.start()
    thread.join()
    assert "does not return" in why[0]


def test_registers_and_msrs(machine: Machine) -> None:
    """What is set is read back; an MSR that nobody knows is reported."""
    machine.vcpu.regs = abi.Regs(rip=0x1000, rbx=0x1234, rflags=2)
    assert machine.vcpu.regs.rbx == 0x1234
    assert machine.vcpu.set_msrs({0x10: 0}) == []
    lenient = Path("/sys/module/kvm/parameters/ignore_msrs")
    ignored = lenient.exists() and lenient.read_text().strip() == "Y"
    assert machine.vcpu.set_msrs({0x10: 0, 0xDEADBEEF: 1}) == ([] if ignored else [0xDEADBEEF])


def test_an_instruction_that_faults_ends_the_run(machine: Machine) -> None:
    """UD2 with no handler for it: a shutdown, or an emulator that gives up; words for both."""
    result = machine.run_exits(Ring(b"\x0f\x0b"), 1, 5)
    assert result.why
    assert not result.ticks


def test_memory_of_the_guest(vm: Vm) -> None:
    """Regions come and go; a slot is used again; sizes must be pages."""
    first = vm.add_memory(0, 0x2000)
    second = vm.add_memory(0x100000, 0x1000)
    second.write(0x100010, b"abc")
    assert second.read(0x100010, 3) == b"abc"
    vm.remove_memory(first)
    vm.remove_memory(first)
    vm.add_memory(0x200000, 0x1000)
    with pytest.raises(KvmError, match="memory at 0x100000, 4096 bytes: EEXIST: the region overlaps"):
        vm.add_memory(0x100000, 0x1000)


def test_time_of_the_guest(machine: Machine) -> None:
    """Frequency and offset are told, or it is said that they are not known."""
    assert machine.vcpu.tsc_khz() is None or machine.vcpu.tsc_khz() > 100_000  # type: ignore[operator]
    offset = machine.vcpu.tsc_offset()
    assert offset is None or 0 <= offset < 1 << 64


def test_capabilities_are_asked_for(kvm: Kvm) -> None:
    """The words of the protocol follow from the kernel's."""
    found = capabilities(kvm)
    assert bool(found & Capability.HYPERV) == bool(kvm.check_extension(Cap.HYPERV_EVENTFD))
    assert bool(found & Capability.PIO) == bool(kvm.capabilities[Cap.IOEVENTFD])
    assert not found & Capability.XEN
    assert isinstance(kvm.xen_event_channels, bool)


def test_exits_have_words(machine: Machine) -> None:
    """A write that nobody takes is described."""
    result = machine.run_exits(Ring(code.write_port(PORT, 0x12345678, 4)), 1, 20)
    assert result.why == "out at port 0x510, 4 bytes"
    assert machine.vcpu.io_data() == b"\x78\x56\x34\x12"
    assert machine.vcpu.page.exit_reason == Exit.IO


# -- attach


class FakeHcd:
    """hcd's end of the doorbell socket, one connection at a time, driven by the test."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(20)
        self.fds: list[int] = []
        self.clock: object = None
        self.socket = socket.socket()

    def accept(self) -> Attach:
        self.socket.close()
        self.socket, _ = self._listener.accept()
        self.socket.settimeout(20)
        self.protocol = HostConnection()
        attached = self.event(Attach)
        assert isinstance(attached, Attach)
        self.fds += [held.fd for held in attached.held]
        return attached

    def event(self, kind: type) -> object:
        """The next event of ``kind``; CLOCK may come between."""
        while True:
            found = self.protocol.next_event()
            if isinstance(found, kind):
                return found
            if found is not None:
                self.clock = found
                continue
            self.flush()
            packet, ancillary, _, _ = self.socket.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(4 * 253))
            for _, _, data in ancillary:
                self.protocol.receive_data(packet, array.array("i", data).tolist())
            if not ancillary:
                self.protocol.receive_data(packet)

    def flush(self) -> None:
        for packet, fds in self.protocol.data_to_send():
            socket.send_fds(self.socket, [packet], list(fds))

    def outcomes(self) -> tuple[Outcome, ...]:
        answers = self.event(Answers)
        assert isinstance(answers, Answers)
        return answers.outcomes

    def eventfd(self) -> int:
        self.fds.append(os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC))
        return self.fds[-1]

    def hang_up(self) -> None:
        self.socket.close()

    def close(self) -> None:
        self.socket.close()
        self._listener.close()
        for fd in self.fds:
            os.close(fd)


BELLS = (
    DoorbellItem(1, "pio", Place.PIO, PORT, 4),
    DoorbellItem(2, "mmio", Place.MMIO, ADDRESS, 4, datamatch=5),
    DoorbellItem(3, "clash", Place.PIO, PORT, 4),
    DoorbellItem(4, "xen", Place.XEN, 9),
)
LINE = InterruptItem(1, "line")


@pytest.fixture
def fake(short_dir: Path, no_leaks: None) -> Iterator[FakeHcd]:
    made = FakeHcd(short_dir / "bell.sock")
    yield made
    made.close()


class Ends:
    """Collects why connections ended."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.came = threading.Event()

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        self.came.set()


def serve_table(fake: FakeHcd, held: bool = False) -> list[Outcome]:
    """Attach and send the whole table; what the VMM answered."""
    fake.accept()
    bells = [None if held else fake.eventfd() for _ in BELLS]
    line = None if held else fake.eventfd()
    fake.protocol.welcome("bells", doorbells=len(BELLS), interrupts=1, memory=1)
    fake.protocol.add([MemoryItem(1, 0x1000)], [None if held else memfd(fake, 0x1000)])
    fake.protocol.add(BELLS, bells)
    fake.protocol.add([LINE], [line])
    fake.protocol.end()
    outcomes = [*fake.outcomes(), *fake.outcomes(), *fake.outcomes()]
    fake.flush()
    return outcomes


def memfd(fake: FakeHcd, size: int) -> int:
    fd = os.memfd_create("shared", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    fake.fds.append(fd)
    return fd


@pytest.fixture
def attachment(machine: Machine, fake: FakeHcd, short_dir: Path) -> Iterator[Attachment]:
    with Attachment(
        machine.vm,
        str(short_dir / "bell.sock"),
        route_of=lambda _: machine.route,
        place=lambda _: 0xA0000000,
        clock=machine.vcpu,
        on_end=Ends(),
    ) as made:
        yield made


def in_thread(function: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def connect(attachment: Attachment, fake: FakeHcd, *, held: bool = False) -> list[Outcome]:
    found: list[list[Outcome]] = []
    thread = in_thread(lambda: found.append(serve_table(fake, held)))
    attachment.connect()
    thread.join()
    return found[0]


def test_attach_registers_and_reports(machine: Machine, fake: FakeHcd, attachment: Attachment) -> None:
    """Each item gets its own answer; what is registered rings hcd's eventfds; the clock is told."""
    outcomes = connect(attachment, fake)
    assert [(o.reference.id, o.error) for o in outcomes] == [
        (1, 0),
        (1, 0),
        (2, 0),
        (3, errno.EEXIST),
        (4, errno.EOPNOTSUPP),
        (1, 0),
    ]
    assert outcomes[0].value == 0xA0000000
    assert outcomes[-1].value == attachment.interrupt("line").gsi >= 24
    assert "another doorbell" in attachment.doorbell("clash").reason
    assert (fake.clock is not None) == (machine.vcpu.tsc_offset() is not None)
    machine.run_exits(Ring(code.write_port(PORT, 7, 4)), 100, 20)
    machine.run_exits(Ring(code.write_memory(ADDRESS, 5, 4)), 50, 20)
    pio, mmio = fake.fds[0], fake.fds[1]
    assert (rings(pio), rings(mmio)) == (100, 50)
    machine.run_exits(Ring(code.set_memory(0xA0000010, 0xABCD)), 1, 20)
    assert attachment.memory is not None
    assert attachment.memory.read_u32(0xA0000010) == 0xABCD


def test_later_changes(machine: Machine, fake: FakeHcd, attachment: Attachment) -> None:
    """hcd takes a doorbell away and adds another one while the VMM runs."""
    connect(attachment, fake)
    fake.protocol.remove([BELLS[0].reference])
    assert [outcome.error for outcome in fake.outcomes()] == [0]
    assert "out at port" in machine.run_exits(Ring(code.write_port(PORT, 7, 4)), 1, 20).why
    new = fake.eventfd()
    fake.protocol.add([DoorbellItem(9, "new", Place.PIO, PORT, 2)], [new])
    assert [outcome.error for outcome in fake.outcomes()] == [0]
    machine.run_exits(Ring(code.write_port(PORT, 7, 2)), 10, 20)
    assert rings(new) == 10


def test_hcd_goes_and_comes_again(machine: Machine, fake: FakeHcd, attachment: Attachment) -> None:
    """Its end is reported and everything unregistered; the next hcd gets the same eventfds by their ids."""
    connect(attachment, fake)
    old = list(fake.fds)
    ends = attachment._on_end
    assert isinstance(ends, Ends)
    fake.hang_up()
    assert ends.came.wait(20)
    assert "hung up" in ends.reasons[0]
    assert "out at port" in machine.run_exits(Ring(code.write_port(PORT, 7, 4)), 1, 20).why
    outcomes = connect(attachment, fake, held=True)
    assert [outcome.error for outcome in outcomes][:3] == [0, 0, 0]
    machine.run_exits(Ring(code.write_port(PORT, 7, 4)), 25, 20)
    assert rings(old[0]) == 25


def test_detach_unregisters_and_reports_nothing(machine: Machine, fake: FakeHcd, attachment: Attachment) -> None:
    """The VMM's own end is no event."""
    connect(attachment, fake)
    attachment.detach()
    attachment.detach()
    assert "out at port" in machine.run_exits(Ring(code.write_port(PORT, 7, 4)), 1, 20).why
    ends = attachment._on_end
    assert isinstance(ends, Ends)
    assert not ends.reasons


def test_refusal_and_garbage(fake: FakeHcd, attachment: Attachment) -> None:
    """A busy hcd says why; bytes that are no message end the connection with what was expected."""

    def refuse() -> None:
        fake.accept()
        fake.protocol.send_error("another VMM is attached", errno.EBUSY)
        fake.flush()

    thread = in_thread(refuse)
    with pytest.raises(AttachError, match="hcd refused: another VMM is attached"):
        attachment.connect()
    thread.join()

    def garbage() -> None:
        fake.accept()
        fake.socket.send(b"\xff" * 20)

    thread = in_thread(garbage)
    with pytest.raises(AttachError, match="broke the protocol"):
        attachment.connect()
    thread.join()


def test_nobody_there(vm: Vm, short_dir: Path) -> None:
    """The error names the socket."""
    with (
        Attachment(vm, str(short_dir / "none.sock"), route_of=lambda _: IrqchipRoute(2, 5)) as attachment,
        pytest.raises(AttachError, match=r"none\.sock: No such file"),
    ):
        attachment.connect()


def test_an_interrupt_without_a_route_is_tried_again(
    machine: Machine, fake: FakeHcd, attachment: Attachment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KVM did not take the route: the next connection asks again, instead of an irqfd that raises nothing."""
    route = Vm.route

    def refuse(vm: Vm, routes: object) -> None:
        raise KvmError(Ioctl.SET_GSI_ROUTING, errno.EINVAL)

    monkeypatch.setattr(Vm, "route", refuse)
    assert connect(attachment, fake)[-1].error == errno.EINVAL
    monkeypatch.setattr(Vm, "route", route)
    attachment.detach()
    assert connect(attachment, fake, held=True)[-1].error == 0
    assert machine.vm._routes[attachment.interrupt("line").gsi] == [machine.route]


def test_memory_that_is_smaller_than_it_says_is_refused(fake: FakeHcd, attachment: Attachment) -> None:
    """Like everything else that cannot be registered: it is answered, and the rest is served."""
    found: list[Outcome] = []

    def serve() -> None:
        fake.accept()
        fake.protocol.welcome("bells", doorbells=0, interrupts=0, memory=1)
        fake.protocol.add([MemoryItem(1, 0x2000)], [memfd(fake, 0x1000)])
        fake.protocol.end()
        found.extend(fake.outcomes())
        fake.flush()

    thread = in_thread(serve)
    attachment.connect()
    thread.join()
    assert [outcome.error for outcome in found] == [errno.EINVAL]
    assert attachment.memory is None


def test_what_the_caller_raises_leaves_no_connection(fake: FakeHcd, attachment: Attachment) -> None:
    """Its own ``place`` says no: nothing stays registered, and the next attempt works."""
    place = attachment._place

    def nowhere(item: MemoryItem) -> int:
        raise LookupError("no room")

    attachment._place = nowhere
    thread = in_thread(lambda: serve_quietly(fake))
    with pytest.raises(LookupError, match="no room"):
        attachment.connect()
    thread.join()
    assert attachment._socket is None
    attachment.close()
    attachment._place = place
    assert connect(attachment, fake)[0].error == 0


def serve_quietly(fake: FakeHcd) -> None:
    with contextlib.suppress(Exception):
        serve_table(fake)


def test_a_kick_never_comes_after_its_run(kvm: Kvm) -> None:
    """It would end the process: nobody handles the signal outside of KVM_RUN."""
    source = """
import sys, threading
from hcd.kvm.vm import Kvm
from hcd.lab.machine import Machine, Ring
sys.setswitchinterval(1e-6)
with Kvm() as kvm, Machine(kvm) as machine:
    stop = threading.Event()
    def kick():
        while not stop.is_set():
            machine.vcpu.kick()
    threads = [threading.Thread(target=kick) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(60):
        assert machine.run_exits(Ring(b""), 1, 60).why == ""
    stop.set()
    for thread in threads:
        thread.join()
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
