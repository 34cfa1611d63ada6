"""Small packed checkpoints for tests: random weights, rounded to nearest, without calibration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedConfig, PreTrainedModel

from gemq.checkpoint.format import PackedFormat
from gemq.checkpoint.model_shapes import matrix_shapes
from gemq.checkpoint.save import dense_state, write_checkpoint
from gemq.quant.grid import Quantized, nearest
from gemq.quant.packing import PackedMatrix
from gemq.quant.widths import Width, group_size_for

WIDTHS: tuple[Width, ...] = (Width.ONE_BIT, Width.TERNARY, Width.TWO_BIT, Width.THREE_BIT)


def olmoe_config(**changes: int) -> OlmoeConfig:
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    }
    return OlmoeConfig(
        **{**sizes, **changes}, initializer_range=0.2, pad_token_id=0, bos_token_id=1, eos_token_id=2, dtype="bfloat16"
    )


def write_packed(
    out: Path,
    config: PreTrainedConfig | None = None,
    *,
    widths: Sequence[Width] = WIDTHS,
    shard_bytes: float = 4e9,
    source: Path | None = None,
) -> Path:
    """Writes a packed checkpoint of random weights: experts at ``widths`` in turn, dense linears at 4 bits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or olmoe_config(), dtype=torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    packed_format = _format(model, widths)
    write_checkpoint(
        out,
        config=model.config,
        packed_format=packed_format,
        shards=[_packed_tensors(model, packed_format), dense_state(model, packed_format)],
        source=source,
        shard_bytes=shard_bytes,
    )
    return out


def _format(model: PreTrainedModel, widths: Sequence[Width]) -> PackedFormat:
    experts, linears = {}, {}
    for path, module in model.named_modules():
        if hasattr(module, "is_transposed") and hasattr(module, "down_proj"):
            turned = [widths[(e + len(experts)) % len(widths)] for e in range(len(module.down_proj))]
            experts[path] = {"gate_up_proj": tuple(turned), "down_proj": tuple(turned[::-1])}
        elif isinstance(module, torch.nn.Linear) and not path.endswith(("lm_head", "gate", "router")):
            linears[path] = Width.FOUR_BIT
    return PackedFormat(experts=experts, linears=linears, group_size=64)


def _packed_tensors(model: PreTrainedModel, packed_format: PackedFormat) -> dict[str, torch.Tensor]:
    tensors = {}
    state = model.state_dict()
    shapes = matrix_shapes(model, packed_format)
    for name, kind, width in packed_format.matrices():
        if kind in packed_format.linears:
            weight = state[f"{kind}.weight"]
        else:
            weight = state[kind][int(name.split(".")[-2])]
            if model.get_submodule(kind.rpartition(".")[0]).is_transposed:
                weight = weight.T
        group_size = group_size_for(shapes[kind][1], packed_format.group_size)
        tensors.update(PackedMatrix.pack(_rounded(weight, width, group_size), width).named(name))
    return tensors


def _rounded(weight: torch.Tensor, width: Width, group_size: int) -> Quantized:
    """Codes of the nearest levels between the smallest and largest weight of each group."""
    groups, highest = weight.float().unflatten(-1, (-1, group_size)), width.max_code
    scales, offsets = nearest((groups.amax(-1) - groups.amin(-1)) / highest, groups.amin(-1), highest)
    codes = ((groups - offsets[..., None]) / scales[..., None]).round().clamp(0, highest)
    return Quantized(codes.to(torch.uint8).flatten(-2), scales, offsets)
