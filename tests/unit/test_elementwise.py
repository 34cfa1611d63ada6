"""Norms and rotary positions in few kernels: those that compute the same, and no others."""

import sys
from types import ModuleType

import pytest
import torch
from interpreted import DEVICE
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.glm4_moe import modeling_glm4_moe
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.mixtral import modeling_mixtral
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm, apply_rotary_pos_emb

from gemq.kernels.training.rotary import rotary, usable
from gemq.models.fused_norms import plain_rotary, use_fused_norms, use_fused_rotary

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", [OlmoeRMSNorm, GptOssRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_usual_norms_are_taken_over_and_give_the_same(kind, dtype):
    torch.manual_seed(0)
    norm = kind(48).to(dtype)
    nn.init.normal_(norm.weight)
    hidden = torch.randn(2, 5, 48).to(dtype).requires_grad_()

    def run():
        out = norm(hidden)
        return out, *torch.autograd.grad(out.float().square().sum(), [hidden, norm.weight])

    expected = run()
    assert use_fused_norms(nn.ModuleList([norm]), CPU) == 1
    for one, other in zip(run(), expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).float().norm() <= (1e-6 if dtype == torch.float32 else 4e-3) * other.float().norm()


def test_a_weight_is_looked_up_at_each_call():
    norm = OlmoeRMSNorm(8)
    use_fused_norms(nn.ModuleList([norm]), CPU)
    x = torch.randn(3, 8)
    assert torch.equal(torch.func.functional_call(norm, {"weight": torch.full((8,), 2.0)}, (x,)), 2 * norm(x))


class GatedNorm(OlmoeRMSNorm):
    def forward(self, hidden, gate):
        return super().forward(hidden) * gate


@pytest.mark.parametrize("norm", [GemmaRMSNorm(16), nn.LayerNorm(16), GatedNorm(16)], ids=lambda x: type(x).__name__)
def test_norms_that_compute_something_else_stay_as_they_are(norm):
    assert use_fused_norms(nn.ModuleList([norm]), CPU) == 0
    assert "forward" not in vars(norm)


def test_norms_without_contents_are_known_by_their_kind():
    with torch.device("meta"):
        norm = OlmoeRMSNorm(16)
    assert use_fused_norms(nn.ModuleList([norm]), CPU) == 1


# Rotary positions


def turned(kind, run, heads=3, windows=2, tokens=5, size=24, one_row=False):
    """What ``run`` makes of queries as a layer has them, [B, N, S, D] of [B, S, N, D], and their gradient."""
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random).to(kind)
    x = draw(windows, tokens, heads, size).to(DEVICE).transpose(1, 2).requires_grad_()
    cos, sin = (draw(1 if one_row else windows, tokens, size).to(DEVICE) for _ in range(2))
    out = run(x, cos, sin)
    return out, *torch.autograd.grad(out, x, draw(windows, heads, tokens, size).to(DEVICE))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [{}, {"heads": 5, "size": 128, "one_row": True}, {"tokens": 1}], ids=str)
def test_one_kernel_turns_as_ten_do(kind, given):
    found = turned(kind, rotary, **given)
    expected = turned(kind, lambda x, cos, sin: apply_rotary_pos_emb(x, x, cos, sin)[0], **given)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        # in bfloat16 it rounds once, the family's code thrice
        assert (one - other).float().norm() <= (1e-6 if kind == torch.float32 else 8e-3) * other.float().norm()


class Turning(nn.Module):
    """Of a family whose module is ``code``."""


def taken(code: ModuleType, monkeypatch) -> int:
    monkeypatch.setattr(Turning, "__module__", code.__name__)
    monkeypatch.setattr(code, "apply_rotary_pos_emb", code.apply_rotary_pos_emb)  # puts it back
    return use_fused_rotary(Turning(), plain_rotary, usable)


def test_a_familys_function_is_taken_over_once(monkeypatch):
    before = modeling_mixtral.apply_rotary_pos_emb
    assert taken(modeling_mixtral, monkeypatch) == 1
    assert taken(modeling_mixtral, monkeypatch) == 0
    q, k, cos, sin = (torch.randn(1, *n, 4, 8) for n in ((2,), (1,), (), ()))
    found, expected = (f(q, k, cos, sin) for f in (modeling_mixtral.apply_rotary_pos_emb, before))
    assert all(map(torch.equal, found, expected))  # on a CPU the family's own


@pytest.mark.parametrize("code", [modeling_gpt_oss, sys], ids=["gpt_oss", "none"])
def test_functions_that_turn_otherwise_stay(code, monkeypatch):
    before = getattr(code, "apply_rotary_pos_emb", None)
    monkeypatch.setattr(Turning, "__module__", code.__name__)
    assert use_fused_rotary(Turning(), plain_rotary, usable) == 0
    assert getattr(code, "apply_rotary_pos_emb", None) is before


def test_a_part_of_a_head_that_is_turned_goes_the_familys_way(monkeypatch):
    assert taken(modeling_glm4_moe, monkeypatch) == 1  # it turns whole heads likewise
    assert not usable(torch.zeros(1, 2, 4, 16), *(torch.zeros(1, 4, 8) for _ in range(2)))
