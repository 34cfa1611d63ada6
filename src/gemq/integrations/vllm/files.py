"""Check of the files from which vLLM's own loader reads unpacked tensors. Must not import vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gemq.errors import UserError
from gemq.runtime.safetensors_files import INDEX_NAME, is_file, read_index

MISTRAL_FILES = "consolidated*.safetensors"
"""If there is such a file, vLLM reads only these."""


def check_served_files(directory: Path, files: Iterable[Path]) -> None:
    """Raise UserError if vLLM would not read exactly ``files``, those of the checkpoint, in ``directory``.

    vLLM reads all safetensors files in the directory, or those that the index names.
    """
    expected = {str(file.relative_to(directory)) for file in files}
    served = {file.name for file in directory.glob("*.safetensors")}
    if is_file(directory / INDEX_NAME):
        served &= set(read_index(directory / INDEX_NAME).values())
    served |= {file.name for file in directory.glob(MISTRAL_FILES)}
    stray, missing = sorted(served - expected), sorted(expected - served)
    if stray:
        raise UserError(
            f"{directory} holds {stray[0]}, which vLLM would read although it does not belong to the checkpoint: "
            "move it to another directory"
        )
    if missing:
        raise UserError(
            f"vLLM would not read {missing[0]} in {directory}: keep weights and index in the directory of config.json"
        )
