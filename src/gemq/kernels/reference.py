"""Packed experts and linears in plain PyTorch. Every other kernel is tested against this module.

Legend: T tokens, K experts per token, H hidden size, E experts.

Numerics: a matrix is dequantized in float32 and rounded once to the activations' dtype. Matrix products, gate and the
sum over experts (ascending expert index, in the activations' dtype) are those of Transformers' eager experts. Outputs
therefore equal those of the dequantized model bit for bit, except that nemotron_h sums in the routing weights' dtype.
A token uses an expert at most once, so the sum is deterministic.

Gradients flow to activations, biases and routing weights, not to packed matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gemq.kernels.expert_inputs import first_matrix_name
from gemq.runtime.compat import transformers_private

if TYPE_CHECKING:
    from gemq.kernels.modules import PackedExperts, PackedLinear

Dequantize = Callable[[torch.dtype], Tensor]
ExpertProduct = Callable[[str, int, Tensor], Tensor]
"""Product of an expert's matrix and its input, from the projection's name, the expert's index and the input."""


class _DequantizedLinear(torch.autograd.Function):
    """``F.linear`` that dequantizes again in backward.

    Plain autograd would keep the full-precision matrix of every chosen expert in memory until backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, dequantize: Dequantize) -> Tensor:
        """Multiply x [..., columns] with the dequantized matrix, and add the bias."""
        ctx.dequantize = dequantize
        ctx.bias_dtype = None if bias is None else bias.dtype
        return F.linear(x, dequantize(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients of x and the bias."""
        needs_x, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad @ ctx.dequantize(grad.dtype) if needs_x else None
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if needs_bias else None
        return grad_x, grad_bias, None


def dequantized_product(x: Tensor, dequantize: Dequantize) -> Tensor:
    """Multiply x [..., columns] with the matrix that ``dequantize`` returns, which backward dequantizes again."""
    return _DequantizedLinear.apply(x, None, dequantize)


def _expert_product(module: PackedExperts, projection: str, expert: int, x: Tensor) -> Tensor:
    """Multiply x with one expert's dequantized matrix."""
    return dequantized_product(x, partial(getattr(module, projection).dequantize, expert))


def experts_forward(
    module: PackedExperts,
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    product: ExpertProduct | None = None,
) -> Tensor:
    """Run a layer's routed experts one at a time. Only chosen experts are dequantized.

    Args:
        module: packed experts of one layer
        hidden: [T, H]
        top_k_index: [T, K] int; indices outside 0 ... E - 1 mark unused pairs and are skipped
        top_k_weights: [T, K]
        product: replaces the product with an expert's matrix

    Returns:
        [T, H] in hidden's dtype.
    """
    product = product or partial(_expert_product, module)
    up_name = first_matrix_name(module)
    up_bias = getattr(module, f"{up_name}_bias") if module.has_bias else None
    chosen = top_k_index.T  # [K, T]: the row order of eager's products
    out = torch.zeros_like(hidden)
    for expert in torch.unique(chosen).tolist():
        if not 0 <= expert < module.down_proj.num_experts:
            continue
        slot, token = torch.where(chosen == expert)
        y = product(up_name, expert, hidden[token])
        if up_bias is not None:
            y = y + up_bias[expert]
        y = transformers_private.expert_activation(module)(y)
        y = product("down_proj", expert, y)
        if module.has_bias:
            y = y + module.down_proj_bias[expert]
        if getattr(module, "has_post_expert_norm", False):  # absent before Transformers 5.23
            y = module.post_expert_norm(y)
        y = y * top_k_weights[token, slot, None]
        out.index_add_(0, token, y.to(out.dtype))
    return out


def linear_forward(module: PackedLinear, x: Tensor) -> Tensor:
    """Run a packed linear: [..., columns] -> [..., rows] in x's dtype.

    Product and bias are rounded once, as in nn.Linear.
    """
    return _DequantizedLinear.apply(x, module.bias, module.dequantize)
