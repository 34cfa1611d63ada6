"""Packed models of true shapes with random weights: for speed, nothing else, so no full-precision expert ever exists.

    python benchmarks/shapes.py olmoe-1b-7b-2.0 OUT [--device cuda]     writes one as a packed checkpoint

``packed_model`` builds one in memory and ``write`` stores it (without a tokenizer). ``dense_config`` is the same model
unquantized. Widths are dealt out at random over all experts of all layers, in the shares of a shape's ``mix``.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, PreTrainedConfig

from gemq.checkpoint.format import PackedFormat
from gemq.checkpoint.names import hub_state
from gemq.checkpoint.save import SHARD_BYTES, config_values, write_checkpoint, write_directory
from gemq.kernels.modules import PackedLinear, PackedMatrices, make_packed
from gemq.kernels.trellis.experts import TrellisMatrices
from gemq.models.structure import Structure, find_structure
from gemq.quant.grid import encode, encode_scales
from gemq.quant.packing import PackedMatrix
from gemq.quant.trellis import STATE_BITS
from gemq.quant.trellis_matrix import TrellisMatrix
from gemq.quant.widths import TILE_SIDE, TrellisWidth, Width, affine_widths, group_size_for, trellis_widths

GROUP_SIZE = 128
STD = 0.02
"""Standard deviation of all weights: large enough that nothing underflows, small enough that nothing overflows."""

TWO_BITS = {Width.ONE_BIT: 15, Width.TERNARY: 45, Width.TWO_BIT: 99, Width.THREE_BIT: 33}
"""Experts at each width out of 192: 2.0 nominal bits. An allocation on a real model looked like it."""

TWO_AND_A_HALF_BITS = {Width.TERNARY: 16, Width.TWO_BIT: 74, Width.THREE_BIT: 102}

TRELLIS_TWO_BITS = {
    TrellisWidth(12): 1,
    TrellisWidth(14): 2,
    TrellisWidth(16): 4,
    TrellisWidth(18): 2,
    TrellisWidth(20): 1,
}
TRELLIS_TWO_AND_A_HALF_BITS = {TrellisWidth(width.eighths + 4): share for width, share in TRELLIS_TWO_BITS.items()}


@dataclass(frozen=True)
class Shape:
    """``changes`` are those of the configuration's defaults; ``mix`` gives the shares of the experts' widths."""

    name: str
    kind: type[PreTrainedConfig]
    changes: dict[str, Any]
    mix: Mapping[Any, int] = field(default_factory=lambda: TWO_BITS)
    dense_width: Width = Width.FOUR_BIT

    @property
    def has_trellis(self) -> bool:
        """Whether the experts have trellis codes."""
        return isinstance(next(iter(self.mix)), TrellisWidth)

    def dense_config(self) -> PreTrainedConfig:
        no_ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        return self.kind(**self.changes, **no_ends, dtype="bfloat16")


OLMOE = {
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 50304,
    "max_position_embeddings": 4096,
}
MIXTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
SMALL = {
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
}
MEDIUM = {**OLMOE, "num_hidden_layers": 4, "num_experts": 32, "vocab_size": 16384}

SHAPES = {
    shape.name: shape
    for shape in (
        Shape("olmoe-1b-7b-2.0", OlmoeConfig, OLMOE),
        Shape("olmoe-1b-7b-2.5", OlmoeConfig, OLMOE, TWO_AND_A_HALF_BITS),
        *(
            Shape(f"olmoe-1b-7b-{width}", OlmoeConfig, OLMOE, {width: 1})
            for width in Width
            if width is not Width.TWO_BIT
        ),
        Shape("mixtral-8x7b-2.0", MixtralConfig, MIXTRAL),
        Shape("mixtral-8x7b-2.5", MixtralConfig, MIXTRAL, TWO_AND_A_HALF_BITS),
        Shape("olmoe-1b-7b-trellis-2.0", OlmoeConfig, OLMOE, TRELLIS_TWO_BITS),
        Shape("mixtral-8x7b-trellis-2.5", MixtralConfig, MIXTRAL, TRELLIS_TWO_AND_A_HALF_BITS),
        Shape("small-trellis-2.0", OlmoeConfig, SMALL, TRELLIS_TWO_BITS),
        Shape("small-2.0", OlmoeConfig, SMALL),  # to try a script out
        Shape("medium-2.0", OlmoeConfig, MEDIUM),  # layers as wide as OLMoE's, for CPUs
    )
}


def packed_model(shape: Shape, device: str | torch.device, seed: int = 0) -> Any:
    """The model on ``device``, packed, in bfloat16 and eval mode."""
    config = shape.dense_config()
    with init_empty_weights(include_buffers=False):  # rotary frequencies are computed, not loaded
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    packed = packed_format(shape, find_structure(model), seed)
    random = torch.Generator(device).manual_seed(seed)
    for path, projections in packed.experts.items():
        experts = model.get_submodule(path)
        sizes = {name: getattr(experts, name).shape[1:] for name in projections}
        make_packed(experts, list(projections))
        for name, widths in projections.items():
            rows, columns = sizes[name]
            if shape.has_trellis:
                trellis = [_random_trellis(rows, columns, width, random) for width in trellis_widths(widths)]
                setattr(experts, name, TrellisMatrices(trellis))
                continue
            size = group_size_for(columns, GROUP_SIZE)
            matrices = [_random_matrix(rows, columns, width, size, random) for width in affine_widths(widths)]
            setattr(experts, name, PackedMatrices(matrices))
    for path, width in packed.linears.items():
        linear: Any = model.get_submodule(path)
        size = group_size_for(linear.in_features, GROUP_SIZE)
        matrix = _random_matrix(linear.out_features, linear.in_features, width, size, random)
        model.set_submodule(path, PackedLinear.from_linear(linear, matrix))
    _fill(model, random)
    config.quantization_config = packed.to_dict()
    return model.eval()


def dense_model(shape: Shape, device: str | torch.device, seed: int = 0) -> Any:
    """The same model unquantized, in bfloat16: what the packed one is compared with."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(shape.dense_config(), dtype=torch.bfloat16)
    _fill(model, torch.Generator(device).manual_seed(seed))
    return model.eval()


