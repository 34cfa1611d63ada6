"""Trellis codes: tiles of 256 weights whose codes overlap in a ring of bits. Plain PyTorch reference.

A tile is a ring of 256 * b bits, where b is the width. The state of weight t is the L bits of the ring that end at bit
floor((t + 1) * b), and its value is a function of that state. Neighbours share most of their bits, so each weight has
2^L values to choose from while it adds only b bits. The Viterbi algorithm finds the best ring (bitshift trellis and
tail-biting: Tseng et al., "QTIP", arXiv:2406.11235, sections 3.1 and 3.2). The width is any multiple of 1/8 bit from 1
to 4. It enters the decoder as a number, so that one decoder serves all widths.

Widths are passed as ``eighths``, the number of eighths of a bit. A ring then has ``eighths`` words of 32 bits.

Shapes: T tiles, N weights of a tile (256; any multiple of 8 in tests), S = 2^L states.
"""

from __future__ import annotations

import itertools
from typing import Protocol

import torch
from torch import Tensor

from gemq.errors import UserError, short_repr

TILE_SIDE = 16
"""Rows and columns of a tile."""

TILE_WEIGHTS = TILE_SIDE * TILE_SIDE
"""Weights of a tile. They are numbered row by row."""

PERIOD = 8
"""Weights after which the pattern of new bits repeats."""

MIN_EIGHTHS, MAX_EIGHTHS = 8, 32
"""Narrowest and widest code, in eighths of a bit per weight."""

OVERLAP_WEIGHTS = 64
"""Weights on either side of the ring's start that the first pass of the encoder looks at."""

WORD_BITS = 32

UNREACHABLE = 1e30
"""Cost of a state that a path must not start or end in."""


def eighths(bits: float) -> int:
    """Return the eighths of a bit of a width.

    Args:
        bits: Bits per weight.

    Raises:
        UserError: The width is no multiple of 1/8 from 1 to 4.
    """
    count = round(bits * PERIOD) if -1e3 < bits < 1e3 else 0
    if count != bits * PERIOD or not MIN_EIGHTHS <= count <= MAX_EIGHTHS:
        raise UserError(f"there is no trellis width {short_repr(bits)}: choose a multiple of 0.125 from 1 to 4")
    return count


