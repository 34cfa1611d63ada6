"""vLLM's routed experts with a width per matrix of every expert, packed in memory as in ``kernels/modules.py``.

Legend: H hidden size, I intermediate size of the checkpoint, i = I / tensor parallel size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from gemq.checkpoint.format import PACKED_FIELDS, PackedFormat
from gemq.errors import UserError
from gemq.integrations.vllm import ops
from gemq.integrations.vllm.split import divided_groups, groups_of_rank
from gemq.kernels.modules import PackedExperts, PackedMatrices
from gemq.quant.packing import PackedMatrix
from gemq.quant.widths import Width, group_size_for
from gemq.runtime.compat import transformers_private

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    from gemq.integrations.vllm.method import Checkpoint

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""vLLM's name of a gated activation -> Transformers' name of the function that it applies to the gate."""


class ServedExperts(PackedExperts):
    """A layer's packed experts, with the attributes of Transformers' experts classes that the kernels read."""

    is_transposed = False
    is_concatenated = True
    has_gate = True
    has_bias = False
    has_post_expert_norm = False
    _apply_gate = transformers_private.default_gate()

    def __init__(self, activation: str, gate_up_proj: PackedMatrices, down_proj: PackedMatrices) -> None:
        super().__init__()
        self.act_fn = ACT2FN[activation]
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj


class PackedExpertsMethod(FusedMoEMethodBase):
    """Experts that read their packed weights from the files of the checkpoint.

    The parameters ``w13_*`` and ``w2_*`` of vLLM's layer are the flat buffers of ``PackedMatrices``.
    """

    def __init__(self, moe: Any, packed_format: PackedFormat, path: str, checkpoint: Checkpoint) -> None:
        """Remember what to load: the experts that the checkpoint has at ``path``."""
        super().__init__(moe)
        self._format, self._path, self._checkpoint = packed_format, path, checkpoint

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create empty packed matrices: gate and up [2 * i, H], down [H, i]. Raises UserError if not supported."""
        self._check_supported(layer)
        parallel = self.moe.moe_parallel_config
        rank, size = parallel.tp_rank, parallel.tp_size
        rank_rows = intermediate_size_per_partition
        intermediate_size = rank_rows * size
        self._check_widths_and_shapes(num_experts, hidden_size, intermediate_size)
        reader, widths = self._checkpoint.reader, self._format.experts[self._path]
        up_group_size = group_size_for(hidden_size, self._format.group_size)
        down_group_size = group_size_for(intermediate_size, self._format.group_size)
        group_counts = divided_groups(reader.format, reader.shapes) if size > 1 else ()
        down_name = f"{self._path}.down_proj"
        self._groups = groups_of_rank(down_name, intermediate_size, down_group_size, rank, size, group_counts)
        self._rows = slice(rank * rank_rows, (rank + 1) * rank_rows)
        up_groups, down_groups = hidden_size // up_group_size, self._groups.stop - self._groups.start
        gate_up = _empty_matrices(widths["gate_up_proj"], 2 * rank_rows, up_groups, up_group_size)
        down = _empty_matrices(widths["down_proj"], hidden_size, down_groups, down_group_size)
        self._experts = ServedExperts(_ACTIVATIONS[layer.activation.value], gate_up, down)
        self._name = ops.name_module(layer.layer_name, self._experts)
        for name, matrices in (("w13", gate_up), ("w2", down)):
            for buffer in PACKED_FIELDS:
                parameter = nn.Parameter(getattr(matrices, buffer), requires_grad=False)
                layer.register_parameter(f"{name}_{buffer}", parameter)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Read this rank's share of every expert from the files."""
        for name, projection in (("w13", "gate_up_proj"), ("w2", "down_proj")):
            matrices: PackedMatrices = getattr(self._experts, projection)
            for buffer in PACKED_FIELDS:  # vLLM may have moved its parameters
                setattr(matrices, buffer, getattr(layer, f"{name}_{buffer}").data)
            for expert in range(matrices.num_experts):
                path = f"{self._path}.{expert}.{projection}"
                is_down = projection == "down_proj"
                matrix = self._read_down(path) if is_down else self._read_gate_up(path, matrices.groups)
                matrices.set_matrix(expert, matrix)

    def _read_down(self, path: str) -> PackedMatrix:
        """Read this rank's columns of a down matrix: [H, i]."""
        return self._checkpoint.reader.matrix_slice(path, slice(None), self._groups)

    def _read_gate_up(self, path: str, groups: int) -> PackedMatrix:
        """Read this rank's rows of gate and up, which are in one matrix: [2 * i, H]. ``groups``: of a row."""
        reader, columns = self._checkpoint.reader, slice(0, groups)
        intermediate_size = reader.shapes[f"{self._path}.gate_up_proj"][0] // 2
        gate = reader.matrix_slice(path, self._rows, columns)
        up_rows = slice(intermediate_size + self._rows.start, intermediate_size + self._rows.stop)
        up = reader.matrix_slice(path, up_rows, columns)
        return PackedMatrix.cat([gate, up])

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        """Return None, since vLLM's own kernels are not used."""
        return None

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Any,
    ) -> Tensor:
        """Return the output of this rank's share of the experts: [T, H]."""
        return ops.experts(x, topk_ids, topk_weights, self._name)

    def _check_widths_and_shapes(self, num_experts: int, hidden_size: int, intermediate_size: int) -> None:
        """Raise UserError if the checkpoint has other experts than vLLM's model."""
        widths, stored_shapes = self._format.experts[self._path], self._checkpoint.reader.shapes
        if len(widths["down_proj"]) != num_experts:
            raise UserError(
                f"config.json lists {len(widths['down_proj'])} widths for the {num_experts} experts of {self._path}: "
                "copy the checkpoint again"
            )
        shapes = {"gate_up_proj": (2 * intermediate_size, hidden_size), "down_proj": (hidden_size, intermediate_size)}
        for projection, shape in shapes.items():
            stored_shape = stored_shapes[f"{self._path}.{projection}"]
            if stored_shape != shape:
                raise UserError(
                    f"{self._path}.{projection} is {list(stored_shape)} in the checkpoint and "
                    f"{list(shape)} in vLLM: this model's experts are not supported"
                )

    def _check_supported(self, layer: RoutedExperts) -> None:
        """Raise UserError for experts that the kernels do not support."""
        reason = None
        activation = layer.activation.value
        if self.moe.moe_parallel_config.use_ep:
            reason = "expert parallelism is not supported: leave out --enable-expert-parallel"
        elif "gate_up_proj" not in self._format.experts[self._path]:
            reason = "experts without a gate are not supported: load the model with Transformers"
        elif self.moe.has_bias:
            reason = "experts with biases are not supported: load the model with Transformers"
        elif activation not in _ACTIVATIONS or layer.swiglu_limit is not None or layer.swiglu_alpha is not None:
            reason = f"the activation {activation} of this model is not supported: load the model with Transformers"
        elif layer.apply_router_weight_on_input:
            reason = "routing weights on the experts' input are not supported: load the model with Transformers"
        if reason is not None:
            raise UserError(f"gemq in vLLM: {reason} ({self._path})")


def _empty_matrices(widths: tuple[Width, ...], rows: int, groups: int, group_size: int) -> PackedMatrices:
    """Return packed matrices of zeros on the device that vLLM builds on."""

    def zeros(columns: int) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.uint8).expand(rows, columns)  # takes no memory

    grid = zeros(groups)
    matrices = []
    for width in widths:
        codes = zeros(groups * width.group_bytes(group_size))
        matrices.append(PackedMatrix(codes, grid, grid, width))
    return PackedMatrices(matrices)
