"""The guard: its statistics, softening of an allocation that fails, and the KL of candidates."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

from gemq.allocation.guard import SOFTENING, decide, describe, judge, paired_p, soften
from gemq.allocation.problem import Allocation, Budget, Problem, allocate
from gemq.assets import builtin_model, builtin_texts
from gemq.calibration.activations import Activations
from gemq.calibration.sources import Streams, calibration_windows, held_out_windows
from gemq.calibration.windows import Windows
from gemq.cli.tables import print_result
from gemq.layers.candidates import LayerCandidates, build_candidates
from gemq.layers.quantizer import Quantizer
from gemq.layers.reconstruction import assemble_layer, install_layer
from gemq.layers.scheme import QuantizationScheme
from gemq.models.replay import Replay
from gemq.models.source import Source
from gemq.models.structure import find_structure
from gemq.pipeline.guard_stage import allocations_kl
from gemq.pipeline.quantize import export, quantize
from gemq.quant.widths import Width
from gemq.recipe import Recipe
from support.families import tiny, tokens
from support.tokenizer import save_tokenizer

torch.set_num_threads(1)
WIDTHS = (Width.ONE_BIT, Width.TWO_BIT, Width.THREE_BIT)
BITS = np.array([1, 2, 3])
NAMES = ("docs", "prose")
SOURCE = np.repeat([0, 1], 8)


# Statistics


def test_p_is_that_of_a_paired_t_test():
    generator = np.random.default_rng(0)
    for shift in (-0.1, 0.0, 0.02, 0.5):
        a, b = generator.normal(1 + shift, 0.1, 12), generator.normal(1, 0.1, 12)
        expected = stats.ttest_rel(a, b, alternative="greater").pvalue
        assert paired_p(a - b) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("differences", "p"), [([], 1), ([9.0], 1), ([0.0, 0.0], 1), ([1.0, 1.0], 0), ([-1.0, -1.0], 1)]
)
def test_p_where_a_t_test_has_none(differences, p):
    assert paired_p(np.array(differences)) == p


def kl_of(docs: float, prose: float, noise: float = 0.0, seed: int = 0) -> np.ndarray:
    """KL of 16 windows with these means by source, and noise that does not change the means."""
    deviations = np.random.default_rng(seed).normal(size=(2, 8))
    deviations -= deviations.mean(axis=1, keepdims=True)
    return (np.array([docs, prose])[:, None] + noise * deviations).reshape(-1)


@pytest.mark.parametrize(
    ("docs", "prose", "noise", "passed"),
    [
        (0.9, 0.9, 0.0, True),
        (1.0, 1.0, 0.0, True),  # the same widths, the same model
        (1.01, 1.0, 0.0, False),  # the mean is worse
        (0.8, 1.029, 0.001, True),  # one source is worse, by less than 3 %
        (0.8, 1.06, 0.001, False),  # by more
        (0.8, 1.06, 0.5, True),  # by more, but it may be chance
    ],
)
def test_judge(docs, prose, noise, passed):
    judged = judge(kl_of(docs, prose, noise), kl_of(1, 1), SOURCE, NAMES)
    assert judged["passed"] is passed
    assert judged["kl"] == pytest.approx((docs + prose) / 2)
    assert judged["sources"]["prose"]["difference"] == pytest.approx(prose - 1)
    assert judged["sources"]["prose"]["windows"] == 8


def test_every_source_counts_once_and_an_empty_one_not_at_all():
    source = np.array([0, 0, 0, 0, 2])
    judged = judge(np.array([1.0, 1, 1, 1, 3]), np.array([1.0, 1, 1, 1, 4]), source, ("a", "none left", "b"))
    assert (judged["kl"], judged["uniform_kl"]) == (2.0, 2.5)
    assert list(judged["sources"]) == ["a", "b"]


# Softening


def problem(seed: int = 0) -> Problem:
    """Two layers of four experts and a dense one between them."""
    costs = np.random.default_rng(seed).uniform(0.5, 8, (8, 1)) * 4.0**-BITS
    layer, weights = np.repeat([0, 2], 4), np.full(8, 100)
    return Problem(WIDTHS, layer, costs, weights, weights[:, None] * BITS, np.ones(8, np.int64))


def test_soften():
    p = problem()
    half, all_ = soften(p, 0.5), soften(p, 1.0)
    np.testing.assert_array_equal(soften(p, 0.0).costs, p.costs)
    np.testing.assert_allclose(all_.costs[:4], np.tile(p.costs[:4].mean(0), (4, 1)))
    np.testing.assert_allclose(half.costs, (p.costs + all_.costs) / 2)
    assert not np.allclose(all_.costs[0], all_.costs[4])  # layers stay different


class Truth:
    """A made-up model: an expert's KL is ``harm`` times 4^-bits, whatever its scores say."""

    def __init__(self, harm: np.ndarray):
        self.harm, self.measured = harm, 0

    def __call__(self, candidates, only=None):
        self.measured += len(candidates)
        sums = [float((self.harm * 4.0 ** -np.array([width.bits for width in c.widths])).sum()) for c in candidates]
        return [kl_of(x, x, 1e-6)[slice(None) if only is None else only == SOURCE] for x in sums]