def write(shape: Shape, out: Path, device: str | torch.device = "cpu", seed: int = 0) -> None:
    """A packed checkpoint of ``packed_model`` in the new directory ``out``."""
    model = packed_model(shape, device, seed)
    model.config.architectures = [type(model).__name__]  # vLLM chooses its model class by it
    packed = PackedFormat.from_dict(model.config.quantization_config)
    write_checkpoint(
        out,
        config=model.config,
        packed_format=packed,
        shards=_shards(model, set(packed.tensor_names())),
        source=None,
    )


def write_dense(shape: Shape, out: Path, device: str | torch.device = "cpu", seed: int = 0) -> None:
    """The checkpoint of ``dense_model`` in the new directory ``out``, under the names of the hub."""
    model = dense_model(shape, device, seed)
    model.config.architectures = [type(model).__name__]
    shards = _shards(model, set())
    write_directory(out, config_values(model.config), shards, None, shard_bytes=SHARD_BYTES)


def packed_format(shape: Shape, structure: Structure, seed: int) -> PackedFormat:
    """Widths for every expert, dealt out at random in the shares of the mix, and for every attention linear."""
    counts = [layer.experts.count for _, layer in structure.moe_layers]
    total, total_shares = sum(counts), sum(shape.mix.values())
    deck = [width for width, share in shape.mix.items() for _ in range(round(total * share / total_shares))]
    deck = (deck + [max(shape.mix)] * total)[:total]
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    dealt = iter([deck[i] for i in order])
    experts = {}
    for _, layer in structure.moe_layers:
        assert layer.experts is not None
        widths = tuple(next(dealt) for _ in range(layer.experts.count))
        experts[layer.experts.path] = {matrix.name: widths for matrix in layer.experts.matrices}
    linears = {linear.path: shape.dense_width for layer in structure.layers for linear in layer.linears}
    state_bits = STATE_BITS if shape.has_trellis else 0
    return PackedFormat(experts=experts, linears=linears, group_size=GROUP_SIZE, state_bits=state_bits)


def mean_bits(shape: Shape) -> float:
    """Nominal bits per expert weight."""
    return sum(w.bits * n for w, n in shape.mix.items()) / sum(shape.mix.values())


def random_codes(rows: int, groups: int, width: Width, size: int, random: torch.Generator) -> Tensor:
    """Codes drawn evenly, uint8 [rows, groups * bytes of a group], on the generator's device."""
    group_bytes = width.group_bytes(size)
    values = 243 if width is Width.TERNARY else 256  # a byte of five ternary codes
    codes = torch.randint(
        values, (rows, groups, group_bytes), dtype=torch.uint8, device=random.device, generator=random
    )
    if width is Width.TERNARY:
        codes[..., size - 4 * group_bytes :] %= 81  # the fifth code of these bytes is none of the group's
    return codes.view(rows, -1)


def _random_trellis(rows: int, columns: int, width: TrellisWidth, random: torch.Generator) -> TrellisMatrix:
    """A matrix of random trellis codes."""
    shape = (rows // TILE_SIDE, columns // TILE_SIDE * 4 * width.eighths)
    codes = torch.randint(256, shape, dtype=torch.uint8, device=random.device, generator=random)
    scales = encode_scales(torch.full((rows,), STD, device=random.device))
    return TrellisMatrix(codes, scales, width, STATE_BITS)


def _random_matrix(rows: int, columns: int, width: Width, size: int, random: torch.Generator) -> PackedMatrix:
    """Codes drawn evenly; scales and offsets such that weights have mean 0 and standard deviation ``STD``."""
    groups, levels = columns // size, width.levels
    codes = random_codes(rows, groups, width, size, random)
    step = STD / ((levels**2 - 1) / 12) ** 0.5
    spread = torch.rand(rows, groups, device=random.device, generator=random) * 0.2 + 0.9
    return PackedMatrix(codes, *encode(step * spread, -step * spread * (levels - 1) / 2, levels - 1), width)


def _fill(model: nn.Module, random: torch.Generator) -> None:
    """Random values for what is still on the meta device, ones for norms; the rest moves to the generator's device."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=random.device)
                value = value.fill_(1.0) if value.dim() == 1 else value.normal_(std=STD, generator=random)
                setattr(module, name, nn.Parameter(value, requires_grad=False))
    model.to(random.device)


def _shards(model: Any, packed_names: set[str]) -> Iterator[dict[str, Tensor]]:
    """A layer at a time, so that families' conversions see a whole one."""
    state = model.state_dict()
    by_layer: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        components = name.split(".layers.", 1)
        by_layer.setdefault(components[1].split(".")[0] if len(components) > 1 else "", {})[name] = tensor
    for tensors in by_layer.values():
        packed = {name: tensors[name] for name in tensors if name in packed_names}
        yield packed | hub_state(model, {name: t for name, t in tensors.items() if name not in packed})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    write(SHAPES[args.shape], args.out, args.device)


if __name__ == "__main__":
    main()
