"""gemq as a quantization method of vLLM: which layers are packed, and where their tensors are.

vLLM builds its own modules under its own names and loads weights through the code of each family. Packed tensors are
dropped from vLLM's stream of weights. Instead, each packed layer reads its share from the files
(``checkpoint/reader.py``), under the names that the format gives them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from gemq.checkpoint.format import PACKED_FIELDS, QUANT_METHOD, PackedFormat
from gemq.checkpoint.load import local_directory
from gemq.checkpoint.reader import CheckpointReader, check_checkpoint
from gemq.errors import UserError
from gemq.integrations.vllm.experts import PackedExpertsMethod
from gemq.integrations.vllm.files import check_served_files
from gemq.integrations.vllm.head import TiedHeadMethod
from gemq.integrations.vllm.linears import PackedLinearMethod
from gemq.runtime.safetensors_files import weight_files

_LAYER = re.compile(r"(?:^|\.)(\d+)\.(.*)")
"""The first number in a module path, which is the index of the layer, and the path after it."""

_READ_BY_LAYERS = re.compile(rf"\.(({'|'.join(PACKED_FIELDS)})|(gate_up|up|down)_proj_bias)$")
"""Names of tensors that vLLM's own loader must not see."""

LOAD_FORMATS = ("auto", "hf", "safetensors")


class Checkpoint:
    """The checkpoint that vLLM loads. It is opened when the first layer reads from it."""

    def __init__(self, model: str, revision: str | None, download_dir: str | None, trust_remote_code: bool) -> None:
        self._model, self._revision, self._download_dir = model, revision, download_dir
        self._trust_remote_code = trust_remote_code

    @cached_property
    def reader(self) -> CheckpointReader:
        """The opened checkpoint, after verification."""
        # a model of the hub is downloaded into the cache that vLLM uses
        directory = local_directory(self._model, {"revision": self._revision, "cache_dir": self._download_dir})
        reader = CheckpointReader(directory, trust_remote_code=self._trust_remote_code)
        reader.verify_unpacked()
        check_served_files(directory, reader.stored.files)
        # ``maybe_update_config`` has verified a local checkpoint without remote code; one rank verifies others
        if (not Path(self._model).is_dir() or self._trust_remote_code) and torch.distributed.get_rank() == 0:
            reader.verify_data()
        return reader


