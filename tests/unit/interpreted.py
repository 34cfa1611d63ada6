"""Where kernel tests run: on the GPU, or without one in Triton's interpreter.

To be imported before anything that imports triton, which asks once. Tests of one process share the answer.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:
        raise RuntimeError("triton was imported before it could be told to interpret: set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"

pytest.importorskip("triton", reason="torch for CPUs comes without it")