def run(p: Problem, bits: float, harm: np.ndarray, uniform: list[Allocation] | None = None):
    budget = Budget("bits", bits)
    solve = lambda q: allocate(q, budget)
    uniform = uniform or [allocate(p, budget, "uniform")]
    return decide(p, solve(p), uniform, solve, Truth(harm), SOURCE, NAMES)


def test_a_good_allocation_is_kept():
    p = problem()
    chosen, verdict = run(p, 2.0, p.costs[:, 0])
    assert chosen == allocate(p, Budget("bits", 2.0))
    assert (verdict["m"], verdict["passed"], len(verdict["tried"])) == (0.0, True, 1)
    assert describe(verdict).endswith("on 16 held-out windows: kept")


def test_a_bad_allocation_is_refused_and_softened():
    """Scores are reversed within the first layer, and right between layers."""
    p = problem()
    costs = np.array([1.0, 2, 8, 9, 20, 20, 20, 20])[:, None] * 4.0**-BITS
    p = dataclasses.replace(p, costs=costs)
    harm = np.array([40.0, 30, 1, 1, 80, 80, 80, 80])
    unsoftened = allocate(p, Budget("bits", 2.0))
    chosen, verdict = run(p, 2.0, harm)
    assert not verdict["tried"][0]["passed"]
    assert verdict["passed"]
    assert verdict["m"] in SOFTENING
    assert chosen.widths != unsoftened.widths
    assert chosen.nominal_bits <= 2.0
    choice = [WIDTHS.index(w) for w in chosen.widths]
    assert chosen.predicted_cost == pytest.approx(p.costs[range(8), choice].sum())  # by the scores as they were
    assert "(as scored: mean +" in describe(verdict)
    assert f"drawn {verdict['m']:.0%} towards their layer's mean" in describe(verdict)


def test_uniform_is_the_last_resort():
    """Scores are wrong about layers too, so that no softening helps."""
    p = problem()
    p = dataclasses.replace(p, costs=np.repeat([1.0, 20], 4)[:, None] * 4.0**-BITS)
    chosen, verdict = run(p, 2.0, np.repeat([20.0, 1], 4))
    assert set(chosen.widths) == {2}
    assert chosen.method == "uniform"
    assert verdict["m"] is None
    assert not verdict["passed"]
    assert [t["m"] for t in verdict["tried"]] == [0.0, *SOFTENING]
    assert verdict["kl"] == verdict["uniform_kl"]
    assert describe(verdict).startswith("uniform widths written")
    assert json.loads(json.dumps(verdict)) == verdict


