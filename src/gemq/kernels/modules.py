"""Modules that hold packed weights.

The experts of one layer lie in flat buffers with a table, so that one kernel launch serves experts of different widths.
``state_dict`` still has the names and shapes of the checkpoint format, with one entry per expert.

Scales and offsets are bytes, so ``model.to(dtype)`` does not convert them. Must not import Transformers: an experts
module is recognized by the attributes that its forward uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gemq.kernels import dispatch
from gemq.kernels.expert_codes import ExpertCodes
from gemq.kernels.expert_inputs import identity_experts_output, routing_from_batched_rows
from gemq.quant.grid import dequantize
from gemq.quant.packing import PackedMatrix
from gemq.quant.widths import Width
from gemq.runtime.compat import torch_private

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


class PackedMatrices(ExpertCodes):
    """The affine codes of a projection, in flat buffers.

    Attributes:
        codes: as in ``ExpertCodes``. Those of an expert are [rows, groups * group_bytes]
        scales: uint8, [experts, rows, groups] flat
        offsets: uint8, [experts, rows, groups] flat
        table: [experts, 3] int64: levels of the width (2, 3, 4, 8, 16, 256), first byte in codes, first byte in scales
    """

    widths: tuple[Width, ...]
    offsets: Tensor
    table: Tensor

    def __init__(self, matrices: Sequence[PackedMatrix]) -> None:
        """Copy the experts' matrices, all on one device, into flat buffers."""
        super().__init__()
        self.widths = tuple(matrix.width for matrix in matrices)
        self.levels = sorted({width.levels for width in self.widths})
        self.group_size = matrices[0].group_size
        self.rows, self.groups = matrices[0].scales.shape
        self.columns = self.groups * self.group_size
        device = matrices[0].codes.device
        scales_per_expert = self.rows * self.groups

        self._allocate_codes(device)
        table: list[list[int]] = []
        for expert, (width, start) in enumerate(zip(self.widths, self._starts, strict=True)):
            table.append([width.levels, start, expert * scales_per_expert])
        for name in ("scales", "offsets"):
            flat = torch.empty(self.num_experts * scales_per_expert, dtype=torch.uint8, device=device)
            self.register_buffer(name, flat, persistent=False)
        self.register_buffer("table", torch.tensor(table, dtype=torch.int64, device=device), persistent=False)
        for expert, matrix in enumerate(matrices):
            self.set_matrix(expert, matrix)

    def code_bytes(self, expert: int) -> int:
        """As in ``ExpertCodes``."""
        return self.rows * self.groups * self.widths[expert].group_bytes(self.group_size)

    def place_codes(self, pool: Tensor, starts: list[int], host_codes: dict[int, list[Tensor]]) -> None:
        """As in ``ExpertCodes``."""
        super().place_codes(pool, starts, host_codes)
        self.table[:, 1] = torch.tensor(starts)

    def matrix(self, expert: int) -> PackedMatrix:
        """As in ``ExpertCodes``."""
        groups = self.rows * self.groups
        grid_slice = slice(expert * groups, (expert + 1) * groups)
        return PackedMatrix(
            self.stored_codes(expert).view(self.rows, -1),
            self.scales[grid_slice].view(self.rows, self.groups),
            self.offsets[grid_slice].view(self.rows, self.groups),
            self.widths[expert],
        )

    def kernel_sizes(self) -> tuple[int, ...]:
        """As in ``ExpertCodes``."""
        return (self.rows, self.columns, self.group_size, *self.levels)

    def extra_repr(self) -> str:
        """Describe the sizes when the module is printed."""
        size = f"rows={self.rows}, columns={self.columns}, group_size={self.group_size}"
        return f"experts={self.num_experts}, {size}"


