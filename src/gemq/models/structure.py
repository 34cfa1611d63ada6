"""Finds experts, routers, shared experts and dense linears of a Transformers MoE by structure, not by name.

Transformers 5 gives nearly every MoE family one interface: an experts module that owns 3-D weights and is called as
``experts(hidden_states, top_k_index, top_k_weights)``. This module looks for that interface, and refuses modules that
it does not understand by their names. It also works on the meta device, so ``plan`` needs no weights.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from gemq.errors import UserError
from gemq.kernels.expert_inputs import first_matrix_name
from gemq.models.architecture_checks import (
    SHARED,
    refuse_other_architectures,
    refuse_unknown_experts,
    stacked_weights,
)
from gemq.quant.widths import SMALLEST_GROUP

ROUTER_NAMES = ("gate", "router")
"""Names of routers in most families. They decide between several modules that have a 2-D weight of one row per expert.
"""

OTHER_MODALITIES = ("vision", "visual", "image", "audio")
"""Parts of the names of experts that no text token is routed to. They stay unquantized."""

MIN_LINEAR_ROWS = 16
"""Linears with fewer outputs are gates, such as Qwen2-MoE's shared_expert_gate. They are tiny and sensitive, and stay
unquantized."""

PARAMETER_KINDS = ("experts", "attention", "shared", "dense", "router", "other")
"""Keys of ``Structure.parameters``."""


@dataclass(frozen=True)
class Matrix:
    """One weight matrix, or one per expert: ``rows`` outputs by ``columns`` inputs."""

    name: str
    rows: int
    columns: int


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer.

    Attributes:
        path: of the module inside the model, such as ``model.layers.0.mlp.experts``
        count: number of experts
        matrices: an expert's first matrix (``gate_up_proj`` or ``up_proj``) and ``down_proj``
    """

    path: str
    count: int
    matrices: tuple[Matrix, Matrix]

    @property
    def weights_per_expert(self) -> int:
        """Number of weights of one expert."""
        return sum(matrix.rows * matrix.columns for matrix in self.matrices)

    def stored_names(self, matrix: Matrix) -> list[str]:
        """Names in a checkpoint of one of the two matrices of every expert."""
        return [f"{self.path}.{expert}.{matrix.name}" for expert in range(self.count)]


