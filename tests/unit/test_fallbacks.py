"""Accelerations that raise anything at all: the result is the same, and what was left out is counted and shown once."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gemq import cli
from gemq.assets import builtin_model
from gemq.calibration.generation_steps import Stepper
from gemq.decoding.decoder import Decoder, Unsupported
from gemq.decoding.regional_compile import LayerCompiler
from gemq.errors import UserError
from gemq.evaluation import bench
from gemq.evaluation.generate import generate, warn_once
from gemq.models import fused_norms
from gemq.models.cache_names import cache_argument, cache_name
from gemq.runtime import fallbacks
from support.families import tiny, tokens

torch.set_num_threads(1)
ERRORS = [TypeError, AttributeError, KeyError, ImportError, NotImplementedError, RuntimeError, AssertionError]
"""What a change of an interface ends in."""
TWO_ERRORS = [KeyError, RuntimeError]
"""For places that are shown to record what is raised, of any kind. Running out of memory is a RuntimeError, too."""


@pytest.fixture(autouse=True)
def nothing_recorded():
    fallbacks.pop_fallbacks()
    warn_once.cache_clear()
    yield
    fallbacks.pop_fallbacks()


@pytest.fixture(scope="module")
def builtin() -> tuple[Any, Any]:
    path = builtin_model()
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def raising(kind):
    def call(*_: Any, **__: Any) -> Any:
        raise kind("an interface\nhas changed")

    return call


def test_whatever_is_raised_is_recorded_once_with_its_count():
    for kind in ERRORS:
        with fallbacks.optional("norms_not_fused"):
            raise kind("first" if kind is TypeError else "later")
    assert fallbacks.pop_messages() == [f"{len(ERRORS)} {fallbacks.DESCRIPTIONS['norms_not_fused']} (TypeError: first)"]
    assert not fallbacks.pop_fallbacks()
    with pytest.raises(UserError), fallbacks.optional("norms_not_fused"):
        raise UserError("the user's files")
    with pytest.raises(KeyboardInterrupt), fallbacks.optional("norms_not_fused"):
        raise KeyboardInterrupt


# Decoding


@pytest.mark.parametrize("kind", TWO_ERRORS)
@pytest.mark.parametrize("where", ["cache", "prompt", "step"])
def test_a_static_cache_that_fails_leaves_decoding_to_transformers(builtin, where, kind, monkeypatch, caplog, capsys):
    """In the middle of an answer too, which then goes on from there."""
    model, tokenizer = builtin
    expected = generate(model, tokenizer, "Once upon a time", max_new_tokens=12)
    if where == "cache":
        monkeypatch.setattr("gemq.decoding.decoder.static_cache", raising(kind))
    elif where == "prompt":
        monkeypatch.setattr("gemq.decoding.decoder.last_logits_argument", raising(kind))
    else:
        steps, step = [], Decoder._step
        fail = raising(kind)
        monkeypatch.setattr(Decoder, "_step", lambda self: fail() if len(steps) == 4 else steps.append(step(self)))
    with caplog.at_level(logging.WARNING, "gemq"):
        for _ in range(2):
            assert generate(model, tokenizer, "Once upon a time", max_new_tokens=12, stream=True) == expected
    assert capsys.readouterr().out == 2 * (expected + "\n")
    (line,) = (record.getMessage() for record in caplog.records)
    assert f"{kind.__name__}: " in line
    assert "model.generate" in line
    assert line.isprintable()


@pytest.mark.parametrize("kind", TWO_ERRORS)
def test_layers_and_attention_that_fail_are_left_out(kind, monkeypatch):
    model = tiny("olmoe")
    ids = tokens(1, 9)
    decoder = Decoder(model, 1, 40)
    expected = [decoder.prefill(ids).tolist(), *decoder.decode(6)]
    monkeypatch.setattr(LayerCompiler, "_call_layer", raising(kind))
    monkeypatch.setattr("gemq.decoding.step_attention.usable", lambda model, config: True)
    monkeypatch.setattr("gemq.decoding.step_attention.attend", raising(kind))
    decoder.prefill(ids)
    decoder.prepare(compile_layers=True, backend="eager")
    assert decoder.fallbacks == Counter(layers_not_compiled=1, attention_by_transformers=1)
    assert all(reason.startswith(kind.__name__) for reason in decoder.reasons.values())
    assert decoder.execution == "eager"
    assert model.config._attn_implementation == "sdpa"
    assert [decoder.prefill(ids).tolist(), *decoder.decode(6)] == expected


@pytest.mark.parametrize("kind", TWO_ERRORS)
def test_windows_are_written_without_a_static_step(kind, monkeypatch):
    model = tiny("olmoe")
    plain = Stepper(model, 6, static=False).begin(2)
    monkeypatch.setattr(Decoder, "prepare", raising(kind))
    monkeypatch.setattr("gemq.decoding.decoder.static_cache", raising(kind))
    steps = Stepper(model, 6, static=True)
    step = steps.begin(2)
    assert kind.__name__ in steps.eager_reason
    assert torch.equal(step(tokens(2, 1)), plain(tokens(2, 1)))
    monkeypatch.setattr("gemq.calibration.generation_steps._PreallocatedLayer", raising(kind))
    assert torch.equal(Stepper(model, 6, static=False).begin(2)(tokens(2, 1)), Stepper(model, 6).begin(2)(tokens(2, 1)))
    assert fallbacks.pop_fallbacks()["cache_grows"].count == 2


def test_out_of_memory_is_no_fallback(monkeypatch):
    monkeypatch.setattr("gemq.decoding.decoder.static_cache", raising(torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        Decoder(tiny("olmoe"), 1, 20)


# The name of the cache


def test_the_cache_goes_by_the_name_that_a_forward_declares():
    class New:
        def forward(self, input_ids, cache=None, **kwargs): ...

    class Old:
        def forward(self, input_ids, past_key_values=None, **kwargs): ...

    class Any_:
        def forward(self, input_ids, **kwargs): ...

    assert cache_argument(New(), 5) == {"cache": 5}
    assert cache_argument(Old(), 5) == {"past_key_values": 5} == cache_argument(Any_(), 5)
    assert cache_name({"hidden_states": 1}) is None


@pytest.mark.sample
@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "phimoe"])
def test_nothing_is_called_by_a_deprecated_name(family):
    model = tiny(family)
    decoder = Decoder(model, 1, 24)
    decoder.prefill(tokens(1, 9))
    assert len(list(decoder.decode(3))) == 3
    step = Stepper(model, 6, static=False).begin(1)
    for _ in range(3):
        step(tokens(1, 1))


# Norms, rotary positions


@pytest.mark.parametrize("kind", TWO_ERRORS)
def test_kernels_that_cannot_take_over_leave_the_family_its_own(kind, monkeypatch):
    model = tiny("olmoe")
    expected = model(input_ids=tokens(1, 9)).logits
    monkeypatch.setattr(fused_norms, "use_fused_norms", raising(kind))
    monkeypatch.setitem(sys.modules, "gemq.kernels.training.rotary", None)
    fused_norms.use_fused_kernels(model, torch.device("cpu"))
    assert {name: fallback.count for name, fallback in fallbacks.pop_fallbacks().items()} == {
        "norms_not_fused": 1,
        "rotary_not_fused": 1,
    }
    assert torch.equal(model(input_ids=tokens(1, 9)).logits, expected)


@pytest.mark.parametrize("kind", TWO_ERRORS)
def test_a_norm_that_raises_something_is_none_to_take_over(kind, monkeypatch):
    model = tiny("olmoe")
    norm = type(model.model.norm)
    monkeypatch.setattr(norm, "forward", raising(kind))
    assert fused_norms.use_fused_norms(model, torch.device("cpu")) == 0


# Where they are shown


def test_the_largest_texts_of_bench_are_a_batch_or_a_prompt():
    assert bench.BenchConfig((1, 16), (2048,), 128, compiled=False).largest_texts() == (16, 128 + 128 + 1)
    assert bench.BenchConfig((1, 4), (2048,), 128, compiled=False).largest_texts() == (1, 2048 + 1)


def test_bench_shows_them(monkeypatch):
    fallbacks.record("rotary_not_fused", TypeError("changed"))
    values = bench.bench(tiny("olmoe"), bench.BenchConfig((), (), 2, compiled=False))
    assert values["fallbacks"] == [f"1 {fallbacks.DESCRIPTIONS['rotary_not_fused']} (TypeError: changed)"]


def test_bench_goes_on_where_the_static_cache_fails(monkeypatch):
    monkeypatch.setattr("gemq.decoding.decoder.last_logits_argument", raising(TypeError))
    values = bench.bench(tiny("olmoe"), bench.BenchConfig((1,), (4,), 2, compiled=False))
    assert [row["execution"] for row in values["decode"]] == ["model.generate"]
    assert "TypeError" in values["fallbacks"][0]


def test_a_command_says_at_its_end_what_no_summary_has_shown(monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", lambda *_, **__: fallbacks.record("norms_not_fused", TypeError("changed")))
    assert cli.run(["inspect", "x"]) == 0
    assert capsys.readouterr().err == f"gemq: 1 {fallbacks.DESCRIPTIONS['norms_not_fused']} (TypeError: changed)\n"


def test_unsupported_says_what_was_raised(monkeypatch):
    monkeypatch.setattr("gemq.decoding.decoder.static_cache", raising(TypeError))
    with pytest.raises(Unsupported, match="TypeError: an interface has changed"):
        Decoder(tiny("olmoe"), 1, 20)
