"""Emulator of the few PTX instructions in the assembly of ``gemq.kernels``, for one thread."""

from __future__ import annotations

import re

import numpy as np

WORD = 0xFFFFFFFF


def signed(value: int, bits: int = 32) -> int:
    """Interpret the lowest ``bits`` of a value as a signed integer."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _dp4a(a: int, b: int, c: int, b_signed: bool) -> int:
    """Return c plus the sum of four products of bytes."""
    total = c
    for i in range(4):
        x, y = (a >> 8 * i) & 255, (b >> 8 * i) & 255
        total += x * (signed(y, 8) if b_signed else y)
    return total


def _prmt(a: int, b: int, selector: int) -> int:
    """Select four bytes of two words."""
    source = (b << 32) | a
    chosen = 0
    for i in range(4):
        nibble = (selector >> 4 * i) & 15
        assert nibble < 8, "sign replication is not emulated"
        chosen |= ((source >> 8 * nibble) & 255) << 8 * i
    return chosen


def _lop3(a: int, b: int, c: int, table: int) -> int:
    """Look up each bit in a table of the three inputs' bits."""
    chosen = 0
    for i in range(32):
        entry = ((a >> i) & 1) << 2 | ((b >> i) & 1) << 1 | ((c >> i) & 1)
        chosen |= ((table >> entry) & 1) << i
    return chosen


def _subtract_halves(a: int, b: int) -> int:
    """Subtract two pairs of float16."""
    first, second = (np.array([value], np.uint32).view(np.float16) for value in (a, b))
    return int((first - second).view(np.uint32)[0])


INSTRUCTIONS = {
    "dp4a.u32.s32": lambda a, b, c: _dp4a(a, b, signed(c), True),
    "dp4a.u32.u32": lambda a, b, c: _dp4a(a, b, c, False),
    "prmt.b32": _prmt,
    "shr.b32": lambda a, b: a >> min(b, 32),
    "shl.b32": lambda a, b: a << min(b, 32),
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "add.u32": lambda a, b: a + b,
    "mul.lo.u32": lambda a, b: a * b,
    "mad.lo.u32": lambda a, b, c: a * b + c,
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "mov.b32": lambda a: a,
    "lop3.b32": _lop3,
    "selp.b32": lambda a, b, p: a if p else b,
    "shf.r.wrap.b32": lambda a, b, c: ((b << 32) | a) >> (c & 31),
    "sub.rn.f16x2": _subtract_halves,
    "setp.ge.u32": lambda a, b: int(a >= b),
}


def run(assembly: str, outputs: int, inputs: list[int]) -> list[int]:
    """Run the assembly and return its outputs. Operands are the outputs, then the inputs, 32 bits each."""
    registers = {f"${i}": None for i in range(outputs)}
    registers |= {f"${outputs + i}": value & WORD for i, value in enumerate(inputs)}
    for line in assembly.strip().strip("{}").split("\n"):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        name, arguments = line.rstrip(";").split(None, 1)
        target, *operands = re.split(r",\s*", arguments)
        values = [int(o, 0) if o[0].isdigit() else registers[o] for o in operands]
        registers[target] = INSTRUCTIONS[name](*values) & WORD
    return [registers[f"${i}"] for i in range(outputs)]
