"""A layer's packed experts as a vLLM rank computes them: the family's arithmetic, and the routing of the rank.

Legend: T tokens, K experts per token, E experts of the layer, L experts of this rank, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gemq.kernels import dispatch
from gemq.kernels.expert_codes import ExpertCodes
from gemq.kernels.modules import PackedExperts, PackedMatrices, make_packed
from gemq.kernels.trellis.experts import TrellisMatrices
from gemq.quant.packing import PackedMatrix
from gemq.quant.trellis_matrix import TrellisMatrix
from gemq.quant.widths import TILE_SIDE, AnyWidth, affine_widths, trellis_widths


class ExpertsShare(NamedTuple):
    """The part of a layer's experts that a rank holds.

    Attributes:
        experts: indices of the rank's experts in the checkpoint, in the rank's order
        rows: rows of the first projection, in order; ranges are concatenated
        groups: groups of columns of the down projection, or blocks of the rotation of trellis codes
        adds_down_bias: whether the rank adds the bias of the down projection. One rank of those that divide an expert
            does, since their outputs are summed.
    """

    experts: Sequence[int]
    rows: Sequence[slice]
    groups: slice
    adds_down_bias: bool

    @property
    def num_rows(self) -> int:
        """Rows of the first projection in all ranges."""
        return sum(rows.stop - rows.start for rows in self.rows)


class ServedExperts(nn.Module):
    """The experts of a rank, called with the routing over all experts of the layer.

    Attributes:
        experts: packed experts of the rank, [L] matrices each
        local_index: [E + 2] int64, index of each expert among those of the rank, or -1. The last two entries are -1:
            they serve indices of unused slots. None if the rank has all experts.
        weights_inputs: whether routing weights are multiplied with the inputs of experts instead of their outputs
    """

    local_index: Tensor | None

    def __init__(self, experts: PackedExperts, local_index: Tensor | None, weights_inputs: bool) -> None:
        super().__init__()
        self.experts, self.weights_inputs = experts, weights_inputs
        self.register_buffer("local_index", local_index, persistent=False)

    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the sum over the rank's experts, [T, H], of hidden states [T, H] and routing [T, K]."""
        if self.local_index is not None:
            unused = len(self.local_index) - 2
            top_k_index = self.local_index[top_k_index.clamp(-1, unused)]
        if not self.weights_inputs:
            return dispatch.experts_forward(self.experts, hidden, top_k_index, top_k_weights)
        slots = top_k_index.shape[1]
        weighted = hidden[:, None] * top_k_weights[..., None].to(hidden.dtype)
        ones = torch.ones_like(top_k_weights).view(-1, 1)
        outputs = dispatch.experts_forward(self.experts, weighted.flatten(0, 1), top_k_index.reshape(-1, 1), ones)
        return outputs if slots == 1 else outputs.view(-1, slots, hidden.shape[1]).sum(1)


def local_index_of(expert_map: Tensor) -> Tensor:
    """Return ``ServedExperts.local_index`` for vLLM's map [E] of experts to those of the rank, -1 for others."""
    return torch.nn.functional.pad(expert_map.long(), (0, 2), value=-1)


def experts_of_rank(expert_map: Tensor) -> list[int]:
    """Return the indices of the rank's experts in the rank's order, for vLLM's map [E]."""
    local_indices = expert_map.tolist()
    experts = [expert for expert, local_index in enumerate(local_indices) if local_index >= 0]
    return sorted(experts, key=lambda expert: local_indices[expert])


def rank_rows(has_gate: bool, is_concatenated: bool, intermediate_size: int, start: int, stop: int) -> list[slice]:
    """Return the rows of the first projection for neurons ``start`` to ``stop`` of the intermediate size.

    Args:
        has_gate: whether each neuron has a gate row and an up row
        is_concatenated: whether all gate rows precede all up rows; otherwise the two rows of a neuron are adjacent
        intermediate_size: neurons of the whole expert
        start: first neuron
        stop: end of the neurons
    """
    if not has_gate:
        return [slice(start, stop)]
    if is_concatenated:
        return [slice(start, stop), slice(intermediate_size + start, intermediate_size + stop)]
    return [slice(2 * start, 2 * stop)]


def packed_family_experts(skeleton: nn.Module, matrices: Mapping[str, ExpertCodes]) -> PackedExperts:
    """Return packed experts with the arithmetic of the family: activation, clamps, biases, norms.

    Args:
        skeleton: the family's experts module on the meta device. It is not changed.
        matrices: packed matrices by projection

    Returns:
        The module. Its parameters other than the packed matrices are still on the meta device.
    """
    experts = copy.deepcopy(skeleton)
    make_packed(experts, list(matrices))
    for name, packed in matrices.items():
        setattr(experts, name, packed)
    assert isinstance(experts, PackedExperts)
    return experts


def empty_matrices(widths: Sequence[AnyWidth], rows: int, groups: int, group_size: int, state_bits: int) -> ExpertCodes:
    """Return packed matrices of zeros, [rows, groups * group_size] each, on the default device.

    Args:
        widths: of the experts
        rows: of each matrix
        groups: groups of columns, or blocks of the rotation of trellis codes
        group_size: columns of a group or block
        state_bits: bits of a state of trellis codes, 0 for affine codes
    """

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(1, dtype=torch.uint8).expand(shape)  # takes no memory

    if state_bits:
        tiles = groups * group_size // TILE_SIDE
        trellis = []
        for trellis_width in trellis_widths(widths):
            codes = zeros(rows // TILE_SIDE, tiles * trellis_width.tile_bytes)
            trellis.append(TrellisMatrix(codes, zeros(rows), trellis_width, state_bits))
        return TrellisMatrices(trellis)
    grid = zeros(rows, groups)
    matrices = []
    for width in affine_widths(widths):
        codes = zeros(rows, groups * width.group_bytes(group_size))
        matrices.append(PackedMatrix(codes, grid, grid, width))
    return PackedMatrices(matrices)


def share_of_parameter(name: str, value: Tensor, share: ExpertsShare) -> Tensor:
    """Return the rank's part of a parameter of the experts module that is not packed.

    Args:
        name: of the parameter in the module
        value: as in the checkpoint: [E, rows] for biases, any shape for others, of which every rank has all
        share: of the rank
    """
    if not name.endswith("_proj_bias"):
        return value
    value = value[list(share.experts)]
    if name == "down_proj_bias":
        return value if share.adds_down_bias else torch.zeros_like(value)
    return torch.cat([value[:, rows] for rows in share.rows], dim=1)
