"""``gemq eval`` within bounds of memory: layers are read one after the other, and nothing else comes out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from gemq.assets import builtin_texts
from gemq.calibration.windows import eval_windows
from gemq.evaluation.evaluate import evaluate, evaluate_paths, open_model
from gemq.models.layer_loader import LayerLoader, LayerSlot
from gemq.models.structure import find_structure
from gemq.runtime.activation_store import ActivationStore
from support.cli import BUILTIN_TOKENS, add_tokenizer, gemq, make_tiny_model

LAYERS = 6
HOW: dict[str, Any] = {"texts": builtin_texts()[:2], "seq_len": 64, "max_windows": 40, "device": "cpu"}
FLAGS = [x for text in HOW["texts"] for x in ("--text", text)]
FLAGS += ["--seq-len", 64, "--max-windows", 40, "--device", "cpu", "--json", "-"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model"
    sizes = {"num_hidden_layers": LAYERS, "intermediate_size": 128, "num_experts": 8, "vocab_size": BUILTIN_TOKENS}
    return make_tiny_model(path, **sizes)


@pytest.fixture(scope="module")
def packed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    flags = ("--effort", "low", "--num-windows", 4, "--seq-len", 32, "--calibration", builtin_texts()[0], "-q")
    assert gemq("quantize", model, "-o", out, *flags).code == 0
    return out


def smallest_limit(*arguments: object) -> str:
    """The bound that a refusal asks for."""
    ran = gemq("eval", *FLAGS, *arguments, "--host-memory", "1MB")
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert "give at least --host-memory" in ran.err
    return ran.err.split()[-1]


@pytest.mark.parametrize("what", ["plain", "packed with reference"])
def test_the_least_bound_gives_the_figures_of_whole_models(what, model, packed):
    name, compared = packed if "packed" in what else model, "reference" in what
    arguments = [name, *(["--reference", model] if compared else [])]
    ran = gemq("eval", *arguments, *FLAGS, "--host-memory", smallest_limit(*arguments))
    assert ran.code == 0, ran.err

    opened, reference = (open_model(str(path), "float32", "cpu") for path in (name, model))
    structure = find_structure(reference.model)
    windows = eval_windows(reference.tokenizer, HOW["texts"], 64, 40)
    others = {"reference": reference.model, "structure": structure} if compared else {}
    expected = evaluate(opened.model, windows, **others)
    values = {key: ran.json[key] for key in expected}
    for key in ("perplexity", "perplexity_stderr", *(("mean_kl", "top1_agreement", "routing_agreement") * compared)):
        assert values[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-9)
    assert values["layers"] == pytest.approx(expected["layers"])
    assert ran.json["stored_bytes"] == opened.stored_bytes


def test_at_most_two_layers_are_in_memory_and_each_is_read_once(model, monkeypatch):
    filled_slots: set[int] = set()
    counts: list[int] = []
    loaded: list[int] = []
    fill, clear, load = LayerSlot.fill, LayerSlot.clear, LayerLoader._load

    def counted_fill(self: LayerSlot, tensors: dict[str, torch.Tensor]) -> None:
        fill(self, tensors)
        filled_slots.add(id(self))
        counts.append(len(filled_slots))

    def counted_clear(self: LayerSlot) -> None:
        clear(self)
        filled_slots.discard(id(self))

    def counted_load(self: LayerLoader, index: int) -> Any:
        loaded.append(index)
        return load(self, index)

    monkeypatch.setattr("gemq.models.replay.Replay.verify", lambda self, ids: None)  # it reads a layer as well
    monkeypatch.setattr(LayerSlot, "fill", counted_fill)
    monkeypatch.setattr(LayerSlot, "clear", counted_clear)
    monkeypatch.setattr(LayerLoader, "_load", counted_load)
    evaluate_paths(str(model), **HOW)  # with all of the machine's memory
    assert 0 < max(counts) <= 2
    assert sorted(loaded) == list(range(LAYERS))


def test_activations_wait_on_the_disk_under_the_least_bound(model, monkeypatch):
    seen: set[str] = set()
    append = ActivationStore.append

    def appended(self: ActivationStore, tensor: torch.Tensor) -> None:
        append(self, tensor)
        seen.add(self._entries[-1]._tensor.location.name)

    monkeypatch.setattr(ActivationStore, "append", appended)
    assert gemq("eval", model, *FLAGS, "--host-memory", smallest_limit(model)).code == 0
    assert "DISK" in seen


def test_a_dense_model_is_evaluated_whole_where_it_fits(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = LlamaConfig(vocab_size=BUILTIN_TOKENS, hidden_size=32, intermediate_size=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    add_tokenizer(tmp_path / "dense")
    enough = smallest_limit(tmp_path / "dense")
    ran = gemq("eval", tmp_path / "dense", *FLAGS, "--host-memory", enough)
    assert ran.code == 0, ran.err
    opened = open_model(str(tmp_path / "dense"), "float32", "cpu")
    expected = evaluate(opened.model, eval_windows(opened.tokenizer, HOW["texts"], 64, 40))
    assert ran.json["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-6)


def test_texts_need_all_layers_in_memory_and_their_kl_does_not(model, packed, monkeypatch):
    monkeypatch.setattr("gemq.evaluation.model_files.forward_bytes", lambda *_: 0)  # layers decide, not logits
    few = [*FLAGS, "--max-windows", 2]
    arguments = (packed, "--reference", model, "--generate", "--max-new-tokens", 8)
    ran = gemq("eval", *arguments, *few, "--host-memory", "3MB")
    assert ran.code == 0, ran.err
    bounded, free = ran.json, gemq("eval", *arguments, *few).json
    assert free["fallbacks"] == []
    (line,) = bounded["fallbacks"]
    assert re.match(re.escape(f"{model} wrote no texts: this takes ") + r"\d\.\d+MB", line)
    assert "reference" not in bounded["generation"]
    assert free["generation"]["reference"]["greedy"]["repetition_rate"] is not None
    assert bounded["mean_kl"] == pytest.approx(free["mean_kl"], rel=1e-6)
    for mode in ("greedy", "sampled"):
        assert bounded["generation"]["model"][mode] == pytest.approx(free["generation"]["model"][mode], rel=1e-5)
    (line,) = gemq("eval", *arguments, *few, "--host-memory", smallest_limit(*arguments)).json["fallbacks"]
    assert line.startswith(f"{packed} wrote no texts")


def test_texts_are_written_without_a_reference(packed):
    generation = gemq("eval", packed, "--generate", *FLAGS, "--max-windows", 1).json["generation"]
    assert generation.keys() >= {"model", "texts"}
    assert generation["max_new_tokens"] == 64  # of 128 tokens, prompts have 64
    assert "mean_kl" not in generation["model"]["greedy"]


def test_what_cannot_be_compared_is_refused_before_anything_is_read(model, packed, tmp_path, monkeypatch):
    other_model = make_tiny_model(tmp_path / "other", num_hidden_layers=2, vocab_size=BUILTIN_TOKENS)
    small = make_tiny_model(tmp_path / "small", num_hidden_layers=LAYERS, vocab_size=512)
    monkeypatch.setattr("gemq.evaluation.evaluate.predict_all", lambda *_: pytest.fail("something was computed"))
    for arguments, words in (
        ((packed, "--reference", packed), "is a packed checkpoint"),
        ((packed, "--reference", other_model), "has other experts"),
        ((packed, "--reference", small), "has another vocabulary"),
        ((packed, "--seq-len", 1000), "--seq-len 1000 is longer"),
        ((packed, "--gpu-memory", "1GB"), "--gpu-memory bounds a GPU"),
        ((packed, "--host-memory", "much"), "--host-memory: "),
        ((packed, "--generate", "--max-new-tokens", 65), "give at most 64"),
        ((packed, "--generate", "--max-new-tokens", 0), "--max-new-tokens cannot be 0"),
    ):
        ran = gemq("eval", "--seq-len", 64, "--device", "cpu", *arguments)
        assert ran.code == 2
        assert ran.err.count("\n") == 1
        assert words in ran.err


def test_weights_that_are_no_numbers_are_refused(model, packed, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(packed, tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    name = next(n for n in tensors if n.endswith("norm.weight"))
    tensors[name][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    ran = gemq("eval", broken, "--device", "cpu")
    assert ran.code == 2
    assert ran.err.count("\n") == 1
