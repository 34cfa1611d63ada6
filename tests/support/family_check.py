"""The check that gemq handles a family: a tiny random model of it is quantized, saved, read back and run."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers.models.auto import modeling_auto

import gemq
from gemq.calibration.self_generation import WindowPlan, generate_windows
from gemq.calibration.windows import concat_sources
from gemq.decoding.decoder import Decoder, Unsupported
from gemq.errors import UserError
from gemq.evaluation.evaluate import evaluate
from gemq.models.source import Source
from gemq.models.structure import OTHER_MODALITIES, find_structure
from gemq.recipe import Recipe
from support.equalization import equalized_model, rescaled
from support.families import random_model, tiny_config
from support.plain_reader import read_packed
from support.tokenizer import save_tokenizer

BITS = 2.0
TOLERANCE = 1e-5
"""Relative difference of logits. Both sides dequantize to the same float32 and multiply in the same order."""


@dataclass
class Outcome:
    """What became of one family.

    status: ``works``; ``refused`` with one line and nothing left behind; ``fails`` for anything else
    """

    family: str
    model_type: str
    status: str
    reason: str = ""
    router: str = ""
    unquantized: list[str] = field(default_factory=list)
    """Kinds of weights in the layers that stay unquantized, besides router, norms and embeddings."""
    seconds: float = 0.0


def families() -> dict[str, list[str]]:
    """Model types by the folder of Transformers that defines them: all language models with routed experts."""
    folders = Path(transformers.__file__).parent / "models"
    types_by_family: dict[str, list[str]] = {}
    for file in sorted(folders.glob("*/modeling_*.py")):
        text = file.read_text(encoding="utf-8")
        decorated = re.search(r"^@use_experts_implementation", text, re.MULTILINE)
        if not decorated and not re.search(
            r"^class \w*Experts\w*\(|^class \w*CDMoE\(|self\.experts\b", text, re.MULTILINE
        ):
            continue
        classes = set(re.findall(r"^class (\w+)\(", text, re.MULTILINE))
        types = sorted({kind for kind, name in _language_models() if name in classes})
        if not types and decorated:
            types = sorted({k for k, n in modeling_auto.MODEL_MAPPING_NAMES.items() if classes & set(_names(n))})
        if types:
            types_by_family[file.parent.name] = types
    return types_by_family


def _language_models() -> Iterator[tuple[str, str]]:
    """(model type, class). A wrapper's type counts once, with the class that sees and hears."""
    wrapped = modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    plain = {k: n for k, n in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if k not in wrapped}
    for mapping in (wrapped, plain, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES):
        for kind, names in mapping.items():
            yield from ((kind, name) for name in _names(names))


def _names(value: Any) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def check(model_type: str, folder: Path, family: str = "") -> Outcome:
    """Builds, quantizes, reads back and runs a tiny model of a family in ``folder``. Raises AssertionError."""
    outcome = Outcome(family or model_type, model_type, "works")
    begin = time.perf_counter()
    model = random_model(tiny_config(model_type))
    source, out, work = folder / "source", folder / "out", folder / "out.work"
    model.save_pretrained(source)
    save_tokenizer(source)
    generator = torch.Generator().manual_seed(5)
    text = folder / "text.txt"
    text.write_text("".join(map(chr, torch.randint(33, 126, (600,), generator=generator).tolist())))
    recipe = Recipe(
        effort="low", bits=BITS, calibration=(str(text),), num_windows=6, seq_len=24, micro_batch_tokens=72, guard=False
    )
    refusal = ""
    try:
        result = gemq.quantize(str(source), recipe, out=out, work=work, device="cpu")
    except UserError as error:
        refusal = str(error)
    if refusal:
        assert "\n" not in refusal
        assert not out.exists(), "a refused model left an output"
        assert not work.exists(), "a refused model left a work directory"
        outcome.status, outcome.reason = "refused", refusal.replace(str(source), "the model")
        outcome.seconds = round(time.perf_counter() - begin, 2)
        return outcome
    assert result.expert_bits_nominal <= BITS
    weights, unpacked, config = read_packed(out)
    _check_coverage(model, Source(source).skeleton(), weights, outcome)
    loaded = gemq.load(out, dtype=torch.float32)
    reference, _ = Source(source).load(torch.device("cpu"), torch.float32)
    _check_equalization(model, reference, folder, loaded, weights)
    twin = _load_twin(model, folder / "twin", weights, unpacked, config)
    ids = torch.randint(3, 256, (2, 20), generator=generator)
    with torch.no_grad():
        exact, packed, plain = (m(input_ids=ids, use_cache=False).logits for m in (model, loaded, twin))
    assert packed.isfinite().all()
    assert _difference(packed, plain) < TOLERANCE, f"logits differ from the twin's by {_difference(packed, plain):.2g}"
    assert _difference(packed, exact) > 1e-3, "nothing was quantized"
    written, expected = (m.generate(ids[:1], max_new_tokens=4, do_sample=False) for m in (loaded, twin))
    assert torch.equal(written, expected), "writes other tokens than the twin"
    assert written.shape[1] > ids.shape[1]
    _check_commands(loaded, reference, Source(source).tokenizer, ids, written[0, ids.shape[1] :].tolist())
    outcome.seconds = round(time.perf_counter() - begin, 2)
    return outcome


