"""Every kernel compiles for every kind of GPU, without one: see ``compile_kernels``.

Here every value of every axis occurs (``--strength 1``). After a change to a kernel run the script itself, which takes
all pairs of values in ten minutes, or with ``--strength 3`` all triples.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

covering = pytest.importorskip("compile_kernels", reason="torch for CPUs comes without triton").covering
MOST_SHARED = {80: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a block has, by architecture; for sm_80 those of the consumer cards of sm_86."""


@pytest.mark.parametrize("kind", ["grouped", "decode", "training"])
def test_kernels_compile_and_fit_a_consumer_card(kind: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, str(script), "--strength", "1", "--jobs", "1", "--only", kind]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["arch"] for kernel in compiled} == {80, 89, 90}
    assert not [kernel for kernel in compiled if "error" in kernel]
    assert not [kernel for kernel in compiled if kernel["shared"] > MOST_SHARED[kernel["arch"]]]


def test_every_pair_of_values_is_covered() -> None:
    axes = {"a": [1, 2, 3], "b": "xyz", "c": [0, 1]}
    rows = list(covering(axes))
    for one, other in (("a", "b"), ("a", "c"), ("b", "c")):
        assert {(row[one], row[other]) for row in rows} == {(x, y) for x in axes[one] for y in axes[other]}
    assert len(rows) < 18
