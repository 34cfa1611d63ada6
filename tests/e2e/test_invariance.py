"""A model and its variants that are rescaled by powers of two compute the same function. They quantize equally well.

Large language models have channels and neurons of very different sizes, the built-in model has none. Its variants
stand for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gemq
from gemq.assets import builtin_model, builtin_texts
from gemq.evaluation.evaluate import evaluate_paths
from gemq.quant.widths import Width
from gemq.recipe import Recipe
from gemq.runtime.safetensors_files import weight_files
from support.outliers import write_rescaled

pytestmark = pytest.mark.xdist_group("invariance")  # one process makes the jobs of the original model once

SEEDS = (0, 1)
MAX_RATIO = 1.03
"""Of KLs, either way: differences below are those between seeds of one job."""

BASE = Recipe(
    effort="low",
    bits=2,
    widths=(Width.ONE_BIT, Width.TWO_BIT, Width.THREE_BIT),
    calibration=tuple(str(file) for file in builtin_texts()),
    num_windows=10,
    seq_len=64,
    guard=False,  # its verdict could change between two results that are equally good
    dtype="float32",
)
RECIPES = {"low": BASE, "medium": BASE.replace(effort="medium", total_tokens=1024)}


@dataclass(frozen=True)
class Measured:
    """What two checkpoints of a model have: the one of ``quantize``, and the candidates that ``export`` assembled.

    Attributes:
        quantized_kl: KL to full precision, nats per token
        assembled_kl: the same
        assembled_codes: packed codes by name
    """

    quantized_kl: float
    assembled_kl: float
    assembled_codes: dict[str, torch.Tensor]


def measure(model: Path, folder: Path, recipe: Recipe) -> Measured:
    """Quantizes a model, which takes about 10 seconds, and measures the checkpoints in ``folder``."""
    quantized, assembled = folder / "quantized", folder / "assembled"
    work = gemq.quantize(model, recipe, out=quantized, device="cpu").work
    gemq.export(work, out=assembled, device="cpu")
    kl = [
        # The reference is the original model in any case: a variant has its logits.
        evaluate_paths(out, reference=builtin_model(), seq_len=64, max_windows=8, device="cpu")["mean_kl"]
        for out in (quantized, assembled)
    ]
    tensors = {name: tensor for file in weight_files(assembled) for name, tensor in load_file(file).items()}
    return Measured(*kl, {name: tensor for name, tensor in tensors.items() if name.endswith(".codes")})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    """Of the built-in model, by effort."""
    return {
        effort: measure(builtin_model(), tmp_path_factory.mktemp(effort), recipe) for effort, recipe in RECIPES.items()
    }


@pytest.mark.parametrize(("effort", "seed"), [*(("low", seed) for seed in SEEDS), ("medium", SEEDS[0])])
def test_a_rescaled_model_quantizes_as_well_as_the_original(
    original: dict[str, Measured], tmp_path: Path, effort: str, seed: int
) -> None:
    variant = measure(write_rescaled(builtin_model(), tmp_path / "variant", seed), tmp_path, RECIPES[effort])
    expected = original[effort]
    ratios = (variant.quantized_kl / expected.quantized_kl, variant.assembled_kl / expected.assembled_kl)
    assert all(1 / MAX_RATIO <= ratio <= MAX_RATIO for ratio in ratios), f"KL is {ratios} times the original's"
    # Powers of two are exact, so what nothing is trained for is the same bit for bit.
    if effort == "low":
        changed = [
            name
            for name, codes in expected.assembled_codes.items()
            if not torch.equal(codes, variant.assembled_codes[name])
        ]
        assert not changed, f"{len(changed)} of {len(expected.assembled_codes)} matrices have other codes"
