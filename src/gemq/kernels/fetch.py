"""Copies the codes of chosen experts from pinned host memory to the GPU (``kernels.offload``).

A kernel reads host memory itself. So the choice never goes to the host, nothing waits for it, and a CUDA graph can
contain the copy.

Legend: T tokens, K experts per token, E experts.

Importing this module needs triton. With ``TRITON_INTERPRET=1`` set before, everything runs on the CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gemq.kernels.decode.launch import device_of
from gemq.kernels.triton_types import Pointer, Scalar

BLOCK_UNITS = 1024
"""Units of 16 bytes that a program copies at a time."""

MATRIX_PROGRAMS = 32
"""Programs that copy one matrix. With those of two matrices, enough bytes are on their way to fill the bus."""

MAX_SEARCHED_PAIRS = 1024
"""With more pairs of token and expert, all of the layer's experts are copied: nearly all of them are chosen."""


@triton.jit(do_not_specialize=["pairs", "first_projection"])
def _fetch_kernel(
    index: Pointer,  # [P] int
    fetch_table: Pointer,  # [E, projections x pieces, 3] int64: address, first unit in the pool, units (0: resident)
    pool: Pointer,
    out: Pointer,  # [P] a copy of index, or index itself
    pairs: Scalar,
    experts: Scalar,
    first_projection: Scalar,
    PROJECTIONS: tl.constexpr,
    PADDED_PAIRS: tl.constexpr,
    SEARCH: tl.constexpr,  # whether only chosen experts are copied
    BY_PAIR: tl.constexpr,  # whether a program belongs to a pair; otherwise to an expert
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Grid [P if BY_PAIR else E, projections from the first, PROGRAMS]."""
    unit, program = tl.program_id(0), tl.program_id(2)
    projection = first_projection + tl.program_id(1)
    is_needed = unit >= 0
    expert = unit
    if SEARCH:
        pair = tl.arange(0, PADDED_PAIRS)
        chosen = tl.load(index + pair, mask=pair < pairs, other=-1).to(tl.int32)
        if (unit == 0) & (tl.program_id(1) == 0) & (program == 0):
            tl.store(out + pair, chosen.to(out.dtype.element_ty), mask=pair < pairs)
        if BY_PAIR:
            expert = tl.sum(tl.where(pair == unit, chosen, 0))
            earlier = tl.sum(((chosen == expert) & (pair < unit)).to(tl.int32))
            is_needed = (earlier == 0) & (expert >= 0) & (expert < experts)
        else:
            is_needed = tl.sum((chosen == expert).to(tl.int32)) > 0
    if is_needed:
        row = fetch_table + (expert * PROJECTIONS + projection) * 3
        source = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.int32)), 16)
        target = tl.multiple_of(pool.to(tl.pointer_type(tl.int32)) + tl.load(row + 1) * 4, 16)
        units = tl.load(row + 2)
        word = tl.arange(0, BLOCK * 4)
        for first in range(program * BLOCK, units, PROGRAMS * BLOCK):
            is_inside = word < (units - first) * 4
            words = tl.load(source + (first * 4 + word), mask=is_inside)
            tl.store(target + (first * 4 + word), words, mask=is_inside)


_streams: dict[torch.device, torch.cuda.Stream] = {}
"""For each GPU, the stream that fetches down projections."""

_events: dict[torch.device, torch.cuda.Event] = {}
"""For each GPU, the end of the last such fetch, until ``wait_for_down`` is called."""


def wait_for_down(device: torch.device) -> bool:
    """Let the current stream wait for the codes of down projections, which arrive while gate and up are computed.

    Returns:
        Whether there is anything to wait for. The next kernel must not start before this wait, as it otherwise may
        where GPUs support programmatic dependent launch.
    """
    event = _events.pop(device, None)
    if event is None:
        return False
    torch.cuda.current_stream(device).wait_event(event)
    return True


@torch.library.custom_op("gemq::fetch_codes", mutates_args=())
def fetch_codes(index: Tensor, fetch_table: Tensor, pool: Tensor, overlap: bool) -> Tensor:
    """Copy the codes of the chosen experts to the staging area.

    Its effect on ``pool`` is not declared: a compiler could copy the pool to be safe. The order follows from the result
    instead, which the experts take in place of ``index``. The next layer's index depends on their output.

    Args:
        index: [T, K] experts; indices outside 0 ... E - 1 mark unused slots
        fetch_table: [E, projections x pieces, 3] int64: address in host memory, first unit of 16 bytes in the pool, and
            units; 0 units where an expert is resident or has fewer pieces
        pool: uint8
        overlap: whether the last pieces, of down projections, may arrive later. ``wait_for_down`` waits for them

    Returns:
        A copy of ``index``.
    """
    index = index.contiguous()
    projections = fetch_table.shape[1]
    out = torch.empty_like(index)
    device = pool.device
    with device_of(pool):
        wait_for_down(device)  # it is not called where a kernel failed
        if not overlap or device.type != "cuda":
            _launch(index, out, fetch_table, pool, range(projections))
            return out
        _launch(index, out, fetch_table, pool, range(projections - 1))
        current = torch.cuda.current_stream(device)
        if device not in _streams:
            _streams[device] = torch.cuda.Stream(device)
        side = _streams[device]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            # The copy lives until the down projections have been computed. The index may not.
            _launch(out, out, fetch_table, pool, range(projections - 1, projections))
            event = torch.cuda.Event()
            event.record()
        _events[device] = event
    return out


def _launch(index: Tensor, out: Tensor, fetch_table: Tensor, pool: Tensor, projections: range) -> None:
    """Copy some of the projections of the chosen experts, and the index to ``out``."""
    experts, table_projections, _ = fetch_table.shape
    pairs = index.numel()
    is_searched = pairs <= MAX_SEARCHED_PAIRS
    by_pair = is_searched and pairs <= experts
    if not is_searched:
        out.copy_(index)
    _fetch_kernel[(pairs if by_pair else experts, len(projections), MATRIX_PROGRAMS)](
        index,
        fetch_table,
        pool,
        out,
        pairs,
        experts,
        projections.start,
        PROJECTIONS=table_projections,
        PADDED_PAIRS=triton.next_power_of_2(pairs) if is_searched else 1,
        SEARCH=is_searched,
        BY_PAIR=by_pair,
        BLOCK=BLOCK_UNITS,
        PROGRAMS=MATRIX_PROGRAMS,
        num_warps=8,
    )


@fetch_codes.register_fake
def _(index: Tensor, fetch_table: Tensor, pool: Tensor, overlap: bool) -> Tensor:
    """Return the shape of ``fetch_codes``."""
    return torch.empty_like(index, memory_format=torch.contiguous_format)
