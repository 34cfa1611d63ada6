"""The Viterbi algorithm of trellis codes on a GPU. The reference is ``trellis.viterbi``.

One Triton program runs all steps of one tile forward. The costs of its 2^L states stay in registers. Only the minima
over predecessors pass through shared memory, and which predecessor won goes bit-packed to a buffer in global memory. A
second kernel follows the winners backwards with one thread for each tile, which hides the latency of its reads.

Shapes: T tiles, N weights of a tile, S = 2^L states.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemq.quant.trellis import PERIOD, SEARCH_BYTES, UNREACHABLE

STATES_PER_THREAD = 32
"""Costs and values of this many states take 64 registers of a thread. Four of the states are neighbors."""

BACKWARD_TILES = 32
"""Tiles of a program that follows the winners."""

PREDECESSOR_MASK = -16
"""Clears the bits of a cost that name the predecessor. There are at most 16."""

_PERIOD, _UNREACHABLE = tl.constexpr(PERIOD), tl.constexpr(UNREACHABLE)


@triton.jit
def _advance(cost, weight, values, winners, predecessor_mask, S: tl.constexpr, STEP: tl.constexpr):
    """Process one weight that adds ``STEP`` bits.

    Args:
        cost: [S] float32, not negative.
        weight: Scalar float32.
        values: [S] float32, value of each state.
        winners: Pointer to the S / 32 words of this step.
        predecessor_mask: See ``_forward_kernel``.
        S: Number of states.
        STEP: New bits.

    Returns:
        New costs.
    """
    FOLLOWERS: tl.constexpr = 1 << STEP
    Q: tl.constexpr = S // FOLLOWERS
    # A word of 16 bits has the winners of four neighbors, and at one or two bits of those half or a quarter of Q away.
    # All of them are in the same thread.
    FAR: tl.constexpr = 4 // STEP if STEP <= 2 else 1
    WORDS: tl.constexpr = Q // FAR // 4
    # the lowest bits of a cost name the predecessor, so that one minimum finds both
    ranked = tl.reshape(cost.to(tl.int32, bitcast=True), [FOLLOWERS, Q])
    ranked = (ranked & predecessor_mask) | tl.arange(0, FOLLOWERS)[:, None]
    minimum = tl.min(ranked, 0)
    winner = tl.reshape(minimum & (FOLLOWERS - 1), [FAR, WORDS, 4])
    winner = winner << (STEP * tl.arange(0, 4))[None, None, :]
    winner = winner << (4 * STEP * tl.arange(0, FAR))[:, None, None]
    tl.store(winners + tl.arange(0, WORDS), tl.sum(tl.sum(winner, 2), 0).to(tl.int16))
    difference = weight - values
    error = tl.reshape(difference * difference, [Q, FOLLOWERS])
    return tl.reshape(minimum.to(tl.float32, bitcast=True)[:, None] + error, [S])


@triton.jit
def _forward_kernel(
    x,  # [T, N] float32
    table,  # [S] float32
    overlaps,  # [T] int32, unused without CONSTRAINED
    winners,  # [T, N, S / 32] int16
    last_states,  # [T] int32
    totals,  # [T] float32
    periods,  # N / 8
    predecessor_mask,  # known at run time only, so that one instruction applies it together with a constant
    EIGHTHS: tl.constexpr,
    CONSTRAINED: tl.constexpr,
    S: tl.constexpr,
):
    """Run all steps of one tile forward, and choose its last state."""
    WORDS: tl.constexpr = S // 32
    tile = tl.program_id(0).to(tl.int64)
    state = tl.arange(0, S)
    values = tl.load(table + state)
    cost = tl.zeros([S], tl.float32)
    if CONSTRAINED:
        shared_bits = state & ((S >> EIGHTHS // 8) - 1)
        cost = tl.where(shared_bits == tl.load(overlaps + tile), 0.0, _UNREACHABLE)
    x += tile * (periods * _PERIOD)
    winners += tile * (periods * _PERIOD) * WORDS
    for _ in range(periods):
        for index in tl.static_range(8):
            cost = _advance(
                cost,
                tl.load(x + index),
                values,
                winners + index * WORDS,
                predecessor_mask,
                S,
                (index + 1) * EIGHTHS // 8 - index * EIGHTHS // 8,
            )
        x += _PERIOD
        winners += _PERIOD * WORDS
    if CONSTRAINED:
        # the predecessors of the first weight, as in ``_advance``, of which only those with the right bits count
        STEP: tl.constexpr = EIGHTHS // 8
        Q: tl.constexpr = S >> STEP
        ranked = tl.reshape(cost.to(tl.int32, bitcast=True), [1 << STEP, Q])
        minimum = tl.min((ranked & predecessor_mask) | tl.arange(0, 1 << STEP)[:, None], 0)
        overlap = tl.load(overlaps + tile)
        best = tl.min(tl.where(tl.arange(0, Q) == overlap, minimum, 0x7FFFFFFF), 0)
        total = (best & predecessor_mask).to(tl.float32, bitcast=True)
        last_state = (best & ((1 << STEP) - 1)) * Q + overlap
    else:
        total = tl.min(cost, 0)
        last_state = tl.min(tl.where(cost == total, state, S), 0)
    tl.store(totals + tile, total)
    tl.store(last_states + tile, last_state)


@triton.jit
def _follow(state, winners, S: tl.constexpr, STEP: tl.constexpr):
    """Return the predecessors of states [TILES], whose weight added ``STEP`` bits.

    Args:
        state: [TILES] int32.
        winners: [TILES] pointers to the S / 32 words of this weight, written by ``_advance``.
        S: Number of states.
        STEP: New bits.
    """
    Q: tl.constexpr = S // (1 << STEP)
    FAR: tl.constexpr = 4 // STEP if STEP <= 2 else 1
    WORDS: tl.constexpr = Q // FAR // 4
    shared_bits = state >> STEP
    near_index, far_index = shared_bits % 4, shared_bits // (4 * WORDS)
    word = tl.load(winners + shared_bits // 4 % WORDS).to(tl.int32)
    winner = (word >> (STEP * (near_index + 4 * far_index))) & ((1 << STEP) - 1)
    return winner * Q + shared_bits


@triton.jit
def _backward_kernel(
    winners,  # [T, N, S / 32] int16
    last_states,  # [T] int32
    states,  # [T, N] int32
    tiles,
    periods,  # N / 8
    EIGHTHS: tl.constexpr,
    S: tl.constexpr,
    TILES: tl.constexpr,
):
    """Follow the winners of ``TILES`` tiles from their last states to the first."""
    WORDS: tl.constexpr = S // 32
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    mask = tile < tiles
    tile = tl.where(mask, tile, 0)
    state = tl.load(last_states + tile)
    end = (tile.to(tl.int64) + 1) * (periods * _PERIOD)
    winners += end * WORDS
    states += end
    for _ in range(periods):
        winners -= _PERIOD * WORDS
        states -= _PERIOD
        for reversed_index in tl.static_range(8):
            tl.store(states + (7 - reversed_index), state, mask=mask)
            state = _follow(
                state,
                winners + (7 - reversed_index) * WORDS,
                S,
                (8 - reversed_index) * EIGHTHS // 8 - (7 - reversed_index) * EIGHTHS // 8,
            )


def viterbi(x: Tensor, width_eighths: int, table: Tensor, overlap: Tensor | None) -> tuple[Tensor, Tensor]:
    """Find the sequences of states with the smallest squared error: see ``trellis.viterbi``.

    Args:
        x: [T, N] float32, weights in units of the table.
        width_eighths: Width in eighths of a bit.
        table: [S] float32.
        overlap: [T] integers, or None.

    Returns:
        States [T, N] int32 and the sum of squared errors [T] float32.
    """
    tiles, weights = x.shape
    size = len(table)
    words = max(1, size // 32)
    x, table = x.contiguous(), table.contiguous()
    states = torch.empty(tiles, weights, dtype=torch.int32, device=x.device)
    totals = torch.empty(tiles, device=x.device)
    overlaps = states if overlap is None else overlap.to(torch.int32)
    chunk = max(1, min(tiles, SEARCH_BYTES // (2 * weights * words)))
    winners = torch.empty(chunk, weights, words, dtype=torch.int16, device=x.device)
    last_states = torch.empty(chunk, dtype=torch.int32, device=x.device)
    warps = max(1, min(32, size // (32 * STATES_PER_THREAD)))
    for start in range(0, tiles, chunk):
        count = min(chunk, tiles - start)
        _forward_kernel[(count,)](
            x[start:],
            table,
            overlaps[start:],
            winners,
            last_states,
            totals[start:],
            weights // PERIOD,
            PREDECESSOR_MASK,
            EIGHTHS=width_eighths,
            CONSTRAINED=overlap is not None,
            S=size,
            num_warps=warps,
        )
        _backward_kernel[(triton.cdiv(count, BACKWARD_TILES),)](
            winners,
            last_states,
            states[start:],
            count,
            weights // PERIOD,
            EIGHTHS=width_eighths,
            S=size,
            TILES=BACKWARD_TILES,
            num_warps=1,
        )
    return states, totals
