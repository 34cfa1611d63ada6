"""The assembly of the vector kernels, run by an emulator, against plain sums of products."""

from __future__ import annotations

import random

import pytest
import torch

from gemq.quant.packing import pack_codes
from support.ptx import run, signed

pytest.importorskip("triton")
from gemq.kernels.decode.dots import fields_of, plane_asm, ternary_asm, three_bit_asm
from gemq.kernels.decode.fixed_point import plane_words, words_per_load
from gemq.quant.widths import Width

G = 128


def words_of(data: bytes) -> list[int]:
    """Return the little-endian words of bytes."""
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


def activation_words(values: list[int]) -> tuple[list[int], list[int]]:
    """Return the high and low bytes of 16-bit integers, four to a word."""
    high = words_of(bytes((v >> 8) & 255 for v in values))
    return high, words_of(bytes(v & 255 for v in values))


def tiles(high: list[int], low: list[int], load_words: int) -> list[int]:
    """Return operands: ``load_words`` high words, then as many low words, and so on."""
    operands = []
    for i in range(0, len(high), load_words):
        operands += high[i : i + load_words] + low[i : i + load_words]
    return operands


def draw(levels: int, limit: int, seed: int) -> tuple[list[int], bytes, list[int]]:
    """Return codes of a group, the packed codes, and activations."""
    source = random.Random(seed)
    width = next(w for w in Width if w.levels == levels)
    codes = [source.randrange(levels) for _ in range(G)]
    packed = pack_codes(torch.tensor([codes], dtype=torch.uint8), width, G)
    return codes, bytes(packed.flatten().tolist()), [source.randint(-limit, limit) for _ in range(G)]


@pytest.mark.parametrize("sharing", [1, 2, 4])
@pytest.mark.parametrize("levels", [2, 4, 8, 16, 256])
def test_planes(levels, sharing):
    """The lanes that share a group add up to the whole sum."""
    codes, packed, x = draw(levels, 32767, levels + sharing)
    fields, words = fields_of(levels), plane_words(levels, G) // sharing
    load_words, half = words_per_load(levels, G, words), G // 32
    plane = words_of(packed)
    total = 0
    for lane in range(sharing):
        lane_words = plane[lane * words : (lane + 1) * words]
        upper: list[int] = []
        if levels == 8:
            start = plane_words(levels, G) + lane * words % half
            upper = plane[start : start + min(words, half)]
        step = G // fields
        columns = [f * step + 4 * (lane * words + k) + b for f in range(fields) for k in range(words) for b in range(4)]
        high, low = activation_words([x[c] for c in columns])
        shift = [lane * words // half] * load_words if levels == 8 else []
        if levels == 8:
            assembly = three_bit_asm(words, len(upper), half, load_words)
        else:
            assembly = plane_asm(levels, words, load_words)
        sums = run(assembly, load_words, [*lane_words, *upper, *shift, *tiles(high, low, load_words)])
        assert sums[1:] == [0] * (load_words - 1)
        total += signed(sums[0])
    assert total == sum(c * v for c, v in zip(codes, x, strict=True))


@pytest.mark.parametrize("group", range(4))
def test_ternary(group):
    """Groups of 26 bytes start at any even byte of the window that contains them."""
    codes, packed, x = draw(3, 8191, group)
    start = group * 26 % 8
    window = words_of(bytes(start) + packed + bytes(8)[: 32 - 26 - start])
    combined = [v - 3 * (x[c - 26] if c >= 26 else 0) for c, v in enumerate(x)]
    high, low = activation_words(combined)
    later = activation_words([*combined[2:], 0, 0])
    operands = [*window, start * 8, start * 8, *tiles(high + later[0], low + later[1], 2)]
    sums = run(ternary_asm(2), 2, operands)
    assert signed(sums[0]) == sum(c * v for c, v in zip(codes, x, strict=True))
    assert sums[1] == 0
