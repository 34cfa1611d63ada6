"""Dequantizes FP8 originals whose matrices end with an incomplete block.

A scale belongs to a block of rows and columns, usually 128 x 128. kv_a_proj_with_mqa of DeepSeek-V3 has 576 rows, or
four and a half blocks. Transformers divides the number of rows by the number of scales, which gives blocks of another
size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize


class BlockDequantize(Fp8Dequantize):
    """``Fp8Dequantize`` for matrices of any shape: the last block of rows or columns may be incomplete."""

    def _dequantize_one(self, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None) -> Tensor:
        """Dequantizes a matrix, or a stack of matrices.

        Args:
            quantized: [..., rows, columns], float8, or int8 with two 4-bit floats each (then half as many columns)
            scales: one number, one per row or stacked matrix, or [..., blocks of rows, blocks of columns]
            output_dtype: of the weights

        Returns:
            Weights [..., rows, columns].

        Raises:
            ValueError: the scales do not fit the codes.
        """
        rows, columns = quantized.shape[-2:]
        codes_per_element = 2 if quantized.dtype == torch.int8 else 1
        if scales.dim() < 2:
            if scales.numel() not in (1, quantized.shape[0]):
                raise ValueError(f"{scales.numel()} scales for codes {list(quantized.shape)}")
            scales = scales.reshape(-1, *[1] * (quantized.dim() - 1)) if scales.numel() > 1 else scales.reshape(1, 1)
        block_rows, block_columns = scales.shape[-2:]
        block_size = getattr(self.hf_quantizer.quantization_config, "weight_block_size", None) or (None, None)
        height = _block_size(rows, block_rows, block_size[0])
        width = _block_size(columns * codes_per_element, block_columns, block_size[1])
        padded_rows = height * block_rows
        padded_columns = width * block_columns // codes_per_element
        if (padded_rows, padded_columns) == (rows, columns):
            return super()._dequantize_one(quantized, scales, output_dtype)
        padded = quantized.new_zeros(*quantized.shape[:-2], padded_rows, padded_columns)
        padded[..., :rows, :columns] = quantized
        weights = super()._dequantize_one(padded, scales, output_dtype)
        return weights[..., :rows, : columns * codes_per_element].contiguous()


def _block_size(length: int, num_blocks: int, configured: int | None) -> int:
    """Returns the size of a block along a dimension.

    Args:
        length: number of weights along the dimension
        num_blocks: number of scales along the dimension
        configured: block size in config.json
    """
    if num_blocks == 1:
        return length
    if configured and num_blocks == math.ceil(length / configured):
        return configured
    if num_blocks == 0 or length % num_blocks:
        raise ValueError(f"{num_blocks} scales for a dimension of {length}, with blocks of {configured}")
    return length // num_blocks


def use_block_dequantize(weight_mapping: Iterable[Any] | None) -> None:
    """Replaces ``Fp8Dequantize`` in the weight converters of a model."""
    for converter in weight_mapping or ():
        for index, operation in enumerate(getattr(converter, "operations", ())):
            if type(operation) is Fp8Dequantize:
                converter.operations[index] = BlockDequantize(operation.hf_quantizer)