class PackedExperts(nn.Module):
    """Mixin that packs the projections of a family's experts class.

    All projections have affine codes (PackedMatrices) or all have trellis codes (``trellis.experts.TrellisMatrices``).
    Activation, clamps and biases remain those of the family.
    """

    has_gate: bool
    has_bias: bool
    # Attributes of the family's class that kernels use; nn.Module would type them as Tensor | Module.
    gate_up_proj: Any
    up_proj: Any
    down_proj: Any
    gate_up_proj_bias: Any
    up_proj_bias: Any
    down_proj_bias: Any
    post_expert_norm: Any
    act_fn: Any
    _apply_gate: Any

    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor | None = None, top_k_weights: Tensor | None = None
    ) -> Tensor:
        """Run the experts, with the arguments of Transformers' experts modules."""
        num_experts = self.down_proj.num_experts
        if top_k_index is None or top_k_weights is None:  # a family that passes one batch of rows per expert
            top_k_index, top_k_weights = routing_from_batched_rows(hidden_states, num_experts)
        out = dispatch.experts_forward(self, hidden_states, top_k_index, top_k_weights)
        if getattr(self, "passes_on", False):
            out = out + identity_experts_output(hidden_states, top_k_index, top_k_weights, num_experts)
        return out

    def kernel_sizes(self) -> tuple[Any, ...]:
        """Return the sizes that kernels are compiled for. Modules with equal sizes share kernels."""
        return tuple(matrices.kernel_sizes() for matrices in self.packed_projections().values())

    def packed_projections(self) -> dict[str, ExpertCodes]:
        """Return the packed projections by name."""
        modules = ((name, self._modules.get(name)) for name in PROJECTIONS)
        return {name: module for name, module in modules if isinstance(module, ExpertCodes)}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Add each expert's tensors under their names in a checkpoint."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for projection, matrices in self.packed_projections().items():
            for expert in range(matrices.num_experts):
                destination.update(matrices.matrix(expert).named(f"{prefix}{expert}.{projection}"))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Copy each expert's tensors into the flat buffers, and load everything else as torch does."""
        remaining = dict(state_dict)
        for projection, matrices in self.packed_projections().items():
            for expert in range(matrices.num_experts):
                name = f"{prefix}{expert}.{projection}"
                tensors = {key: remaining.pop(key, None) for key in matrices.matrix(expert).named(name)}
                absent = [key for key, tensor in tensors.items() if tensor is None]
                missing_keys += absent
                if absent:
                    continue
                try:
                    matrices.set_tensors(expert, tensors, name)
                except ValueError as error:
                    error_msgs.append(f"{name}: {error}")
        super()._load_from_state_dict(
            remaining, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


_packed_classes: dict[type[nn.Module], type[nn.Module]] = {}
"""Packed subclass of each family's experts class."""


def _packed_class(experts_class: type[nn.Module]) -> type[nn.Module]:
    """Return the packed subclass of a family's experts class; create it on first use."""
    if experts_class not in _packed_classes:
        name = f"Packed{experts_class.__name__}"

        def reduce(self: nn.Module, protocol: Any) -> Any:
            """Support pickle and copy, which cannot look up a class that was created at run time."""
            if "fetch_table" in self._buffers:
                raise RuntimeError("experts in host memory cannot be copied: load the model again")
            return _new_packed, (experts_class,), self.__getstate__()

        _packed_classes[experts_class] = type(name, (PackedExperts, experts_class), {"__reduce_ex__": reduce})
    return _packed_classes[experts_class]


def _new_packed(experts_class: type[nn.Module]) -> nn.Module:
    """Create an uninitialized instance of the packed subclass of a family's experts class."""
    packed_class = _packed_class(experts_class)
    return packed_class.__new__(packed_class)


def make_packed(experts: nn.Module, projections: Sequence[str]) -> None:
    """Turn an experts module into a PackedExperts in place and drop its 3-D parameters.

    The instance is kept, so that attributes that a family sets on it (limits, activations, biases, its gate) survive.
    The caller must then set the projections as PackedMatrices or as TrellisMatrices.
    """
    for name in projections:
        delattr(experts, name)
    experts.__class__ = _packed_class(type(experts))


class PackedWeight(Tensor):
    """Read-only weight of a packed linear: float32 [rows, columns], dequantized at each use.

    Writing raises RuntimeError, since the packed tensors would not change and the written values would be lost.
    """

    linear: PackedLinear

    @classmethod
    def of(cls, linear: PackedLinear) -> PackedWeight:
        """Create the weight of ``linear``. It has a shape, but no memory."""
        placeholder = linear.codes.new_empty(1, dtype=torch.float32).expand(linear.out_features, linear.in_features)
        weight = placeholder.as_subclass(cls)
        weight.linear = linear
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call ``func`` with the dequantized weights, or raise RuntimeError if it would change them."""
        kwargs = kwargs or {}
        if func in _METADATA_FUNCTIONS:
            with torch_private.without_torch_function():
                return func(*args, **kwargs)
        if func in _IDENTITY_FUNCTIONS:
            return args[0]
        written = [kwargs.get("out")]
        if _writes_first_argument(func.__name__):
            written += [*args[:1], kwargs.get("input"), kwargs.get("tensor")]
        if any(isinstance(value, cls) for value in written):
            raise RuntimeError(
                "a packed weight is read-only, so no adapter can be merged into it: keep the adapter separate, "
                "or merge it into the plain model that gemq export --dense writes"
            )
        with torch_private.without_torch_function():
            args, kwargs = torch_private.map_instances(cls, _dequantized, (args, kwargs))
            return func(*args, **kwargs)


def _dequantized(weight: PackedWeight) -> Tensor:
    """Return the values of a packed weight: float32 [rows, columns]."""
    return weight.linear.dequantize(torch.float32)


_METADATA_FUNCTIONS = {
    *(getattr(Tensor, name).__get__ for name in ("device", "dtype", "shape", "ndim", "is_cuda", "is_meta", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad", "is_sparse", "is_quantized", "is_leaf")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point, Tensor.is_complex),
    *(Tensor.get_device, Tensor.is_contiguous),
}
"""Functions that do not read the weight's values."""

_IDENTITY_FUNCTIONS = {getattr(Tensor.data, "__get__"), Tensor.detach}  # noqa: B009 - mypy takes it for a call
"""Functions that return the weight itself, which needs no detaching: it has no gradient."""

_WRITING_OPERATORS = {
    *("__set__", "__setitem__"),
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")),
}


def _writes_first_argument(name: str) -> bool:
    """Whether a function of this name changes its first argument: ``add_``, ``__iadd__``, setting an attribute."""
    return (name.endswith("_") and not name.startswith("__")) or name in _WRITING_OPERATORS


class PackedLinear(nn.Linear):
    """``y = x W^T + bias`` with W [rows, columns] packed at one width.

    It is an ``nn.Linear`` by type, so that adapters (PEFT) attach to it. Its ``weight`` is not a parameter and is
    read-only: merging an adapter into it raises RuntimeError.

    Attributes:
        codes: [rows, groups * group_bytes] uint8
        scales: [rows, groups] uint8
        offsets: [rows, groups] uint8
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        width: Width,
        group_size: int,
        bias: nn.Parameter | None,
        device: Any = None,
    ) -> None:
        """Create uninitialized buffers for the caller to fill."""
        nn.Module.__init__(self)  # nn.Linear's own would create the weight
        self.in_features, self.out_features = columns, rows
        self.width, self.levels, self.group_size = width, width.levels, group_size
        groups = columns // group_size
        code_bytes = groups * width.group_bytes(group_size)
        self.register_buffer("codes", torch.empty(rows, code_bytes, dtype=torch.uint8, device=device))
        for name in ("scales", "offsets"):
            self.register_buffer(name, torch.empty(rows, groups, dtype=torch.uint8, device=device))
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, matrix: PackedMatrix) -> PackedLinear:
        """Create the packed replacement of ``linear`` with its bias and the packed ``matrix``."""
        rows, columns = linear.out_features, linear.in_features
        packed = cls(rows, columns, matrix.width, matrix.group_size, linear.bias, device="meta")
        packed.codes, packed.scales, packed.offsets = matrix.tensors()
        return packed

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weights for readers of ``nn.Linear.weight``; read-only."""
        return PackedWeight.of(self)

    def kernel_sizes(self) -> tuple[Any, ...]:
        """Return the sizes that kernels are compiled for. Modules with equal sizes share kernels."""
        return (self.out_features, self.in_features, self.width, self.group_size)

    def matrix(self) -> PackedMatrix:
        """Return the packed tensors."""
        return PackedMatrix(self.codes, self.scales, self.offsets, self.width)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weights: [rows, columns] in ``dtype``."""
        return dequantize(self.matrix().unpack(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Run the linear: [..., columns] -> [..., rows]."""
        return dispatch.linear_forward(self, x)

    def extra_repr(self) -> str:
        """Describe the sizes when the module is printed."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, width={self.width}, group_size={self.group_size}"
        )
