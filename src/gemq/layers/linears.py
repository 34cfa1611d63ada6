"""Quantization of a layer's dense linears: those outside routed experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gemq.calibration.activations import LinearHessians
from gemq.errors import UserError
from gemq.layers.layer_training import QuantizedParameter
from gemq.layers.quantizer import Quantizer
from gemq.models.replay import Replay
from gemq.models.structure import Linear
from gemq.quant.grid import LARGEST_SCALE, LAST_SCALE, below_scales, dequantize
from gemq.quant.hessian import HessianAccumulator
from gemq.quant.packing import PackedMatrix
from gemq.quant.stored_matrix import StoredMatrix
from gemq.quant.trainable_gpu import soft_code_dtype
from gemq.quant.widths import Width
from gemq.runtime.ranks import Ranks


@dataclass
class QuantizedLinears:
    """Dense linears on their grids, by module path.

    Attributes:
        packed: Batches of one matrix, [1, ...].
        soft_codes: Codes before rounding, [1, R, C]; empty if they were not requested.
        retries: Number of Hessians that needed more dampening.
        small: Number of matrices whose weights are below the smallest scale.
    """

    packed: dict[str, PackedMatrix] = field(default_factory=dict)
    soft_codes: dict[str, Tensor] = field(default_factory=dict)
    retries: int = 0
    small: int = 0

    def update(self, linears: QuantizedLinears) -> None:
        """Add further linears."""
        self.packed.update(linears.packed)
        self.soft_codes.update(linears.soft_codes)
        self.retries += linears.retries
        self.small += linears.small


def quantize_linears(
    replay: Replay,
    linears: Sequence[Linear],
    hessians: LinearHessians,
    quantizer: Quantizer,
    width: Width | None,
    with_soft_codes: bool = False,
) -> QuantizedLinears:
    """Quantize dense linears. Linears with the same input are one batch, and ranks take turns with the batches.

    Args:
        replay: The model, and the ranks that share the work.
        linears: Linears of one layer.
        hessians: Of their inputs.
        quantizer: Settings.
        width: Width of all of them. None leaves them unquantized.
        with_soft_codes: Also return the codes before rounding, from which training starts.
    """
    ranks = replay.ranks
    result = QuantizedLinears()
    if width is None:
        return result
    for linear in linears:
        result.small += below_scales(_weight(replay, linear).unsqueeze(0))
    for index, batch in enumerate(_linears_by_input(linears, hessians, replay.device)):
        if index % ranks.count == ranks.rank:
            quantized = _quantize_batch(
                replay, batch, hessians.by_path[batch[0].path], quantizer, width, with_soft_codes
            )
            result.update(quantized)
    return _all_gather(ranks, linears, width, result)


def _linears_by_input(linears: Sequence[Linear], hessians: LinearHessians, device: torch.device) -> list[list[Linear]]:
    """Group linears that receive the same tensor: those that share a Hessian."""
    batches: dict[int, list[Linear]] = {}
    for linear in linears:
        if linear.path not in hessians.by_path:  # in a branch that no calibration token reached
            hessians.by_path[linear.path] = HessianAccumulator(1, linear.columns, device)
        batches.setdefault(id(hessians.by_path[linear.path]), []).append(linear)
    return list(batches.values())


def _quantize_batch(
    replay: Replay,
    batch: list[Linear],
    hessian: HessianAccumulator,
    quantizer: Quantizer,
    width: Width,
    with_soft_codes: bool,
) -> QuantizedLinears:
    """Quantize linears with one input as one matrix, since rows do not depend on each other."""
    weights = [_weight(replay, linear) for linear in batch]
    weight = torch.cat(weights).unsqueeze(0)
    soft_codes = None
    if with_soft_codes:
        dtype = soft_code_dtype(weight.device, weight.dtype)
        soft_codes = weight.new_empty(1, *weight.shape, dtype=dtype)
    q, retries = quantizer.quantize_all(weight, hessian, (width,), soft_codes, shrinkage=0.0)
    result = QuantizedLinears(retries=retries)
    start = 0
    for linear, rows in zip(batch, map(len, weights), strict=True):
        stop = start + rows
        matrix = q.select((0, slice(None), slice(start, stop)))
        packed = PackedMatrix.pack(matrix, width)
        refuse_clipped([linear.path], [packed])
        result.packed[linear.path] = packed
        if soft_codes is not None:
            result.soft_codes[linear.path] = soft_codes[0, :, start:stop].contiguous()
        start = stop
    return result


def _weight(replay: Replay, linear: Linear) -> Tensor:
    """Return the weight [R, C] of a linear, outside autograd."""
    weight: Tensor = replay.model.get_submodule(linear.path).weight
    return weight.detach()


_FIELDS = (*PackedMatrix.FIELDS, "soft_codes")
"""Names of a quantized linear's tensors when ranks exchange them."""


def _all_gather(ranks: Ranks, linears: Sequence[Linear], width: Width, local: QuantizedLinears) -> QuantizedLinears:
    """Combine the linears that each rank has quantized, in one exchange of tensors by name."""
    if ranks.count == 1:
        return local
    local_tensors = {f"{path}.soft_codes": codes for path, codes in local.soft_codes.items()}
    for path, packed in local.packed.items():
        local_tensors.update(packed.named(path))
    names = [f"{linear.path}.{field_name}" for linear in linears for field_name in _FIELDS]
    result = QuantizedLinears(small=local.small)
    tensors: dict[str, Tensor] = {}
    for received, (retries,) in ranks.all_gather_tensors([local_tensors.get(name) for name in names], [local.retries]):
        result.retries += retries
        for name, tensor in zip(names, received, strict=True):
            if tensor is not None:
                tensors[name] = tensor.clone()  # the exchange's buffer is one tensor
    for linear in linears:
        result.packed[linear.path] = PackedMatrix.from_tensors(tensors, linear.path, width)
        if f"{linear.path}.soft_codes" in tensors:
            result.soft_codes[linear.path] = tensors[f"{linear.path}.soft_codes"]
    return result


def linear_parameters(linears: Sequence[Linear], quantized: QuantizedLinears) -> list[QuantizedParameter]:
    """Return quantized dense linears as parameters to train. They need their soft codes."""
    parameters = []
    for linear in linears:
        packed, soft_codes = quantized.packed[linear.path], quantized.soft_codes[linear.path]
        parameters.append(QuantizedParameter(f"{linear.path}.weight", (packed.width,), packed.unpack(), soft_codes))
    return parameters


def install_linears(model: Any, linears: Sequence[Linear], packed: dict[str, PackedMatrix]) -> None:
    """Overwrite the weights of dense linears with their dequantized codes."""
    for linear in linears:
        weight = model.get_submodule(linear.path).weight
        weight.data.copy_(dequantize(packed[linear.path].unpack()).reshape(weight.shape))


def refuse_clipped(names: Sequence[str], packed: Iterable[StoredMatrix]) -> None:
    """Refuse matrices with weights beyond the largest scale, which would be clipped.

    Args:
        names: Names of the matrices.
        packed: Batches of these matrices, at one or more widths.

    Raises:
        UserError: Names the first such matrix.
    """
    clipped_by_width = [(matrices.scales == LAST_SCALE).flatten(1).any(1) for matrices in packed]
    clipped = torch.stack(clipped_by_width).any(0)
    if bool(clipped.any()):
        raise UserError(
            f"{names[int(clipped.int().argmax())]} has weights that are too large to be quantized: scales reach "
            f"{LARGEST_SCALE:g}; weights of a usable model are far smaller, so check where this one comes from"
        )
