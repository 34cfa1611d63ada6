"""A packed checkpoint opened for reading: every tensor by name, all of them checked before the first is read.

Needs the model's classes but none of its weights. Knows nothing of packed modules or of what the tensors are for.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from gemq.checkpoint.format import PARTS, verify, verify_unpacked
from gemq.checkpoint.load import matrix_shapes, unpacked_tensors
from gemq.checkpoint.names import saved_names
from gemq.checkpoint.skeleton import build_skeleton, read_config
from gemq.checkpoint.stored import StoredCheckpoint
from gemq.quant.packing import PackedMatrix


class CheckpointReader:
    """Tensors of a packed checkpoint by in-model name (packed ones) or by the name on disk (all others)."""

    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        """Reads configuration and file headers. UserError when a packed tensor is missing or of the wrong kind."""
        self.stored = StoredCheckpoint.open(directory)
        self.format = self.stored.format
        self.config = read_config(directory, trust_remote_code=trust_remote_code)
        del self.config.quantization_config
        self.skeleton = build_skeleton(self.config, self.stored, trust_remote_code=trust_remote_code)
        self.shapes = matrix_shapes(self.skeleton, self.format)
        """(rows, columns) of every packed matrix kind."""
        self.expected = self.format.expected(self.shapes)
        self.found = self.stored.specs
        self._stored_names: dict[str, str] = {}
        """In-model name of a packed tensor -> its name in the files, where the two differ."""
        self._open: dict[Path, Any] = {}
        if not self.expected.keys() <= self.found.keys():  # save_pretrained gives packed tensors hub names as well
            for name, saved in saved_names(self.skeleton, self.expected).items():
                if saved in self.found:
                    self.found[name] = self.found.pop(saved)
                    self._stored_names[name] = saved
        verify(self.expected, self.found)
        self.stored.check_config()

    @cached_property
    def unpacked(self) -> list[str]:
        """Names of what is not packed, as the files have them."""
        return sorted(self.found.keys() - self.expected.keys())

    def verify_unpacked(self) -> None:
        """UserError when a tensor that is not packed is missing, of another shape, or not part of the model."""
        verify_unpacked(unpacked_tensors(self.skeleton, self.format), self.expected, self.found)

    def verify_data(self) -> None:
        """Reads every byte. UserError when the weights are not those that gemq wrote."""
        self.stored.check_data()

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
        stored_name = self._stored_names.get(name, name)
        file = self.stored.tensors[stored_name].file
        if file not in self._open:  # kept open: a header may list 100,000 tensors
            self._open[file] = safe_open(file, framework="pt")
        return self._open[file], stored_name


def check_checkpoint(directory: Path, *, trust_remote_code: bool = False) -> None:
    """UserError for the first thing that is missing or damaged. Reads everything, weights for their checksums."""
    reader = CheckpointReader(directory, trust_remote_code=trust_remote_code)
    reader.verify_unpacked()
    reader.verify_data()
