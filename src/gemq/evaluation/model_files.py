"""The models of an evaluation on disk, and how they are loaded within the job's memory limits.

A full-precision model runs layer by layer. A packed model is small, so it is loaded whole. So is a model that cannot be
split into layers.

Shapes: B windows in a batch, S tokens in a window.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gemq.checkpoint.contents import Contents, inspect_checkpoint
from gemq.checkpoint.format import is_packed
from gemq.checkpoint.load import load
from gemq.errors import UserError
from gemq.evaluation.predictions import Predictions, StreamedModel, WholeModel
from gemq.models.byte_sizes import parameter_bytes
from gemq.models.config_values import embedding_rows
from gemq.models.experts import use_fast_experts
from gemq.models.layer_cache import LayerCache, reserved_layer_bytes
from gemq.models.replay import MAX_LOGITS_PER_CHUNK, Replay
from gemq.models.source import DTYPES, Source
from gemq.models.structure import Structure, find_structure
from gemq.planning.memory_model import check_staging, forward_bytes, staging_bytes, tensor_bytes
from gemq.runtime.memory import MemoryBudget, gigabytes
from gemq.runtime.progress import Monitor

VERIFIED_TOKENS = 16
"""Length of the window on which a replay is compared with the model's own forward."""


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
    def _bytes(self) -> tuple[int, list[int]]:
        """Bytes of parameters outside the layers, and of each layer. A model that is loaded whole has no layers."""
        if self.contents is not None:
            return self.contents.loaded_bytes(self.dtype.itemsize), []
        assert self.skeleton is not None
        return tensor_bytes(self.skeleton, self.structure, self.dtype)

    @property
    def running_bytes(self) -> int:
        """Bytes of parameters on the device while the model runs."""
        outside_bytes, layer_bytes = self._bytes
        return outside_bytes + reserved_layer_bytes(layer_bytes)

    @property
    def bytes_for_logits(self) -> int:
        """Bytes of parameters that stay on the device until all logits are computed."""
        return self._bytes[0]

    @property
    def complete_bytes(self) -> int:
        """Bytes that ``complete_model`` reserves on the device."""
        _, layer_bytes = self._bytes
        return self.running_bytes + sum(layer_bytes[:-1])  # ``LayerCache`` caches all layers but the last one

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
            memory: with ``running_bytes`` available on the device, of which ``bytes_for_logits`` stay reserved
            batches: token ids, int64 [B, S]
            reports_experts: whether the predictions report the chosen experts

        Returns:
            The predictions, and the size of the model's tensors in its files.
        """
        if self.structure is None:
            model, file_bytes = self._load_whole(memory, monitor)
            return WholeModel(model, batches, self.expert_paths if reports_experts else ()), file_bytes
        layers = self._open_layers(self.structure, memory, monitor)
        streamed = StreamedModel(layers.replay, batches, reports_experts)
        streamed.run(monitor, title)
        layers.close(memory)
        return streamed, layers.stored_bytes

    @contextmanager
    def complete_model(self, memory: MemoryBudget, monitor: Monitor) -> Iterator[Any]:
        """Loads the model with all of its layers, for its own forward. Frees it on exit.

        Args:
            memory: with ``complete_bytes`` available on the device
        """
        if self.structure is None:
            model, _ = self._load_whole(memory, monitor)
            if self.contents is None:
                use_fast_experts(model)
            yield model
            memory.on_device.free(self.complete_bytes)
            return
        layers = self._open_layers(self.structure, memory, monitor)
        with layers.replay.full_model() as model:
            yield model
        layers.cache.release_layers()
        layers.close(memory)
        memory.caches.remove(layers.cache)
        memory.on_device.free(layers.cache.outside_bytes)

    def _load_whole(self, memory: MemoryBudget, monitor: Monitor) -> tuple[PreTrainedModel, int]:
        """Loads a model that is not split into layers. Returns it with the size of its tensors in its files."""
        is_reserved = memory.try_reserve(self.complete_bytes)
        assert is_reserved, "callers compare these bytes with the limit"
        with monitor.stage("load", 1) as tick:
            if self.contents is not None:
                trust = self.source.trust_remote_code
                model = load(self.source.path, str(memory.device), self.dtype, trust_remote_code=trust)
                file_bytes = self.contents.stored_bytes
            else:
                model, stored_dtypes = self.source.load(memory.device, self.dtype)
                file_bytes = parameter_bytes(model, stored_dtypes)
            tick()
        return model, file_bytes

    def _open_layers(self, structure: Structure, memory: MemoryBudget, monitor: Monitor) -> _Layers:
        """Opens a model that is split into layers, which are read when they are needed."""
        with monitor.stage("load", 1) as tick:
            model, reader = self.source.open(memory.device, self.dtype)
            layer_cache = LayerCache(model, structure, reader, memory, self.dtype)
            staging = staging_bytes(model, structure) if memory.device.type == "cuda" else 0
            memory.host.reserve(staging)
            replay = Replay(model, structure, layer_cache)
            ids = torch.arange(VERIFIED_TOKENS, device=memory.device).unsqueeze(0) % self.vocabulary
            replay.verify(ids)
            tick()
        return _Layers(replay, layer_cache, staging, parameter_bytes(model, reader.types))


@dataclass(frozen=True)
class _Layers:
    """An open model that is split into layers.

    Attributes:
        replay: runs the layers
        cache: reads them
        staging: bytes of host memory that are reserved for reading
        stored_bytes: size of the model's tensors in its files
    """

    replay: Replay
    cache: LayerCache
    staging: int
    stored_bytes: int

    def close(self, memory: MemoryBudget) -> None:
        """Ends reading."""
        self.cache.close()
        memory.host.free(self.staging)


def check_dtype(name: str) -> None:
    """Raises UserError unless ``name`` is a value of ``--dtype``."""
    if name not in ("auto", *DTYPES):
        raise UserError(f"--dtype cannot be {name!r}: choose from auto, {', '.join(DTYPES)}")


def _compute_dtype(name: str, config: Any) -> torch.dtype:
    """Returns the dtype of that name; for ``auto`` the one in the configuration."""
    return DTYPES.get(name) or getattr(config.get_text_config(), "dtype", None) or torch.float32


def max_tokens_per_batch(models: Sequence[ModelFiles], limit: int) -> int:
    """Returns the tokens per batch: ``limit``, or fewer for vocabularies whose logits would take too much memory."""
    largest_vocabulary = max(model.vocabulary for model in models)
    return min(limit, MAX_LOGITS_PER_CHUNK // largest_vocabulary)


@dataclass(frozen=True)
class MemoryNeeds:
    """What an evaluation reserves on the device.

    Attributes:
        working_bytes: activations of a forward pass
        subject_bytes: for the evaluated model, beyond the layers that the reference frees
    """

    working_bytes: int
    subject_bytes: int


def check_memory(models: Sequence[ModelFiles], memory: MemoryBudget, shapes: Sequence[tuple[int, int]]) -> MemoryNeeds:
    """Compares what an evaluation needs with the limits.

    Args:
        models: the reference, if any, and the model to evaluate
        memory: limits of the job
        shapes: [B, S] of the batches

    Raises:
        UserError: the memory limit is too small. The message names a sufficient one.
    """
    working_bytes = 0
    for model in models:
        for windows, seq_len in set(shapes):
            model_bytes = model.working_bytes(windows * seq_len, seq_len, memory.device)
            working_bytes = max(working_bytes, model_bytes)
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
    return MemoryNeeds(working_bytes, max(0, bytes_with_subject - initial.running_bytes))


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
    needs = check_memory(models, memory, [(ids.shape[0], ids.shape[1]) for ids in batches])
    # Reserved, so that no activations are stored there.
    is_reserved = memory.try_reserve(needs.working_bytes + needs.subject_bytes)
    assert is_reserved, "the sum was compared with the limit"
    predictions: list[Predictions] = []
    file_bytes = 0
    for index, model in enumerate(models):
        if predictions:
            memory.on_device.free(needs.subject_bytes)
        title = "evaluate" if index == len(models) - 1 else "reference"
        model_predictions, file_bytes = model.start(memory, batches, monitor, title, reports_experts=len(models) > 1)
        predictions.append(model_predictions)
    return predictions, file_bytes
