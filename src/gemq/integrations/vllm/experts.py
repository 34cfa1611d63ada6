"""vLLM's routed experts with a width per matrix of every expert, packed in memory as in ``kernels/modules.py``.

Legend: H hidden size, I intermediate size of the checkpoint, i = I / tensor parallel size.

The arithmetic between the matrices (activation, clamps, biases) is that of the family's module in Transformers, with
which the checkpoint was made, and not vLLM's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from gemq.checkpoint.format import PackedFormat
from gemq.errors import UserError
from gemq.integrations.vllm import ops
from gemq.integrations.vllm.served_experts import (
    ExpertsShare,
    ServedExperts,
    empty_matrices,
    experts_of_rank,
    local_index_of,
    packed_family_experts,
    rank_rows,
    share_of_parameter,
)
from gemq.integrations.vllm.split import divided_groups, groups_of_rank
from gemq.kernels.activation import activation_of
from gemq.kernels.expert_codes import ExpertCodes
from gemq.quant.stored_matrix import StoredMatrix, concatenate

if TYPE_CHECKING:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    from gemq.integrations.vllm.method import Checkpoint

_PARAMETER_PREFIXES = {"gate_up_proj": "w13", "up_proj": "w13", "down_proj": "w2"}
"""Projections -> prefixes of vLLM's parameters."""