def new_bits(width_eighths: int) -> list[int]:
    """Return how many bits each weight of a period adds to the ring. They sum to ``width_eighths``."""
    ends = [index * width_eighths // PERIOD for index in range(PERIOD + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def _bit_ends(width_eighths: int, weights: int, device: torch.device) -> Tensor:
    """Return where the state of each weight ends in the ring, exclusive: [N] int64."""
    return torch.arange(1, weights + 1, device=device) * width_eighths // PERIOD


def pack(states: Tensor, width_eighths: int) -> Tensor:
    """Pack the states of tiles into rings of bits.

    Bit 0 of a ring is the most significant bit of its first word.

    Args:
        states: [T, N] integers, consistent: each is the previous one shifted by its new bits.
        width_eighths: Width in eighths of a bit.

    Returns:
        [T, N * width_eighths / 256] int32.
    """
    tiles, weights = states.shape
    ends = _bit_ends(width_eighths, weights, states.device)
    bit = torch.arange(weights * width_eighths // PERIOD, device=states.device)
    weight = torch.searchsorted(ends, bit, right=True)  # the first weight whose state has this bit
    shift = (ends[weight] - 1 - bit).to(torch.int32)
    bits = (states.to(torch.int32)[:, weight] >> shift) & 1
    place_values = torch.arange(WORD_BITS - 1, -1, -1, dtype=torch.int32, device=states.device)
    return (bits.view(tiles, -1, WORD_BITS) << place_values).sum(-1, dtype=torch.int32)


def unpack(words: Tensor, width_eighths: int, state_bits: int) -> Tensor:
    """Return the states of tiles.

    Args:
        words: [..., W] int32, from ``pack``.
        width_eighths: Width in eighths of a bit.
        state_bits: L, at most 16.

    Returns:
        [..., N] int64 with N = 256 * W / width_eighths.
    """
    count = words.shape[-1]
    weights = count * WORD_BITS * PERIOD // width_eighths
    last_bit = _bit_ends(width_eighths, weights, words.device) - 1
    word = last_bit // WORD_BITS
    shift = WORD_BITS - 1 - last_bit % WORD_BITS
    unsigned = words.to(torch.int64) & 0xFFFFFFFF
    low, high = unsigned[..., word], unsigned[..., (word - 1) % count]
    # the funnel shift of a GPU: 64 bits of two neighbouring words, shifted right
    return (((high << WORD_BITS) | low) >> shift) & ((1 << state_bits) - 1)


def decode(words: Tensor, width_eighths: int, table: Tensor) -> Tensor:
    """Decode tiles.

    Args:
        words: [..., W] int32, from ``pack``.
        width_eighths: Width in eighths of a bit.
        table: [S] float, value of each state.

    Returns:
        [..., N], dtype of the table.
    """
    return table[unpack(words, width_eighths, state_bits(table))]


def state_bits(table: Tensor) -> int:
    """Return L of a table with 2^L values."""
    return len(table).bit_length() - 1


class Viterbi(Protocol):
    """An implementation of the search: ``viterbi`` of this module, or of ``trellis_kernel``."""

    def __call__(
        self, x: Tensor, width_eighths: int, table: Tensor, overlap: Tensor | None
    ) -> tuple[Tensor, Tensor]: ...


def viterbi(x: Tensor, width_eighths: int, table: Tensor, overlap: Tensor | None) -> tuple[Tensor, Tensor]:
    """Find the sequence of states with the smallest squared error.

    Args:
        x: [T, N] float32, weights in units of the table.
        width_eighths: Width in eighths of a bit.
        table: [S] float32.
        overlap: [T] integers, the bits of the ring before its start that the first state has. The last state then ends
            with them, so that the path closes a ring. None leaves start and end free.

    Returns:
        States [T, N] int32 and the sum of squared errors [T] float32.
    """
    tiles, weights = x.shape
    size = len(table)
    pattern = new_bits(width_eighths)
    cost = x.new_zeros(tiles, size)
    mismatch = cost
    if overlap is not None:
        ending = torch.arange(size, device=x.device) & ((size >> pattern[0]) - 1)
        mismatch = (ending != overlap.unsqueeze(1)) * UNREACHABLE
        cost = mismatch
    best_predecessors = []
    for t in range(weights):
        step = pattern[t % PERIOD]
        # state s follows the 2^step states whose lower bits are the upper bits of s
        cost, predecessor = cost.view(tiles, 1 << step, size >> step).min(1)
        best_predecessors.append(predecessor.to(torch.uint8))
        cost = cost.repeat_interleave(1 << step, 1) + (x[:, t, None] - table).square()
    total, state = (cost + mismatch).min(1)
    states = torch.empty(tiles, weights, dtype=torch.int32, device=x.device)
    for t in reversed(range(weights)):
        states[:, t] = state
        step = pattern[t % PERIOD]
        shared_bits = state >> step  # with the previous state
        predecessor = best_predecessors[t].gather(1, shared_bits.unsqueeze(1)).squeeze(1)
        state = predecessor.long() * (size >> step) + shared_bits
    return states, total


def encode_states(x: Tensor, width_eighths: int, table: Tensor, search: Viterbi = viterbi) -> Tensor:
    """Find states that form a ring and whose values are close to the weights of a tile.

    The first pass runs over the weights around the start of the ring, without constraints. The bits that its path has
    at the start are fixed in the second pass, which runs over the whole ring (QTIP, algorithm 4).

    Args:
        x: [T, N] float32, weights in units of the table.
        width_eighths: Width in eighths of a bit.
        table: [S] float32.
        search: Implementation of the Viterbi algorithm.

    Returns:
        [T, N] int32.
    """
    margin = min(OVERLAP_WEIGHTS, x.shape[1])
    around_start = torch.cat([x[:, -margin:], x[:, :margin]], 1)
    states, _ = search(around_start, width_eighths, table, None)
    overlap = states[:, margin - 1] & ((len(table) >> new_bits(width_eighths)[0]) - 1)
    return search(x, width_eighths, table, overlap)[0]


def encode(x: Tensor, width_eighths: int, table: Tensor, search: Viterbi = viterbi) -> Tensor:
    """Encode tiles as rings of bits. Arguments as for ``encode_states``, result as of ``pack``."""
    return pack(encode_states(x, width_eighths, table, search), width_eighths)
