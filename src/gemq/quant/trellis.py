"""Trellis codes: tiles of 256 weights whose codes overlap in a ring of bits. Plain PyTorch reference.

A tile is a ring of 256 * b bits, where b is the width. The state of weight t is the L bits of the ring that end at bit
floor((t + 1) * b), and its value is a function of that state. Neighbors share most of their bits, so each weight has
2^L values to choose from while it adds only b bits. The Viterbi algorithm finds the best ring (bitshift trellis and
tail-biting: Tseng et al., "QTIP", arXiv:2406.11235, sections 3.1 and 3.2). The width is any multiple of 1/8 bit from 1
to 4. It enters the decoder as a number, so that one decoder serves all widths.

A width is passed as its number of eighths of a bit. The ring of a tile then has as many words of 32 bits.

``quant.trellis_feedback`` encodes whole matrices.

Must not import models or files. ``trellis_kernel`` implements the search for Triton.

Shapes: T tiles, N weights of a tile (256, or a smaller multiple of 8), S = 2^L states, E matrices, R rows, C columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from gemq.quant.widths import TILE_SIDE as TILE_SIDE

TILE_WEIGHTS = TILE_SIDE * TILE_SIDE
"""Weights of a tile. They are numbered row by row."""

PERIOD = 8
"""Weights after which the pattern of new bits repeats."""

STATE_BITS = 12
"""L of new codes. Two bits more lower the error by 3 % and make encoding five times slower (lab log, entry 51)."""

OVERLAP_WEIGHTS = 64
"""Weights on either side of the ring's start that the first pass of the encoder looks at."""

WORD_BITS = 32

MULTIPLIER = 0xC5E2486D
"""Spreads the bits of a state over four bytes. Of some hundred random odd numbers the best from L = 12 to 16."""

BYTES_MEAN, BYTES_DEVIATION = 510, 147.8
"""Of the sum of four random bytes."""

SEARCH_BYTES = 1 << 30
"""Upper bound for the memory that a search takes on a GPU to follow paths backwards."""

SEARCHED_TILES = 32
"""Tiles that the reference searches at the same time. Their costs fit into the cache of a CPU."""

UNREACHABLE = 1e30
"""Cost of a state that a path must not start or end in."""


def new_bits(width_eighths: int) -> list[int]:
    """Return how many bits each weight of a period adds to the ring. They sum to ``width_eighths``."""
    ends = [index * width_eighths // PERIOD for index in range(PERIOD + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def byte_sum_table(state_bits: int) -> Tensor:
    """Return the values of all states of L bits: [2^L] float32, roughly a unit Gaussian.

    A value is the sum of the four bytes of state * MULTIPLIER mod 2^32, shifted and scaled. A GPU computes it in two
    integer instructions, a product and dp4a, without a table.
    """
    product = torch.arange(1 << state_bits) * MULTIPLIER & 0xFFFFFFFF
    product_bytes = torch.stack([(product >> shift) & 0xFF for shift in (0, 8, 16, 24)])
    return ((product_bytes.sum(0) - BYTES_MEAN) / BYTES_DEVIATION).float()


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
    # the funnel shift of a GPU: 64 bits of two neighboring words, shifted right
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


Viterbi = Callable[[Tensor, int, Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""An implementation of the search: ``viterbi`` of this module or of ``trellis_kernel``."""


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
    if tiles > SEARCHED_TILES:
        chunks = []
        for start in range(0, tiles, SEARCHED_TILES):
            rows = slice(start, start + SEARCHED_TILES)
            chunks.append(viterbi(x[rows], width_eighths, table, None if overlap is None else overlap[rows]))
        return torch.cat([chunk[0] for chunk in chunks]), torch.cat([chunk[1] for chunk in chunks])
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
