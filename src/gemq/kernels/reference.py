"""Packed experts and linears in plain PyTorch: the truth that every other kernel is tested against.

Legend: T tokens, K experts per token, H hidden size, E experts.

Numerics: a matrix is dequantized in float32 and rounded once to the activations' dtype; matrix products,
gate and the sum over experts (ascending expert index, in the activations' dtype) are those of Transformers'
eager experts, so that outputs equal those of the dequantized model bit for bit (nemotron_h alone sums in
the routing weights' dtype). A token meets an expert once, so the sum is deterministic. Knows autograd only
as far as activations, biases and routing weights need it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

if TYPE_CHECKING:
    from gemq.kernels.modules import PackedExperts, PackedLinear

Dequantize = Callable[[torch.dtype], Tensor]
Product = Callable[[str, int, Tensor], Tensor]


class _DequantizedLinear(torch.autograd.Function):
    """``F.linear`` that dequantizes again in backward.

    Plain autograd would keep every chosen expert's full-precision matrix alive until backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, dequantize: Dequantize) -> Tensor:
        ctx.dequantize = dequantize
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, dequantize(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        needs_x, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad @ ctx.dequantize(grad.dtype) if needs_x else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if needs_bias else None
        return grad_x, grad_bias, None


def _product(module: PackedExperts, projection: str, expert: int, x: Tensor) -> Tensor:
    return _DequantizedLinear.apply(x, None, partial(getattr(module, projection).dequantize, expert))


def experts_forward(
    module: PackedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor, product: Product | None = None
) -> Tensor:
    """hidden [T, H], top_k_index [T, K] int, top_k_weights [T, K] -> [T, H] in hidden's dtype.

    Only chosen experts are dequantized, one at a time. Indices outside 0 ... E - 1 mark unused slots and are skipped.
    product: takes the place of the product with an expert's matrix, given its projection, number and input
    """
    product = product or partial(_product, module)
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    up_bias = (module.gate_up_proj_bias if module.has_gate else module.up_proj_bias) if module.has_bias else None
    chosen = top_k_index.T  # [K, T]: rows of a product in eager's order
    out = torch.zeros_like(hidden)
    for e in torch.unique(chosen).tolist():
        if not 0 <= e < module.down_proj.num_experts:
            continue
        slot, token = torch.where(chosen == e)
        y = product(up_name, e, hidden[token])
        if up_bias is not None:
            y = y + up_bias[e]
        y = module._apply_gate(y) if module.has_gate else module.act_fn(y)
        y = product("down_proj", e, y)
        if module.has_bias:
            y = y + module.down_proj_bias[e]
        if getattr(module, "has_post_expert_norm", False):  # absent before Transformers 5.23
            y = module.post_expert_norm(y)
        y = y * top_k_weights[token, slot, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out


def linear_forward(module: PackedLinear, x: Tensor) -> Tensor:
    """[..., columns] -> [..., rows] in x's dtype. Product and bias are rounded once, as in nn.Linear."""
    return _DequantizedLinear.apply(x, module.bias, module.dequantize)