def test_an_allocation_that_fails_on_a_source_it_has_not_seen_is_softened():
    """Good on both sources, but scores without docs would give the experts of docs too few bits."""
    p = problem()
    blind = dataclasses.replace(p, costs=p.costs[::-1].copy())
    truth = Truth(p.costs[:, 0])
    budget = Budget("bits", 2.0)
    solve = lambda q: allocate(q, budget)
    uniform = [allocate(p, budget, "uniform")]
    chosen, verdict = decide(p, solve(p), uniform, solve, truth, SOURCE, NAMES, {0: blind})
    first_trial = verdict["tried"][0]
    assert not first_trial["passed"]
    assert not any(s["worse"] for s in first_trial["sources"].values())
    assert first_trial["left_out"]["sources"]["docs"]["worse"]
    assert chosen.widths != solve(p).widths
    assert "as scored: with each source left out in turn, " in describe(verdict)
    same, _ = decide(p, solve(p), uniform, solve, truth, SOURCE, NAMES, {0: p, 1: p})
    assert same == solve(p)


def test_softened_to_uniform():
    """With equal layers, equal experts in each give uniform widths, which tie with uniform. The summary says so."""
    p = problem()
    p = dataclasses.replace(p, costs=np.tile(p.costs[:4], (2, 1)))
    chosen, verdict = run(p, 2.0, 1 / p.costs[:, 0] ** 2)
    assert set(chosen.widths) == {2}
    assert verdict["kl"] == verdict["uniform_kl"]
    assert "which is uniform" in describe(verdict)


def test_uniform_at_a_fractional_budget_is_the_mean_of_its_draws():
    p, harm = problem(), np.linspace(1, 3, 8)
    draws = [allocate(p, Budget("bits", 2.5), "uniform", seed=s) for s in range(3)]
    assert len({d.widths for d in draws}) > 1
    _, verdict = run(p, 2.5, harm, draws)
    assert verdict["uniform_draws"] == 3
    assert verdict["uniform_kl"] == pytest.approx(np.mean([kl.mean() for kl in Truth(harm)(draws)]))


def test_a_skipped_verdict_gives_its_reason():
    assert describe({"skipped": "a reason"}) == "not run (a reason)"


# Windows


def test_held_out_windows_are_those_that_calibration_left():
    tokenizer = Source(builtin_model()).tokenizer
    sources = [*map(str, builtin_texts()[:2]), "self"]
    streams = Streams(sources, tokenizer, 64, 12)
    calibration = calibration_windows(streams, seed=3, generate=lambda n: torch.zeros(n, 64, dtype=torch.int64))
    val_fraction = held_out_windows(streams, seed=3, per_source=5)
    assert list(val_fraction.counts().values()) == [5, 5, 0]
    assert val_fraction.names == calibration.names
    seen = {tuple(row) for row in calibration.tokens.tolist()}
    assert not any(tuple(row) in seen for row in val_fraction.tokens.tolist())
    all_held_out = held_out_windows(Streams(sources[:1], tokenizer, 64, 12), seed=3, per_source=10**6)
    assert len(all_held_out) + 12 == all_held_out.tokens_available[0] // 64  # a text has no more


