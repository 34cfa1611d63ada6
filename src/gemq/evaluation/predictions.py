"""Runs the models of an evaluation over the same windows, within the job's memory limits.

A full-precision model runs layer by layer over all windows. Two of its layers, and the modules outside the layers, are
in memory at a time. The outputs of the last layer are stored, and logits are computed from them when they are compared.
A packed model is small, so it is loaded whole. So is a model that cannot be split into layers.

Shapes: B windows in a batch, S tokens in a window, H hidden size, V vocabulary, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from gemq.models.experts import ExpertsCall, record_experts_calls
from gemq.models.layer_cache import LayerCache
from gemq.models.replay import MAX_LOGITS_PER_CHUNK, Call, Replay
from gemq.models.source import DTYPES, Source
from gemq.models.structure import Structure, find_structure
from gemq.planning.memory_model import check_staging, forward_bytes, staging_bytes, tensor_bytes
from gemq.runtime.activation_store import ActivationStore
from gemq.runtime.memory import MemoryBudget, gigabytes
from gemq.runtime.progress import Monitor

UNUSED_SLOT = -1
"""Expert index of a routing slot that chose no expert."""

VERIFIED_TOKENS = 16
"""Length of the window on which a replay is compared with the model's own forward."""


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

    @torch.no_grad()
    def predict(self, index: int) -> tuple[Tensor, list[Tensor]]:
        """Runs the model on one batch. See ``Predictions.predict``."""
        ids = self._batches[index].to(self._device)
        with ExitStack() as stack:
            calls = [
                stack.enter_context(record_experts_calls(self._model.get_submodule(path)))
                for path in self._expert_paths
            ]
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


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk of which only small files and tensor headers have been read.

    Attributes:
        name: as the user wrote it
        source: its files
        config: of Transformers
        dtype: of the parameters during the evaluation
        contents: of the packed checkpoint, or None for a model that is not packed
        skeleton: the model on the meta device, or None for a packed checkpoint
        structure: of the layers and experts; None for a packed checkpoint and for a model that gemq does not understand
    """

    name: str
    source: Source
    config: Any
    dtype: torch.dtype
    contents: Contents | None
    skeleton: PreTrainedModel | None
    structure: Structure | None

    @classmethod
    def open(cls, name: str, dtype: str, trust_remote_code: bool = False) -> ModelFiles:
        """Reads the small files of a model.

        Args:
            name: directory or name on the Hugging Face Hub
            dtype: ``float32``, ``bfloat16``, or ``auto`` for the one in the configuration

        Raises:
            UserError: the model cannot be loaded.
        """
        check_dtype(dtype)
        source = Source.resolve(name, trust_remote_code=trust_remote_code)
        if is_packed(source.path):
            contents = inspect_checkpoint(source.path)
            config = source.stored_config()
            return cls(name, source, config, _compute_dtype(dtype, config), contents, None, None)
        skeleton = source.skeleton()
        source.check_weights()
        structure: Structure | None
        try:
            structure = find_structure(skeleton)
        except UserError:  # a dense model, or a family that gemq cannot quantize
            structure = None
        return cls(name, source, skeleton.config, _compute_dtype(dtype, skeleton.config), None, skeleton, structure)

    @property
    def vocabulary(self) -> int:
        """Number of logits per token."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def embeddings(self) -> int | None:
        """Number of tokens that the model has embeddings for, or None if it is not known."""
        return self.vocabulary if self.skeleton is None else embedding_rows(self.skeleton)

    @cached_property
    def expert_paths(self) -> list[str]:
        """Paths of the experts modules of the decoder layers."""
        if self.contents is not None:
            return [path for path, _, _ in self.contents.layers]
        layers = self.structure.moe_layers if self.structure else ()
        return [layer.experts.path for _, layer in layers]

    @cached_property
    def _bytes(self) -> tuple[int, int]:
        """``running_bytes`` and ``bytes_for_logits``."""
        if self.contents is not None:
            model_bytes = self.contents.loaded_bytes(self.dtype.itemsize)
            return model_bytes, model_bytes
        assert self.skeleton is not None
        outside_bytes, layer_bytes = tensor_bytes(self.skeleton, self.structure, self.dtype)
        two_largest_layers = sum(sorted(layer_bytes)[-2:])
        return outside_bytes + two_largest_layers, outside_bytes

    @property
    def running_bytes(self) -> int:
        """Bytes of parameters on the device while the model runs."""
        return self._bytes[0]

    @property
    def bytes_for_logits(self) -> int:
        """Bytes of parameters that stay on the device until all logits are computed."""
        return self._bytes[1]

    def working_bytes(self, tokens: int, seq_len: int, device: torch.device) -> int:
        """Returns the bytes of activations on the device during a forward pass.

        Args:
            tokens: in the batch
            seq_len: tokens per window
            device: that the model runs on
        """
        return forward_bytes(self.config, self.structure, self.dtype, device, tokens, seq_len)

    def check_staging(self, memory: MemoryBudget) -> None:
        """Raises UserError if the host memory limit is too small for a layer on its way to a GPU."""
        if self.skeleton is not None and self.structure is not None:
            check_staging(memory, self.skeleton, self.structure)

    def start(
        self, memory: MemoryBudget, batches: Sequence[Tensor], monitor: Monitor, title: str, reports_experts: bool
    ) -> tuple[Predictions, int]:
        """Loads the model and runs it as far as its logits require.

        Args:
            memory: with ``running_bytes`` available on the device; ``bytes_for_logits`` stay reserved
            batches: token ids, int64 [B, S]
            reports_experts: whether the predictions report the chosen experts

        Returns:
            The predictions, and the size of the model's tensors in its files.
        """
        if self.structure is not None:
            return self._start_streamed(self.structure, memory, batches, monitor, title, reports_experts)
        is_reserved = memory.try_reserve(self.running_bytes)
        assert is_reserved, "predict_all compares the sum of these bytes with the limit"
        with monitor.stage("load", 1) as tick:
            if self.contents is not None:
                trust = self.source.trust_remote_code
                model = load(self.source.path, str(memory.device), self.dtype, trust_remote_code=trust)
                file_bytes = self.contents.stored_bytes
            else:
                model, stored_dtypes = self.source.load(memory.device, self.dtype)
                file_bytes = stored_bytes(model, stored_dtypes)
            tick()
        return WholeModel(model, batches, self.expert_paths if reports_experts else ()), file_bytes

    def _start_streamed(
        self,
        structure: Structure,
        memory: MemoryBudget,
        batches: Sequence[Tensor],
        monitor: Monitor,
        title: str,
        reports_experts: bool,
    ) -> tuple[Predictions, int]:
        """``start`` for a model that is split into layers."""
        with monitor.stage("load", 1) as tick:
            model, reader = self.source.open(memory.device, self.dtype)
            layer_cache = LayerCache(model, structure, reader, memory, self.dtype)
            staging = staging_bytes(model, structure) if memory.device.type == "cuda" else 0
            memory.host.reserve(staging)
            replay = Replay(model, structure, layer_cache)
            ids = torch.arange(VERIFIED_TOKENS, device=memory.device).unsqueeze(0) % self.vocabulary
            replay.verify(ids)
            tick()
        streamed = StreamedModel(replay, batches, reports_experts)
        streamed.run(monitor, title)
        layer_cache.close()
        memory.host.free(staging)
        return streamed, stored_bytes(model, reader.types)


