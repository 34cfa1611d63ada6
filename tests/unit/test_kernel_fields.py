"""The inline assembly of ``bit_fields``, run by a small emulator, since Triton's interpreter cannot run it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from gemq.kernels.decode import bit_fields

BF16, FP16 = 0, 1
FULL = 0xFFFFFFFF


def permute(a: int, b: int, selector: int) -> int:
    """Select four bytes of two words."""
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


def run(assembly: str, operand: int, **words: int) -> list[list[float]]:
    """Return the floats of each output field, in byte order, for input words by register (``r8=...``)."""
    registers = {f"${name[1:]}": word for name, word in words.items()}
    for line in assembly.strip("{}\n").split("\n"):
        if line.startswith(".reg"):
            continue
        operation, operands = line.rstrip(";").split(" ", 1)
        target, *sources = operands.split(", ")
        values = [registers[x] if x in registers else int(x, 0) for x in sources]
        registers[target] = OPERATIONS[operation.split(".")[0]](*values)
    outputs = min(int(name[1:]) for name in words)
    halves = torch.tensor([[registers[f"${i}"] >> s & 0xFFFF for s in (0, 16)] for i in range(outputs)])
    floats = halves.to(torch.uint16).view(torch.float16 if operand == FP16 else torch.bfloat16)
    return floats.double().reshape(-1, 4).tolist()


def word(values: list[int]) -> int:
    """Return the word of four bytes."""
    return int.from_bytes(bytes(values), "little")


def random_bytes(below: int = 256) -> list[list[int]]:
    """Return 50 words of four bytes."""
    return torch.randint(0, below, (50, 4)).tolist()


def read(levels: int, operand: int, code: int) -> float:
    """Return the float that a code should read as."""
    return bit_fields.bias(levels, operand) + code / bit_fields.factor(levels, operand)


@pytest.mark.parametrize("operand", [BF16, FP16])
@pytest.mark.parametrize("bits", [1, 2, 4])
def test_planes(bits, operand):
    assembly = bit_fields.plane_asm(bits, operand, bit_fields.lower_byte(operand))
    for data in random_bytes():
        fields = run(assembly, operand, **{f"r{16 // bits}": word(data)})
        for i, field in enumerate(fields):
            assert field == [read(1 << bits, operand, b >> i * bits & (1 << bits) - 1) for b in data]


@pytest.mark.parametrize("operand", [BF16, FP16])
def test_eight_bits_are_two_halves(operand):
    low_assembly = bit_fields.plane_asm(4, operand, bit_fields.lower_byte(operand))
    high_assembly = bit_fields.plane_asm(4, operand, bit_fields.upper_byte(operand))
    for data in random_bytes():
        low, _ = run(low_assembly, operand, r4=word(data))
        _, high = run(high_assembly, operand, r4=word(data))
        assert [a + b for a, b in zip(low, high, strict=True)] == [read(256, operand, b) for b in data]


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("operand", [BF16, FP16])
def test_three_bits(operand, half):
    for low, high in zip(random_bytes(), random_bytes(), strict=True):
        fields = run(bit_fields.three_bit_asm(operand), operand, r8=word(low), r9=word(high), r10=half * 0x01010101)
        for i, field in enumerate(fields):
            codes = [a >> 2 * i & 3 | (b >> 2 * i + half & 1) << 2 for a, b in zip(low, high, strict=True)]
            assert field == [read(8, operand, code) for code in codes]


@pytest.mark.parametrize("operand", [BF16, FP16])
def test_ternary_digits_of_every_byte(operand):
    for b in range(243):
        data = [b, 242 - b, 0, b // 2]
        fields = run(bit_fields.ternary_asm(operand), operand, r10=word(data))
        for i, field in enumerate(fields):
            assert field == [read(3, operand, x // 3**i % 3) for x in data]
