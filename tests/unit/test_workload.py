"""Estimates of time: products against PyTorch's own counter, and what the table of ``plan`` shows a user."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gemq.assets import builtin_model
from gemq.models.replay import Replay
from gemq.models.source import Source
from gemq.models.structure import find_structure
from gemq.pipeline.stage_costs import JobStages, stage_rounds, stage_work
from gemq.planning.cost_model import Work, Workload
from gemq.recipe import Recipe
from gemq.runtime.device import Rates, measure

WINDOW = 64


@pytest.fixture(scope="module")
def replay() -> Replay:
    model, _ = Source.resolve(str(builtin_model())).load(torch.device("cpu"), torch.float32)
    return Replay(model, find_structure(model))


def workload(replay: Replay, **keys) -> Workload:
    recipe = Recipe(**{"effort": "low", "num_windows": 8, "seq_len": WINDOW, **keys})
    return Workload(replay.structure, recipe, replay.model.config, WINDOW, torch.float32, torch.device("cpu"))


def seconds(replay: Replay, **keys) -> dict[str, float]:
    """Expected seconds of each stage on a machine of fixed rates."""
    rates = Rates(1e11, 1e10, 1e5)
    job = workload(replay, **keys)
    work = stage_work(job, JobStages.of(job.recipe, None, reconstruct=job.recipe.reconstruct))
    return {name: stage.seconds(rates) for name, stage in work.items()}


def test_products_are_those_that_pytorch_counts(replay: Replay):
    ids = torch.arange(8 * WINDOW).view(8, WINDOW)
    hidden, calls = replay.inputs(ids)
    job = workload(replay)
    layer = job.structure.layers[0]
    leaf = Replay.leaf(hidden)
    with FlopCounterMode(display=False) as forward:
        output = replay.run(0, leaf, calls[0])
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    # On a CPU the counter sees no attention. It sees the router's product, which the estimate leaves out.
    attention = 4 * job.text_config.hidden_size * WINDOW * ids.numel()
    counted = job.forward(layer, ids.numel()).products - attention
    assert forward.get_total_flops() == pytest.approx(counted, rel=0.02)
    assert backward.get_total_flops() == pytest.approx(counted, rel=0.02)  # weights are frozen: of inputs alone


def test_a_plan_lists_the_stages_that_the_job_will_run(replay: Replay):
    stages = ["calibration windows", "candidates", "sensitivity", "scores", "guard windows", "guard", "reconstruct"]
    assert list(seconds(replay)) == stages
    trained = seconds(replay, candidate_epochs=1, reconstruction_epochs=1, distill_epochs=1)
    assert list(trained) == [*stages[:-1], "reconstruct", "distill"]
    assert list(seconds(replay, allocate="uniform")) == ["calibration windows", "candidates", "reconstruct"]
    assert list(seconds(replay, calibration=("text.txt",))) == stages[1:]
    assert list(seconds(replay, reconstruct=False, guard=False)) == stages[:4]


def test_more_work_is_expected_to_take_longer(replay: Replay):
    low = seconds(replay)
    once, twice = seconds(replay, num_windows=64), seconds(replay, num_windows=128)
    for stage in ("calibration windows", "scores", "reconstruct"):
        assert 1.1 < twice[stage] / once[stage] <= 2.01
    trained = seconds(replay, candidate_epochs=1, reconstruction_epochs=1, distill_epochs=1)
    assert trained["candidates"] > 2 * low["candidates"]
    assert trained["reconstruct"] > 1.5 * low["reconstruct"]
    wide = seconds(replay, widths=(1, 2, 3))
    progressive = seconds(replay, widths=(1, 2, 3), progressive=(3.0, 2.0))
    assert progressive["scores"] == pytest.approx(2 * wide["scores"])


def test_a_gpu_is_expected_to_spend_less_on_the_same_work(replay: Replay):
    """At equal rates: its kernels read and write less, and launch less."""
    rates = Rates(1e14, 1e12, 1e5)
    cpu = workload(replay, candidate_epochs=1, reconstruction_epochs=1, distill_epochs=1)
    gpu = dataclasses.replace(cpu, device=torch.device("cuda"))
    stages = JobStages.of(cpu.recipe, None, reconstruct=True)
    on_cpu, on_gpu = stage_work(cpu, stages), stage_work(gpu, stages)
    for stage in ("candidates", "reconstruct", "distill"):
        assert on_gpu[stage].seconds(rates) < on_cpu[stage].seconds(rates)


def test_a_progressive_recipe_runs_stages_several_times():
    steps = {"scores": 3, "reconstruct": 3, "distill": 3}
    assert stage_rounds(Recipe(progressive=(3.0, 2.5, 2.0))) == steps
    assert stage_rounds(Recipe()) == {}


def test_work_adds_up():
    assert (Work(1, 2, 3) + Work(products=10)) * 2 == Work(22, 4, 6)
    assert Work(11, 2, 3).seconds(Rates(products=1, bytes=2, calls=3)) == pytest.approx(13)


def test_this_machine_has_rates():
    rates = measure(torch.device("cpu"), torch.float32, 64, 64)
    assert all(value > 1e3 for value in dataclasses.asdict(rates).values())
