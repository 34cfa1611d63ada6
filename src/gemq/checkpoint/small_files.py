"""The small files of a model directory that are copied to outputs: tokenizer, templates, code, license.

The output may be published. A link in the directory is therefore followed only to files inside the directory, or to the
blobs of the hub cache if the directory is a snapshot in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gemq.errors import UserError

SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".spm"}
NAMES = {"LICENSE", "NOTICE"}
FOLDERS = ("additional_chat_templates",)

NOT_COPIED = {
    "config.json",  # gemq writes its own
    "quantize_config.json",  # the next three describe the original's weights
    "quant_config.json",
    "hf_quant_config.json",
    "adapter_config.json",  # loading would look for the adapter
    "allocation.json",  # that of a packed checkpoint, which its dense checkpoint is not
}


def small_files(folder: Path) -> dict[str, Path]:
    """Returns the files to copy, by their path in the output.

    Raises:
        UserError: one of them is a link to a file outside the folder.
    """
    files = {}
    for name, path in _candidates(folder):
        if _is_link_out(path, folder):
            raise UserError(
                f"{path} is a link that leads out of {folder}, and gemq would copy what it points to into the output: "
                "put the file itself there, or delete the link"
            )
        if path.is_file():
            files[name] = path
    return files


def _candidates(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields the entries of a folder to copy, with their paths in the output, and the folders among them."""
    for path in sorted(folder.iterdir()):
        is_folder = path.name in FOLDERS
        if is_folder or _is_small_file(path):
            yield path.name, path
        if not is_folder or not path.is_dir() or _is_link_out(path, folder):
            continue
        for file in sorted(path.iterdir()):
            if _is_small_file(file):
                yield f"{path.name}/{file.name}", file


def _is_small_file(path: Path) -> bool:
    """Whether a file is copied, according to its name."""
    if path.name in NOT_COPIED or path.name.endswith(".index.json") or path.name.startswith("."):
        return False
    return path.suffix in SUFFIXES or path.stem in NAMES


def _is_link_out(path: Path, folder: Path) -> bool:
    """Whether a path leads to a file that is neither in the folder nor in the blobs of the folder's hub cache."""
    root = folder.resolve()
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # a cycle of links
        return True
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    return not any(target.is_relative_to(directory) for directory in allowed)
