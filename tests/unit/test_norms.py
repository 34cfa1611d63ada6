"""Norms in one kernel: those that compute the same, and no others."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm

from gemq.models.norms import use_fused_norms

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
