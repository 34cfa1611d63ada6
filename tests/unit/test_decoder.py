"""Decoding with a static cache against Transformers' own generation, and one compiled layer for all layers."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gemq.assets import builtin_model
from gemq.decoding import step_attention
from gemq.decoding.decoder import Decoder, Unsupported
from gemq.decoding.regional_compile import MAX_LAYER_KINDS, LayerCompiler
from gemq.evaluation.generate import generate, warn_once
from support.families import FAMILIES, TOY, tiny, tiny_config, tokens

torch.set_num_threads(1)
NEW = 20


def by_transformers(model: Any, ids: torch.Tensor, count: int = NEW) -> list[list[int]]:
    """Greedy tokens [sequences][count]. No end token: all sequences go on."""
    new = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **new)
    return out[:, ids.shape[1] :].tolist()


def by_decoder(decoder: Decoder, ids: torch.Tensor, count: int = NEW) -> list[list[int]]:
    steps = [decoder.prefill(ids).tolist(), *decoder.decode(count - 1)]
    return [list(sequence) for sequence in zip(*steps, strict=True)]


@pytest.mark.sample
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "nemotron_h"])
def test_greedy_tokens_are_those_of_transformers(family):
    """Among them sliding windows that are left behind (gpt_oss: 5 tokens), and one decoder for several prompts."""
    model = tiny(family)
    decoder = Decoder(model, 2, 36)
    for length in (12, 3, 16):
        ids = tokens(2, length, seed=length)
        assert by_decoder(decoder, ids) == by_transformers(model, ids)


@pytest.mark.parametrize("family", ["nemotron_h", TOY])
def test_families_that_a_static_step_cannot_serve_are_refused(family):
    with pytest.raises(Unsupported):
        Decoder(tiny(family), 1, 20)


def test_a_sampled_token_has_the_chance_of_its_logit():
    decoder = Decoder(tiny("olmoe"), 4000, 8, temperature=0.5)
    logits = torch.tensor([0.0, 0.5, 1.0, -1.0])
    torch.manual_seed(0)
    drawn = decoder._choose(logits.expand(4000, -1))
    shares = torch.bincount(drawn[:, 0], minlength=4) / 4000
    torch.testing.assert_close(shares, (logits / 0.5).softmax(-1), atol=0.03, rtol=0)


@pytest.mark.parametrize(("family", "kinds"), [("gpt_oss", 1), ("qwen2_moe", 2)])
@torch.no_grad()
def test_one_compiled_layer_serves_all_of_its_kind(family, kinds):
    """The layers' indices in the cache must not become constants of the code. qwen2_moe here has a dense layer too."""
    model = tiny(family)
    model.set_experts_implementation("batched_mm")  # has no loop over experts
    ids = tokens(1, 9)
    expected = by_decoder(Decoder(model, 1, 40), ids)
    decoder, compiler = Decoder(model, 1, 40), LayerCompiler("aot_eager")
    decoder.prefill(ids)
    decoder._warm_up(compiler)
    assert compiler.kinds == kinds
    assert all("forward" not in vars(layer) for layer in model.model.layers)  # nothing stays behind
    steps = [decoder.prefill(ids).tolist()]
    with decoder._compiled_parts(compiler):
        steps += decoder.decode(NEW - 1)
    assert [token for (token,) in steps] == expected[0]


class _Sized(nn.Module):
    def __init__(self, size: int, constant: int) -> None:
        super().__init__()
        self.register_buffer("codes", torch.arange(float(size)))
        self.constant = constant

    def forward(self, x: torch.Tensor, past_key_values: Any = None) -> torch.Tensor:
        return x + self.codes.sum() * self.constant


def test_buffers_of_other_sizes_need_no_second_compilation():
    """Packed experts take other byte counts in each layer."""
    layers = [_Sized(size, 1) for size in (5, 8, 13, 21)]
    compiler = LayerCompiler("eager")
    with compiler.compiled(layers, [None] * 4):
        outputs = [layer(torch.zeros(2), past_key_values=1)[0].item() for layer in layers]
    assert outputs == [10, 28, 78, 210]
    assert compiler.kinds == 1


def test_layers_that_all_differ_are_not_compiled():
    layers = [_Sized(5, constant) for constant in range(MAX_LAYER_KINDS + 1)]
    with LayerCompiler("eager").compiled(layers, [None] * len(layers)):
        for layer in layers[:-1]:
            layer(torch.zeros(2), past_key_values=1)
        with pytest.raises(RuntimeError, match="its layers differ"):
            layers[-1](torch.zeros(2), past_key_values=1)


def test_what_cannot_be_compiled_runs_all_the_same():
    model = tiny("olmoe")  # its experts loop over those that were chosen
    ids = tokens(1, 9)
    decoder = Decoder(model, 1, 40)
    expected = by_decoder(decoder, ids)
    decoder.prefill(ids)
    decoder.prepare(compile_layers=True, backend="eager")
    assert decoder.fallbacks == Counter(layers_not_compiled=1)
    assert decoder.execution == "eager"
    assert by_decoder(decoder, ids) == expected


# generate


@pytest.fixture(scope="module")
def builtin() -> tuple[Any, Any]:
    path = builtin_model()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def test_generate_writes_what_transformers_writes(builtin, capsys):
    model, tokenizer = builtin
    for prompt in ("Once upon a time", "def main"):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        expected = tokenizer.decode(by_transformers(model, ids, 60)[0], skip_special_tokens=True)
        assert generate(model, tokenizer, prompt, max_new_tokens=60, stream=True) == expected
        assert capsys.readouterr().out == expected + "\n"


def test_generate_stops_at_an_end_token(builtin, monkeypatch):
    model, tokenizer = builtin
    full_text = generate(model, tokenizer, "Once upon a time", max_new_tokens=30)
    ids = tokenizer(full_text, return_tensors="pt")["input_ids"][0].tolist()
    monkeypatch.setattr(model.generation_config, "eos_token_id", [0, ids[7]])
    stopped = generate(model, tokenizer, "Once upon a time", max_new_tokens=30)
    assert full_text.startswith(stopped)
    assert stopped == tokenizer.decode(ids[: ids.index(ids[7]) + 1])


def test_generate_leaves_penalties_to_transformers_and_says_so_once(builtin, monkeypatch, caplog, capsys):
    model, tokenizer = builtin
    plain = generate(model, tokenizer, "Once upon a time", max_new_tokens=40)
    monkeypatch.setattr(model.generation_config, "repetition_penalty", 1.5)
    warn_once.cache_clear()
    with caplog.at_level(logging.WARNING, "gemq"):
        texts = {generate(model, tokenizer, "Once upon a time", max_new_tokens=40, stream=True) for _ in range(2)}
    assert len(texts) == 1
    assert plain not in texts
    assert capsys.readouterr().out == 2 * (texts.pop() + "\n")
    assert [record.getMessage().count("repetition_penalty") for record in caplog.records] == [1]


def test_attention_of_a_step_does_not_keep_its_owner_in_memory():
    """The table of Transformers lives as long as the process, and fused layers hold a model."""
    config = tiny_config("olmoe")
    with step_attention.use_attention(config, lambda *_: None):
        assert ALL_ATTENTION_FUNCTIONS[step_attention.NAME] is not step_attention.attend
    assert ALL_ATTENTION_FUNCTIONS[step_attention.NAME] is step_attention.attend
