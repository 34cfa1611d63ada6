"""Generation on a GPU: captured and compiled steps against eager steps, kernels against the reference.

Run with ``python -m pytest tests/gpu/test_generation.py -m gpu``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gemq
from gemq.assets import builtin_model
from gemq.decoding.decoder import Decoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantize the built-in model."""
    from gemq.pipeline.quantize import quantize
    from gemq.recipe import Recipe

    out = tmp_path_factory.mktemp("packed") / "out"
    quantize(str(builtin_model()), Recipe(effort="low", num_windows=8, seq_len=64), out=out, device="cuda")
    return out


@pytest.fixture(scope="module")
def model(packed: Path) -> Any:
    """Load the packed model."""
    return gemq.load(packed, device="cuda", dtype=torch.float32)


def prompt(batch: int, length: int = 24) -> torch.Tensor:
    """Return random tokens [batch, length]."""
    random = torch.Generator().manual_seed(batch)
    return torch.randint(5, 4000, (batch, length), generator=random).cuda()


def decoded(decoder: Decoder, ids: torch.Tensor) -> list[list[int]]:
    """Generate and return the tokens of each sequence."""
    steps = [decoder.prefill(ids).tolist(), *decoder.decode(NEW_TOKENS - 1)]
    return [list(sequence) for sequence in zip(*steps, strict=True)]


@pytest.mark.parametrize("batch", [1, 4, 16])
def test_graphs_of_fused_and_compiled_layers_give_the_eager_tokens(model, batch):
    """They also equal those of Transformers' generate in float32."""
    ids = prompt(batch)
    new = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **new)[:, ids.shape[1] :].tolist()
    eager = Decoder(model, batch, 100)
    assert decoded(eager, ids) == expected
    for compile_layers in (False, True):
        decoder = Decoder(model, batch, 100)
        decoder.prefill(ids)
        decoder.prepare(compile_layers=compile_layers)
        assert not decoder.fallbacks, decoder.reasons
        assert decoder.execution == f"{'compiled' if compile_layers else 'fused'} layers in a CUDA graph"
        for prompt_ids in (prompt(batch, 7), ids):
            tokens = decoded(decoder, prompt_ids)
        assert tokens == expected


def test_model_generate_still_works_after_capture(model):
    ids = prompt(1)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist()
    decoder = Decoder(model, 1, 64)
    decoder.prefill(ids)
    decoder.prepare(compile_layers=True)
    assert model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0).tolist() == expected


def test_sampling_in_a_graph_follows_the_seed(model):
    decoder = Decoder(model, 1, 100, temperature=1.0)
    decoder.prefill(prompt(1))
    decoder.prepare(compile_layers=False)
    assert not decoder.fallbacks, decoder.reasons
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(decoded(decoder, prompt(1)))
    assert texts[0] == texts[1] != texts[2]


def test_kernels_and_reference_write_the_same_tokens(packed):
    """Greedy decoding in float32, each in its own process."""
    code = f"""
import torch, gemq
model = gemq.load({str(packed)!r}, device="cuda", dtype=torch.float32)
ids = torch.arange(40, 64, device="cuda")[None]
print(model.generate(ids, max_new_tokens={NEW_TOKENS}, do_sample=False, eos_token_id=None, pad_token_id=0).tolist())
"""
    outputs = []
    for environment in ({}, {"GEMQ_KERNELS": "reference"}):
        process = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=True
        )
        outputs.append(process.stdout.strip().splitlines()[-1])
    assert outputs[0] == outputs[1]
