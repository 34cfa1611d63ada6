"""Steps from a CUDA graph: what a CPU can show of it; the rest stands in tests/gpu."""

import torch

from gemq.models.stream import Call
from gemq.resources.replayed import Replayed, same


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
