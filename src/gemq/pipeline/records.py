"""Files of a work directory that say what they are: which result of which stage, and a checksum of their contents.

A resumed job or an export takes such a file only if it is the one that it expects, whole. So a file that was cut short,
swapped with another, edited or hit by a bad disk is refused, with its name, before anything is made from it. The
checksums find damage; they are no protection against somebody who can write into the directory.
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
from gemq.runtime.files import write_json
from gemq.runtime.safetensors_files import tensor_entries
from gemq.runtime.upload import TYPES

KEY = "gemq"
"""The one metadata key of a tensor file: safetensors writes several in no fixed order."""

CHUNK = 1 << 22
"""Bytes that are read at a time."""

MAX_JSON_BYTES = 16 << 20
"""Upper bound for a JSON file of a work directory."""


def digest(value: Any) -> str:
    """SHA-256 of plain values, shortened."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


# Tensors


def tensor_metadata(file: str, tensors: dict[str, Tensor], stage: str, about: dict[str, Any]) -> dict[str, str]:
    """The metadata of a file of tensors, by which it is recognised.

    Args:
        file: its name
        tensors: by name, on the CPU
        stage: digest of the stage's inputs
        about: plain values that are kept with the tensors
    """
    sums = {name: [str(t.dtype), list(t.shape), _crc([_bytes_of(t)])] for name, t in tensors.items()}
    record = {**about, "file": file, "stage": stage}
    return {KEY: json.dumps({**record, "checksum": digest([sums, record])})}


def check_tensor_record(path: Path, stage: str) -> None:
    """Reads all of a file. Raises UserError when its metadata is not that of its contents and this stage."""
    _check_regular(path)
    try:
        entries, start = tensor_entries(path)
    except UserError as error:
        raise damaged(path, "it is cut short, or its header is damaged") from error
    record = read_about(path)
    sums = {}
    with path.open("rb") as file:
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            chunks = (file.read(min(CHUNK, end - at)) for at in range(begin, end, CHUNK))
            sums[name] = [str(TYPES.get(entry["dtype"])), entry["shape"], _crc(chunks)]
    checksum = record.pop("checksum", None)
    _check_identity(path, stage, record)
    if checksum != digest([sums, record]):
        raise damaged(path, "its contents do not match its checksum")


def read_about(path: Path) -> dict[str, Any]:
    """What a tensor file says of itself. Raises UserError when it says nothing."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})[KEY])
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise damaged(path, "it does not say which result it is") from error
    if not isinstance(record, dict):
        raise damaged(path, "it does not say which result it is")
    return record


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data if len(flat) else memoryview(b"")


def _crc(chunks: Iterable[bytes | memoryview]) -> int:
    crc = 0
    for chunk in chunks:
        crc = zlib.crc32(chunk, crc)
    return crc


# JSON


def write_json_record(path: Path, value: Any, stage: str) -> None:
    """Writes plain values, atomically. ``stage``: digest of the stage's inputs."""
    value = json.loads(json.dumps(value))
    record = {"file": path.name, "stage": stage}
    write_json(path, {**record, "checksum": digest([value, record]), "value": value})


def read_json_record(path: Path, stage: str) -> Any:
    """The values. Raises UserError when the file is not what ``write_json_record`` wrote for this stage."""
    record = read_object(path)
    checksum, value = record.pop("checksum", None), record.pop("value", None)
    _check_identity(path, stage, record)
    if checksum != digest([value, record]):
        raise damaged(path, "its contents do not match its checksum")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError when the file cannot be read or holds something else."""
    _check_regular(path)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise damaged(path, "it is too large")
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check its permissions") from error
    except (ValueError, RecursionError) as error:
        raise damaged(path, "it is no JSON") from error
    if not isinstance(found, dict):
        raise damaged(path, "it is no JSON object")
    return found


# Both


def check_record(path: Path, stage: str) -> None:
    """Raises UserError for a file of a stage that is damaged, or another result than its name says."""
    if path.suffix == ".safetensors":
        check_tensor_record(path, stage)
    elif path.suffix == ".json":
        read_json_record(path, stage)


def damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path} is damaged ({reason}): copy the work directory again, or delete this file and go on with --resume"
    )


def _check_identity(path: Path, stage: str, record: dict[str, Any]) -> None:
    if "file" not in record or "stage" not in record:
        raise damaged(path, "it does not say which result it is")
    if record["file"] != path.name or record["stage"] != stage:
        raise damaged(path, "it is another result, or one of another job")


def _check_regular(path: Path) -> None:
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise damaged(path, "it is a link or no regular file")
        os.close(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): check its permissions") from error
