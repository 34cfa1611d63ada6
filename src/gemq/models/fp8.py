"""Dequantizing FP8 originals whose matrices end in a part of a block.

A scale stands for a block of rows and columns, usually of 128 x 128 weights. DeepSeek-V3's kv_a_proj_with_mqa has 576
rows: four and a half blocks. Transformers divides the rows by the rows of scales, which gives blocks of another size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize


class BlockDequantize(Fp8Dequantize):
    """``Fp8Dequantize`` for matrices of any shape: the last block of rows or of columns may be smaller."""

    def _dequantize_one(self, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None) -> Tensor:
        """[..., rows, columns] codes and their scales -> weights of the same shape.

        Args:
            quantized: float8, or int8 with two 4-bit floats each: then there are half as many columns of codes.
            scales: one number, one for each row or stacked matrix, or [..., blocks of rows, blocks of columns].
            output_dtype: of the weights.

        Raises:
            ValueError: the scales do not fit the codes.
        """
        rows, columns = quantized.shape[-2:]
        packed = 2 if quantized.dtype == torch.int8 else 1
        if scales.dim() < 2:
            if scales.numel() not in (1, quantized.shape[0]):
                raise ValueError(f"{scales.numel()} scales for codes {list(quantized.shape)}")
            scales = scales.reshape(-1, *[1] * (quantized.dim() - 1)) if scales.numel() > 1 else scales.reshape(1, 1)
        block = getattr(self.hf_quantizer.quantization_config, "weight_block_size", None) or (None, None)
        height = _block_size(rows, scales.shape[-2], block[0])
        width = _block_size(columns * packed, scales.shape[-1], block[1])
        padded = height * scales.shape[-2], width * scales.shape[-1] // packed
        if padded == (rows, columns):
            return super()._dequantize_one(quantized, scales, output_dtype)
        whole = quantized.new_zeros(*quantized.shape[:-2], *padded)
        whole[..., :rows, :columns] = quantized
        return super()._dequantize_one(whole, scales, output_dtype)[..., :rows, : columns * packed].contiguous()


def _block_size(length: int, blocks: int, configured: int | None) -> int:
    """Weights in one block along a dimension of ``length`` that has this many ``blocks``."""
    if blocks == 1:
        return length
    if configured and blocks == -(-length // configured):
        return configured
    if blocks == 0 or length % blocks:
        raise ValueError(f"{blocks} scales for a dimension of {length}, with blocks of {configured}")
    return length // blocks


def use_block_dequantize(weight_mapping: Iterable[Any] | None) -> None:
    """Replaces ``Fp8Dequantize`` in a model's converters."""
    for converter in weight_mapping or ():
        for place, operation in enumerate(getattr(converter, "operations", ())):
            if type(operation) is Fp8Dequantize:
                converter.operations[place] = BlockDequantize(operation.hf_quantizer)
