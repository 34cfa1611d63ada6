"""Runs the models that an evaluation compares over the same windows, within the job's bounds of memory.

A full-precision model runs layer by layer over all windows: two of its layers and what lies outside them are held at a
time, and the last layer's outputs wait where there is room, from which its logits are computed when they are compared.
A packed model is held whole, since it is small. The same holds for a model that cannot be cut into layers.

Shapes: B windows in a batch, S tokens in a window, H hidden size, V vocabulary, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gemq.checkpoint.contents import Contents, inspect_checkpoint
from gemq.checkpoint.format import is_packed
from gemq.checkpoint.load import load
from gemq.errors import UserError
from gemq.models.config_values import embedding_rows
from gemq.models.experts import ExpertsCall, watch_experts
from gemq.models.layer_cache import Residency
from gemq.models.replay import LOGITS_TOGETHER, Call, Replay
from gemq.models.source import DTYPES, Source
from gemq.models.structure import Structure, find_structure
from gemq.planning.memory_model import check_staging, forward_bytes, staging_bytes, tensor_bytes
from gemq.runtime.activation_store import Batches
from gemq.runtime.memory import Memory, gigabytes
from gemq.runtime.progress import Monitor

UNUSED = -1
"""Stands for a slot that chose no expert."""


class Predictions(Protocol):
    """What a model predicts for batches of windows that it was given before."""

    def batch(self, number: int) -> tuple[Tensor, list[Tensor]]:
        """Logits [B, S, V] and, per layer with experts, the chosen experts int [B, S, K] or ``UNUSED``."""
        ...


class WholeModel:
    """Predictions of a model that is held whole.

    batches: token ids [B, S] int64
    experts: paths of the experts modules whose choices are reported
    """

    def __init__(self, model: nn.Module, batches: Sequence[Tensor], experts: Sequence[str]) -> None:
        self._model, self._batches, self._experts = model, batches, experts
        self._device = next(model.parameters()).device

    @torch.no_grad()
    def batch(self, number: int) -> tuple[Tensor, list[Tensor]]:
        ids = self._batches[number].to(self._device)
        with ExitStack() as stack:
            calls = [stack.enter_context(watch_experts(self._model.get_submodule(p))) for p in self._experts]
            logits = self._model(input_ids=ids, use_cache=False).logits
        return logits, [chosen_experts(call, ids) for (call, *_) in calls]


class StreamedModel:
    """Predictions of a model whose layers are read one after the other: ``run`` first, once.

    batches: token ids [B, S] int64
    experts: whether the choices of experts are reported
    """

    def __init__(self, replay: Replay, batches: Sequence[Tensor], experts: bool) -> None:
        self._replay, self._batches = replay, batches
        self._watched = {i: x.experts.path for i, x in replay.structure.moe_layers if x.experts and experts}
        self._hidden = Batches(replay.memory)
        self._chosen = [Batches(replay.memory) for _ in self._watched]

    @torch.no_grad()
    def run(self, monitor: Monitor, title: str) -> None:
        """Runs all layers over all batches, then lets go of the layers."""
        replay, calls = self._replay, list[list[Call]]()
        for ids in self._batches:
            hidden, of_layers = replay.inputs(ids)
            self._hidden.append(hidden)
            calls.append(of_layers)
        chosen = iter(self._chosen)
        with monitor.stage(title, len(replay.layers)) as tick:
            for index in replay.walk(range(len(replay.layers))):
                choices = next(chosen) if index in self._watched else None
                for number, ids in enumerate(self._batches):
                    self._advance(index, number, calls[number][index], ids, choices)
                replay.restore(index)  # it is not needed again
                tick()
        if replay.residency is not None:
            replay.residency.release_layers()

    def _advance(self, index: int, number: int, call: Call, ids: Tensor, choices: Batches | None) -> None:
        """Takes one batch through layer ``index``, appending the experts that it chooses to ``choices``."""
        hidden = self._hidden[number]
        if choices is None:
            self._hidden[number] = self._replay.run(index, hidden, call)
            return
        with watch_experts(self._replay.model.get_submodule(self._watched[index])) as calls:
            self._hidden[number] = self._replay.run(index, hidden, call)
        choices.append(chosen_experts(calls[0], ids).to(torch.int16))

    @torch.no_grad()
    def batch(self, number: int) -> tuple[Tensor, list[Tensor]]:
        logits = self._replay.logits(self._batches[number], self._hidden[number])
        return logits, [chosen[number] for chosen in self._chosen]


def chosen_experts(call: ExpertsCall, ids: Tensor) -> Tensor:
    """The experts [B, S, K] that a call with token ids [B, S] chose; ``UNUSED`` where a slot chose none.

    A family that gives its experts a row of every token for each of them has one slot for each expert.
    """
    index = call.top_k_index
    rows = len(call.hidden) // ids.numel()
    if rows > 1:
        index = index.reshape(rows, ids.numel()).T
        index = torch.where(index < rows, index, UNUSED)
    return index.reshape(*ids.shape, -1)


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk of which nothing but small files and headers has been read.

    name:   as the user gave it
    config: of Transformers
    dtype:  of parameters while it runs
    """

    name: str
    source: Source
    config: Any
    dtype: torch.dtype
    contents: Contents | None
    """What the checkpoint holds, if it is a packed one."""
    skeleton: PreTrainedModel | None
    """The model without contents, if it is not packed."""
    structure: Structure | None
    """Where the decoder layers and experts are; None where that is not understood, and for a packed model."""

    @classmethod
    def open(cls, name: str, dtype: str, trust_remote_code: bool = False) -> ModelFiles:
        """dtype: ``float32``, ``bfloat16``, or ``auto`` for the one that the configuration names."""
        if dtype not in ("auto", *DTYPES):
            raise UserError(f"--dtype cannot be {dtype!r}: choose from auto, {', '.join(DTYPES)}")
        source = Source.resolve(name, trust_remote_code=trust_remote_code)
        if is_packed(source.path):
            contents = inspect_checkpoint(source.path)
            config = source.stored_config()
            return cls(name, source, config, _dtype(dtype, config), contents, None, None)
        skeleton = source.skeleton()
        source.check_weights()
        try:
            structure = find_structure(skeleton)
        except UserError:  # a dense model, or a family that gemq cannot quantize: held whole
            structure = None
        return cls(name, source, skeleton.config, _dtype(dtype, skeleton.config), None, skeleton, structure)

    @property
    def vocabulary(self) -> int:
        return int(self.config.get_text_config().vocab_size)

    @property
    def embeddings(self) -> int | None:
        """Tokens that the model has embeddings for, where that is known."""
        return self.vocabulary if self.skeleton is None else embedding_rows(self.skeleton)

    @cached_property
    def experts(self) -> list[str]:
        """Paths of the experts modules of the decoder layers."""
        if self.contents is not None:
            return [path for path, _, _ in self.contents.layers]
        layers = self.structure.moe_layers if self.structure else ()
        return [layer.experts.path for _, layer in layers if layer.experts]

    @cached_property
    def _bytes(self) -> tuple[int, int]:
        """Bytes on the device while the model runs, and afterwards, when logits are computed."""
        if self.contents is not None:
            whole = self.contents.loaded_bytes(self.dtype.itemsize)
            return whole, whole
        assert self.skeleton is not None
        outside, layers = tensor_bytes(self.skeleton, self.structure, self.dtype)
        return outside + sum(sorted(layers)[-2:]), outside

    @property
    def running_bytes(self) -> int:
        return self._bytes[0]

    @property
    def bytes_for_logits(self) -> int:
        return self._bytes[1]

    def working_bytes(self, tokens: int, window: int, device: torch.device) -> int:
        """Bytes on the device for a forward pass of ``tokens`` tokens."""
        return forward_bytes(self.config, self.structure, self.dtype, device, tokens, window)

    def check_staging(self, memory: Memory) -> None:
        """Raises UserError where host memory does not hold a layer on its way to a GPU."""
        if self.skeleton is not None and self.structure is not None:
            check_staging(memory, self.skeleton, self.structure)

    def start(
        self, memory: Memory, batches: Sequence[Tensor], monitor: Monitor, title: str, compared: bool
    ) -> tuple[Predictions, int]:
        """Loads and runs the model, as far as logits need it; returns what it predicts and the bytes that it stores.

        ``memory`` must have room for ``running_bytes``; those for logits stay taken.
        """
        if self.structure is not None:
            return self._start_streamed(memory, batches, monitor, title, compared)
        room = memory.room(self.running_bytes)
        assert room, "bounds are checked before"
        with monitor.stage("load", 1) as tick:
            if self.contents is not None:
                trust = self.source.trust_remote_code
                model = load(self.source.path, str(memory.device), self.dtype, trust_remote_code=trust)
                stored = self.contents.stored_bytes
            else:
                model, types = self.source.load(memory.device, self.dtype)
                stored = _stored_bytes(model, types)
            tick()
        return WholeModel(model, batches, self.experts if compared else ()), stored

    def _start_streamed(
        self, memory: Memory, batches: Sequence[Tensor], monitor: Monitor, title: str, compared: bool
    ) -> tuple[Predictions, int]:
        assert self.structure is not None
        with monitor.stage("load", 1) as tick:
            model, reader = self.source.open(memory.device, self.dtype)
            residency = Residency(model, self.structure, reader, memory, self.dtype)
            staging = staging_bytes(model, self.structure) if memory.device.type == "cuda" else 0
            memory.host.take(staging)
            replay = Replay(model, self.structure, residency)
            replay.verify(torch.arange(16, device=memory.device).unsqueeze(0) % self.vocabulary)
            tick()
        streamed = StreamedModel(replay, batches, compared)
        streamed.run(monitor, title)
        residency.close()
        memory.host.give(staging)
        return streamed, _stored_bytes(model, reader.types)


