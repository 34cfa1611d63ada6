"""vLLM's routed experts with a width per expert: packed in memory as in ``kernels/packed.py``, never dequantized whole.

Legend: E experts, H hidden size, I intermediate size of the checkpoint, i = I / tensor parallel size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from gemq.checkpoint.format import PARTS, PackedFormat
from gemq.errors import UserError
from gemq.integrations.vllm import ops
from gemq.integrations.vllm.split import divided_groups, groups_of_rank
from gemq.kernels.modules import PackedExperts, PackedMatrices
from gemq.quant.packing import PackedMatrix
from gemq.quant.widths import Width, bytes_per_group, group_size_for

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    from gemq.integrations.vllm.method import Checkpoint

_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
"""vLLM's name of a gated activation -> Transformers' name of what it does to the gate."""


class ServedExperts(PackedExperts):
    """A layer's packed experts with the attributes that kernels read, as on Transformers' plain experts classes."""

    is_transposed = False
    is_concatenated = True
    has_gate = True
    has_bias = False
    has_post_expert_norm = False
    _apply_gate = _default_apply_gate

    def __init__(self, activation: str, gate_up_proj: PackedMatrices, down_proj: PackedMatrices) -> None:
        super().__init__()
        self.act_fn = ACT2FN[activation]
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj


class PackedExpertsMethod(FusedMoEMethodBase):
    """Parameters ``w13_*`` and ``w2_*`` of vLLM's layer are the flat buffers of ``PackedMatrices``."""

    def __init__(self, moe: Any, packed_format: PackedFormat, path: str, checkpoint: Checkpoint) -> None:
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
        self._refuse_unsupported(layer)
        widths = self._format.experts[self._path]
        if len(widths["down_proj"]) != num_experts:
            raise UserError(
                f"config.json lists {len(widths['down_proj'])} widths for the {num_experts} experts of {self._path}: "
                "copy the checkpoint again"
            )
        parallel = self.moe.moe_parallel_config
        rank, size = parallel.tp_rank, parallel.tp_size
        inner = intermediate_size_per_partition * size
        up_group, down_group = (group_size_for(columns, self._format.group_size) for columns in (hidden_size, inner))
        reader = self._checkpoint.reader
        others = divided_groups(reader.format, reader.shapes) if size > 1 else ()
        self._groups = groups_of_rank(f"{self._path}.down_proj", inner, down_group, rank, size, others)
        self._rows = slice(rank * intermediate_size_per_partition, (rank + 1) * intermediate_size_per_partition)
        gate_up = _empty(widths["gate_up_proj"], 2 * intermediate_size_per_partition, hidden_size // up_group, up_group)
        down = _empty(widths["down_proj"], hidden_size, self._groups.stop - self._groups.start, down_group)
        self._experts = ServedExperts(_ACTIVATIONS[layer.activation.value], gate_up, down)
        self._name = ops.name_module(layer.layer_name, self._experts)
        for name, matrices in (("w13", gate_up), ("w2", down)):
            for part in PARTS:
                layer.register_parameter(f"{name}_{part}", nn.Parameter(getattr(matrices, part), requires_grad=False))
        shapes = {"gate_up_proj": (2 * inner, hidden_size), "down_proj": (hidden_size, inner)}
        for proj, shape in shapes.items():
            if reader.shapes[f"{self._path}.{proj}"] != shape:
                raise UserError(
                    f"{self._path}.{proj} is {list(reader.shapes[f'{self._path}.{proj}'])} in the checkpoint and "
                    f"{list(shape)} in vLLM: this model's experts are not supported"
                )

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Reads the rank's part of every expert from the files."""
        reader, everything = self._checkpoint.reader, slice(None)
        for name, proj in (("w13", "gate_up_proj"), ("w2", "down_proj")):
            matrices: PackedMatrices = getattr(self._experts, proj)
            for part in PARTS:  # vLLM may have moved its parameters since
                setattr(matrices, part, getattr(layer, f"{name}_{part}").data)
            inner = reader.shapes[f"{self._path}.gate_up_proj"][0] // 2
            for e in range(matrices.num_experts):
                tensor = f"{self._path}.{e}.{proj}"
                if proj == "down_proj":
                    matrix = reader.matrix_slice(tensor, everything, self._groups)
                else:
                    every_group = slice(0, matrices.groups)
                    starts = (self._rows, slice(inner + self._rows.start, inner + self._rows.stop))
                    gate, up = (reader.matrix_slice(tensor, rows, every_group) for rows in starts)
                    matrix = PackedMatrix(*(torch.cat(pair) for pair in zip(gate, up, strict=True)))
                matrices.set_matrix(e, matrix)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
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
        return ops.experts(x, topk_ids, topk_weights, self._name)

    def _refuse_unsupported(self, layer: RoutedExperts) -> None:
        wrong = None
        activation = layer.activation.value
        if self.moe.moe_parallel_config.use_ep:
            wrong = "expert parallelism is not supported: leave out --enable-expert-parallel"
        elif "gate_up_proj" not in self._format.experts[self._path]:
            wrong = "experts without a gate are not supported: load the model with Transformers"
        elif self.moe.has_bias:
            wrong = "experts with biases are not supported: load the model with Transformers"
        elif activation not in _ACTIVATIONS or layer.swiglu_limit is not None or layer.swiglu_alpha is not None:
            wrong = f"the activation {activation} of this model is not supported: load the model with Transformers"
        elif layer.apply_router_weight_on_input:
            wrong = "routing weights on the experts' input are not supported: load the model with Transformers"
        if wrong:
            raise UserError(f"gemq in vLLM: {wrong} ({self._path})")


def _empty(widths: tuple[Width, ...], rows: int, groups: int, group_size: int) -> PackedMatrices:
    """Flat buffers of zeros on the device that vLLM builds on."""

    def zeros(columns: int) -> Tensor:
        return torch.zeros(1, 1, dtype=torch.uint8).expand(rows, columns)  # no memory of its own

    grid = zeros(groups)
    matrices = [PackedMatrix(zeros(groups * bytes_per_group(w, group_size)), grid, grid) for w in widths]
    return PackedMatrices(matrices, widths, group_size)
