"""Every kernel compiles for every GPU architecture, without a GPU. See ``compile_kernels``.

This test covers every value of every axis (``--strength 1``). After a change to a kernel, run the script itself: it
compiles all pairs of values in ten minutes, or all triples with ``--strength 3``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

covering = pytest.importorskip("compile_kernels", reason="torch for CPUs comes without triton").covering
MAX_SHARED = {80: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Shared memory of a block in bytes, by architecture; for sm_80 that of the consumer cards of sm_86."""


def test_kernels_compile_and_fit_a_consumer_card() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, str(script), "--strength", "1", "--jobs", "1"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    compiled = [json.loads(line) for line in process.stdout.splitlines()]
    assert {kernel["arch"] for kernel in compiled} == {80, 89, 90}
    assert not [kernel for kernel in compiled if "error" in kernel]
    assert not [kernel for kernel in compiled if kernel["shared"] > MAX_SHARED[kernel["arch"]]]


def test_every_pair_of_values_is_covered() -> None:
    axes = {"a": [1, 2, 3], "b": "xyz", "c": [0, 1]}
    rows = list(covering(axes))
    for axis, other_axis in (("a", "b"), ("a", "c"), ("b", "c")):
        covered = {(row[axis], row[other_axis]) for row in rows}
        assert covered == {(x, y) for x in axes[axis] for y in axes[other_axis]}
    assert len(rows) < 18
