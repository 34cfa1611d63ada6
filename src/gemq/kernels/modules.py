"""Modules that hold packed weights.

The experts of one layer lie in flat buffers with a table, so that one kernel launch serves experts of
different widths. ``state_dict`` still shows the names and shapes of the checkpoint format, one entry an
expert.

Scales and offsets stay bytes, which ``model.to(dtype)`` leaves alone. Knows nothing of Transformers: an experts module
is known by the attributes that its forward uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from gemq.kernels import dispatch
from gemq.kernels.expert_inputs import passed_on, routing_of_rows
from gemq.quant.grid import dequantize
from gemq.quant.packing import PackedMatrix
from gemq.quant.widths import LEVELS, Width, bytes_per_group

ALIGNMENT = 16
"""Each expert's codes start at a multiple of this many bytes: the widest load of a GPU thread."""

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")


class PackedMatrices(nn.Module):
    """The same projection of all experts of a layer, [rows, columns] each, in flat buffers.

    codes:   uint8, experts one after the other, each [rows, groups * bytes_per_group], aligned
    scales:  uint8, [experts, rows, groups] flat; offsets likewise
    table:   [experts, 3] int64: the width's levels (2, 3, 4, 8, 16, 256), first byte in codes, first in scales
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor
    table: Tensor

    def __init__(self, matrices: Sequence[PackedMatrix], widths: Sequence[Width], group_size: int) -> None:
        """Copies the experts' matrices, all on one device, one after the other."""
        super().__init__()
        self.widths = tuple(widths)
        self.levels = sorted({LEVELS[width] for width in self.widths})
        self.group_size = group_size
        self.rows, self.groups = matrices[0].scales.shape
        self.columns = self.groups * group_size
        device = matrices[0].codes.device

        starts, end = [], 0
        for width in self.widths:
            starts.append(end)
            code_bytes = self.rows * self.groups * bytes_per_group(width, group_size)
            end += -(-code_bytes // ALIGNMENT) * ALIGNMENT
        self._starts = starts
        per_expert = self.rows * self.groups
        table = [
            [LEVELS[w], start, e * per_expert] for e, (w, start) in enumerate(zip(self.widths, starts, strict=True))
        ]
        self.register_buffer("codes", torch.zeros(end, dtype=torch.uint8, device=device), persistent=False)
        for name in ("scales", "offsets"):
            flat = torch.empty(self.num_experts * per_expert, dtype=torch.uint8, device=device)
            self.register_buffer(name, flat, persistent=False)
        self.register_buffer("table", torch.tensor(table, dtype=torch.int64, device=device), persistent=False)
        for e, matrix in enumerate(matrices):
            self.set_matrix(e, matrix)

    @property
    def num_experts(self) -> int:
        return len(self.widths)

    def matrix(self, expert: int) -> PackedMatrix:
        """One expert in the layout of the checkpoint. Views: nothing is copied."""
        groups, width = self.rows * self.groups, self.widths[expert]
        start = self._starts[expert]
        codes = self.codes[start : start + groups * bytes_per_group(width, self.group_size)]
        scales, offsets = (
            flat[expert * groups : (expert + 1) * groups].view(self.rows, self.groups)
            for flat in (self.scales, self.offsets)
        )
        return PackedMatrix(codes.view(self.rows, -1), scales, offsets)

    def set_matrix(self, expert: int, matrix: PackedMatrix) -> None:
        for mine, given in zip(self.matrix(expert), matrix, strict=True):
            if mine.shape != given.shape or mine.dtype != given.dtype:
                raise ValueError(
                    f"expert {expert}: {given.dtype} {list(given.shape)}, not {mine.dtype} {list(mine.shape)}"
                )
            mine.copy_(given)

    def dequantize(self, expert: int, dtype: torch.dtype) -> Tensor:
        """Weights of one expert: [rows, columns] in ``dtype``."""
        return dequantize(self.matrix(expert).unpack(self.widths[expert], self.group_size), dtype)

    def extra_repr(self) -> str:
        size = f"rows={self.rows}, columns={self.columns}, group_size={self.group_size}"
        return f"experts={self.num_experts}, {size}"


class PackedExperts(nn.Module):
    """Mixin for a family's experts class: packed projections; activation, clamps and biases stay its own."""

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
        if top_k_index is None or top_k_weights is None:  # a family that gives its experts batched rows
            top_k_index, top_k_weights = routing_of_rows(hidden_states, self.down_proj.num_experts)
        out = dispatch.experts_forward(self, hidden_states, top_k_index, top_k_weights)
        if getattr(self, "passes_on", False):
            out = out + passed_on(hidden_states, top_k_index, top_k_weights, self.down_proj.num_experts)
        return out

    def kernel_sizes(self) -> tuple[Any, ...]:
        """What distinguishes the kernels of two experts modules."""
        return tuple((m.rows, m.columns, m.group_size, *m.levels) for m in self._packed().values())

    def _packed(self) -> dict[str, PackedMatrices]:
        modules = ((name, self._modules.get(name)) for name in PROJECTIONS)
        return {name: module for name, module in modules if isinstance(module, PackedMatrices)}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for proj, matrices in self._packed().items():
            for e in range(matrices.num_experts):
                destination.update(matrices.matrix(e).named(f"{prefix}{e}.{proj}"))

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
        rest = dict(state_dict)
        for proj, matrices in self._packed().items():
            for e in range(matrices.num_experts):
                given = {name: rest.pop(name, None) for name in matrices.matrix(e).named(f"{prefix}{e}.{proj}")}
                absent = [name for name, tensor in given.items() if tensor is None]
                missing_keys += absent
                if absent:
                    continue
                try:
                    matrices.set_matrix(e, PackedMatrix(*given.values()))
                except ValueError as error:
                    error_msgs.append(f"{prefix}{e}.{proj}: {error}")
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)


