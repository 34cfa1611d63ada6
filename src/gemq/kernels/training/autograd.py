"""Gradients through the inference kernels.

Forward runs a kernel. Backward differentiates the reference, which dequantizes again, so that no dequantized matrix is
kept from forward to backward. Trellis codes are decoded by a kernel, which is many times faster. Scales and offsets get
no gradients here; distillation trains them through ``differentiable_dequantize``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gemq.kernels import reference
from gemq.kernels.trellis.dense import dequantize_expert
from gemq.kernels.trellis.experts import TrellisMatrices

if TYPE_CHECKING:
    from gemq.kernels.modules import PackedExperts, PackedLinear


class _KernelWithReferenceGradient(torch.autograd.Function):
    """``kernel(*inputs)`` with the gradients of ``reference_function(*inputs)``.

    Both functions hold the module. Its parameters follow the inputs in ``tensors`` and are passed to neither.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Callable, reference_function: Callable, num_inputs: int, *tensors: Tensor) -> Tensor:
        """Run the kernel on the inputs."""
        ctx.reference_function, ctx.num_inputs = reference_function, num_inputs
        ctx.save_for_backward(*tensors)
        return kernel(*tensors[:num_inputs])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Run the reference on the inputs and differentiate it."""
        needs_grad = ctx.needs_input_grad[3:]
        inputs, parameters = ctx.saved_tensors[: ctx.num_inputs], ctx.saved_tensors[ctx.num_inputs :]
        inputs = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs_grad, strict=False)]
        # The reference reads the parameters from the module, so they are differentiated without a copy.
        variables = [*inputs, *parameters]
        with torch.enable_grad():
            out = ctx.reference_function(*inputs)
        differentiated = [x for x, need in zip(variables, needs_grad, strict=True) if need]
        gradients = iter(torch.autograd.grad(out, differentiated, grad, allow_unused=True))
        return (None, None, None, *(next(gradients) if need else None for need in needs_grad))


def _decoded_product(module: PackedExperts, projection: str, expert: int, x: Tensor) -> Tensor:
    """Multiply x with one expert's matrix, whose trellis codes a kernel decodes."""
    return reference.dequantized_product(x, partial(dequantize_expert, getattr(module, projection), expert))


def experts_with_grad(
    forward: Callable, module: PackedExperts, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Run ``forward(module, hidden, top_k_index, top_k_weights)``, differentiable in all but the indices.

    Args:
        forward: ``experts_forward`` of a kernel module
        module: packed experts, whose parameters get gradients, too
        hidden: [T, H]
        top_k_index: [T, K]
        top_k_weights: [T, K]

    Returns:
        [T, H]
    """
    product = partial(_decoded_product, module) if isinstance(module.down_proj, TrellisMatrices) else None
    return _KernelWithReferenceGradient.apply(
        lambda x, weights: forward(module, x, top_k_index, weights),
        lambda x, weights: reference.experts_forward(module, x, top_k_index, weights, product),
        2,
        hidden,
        top_k_weights,
        *module.parameters(),
    )


def linear_with_grad(forward: Callable, module: PackedLinear, x: Tensor) -> Tensor:
    """Run ``forward(module, x)``, differentiable in x and the bias."""
    return _KernelWithReferenceGradient.apply(
        lambda x: forward(module, x),
        lambda x: reference.linear_forward(module, x),
        1,
        x,
        *module.parameters(),
    )
