"""Computing with packed weights. This is the one place that chooses a kernel.

``reference`` is plain PyTorch, runs everywhere and is the truth for tests. ``packed`` holds the modules.
Neither knows Transformers or how checkpoints come about.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gemq.kernels import reference

if TYPE_CHECKING:
    from gemq.kernels.packed import PackedExperts, PackedLinear


def experts_forward(module: PackedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Routed experts: [T, H] hidden states, [T, K] expert indices and routing weights -> [T, H]."""
    return reference.experts_forward(module, hidden, top_k_index, top_k_weights)


def linear_forward(module: PackedLinear, x: Tensor) -> Tensor:
    """[..., columns] -> [..., rows]."""
    return reference.linear_forward(module, x)
