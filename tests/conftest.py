"""Without a GPU, Triton kernels run in its interpreter, which has to be chosen before triton is imported.

Tests that share something that takes long to make go to one process, which makes it once (``--dist loadgroup``).
"""

import os

import pytest
import torch

os.fsync = lambda descriptor: None  # a job flushes 70 times, and no test is about a power cut

SHARED = ("finished", "kill_server", "progressive_job", "trellis_job")
"""Fixtures that take long."""

pytest.register_assert_rewrite("support")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_itemcollected(item: pytest.Item) -> None:  # a later hook would be too late for pytest-xdist
    for name in SHARED:
        if name in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.xdist_group(name))
            break
