"""Predictions of a model for the windows of an evaluation.

A full-precision model runs layer by layer over all windows. Two of its layers, and the modules outside the layers, are
in memory at a time. The outputs of the last layer are stored, and logits are computed from them when they are compared.
A model that is entirely in memory runs when its predictions are compared.

Shapes: B windows in a batch, S tokens in a window, H hidden size, V vocabulary, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from gemq.models.experts import ExpertsCall, record_experts_calls
from gemq.models.library_errors import one_line_errors
from gemq.models.replay import Call, Replay
from gemq.runtime.activation_store import ActivationStore
from gemq.runtime.progress import Monitor

UNUSED_SLOT = -1
"""Expert index of a routing slot that chose no expert."""


class Predictions(Protocol):
    """Predictions of one model for a fixed list of batches."""

    def predict(self, index: int) -> tuple[Tensor, list[Tensor]]:
        """Returns the predictions for one batch.

        Returns:
            Logits [B, S, V], and the chosen experts, int [B, S, K], of each layer with experts. Slots that chose no
            expert are ``UNUSED_SLOT``.
        """
        ...


class WholeModel:
    """Predictions of a model that is entirely in memory. ``predict`` runs it.

    Args:
        batches: token ids, int64 [B, S]
        expert_paths: paths of the experts modules whose choices are reported
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor], expert_paths: Sequence[str]) -> None:
        self._model = model
        self._batches = batches
        self._expert_paths = expert_paths
        self._device = next(model.parameters()).device

    def _errors(self) -> AbstractContextManager[None]:
        """One-line errors for a full-precision model, whose code is Transformers' own or its author's."""
        if getattr(self._model, "hf_quantizer", None) is not None:
            return nullcontext()
        name = getattr(self._model, "name_or_path", "") or type(self._model).__name__
        return one_line_errors(f"{name} cannot be run", "correct its config.json, or copy the model again")

    @torch.no_grad()
    def predict(self, index: int) -> tuple[Tensor, list[Tensor]]:
        """Runs the model on one batch. See ``Predictions.predict``."""
        ids = self._batches[index].to(self._device)
        with ExitStack() as stack:
            calls = [
                stack.enter_context(record_experts_calls(self._model.get_submodule(path)))
                for path in self._expert_paths
            ]
            stack.enter_context(self._errors())
            logits = self._model(input_ids=ids, use_cache=False).logits
        return logits, [chosen_experts(layer_calls[0], ids) for layer_calls in calls]


class StreamedModel:
    """Predictions of a model whose layers are read one after the other. Call ``run`` once, before ``predict``.

    Args:
        replay: the model, split into its layers
        batches: token ids, int64 [B, S]
        reports_experts: whether the chosen experts are reported
    """

    def __init__(self, replay: Replay, batches: Sequence[Tensor], reports_experts: bool) -> None:
        self._replay = replay
        self._batches = batches
        self._expert_paths: dict[int, str] = {}  # by layer
        if reports_experts:
            for index, layer in replay.structure.moe_layers:
                self._expert_paths[index] = layer.experts.path
        self._hidden = ActivationStore(replay.memory)
        self._chosen = {index: ActivationStore(replay.memory) for index in self._expert_paths}

    @torch.no_grad()
    def run(self, monitor: Monitor, title: str) -> None:
        """Runs all layers over all batches, then frees them. ``title`` names the stage in the progress display."""
        replay = self._replay
        calls: list[list[Call]] = []
        for ids in self._batches:
            hidden, layer_calls = replay.inputs(ids)
            self._hidden.append(hidden)
            calls.append(layer_calls)
        with monitor.stage(title, len(replay.layers)) as tick:
            for layer in replay.walk(range(len(replay.layers))):
                for batch in range(len(self._batches)):
                    self._run_layer(layer, batch, calls[batch][layer])
                replay.restore(layer)
                tick()
        if replay.layer_cache is not None:
            replay.layer_cache.release_layers()

    def _run_layer(self, layer: int, batch: int, call: Call) -> None:
        """Runs one layer on one batch, and records its chosen experts if they are reported."""
        hidden = self._hidden[batch]
        if layer not in self._expert_paths:
            self._hidden[batch] = self._replay.run(layer, hidden, call)
            return
        experts = self._replay.model.get_submodule(self._expert_paths[layer])
        with record_experts_calls(experts) as calls:
            self._hidden[batch] = self._replay.run(layer, hidden, call)
        chosen = chosen_experts(calls[0], self._batches[batch])
        self._chosen[layer].append(chosen.to(torch.int16))

    @torch.no_grad()
    def predict(self, index: int) -> tuple[Tensor, list[Tensor]]:
        """Computes the logits of one batch from the stored hidden states. See ``Predictions.predict``."""
        logits = self._replay.logits(self._batches[index], self._hidden[index])
        return logits, [chosen[index] for chosen in self._chosen.values()]


def chosen_experts(call: ExpertsCall, ids: Tensor) -> Tensor:
    """Returns the experts that a call chose, [B, S, K]. Slots that chose no expert are ``UNUSED_SLOT``.

    Some families pass a row of every token for each expert. Their calls have one slot for each expert.

    Args:
        call: a call of an experts module
        ids: the token ids [B, S] that the model ran on
    """
    experts = call.top_k_index
    rows_per_token = len(call.hidden) // ids.numel()
    if rows_per_token > 1:
        experts = experts.reshape(rows_per_token, ids.numel()).T
        experts = torch.where(experts < rows_per_token, experts, UNUSED_SLOT)
    return experts.reshape(*ids.shape, -1)
