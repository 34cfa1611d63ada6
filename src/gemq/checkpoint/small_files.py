"""The small files of a model's folder that go into what gemq writes: tokenizer, templates, code, licence.

The output may be published. So a link in the folder is followed only to the folder itself, or to the blobs of the hub
cache that the folder is a snapshot of.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gemq.errors import UserError

SUFFIXES = {".json", ".txt", ".model", ".jinja", ".py", ".tiktoken", ".vocab", ".spm"}
NAMES = {"LICENSE", "NOTICE"}
FOLDERS = ("additional_chat_templates",)

NOT_COPIED = {
    "config.json",  # written anew
    "quantize_config.json",  # these describe the weights of the folder
    "quant_config.json",
    "hf_quant_config.json",
    "adapter_config.json",  # loading would look for the adapter
}


def small_files(folder: Path) -> dict[str, Path]:
    """Files to copy, by their path in the output.

    Raises:
        UserError: one of them is a link that leads out of the folder.
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
    """Entries of a folder that are to be copied, by name, and the links to folders among them."""
    for path in sorted(folder.iterdir()):
        if path.name in FOLDERS:
            yield path.name, path
            if path.is_dir() and not _is_link_out(path, folder):
                yield from ((f"{path.name}/{file.name}", file) for file in sorted(path.iterdir()) if _is_small(file))
        elif _is_small(path):
            yield path.name, path


def _is_small(path: Path) -> bool:
    wanted = path.suffix in SUFFIXES or path.stem in NAMES
    return wanted and not (path.name in NOT_COPIED or path.name.endswith(".index.json") or path.name.startswith("."))


def _is_link_out(path: Path, folder: Path) -> bool:
    """Whether what stands at ``path`` lies outside of the folder, and of the blobs of the hub cache that it is in."""
    root = folder.resolve()
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # links that lead to each other
        return True
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    return not any(target.is_relative_to(place) for place in allowed)
