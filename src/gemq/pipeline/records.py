"""Files of a work directory that carry their identity: the stage, the result, and a checksum of their contents.

A resumed job or an export uses such a file only if it is complete and the one that it expects. A file that was
truncated, swapped with another, edited or damaged by a bad disk is refused by name before anything is made from it. The
checksums find damage. They do not protect against somebody who can write to the directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemq.errors import UserError
from gemq.quant.widths import TrellisWidth, Width
from gemq.runtime.files import write_json
from gemq.runtime.safetensors_files import tensor_entries
from gemq.runtime.upload import TORCH_DTYPES

METADATA_KEY = "gemq"
"""The only metadata key of a tensor file: safetensors writes several in no fixed order."""

CHUNK_BYTES = 1 << 22
"""Size of the pieces in which files are read."""

MAX_JSON_BYTES = 16 << 20
"""Upper bound for a JSON file of a work directory."""


def digest(value: Any) -> str:
    """A shortened SHA-256 of plain values and widths, which count as their numbers."""
    text = json.dumps(value, sort_keys=True, default=_number_of_width)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _number_of_width(value: Any) -> float:
    """What JSON writes for a width. Raises TypeError for any other value that JSON does not know."""
    if not isinstance(value, Width | TrellisWidth):
        raise TypeError(f"{type(value).__name__} is no plain value")
    number: float = value.value
    return number


# Tensors


def tensor_metadata(file: str, tensors: dict[str, Tensor], stage: str, about: dict[str, Any]) -> dict[str, str]:
    """The metadata of a tensor file, by which it is recognised.

    Args:
        file: name of the file.
        tensors: by name, on the CPU.
        stage: digest of the stage's inputs.
        about: plain values that are stored with the tensors.
    """
    sums = {name: [str(t.dtype), list(t.shape), _crc([_tensor_bytes(t)])] for name, t in tensors.items()}
    record = {**about, "file": file, "stage": stage}
    return {METADATA_KEY: json.dumps({**record, "checksum": digest([sums, record])})}


def check_tensor_record(path: Path, stage: str) -> None:
    """Reads a whole tensor file. Raises UserError unless its metadata matches its contents and this stage."""
    _check_regular(path)
    try:
        entries, start = tensor_entries(path)
    except UserError as error:
        raise damaged(path, "it is truncated, or its header is damaged") from error
    record = read_about(path)
    sums = {}
    with path.open("rb") as file:
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            chunks = (file.read(min(CHUNK_BYTES, end - position)) for position in range(begin, end, CHUNK_BYTES))
            sums[name] = [str(TORCH_DTYPES.get(entry["dtype"])), entry["shape"], _crc(chunks)]
    checksum = record.pop("checksum", None)
    _check_identity(path, stage, record)
    if checksum != digest([sums, record]):
        raise damaged(path, "its contents do not match its checksum")


def read_about(path: Path) -> dict[str, Any]:
    """The identity of a tensor file, and the plain values that are stored with it. Raises UserError without any."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})[METADATA_KEY])
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise damaged(path, "it does not say which result it is") from error
    if not isinstance(record, dict):
        raise damaged(path, "it does not say which result it is")
    return record


def _tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor on the CPU, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if len(flat) else memoryview(b"")


def _crc(chunks: Iterable[bytes | memoryview]) -> int:
    """CRC-32 of the chunks of a tensor."""
    crc = 0
    for chunk in chunks:
        crc = zlib.crc32(chunk, crc)
    return crc


# JSON


def write_json_record(path: Path, value: Any, stage: str) -> None:
    """Writes plain values atomically. ``stage``: digest of the stage's inputs."""
    value = json.loads(json.dumps(value))
    record = {"file": path.name, "stage": stage}
    write_json(path, {**record, "checksum": digest([value, record]), "value": value})


def read_json_record(path: Path, stage: str) -> Any:
    """Reads plain values. Raises UserError unless ``write_json_record`` wrote the file for this stage."""
    record = read_object(path)
    checksum, value = record.pop("checksum", None), record.pop("value", None)
    _check_identity(path, stage, record)
    if checksum != digest([value, record]):
        raise damaged(path, "its contents do not match its checksum")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises UserError when the file cannot be read or holds something else."""
    _check_regular(path)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise damaged(path, "it is too large")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, "it is no JSON") from error
    if not isinstance(value, dict):
        raise damaged(path, "it is no JSON object")
    return value


# Both


def check_record(path: Path, stage: str) -> None:
    """Raises UserError for a file of a stage that is damaged, or that holds another result than its name says."""
    if path.suffix == ".safetensors":
        check_tensor_record(path, stage)
    elif path.suffix == ".json":
        read_json_record(path, stage)


def damaged(path: Path, reason: str) -> UserError:
    """The error for a damaged file of a work directory."""
    return UserError(
        f"{path} is damaged ({reason}): copy the work directory again, or delete this file and continue with --resume"
    )


def _check_identity(path: Path, stage: str, record: dict[str, Any]) -> None:
    """Raises UserError unless ``record`` says that a file is this result of this stage."""
    if "file" not in record or "stage" not in record:
        raise damaged(path, "it does not say which result it is")
    if record["file"] != path.name or record["stage"] != stage:
        raise damaged(path, "it is another result, or one of another job")


def _check_regular(path: Path) -> None:
    """Raises UserError unless a path is a regular file that can be read, not a link."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise damaged(path, "it is a link or no regular file")
        os.close(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check its permissions") from error
