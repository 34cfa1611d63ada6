"""A model and its variants that are rescaled by powers of two compute the same function. They quantize alike.

Large language models have channels and neurons of very different sizes, the built-in model has none. Its variants
stand for them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

import gemq
from gemq.assets import builtin_texts
from gemq.quant.widths import Width
from gemq.recipe import Recipe
from gemq.runtime.safetensors_files import weight_files
from support.cli import write_first_layers
from support.outliers import write_rescaled

RECIPE = Recipe(
    effort="low",
    bits=2,
    widths=(Width.ONE_BIT, Width.TWO_BIT, Width.THREE_BIT),
    calibration=tuple(str(file) for file in builtin_texts()),
    num_windows=10,
    seq_len=64,
    guard=False,  # its verdict could change between two results that are equally good
    dtype="float32",
)


def quantize(model: Path, folder: Path) -> list[Path]:
    """Quantizes a model. Returns the checkpoint of ``quantize``, and that which ``export`` assembles."""
    quantized, assembled = folder / "quantized", folder / "assembled"
    work = gemq.quantize(model, RECIPE, out=quantized, device="cpu").work
    gemq.export(work, out=assembled, device="cpu")
    return [quantized, assembled]


def packed_codes(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Packed codes of a checkpoint by name."""
    tensors = {name: tensor for file in weight_files(checkpoint) for name, tensor in load_file(file).items()}
    return {name: tensor for name, tensor in tensors.items() if name.endswith(".codes")}


def test_a_rescaled_model_gets_the_codes_of_the_original(tmp_path: Path) -> None:
    """Powers of two are exact. With training, ``tests/unit/test_equalization.py`` has a random model."""
    model = write_first_layers(tmp_path / "model", 2)
    variant = write_rescaled(model, tmp_path / "variant", 0)
    originals = quantize(model, tmp_path / "of-original")
    results = quantize(variant, tmp_path / "of-variant")
    for original, result in zip(originals, results, strict=True):
        expected = packed_codes(original)
        changed = [name for name, codes in packed_codes(result).items() if not torch.equal(codes, expected[name])]
        assert not changed, f"{len(changed)} of {len(expected)} matrices have other codes"