# The model


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "qwen2_moe"])
def test_kl_of_a_candidate_is_that_of_the_model_with_its_weights(family):
    model = tiny(family)
    replay, group = Replay(model, find_structure(model)), 32
    windows = Windows(tokens(6, 12, 1), torch.tensor([0, 0, 0, 1, 1, 1]), NAMES, (36, 36))
    weights_before = {n: t.clone() for n, t in model.state_dict().items()}
    activations = Activations.start(replay, windows, 24, 0)
    candidates: list[LayerCandidates] = []
    for i in range(len(replay.structure.layers)):
        layer_candidates, activations.hidden = build_candidates(
            replay, i, activations, Quantizer("gptq", group, 0.01, 0.1), WIDTHS, Width.FOUR_BIT
        )
        candidates.append(layer_candidates)
    counts = [x.experts.count if x.experts else 0 for x in replay.structure.layers]
    mixed = [[(WIDTHS[(e + i) % 3], WIDTHS[e % 3]) for e in range(n)] for i, n in enumerate(counts)]
    three = [[(Width.THREE_BIT, Width.THREE_BIT)] * n for n in counts]
    start = Activations.start(replay, windows, 24, 0)
    kls = allocations_kl(replay, start, candidates.__getitem__, [mixed, three], Width.FOUR_BIT, lambda *_: None)
    assert all(torch.equal(t, weights_before[n]) for n, t in model.state_dict().items())
    (single_kl,) = allocations_kl(replay, start, candidates.__getitem__, [three], Width.FOUR_BIT, lambda *_: None)
    assert torch.equal(single_kl, kls[1])  # independent of other candidates, so that a resumed job finds the same
    ids = windows.tokens
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        for i, layer in enumerate(replay.structure.layers):
            scheme = QuantizationScheme(mixed[i], Width.FOUR_BIT)
            install_layer(model, layer, assemble_layer(candidates[i], layer, mixed[i]), scheme)
        got = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    kl = (expected.exp() * (expected - got)).sum(-1)[:, :-1].mean(1)
    torch.testing.assert_close(kls[0].float(), kl, rtol=1e-4, atol=1e-6)
    assert (kls[0] > 0).all()


# A job


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "model"
    tiny("olmoe").save_pretrained(path)
    save_tokenizer(path)
    return str(path)


def test_a_job_with_its_guard(model, tmp_path):
    """Stored in the work directory, and run again by ``export --reconstruct`` only."""
    text = str(builtin_texts()[0])
    recipe = Recipe(effort="low", calibration=(text,), num_windows=4, seq_len=32, bits=2.25, reconstruct=False)
    result = quantize(model, recipe, out=tmp_path / "out", work=tmp_path / "work")
    sources = result.guard["tried"][0]["sources"]
    assert {n: s["windows"] for n, s in sources.items()} == {"c": 8, "self": 16}
    assert result.guard["uniform_draws"] == 3
    assert result.guard == json.loads(json.dumps(result.to_dict()))["guard"]
    assert list((tmp_path / "work" / "guard").glob("verdict-*.json"))
    console = Console(file=io.StringIO(), width=500)
    print_result(console, result)
    assert f"Guard: {describe(result.guard)}\n" in console.file.getvalue()
    written = Windows.load(tmp_path / "work" / "guard-windows" / "windows.safetensors").to_bytes()

    again = quantize(model, recipe, out=tmp_path / "out", work=tmp_path / "work", resume=True)
    assert again.complete_before
    assert (again.guard, again.allocation) == (result.guard, result.allocation)
    assert not {"guard", "guard windows"} & set(again.stages)  # nothing is measured twice

    plain = export(tmp_path / "work", out=tmp_path / "plain", changes={"bits": 2.25})
    assert "--reconstruct" in plain.guard["skipped"]
    from_file = export(tmp_path / "work", out=tmp_path / "given", allocation=tmp_path / "work" / "allocation.json")
    assert "skipped" in from_file.guard
    finished = export(tmp_path / "work", out=tmp_path / "finished", changes={"bits": 2.25}, reconstruct=True)
    assert (finished.guard, finished.allocation) == (result.guard, result.allocation)
    assert Windows.load(tmp_path / "work" / "guard-windows" / "windows.safetensors").to_bytes() == written


def test_a_recipe_without_guard(model, tmp_path):
    text = str(builtin_texts()[0])
    recipe = Recipe(effort="low", calibration=(text,), num_windows=2, seq_len=16, reconstruct=False, guard=False)
    result = quantize(model, recipe, out=tmp_path / "out")
    assert result.guard == {"skipped": "switched off in the recipe"}
    assert not (tmp_path / "out.work" / "guard-windows").exists()
