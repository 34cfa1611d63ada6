"""CUDA graphs of prompts against prompts that run kernel by kernel.

Run with ``python -m pytest tests/gpu/test_captured_prompts.py -m gpu``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gemq
from gemq.decoding.decoder import Decoder
from support.packed_checkpoints import olmoe_config, write_packed, write_trellis

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
WRITERS = {"affine": write_packed, "trellis": write_trellis}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, torch.dtype], Any]:
    """Packed models with random weights, by codes and dtype."""
    loaded = {}
    for codes, write in WRITERS.items():
        path = write(tmp_path_factory.mktemp(codes) / "packed", olmoe_config(vocab_size=512))
        for dtype in (torch.float32, torch.bfloat16):
            loaded[codes, dtype] = gemq.load(path, device="cuda", dtype=dtype)
    return loaded


def prompt(batch: int, length: int, seed: int) -> torch.Tensor:
    """Return random tokens [batch, length]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 512, (batch, length), generator=generator).cuda()


def written(decoder: Decoder, ids: torch.Tensor) -> list[list[int]]:
    """Return the first tokens after prompts."""
    return [decoder.prefill(ids).tolist(), *decoder.decode(12)]


def prepared(model: Any, batch: int, length: int, compile_layers: bool = False) -> Decoder:
    """Return a decoder after a first prompt of 32 tokens."""
    decoder = Decoder(model, batch, length)
    decoder.prefill(prompt(batch, 32, 99))
    decoder.prepare(compile_layers=compile_layers)
    assert not decoder.fallbacks, decoder.reasons
    return decoder


@pytest.mark.parametrize(
    ("codes", "batch", "compiled"),
    [("affine", 1, False), ("affine", 4, False), ("trellis", 1, False), ("trellis", 4, False), ("trellis", 1, True)],
)
def test_prompts_in_graphs_give_the_tokens_of_eager_ones(models, codes, batch, compiled):
    """Several prompts of one length, shorter and longer ones between them, and some that are filled up."""
    model = models[codes, torch.float32]
    decoder, eager = prepared(model, batch, 100, compiled), Decoder(model, batch, 100)
    for seed, length in enumerate((32, 32, 20, 7, 60, 61, 32, 64)):
        ids = prompt(batch, length, seed)
        assert written(decoder, ids) == written(eager, ids)
    assert not decoder.fallbacks, decoder.reasons
    assert decoder._prompt_graphs.is_captured(32)
    assert decoder._prompt_graphs.is_captured(61)


@pytest.mark.parametrize("codes", WRITERS)
def test_logits_of_long_prompts_in_bfloat16(models, codes):
    """As the same prompts without a graph, whose linears and experts have other tiles."""
    decoder = prepared(models[codes, torch.bfloat16], 1, 1100)
    for seed, length in enumerate((1024, 1024, 1001)):
        ids = prompt(1, length, seed)
        decoder.prefill(ids)
        with torch.no_grad():
            expected = decoder._prompt_logits(ids).float()
            replayed = decoder._replayed_logits(ids)
        assert replayed is not None
        difference = (replayed.float() - expected).norm() / expected.norm()
        assert difference < 0.03
    assert not decoder.fallbacks, decoder.reasons


def test_sampled_tokens_do_not_depend_on_the_graph(models):
    decoder = Decoder(models["trellis", torch.float32], 1, 100, temperature=1.0)
    decoder.prefill(prompt(1, 24, 0))
    decoder.prepare(compile_layers=False)
    texts = []
    for seed in (1, 2, 1):
        if len(texts) == 2:
            decoder._prompt_graphs = None
        torch.manual_seed(seed)
        texts.append(written(decoder, prompt(1, 24, 0)))
    assert texts[0] == texts[2] != texts[1]
    assert not decoder.fallbacks, decoder.reasons


def test_graphs_share_their_memory(models):
    """Shorter prompts use the memory of longer ones, with little more where blocks do not fit."""
    decoder = prepared(models["trellis", torch.bfloat16], 1, 4096)
    for _ in range(2):
        decoder.prefill(prompt(1, 4096, 0))
    torch.cuda.empty_cache()
    reserved_bytes = torch.cuda.memory_reserved()
    for length in (1024, 1536, 2048, 3072):
        for _ in range(2):
            decoder.prefill(prompt(1, length, 0))
    torch.cuda.empty_cache()
    assert not decoder.fallbacks, decoder.reasons
    assert torch.cuda.memory_reserved() - reserved_bytes <= 40 << 20


def test_a_failed_capture_is_counted_and_leaves_the_decoder_in_order(models, monkeypatch):
    model = models["trellis", torch.float32]
    decoder, eager = prepared(model, 1, 100), Decoder(model, 1, 100)
    prompt_logits = decoder._prompt_logits

    def wait(ids: torch.Tensor, last: torch.Tensor | None = None) -> torch.Tensor:
        logits = prompt_logits(ids, last)
        if last is not None and torch.cuda.is_current_stream_capturing():
            logits.sum().item()
        return logits

    monkeypatch.setattr(decoder, "_prompt_logits", wait)
    for seed in range(3):
        ids = prompt(1, 32, seed)
        assert written(decoder, ids) == written(eager, ids)
    assert decoder.fallbacks == {"prompts_not_captured": 1}
