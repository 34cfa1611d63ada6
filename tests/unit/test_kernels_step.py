"""Kernels around the packed ones of a decode step: in Triton's interpreter, or on a GPU (marker gpu)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gemq.models.fused_norms import plain_rotary

pytest.importorskip("triton")
from gemq.kernels.decode import attention, cache_write, choice, norms, router

torch.set_num_threads(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if (request.param == "cuda") != torch.cuda.is_available():
        pytest.skip("kernels run on the GPU where there is one, else in the interpreter")
    return request.param


def random(*shape: int, device: str, dtype: torch.dtype = torch.float16, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def expected_norm(x: torch.Tensor, norm: norms.NormWeight) -> torch.Tensor:
    if norm.rounds_twice:
        return norm.weight * F.rms_norm(x, x.shape[-1:], None, norm.eps)
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


@pytest.mark.parametrize("rounds_twice", [False, True])
@pytest.mark.parametrize("shape", ["rows", "slice of a joint projection", "heads of a slice"])
def test_a_norm_is_that_of_torch(shape, rounds_twice, device):
    joint = random(3, 1, 300, device=device)
    x = {"rows": joint, "slice of a joint projection": joint[..., 100:196]}.get(shape)
    if x is None:
        x = joint[..., 100:196].view(3, 1, 4, 24)
    norm = norms.NormWeight(random(x.shape[-1], device=device, seed=1), 1e-5, rounds_twice)
    torch.testing.assert_close(norms.rms_norm(x, norm), expected_norm(x, norm), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(("size", "second_size"), [(96, 48), (24, 24)])
def test_norms_of_two_slices_are_those_of_torch(size, second_size, device):
    """Of whole projections, and of heads."""
    x = random(3, 300, device=device)
    kinds = [norms.NormWeight(random(n, device=device, seed=n), 1e-5, True) for n in (size, second_size)]
    slices = [
        norms.SliceNorm(start, columns, norm) for start, columns, norm in zip((16, 200), (96, 48), kinds, strict=True)
    ]
    for result, span in zip(norms.two_norms(x, *slices), slices, strict=True):
        rows = x[:, span.start : span.start + span.columns].reshape(3, -1, len(span.norm.weight))
        torch.testing.assert_close(result, expected_norm(rows, span.norm).view(3, -1), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("terms", [0, 6])
def test_a_sum_and_its_norm_in_one_launch(terms, device):
    """Sums are those of torch to the bit: experts are summed in float32 and rounded, then comes the residual."""
    residual = random(2, 1, 48, device=device)
    x = random(2, 1, 48, device=device, seed=1)
    if terms:
        x = random(2, terms, 48, device=device, dtype=torch.float32, seed=1)
    summed = x.sum(1, keepdim=True).to(residual.dtype) if terms else x
    norm = norms.NormWeight(random(48, device=device, seed=2), 1e-5, True)
    total, normed = norms.add(x, residual, norm, terms)
    torch.testing.assert_close(total, residual + summed, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(normed, expected_norm(total, norm), rtol=2e-3, atol=1e-5)
    total, same = norms.add(x, residual, None, terms)
    assert total is same
    if terms:
        torch.testing.assert_close(norms.sum_shares(x, residual.dtype), summed[:, 0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 48), (3, 2100), (20, 64)])
def test_a_router_is_that_of_torch(tokens, hidden, normalized, device):
    x = random(tokens, hidden, device=device, dtype=torch.float32)
    weight = random(40, hidden, device=device, dtype=torch.float32, seed=1) * hidden**-0.5
    logits, scores, index = router.route(x, weight, 6, normalized, torch.float32)
    torch.testing.assert_close(logits, F.linear(x, weight), rtol=1e-4, atol=1e-4)
    top, expected = logits.softmax(-1).topk(6)
    top = top / top.sum(-1, keepdim=True) if normalized else top
    assert torch.equal(index, expected)
    torch.testing.assert_close(scores, top)


@pytest.mark.parametrize(("heads", "groups", "length", "position"), [(4, 4, 64, 0), (6, 2, 192, 100), (2, 1, 192, 191)])
@pytest.mark.parametrize("has_angles", [True, False])
def test_attention_that_writes_the_cache(heads, groups, length, position, has_angles, device):
    """As rotating, writing and attending one after the other."""
    size = 32
    joint = random(2, (heads + 2 * groups) * size, device=device)
    rows = joint.split([heads * size, groups * size, groups * size], 1)
    query, key, value = (x.view(2, -1, size) for x in rows)
    keys, values = (random(2, groups, length, size, device=device, seed=seed) for seed in (1, 2))
    angles = [random(1, size, device=device, seed=seed) for seed in (3, 4)] if has_angles else [None, None]
    expected_query, expected_key = query, key
    if has_angles:
        cos, sin = (angle[:, None] for angle in angles)
        expected_query, expected_key = (plain_rotary(x[:, :, None], cos, sin)[:, :, 0] for x in (query, key))
    expected_keys, expected_values = keys.clone(), values.clone()
    expected_keys[:, :, position], expected_values[:, :, position] = expected_key, value
    bounds = torch.tensor([max(0, position - 90), position + 1], dtype=torch.int32, device=device)
    expected = attention.decode_attention(expected_query, expected_keys, expected_values, bounds, 0.25)
    keys[:, :, position], values[:, :, position] = torch.nan, torch.nan  # must not be read
    new = attention.NewToken(key, value, *angles)
    assert attention.can_write(query, keys, values, new)
    result = attention.attend_and_write(query, keys, values, new, bounds, 0.25)
    torch.testing.assert_close(result, expected, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(keys, expected_keys, rtol=8e-3, atol=1e-2)
    assert torch.equal(values, expected_values)


def test_prompts_are_written_at_the_start_of_the_cache(device):
    """What lies behind the prompts stays."""
    key, value = (random(2, 130, 3, 40, device=device, seed=seed).transpose(1, 2) for seed in (0, 1))
    keys, values = (random(2, 3, 192, 40, device=device, seed=seed) for seed in (2, 3))
    expected = [torch.cat([new, old[:, :, 130:]], 2) for new, old in ((key, keys), (value, values))]
    assert cache_write.usable(key, value, keys, values)
    cache_write.write_prompts(key, value, keys, values)
    assert torch.equal(keys, expected[0])
    assert torch.equal(values, expected[1])


def test_the_first_of_the_largest_logits_is_chosen(device):
    logits = random(3, 2500, device=device)
    logits[0, 1030] = logits[0, 2040] = 9
    logits[2, 2499] = 9
    token, position = (torch.zeros(shape, dtype=torch.long, device=device) for shape in ((3, 1), (1,)))
    choice.advance(logits, token, position)
    assert token[:, 0].tolist() == [1030, int(logits[1].argmax()), 2499]
    assert position.item() == 1
