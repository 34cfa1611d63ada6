"""The time that a whole job is said to take still."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from gemq import pipeline
from gemq.assets import builtin_model, builtin_texts
from gemq.progress import Monitor, StageCost
from gemq.recipe import Recipe


def test_later_stages_are_expected_to_be_as_slow_as_those_so_far():
    monitor = Monitor(
        stages={"load": StageCost(99.0), "ladder": StageCost(20.0)},
        expected={"ladder": 10.0, "scores": 20.0, "distil": 30.0},
    )
    # expected until now: 10 + 20 / 4; taken: 20 + 10; what is left of scores goes on at their own pace
    assert monitor.seconds_left("scores", 10.0, 0.25) == pytest.approx(30.0 + 30.0 * 2)
    assert monitor.seconds_left("scores", 10.0, 0.0) is None
    assert monitor.seconds_left("allocate", 1.0, 0.5) is None


def test_a_watched_job_knows_its_stages_before_the_first_of_them(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run_ladder", stop)
    recipe = Recipe(effort="low", windows=2, window=32, calib=(str(builtin_texts()[0]),))
    for console in (None, Console(file=io.StringIO())):
        monitor = Monitor(console)
        with pytest.raises(KeyboardInterrupt):
            pipeline.quantize(str(builtin_model()), recipe, out=tmp_path / str(console is None), monitor=monitor)
        names = list(monitor.expected)
        assert names == (
            [] if console is None else ["ladder", "sensitivity", "scores", "guard windows", "guard", "refine"]
        )
