"""The time that a whole job is said to take still."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from gemq.assets import builtin_model, builtin_texts
from gemq.pipeline import quantize
from gemq.recipe import Recipe
from gemq.runtime import progress
from gemq.runtime.progress import Monitor, StageCost


def test_later_stages_are_expected_to_be_as_slow_as_those_so_far():
    monitor = Monitor(
        stages={"load": StageCost(99.0), "candidates": StageCost(20.0)},
        expected={"candidates": 10.0, "scores": 20.0, "distill": 30.0},
    )
    # expected until now: 10 + 20 / 4; taken: 20 + 10; what is left of scores goes on at their own pace
    assert monitor.seconds_left("scores", 10.0, 0.25) == pytest.approx(30.0 + 30.0 * 2)
    assert monitor.seconds_left("scores", 10.0, 0.0) is None
    assert monitor.seconds_left("allocate", 1.0, 0.5) is None


def test_a_watched_job_knows_its_stages_before_the_first_of_them(tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("gemq.pipeline.run_stages.run_candidates", stop)
    recipe = Recipe(effort="low", num_windows=2, seq_len=32, calibration=(str(builtin_texts()[0]),))
    for console in (None, Console(file=io.StringIO())):
        monitor = Monitor(console)
        with pytest.raises(KeyboardInterrupt):
            quantize.quantize(str(builtin_model()), recipe, out=tmp_path / str(console is None), monitor=monitor)
        names = list(monitor.expected)
        assert names == (
            [] if console is None else ["candidates", "sensitivity", "scores", "guard windows", "guard", "reconstruct"]
        )


def test_rounds_of_a_progressive_job_are_still_to_come():
    """Two budgets: scores, reconstruct, scores, guard, reconstruct. After the first reconstruct most work is left."""
    rounds = {"scores": 2, "reconstruct": 2}
    monitor = Monitor(expected={"candidates": 10.0, "scores": 20.0, "guard": 5.0, "reconstruct": 40.0}, rounds=rounds)
    monitor.stages["candidates"] = StageCost(10.0)
    left = []
    for name, seconds in (
        ("scores", 10.0),
        ("reconstruct", 20.0),
        ("scores", 10.0),
        ("guard", 5.0),
        ("reconstruct", 20.0),
    ):
        with monitor.stage(name, 1):
            left.append(monitor.seconds_left(name, seconds, 1.0))
        cost = monitor.stages[name]
        cost.seconds = seconds * monitor._runs[name]
    # after each run, what the others are expected to take: a second of the plan takes a second here
    assert left == pytest.approx([55.0, 35.0, 25.0, 20.0, 0.0])


def test_a_pipe_gets_a_line_for_each_stage_and_more_for_a_long_one(monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", (0.02, 0.02))
    console = Console(file=io.StringIO())
    monitor = Monitor(console)
    with monitor.stage("candidates", 4) as tick:
        tick()
        time.sleep(0.2)
        tick(4, 4)
    with monitor.stage("save", 1) as tick:
        tick()
    lines = console.file.getvalue().splitlines()
    assert lines[-1] == "save: 1/1, 0:00:00"
    assert lines[-2] == "candidates: 4/4, 0:00:00"
    assert lines[0] == "candidates: 1/4, 0:00:00, 0:00:00 left"
    assert 3 < len(lines) < 15


@pytest.mark.parametrize("width", [80, 120])
def test_a_bar_cuts_no_count_and_no_time(width):
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None)
    monitor = Monitor(console, expected={"calibration windows": 4000.0, "candidates": 40_000.0})
    with monitor.stage("calibration windows", 24) as tick:
        tick(500, 1536)
    with monitor.stage("calibration windows", 24) as tick:
        tick(1536, 1536)
    drawn = [line for line in re.split(r"[\r\n]|\x1b\[[0-9;?]*[a-zA-Z]", file.getvalue()) if "1536" in line]
    assert all("…" not in line and len(line) <= width for line in drawn)
    running = [line for line in drawn if "500/1536" in line]
    assert running
    times = r"\s+500/1536\s+0:00:00, 0:00:00 left, all 0:00:\d\d$"
    assert all(re.search(rf"^calibration windows [━╸╺ ]{{14,}}{times}", line) for line in running)
