"""Training codes, layers and the packed model: it helps where it can, is dropped where it does not, and repeats."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from gemq.calibration.activations import Activations
from gemq.calibration.windows import Windows
from gemq.distillation.distill import distill
from gemq.distillation.settings import Distillation
from gemq.distillation.student_matrices import AffineStudentMatrix
from gemq.layers.candidates import LayerCandidates, build_candidates
from gemq.layers.quantizer import Quantizer
from gemq.layers.reconstruction import QuantizedLayer, Targets, reconstruct_layer
from gemq.layers.scheme import QuantizationScheme
from gemq.layers.training import Training, tunable_names
from gemq.models.replay import Replay
from gemq.models.structure import find_structure
from gemq.quant.gptq import max_codes
from gemq.quant.grid import Quantized, dequantize, nearest
from gemq.quant.trainable import MARGIN, TrainableMatrices, cosine_with_warmup, epochs, rounded_to
from gemq.quant.widths import ExpertWidths, Width
from support.families import tiny, tokens

torch.set_num_threads(1)
THREE_WIDTHS = (Width.ONE_BIT, Width.TWO_BIT, Width.THREE_BIT)
CANDIDATES = (Width.ONE_BIT, Width.TWO_BIT)
WINDOWS = 120
QUANTIZER = Quantizer("gptq", 32, 0.01, 0.1, compensates=False)
"""Without compensation, which leaves less for training to gain on a random model."""
TRAINING = Training(epochs=6, lr_codes=1e-2, lr_grids=2e-3, lr_tuned=3e-3, val_fraction=0.2, seed=0)
STILL = replace(TRAINING, lr_codes=1e-30, lr_grids=1e-30, lr_tuned=1e-30)
"""Rates at which nothing moves: what such training gives is no better than before."""


def start(family: str = "olmoe") -> tuple[Replay, Activations]:
    model = tiny(family)
    ids = tokens(WINDOWS, 16)
    windows = Windows(ids, torch.zeros(WINDOWS, dtype=torch.int64), ("text",), (ids.numel(),))
    replay = Replay(model, find_structure(model))
    return replay, Activations.start(replay, windows, 128, 0)


def trainable(soft_codes: bool = True) -> TrainableMatrices:
    codes = torch.randint(0, 4, (2, 6, 32), dtype=torch.uint8)
    grid = torch.rand(2, 6, 2) + 0.5
    q = Quantized(codes, *nearest(grid, -grid, 3))
    jitter = (torch.rand(codes.shape) - 0.5) * 0.9
    return TrainableMatrices(
        q, max_codes([Width.TWO_BIT, Width.TWO_BIT], codes.device), codes + jitter if soft_codes else None
    )


def test_training_starts_at_the_codes_it_is_given():
    matrices = trainable()
    q = matrices.result()
    assert torch.equal(q.codes, matrices.codes)
    assert torch.equal(matrices.weight(), dequantize(q))


def test_gradients_pass_the_rounding():
    matrices = trainable()
    target = torch.randn(2, 6, 32)
    (matrices.weight() * target).sum().backward()
    scale = matrices.base_scale.repeat_interleave(16, dim=-1)
    assert matrices.soft_codes is not None
    torch.testing.assert_close(matrices.soft_codes.grad, target * scale)
    assert all(g.grad is not None and g.grad.abs().sum() > 0 for g in matrices.grids())


def test_a_step_is_the_same_share_of_the_range_at_every_width():
    """By range, a step of Adam moves one-bit codes seven times as far, in codes, as three-bit codes."""
    codes = torch.randint(0, 2, (2, 4, 32), dtype=torch.uint8)
    q = Quantized(codes, torch.ones(2, 4, 2), torch.zeros(2, 4, 2))
    matrices = TrainableMatrices(
        q, max_codes([Width.ONE_BIT, Width.THREE_BIT], codes.device), codes.float(), scale_by_max_code=True
    )
    optimizer = Training(1, 0.01, 0.0, 0.0, 0.1, 0).optimizer(1, [matrices.soft_codes], matrices.grids())
    initial = matrices.soft_codes.detach().clone()
    optimizer.step(matrices.weight().sum())
    moved = ((matrices.soft_codes.detach() - initial) / matrices.unit).abs().mean((1, 2))
    assert moved[0] == pytest.approx(7 * moved[1].item(), rel=1e-3)


def test_latents_come_back_into_range():
    matrices = trainable()
    assert matrices.soft_codes is not None
    with torch.no_grad():
        matrices.soft_codes.add_(100)
    matrices.keep_in_range()
    assert matrices.soft_codes.max().item() == pytest.approx(3 + MARGIN)
    assert matrices.result().codes.max() == 3


def test_schedule_and_order():
    rates = [cosine_with_warmup(step, 100) for step in range(100)]
    assert max(rates) == rates[4] == 1.0
    assert rates[0] == pytest.approx(0.2)
    assert rates[-1] < 0.01
    order = list(epochs(10, 2, seed=3))
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert order == list(epochs(10, 2, seed=3))


def test_rounding_to_bfloat16_keeps_gradients():
    x = torch.tensor([1.0001], requires_grad=True)
    y = rounded_to(x, torch.bfloat16)
    y.backward()
    assert y.item() == 1.0
    assert x.grad is not None
    assert x.grad.item() == 1.0


def ladder_of(training: Training | None, family: str = "olmoe") -> LayerCandidates:
    replay, activations = start(family)
    index = replay.structure.moe_layers[0][0]
    for i in range(index):
        activations.advance(replay, i)
    candidates, _ = build_candidates(replay, index, activations, QUANTIZER, CANDIDATES, Width.FOUR_BIT, training)
    return candidates


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
def test_trained_ladder_differs_and_is_repeatable(family):
    plain, trained, again = ladder_of(None, family), ladder_of(TRAINING, family), ladder_of(TRAINING, family)
    plain_weight, trained_weight = (dequantize(x.experts["gate_up_proj"][1].unpack()) for x in (plain, trained))
    assert not torch.equal(plain_weight, trained_weight)
    assert plain.not_improved == 0
    assert trained.not_improved < 2 * len(trained.counts)
    pairs = zip(trained.to_tensors().values(), again.to_tensors().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_experts_that_training_does_not_help_keep_gptqs_codes():
    plain, still = ladder_of(None), ladder_of(STILL)
    assert still.not_improved == 2 * len(plain.counts)
    for name, candidates in plain.experts.items():
        for width, packed in candidates.items():
            assert all(
                torch.equal(a, b) for a, b in zip(packed.tensors(), still.experts[name][width].tensors(), strict=True)
            )


def test_dense_linears_of_the_ladder_are_trained_with_their_layer():
    replay, activations = start("deepseek_v2")
    plain, outputs = build_candidates(replay, 0, activations, QUANTIZER, CANDIDATES, Width.FOUR_BIT)
    training = replace(TRAINING, lr_codes=5e-3, lr_tuned=0.0)
    trained, _ = build_candidates(
        replay, 0, activations, QUANTIZER, CANDIDATES, Width.FOUR_BIT, linear_training=training
    )

    def error(candidates: LayerCandidates) -> float:
        linears = replay.structure.layers[0].linears
        names = {x.path: f"{x.path}.weight" for x in linears}
        weights = {names[x.path]: dequantize(candidates.linears[x.path].unpack())[0] for x in linears}
        pairs = zip(activations.hidden, activations.calls, outputs, strict=True)
        return sum((replay.run(0, h, c[0], weights) - exact).square().sum().item() for h, c, exact in pairs)

    assert error(trained) < error(plain)


def mixed(count: int) -> list[ExpertWidths]:
    return [(THREE_WIDTHS[e % 3], THREE_WIDTHS[1 + e % 2]) for e in range(count)]


def reconstructed(training: Training | None) -> tuple[Replay, Activations, list[QuantizedLayer], list[torch.Tensor]]:
    """A whole model reconstructed at mixed widths, and the full-precision model's last hidden states."""
    replay, activations = start()
    stored_dtypes = {name: torch.bfloat16 for name, _ in replay.model.named_parameters()}
    exact = activations.hidden.copy()
    layers = []
    for i, layer in enumerate(replay.structure.layers):
        activations.advance_all(replay, i, [exact])
        targets = Targets(exact, stored_dtypes, training) if training else None
        assert layer.experts is not None
        widths = mixed(layer.experts.count)
        layers.append(reconstruct_layer(replay, i, activations, QUANTIZER, widths, Width.FOUR_BIT, targets))
        activations.advance(replay, i)
    return replay, activations, layers, exact