class GemqQuantization(QuantizationConfig):
    """The quantization method, which vLLM creates from ``quantization_config`` in config.json.

    See vLLM's ``QuantizationConfig`` for the methods.
    """

    def __init__(self, packed_format: PackedFormat) -> None:
        super().__init__()
        self.format = packed_format
        self._checkpoint: Checkpoint | None = None
        self._renamed: dict[str, str] = {}  # vLLM's path of a module -> its path in the checkpoint
        self._claimed: set[str] = set()  # paths in the checkpoint that belong to layers of vLLM's model

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GemqQuantization:
        """Parse ``quantization_config``. Raises UserError if it is damaged."""
        return cls(PackedFormat.from_dict(config))

    @classmethod
    def get_name(cls) -> Any:
        """Return the name of the method in config.json."""
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes of activations that the kernels take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the compute capability that the kernels need: Ampere."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return no files: config.json has the whole configuration."""
        return []

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Raise UserError for a damaged local checkpoint in the first process, before vLLM starts others.

        A checkpoint that needs remote code or is not downloaded yet is checked when its first layer is read.
        """
        if Path(model_name).is_dir() and not getattr(hf_config, "auto_map", None):
            check_served_files(Path(model_name), weight_files(Path(model_name)))
            check_checkpoint(Path(model_name))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Remember how vLLM renames the family's modules."""
        for path in (*self.format.experts, *self.format.linears):
            for name in hf_to_vllm_mapper.apply_list([f"{path}.weight"]):
                self._renamed[name.removesuffix(".weight")] = path

    def get_checkpoint_weight_mapper(self) -> Any:
        """Drop from vLLM's stream of weights what layers read from the files: packed tensors and biases of experts.

        vLLM calls this after it has built the model. Raises UserError if no layer reads some of these tensors.
        """
        self._check_all_claimed()
        from vllm.model_executor.models.utils import WeightsMapper

        return WeightsMapper(orig_to_new_regex={_READ_BY_LAYERS: None})

    def get_cache_scale_mapper(self) -> Any:
        """Return vLLM's own mapper. Before 0.30, it is also the one that drops tensors."""
        mapper = QuantizationConfig.get_cache_scale_mapper()
        if hasattr(QuantizationConfig, "get_checkpoint_weight_mapper"):
            return mapper
        return mapper | self.get_checkpoint_weight_mapper()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Return the method of a layer at the path ``prefix``, or None for a layer that is never packed."""
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if isinstance(layer, LinearBase):
            return self._linear_method(prefix)
        return TiedHeadMethod(prefix, self.checkpoint) if isinstance(layer, ParallelLMHead) else None

    def _experts_method(self, layer: Any, prefix: str) -> PackedExpertsMethod:
        """Return the method of routed experts. Raises UserError if they are not packed."""
        path = self._renamed.get(prefix) or _match_layer(prefix, self.format.experts)
        if path is None:
            raise UserError(
                f"vLLM has experts at {prefix}, but config.json lists none in that layer: "
                "quantize the model again with this gemq"
            )
        self._claimed.add(path)
        return PackedExpertsMethod(layer.moe_config, self.format, path, self.checkpoint)

    def _linear_method(self, prefix: str) -> QuantizeMethodBase:
        """Return the method of a linear. Raises UserError if only some of the matrices that it joins are packed."""
        parent, _, module_name = prefix.rpartition(".")
        names = self.packed_modules_mapping.get(module_name, [module_name])
        packed = [path for name in names if (path := self._linear_path(f"{parent}.{name}")) is not None]
        if not packed:
            return UnquantizedLinearMethod()
        if len(packed) < len(names):
            raise UserError(
                f"vLLM joins {', '.join(names)} in {prefix}, but only {', '.join(packed)} is packed: "
                "pack all of them or none"
            )
        self._claimed.update(packed)
        return PackedLinearMethod(self.format, packed, self.checkpoint)

    def _linear_path(self, prefix: str) -> str | None:
        """Return the path in the checkpoint of vLLM's linear at ``prefix``, or None if it is not packed."""
        path = self._renamed.get(prefix)
        return path if path in self.format.linears else _match_path(prefix, self.format.linears)

    def _check_all_claimed(self) -> None:
        """Raise UserError if vLLM's model has no layer for a packed matrix, which would then run with random weights.

        With pipeline parallelism a process has some of the layers only. The check covers those.
        """
        layers = {_split_path(path)[0] for path in self._claimed}
        for path in (*self.format.experts, *self.format.linears):
            if path not in self._claimed and (not layers or _split_path(path)[0] in layers):
                raise UserError(
                    f"vLLM's model has no layer for {path}, which is packed: load the checkpoint with Transformers"
                )

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint of the model that vLLM is building."""
        if self._checkpoint is None:
            config = get_current_vllm_config()
            model, load = config.model_config, config.load_config
            if load.load_format not in LOAD_FORMATS:
                raise UserError(
                    f"gemq checkpoints cannot be loaded with --load-format {load.load_format}: leave it out"
                )
            self._checkpoint = Checkpoint(model.model, model.revision, load.download_dir, model.trust_remote_code)
        return self._checkpoint


def _match_layer(prefix: str, paths: Mapping[str, Any]) -> str | None:
    """Return the experts of the same layer. vLLM may name the block differently (Mixtral: ``block_sparse_moe``)."""
    if prefix in paths:
        return prefix
    index, _ = _split_path(prefix)
    return _single(path for path in paths if _split_path(path)[0] == index)


def _match_path(prefix: str, paths: Mapping[str, Any]) -> str | None:
    """Return the same module of the same layer. What precedes the index of the layer may differ."""
    if prefix in paths:
        return prefix
    index, module = _split_path(prefix)
    if index is None:
        return None
    return _single(path for path in paths if _split_path(path) == (index, module))


def _split_path(path: str) -> tuple[str | None, str]:
    """Return the index of the layer in a module path and the path after it. Without index: None and the path."""
    match = _LAYER.search(path)
    return (match[1], match[2]) if match else (None, path)


def _single(paths: Iterable[str]) -> str | None:
    """Return the only path, or None if there are none or several."""
    matches = list(paths)
    return matches[0] if len(matches) == 1 else None
