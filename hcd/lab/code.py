"""Machine code for the tiny guest: the dozen x86 instructions that it needs, in flat 32-bit protected mode.

The choice is narrow on purpose. A hypervisor without the processor's help interprets every instruction of such a guest,
and its interpreter may know little more than these; IRET in protected mode, for one, is not among what KVM's knows, so
the interrupt handler returns by POP, POPF and JMP.
"""

from __future__ import annotations

import struct

__all__ = [
    "EAX",
    "EBX",
    "ECX",
    "EDI",
    "EDX",
    "ESI",
    "RDTSC",
    "STI",
    "add_memory",
    "compare_memory",
    "jump",
    "load",
    "load_memory",
    "loop",
    "or_memory",
    "out_byte",
    "return_from_interrupt",
    "set_memory",
    "store",
    "store_at",
    "subtract_memory",
    "write_memory",
    "write_port",
]

EAX, ECX, EDX, EBX, ESI, EDI = 0, 1, 2, 3, 6, 7

#: time-stamp counter to edx:eax
RDTSC = b"\x0f\x31"
STI = b"\xfb"
#: the hypercall instructions of the two vendors
VMCALL = b"\x0f\x01\xc1"
VMMCALL = b"\x0f\x01\xd9"

_JZ, _JNZ = 0x84, 0x85
_JUMP_SIZE = 6


def _u32(value: int) -> bytes:
    return struct.pack("<I", value & 0xFFFFFFFF)


def load(register: int, value: int) -> bytes:
    """mov register, value"""
    return bytes([0xB8 + register]) + _u32(value)


def load_memory(register: int, address: int) -> bytes:
    """mov register, [address]"""
    return bytes([0x8B, 0x05 | register << 3]) + _u32(address)


def store(register: int, address: int) -> bytes:
    """mov [address], register"""
    return bytes([0x89, 0x05 | register << 3]) + _u32(address)


def store_at(register: int, pointer: int) -> bytes:
    """mov [pointer], register: ``pointer`` is a register"""
    return bytes([0x89, pointer | register << 3])


def set_memory(address: int, value: int) -> bytes:
    """mov dword [address], value"""
    return b"\xc7\x05" + _u32(address) + _u32(value)


def add_memory(address: int, value: int) -> bytes:
    """add dword [address], value (a signed byte)"""
    return b"\x83\x05" + _u32(address) + bytes([value])


def subtract_memory(register: int, address: int) -> bytes:
    """sub register, [address]"""
    return bytes([0x2B, 0x05 | register << 3]) + _u32(address)


def or_memory(register: int, address: int) -> bytes:
    """or [address], register"""
    return bytes([0x09, 0x05 | register << 3]) + _u32(address)


def compare_memory(address: int, value: int) -> bytes:
    """cmp dword [address], value (a signed byte)"""
    return b"\x83\x3d" + _u32(address) + bytes([value])


def write_port(port: int, value: int, width: int) -> bytes:
    """out port, value; ``width`` 1, 2 or 4"""
    return load(EDX, port) + load(EAX, value) + {1: b"\xee", 2: b"\x66\xef", 4: b"\xef"}[width]


def write_memory(address: int, value: int, width: int) -> bytes:
    """mov [address], value, by way of registers; ``width`` 1, 2 or 4"""
    move = {1: b"\x88\x03", 2: b"\x66\x89\x03", 4: b"\x89\x03"}[width]
    return load(EBX, address) + load(EAX, value) + move


def out_byte(port: int) -> bytes:
    """out port, al; ``port`` below 256"""
    return bytes([0xE6, port])


def loop(body: bytes) -> bytes:
    """Repeat ``body`` until its last instruction leaves zero (jnz)."""
    return body + jump(_JNZ, -len(body) - _JUMP_SIZE)


def spin_while_zero(address: int) -> bytes:
    """Wait until the word at ``address`` is not zero."""
    compare = compare_memory(address, 0)
    return compare + jump(_JZ, -len(compare) - _JUMP_SIZE)


def jump(condition: int, distance: int) -> bytes:
    """jz or jnz near"""
    return bytes([0x0F, condition]) + _u32(distance)


def return_from_interrupt() -> bytes:
    """pop edi (address); pop ecx (segment); popf; jmp edi. Loses edi and ecx; flat segments only."""
    return b"\x5f\x59\x9d\xff\xe7"