def test_reconstruction_lowers_the_layers_held_out_error():
    _, _, layers, _ = reconstructed(TRAINING)
    assert all(layer.error_after <= layer.error_before for layer in layers)
    assert sum(layer.error_after for layer in layers) < 0.98 * sum(layer.error_before for layer in layers)
    assert all(layer.tuned for layer in layers)


def test_reconstruction_trains_attentions_codes_too():
    _, _, plain, _ = reconstructed(None)
    _, _, trained, _ = reconstructed(TRAINING)
    path = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(plain[0].tensors[f"{path}.codes"], trained[0].tensors[f"{path}.codes"])


def test_a_layer_that_training_does_not_help_stays_gptqs():
    _, _, plain, _ = reconstructed(None)
    _, _, still, _ = reconstructed(STILL)
    assert all(torch.equal(t, still[0].tensors[n]) for n, t in plain[0].tensors.items())
    assert still[0].error_after == still[0].error_before > 0


def test_refined_layer_round_trip_with_training():
    _, _, layers, _ = reconstructed(TRAINING)
    again = QuantizedLayer.from_tensors(layers[0].to_tensors())
    assert again.error_before == layers[0].error_before
    assert again.error_after == layers[0].error_after
    assert again.retries == layers[0].retries
    assert set(again.tuned) == set(layers[0].tuned)
    assert set(again.tensors) == set(layers[0].tensors)


