"""The weight files that vLLM's own loader reads, which takes unpacked tensors from them. Imports no vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gemq.errors import UserError
from gemq.runtime.safetensors_files import INDEX_NAME, is_file, read_index

MISTRAL_FILES = "consolidated*.safetensors"
"""vLLM prefers these, and reads nothing else where it finds one."""


def check_served_files(directory: Path, files: Iterable[Path]) -> None:
    """Raises UserError when vLLM would read other files of ``directory`` than ``files``, those of the checkpoint.

    vLLM reads all safetensors files in the directory, or those of them that the index names.
    """
    expected = {str(file.relative_to(directory)) for file in files}
    served = {file.name for file in directory.glob("*.safetensors")}
    if is_file(directory / INDEX_NAME):
        served &= set(read_index(directory / INDEX_NAME).values())
    served |= {file.name for file in directory.glob(MISTRAL_FILES)}
    if stray := sorted(served - expected):
        raise UserError(
            f"{directory} holds {stray[0]}, which vLLM would read although it does not belong to the checkpoint: "
            "move it to another directory"
        )
    if absent := sorted(expected - served):
        raise UserError(
            f"vLLM would not read {absent[0]} in {directory}: keep weights beside config.json, and the index"
        )
