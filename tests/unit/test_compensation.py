"""Weights that make up for a change of their inputs."""

from __future__ import annotations

import torch

from gemq.quant.compensation import ChangeAccumulator, compensate
from gemq.quant.hessian import HessianAccumulator


def test_outputs_are_those_of_least_squares():
    """Two matrices with different numbers of tokens, in two batches of rows, of which the last belong to no matrix."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 5, 8, generator=generator)
    hessians, changes = HessianAccumulator(2, 8, torch.device("cpu")), ChangeAccumulator(2, 8, torch.device("cpu"))
    rows: list[list[torch.Tensor]] = [[], []]
    for counts in ((30, 50), (40, 20)):
        original = torch.randn(sum(counts) + 3, 8, generator=generator)
        changed = original + 0.3 * torch.randn(original.shape, generator=generator)
        ends = torch.tensor(counts).cumsum(0)
        hessians.add(changed, ends)
        changes.add(changed, original - changed, ends)
        for index, (x, y) in enumerate(zip(original[:-3].split(counts), changed[:-3].split(counts), strict=True)):
            rows[index].append(torch.cat([x, y], 1))
    hessians.finish()
    mean_change = changes.sums / hessians.num_rows(0.0)
    result = compensate(weight, hessians.hessians(0.0), mean_change, 1e-6)
    for index in range(2):
        original, changed = torch.cat(rows[index]).chunk(2, 1)
        expected = torch.linalg.lstsq(changed, original @ weight[index].T).solution.T
        torch.testing.assert_close(result[index], expected, rtol=1e-3, atol=1e-3)
