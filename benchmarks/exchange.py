"""The end of a layer's experts on one GPU or two: one launch adds up their shares, the other GPU's and the residual.

A GPU writes its sum straight into the other's memory (symmetric memory, over NVLink) and looks for the other's in its
own. Each number travels with the count of sums so far in one word of 64 bits, which arrives whole: nothing else has to
be waited for, and no number of an earlier sum can be taken for this one's. Two boxes take turns: a GPU that writes into
one has received the other's last sum, so that the other has read what was in it before.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PROGRAMS, WARPS = 16, 4


@triton.jit
def _end_kernel(
    shares,  # [S, H] float32
    residual,  # [H] bfloat16
    out,  # [H] bfloat16
    theirs,  # [2, H] int64: the other GPU's boxes
    ours,  # [2, H] int64
    counts,  # [PROGRAMS] int32: sums so far, and one
    columns,
    S: tl.constexpr,
    TWO: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    column = program * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    gdc_wait()
    total = tl.zeros([BLOCK], tl.float32)
    for s in tl.static_range(S):
        total += tl.load(shares + s * columns + column, mask=inside, other=0.0)
    residual_values = tl.load(residual + column, mask=inside, other=0.0).to(tl.float32)
    if TWO:
        count = tl.load(counts + program)
        box = (count & 1) * columns + column
        word = (total.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF) | (count.to(tl.int64) << 32)
        tl.store(theirs + box, word, mask=inside)
        received = tl.load(ours + box, mask=inside, other=0, volatile=True)
        missing = tl.max((inside & ((received >> 32) != count)).to(tl.int32))
        while missing > 0:
            received = tl.load(ours + box, mask=inside, other=0, volatile=True)
            missing = tl.max((inside & ((received >> 32) != count)).to(tl.int32))
        total += (received & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(counts + program, count + 1)
    gdc_launch_dependents()
    y = total.to(out.dtype.element_ty).to(tl.float32)  # as the experts' output is rounded
    tl.store(out + column, (residual_values + y).to(out.dtype.element_ty), mask=inside)


class End:
    """Ends layers of ``columns`` hidden numbers. With two ranks both make one, and call it as often."""

    def __init__(self, columns: int, device: torch.device):
        self.columns, self.two = columns, dist.is_initialized()
        self.counts = torch.ones(PROGRAMS, dtype=torch.int32, device=device)
        self.ours = self.theirs = self.counts
        if self.two:
            import torch.distributed._symmetric_memory as symmetric

            self.ours = symmetric.empty(2, columns, dtype=torch.int64, device=device).zero_()
            world = dist.group.WORLD
            assert world is not None
            group = symmetric.rendezvous(self.ours, world)
            self.theirs = group.get_buffer(1 - dist.get_rank(), (2, columns), torch.int64)
            torch.cuda.synchronize()
            dist.barrier()

    def __call__(self, residual: Tensor, shares: Tensor) -> Tensor:
        """residual [1, H] bfloat16 and shares [1, S, H] float32 -> [1, H] bfloat16."""
        out = torch.empty_like(residual)
        _end_kernel[(PROGRAMS,)](
            *(shares, residual, out, self.theirs, self.ours, self.counts, self.columns),
            S=shares.shape[1],
            TWO=self.two,
            BLOCK=triton.next_power_of_2(triton.cdiv(self.columns, PROGRAMS)),
            num_warps=WARPS,
            launch_pdl=True,
        )
        return out
