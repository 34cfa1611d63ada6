"""The rotation of the inputs of matrices with trellis codes.

Blocks of up to 128 inputs are multiplied by fixed signs and a Hadamard matrix. A rotated row of a weight matrix looks
like Gaussian numbers of one variance, which is what trellis codes are made for (incoherence: Tseng et al., "QuIP#",
arXiv:2402.04396, section 3). The rotation is the same for all matrices, so that a token is rotated once for all
experts. Outputs are not rotated: with one scale per row that gained nothing (docs/lab-log.md, entry 51).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from gemq.quant.widths import ROTATION_SIDE

SIGN_BITS = 0x07158AB795F381835B6913CD87684F34
"""Signs of the inputs of a block, from the lowest bit on: 1 is negative. Without signs, the mean of 128 inputs would
become one large input.
"""


def block_side(columns: int) -> int:
    """Return the side of the blocks for a number of inputs: the largest power of two up to 128 that divides it."""
    return math.gcd(columns, ROTATION_SIDE)


@functools.lru_cache(maxsize=32)
def block_matrix(side: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a block [side, side]: the orthogonal matrix B with B x = Hadamard(signs * x) / sqrt(side)."""
    matrix = torch.ones(1, 1)
    while len(matrix) < side:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    signs = torch.tensor([1.0 - 2 * (SIGN_BITS >> index & 1) for index in range(side)])
    return (matrix * signs / side**0.5).to(device, dtype)


def rotate(x: Tensor) -> Tensor:
    """Rotate the last dimension: B x for inputs, and W B^T for a matrix W.

    Args:
        x: [..., columns], a float dtype.

    Returns:
        Same shape and dtype.
    """
    side = block_side(x.shape[-1])
    matrix = block_matrix(side, x.device, x.dtype)
    return (x.unflatten(-1, (-1, side)) @ matrix.T).flatten(-2)


def rotate_back(x: Tensor) -> Tensor:
    """Return the inverse of ``rotate``. It turns a rotated matrix V into V B."""
    side = block_side(x.shape[-1])
    matrix = block_matrix(side, x.device, x.dtype)
    return (x.unflatten(-1, (-1, side)) @ matrix).flatten(-2)


def rotate_hessian(hessian: Tensor) -> Tensor:
    """Return B H B^T for Hessians H [..., C, C] of inputs."""
    return rotate(rotate(hessian).mT).mT