@dataclass(frozen=True)
class Linear:
    """A dense linear inside a decoder layer. ``kind`` is ``attention``, ``shared`` or ``dense``."""

    path: str
    rows: int
    columns: int
    kind: str


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    Attributes:
        path: of the module inside the model
        experts: None in a dense layer
        router: path of the router; None in a dense layer
        linears: dense linears that can be quantized
    """

    path: str
    experts: Experts | None
    router: str | None
    linears: tuple[Linear, ...]


@dataclass(frozen=True)
class MoELayer(Layer):
    """A decoder layer with routed experts."""

    experts: Experts
    router: str


@dataclass(frozen=True)
class Structure:
    """The parts of a model that gemq treats differently.

    Attributes:
        layers_path: path of the list of decoder layers inside the model
        layers: the decoder layers
        parameters: number of parameters by kind, see ``PARAMETER_KINDS``; ``other`` is embeddings, norms and head
        unquantized_linears: paths of large weights and of linears in decoder layers that stay unquantized: gates,
            subclasses of Linear, linears whose columns no group size divides, shared experts stacked in one weight,
            experts outside the language model
    """

    layers_path: str
    layers: tuple[Layer, ...]
    parameters: dict[str, int]
    unquantized_linears: tuple[str, ...]

    @property
    def moe_layers(self) -> tuple[tuple[int, MoELayer], ...]:
        """Indices and layers with routed experts."""
        return tuple((index, layer) for index, layer in enumerate(self.layers) if isinstance(layer, MoELayer))

    @cached_property
    def expert_weights(self) -> int:
        """Number of weights of all routed experts."""
        return sum(layer.experts.count * layer.experts.weights_per_expert for _, layer in self.moe_layers)

    @cached_property
    def total_parameters(self) -> int:
        """Number of parameters of the model."""
        return sum(self.parameters.values())


def find_structure(model: nn.Module) -> Structure:
    """Finds the structure of a Transformers causal LM, which may be on the meta device.

    Raises:
        UserError: the model is dense, or it has a module that is not understood, which the message names
    """
    refuse_other_architectures(model)
    modules = dict(model.named_modules())
    experts_modules = {path: module for path, module in modules.items() if is_experts(module)}
    decoder_prefix = _decoder_prefix(model, modules)
    refuse_unknown_experts(modules, experts_modules, decoder_prefix)
    if not experts_modules:
        raise UserError(
            f"{type(model).__name__} has no experts: gemq shrinks Mixture-of-Experts models; for a dense model take a "
            "weight quantizer such as GPTQ or AWQ"
        )
    layers_path = _layers_path(modules, list(experts_modules), decoder_prefix)
    layer_experts = [path for path in experts_modules if path.startswith(layers_path + ".")]
    unquantized = [path for path in experts_modules if path not in layer_experts]
    layers: list[Layer] = []
    for name, _ in modules[layers_path].named_children():
        layers.append(_read_layer(model, modules, f"{layers_path}.{name}", layer_experts, unquantized))
    return Structure(layers_path, tuple(layers), _count_parameters(model, layers), tuple(unquantized))


def _read_layer(
    model: nn.Module, modules: dict[str, nn.Module], path: str, experts_paths: list[str], unquantized: list[str]
) -> Layer:
    """Reads one decoder layer.

    Args:
        model: the model
        modules: its modules by path
        path: of the layer
        experts_paths: of the experts modules of all decoder layers
        unquantized: receives the paths of what stays unquantized in this layer
    """
    layer = modules[path]
    inside = [p for p in experts_paths if p.startswith(path + ".")]
    if len(inside) > 1:  # some layers route text and images to different experts
        unquantized += [p for p in inside if _is_for_other_inputs(p[len(path) :])]
        inside = [p for p in inside if not _is_for_other_inputs(p[len(path) :])]
    if len(inside) > 1:
        raise UserError(f"layer {path} has several experts modules ({', '.join(inside)}): gemq handles one a layer")
    unquantized += stacked_weights(path, layer, [*inside, *unquantized])
    experts = _read_experts(inside[0], modules[inside[0]]) if inside else None
    router = _find_router(modules, experts) if experts else None
    if experts and router:
        _check_top_k(model, modules[router], experts)
    linears = _read_linears(path, layer, experts, router, unquantized)
    if experts and router:
        return MoELayer(path, experts, router, linears)
    return Layer(path, None, None, linears)


def _read_linears(
    path: str, layer: nn.Module, experts: Experts | None, router: str | None, unquantized: list[str]
) -> tuple[Linear, ...]:
    """Reads the dense linears of a layer. Appends the paths of those that stay unquantized to ``unquantized``."""
    linears = []
    for name, module in layer.named_modules():
        linear_path = f"{path}.{name}"
        if not isinstance(module, nn.Linear) or (router and f"{linear_path}.".startswith(f"{router}.")):
            continue
        rows, columns = module.weight.shape
        is_subclass = type(module) is not nn.Linear  # a subclass may compute something else
        if is_subclass or rows < MIN_LINEAR_ROWS or columns % SMALLEST_GROUP:
            unquantized.append(linear_path)
        else:
            linears.append(Linear(linear_path, rows, columns, _linear_kind(name, linear_path, experts)))
    return tuple(linears)


def is_experts(module: nn.Module) -> bool:
    """Returns whether a module holds routed experts in Transformers' form, in full precision."""
    down = getattr(module, "down_proj", None)
    return (
        hasattr(module, "is_transposed")
        and hasattr(module, "has_gate")
        and isinstance(down, Tensor)
        and down.dim() == 3
    )


def is_norm(module: nn.Module) -> bool:
    """Returns whether a module is a norm. Norms are trained with routers."""
    return "norm" in type(module).__name__.lower()


def _is_for_other_inputs(path: str) -> bool:
    """Returns whether experts are for images or sound."""
    return any(word in path for word in OTHER_MODALITIES)