class PackedExpertsMethod(FusedMoEMethodBase):
    """Experts that read their packed weights from the files of the checkpoint.

    The parameters ``w13_*`` and ``w2_*`` of vLLM's layer are the flat buffers of ``PackedMatrices`` or
    ``TrellisMatrices``, and biases.
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
        """Create empty packed matrices of the rank's experts: first projection [2 * i, H] or [i, H], down [H, i].

        Raises:
            UserError: the experts, or how they are distributed, are not supported.
        """
        parallel = self.moe.moe_parallel_config
        rank, size = parallel.tp_rank, parallel.tp_size
        intermediate_size = intermediate_size_per_partition * size
        skeleton: Any = self._checkpoint.reader.skeleton.get_submodule(self._path)
        self._check_supported(skeleton)
        self._check_widths_and_shapes(skeleton, hidden_size, intermediate_size)
        start = rank * intermediate_size_per_partition
        is_concatenated = getattr(skeleton, "is_concatenated", True)
        expert_map = layer.expert_map
        self._share = ExpertsShare(
            experts=range(num_experts) if expert_map is None else experts_of_rank(expert_map),
            rows=rank_rows(
                skeleton.has_gate, is_concatenated, intermediate_size, start, start + intermediate_size_per_partition
            ),
            groups=self._rank_groups(intermediate_size, rank, size),
            adds_down_bias=rank == 0,
        )
        experts = packed_family_experts(skeleton, self._empty_matrices(hidden_size, intermediate_size))
        local_index = None if expert_map is None else local_index_of(expert_map)
        self._served = ServedExperts(experts, local_index, layer.apply_router_weight_on_input)
        self._name = ops.name_module(layer.layer_name, self._served)
        self._register_parameters(layer, params_dtype)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Read this rank's share of every expert from the files."""
        reader, experts = self._checkpoint.reader, self._served.experts
        for name, parameter_name in self._unpacked.items():
            parameter = getattr(layer, parameter_name)
            if f"{self._path}.{name}" not in reader.specs:
                raise UserError(f"{self._path}.{name} is not in the checkpoint: load the model with Transformers")
            value = reader.tensor(f"{self._path}.{name}")
            parameter.data.copy_(share_of_parameter(name, value, self._share))
            module_path, _, attribute = name.rpartition(".")
            experts.get_submodule(module_path).register_parameter(attribute, parameter)
        for projection, prefix in self._projections.items():
            matrices: Any = getattr(experts, projection)
            for buffer in self._format.expert_fields:  # vLLM may have moved its parameters
                setattr(matrices, buffer, getattr(layer, f"{prefix}_{buffer}").data)
            for local_index, expert in enumerate(self._share.experts):
                path = f"{self._path}.{expert}.{projection}"
                is_down = projection == "down_proj"
                matrices.set_matrix(local_index, self._read_down(path) if is_down else self._read_first(path))
        activation_of(experts)  # recognized now, since it waits for the device

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

    @property
    def _projections(self) -> dict[str, str]:
        """Projections that the checkpoint has, with the prefixes of vLLM's parameters."""
        return {name: _PARAMETER_PREFIXES[name] for name in self._format.experts[self._path]}

    def _rank_groups(self, intermediate_size: int, rank: int, size: int) -> slice:
        """Return the groups of the down projection's columns that a rank holds."""
        reader = self._checkpoint.reader
        name = f"{self._path}.down_proj"
        group_size = self._format.block_side(name, intermediate_size)
        group_counts = divided_groups(reader.format, reader.shapes) if size > 1 else ()
        return groups_of_rank(name, intermediate_size, group_size, rank, size, group_counts)

    def _empty_matrices(self, hidden_size: int, intermediate_size: int) -> dict[str, ExpertCodes]:
        """Return empty packed matrices of the rank's experts by projection."""
        matrices: dict[str, ExpertCodes] = {}
        for projection, widths in self._format.experts[self._path].items():
            columns = intermediate_size if projection == "down_proj" else hidden_size
            group_size = self._format.block_side(f"{self._path}.{projection}", columns)
            rows, groups = self._share.num_rows, columns // group_size
            if projection == "down_proj":
                rows, groups = hidden_size, self._share.groups.stop - self._share.groups.start
            rank_widths = [widths[expert] for expert in self._share.experts]
            matrices[projection] = empty_matrices(rank_widths, rows, groups, group_size, self._format.state_bits)
        return matrices

    def _register_parameters(self, layer: RoutedExperts, dtype: torch.dtype) -> None:
        """Register the packed buffers and the rank's part of all other parameters with vLLM's layer."""
        experts = self._served.experts
        for projection, prefix in self._projections.items():
            for buffer in self._format.expert_fields:
                parameter = nn.Parameter(getattr(getattr(experts, projection), buffer), requires_grad=False)
                layer.register_parameter(f"{prefix}_{buffer}", parameter)
        self._unpacked: dict[str, str] = {}  # names in the module -> in vLLM's layer
        for name, value in experts.named_parameters():
            shape = share_of_parameter(name, value, self._share).shape
            biased = _PARAMETER_PREFIXES.get(name.removesuffix("_bias"))
            self._unpacked[name] = f"{biased}_bias" if biased else "experts_" + name.replace(".", "_")
            parameter = nn.Parameter(torch.zeros(shape, dtype=dtype), requires_grad=False)
            layer.register_parameter(self._unpacked[name], parameter)

    def _read_down(self, path: str) -> StoredMatrix:
        """Read this rank's columns of a down matrix: [H, i]."""
        return self._checkpoint.reader.matrix_slice(path, slice(None), self._share.groups)

    def _read_first(self, path: str) -> StoredMatrix:
        """Read this rank's rows of a first matrix."""
        reader = self._checkpoint.reader
        return concatenate([reader.matrix_slice(path, rows, slice(None)) for rows in self._share.rows])

    def _check_widths_and_shapes(self, skeleton: Any, hidden_size: int, intermediate_size: int) -> None:
        """Raise UserError if the checkpoint has other experts than vLLM's model."""
        widths, stored_shapes = self._format.experts[self._path], self._checkpoint.reader.shapes
        num_experts = self.moe.num_experts
        if len(widths["down_proj"]) != num_experts:
            raise UserError(
                f"config.json lists {len(widths['down_proj'])} widths for the {num_experts} experts of {self._path}: "
                "copy the checkpoint again"
            )
        first_rows = 2 * intermediate_size if skeleton.has_gate else intermediate_size
        for projection in widths:
            is_down = projection == "down_proj"
            shape = (hidden_size, intermediate_size) if is_down else (first_rows, hidden_size)
            stored_shape = stored_shapes[f"{self._path}.{projection}"]
            if stored_shape != shape:
                raise UserError(
                    f"{self._path}.{projection} is {list(stored_shape)} in the checkpoint and "
                    f"{list(shape)} in vLLM: this model's experts are not supported"
                )

    def _check_supported(self, skeleton: Any) -> None:
        """Raise UserError for experts, or a distribution of them, that gemq does not support."""
        parallel = self.moe.moe_parallel_config
        reason = None
        if parallel.use_all2all_kernels and not parallel.use_ag_rs_all2all_kernels:
            reason = f"--all2all-backend {parallel.all2all_backend} is not supported: use allgather_reducescatter"
        elif skeleton.has_gate != self.moe.is_act_and_mul:
            reason = "vLLM and Transformers disagree about the gate of these experts: load the model with Transformers"
        elif parallel.tp_size > 1 and getattr(skeleton, "has_post_expert_norm", False):
            reason = "experts with a norm cannot be divided: add --enable-expert-parallel"
        if reason is not None:
            raise UserError(f"gemq in vLLM: {reason} ({self._path})")
