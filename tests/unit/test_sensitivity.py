"""Sensitivities against their definition: the whole model run with one layer's experts overwritten."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gemq.allocation.scores import rescale_to_kl
from gemq.allocation.sensitivity import MAX_TOKENS, measured_tokens, measured_windows
from gemq.calibration.activations import Activations
from gemq.calibration.windows import Windows
from gemq.layers.training import expert_overrides
from gemq.models.experts import expert_weight
from gemq.models.replay import Replay
from gemq.models.structure import find_structure
from gemq.pipeline.sensitivity_stage import layer_kl
from support.families import tiny, tokens

torch.set_num_threads(1)
WINDOWS = Windows(tokens(6, 10), torch.tensor([0, 0, 1, 1, 1, 2]), ("a", "b", "c"), (20, 30, 10))


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v2"])
def test_layer_kl_is_that_of_the_whole_model_with_one_layer_changed(family):
    model = tiny(family)
    structure = find_structure(model)
    replay = Replay(model, structure)
    candidates = {}
    for i, layer in structure.moe_layers:
        module = model.get_submodule(layer.experts.path)
        exact = [expert_weight(module, m.name) for m in layer.experts.matrices]
        candidates[i] = [tuple(w * factor for w in exact) for factor in (0.5, 1.0)]
    start = Activations.start(replay, WINDOWS, 20, 0)
    kl_by_layer = layer_kl(replay, start, candidates.__getitem__, lambda: None)
    assert list(kl_by_layer) == [i for i, _ in structure.moe_layers]  # dense layers have no experts to change

    with torch.no_grad():
        expected = model(WINDOWS.tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
        for i, layer in structure.moe_layers:
            changed = expert_overrides(model, layer.experts, candidates[i][0])
            exact_weights = {name: model.get_parameter(name).clone() for name in changed}
            for name, weight in changed.items():
                model.get_parameter(name).copy_(weight)
            logits = model(WINDOWS.tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
            for name, weight in exact_weights.items():
                model.get_parameter(name).copy_(weight)
            kl = F.kl_div(logits, expected, log_target=True, reduction="none").sum(-1).mean(-1)
            torch.testing.assert_close(kl_by_layer[i][0].float(), kl, rtol=1e-3, atol=1e-7)
            assert kl_by_layer[i][1].abs().max() < 1e-6  # the exact weights cost nothing


def test_windows_are_the_same_share_of_every_source():
    assert measured_windows(WINDOWS, 60).counts() == {"a": 2, "b": 2, "c": 1}
    assert measured_windows(WINDOWS, 1).counts() == {"a": 1, "b": 1, "c": 1}
    assert measured_tokens(1000) == 250
    assert measured_tokens(100 * MAX_TOKENS) == MAX_TOKENS


def test_rescaled_costs_sum_to_what_was_measured():
    costs = torch.rand(5, 2, 3, dtype=torch.float64)
    costs[..., 2] = 0  # a width without error stays without cost
    kl = torch.tensor([0.3, 0.1, 0.2], dtype=torch.float64)
    scaled = rescale_to_kl(costs, kl)
    torch.testing.assert_close(scaled.sum((0, 1)), torch.tensor([0.3, 0.1, 0.0], dtype=torch.float64))
    torch.testing.assert_close(scaled[..., 0] / scaled[0, 0, 0], costs[..., 0] / costs[0, 0, 0])