def run_distill(training: Training, loss: str = "kl", sets: tuple[str, ...] = ("routers", "norms", "grids")):
    replay, _, layers, teacher = reconstructed(None)
    ids = tokens(WINDOWS, 16)
    windows = Windows(ids, torch.zeros(WINDOWS, dtype=torch.int64), ("text",), (ids.numel(),))
    activations = Activations.start(replay, windows, 128, 0)
    schemes = [QuantizationScheme(mixed(x.experts.count), Width.FOUR_BIT) for x in replay.structure.layers if x.experts]
    stored_dtypes = {name: torch.bfloat16 for name, _ in replay.model.named_parameters()}
    steps: list[int] = []

    def tick(done: int | None = None, total: int | None = None) -> None:
        steps.append(done or 0)

    distillation = Distillation(training, loss, sets, stored_dtypes)
    result = distill(replay, layers.__getitem__, schemes, activations, teacher, distillation, tick)
    assert steps
    return result, layers, replay


def test_distillation_lowers_the_held_out_loss():
    result, layers, replay = run_distill(replace(TRAINING, lr_codes=0.0))
    assert result.loss_after < result.loss_before
    names = {n for layer in layers for n in layer.tensors if n.endswith((".scales", ".offsets")) and ".experts." in n}
    assert set(result.tensors) == names
    tunable = {n for layer in replay.structure.layers for n in tunable_names(replay, layer)}
    assert tunable < set(result.tuned)
    tail = set(result.tuned) - tunable
    assert tail == {"model.norm.weight"}


@pytest.mark.parametrize("loss", ["kl", "next_token"])
def test_distillation_by_windows_is_the_same_descent(loss, monkeypatch):
    short = replace(TRAINING, lr_codes=0.0, epochs=1)
    unsplit, _, _ = run_distill(short, loss)
    monkeypatch.setattr("gemq.models.replay.MAX_LOGITS_PER_CHUNK", 1)
    split, _, _ = run_distill(short, loss)
    assert split.loss_before == pytest.approx(unsplit.loss_before, rel=1e-5)
    assert split.loss_after == pytest.approx(unsplit.loss_after, rel=1e-3)


def test_distillation_that_does_not_help_is_dropped():
    result, _, _ = run_distill(replace(STILL, lr_codes=0.0))
    assert result.loss_after == result.loss_before
    assert not result.tensors
    assert not result.tuned


def test_the_papers_tuning_moves_routers_only():
    result, _, replay = run_distill(replace(TRAINING, lr_codes=0.0), "next_token", ("routers",))
    assert not result.tensors
    routers = tuple(layer.router for layer in replay.structure.layers if layer.router)
    assert all(name.startswith(routers) for name in result.tuned)


def test_packed_experts_mean_what_their_codes_say():
    replay, _, layers, _ = reconstructed(None)
    experts = replay.structure.layers[0].experts
    assert experts is not None
    widths = [THREE_WIDTHS[e % 3] for e in range(experts.count)]
    original = copy.deepcopy(layers[0].tensors)
    packed = AffineStudentMatrix(layers[0], experts, experts.matrices[0], widths)
    module = replay.model.get_submodule(experts.path)  # holds what reconstruct_layer installed
    torch.testing.assert_close(packed.weight(), getattr(module, experts.matrices[0].name), rtol=0, atol=0)
    assert all(torch.equal(original[name], tensor) for name, tensor in packed.result().items())


def test_packed_experts_gradients_are_those_of_the_formula(monkeypatch):
    monkeypatch.setattr("gemq.kernels.training.differentiable_dequantize.MAX_CHUNK_WEIGHTS", 1)  # one expert at a time
    replay, _, layers, _ = reconstructed(None)
    experts = replay.structure.layers[0].experts
    assert experts is not None
    widths = [THREE_WIDTHS[e % 3] for e in range(experts.count)]
    packed = AffineStudentMatrix(layers[0], experts, experts.matrices[0], widths)
    all_codes = torch.zeros(packed.weight().shape, dtype=torch.uint8)
    for experts_index, codes in packed.codes.unpacked_chunks(all_codes.shape[-1]):
        all_codes[experts_index] = codes
    base = packed.grids
    plain = TrainableMatrices(Quantized(all_codes, base.base_scale, base.base_offset), base.max_code, None)
    slope = torch.randn(all_codes.shape, generator=torch.Generator().manual_seed(0))
    for matrices in (packed, plain):
        (matrices.weight() * slope).sum().backward()
    for ours, theirs in zip(base.grids(), plain.grids(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    assert packed.weight(torch.bfloat16).dtype == torch.bfloat16
