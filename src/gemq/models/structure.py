"""Finds experts, routers, shared experts and dense linears of a Transformers MoE by structure, not by name.

Transformers 5 gives nearly every MoE family one interface: an experts module that owns 3-D weights and is called as
``experts(hidden_states, top_k_index, top_k_weights)``. This module looks for that interface. What it does not
understand it refuses, naming the module. Works on models on the meta device too, so ``plan`` needs no weights.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from gemq.errors import UserError
from gemq.quant.widths import SMALLEST_GROUP

ROUTER_NAMES = ("gate", "router")
"""What families call a router. Any other sibling that owns a 2-D weight of one row an expert would do as well."""

SHARED = "shared"
"""Part of the name of what every token passes: shared experts, in all families that have them."""

SENSES = ("vision", "visual", "image", "audio")
"""Part of the name of experts that no text token is routed to. They stay as they are."""

FEWEST_ROWS = 16
"""Linears with fewer outputs are gates (such as Qwen2-MoE's shared_expert_gate): tiny, sensitive, not quantized."""


@dataclass(frozen=True)
class Matrix:
    """One weight matrix, or one per expert: ``rows`` outputs by ``columns`` inputs."""

    name: str
    rows: int
    columns: int


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer."""

    path: str
    """Module path inside the model, such as ``model.layers.0.mlp.experts``."""
    count: int
    matrices: tuple[Matrix, Matrix]
    """What an expert multiplies its input with first (``gate_up_proj`` or ``up_proj``), then ``down_proj``."""

    @property
    def weights_per_expert(self) -> int:
        return sum(m.rows * m.columns for m in self.matrices)


@dataclass(frozen=True)
class Linear:
    """A dense linear inside a decoder layer. ``kind`` is ``attention``, ``shared`` or ``dense``."""

    path: str
    rows: int
    columns: int
    kind: str


@dataclass(frozen=True)
class Layer:
    """One decoder layer. ``experts`` and ``router`` are None in a dense layer."""

    path: str
    experts: Experts | None
    router: str | None
    linears: tuple[Linear, ...]


@dataclass(frozen=True)
class Structure:
    """What gemq knows of a model."""

    layers_path: str
    layers: tuple[Layer, ...]
    parameters: dict[str, int]
    """Parameters by kind: experts, attention, shared, dense, router, and other (embeddings, norms, head)."""
    kept_linears: tuple[str, ...]
    """What stays unquantized though it is large or in a decoder layer: gates, columns that no group divides, subclasses
    of Linear, shared experts stacked in one weight, experts outside the language model."""

    @property
    def moe_layers(self) -> tuple[tuple[int, Layer], ...]:
        return tuple((i, layer) for i, layer in enumerate(self.layers) if layer.experts is not None)

    @cached_property
    def expert_weights(self) -> int:
        return sum(x.experts.count * x.experts.weights_per_expert for _, x in self.moe_layers if x.experts)

    @cached_property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())


def find_structure(model: nn.Module) -> Structure:
    """The structure of a Transformers causal LM (also on the meta device).

    Raises UserError when the model is dense, or naming the module that is not understood.
    """
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        raise UserError(
            f"{type(model).__name__} reads with an encoder and writes with a decoder: gemq quantizes models that "
            "predict each token from those before it"
        )
    if type(model).forward is nn.Module.forward:
        raise UserError(
            f"{type(model).__name__} is several models in one and has no forward pass of its own: give one of its parts"
        )
    modules = dict(model.named_modules())
    found_experts = {path: m for path, m in modules.items() if is_experts(m)}
    decoder = _decoder_path(model, modules)
    _refuse_unknown_experts(modules, found_experts, decoder)
    if not found_experts:
        raise UserError(
            f"{type(model).__name__} has no experts: gemq shrinks Mixture-of-Experts models; for a dense model take a "
            "weight quantizer such as GPTQ or AWQ"
        )
    layers_path = _layers_path(modules, list(found_experts), decoder)
    experts = {path: m for path, m in found_experts.items() if path.startswith(layers_path + ".")}
    kept = [path for path in found_experts if path not in experts]
    layers: list[Layer] = []
    for name, layer in modules[layers_path].named_children():
        path = f"{layers_path}.{name}"
        inside = [p for p in experts if p.startswith(path + ".")]
        if len(inside) > 1:  # some layers route text and images to experts of their own
            kept += [p for p in inside if _senses(p[len(path) :])]
            inside = [p for p in inside if not _senses(p[len(path) :])]
        if len(inside) > 1:
            raise UserError(f"layer {path} has several experts modules ({', '.join(inside)}): gemq handles one a layer")
        kept += _stacked_weights(path, layer, [*inside, *kept])
        found = _read_experts(inside[0], experts[inside[0]]) if inside else None
        router = _find_router(modules, found) if found else None
        if found and router:
            _check_top_k(model, modules[router], found)
        linears = []
        for sub, module in layer.named_modules():
            full = f"{path}.{sub}"
            if not isinstance(module, nn.Linear) or (router and f"{full}.".startswith(f"{router}.")):
                continue
            rows, columns = module.weight.shape
            own_forward = type(module) is not nn.Linear  # a subclass may compute something else
            if own_forward or rows < FEWEST_ROWS or columns % SMALLEST_GROUP:
                kept.append(full)
                continue
            linears.append(Linear(full, rows, columns, _kind(sub, full, found)))
        layers.append(Layer(path, found, router, tuple(linears)))
    return Structure(layers_path, tuple(layers), _count_parameters(model, layers), tuple(kept))


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds routed experts in Transformers' form, in full precision."""
    down = getattr(module, "down_proj", None)
    return (
        hasattr(module, "is_transposed")
        and hasattr(module, "has_gate")
        and isinstance(down, Tensor)
        and down.dim() == 3
    )


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalizes: its few parameters are trained with routers."""
    return "norm" in type(module).__name__.lower()


def _senses(path: str) -> bool:
    return any(word in path for word in SENSES)


def _decoder_path(model: Any, modules: dict[str, nn.Module]) -> str:
    """Path and dot of the language model inside a model that also sees or hears; empty where there is no such part."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return next((f"{path}." for path, module in modules.items() if module is decoder and path), "")


def _refuse_unknown_experts(modules: dict[str, nn.Module], known: dict[str, nn.Module], decoder: str) -> None:
    """Refuses routed experts that have another form, rather than leaving them unquantized in silence."""
    for path, module in modules.items():
        name = path.rpartition(".")[2]
        if (name != "experts" and not type(module).__name__.endswith("Experts")) or SHARED in name:
            continue
        if path in known or any(path.startswith(p + ".") or p.startswith(path + ".") for p in known):
            continue
        if path.startswith(decoder) and any(True for _ in module.parameters()):
            raise UserError(
                f"cannot quantize {path} ({type(module).__name__}): it does not have the experts interface of "
                "Transformers (3-D down_proj, is_transposed, has_gate); this family is not supported yet"
            )


def _stacked_weights(path: str, layer: nn.Module, known: list[str]) -> list[str]:
    """Shared experts stacked in one weight, which stay as they are.

    Refuses other matrices stacked in one weight that no experts module owns, rather than leave them out in silence.
    """
    kept = []
    for name, parameter in layer.named_parameters():
        owner = f"{path}.{name}".rpartition(".")[0]
        # convolution kernels are small in their last dimension and not meant here
        if parameter.dim() != 3 or min(parameter.shape[1:]) < SMALLEST_GROUP or owner in known:
            continue
        if SHARED not in owner[len(path) :]:
            kind = type(layer.get_submodule(name.rpartition(".")[0])).__name__
            raise UserError(
                f"cannot quantize {owner} ({kind}): its weight {name.rpartition('.')[2]!r} stacks matrices in a form "
                "that gemq does not know; this family is not supported yet"
            )
        kept.append(f"{path}.{name}")
    return kept


def _layers_path(modules: dict[str, nn.Module], experts: list[str], decoder: str) -> str:
    """Path of the one ModuleList whose children are the decoder layers; the language model's if there are several."""
    found = set()
    for path in experts:
        parts = path.split(".")
        prefixes = (".".join(parts[:i]) for i in range(1, len(parts)))
        found.add(next((p for p in prefixes if isinstance(modules[p], nn.ModuleList)), ""))
    if len(found) > 1 and decoder:
        found = {path for path in found if path.startswith(decoder)}
    if len(found) != 1 or "" in found:
        raise UserError(
            f"experts lie outside one list of decoder layers ({', '.join(sorted(experts)[:3])} ...): not supported"
        )
    return found.pop()


def _read_experts(path: str, module: Any) -> Experts:
    first = "gate_up_proj" if module.has_gate else "up_proj"
    if 0 in module.down_proj.shape:
        raise UserError(
            f"cannot quantize {path}: its down_proj is {list(module.down_proj.shape)}; correct number and size of "
            "experts in config.json"
        )
    matrices = []
    for name in (first, "down_proj"):
        weight = getattr(module, name, None)
        if not isinstance(weight, Tensor) or weight.dim() != 3:
            raise UserError(f"cannot quantize {path}: it has no 3-D weight {name!r}; this family is not supported yet")
        _, rows, columns = weight.shape
        if module.is_transposed:
            rows, columns = columns, rows
        if columns % SMALLEST_GROUP:
            raise UserError(
                f"cannot quantize {path}.{name}: its {columns} inputs are not a multiple of {SMALLEST_GROUP}"
            )
        matrices.append(Matrix(name, rows, columns))
    known = {m.name for m in matrices} | {f"{m.name}_bias" for m in matrices}
    other = [n for n, p in module.named_parameters(recurse=False) if n not in known and p.dim() >= 2]
    if other:
        raise UserError(f"cannot quantize {path}: unknown weights {', '.join(other)}; this family is not supported yet")
    return Experts(path, module.down_proj.shape[0], (matrices[0], matrices[1]))


def _find_router(modules: dict[str, nn.Module], experts: Experts) -> str:
    """Path of the module beside the experts that owns a 2-D weight with a row for every expert."""
    parent = experts.path.rpartition(".")[0]
    found = []
    for name, module in modules[parent].named_children():
        path = f"{parent}.{name}"
        if path == experts.path:
            continue
        # "or slightly more": some families route to a few experts that do nothing
        if any(p.dim() == 2 and 0 <= p.shape[0] - experts.count <= experts.count for p in module.parameters()):
            found.append((name in ROUTER_NAMES, path))
    named = [path for is_named, path in found if is_named]
    if len(named) == 1:
        return named[0]
    if len(found) == 1:
        return found[0][1]
    raise UserError(
        f"cannot tell which module routes to {experts.path} (candidates: {', '.join(p for _, p in found) or 'none'}); "
        "this family is not supported yet"
    )


def _check_top_k(model: Any, router: nn.Module, experts: Experts) -> None:
    """Refuses a router that chooses more experts a token than it has, or none."""
    top_k = getattr(router, "top_k", None)
    rows = max((p.shape[0] for p in router.parameters() if p.dim() == 2), default=experts.count)
    if isinstance(top_k, int) and not 1 <= top_k <= max(rows, experts.count):
        values = model.config.get_text_config().to_dict()
        field = next((k for k, v in values.items() if v == top_k and re.search(r"per_tok|top_?k", k)), "config.json")
        raise UserError(
            f"cannot quantize {experts.path}: its router chooses {top_k} of {experts.count} experts for a token; "
            f"correct {field} in config.json"
        )


def _kind(name: str, path: str, experts: Experts | None) -> str:
    if experts is not None and (path.startswith(experts.path.rpartition(".")[0] + ".") or SHARED in name):
        return "shared"
    return "attention" if "attn" in name or "attention" in name else "dense"


def _count_parameters(model: nn.Module, layers: list[Layer]) -> dict[str, int]:
    owner = {}
    for layer in layers:
        if layer.experts:
            owner[layer.experts.path] = "experts"
        if layer.router:
            owner[layer.router] = "router"
        owner.update({linear.path: linear.kind for linear in layer.linears})
    counts: Counter[str] = Counter({k: 0 for k in ("experts", "attention", "shared", "dense", "router", "other")})
    for name, parameter in model.named_parameters():
        path = name.rpartition(".")[0]
        while path and path not in owner:
            path = path.rpartition(".")[0]
        counts[owner.get(path, "other")] += parameter.numel()
    return dict(counts)
