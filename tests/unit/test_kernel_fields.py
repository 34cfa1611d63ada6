"""The kernels' inline assembly, run by a few lines of Python: the interpreter cannot."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from gemq.kernels.decode import bit_fields

BF16, FP16 = 0, 1
FULL = 0xFFFFFFFF


def permute(a: int, b: int, selector: int) -> int:
    source = [(word >> 8 * i) & 0xFF for word in (a, b) for i in range(4)]
    return sum(source[(selector >> 4 * i) & 7] << 8 * i for i in range(4))


OPERATIONS = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "shl": lambda a, b: a << b & FULL,
    "shr": lambda a, b: a >> b,
    "add": lambda a, b: a + b & FULL,
    "mul": lambda a, b: a * b & FULL,
    "mad": lambda a, b, c: a * b + c & FULL,
    "prmt": permute,
}


def run(function, kind: int, **words: int) -> list[list[float]]:
    """Floats of each output field, in the order of the bytes, for input words given by register (``r8=...``)."""
    registers = {f"${name[1:]}": word for name, word in words.items()}
    for line in function(kind).strip("{}\n").split("\n"):
        if line.startswith(".reg"):
            continue
        operation, operands = line.rstrip(";").split(" ", 1)
        into, *given = operands.split(", ")
        values = [registers[x] if x in registers else int(x, 0) for x in given]
        registers[into] = OPERATIONS[operation.split(".")[0]](*values)
    outputs = min(int(name[1:]) for name in words)
    halves = torch.tensor([[registers[f"${i}"] >> s & 0xFFFF for s in (0, 16)] for i in range(outputs)])
    floats = halves.to(torch.uint16).view(torch.float16 if kind == FP16 else torch.bfloat16)
    return floats.double().reshape(-1, 4).tolist()


def word(values: list[int]) -> int:
    return int.from_bytes(bytes(values), "little")


def random_bytes(below: int = 256) -> list[list[int]]:
    return torch.randint(0, below, (50, 4)).tolist()


def read(levels: int, kind: int, code: int) -> float:
    return bit_fields.bias(levels, kind) + code / bit_fields.factor(levels, kind)


@pytest.mark.parametrize("kind", [BF16, FP16])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_planes(bits, kind):
    asm = lambda kind: bit_fields.plane_asm(bits, kind, bit_fields.lower_byte(kind))
    for given in random_bytes():
        found = run(asm, kind, **{f"r{16 // bits}": word(given)})
        for i, field in enumerate(found):
            assert field == [read(1 << bits, kind, b >> i * bits & (1 << bits) - 1) for b in given]


@pytest.mark.parametrize("kind", [BF16, FP16])
def test_eight_bits_are_two_halves(kind):
    for given in random_bytes():
        low = run(lambda kind: bit_fields.plane_asm(4, kind, bit_fields.lower_byte(kind)), kind, r4=word(given))[0]
        high = run(lambda kind: bit_fields.plane_asm(4, kind, bit_fields.upper_byte(kind)), kind, r4=word(given))[1]
        assert [a + b for a, b in zip(low, high, strict=True)] == [read(256, kind, b) for b in given]


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("kind", [BF16, FP16])
def test_three_bits(kind, half):
    for low, high in zip(random_bytes(), random_bytes(), strict=True):
        found = run(bit_fields.three_bit_asm, kind, r8=word(low), r9=word(high), r10=half * 0x01010101)
        for i, field in enumerate(found):
            codes = [a >> 2 * i & 3 | (b >> 2 * i + half & 1) << 2 for a, b in zip(low, high, strict=True)]
            assert field == [read(8, kind, code) for code in codes]


@pytest.mark.parametrize("kind", [BF16, FP16])
def test_ternary_digits_of_every_byte(kind):
    for b in range(243):
        given = [b, 242 - b, 0, b // 2]
        found = run(bit_fields.ternary_asm, kind, r10=word(given))
        for i, field in enumerate(found):
            assert field == [read(3, kind, x // 3**i % 3) for x in given]
