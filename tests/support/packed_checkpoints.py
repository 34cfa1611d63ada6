"""Small packed checkpoints for tests: random weights, rounded to nearest, or random trellis codes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedConfig, PreTrainedModel

from gemq.checkpoint.format import PackedFormat, PackedTensor
from gemq.checkpoint.model_shapes import matrix_shapes
from gemq.checkpoint.save import dense_state, write_checkpoint
from gemq.quant.grid import Quantized, nearest
from gemq.quant.packing import PackedMatrix
from gemq.quant.widths import AnyWidth, TrellisWidth, Width, group_size_for

WIDTHS: tuple[Width, ...] = (Width.ONE_BIT, Width.TERNARY, Width.TWO_BIT, Width.THREE_BIT)
TRELLIS_WIDTHS: tuple[TrellisWidth, ...] = tuple(map(TrellisWidth, (8, 17, 31, 32)))


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
    widths: Sequence[AnyWidth] = WIDTHS,
    state_bits: int = 0,
    shard_bytes: float = 4e9,
    source: Path | None = None,
) -> Path:
    """Writes a packed checkpoint of random weights: experts at ``widths`` in turn, dense linears at 4 bits.

    With ``state_bits``, ``widths`` are those of trellis codes, and codes and scales of experts are random.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config or olmoe_config(), dtype=torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    packed_format = _format(model, widths, state_bits)
    write_checkpoint(
        out,
        config=model.config,
        packed_format=packed_format,
        shards=[_packed_tensors(model, packed_format), dense_state(model, packed_format)],
        source=source,
        shard_bytes=shard_bytes,
    )
    return out


def write_trellis(out: Path, config: PreTrainedConfig | None = None, **options: Any) -> Path:
    """Writes a packed checkpoint whose experts have random trellis codes. ``options``: of ``write_packed``."""
    return write_packed(out, config, **{"widths": TRELLIS_WIDTHS, "state_bits": 12, **options})


def _format(model: PreTrainedModel, widths: Sequence[AnyWidth], state_bits: int) -> PackedFormat:
    experts, linears = {}, {}
    for path, module in model.named_modules():
        if hasattr(module, "is_transposed") and hasattr(module, "down_proj"):
            turned = [widths[(e + len(experts)) % len(widths)] for e in range(len(module.down_proj))]
            experts[path] = {"gate_up_proj": tuple(turned), "down_proj": tuple(turned[::-1])}
        elif isinstance(module, torch.nn.Linear) and not path.endswith(("lm_head", "gate", "router")):
            linears[path] = Width.FOUR_BIT
    return PackedFormat(experts=experts, linears=linears, group_size=64, state_bits=state_bits)


def _packed_tensors(model: PreTrainedModel, packed_format: PackedFormat) -> dict[str, torch.Tensor]:
    tensors = {}
    state = model.state_dict()
    shapes = matrix_shapes(model, packed_format)
    for matrix in packed_format.matrices():
        name, kind, width = matrix
        if isinstance(width, TrellisWidth):
            tensors.update(_random_trellis(matrix, *shapes[kind]))
            continue
        if kind in packed_format.linears:
            weight = state[f"{kind}.weight"]
        else:
            weight = state[kind][int(name.split(".")[-2])]
            if model.get_submodule(kind.rpartition(".")[0]).is_transposed:
                weight = weight.T
        group_size = group_size_for(shapes[kind][1], packed_format.group_size)
        tensors.update(PackedMatrix.pack(_rounded(weight, width, group_size), width).named(name))
    return tensors


def _random_trellis(matrix: PackedTensor, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Any bytes are valid codes. Scales are about 0.1."""
    code_shape = (rows // 16, columns // 16 * 4 * matrix.width.eighths)
    codes = torch.randint(0, 256, code_shape, dtype=torch.uint8)
    return {f"{matrix.name}.codes": codes, f"{matrix.name}.scales": torch.randint(160, 176, (rows,), dtype=torch.uint8)}


def _rounded(weight: torch.Tensor, width: Width, group_size: int) -> Quantized:
    """Codes of the nearest levels between the smallest and largest weight of each group."""
    groups, highest = weight.float().unflatten(-1, (-1, group_size)), width.max_code
    scales, offsets = nearest((groups.amax(-1) - groups.amin(-1)) / highest, groups.amin(-1), highest)
    codes = ((groups - offsets[..., None]) / scales[..., None]).round().clamp(0, highest)
    return Quantized(codes.to(torch.uint8).flatten(-2), scales, offsets)