def _dtype(name: str, config: Any) -> torch.dtype:
    return DTYPES.get(name) or getattr(config.get_text_config(), "dtype", None) or torch.float32


def _stored_bytes(model: PreTrainedModel, types: dict[str, torch.dtype]) -> int:
    return sum(parameter.numel() * types[name].itemsize for name, parameter in model.named_parameters())


def batch_tokens(models: Sequence[ModelFiles], most: int) -> int:
    """Tokens of windows that run together: ``most``, or as many as have no more logits than a loss takes together."""
    return min(most, LOGITS_TOGETHER // max(model.vocabulary for model in models))


def start_all(
    models: Sequence[ModelFiles], memory: Memory, batches: Sequence[Tensor], monitor: Monitor
) -> tuple[list[Predictions], int]:
    """What one or two models predict for ``batches``, and the bytes that the last one stores.

    The first of two models lets go of its layers before the second is loaded. Raises UserError, naming what would do,
    when the memory's bound cannot hold them.
    """
    tokens, window = max(ids.numel() for ids in batches), batches[0].shape[1]
    working = max(model.working_bytes(tokens, window, memory.device) for model in models)
    first, last = models[0], models[-1]
    afterwards = first.bytes_for_logits + last.running_bytes if len(models) > 1 else 0
    least = working + max(first.running_bytes, afterwards)
    if least > memory.on_device.limit:
        what = " and ".join(model.name for model in models)
        raise UserError(
            f"{memory.flag} {gigabytes(memory.on_device.limit)} is too little to evaluate {what}: "
            f"give at least {memory.flag} {gigabytes(least)}"
        )
    for model in models:
        model.check_staging(memory)
    # what the last model needs beyond the layers that the first one lets go of; nothing else may settle there
    reserved = max(0, afterwards - first.running_bytes)
    room = memory.room(working + reserved)
    assert room, "the least was compared"
    predictions: list[Predictions] = []
    for model in models:
        if predictions:
            memory.on_device.give(reserved)
        title = "evaluate" if model is last else "reference"
        found, stored = model.start(memory, batches, monitor, title, compared=len(models) > 1)
        predictions.append(found)
    return predictions, stored
