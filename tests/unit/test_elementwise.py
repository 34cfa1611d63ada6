"""Fused norms and rotary positions: those that compute the same are fused, and no others."""

from support.interpreted import DEVICE  # first: skips the module where triton is missing

# isort: split

import copy

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.glm4_moe import modeling_glm4_moe
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm, apply_rotary_pos_emb

from gemq.kernels.training.rotary import rotary, usable
from gemq.models.fused_norms import _is_plain_rotary, use_fused_norms, use_fused_rotary
from support.families import tiny, tokens

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", [OlmoeRMSNorm, GptOssRMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_usual_norms_are_fused_and_give_the_same(kind, dtype):
    torch.manual_seed(0)
    norm = kind(48).to(dtype)
    nn.init.normal_(norm.weight)
    hidden = torch.randn(2, 5, 48).to(dtype).requires_grad_()

    def run():
        out = norm(hidden)
        return out, *torch.autograd.grad(out.float().square().sum(), [hidden, norm.weight])

    expected = run()
    assert use_fused_norms(nn.ModuleList([norm]), CPU) == 1
    for actual, reference in zip(run(), expected, strict=True):
        assert actual.dtype == reference.dtype
        tolerance = 1e-6 if dtype == torch.float32 else 4e-3
        assert (actual - reference).float().norm() <= tolerance * reference.float().norm()


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


def rotated(kind, run, heads=3, windows=2, tokens=5, size=24, one_row=False):
    """The result of ``run`` and its gradient, for queries as a layer has them: [B, N, S, D], a view of [B, S, N, D]."""
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=random).to(kind)
    x = draw(windows, tokens, heads, size).to(DEVICE).transpose(1, 2).requires_grad_()
    cos, sin = (draw(1 if one_row else windows, tokens, size).to(DEVICE) for _ in range(2))
    out = run(x, cos, sin)
    return out, *torch.autograd.grad(out, x, draw(windows, heads, tokens, size).to(DEVICE))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"heads": 5, "size": 128, "one_row": True}, {"tokens": 1}], ids=str)
def test_one_kernel_rotates_as_ten_do(kind, options):
    results = rotated(kind, rotary, **options)
    expected = rotated(kind, lambda x, cos, sin: apply_rotary_pos_emb(x, x, cos, sin)[0], **options)
    for actual, reference in zip(results, expected, strict=True):
        assert actual.dtype == reference.dtype
        # in bfloat16 the kernel rounds once and the family's code three times
        tolerance = 1e-6 if kind == torch.float32 else 8e-3
        assert (actual - reference).float().norm() <= tolerance * reference.float().norm()


class Attention(nn.Module):
    """Calls the rotary function of this file's globals, and returns that function as well."""

    def forward(self, q, k, cos, sin):
        if q.numel() == 0:
            raise ValueError("no queries")
        return apply_rotary_pos_emb, apply_rotary_pos_emb(q, k, cos, sin)


def rotary_inputs(queries=2):
    return [torch.randn(1, *shape, 4, 8) for shape in ((queries,), (1,), (), ())]


def test_a_module_uses_the_fused_function_only_while_it_runs():
    original = apply_rotary_pos_emb
    attention = Attention()
    assert use_fused_rotary(attention) == 1
    assert use_fused_rotary(attention) == 1
    inputs = rotary_inputs()
    function, result = attention(*inputs)
    assert function is not original
    assert all(map(torch.equal, result, original(*inputs)))  # on a CPU it calls the family's own
    with pytest.raises(ValueError, match="no queries"):
        attention(*rotary_inputs(queries=0))
    assert apply_rotary_pos_emb is original


def test_other_modules_of_the_family_keep_its_function():
    attention, unchanged = Attention(), Attention()
    use_fused_rotary(attention)
    copied = copy.deepcopy(attention)
    assert unchanged(*rotary_inputs())[0] is apply_rotary_pos_emb
    assert copied(*rotary_inputs())[0] is attention(*rotary_inputs())[0]
    assert copied.forward.__self__ is copied


def test_attention_of_a_family_is_found():
    model = tiny("mixtral")
    ids = tokens(1, 9)
    expected = model(ids).logits
    assert use_fused_rotary(model) == len(model.model.layers)
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("module", [tiny("gpt_oss"), nn.Linear(2, 2)], ids=["gpt_oss", "none"])
def test_functions_that_rotate_otherwise_stay(module):
    assert use_fused_rotary(module) == 0


def test_a_partial_rotation_of_a_head_uses_the_familys_function():
    assert _is_plain_rotary(modeling_glm4_moe.apply_rotary_pos_emb)  # it rotates whole heads in the same way
    assert not usable(torch.zeros(1, 2, 4, 16), *(torch.zeros(1, 4, 8) for _ in range(2)))
