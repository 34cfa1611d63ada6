"""Settings of distillation."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gemq.layers.training import Training


@dataclass(frozen=True)
class Distillation:
    """What is trained, towards what, and how.

    Attributes:
        training: Settings of training.
        loss: ``kl`` for the KL divergence from the full-precision model, or ``next_token``.
        parameters: Any of ``routers``, ``norms`` and ``grids`` (scales and offsets of the experts).
        stored_dtypes: Dtype in which each parameter of the model is stored, for which routers and norms are trained.
    """

    training: Training
    loss: str
    parameters: tuple[str, ...]
    stored_dtypes: dict[str, torch.dtype]
