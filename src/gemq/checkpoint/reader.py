"""A packed checkpoint opened for reading: every tensor by name, all of them checked before the first is read.

Needs the model's classes but none of its weights. Knows nothing of packed modules or of what the tensors are for.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from gemq.checkpoint.adopt import adopt_experts
from gemq.checkpoint.auto import auto_class
from gemq.checkpoint.format import (
    PARTS,
    PackedFormat,
    read_quantization_config,
    verify,
    verify_unpacked,
)
from gemq.checkpoint.load import matrix_shapes, unpacked_shapes
from gemq.checkpoint.names import saved_names
from gemq.checkpoint.packing import PackedMatrix
from gemq.safetensors_files import TensorSpec, read_header, weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CheckpointReader:
    """Tensors of a packed checkpoint by in-model name (packed ones) or by the name on disk (all others)."""

    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        """Reads configuration and file headers. UserError when a packed tensor is missing or of the wrong kind."""
        from transformers import AutoConfig

        self.format = PackedFormat.from_dict(read_quantization_config(directory))
        self.config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        del self.config.quantization_config
        with torch.device("meta"):
            auto = auto_class(self.config)
            self.skeleton: PreTrainedModel = auto.from_config(self.config, trust_remote_code=trust_remote_code)
        adopt_experts(self.skeleton)
        self.shapes = matrix_shapes(self.skeleton, self.format)
        """(rows, columns) of every packed matrix kind."""
        self.expected = self.format.expected(self.shapes)
        self.found: dict[str, TensorSpec] = {}
        self._files: dict[str, tuple[Path, str]] = {}  # name -> file, name in the file
        self._open: dict[Path, Any] = {}
        for file in weight_files(directory):
            for name, spec in read_header(file).items():
                self.found[name] = spec
                self._files[name] = (file, name)
        if not self.expected.keys() <= self.found.keys():  # save_pretrained gives packed tensors hub names as well
            for name, saved in saved_names(self.skeleton, self.expected).items():
                if saved in self.found:
                    self.found[name], self._files[name] = self.found.pop(saved), self._files.pop(saved)
        verify(self.expected, self.found)

    @cached_property
    def unpacked(self) -> list[str]:
        """Names of what is not packed, as the files have them."""
        return sorted(self.found.keys() - self.expected.keys())

    def verify_unpacked(self) -> None:
        """UserError when a tensor that is not packed is missing or has the wrong shape."""
        verify_unpacked(unpacked_shapes(self.skeleton, self.format), self.found)

    def tensor(self, name: str) -> Tensor:
        file, stored = self._where(name)
        return file.get_tensor(stored)

    def matrix(self, name: str) -> PackedMatrix:
        """A packed matrix: ``name`` without ``.codes``."""
        return PackedMatrix(*(self.tensor(f"{name}.{part}") for part in PARTS))

    def matrix_slice(self, name: str, rows: slice, groups: slice) -> PackedMatrix:
        """Some rows and groups (of columns) of a packed matrix. Only these are read."""
        parts = []
        total = self.found[f"{name}.scales"].shape[1]
        for part in PARTS:
            file, stored = self._where(f"{name}.{part}")
            each = self.found[f"{name}.{part}"].shape[1] // total  # bytes or numbers a group
            parts.append(file.get_slice(stored)[rows, each * groups.start : each * groups.stop])
        return PackedMatrix(*parts)

    def _where(self, name: str) -> tuple[Any, str]:
        file, stored = self._files[name]
        if file not in self._open:  # kept open: a header may list 100,000 tensors
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file], stored


def check_checkpoint(directory: Path, *, trust_remote_code: bool = False) -> None:
    """UserError for the first thing that is missing or damaged. Reads headers, no weights."""
    CheckpointReader(directory, trust_remote_code=trust_remote_code).verify_unpacked()
