"""A model and its variants that are rescaled by powers of two compute the same function. They quantize equally well.

Large language models have channels and neurons of very different sizes, the built-in model has none. Its variants
stand for them.
"""

from __future__ import annotations

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

MAX_RATIO = 1.03
"""Of KLs, either way, where codes are trained: differences below are those between seeds of one job."""

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
TRAINED = BASE.replace(effort="medium", total_tokens=1024)


def quantize(model: Path, folder: Path, recipe: Recipe) -> list[Path]:
    """Quantizes a model. Returns the checkpoint of ``quantize``, and that which ``export`` assembles."""
    quantized, assembled = folder / "quantized", folder / "assembled"
    work = gemq.quantize(model, recipe, out=quantized, device="cpu").work
    gemq.export(work, out=assembled, device="cpu")
    return [quantized, assembled]


def packed_codes(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Packed codes of a checkpoint by name."""
    tensors = {name: tensor for file in weight_files(checkpoint) for name, tensor in load_file(file).items()}
    return {name: tensor for name, tensor in tensors.items() if name.endswith(".codes")}


def mean_kl(checkpoint: Path) -> float:
    """KL to the original model, whose logits a variant has as well, in nats per token."""
    values = evaluate_paths(checkpoint, reference=builtin_model(), seq_len=64, max_windows=8, device="cpu")
    return float(values["mean_kl"])


@pytest.mark.parametrize("recipe", [BASE, TRAINED], ids=["low", "medium"])
def test_a_rescaled_model_quantizes_as_well_as_the_original(recipe: Recipe, tmp_path: Path) -> None:
    variant = write_rescaled(builtin_model(), tmp_path / "variant", 0)
    originals = quantize(builtin_model(), tmp_path / "of-original", recipe)
    results = quantize(variant, tmp_path / "of-variant", recipe)
    for original, result in zip(originals, results, strict=True):
        if recipe is BASE:  # powers of two are exact, so that what is not trained is the same to the bit
            expected = packed_codes(original)
            changed = [name for name, codes in packed_codes(result).items() if not torch.equal(codes, expected[name])]
            assert not changed, f"{len(changed)} of {len(expected)} matrices have other codes"
        else:
            ratio = mean_kl(result) / mean_kl(original)
            assert 1 / MAX_RATIO <= ratio <= MAX_RATIO, f"KL is {ratio:.3f} times the original's"