def _check_commands(loaded: Any, reference: Any, tokenizer: Any, ids: torch.Tensor, written: list[int]) -> None:
    """What ``generate``, ``eval --reference`` and calibration on the model's own text do with a family."""
    try:
        decoder = Decoder(loaded, 1, ids.shape[1] + len(written))
        steps = [decoder.prefill(ids[:1]).tolist(), *decoder.decode(len(written) - 1)]
    except Unsupported:
        pass  # the command leaves it to ``model.generate``
    else:
        assert [token for (token,) in steps] == written, "gemq generate writes other tokens than model.generate"
    windows = concat_sources([ids], ["text"], [ids.numel()])
    structure = find_structure(reference)
    values = evaluate(loaded, windows, reference=reference, structure=structure)
    assert values["mean_kl"] > 0, "eval --reference finds no difference"
    assert len(values["layers"]) == len(structure.moe_layers)
    for model in (reference, loaded):
        (generated,) = generate_windows(model, tokenizer, WindowPlan(2, 0), seq_len=6).tokens
        assert generated.shape == (2, 6)


def _check_coverage(model: Any, skeleton: Any, weights: dict[str, torch.Tensor], outcome: Outcome) -> None:
    """Every routed expert of the language model is packed, nothing of a router is."""
    structure = find_structure(skeleton)
    layer = structure.moe_layers[0][1]
    assert layer.router is not None
    outcome.router = layer.router.rpartition(".")[2]
    inside = f"{structure.layers_path}."
    outcome.unquantized = sorted(
        {
            re.sub(r"\.\d+\.", ".N.", path) if not path.startswith(inside) else path[len(inside) :].partition(".")[2]
            for path in structure.unquantized_linears
        }
    )
    routed = set()
    for path, module in model.named_modules():
        if (
            type(module).__name__.endswith("Experts")
            and "shared" not in path
            and not any(s in path for s in OTHER_MODALITIES)
        ):
            routed |= {f"{path}.{n}" for n, p in module.named_parameters(recurse=False) if p.dim() == 3}
    assert routed, "no experts in the model: the tiny configuration is a dense one"
    assert routed == {name for name, w in weights.items() if w.dim() == 3}, "not all experts are quantized"
    assert not [n for n in weights for _, x in structure.moe_layers if n.startswith(f"{x.router}.")]


def _check_equalization(
    model: Any, reference: Any, folder: Path, loaded: Any, weights: dict[str, torch.Tensor]
) -> None:
    """The equalized model computes the same to the bit, and has the weights of a rescaled model.

    What is not packed is as it is in the equalized model.
    """
    ids = torch.arange(40).view(2, 20)
    state = loaded.state_dict()
    with equalized_model(folder / "source") as (equalized, folds), torch.no_grad():
        expected = reference(input_ids=ids, use_cache=False).logits
        assert torch.equal(equalized(input_ids=ids, use_cache=False).logits, expected), "equalization changes logits"
        tensors = {name: tensor.clone() for name, tensor in equalized.state_dict().items()}
    for name, tensor in tensors.items():
        if name in model.state_dict() and name not in weights and name not in model.all_tied_weights_keys:
            assert name in state, f"{name} is lost"
            assert torch.equal(state[name], tensor), f"{name} is changed"
    variant = rescaled(model, folds)
    variant.save_pretrained(folder / "rescaled")
    save_tokenizer(folder / "rescaled")
    with equalized_model(folder / "rescaled") as (equalized, _), torch.no_grad():
        assert torch.equal(equalized(input_ids=ids, use_cache=False).logits, expected), "a rescaled model differs"
        for name, tensor in equalized.state_dict().items():
            assert torch.equal(tensor, tensors[name]), f"{name} of a rescaled model differs"


def _load_twin(
    model: Any, folder: Path, weights: dict[str, torch.Tensor], unpacked: dict[str, torch.Tensor], config: Any
) -> Any:
    """An ordinary checkpoint with what the packed one means, loaded by Transformers alone."""
    tensors = dict(unpacked)
    for name, weight in weights.items():
        shape = model.get_parameter(name).shape
        if shape[-2:] != weight.shape[-2:]:  # the family keeps its experts transposed
            weight = weight.transpose(-1, -2)
        if shape[0] > weight.shape[0]:  # rows of experts that do nothing
            weight = torch.cat([weight, weight.new_zeros(shape[0] - weight.shape[0], *shape[1:])])
        assert weight.shape == shape, name
        tensors[name] = weight.contiguous()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    twin, report = type(model).from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager", output_loading_info=True
    )
    wrong = {k: sorted(map(str, v))[:3] for k, v in report.items() if k in ("missing_keys", "unexpected_keys") and v}
    assert not wrong, f"Transformers does not load the twin: {wrong}"
    return twin.eval()


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())
