"""What a process knows of the other processes of its job, which torchrun started. Must not import torch."""

from __future__ import annotations

import os
import threading

ranks_started = threading.Event()
"""Set when this process joins the others. A signal that ends it before that needs no message."""


class RankLostError(Exception):
    """Another process of the job can no longer be reached. The message is the backend's."""


def is_first() -> bool:
    """Whether this process prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def has_other_ranks() -> bool:
    """Whether torchrun started this process with others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
