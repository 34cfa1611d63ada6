"""Comparison of the tensors in the files with those that config.json and the model imply. Reads no weights.

Must not import torch or Transformers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from gemq.checkpoint.format import PACKED_FIELDS
from gemq.errors import UserError
from gemq.runtime.safetensors_files import TensorSpec

FLOAT_DTYPES = {"F64", "F32", "F16", "BF16"}


def verify_packed(expected: Mapping[str, TensorSpec], stored: Mapping[str, TensorSpec]) -> None:
    """Compares the tensors that config.json implies with those in the files.

    Raises:
        UserError: a tensor differs. The message names the first one.
    """
    errors = []
    for name, spec in expected.items():
        if name not in stored:
            errors.append(f"{name} is missing")
        elif stored[name] != spec:
            errors.append(f"{name} is {_describe(stored[name])} instead of {_describe(spec)}")
    errors += [f"{name} is not listed in config.json" for name in surplus_names(expected, stored)]
    if errors:
        raise UserError(
            f"{len(errors)} packed tensors do not match config.json, first: {errors[0]}: "
            "copy the checkpoint again, or undo the edit of config.json"
        )


def surplus_names(expected: Collection[str], stored: Iterable[str]) -> list[str]:
    """Returns the stored packed tensors that config.json does not imply, such as offsets of trellis codes."""
    matrices = {name.rpartition(".")[0] for name in expected}
    surplus = []
    for name in stored:
        matrix, _, suffix = name.rpartition(".")
        if name not in expected and (suffix == "codes" or (suffix in PACKED_FIELDS and matrix in matrices)):
            surplus.append(name)
    return surplus


class UnpackedTensor(NamedTuple):
    """What the model expects of a tensor that is not packed. Tied weights are not required."""

    shape: tuple[int, ...]
    is_floating_point: bool
    is_required: bool = True


def verify_unpacked(
    expected: Mapping[str, UnpackedTensor], packed: Mapping[str, TensorSpec], stored: Mapping[str, TensorSpec]
) -> None:
    """Compares the tensors that are not packed with what the model expects.

    Args:
        expected: by name in the files
        packed: the packed tensors, which are ignored
        stored: all tensors in the files

    Raises:
        UserError: a tensor is missing, has the wrong shape or dtype, or does not belong to the model.
    """
    errors = []
    for name, tensor in expected.items():
        if name not in stored:
            if tensor.is_required:
                errors.append(f"{name} is missing")
        elif stored[name].shape != tensor.shape:
            errors.append(f"{name} is {list(stored[name].shape)} instead of {list(tensor.shape)}")
        elif tensor.is_floating_point and stored[name].dtype not in FLOAT_DTYPES:
            errors.append(f"{name} is of type {stored[name].dtype}")
    for name in sorted(stored.keys() - packed.keys() - expected.keys()):
        errors.append(f"the model has no place for {name}")
    if errors:
        raise UserError(
            f"{len(errors)} unpacked tensors do not fit the model, first: {errors[0]}: copy the checkpoint again"
        )


def _describe(spec: TensorSpec) -> str:
    """Returns dtype and shape as text."""
    return f"{spec.dtype} {list(spec.shape)}"
