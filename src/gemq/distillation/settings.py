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
        stored: Dtype in which each parameter of the model is stored. Routers and norms are trained for this dtype.
    """

    training: Training
    loss: str
    parameters: tuple[str, ...]
    stored: dict[str, torch.dtype]