_packed_classes: dict[type[nn.Module], type[nn.Module]] = {}  # family's class -> its packed subclass


def _packed_class(experts_class: type[nn.Module]) -> type[nn.Module]:
    if experts_class not in _packed_classes:
        name = f"Packed{experts_class.__name__}"

        def reduce(self: nn.Module, protocol: Any) -> Any:
            """For pickle and copy, which look a class up by name and would not find one that was made at run time."""
            return _new_packed, (experts_class,), self.__getstate__()

        _packed_classes[experts_class] = type(name, (PackedExperts, experts_class), {"__reduce_ex__": reduce})
    return _packed_classes[experts_class]


def _new_packed(experts_class: type[nn.Module]) -> nn.Module:
    """An empty instance of the packed subclass of a family's experts class."""
    packed_class = _packed_class(experts_class)
    return packed_class.__new__(packed_class)


def make_packed(experts: nn.Module, projections: Sequence[str]) -> None:
    """Turns an experts module into a PackedExperts in place and drops its 3-D parameters.

    The instance stays, so that what a family sets on it (limits, activations, biases, its gate) survives.
    The projections are then to be set as PackedMatrices.
    """
    for name in projections:
        delattr(experts, name)
    experts.__class__ = _packed_class(type(experts))


class PackedWeight(Tensor):
    """A packed linear's weight for whoever reads it: float32 [rows, columns], unpacked anew at each use.

    Nothing can be written to it: what is packed would not take it up, and it would be lost.
    """

    linear: PackedLinear

    @classmethod
    def of(cls, linear: PackedLinear) -> PackedWeight:
        place = linear.codes.new_empty(1, dtype=torch.float32).expand(linear.out_features, linear.in_features)
        weight = place.as_subclass(cls)
        weight.linear = linear
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _UNREAD:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _ITSELF:
            return args[0]
        changed = [kwargs.get("out")]
        if _writes(func.__name__):
            changed += [*args[:1], kwargs.get("input"), kwargs.get("tensor")]
        if any(isinstance(value, cls) for value in changed):
            raise RuntimeError(
                "a packed weight cannot be written to, nor take up an adapter: keep the adapter beside the packed "
                "model, or merge it into the plain model that gemq export --dense writes"
            )
        with torch._C.DisableTorchFunctionSubclass():
            args, kwargs = tree_map_only(cls, lambda weight: weight.linear.dequantize(torch.float32), (args, kwargs))
            return func(*args, **kwargs)


_UNREAD = {
    *(getattr(Tensor, name).__get__ for name in ("device", "dtype", "shape", "ndim", "is_cuda", "is_meta", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("requires_grad", "grad", "is_sparse", "is_quantized", "is_leaf")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.element_size, Tensor.is_floating_point, Tensor.is_complex),
    *(Tensor.get_device, Tensor.is_contiguous),
}
"""What can be asked of a weight without its numbers."""

_ITSELF = {getattr(Tensor.data, "__get__"), Tensor.detach}  # noqa: B009 - mypy takes it for a call


def _writes(name: str) -> bool:
    """Whether a function of this name changes its first argument: ``add_``, ``__iadd__``, setting an attribute."""
    return (name.endswith("_") and not name.startswith("__")) or name in _WRITING


_WRITING = {
    *("__set__", "__setitem__"),
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")),
}


class PackedLinear(nn.Linear):
    """``y = x W^T + bias`` with W [rows, columns] packed at one width.

    An ``nn.Linear`` by type, so that adapters (PEFT) attach to it. Its ``weight`` is no parameter and can only be read:
    merging an adapter into it raises RuntimeError.

    codes [rows, groups * bytes_per_group] uint8; scales and offsets [rows, groups] uint8.
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
        """Empty buffers, to be filled."""
        nn.Module.__init__(self)  # nn.Linear's own would make the weight
        self.in_features, self.out_features = columns, rows
        self.width, self.group_size = width, group_size
        groups = columns // group_size
        code_bytes = groups * bytes_per_group(width, group_size)
        self.register_buffer("codes", torch.empty(rows, code_bytes, dtype=torch.uint8, device=device))
        for name in ("scales", "offsets"):
            self.register_buffer(name, torch.empty(rows, groups, dtype=torch.uint8, device=device))
        self.register_parameter("bias", bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, matrix: PackedMatrix, width: Width, group_size: int) -> PackedLinear:
        """The packed replacement of ``linear``; keeps its bias."""
        packed = cls(linear.out_features, linear.in_features, width, group_size, linear.bias, device="meta")
        packed.codes, packed.scales, packed.offsets = matrix
        return packed

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return PackedWeight.of(self)

    def kernel_sizes(self) -> tuple[Any, ...]:
        """What distinguishes the kernels of two linears."""
        return (self.out_features, self.in_features, self.width, self.group_size)

    def matrix(self) -> PackedMatrix:
        return PackedMatrix(self.codes, self.scales, self.offsets)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Weights: [rows, columns] in ``dtype``."""
        return dequantize(self.matrix().unpack(self.width, self.group_size), dtype)

    def forward(self, x: Tensor) -> Tensor:
        return dispatch.linear_forward(self, x)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, width={self.width:g}, group_size={self.group_size}"
        )
