"""Steps from a CUDA graph: what a CPU can show of it; the rest stands in tests/gpu."""

import pytest
import torch

from gemq.models.replay import Call
from gemq.runtime.cuda_graph import MANY, Replayed, same


def test_on_a_cpu_a_step_runs_as_it_is():
    told = []
    replayed = Replayed(lambda fixed, x: fixed * x, torch.device("cpu"), lambda: told.append(1))
    assert [replayed(2, torch.tensor(x)).item() for x in range(5)] == [0, 2, 4, 6, 8]
    assert not told


def test_calls_are_the_same_if_they_hold_the_same_tensors():
    mask, other = torch.ones(3), torch.ones(3)
    call = Call((mask,), {"position": (mask, None), "cache": False})
    assert same(call, Call((mask,), {"position": (mask, None), "cache": False}))
    assert not same(call, Call((other,), {"position": (mask, None), "cache": False}))
    assert not same(call, Call((mask,), {"position": (mask, 1), "cache": False}))
    assert not same(call, Call((mask,), {"position": (mask, None)}))
    assert not same(call, Call((), {"position": (mask, None), "cache": False}))


class Pretended(Replayed):
    """One on a GPU that is not there: what it does is noted."""

    def __init__(self, told, **more):
        super().__init__(lambda fixed, x: self.did("run", x), torch.device("cuda"), lambda: told.append(1), **more)
        self.done = []

    def did(self, what, x):
        self.done.append((what, len(x)))

    def _aside(self, tensors):
        self.did("aside", *tensors)

    def _captured(self):
        self.done.append(("capture", len(self._given[0])))
        self._graph = self
        return True

    def replay(self):
        self.done.append(("replay", len(self._given[0])))


def lengths(replayed, *sizes):
    for size in sizes:
        replayed(None, torch.zeros(size))
    return replayed.done


def test_steps_that_are_given_the_same_are_captured_and_others_run_as_they_are():
    told = []
    done = lengths(Pretended(told), 2, 2, 2, 3, 2)
    assert done == [("aside", 2), ("aside", 2), ("capture", 2), ("replay", 2), ("run", 3), ("replay", 2)]
    assert not told


def test_an_odd_one_in_front_costs_no_graph():
    done = lengths(Pretended([]), 3, 2, 2, 2)
    assert done == [("aside", 3), ("aside", 2), ("aside", 2), ("capture", 2), ("replay", 2)]


@pytest.mark.parametrize(("count", "times"), [(MANY, 0), (MANY + 1, 1)])
def test_many_steps_without_a_graph_are_told(count, times):
    told = []
    replayed = Pretended(told)
    lengths(replayed, *range(1, count + 1))
    replayed.close()
    assert len(told) == times


def test_what_is_known_to_be_nothing_for_a_graph_is_told_at_once():
    told = []
    replayed = Pretended(told, usable=False)
    assert lengths(replayed, 2, 2, 2, 2) == [("run", 2)] * 4
    replayed.close()
    assert len(told) == 1