def check_dtype(name: str) -> None:
    """Raises UserError unless ``name`` is a value of ``--dtype``."""
    if name not in ("auto", *DTYPES):
        raise UserError(f"--dtype cannot be {name!r}: choose from auto, {', '.join(DTYPES)}")


def _compute_dtype(name: str, config: Any) -> torch.dtype:
    """Returns the dtype of that name; for ``auto`` the one in the configuration."""
    return DTYPES.get(name) or getattr(config.get_text_config(), "dtype", None) or torch.float32


def stored_bytes(model: PreTrainedModel, stored_dtypes: Mapping[str, torch.dtype]) -> int:
    """Returns the size of a model's parameters in its files.

    Args:
        model: the loaded model
        stored_dtypes: dtype of each parameter in the files
    """
    return sum(parameter.numel() * stored_dtypes[name].itemsize for name, parameter in model.named_parameters())


def max_tokens_per_batch(models: Sequence[ModelFiles], limit: int) -> int:
    """Returns the tokens per batch: ``limit``, or fewer for vocabularies whose logits would take too much memory."""
    largest_vocabulary = max(model.vocabulary for model in models)
    return min(limit, MAX_LOGITS_PER_CHUNK // largest_vocabulary)


def predict_all(
    models: Sequence[ModelFiles], memory: MemoryBudget, batches: Sequence[Tensor], monitor: Monitor
) -> tuple[list[Predictions], int]:
    """Loads and runs one or two models on the same batches.

    The layers of the reference are freed before the other model is loaded.

    Args:
        models: the reference, if any, and the model to evaluate
        memory: limits of the job
        batches: token ids, int64 [B, S]

    Returns:
        The predictions of each model, and the size of the evaluated model's tensors in its files.

    Raises:
        UserError: the memory limit is too small. The message names a sufficient one.
    """
    num_tokens = max(ids.numel() for ids in batches)
    seq_len = batches[0].shape[1]
    working_bytes = max(model.working_bytes(num_tokens, seq_len, memory.device) for model in models)
    initial, subject = models[0], models[-1]
    bytes_with_subject = initial.bytes_for_logits + subject.running_bytes if len(models) > 1 else 0
    required_bytes = working_bytes + max(initial.running_bytes, bytes_with_subject)
    if required_bytes > memory.on_device.limit:
        names = " and ".join(model.name for model in models)
        raise UserError(
            f"{memory.flag} {gigabytes(memory.on_device.limit)} is too little to evaluate {names}: "
            f"give at least {memory.flag} {gigabytes(required_bytes)}"
        )
    for model in models:
        model.check_staging(memory)

    # The evaluated model needs these bytes beyond the layers that the reference frees. Reserved, so that no activations
    # are stored there.
    reserved_bytes = max(0, bytes_with_subject - initial.running_bytes)
    is_reserved = memory.try_reserve(working_bytes + reserved_bytes)
    assert is_reserved, "the sum was compared with the limit"
    predictions: list[Predictions] = []
    file_bytes = 0
    for model in models:
        if predictions:
            memory.on_device.free(reserved_bytes)
        title = "evaluate" if model is subject else "reference"
        model_predictions, file_bytes = model.start(memory, batches, monitor, title, reports_experts=len(models) > 1)
        predictions.append(model_predictions)
    return predictions, file_bytes
