"""A bound of GPU memory: the same tokens as without it.

Run with ``python -m pytest tests/gpu/test_offloaded_experts.py -m gpu``.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import gemq
from gemq.decoding.decoder import Decoder
from gemq.errors import UserError
from shapes import SHAPES, write

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
NEW_TOKENS = 24
CONTEXT = 512


def decoded(decoder: Decoder, ids: torch.Tensor) -> list[list[int]]:
    """Generate and return the tokens of each step."""
    return [decoder.prefill(ids).tolist(), *decoder.decode(NEW_TOKENS - 1)]


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("shape", ["small-2.0", "small-trellis-2.0"])
def test_the_smallest_bound_gives_the_tokens_without_a_bound(shape: str, batch: int, tmp_path: Path) -> None:
    write(SHAPES[shape], tmp_path / "out", "cuda")
    ids = torch.randint(8000, (batch, 48), generator=torch.Generator().manual_seed(0)).cuda()
    model = gemq.load(tmp_path / "out", device="cuda", dtype=torch.float32)
    expected = decoded(Decoder(model, batch, 100), ids)
    del model
    with pytest.raises(UserError, match="too small") as error:
        gemq.load(tmp_path / "out", device="cuda", dtype=torch.float32, gpu_memory=1, context=CONTEXT)
    bound = re.findall(r"[\d.]+[GM]B", str(error.value))[-1]
    model = gemq.load(tmp_path / "out", device="cuda", dtype=torch.float32, gpu_memory=bound, context=CONTEXT)
    assert model.gemq_residency.resident_share < 0.3
    eager = Decoder(model, batch, 100)
    assert decoded(eager, ids) == expected
    for compile_layers in (False, True):
        decoder = Decoder(model, batch, 100)
        decoder.prefill(ids)
        decoder.prepare(compile_layers=compile_layers)
        assert not decoder.fallbacks, decoder.reasons
        assert decoded(decoder, ids) == expected
