"""The assembly of the vector kernels, which neither interpreter nor a CPU runs, against plain sums of products."""

from __future__ import annotations

import random

import pytest
import torch
from ptx import run, signed

from gemq.quant.packing import pack_codes

pytest.importorskip("triton")
from gemq.kernels.decode.dots import fields_of, plane_asm, ternary_asm, three_bit_asm
from gemq.kernels.decode.fixed_point import plane_words, words_per_load
from gemq.quant.widths import LEVELS

G = 128


def words_of(data: bytes) -> list[int]:
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


def activation_words(values: list[int]) -> tuple[list[int], list[int]]:
    """High and low bytes of 16-bit integers, four to a word."""
    high = words_of(bytes((v >> 8) & 255 for v in values))
    return high, words_of(bytes(v & 255 for v in values))


def tiles(high: list[int], low: list[int], wide: int) -> list[int]:
    """As operands: ``wide`` high words, the same low ones, and so on."""
    return [word for i in range(0, len(high), wide) for word in (*high[i : i + wide], *low[i : i + wide])]


def draw(levels: int, limit: int, seed: int) -> tuple[list[int], bytes, list[int]]:
    """Codes of a group, packed, and activations."""
    source = random.Random(seed)
    width = next(w for w, count in LEVELS.items() if count == levels)
    codes = [source.randrange(levels) for _ in range(G)]
    packed = pack_codes(torch.tensor([codes], dtype=torch.uint8), width, G)
    return codes, bytes(packed.flatten().tolist()), [source.randint(-limit, limit) for _ in range(G)]


@pytest.mark.parametrize("sharing", [1, 2, 4])
@pytest.mark.parametrize("levels", [2, 4, 8, 16, 256])
def test_planes(levels, sharing):
    """The lanes that share a group together have the whole sum."""
    codes, packed, x = draw(levels, 32767, levels + sharing)
    fields, words = fields_of(levels), plane_words(levels, G) // sharing
    wide, half = words_per_load(levels, G, words), G // 32
    plane = words_of(packed)
    total = 0
    for lane in range(sharing):
        own = plane[lane * words : (lane + 1) * words]
        upper: list[int] = []
        if levels == 8:
            first = plane_words(levels, G) + lane * words % half
            upper = plane[first : first + min(words, half)]
        step = G // fields
        columns = [f * step + 4 * (lane * words + k) + b for f in range(fields) for k in range(words) for b in range(4)]
        high, low = activation_words([x[c] for c in columns])
        shift = [lane * words // half] * wide if levels == 8 else []
        assembly = three_bit_asm(words, len(upper), half, wide) if levels == 8 else plane_asm(levels, words, wide)
        found = run(assembly, wide, [*own, *upper, *shift, *tiles(high, low, wide)])
        assert found[1:] == [0] * (wide - 1)
        total += signed(found[0])
    assert total == sum(c * v for c, v in zip(codes, x, strict=True))


@pytest.mark.parametrize("group", range(4))
def test_ternary(group):
    """Groups of 26 bytes start at any even place of the window that holds them."""
    codes, packed, x = draw(3, 8191, group)
    start = group * 26 % 8
    window = words_of(bytes(start) + packed + bytes(8)[: 32 - 26 - start])
    combined = [v - 3 * (x[c - 26] if c >= 26 else 0) for c, v in enumerate(x)]
    high, low = activation_words(combined)
    later = activation_words([*combined[2:], 0, 0])
    operands = [*window, start * 8, start * 8, *tiles(high + later[0], low + later[1], 2)]
    found = run(ternary_asm(2), 2, operands)
    assert signed(found[0]) == sum(c * v for c, v in zip(codes, x, strict=True))
    assert found[1] == 0
