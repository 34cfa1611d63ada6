"""gemq as a quantization method of vLLM: which layers are packed, and where their tensors lie.

vLLM builds its own modules under its own names and loads weights through each family's own code. Packed tensors do not
go that way: they are dropped from vLLM's stream of weights, and each packed layer reads its part straight from the
files (``checkpoint/reader.py``), under the names that the format gives them.
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

from gemq.checkpoint.format import PARTS, QUANT_METHOD, PackedFormat
from gemq.checkpoint.load import local_directory
from gemq.checkpoint.reader import CheckpointReader, check_checkpoint
from gemq.errors import UserError
from gemq.integrations.vllm.experts import PackedExpertsMethod
from gemq.integrations.vllm.files import check_served_files
from gemq.integrations.vllm.head import TiedHeadMethod
from gemq.integrations.vllm.linears import PackedLinearMethod
from gemq.runtime.safetensors_files import weight_files

_LAYER = re.compile(r"(?:^|\.)(\d+)\.(.*)")
"""The first number in a module path, which is the layer's, and what follows it."""

LOAD_FORMATS = ("auto", "hf", "safetensors")


class Checkpoint:
    """Where vLLM found the model. Opened when the first layer reads from it."""

    def __init__(self, model: str, revision: str | None, download_dir: str | None, trust_remote_code: bool) -> None:
        self._model, self._revision, self._download_dir = model, revision, download_dir
        self._trust_remote_code = trust_remote_code

    @cached_property
    def reader(self) -> CheckpointReader:
        # a hub id: into the cache in which vLLM will find it
        directory = local_directory(self._model, {"revision": self._revision, "cache_dir": self._download_dir})
        reader = CheckpointReader(directory, trust_remote_code=self._trust_remote_code)
        reader.verify_unpacked()
        check_served_files(directory, reader.stored.files)
        # ``maybe_update_config`` has read a local checkpoint without remote code; others are read by one rank
        if (not Path(self._model).is_dir() or self._trust_remote_code) and torch.distributed.get_rank() == 0:
            reader.verify_data()
        return reader


class GemqQuantization(QuantizationConfig):
    """Made by vLLM from config.json's ``quantization_config``."""

    def __init__(self, packed_format: PackedFormat) -> None:
        super().__init__()
        self.format = packed_format
        self._checkpoint: Checkpoint | None = None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GemqQuantization:
        return cls(PackedFormat.from_dict(config))

    @classmethod
    def get_name(cls) -> Any:
        return QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Refuses a damaged local checkpoint in the first process, before vLLM starts others.

        One that needs remote code or has yet to be downloaded is checked when its first layer is read.
        """
        if Path(model_name).is_dir() and not getattr(hf_config, "auto_map", None):
            check_served_files(Path(model_name), weight_files(Path(model_name)))
            check_checkpoint(Path(model_name))

    def get_checkpoint_weight_mapper(self) -> Any:
        """Drops packed tensors from vLLM's stream of weights: layers read them on their own."""
        from vllm.model_executor.models.utils import WeightsMapper

        return WeightsMapper(orig_to_new_regex={re.compile(rf"\.({'|'.join(PARTS)})$"): None})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, RoutedExperts):
            path = _match_layer(prefix, self.format.experts)
            if path is None:
                raise UserError(
                    f"vLLM has experts at {prefix}, but config.json lists none in that layer: "
                    "quantize the model again with this gemq"
                )
            return PackedExpertsMethod(layer.moe_config, self.format, path, self.checkpoint)
        if isinstance(layer, LinearBase):
            head, _, last = prefix.rpartition(".")
            names = self.packed_modules_mapping.get(last, [last])
            paths = [_match_path(f"{head}.{name}", self.format.linears) for name in names]
            packed = [path for path in paths if path is not None]
            if packed and len(packed) < len(names):
                raise UserError(
                    f"vLLM joins {', '.join(names)} in {prefix}, but only {', '.join(packed)} is packed: "
                    "pack all of them or none"
                )
            return PackedLinearMethod(self.format, packed, self.checkpoint) if packed else UnquantizedLinearMethod()
        return TiedHeadMethod(prefix, self.checkpoint) if isinstance(layer, ParallelLMHead) else None

    @property
    def checkpoint(self) -> Checkpoint:
        """The files behind the model that is being built."""
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
    """The experts of the same layer: vLLM may call the block otherwise (Mixtral: ``block_sparse_moe``)."""
    if prefix in paths:
        return prefix
    return _only(path for path in paths if _layer(path)[0] == _layer(prefix)[0])


def _match_path(prefix: str, paths: Mapping[str, Any]) -> str | None:
    """The same module of the same layer: what stands before the layer's number may differ."""
    if prefix in paths:
        return prefix
    return _only(path for path in paths if _layer(path)[0] is not None and _layer(path) == _layer(prefix))


def _layer(path: str) -> tuple[str | None, str]:
    found = _LAYER.search(path)
    return (found[1], found[2]) if found else (None, path)


def _only(paths: Iterable[str]) -> str | None:
    found = list(paths)
    return found[0] if len(found) == 1 else None
