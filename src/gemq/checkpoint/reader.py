"""A packed checkpoint opened for reading. All tensors are checked before the first one is read.

Needs the model's classes but none of its weights. Must not import packed modules.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from gemq.checkpoint.model_shapes import matrix_shapes, unpacked_tensors
from gemq.checkpoint.names import stored_names
from gemq.checkpoint.skeleton import build_skeleton, read_config
from gemq.checkpoint.stored import StoredCheckpoint
from gemq.checkpoint.verification import verify_packed, verify_unpacked
from gemq.quant.stored_matrix import StoredMatrix, stored_matrix


class CheckpointReader:
    """Reads the tensors of a packed checkpoint by name: packed ones by name in the model, others by name in the files.

    Args:
        directory: of the checkpoint

    Attributes:
        stored: config.json and the headers of the files
        format: which matrices are packed
        config: of Transformers
        skeleton: the full-precision model on the meta device
        shapes: (rows, columns) of every packed matrix kind
        expected: packed tensors by name in the model
        specs: all tensors, by the names that ``tensor`` takes

    Raises:
        UserError: a packed tensor is missing or of the wrong kind.
    """

    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        self.stored = StoredCheckpoint.open(directory)
        self.format = self.stored.format
        self.config = read_config(directory, trust_remote_code=trust_remote_code)
        del self.config.quantization_config
        self.skeleton = build_skeleton(self.config, self.stored, trust_remote_code=trust_remote_code)
        self.shapes = matrix_shapes(self.skeleton, self.format)
        self.expected = self.format.expected(self.shapes)
        self._stored_names = stored_names(self.skeleton, self.expected, self.stored.tensors)
        self.specs = {name: self.stored.tensors[stored].spec for name, stored in self._stored_names.items()}
        self._matrices = {matrix.name: matrix for matrix in self.format.matrices()}
        self._files: dict[Path, Any] = {}
        verify_packed(self.expected, self.specs)
        self.stored.check_config()

    @cached_property
    def unpacked(self) -> list[str]:
        """Names of the tensors that are not packed."""
        return sorted(self.specs.keys() - self.expected.keys())

    def verify_unpacked(self) -> None:
        """Raises UserError if an unpacked tensor is missing, has another shape, or does not belong to the model."""
        verify_unpacked(unpacked_tensors(self.skeleton, self.format), self.expected, self.specs)

    def verify_data(self) -> None:
        """Reads all weights. Raises UserError if they differ from what gemq wrote."""
        self.stored.check_data()

    def tensor(self, name: str) -> Tensor:
        """Reads a tensor."""
        file, stored_name = self._locate(name)
        return file.get_tensor(stored_name)

    def matrix(self, name: str) -> StoredMatrix:
        """Reads a packed matrix. ``name`` is that of its tensors without the suffix."""
        matrix = self._matrices[name]
        tensors = {tensor_name: self.tensor(tensor_name) for tensor_name in matrix.tensor_names}
        return stored_matrix(tensors, name, matrix.width, self.format.state_bits)

    def matrix_slice(self, name: str, rows: slice, blocks: slice) -> StoredMatrix:
        """Reads some rows and blocks of columns of a packed matrix, and nothing else.

        Args:
            name: of its tensors without the suffix
            rows: bounds are multiples of 16 if the matrix has trellis codes
            blocks: in blocks of ``PackedFormat.block_side`` columns
        """
        matrix = self._matrices[name]
        num_rows, num_columns = self.shapes[matrix.kind]
        num_blocks = num_columns // self.format.block_side(matrix.kind, num_columns)
        first_row, last_row, _ = rows.indices(num_rows)
        first_block, last_block, _ = blocks.indices(num_blocks)
        tensors = {}
        for tensor_name in matrix.tensor_names:
            file, stored_name = self._locate(tensor_name)
            shape = self.specs[tensor_name].shape
            rows_per_entry = num_rows // shape[0]  # codes of a trellis have one for each row of tiles
            if first_row % rows_per_entry or last_row % rows_per_entry:
                raise ValueError(f"rows {first_row} to {last_row} of {name} are not whole rows of tiles")
            index: tuple[slice, ...] = (slice(first_row // rows_per_entry, last_row // rows_per_entry),)
            if len(shape) > 1:
                entries_per_block = shape[1] // num_blocks
                index += (slice(entries_per_block * first_block, entries_per_block * last_block),)
            tensors[tensor_name] = file.get_slice(stored_name)[index]
        return stored_matrix(tensors, name, matrix.width, self.format.state_bits)

    def _locate(self, name: str) -> tuple[Any, str]:
        """Returns the open file that holds a tensor, and the tensor's name in it."""
        stored_name = self._stored_names[name]
        path = self.stored.tensors[stored_name].file
        if path not in self._files:  # files stay open, since parsing a header of 100,000 tensors takes long
            self._files[path] = safe_open(path, framework="pt")
        return self._files[path], stored_name


def check_checkpoint(directory: Path, *, trust_remote_code: bool = False) -> None:
    """Reads a packed checkpoint completely. Raises UserError if anything is missing or damaged."""
    reader = CheckpointReader(directory, trust_remote_code=trust_remote_code)
    reader.verify_unpacked()
    reader.verify_data()
