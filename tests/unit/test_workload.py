"""What ``plan`` counts: products against PyTorch's own counter, stages against those of a real job."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from gemq.assets import builtin_model
from gemq.models.replay import Replay
from gemq.models.source import Source
from gemq.models.structure import find_structure
from gemq.planning.cost_model import Work, Workload
from gemq.recipe import Recipe
from gemq.runtime.device import Rates, measure

WINDOW = 64


@pytest.fixture(scope="module")
def replay() -> Replay:
    model, _ = Source.resolve(str(builtin_model())).load(torch.device("cpu"), torch.float32)
    return Replay(model, find_structure(model))


def workload(replay: Replay, **keys) -> Workload:
    config = replay.model.config
    recipe = Recipe(**{"effort": "low", "windows": 8, "window": WINDOW, **keys})
    return Workload(
        replay.structure, recipe, config.hidden_size, config.vocab_size, config.num_experts_per_tok, WINDOW, 4, 8
    )


def test_products_are_those_that_pytorch_counts(replay: Replay):
    ids = torch.arange(8 * WINDOW).view(8, WINDOW)
    hidden, calls = replay.inputs(ids)
    planned = workload(replay)
    layer = planned.structure.layers[0]
    leaf = Replay.leaf(hidden)
    with FlopCounterMode(display=False) as forward:
        out = replay.run(0, leaf, calls[0])
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    # the counter sees the router's product, which we leave out, and no attention on a CPU
    counted = planned.forward(layer, 8 * WINDOW, context=0).products
    assert forward.get_total_flops() == pytest.approx(counted, rel=0.02)
    assert backward.get_total_flops() == pytest.approx(counted, rel=0.02)  # weights are frozen: of inputs alone


def test_more_work_takes_longer(replay: Replay):
    rates = Rates(1e11, 1e10, 1e11, 1e5, 1e7)

    def seconds(**keys) -> dict[str, float]:
        return {name: work.seconds(rates) for name, work in workload(replay, **keys).stages().items()}

    low = seconds()
    assert list(low) == ["calibration windows", "ladder", "sensitivity", "scores", "guard windows", "guard", "refine"]
    twice = seconds(windows=16)
    for stage in ("calibration windows", "scores", "refine"):
        assert 1.1 < twice[stage] / low[stage] <= 2.01
    trained = seconds(ladder_epochs=1, layer_epochs=1, distil_epochs=1)
    assert trained.keys() == (low.keys() - {"refine"}) | {"reconstruct", "distil"}
    assert trained["ladder"] > 2 * low["ladder"]
    assert trained["reconstruct"] > 1.5 * low["refine"]
    assert seconds(progressive=(3.0, 2.0), widths=(1, 2, 3))["scores"] == pytest.approx(
        2 * seconds(widths=(1, 2, 3))["scores"]
    )
    assert seconds(allocate="uniform").keys() == {"calibration windows", "ladder", "refine"}


def test_work_adds_up():
    a, b = Work(1, 2, 3, 4, 5), Work(products=10)
    assert (a + b) * 2 == Work(22, 4, 6, 8, 10)
    assert (a + b).seconds(Rates(1, 2, 3, 4, 5)) == pytest.approx(11 + 4)


def test_this_machine_has_rates():
    rates = measure(torch.device("cpu"), torch.float32, 64, 64)
    assert all(value > 1e3 for value in dataclasses.asdict(rates).values())
