"""Graphs of prompts, with functions in place of CUDA graphs: which prompts run in them, and padding changes nothing."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gemq.calibration.generation_steps import Stepper
from gemq.decoding import prompt_graphs
from gemq.decoding.decoder import Decoder
from gemq.decoding.prompt_graphs import MAX_GRAPHS, PromptGraphs
from support.families import tiny, tokens

torch.set_num_threads(1)
CPU = torch.device("cpu")


class Replayed:
    """Runs a function again, as a graph does."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run
        self.output = run()
        self.count = 0

    @torch.no_grad()
    def replay(self) -> None:
        self.count += 1
        output = self._run()
        if output is not None:
            self.output.copy_(output)


def record(_: PromptGraphs, run: Callable[[], torch.Tensor], device: torch.device) -> tuple[Any, torch.Tensor]:
    """In place of ``PromptGraphs._record``."""
    graph = Replayed(run)
    return graph, graph.output


def written(decoder: Decoder, ids: torch.Tensor) -> list[list[int]]:
    """The first tokens after prompts."""
    return [decoder.prefill(ids).tolist(), *decoder.decode(4)]


def captured_decoder(model: Any) -> Decoder:
    """A decoder whose step is replayed."""
    decoder = Decoder(model, 2, 60)
    decoder.prefill(tokens(2, 3))
    decoder._graph = Replayed(torch.no_grad()(decoder._step))  # type: ignore[assignment]
    return decoder


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "qwen2_moe"])
def test_prompts_in_graphs_give_the_tokens_of_eager_ones(family, monkeypatch):
    """Among them a sliding window that is left behind (gpt_oss), and prompts after longer ones."""
    monkeypatch.setattr(PromptGraphs, "_record", record)
    model = tiny(family)
    decoder, eager = captured_decoder(model), Decoder(model, 2, 60)
    for seed, length in enumerate((32, 20, 27, 50, 7, 18, 50)):
        ids = tokens(2, length, seed=seed)
        assert written(decoder, ids) == written(eager, ids)
    assert not decoder.fallbacks, decoder.reasons
    counts = {size: prompt.graph.count for size, prompt in decoder._prompt_graphs._graphs.items()}
    assert counts == {32: 3, 60: 1}  # the first prompts of these lengths ran without


def test_texts_are_written_from_the_logits_of_prompts_in_graphs(monkeypatch):
    monkeypatch.setattr(PromptGraphs, "_record", record)
    model = tiny("olmoe")
    captured, plain = (Stepper(model, 60, static=static) for static in (True, False))
    step: Any = captured.begin(2)
    step._graph = Replayed(torch.no_grad()(step._step))
    for seed in range(3):
        prompts, newest = tokens(2, 20, seed=seed), tokens(2, 1, seed=seed)
        step, expected = captured.begin(2), plain.begin(2)
        torch.testing.assert_close(step(prompts), expected(prompts), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(step(newest), expected(newest), atol=1e-4, rtol=1e-4)
    assert step._prompt_graphs.is_captured(20)


def test_a_decoder_with_graphs_is_freed_when_its_last_user_is(monkeypatch):
    """A cycle of references would keep its memory until Python looks for cycles."""
    graph = SimpleNamespace(replay=lambda: None)
    monkeypatch.setattr(PromptGraphs, "_record", lambda _, run, device: (graph, run()))
    decoder = Decoder(tiny("olmoe"), 2, 60)
    decoder._graph = 1  # type: ignore[assignment]
    for _ in range(3):
        decoder.prefill(tokens(2, 32))
    assert decoder._prompt_graphs.is_captured(32)
    reference = weakref.ref(decoder)
    gc.disable()
    try:
        del decoder
        assert reference() is None
    finally:
        gc.enable()


def test_lengths_are_rounded_up_by_an_eighth_at_most():
    graphs = PromptGraphs(1, 3000)
    assert [graphs._rounded(length) for length in (16, 17, 2048, 2049, 2900)] == [16, 32, 2048, 2304, 3000]
    assert all(graphs._rounded(length) <= length * 1.125 for length in range(128, 3000))


@pytest.mark.parametrize(("batch", "length"), [(1, 15), (1, 5000), (16, 300)])
def test_prompts_without_use_of_a_graph_run_without(batch, length):
    graphs = PromptGraphs(batch, 8192)
    assert [graphs.record_length(length) for _ in range(2)] == [False, False]


def test_the_graph_that_was_not_used_for_longest_is_dropped(monkeypatch):
    monkeypatch.setattr(PromptGraphs, "_record", record)
    graphs = PromptGraphs(1, 4096)
    lengths = [128 * count for count in range(1, MAX_GRAPHS + 1)]
    for length in lengths:
        graphs.capture(lambda ids, last: ids[:, last], length, CPU)
    assert graphs.replay(torch.arange(128)[None]).tolist() == [[127]]
    graphs.capture(lambda ids, last: ids[:, last], 2048, CPU)
    assert [length for length in lengths if not graphs.is_captured(length)] == [256]


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_prompts_that_cannot_be_captured_run_all_the_same(error, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise error("no room")

    monkeypatch.setattr(prompt_graphs, "capture", fail)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    model = tiny("olmoe")
    decoder, eager = captured_decoder(model), Decoder(model, 2, 60)
    ids = tokens(2, 32)
    for _ in range(3):
        assert written(decoder, ids) == written(eager, ids)
    assert decoder.fallbacks == Counter(prompts_not_captured=1)
