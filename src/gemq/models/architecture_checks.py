"""Refuses models that gemq does not support, and modules that would silently stay unquantized."""

from __future__ import annotations

import inspect

from torch import nn

from gemq.errors import UserError
from gemq.quant.widths import SMALLEST_GROUP

SHARED = "shared"
"""Part of the name of shared experts, which every token passes, in all families that have them."""


def refuse_other_architectures(model: nn.Module) -> None:
    """Refuses models that are not causal language models."""
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        raise UserError(
            f"{type(model).__name__} is an encoder-decoder model: gemq quantizes causal language models only"
        )
    if type(model).forward is nn.Module.forward:
        raise UserError(
            f"{type(model).__name__} is several models in one and has no forward pass of its own: give one of its parts"
        )


def refuse_unknown_experts(
    modules: dict[str, nn.Module], experts_modules: dict[str, nn.Module], decoder_prefix: str
) -> None:
    """Refuses routed experts of another form. They would silently stay unquantized."""
    for path, module in modules.items():
        name = path.rpartition(".")[2]
        if (name != "experts" and not type(module).__name__.endswith("Experts")) or SHARED in name:
            continue
        if any(path == p or path.startswith(p + ".") or p.startswith(path + ".") for p in experts_modules):
            continue
        if path.startswith(decoder_prefix) and next(module.parameters(), None) is not None:
            raise UserError(
                f"cannot quantize {path} ({type(module).__name__}): it does not have the experts interface of "
                "Transformers (3-D down_proj, is_transposed, has_gate); this family is not supported yet"
            )


def stacked_weights(path: str, layer: nn.Module, experts_paths: list[str]) -> list[str]:
    """Returns paths of shared experts that are stacked in one weight. They stay unquantized.

    Raises:
        UserError: other matrices are stacked in a weight that no experts module owns. They would silently stay
            unquantized.
    """
    stacked = []
    for name, parameter in layer.named_parameters():
        owner = f"{path}.{name}".rpartition(".")[0]
        # the last dimension of a convolution kernel is small
        if parameter.dim() != 3 or min(parameter.shape[1:]) < SMALLEST_GROUP or owner in experts_paths:
            continue
        if SHARED not in owner[len(path) :]:
            owner_class = type(layer.get_submodule(name.rpartition(".")[0])).__name__
            raise UserError(
                f"cannot quantize {owner} ({owner_class}): its weight {name.rpartition('.')[2]!r} stacks matrices in a "
                "form that gemq does not know; this family is not supported yet"
            )
        stacked.append(f"{path}.{name}")
    return stacked
