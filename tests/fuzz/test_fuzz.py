"""A short run of the fuzzing harness. By hand, with more cases: ``python tests/fuzz/run.py --packed 2000``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")


@pytest.mark.skipif(sys.platform != "linux", reason="cases are forks with bounds on memory and time")
@pytest.mark.parametrize(("kind", "count"), [("packed", 8), ("source", 3), ("work", 5)])
def test_no_case_fails(kind, count):
    done = subprocess.run([sys.executable, RUN, f"--{kind}", str(count)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kind}: {count} cases" in done.stdout
