"""Steps from a CUDA graph, as far as a CPU can show it. tests/gpu has the others."""

import pytest
import torch

from gemq.models.replay import Call
from gemq.runtime.cuda_graph import EXPECTED_STEPS, CudaGraphReplay, is_identical


def test_a_step_runs_eagerly_on_a_cpu():
    fallbacks = []
    step = CudaGraphReplay(lambda constant, x: constant * x, torch.device("cpu"), lambda: fallbacks.append(1))
    assert [step(2, torch.tensor(x)).item() for x in range(5)] == [0, 2, 4, 6, 8]
    assert not fallbacks


def test_calls_are_identical_if_they_hold_the_same_tensors():
    mask, equal_mask = torch.ones(3), torch.ones(3)
    call = Call((mask,), {"position": (mask, None), "cache": False})
    assert is_identical(call, Call((mask,), {"position": (mask, None), "cache": False}))
    assert not is_identical(call, Call((equal_mask,), {"position": (mask, None), "cache": False}))
    assert not is_identical(call, Call((mask,), {"position": (mask, 1), "cache": False}))
    assert not is_identical(call, Call((mask,), {"position": (mask, None)}))
    assert not is_identical(call, Call((), {"position": (mask, None), "cache": False}))


class FakeGpuStep(CudaGraphReplay):
    """A step on a GPU that is not there. ``events`` lists what it did, with the length of its input."""

    def __init__(self, fallbacks, **options):
        def run(constant, x):
            self.events.append(("run", len(x)))

        super().__init__(run, torch.device("cuda"), lambda: fallbacks.append(1), **options)
        self.events = []

    def _warm_up(self, tensors):
        self.events.append(("warm up", len(tensors[0])))

    def _try_capture(self):
        self.events.append(("capture", len(self._inputs[0])))
        self._graph = self
        return True

    def replay(self):
        self.events.append(("replay", len(self._inputs[0])))


def events_of(step, *lengths):
    for length in lengths:
        step(None, torch.zeros(length))
    return step.events


def test_matching_steps_are_captured_and_others_run_eagerly():
    fallbacks = []
    events = events_of(FakeGpuStep(fallbacks), 2, 2, 2, 3, 2)
    assert events == [("warm up", 2), ("warm up", 2), ("capture", 2), ("replay", 2), ("run", 3), ("replay", 2)]
    assert not fallbacks


def test_a_different_first_step_does_not_prevent_a_graph():
    events = events_of(FakeGpuStep([]), 3, 2, 2, 2)
    assert events == [("warm up", 3), ("warm up", 2), ("warm up", 2), ("capture", 2), ("replay", 2)]


@pytest.mark.parametrize(("count", "times"), [(EXPECTED_STEPS, 0), (EXPECTED_STEPS + 1, 1)])
def test_many_steps_without_a_graph_are_reported(count, times):
    fallbacks = []
    step = FakeGpuStep(fallbacks)
    events_of(step, *range(1, count + 1))
    step.close()
    assert len(fallbacks) == times


def test_a_step_that_cannot_be_captured_is_reported_immediately():
    fallbacks = []
    step = FakeGpuStep(fallbacks, usable=False)
    assert events_of(step, 2, 2, 2, 2) == [("run", 2)] * 4
    step.close()
    assert len(fallbacks) == 1
