"""Where kernel tests run: on the GPU, or without one in Triton's interpreter (see ``tests/conftest.py``)."""

from __future__ import annotations

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

pytest.importorskip("triton", reason="torch for CPUs comes without it")
