"""Attention of a decode step against Transformers' and float64: in Triton's interpreter, or on a GPU (marker gpu)."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from gemq.decoding import step_attention
from gemq.decoding.decoder import Decoder
from gemq.kernels import dispatch
from support.families import random_model, tiny, tiny_config, tokens

pytest.importorskip("triton")
from gemq.kernels.decode import attention

torch.set_num_threads(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("kernels run on the GPU where there is one, else in the interpreter")
    monkeypatch.setattr(dispatch, "mode", "triton")
    return request.param


@pytest.mark.parametrize(
    ("heads", "groups", "size", "length", "dtype"),
    [
        (4, 4, 64, 256, torch.bfloat16),
        (6, 2, 40, 192, torch.float32),
        (8, 1, 32, 128, torch.float16),
        (2, 1, 16, 576, torch.float32),  # several programs for each sequence
        (4, 2, 128, 320, torch.bfloat16),
    ],
)
def test_against_float64(heads, groups, size, length, dtype, device):
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    draw = torch.Generator().manual_seed(seed)
    query = torch.randn(2, heads, size, generator=draw).to(device, dtype)
    keys, values = (torch.randn(2, groups, length, size, generator=draw).to(device, dtype) for _ in range(2))
    for start, end in ((0, 1), (0, length), (length // 3, length // 3 + 70), (length - 3, length)):
        masked_keys = torch.full_like(keys, torch.nan)  # NaN must not be read
        masked_keys[:, :, start:end] = keys[:, :, start:end]
        bounds = torch.tensor([start, end], dtype=torch.int32, device=device)
        result = attention.decode_attention(query, masked_keys, values, bounds, size**-0.5)
        visible = [x[:, :, start:end].repeat_interleave(heads // groups, 1) for x in (keys, values)]
        reference, truth = (
            F.scaled_dot_product_attention(query[:, :, None].to(t), *(x.to(t) for x in visible))[:, :, 0]
            for t in (dtype, torch.float64)
        )
        noise = (reference.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
        assert (result.double() - truth).abs().max() <= 8 * noise


def test_many_heads_over_a_long_cache(device, monkeypatch):
    """A program loops over its visible positions in blocks."""
    monkeypatch.setattr(attention, "MAX_PROGRAMS", 1)
    test_against_float64(2, 1, 16, 1100, torch.float32, device)


def test_a_fake_step_has_the_shape_of_a_real_one(device):
    query, cache = torch.randn(1, 4, 16, device=device), torch.randn(1, 2, 64, 16, device=device)
    bounds = torch.tensor([0, 5], dtype=torch.int32, device=device)
    arguments = (query, cache, cache, bounds, 0.25)
    torch.library.opcheck(attention.decode_attention, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_a_decoder_uses_the_kernel(family, device, monkeypatch):
    """Tokens equal those of Transformers' attention, also with shared keys and values and with sliding windows."""
    model = tiny(family).to(device)
    ids = tokens(2, 9).to(device)
    steps = []
    for use_kernel in (False, True):
        with monkeypatch.context() as patch:
            if not use_kernel:
                patch.setattr(step_attention, "usable", lambda model, config: False)
            decoder = Decoder(model, 2, 40)
            decoder.prefill(ids)
            decoder.prepare(compile_layers=True, backend="eager")
            assert decoder._uses_decode_attention == use_kernel
            steps.append([decoder.prefill(ids).tolist(), *decoder.decode(3)])
    assert steps[0] == steps[1]
    assert model.config._attn_implementation == "sdpa"


def test_prompts_take_no_mask_unless_a_window_is_shorter(device, monkeypatch):
    """Attention takes twice as long with a mask, and Transformers 5.17 makes one in every CUDA graph."""
    model = random_model(tiny_config("mixtral", sliding_window=8)).to(device)
    masks = []
    make_mask = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    decoder = Decoder(model, 1, 40)
    decoder.prefill(tokens(1, 3).to(device))
    decoder._prepare_eager_step()
    record = lambda *args, **kwargs: masks.append(make_mask(*args, **kwargs)) or masks[-1]
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", record)
    for length, mask_count in ((8, 0), (9, 1)):
        ids = tokens(1, length).to(device)
        first = decoder.prefill(ids)
        assert len(masks) == mask_count
        assert torch.equal(first, model(input_ids=ids).logits[:, -1].argmax(-1))
        masks.clear()


def test_unsupported_attention_is_left_to_transformers(device, monkeypatch):
    model = tiny("deepseek_v2").to(device)  # keys are wider than values
    decoder = Decoder(model, 1, 40)
    decoder.prefill(tokens(1, 5).to(device))
    decoder.prepare(compile_layers=True, backend="eager")
    assert decoder.fallbacks["attention_by_transformers"] == 1
    assert not decoder._uses_decode_attention
    assert isinstance(model, nn.Module)
    assert len(list(decoder.decode(3))) == 3
