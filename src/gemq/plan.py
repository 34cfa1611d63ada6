"""The dry run: what a job would do to a model, from its configuration alone.

Checkpoint sizes are exact but for rounding the budget. Memory, disk and time are estimates; times rest on a short
measurement of this machine.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch

from gemq.models.source import Source, calibration_window, configured_types, pick_dtype
from gemq.models.structure import Structure, find_structure
from gemq.quant.widths import nominal_bits
from gemq.recipe import DEFAULT_BITS, Recipe
from gemq.sizes import expert_bytes, ladder_bytes, linear_bytes, other_bytes, quantized_share

BUDGETS = (1.5, 2.0, 2.5, 3.0)


@dataclass
class Plan:
    """What ``quantize`` would need and give.

    sizes:   bytes of the checkpoint's tensors by nominal bits per expert weight
    seconds: expected time of each stage on ``device``
    """

    model: str
    parameters: dict[str, int]
    quantized_share: float
    linears_not_quantized: tuple[str, ...]
    moe_layers: int
    layers: int
    experts: int
    original_bytes: int
    sizes: dict[str, int]
    budget: str
    window: int
    windows: int
    work_bytes: int
    memory_bytes: int
    device: str
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(source: Source, recipe: Recipe, device: torch.device) -> Plan:
    """The plan for a model and a recipe. Needs no weights. Raises UserError when the model cannot be quantized."""
    model = source.skeleton()
    structure = find_structure(model)
    stored = configured_types(model)
    fixed = other_bytes(model, structure, recipe, stored) + linear_bytes(structure, recipe)
    wanted = sorted({*BUDGETS, recipe.bits or DEFAULT_BITS})
    low, high = (nominal_bits(f(recipe.ladder_widths)) for f in (min, max))
    sizes = {f"{bits:g}": fixed + experts_at(structure, recipe, bits) for bits in wanted if low <= bits <= high}
    window = calibration_window(model.config, recipe.window)
    tokens = max(recipe.windows * window, recipe.total_tokens)
    compute = pick_dtype(recipe.dtype, device)
    hidden = model.config.get_text_config().hidden_size
    # all weights, and every layer's input, which the reverse pass walks back through
    memory = (
        structure.total_parameters * compute.itemsize + (len(structure.layers) + 1) * tokens * hidden * compute.itemsize
    )
    return Plan(
        model=str(source.path),
        parameters=structure.parameters,
        quantized_share=quantized_share(structure, recipe),
        linears_not_quantized=structure.kept_linears,
        moe_layers=len(structure.moe_layers),
        layers=len(structure.layers),
        experts=sum(x.experts.count for _, x in structure.moe_layers if x.experts),
        original_bytes=sum(p.numel() * stored[name].itemsize for name, p in model.named_parameters()),
        sizes=sizes,
        budget=recipe.budget_text,
        window=window,
        windows=recipe.windows,
        work_bytes=ladder_bytes(structure, recipe) + max(sizes.values(), default=0),
        memory_bytes=memory,
        device=str(device),
        seconds=expected_seconds(
            structure, recipe, tokens, recipe.windows * window, _experts_per_token(model.config), device, compute
        ),
    )


def experts_at(structure: Structure, recipe: Recipe, bits: float) -> int:
    """Bytes of all experts at ``bits`` nominal bits: between the sizes of the two widths around it."""
    widths = recipe.ladder_widths

    def total(width: float) -> int:
        return sum(
            x.experts.count * expert_bytes(x.experts, width, recipe.group_size)
            for _, x in structure.moe_layers
            if x.experts
        )

    for a, b in pairwise(widths):
        low, high = nominal_bits(a), nominal_bits(b)
        if low <= bits <= high:
            return round(total(a) + (total(b) - total(a)) * (bits - low) / (high - low))
    return total(widths[-1])


def expected_seconds(
    structure: Structure,
    recipe: Recipe,
    tokens: int,
    given: int,
    per_token: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Seconds a stage, from operations counted and this machine's measured rate of matrix products."""
    rate = measured_rate(device, dtype)
    dense = sum(x.rows * x.columns for layer in structure.layers for x in layer.linears)
    active, moments = dense, sum(x.columns**2 for layer in structure.layers for x in layer.linears)
    factors = 0.0
    for _, layer in structure.moe_layers:
        assert layer.experts is not None
        active += per_token * layer.experts.weights_per_expert
        moments += per_token * sum(m.columns**2 for m in layer.experts.matrices)
        factors += layer.experts.count * sum(m.columns**3 + m.rows * m.columns**2 for m in layer.experts.matrices)
    forward = 2.0 * active * tokens
    head = 2.0 * structure.parameters["other"] * tokens  # what is not in a layer is embedding and head
    widths = len(recipe.ladder_widths)
    solve = 4.0 * factors * widths
    step = 3 * forward  # forward and backward
    written = 1.0 if "self" in recipe.calib else 1 - given / tokens
    operations = {
        "calibration windows": 8 * (forward + head) * max(written, 0.0),
        "ladder": 2 * forward + 2.0 * moments * tokens + solve + recipe.ladder_epochs * widths * step,
        "scores": forward * (4 + widths) + 3 * head,
        "refine": 4 * forward + 2.0 * moments * tokens + solve / widths + recipe.layer_epochs * step,
        "distil": recipe.distil_epochs * (step + 4 * head + forward),
    }
    # small steps (activations, copies, rounding) keep the products at about a third of their rate
    return {name: round(3 * count / rate, 1) for name, count in operations.items()}


def measured_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a 1024 x 1024 matrix product, measured for a moment."""
    a = torch.randn(1024, 1024, device=device, dtype=dtype)

    def run(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    run(2)
    return 5 * 2 * 1024**3 / run(5)


def _experts_per_token(config: Any) -> int:
    """Experts that a token chooses. Families name it differently; most choose 2 to 8."""
    text = config.get_text_config()
    names = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "experts_per_token")
    return next((value for n in names if isinstance(value := getattr(text, n, None), int)), 4)