def _decoder_prefix(model: Any, modules: dict[str, nn.Module]) -> str:
    """Returns the path of the language model inside a multimodal model, with a dot at its end; "" in other models."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for path, module in modules.items():
        if module is decoder and path:
            return f"{path}."
    return ""


def _layers_path(modules: dict[str, nn.Module], experts_paths: list[str], decoder_prefix: str) -> str:
    """Returns the path of the ModuleList of decoder layers; that of the language model if there are several.

    Raises:
        UserError: experts lie outside one such list
    """
    paths = {_outermost_list(modules, path) for path in experts_paths}
    if len(paths) > 1 and decoder_prefix:
        paths = {path for path in paths if path.startswith(decoder_prefix)}
    if len(paths) != 1 or "" in paths:
        examples = ", ".join(sorted(experts_paths)[:3])
        raise UserError(f"experts lie outside one list of decoder layers ({examples} ...): not supported")
    return paths.pop()


def _outermost_list(modules: dict[str, nn.Module], path: str) -> str:
    """Returns the path of the outermost ModuleList around a module; "" if there is none."""
    names = path.split(".")
    for end in range(1, len(names)):
        prefix = ".".join(names[:end])
        if isinstance(modules[prefix], nn.ModuleList):
            return prefix
    return ""


def _read_experts(path: str, module: Any) -> Experts:
    """Reads an experts module.

    Raises:
        UserError: its weights are not understood
    """
    if 0 in module.down_proj.shape:
        raise UserError(
            f"cannot quantize {path}: its down_proj is {list(module.down_proj.shape)}; correct number and size of "
            "experts in config.json"
        )
    first_matrix = _read_matrix(path, module, first_matrix_name(module))
    down_matrix = _read_matrix(path, module, "down_proj")
    expected = {name for m in (first_matrix, down_matrix) for name in (m.name, f"{m.name}_bias")}
    unknown = [n for n, p in module.named_parameters(recurse=False) if n not in expected and p.dim() >= 2]
    if unknown:
        raise UserError(
            f"cannot quantize {path}: unknown weights {', '.join(unknown)}; this family is not supported yet"
        )
    return Experts(path, module.down_proj.shape[0], (first_matrix, down_matrix))


def _read_matrix(path: str, module: Any, name: str) -> Matrix:
    """Reads the shape of one matrix of an experts module.

    Raises:
        UserError: it is missing, or no group size divides its columns
    """
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or weight.dim() != 3:
        raise UserError(f"cannot quantize {path}: it has no 3-D weight {name!r}; this family is not supported yet")
    _, rows, columns = weight.shape
    if module.is_transposed:
        rows, columns = columns, rows
    if columns % SMALLEST_GROUP:
        raise UserError(f"cannot quantize {path}.{name}: its {columns} inputs are not a multiple of {SMALLEST_GROUP}")
    return Matrix(name, rows, columns)


def _find_router(modules: dict[str, nn.Module], experts: Experts) -> str:
    """Returns the path of the experts' sibling that owns a 2-D weight with a row for every expert.

    Raises:
        UserError: no sibling or several siblings have such a weight
    """
    parent = experts.path.rpartition(".")[0]
    candidates = []
    for name, module in modules[parent].named_children():
        path = f"{parent}.{name}"
        if path == experts.path:
            continue
        # up to twice as many rows: some families also route to experts that do nothing
        if any(p.dim() == 2 and experts.count <= p.shape[0] <= 2 * experts.count for p in module.parameters()):
            candidates.append(path)
    usual = [path for path in candidates if path.rpartition(".")[2] in ROUTER_NAMES]
    if len(usual) == 1:
        return usual[0]
    if len(candidates) == 1:
        return candidates[0]
    raise UserError(
        f"cannot tell which module routes to {experts.path} (candidates: {', '.join(candidates) or 'none'}); "
        "this family is not supported yet"
    )


def _check_top_k(model: Any, router: nn.Module, experts: Experts) -> None:
    """Refuses a router that chooses no expert per token, or more than there are."""
    top_k = getattr(router, "top_k", None)
    rows = max((p.shape[0] for p in router.parameters() if p.dim() == 2), default=experts.count)
    if isinstance(top_k, int) and not 1 <= top_k <= max(rows, experts.count):
        values = model.config.get_text_config().to_dict()
        field = next((k for k, v in values.items() if v == top_k and re.search(r"per_tok|top_?k", k)), "config.json")
        raise UserError(
            f"cannot quantize {experts.path}: its router chooses {top_k} of {experts.count} experts for a token; "
            f"correct {field} in config.json"
        )


def _linear_kind(name: str, path: str, experts: Experts | None) -> str:
    """Returns the kind of a dense linear, from its name inside the layer and its path inside the model."""
    if experts is not None and (path.startswith(experts.path.rpartition(".")[0] + ".") or SHARED in name):
        return "shared"
    return "attention" if "attn" in name or "attention" in name else "dense"


def _count_parameters(model: nn.Module, layers: list[Layer]) -> dict[str, int]:
    """Counts the model's parameters by kind, see ``PARAMETER_KINDS``."""
    kinds = {}  # by path of the module
    for layer in layers:
        if layer.experts:
            kinds[layer.experts.path] = "experts"
        if layer.router:
            kinds[layer.router] = "router"
        for linear in layer.linears:
            kinds[linear.path] = linear.kind
    counts: Counter[str] = Counter(dict.fromkeys(PARAMETER_KINDS, 0))
    for name, parameter in model.named_parameters():
        path = name.rpartition(".")[0]
        while path and path not in kinds:
            path = path.rpartition(".")[0]
        counts[kinds.get(path, "other")] += parameter.numel()
    return dict(counts)
