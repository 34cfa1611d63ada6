"""The safetensors files of a model directory: which of them hold its weights, and what their headers list.

All readers of weights use this module, so that they read the same files as Transformers. Reads JSON and headers only.
Must not import torch or Transformers.
"""

from __future__ import annotations

import errno
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from gemq.errors import UserError
from gemq.runtime.weights_notice import WEIGHTS_KEY, is_notice

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of files in which weights are pickled."""

MAX_HEADER_BYTES = 32_000_000
"""Upper bound for one header: about 250,000 tensors with names of usual length, read in about two seconds.

The largest published models have 100,000 to 200,000 tensors in all their files.
"""

MAX_TENSORS = 1_000_000
"""Upper bound for the tensors of all files together."""

LENGTH_BYTES = 8
"""A file begins with the length of its header, a little-endian integer of this size."""

MAX_JSON_BYTES = MAX_HEADER_BYTES
"""Upper bound for config.json and for an index."""

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits of an element by safetensors dtype."""


class TensorSpec(NamedTuple):
    """Dtype and shape of a tensor, as a safetensors header describes it. Packed tensors have the dtype ``U8``."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


class StoredTensor(NamedTuple):
    """Where a tensor is stored: its file, its specification, and the position of its first byte in the file."""

    file: Path
    spec: TensorSpec
    start: int


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files that hold a model's weights, in the order of their names.

    These are the files that Transformers reads: the file that config.json names as ``transformers_weights``, else
    model.safetensors, else the files of model.safetensors.index.json. Other safetensors files in the directory do not
    belong to the model. The notice in packed checkpoints (``weights_notice.py``) names no file.

    Raises:
        UserError: no such file, a missing shard, a damaged index, or an index that names files outside the directory
            or files that are not safetensors.
    """
    file_name = _explicit_name(directory)
    if file_name is None:
        file_name = WEIGHTS_NAME if is_file(directory / WEIGHTS_NAME) else INDEX_NAME
    if not file_name.endswith(".json"):
        return [_weight_file(directory, file_name, "config.json")]
    index = directory / file_name
    if not is_file(index):
        raise UserError(_explain_no_weights(directory))
    shards = sorted(set(read_index(index).values()))
    return [_weight_file(directory, name, index.name) for name in shards]


def read_index(index: Path) -> dict[str, str]:
    """Return the ``weight_map`` of an index: tensor name -> file name. Raises UserError if the index is damaged."""
    values = read_json(index)
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    is_valid = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
    if not is_valid or not weight_map:
        raise UserError(f"{index} lists no files (its weight_map is damaged): copy the checkpoint again")
    if not isinstance(values.get("metadata"), dict):
        raise UserError(f"{index} has no metadata, which Transformers needs: copy the checkpoint again")
    return weight_map


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the tensors of safetensors files by name, from their headers.

    Raises:
        UserError: a file is missing or damaged, two files hold the same tensor, or there are too many tensors.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        entries, start = tensor_entries(file)
        for name, entry in entries.items():
            if name in tensors:
                raise UserError(
                    f"{tensors[name].file} and {file.name} both hold {name}: delete the file that does not belong to "
                    "the checkpoint, or copy the checkpoint again"
                )
            spec = TensorSpec(entry["dtype"], tuple(entry["shape"]))
            tensors[name] = StoredTensor(file, spec, start + entry["data_offsets"][0])
        if len(tensors) > MAX_TENSORS:
            raise UserError(f"{file.parent} holds more than {MAX_TENSORS:,} tensors: gemq reads no such checkpoint")
    return tensors


def read_json(path: Path, *, unique_keys: bool = False) -> Any:
    """Return the contents of a small JSON file.

    Args:
        path: a regular file of UTF-8 text
        unique_keys: refuse an object that has a key twice, of which JSON parsers take the first or the last

    Raises:
        UserError: the file is missing, too large, or not JSON.
    """
    _check_regular(path)
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise OSError(errno.EFBIG, f"{size:,} bytes are too many for a JSON file")
        text = path.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=_unique_keys if unique_keys else None)
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): copy the checkpoint again") from error
    except _DuplicateKeyError as error:
        raise UserError(f"{path} has the key {error.key!r} twice: copy the checkpoint again") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: copy the checkpoint again") from error


class _DuplicateKeyError(ValueError):
    """A JSON object has a key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Serve json.loads as an ``object_pairs_hook`` that refuses duplicate keys."""
    values = dict(pairs)
    if len(values) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _DuplicateKeyError(counts.most_common(1)[0][0])
    return values


def read_header(file: Path) -> dict[str, TensorSpec]:
    """Return the tensors of a safetensors file, from its header. Raises UserError if it is missing or damaged."""
    header, _ = tensor_entries(file)
    return {name: TensorSpec(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}


def tensor_entries(path: Path) -> tuple[dict[str, Any], int]:
    """Return the entry of each tensor in a safetensors header, and the position in the file of offset 0.

    Each entry must have a known dtype, a shape of integers, and offsets that fit both and leave no gap.

    Raises:
        UserError: the file is missing or cut short, or its header is damaged.
    """
    text, size = _header_text(path)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique_keys) if text.startswith(b"{") else None
    except _DuplicateKeyError as error:
        raise UserError(f"the header of {path} lists {error.key!r} twice: copy the checkpoint again") from error
    except (ValueError, RecursionError):  # not JSON, or not UTF-8
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{path} is cut short or not a safetensors file: copy the checkpoint again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"the header of {path} is damaged (its metadata is not text): copy the checkpoint again")
    damage = next(_find_damage(header), None)
    if damage is not None:
        raise UserError(f"the header of {path} is damaged ({damage}): copy the checkpoint again")
    data_start = LENGTH_BYTES + len(text)
    data_end = data_start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if data_end != size:
        raise UserError(f"{path} has {size} bytes instead of {data_end}: copy the checkpoint again")
    return header, data_start


def _header_text(path: Path) -> tuple[bytes, int]:
    """Return the header of a safetensors file, empty if the file is too short for it, and the size of the file."""
    _check_regular(path)
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            if length > size - LENGTH_BYTES:
                return b"", size
            if length > MAX_HEADER_BYTES:
                raise UserError(f"the header of {path} has {length:,} bytes: gemq reads at most {MAX_HEADER_BYTES:,}")
            return stream.read(length), size
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): copy the checkpoint again") from error


def _find_damage(header: dict[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the entries of a header."""
    ranges = []
    for name, entry in header.items():
        fields = entry if isinstance(entry, dict) else {}
        dtype = fields.get("dtype")
        shape: Any = fields.get("shape")
        offsets: Any = fields.get("data_offsets")
        if not name.isprintable():
            yield f"a tensor has the name {name!r}"
        elif not isinstance(dtype, str) or dtype not in BITS:
            yield f"{name} has the unknown type {dtype!r}"
        elif not _are_integers(shape):
            yield f"{name} has the shape {shape!r}"
        elif not _are_integers(offsets) or len(offsets) != 2:
            yield f"{name} has the offsets {offsets!r}"
        elif 8 * (offsets[1] - offsets[0]) != math.prod(shape) * BITS[dtype]:
            yield f"{name} has {offsets[1] - offsets[0]} bytes, which do not fit {dtype} {shape}"
        else:
            ranges.append((offsets[0], offsets[1], name))
    previous_end = 0
    for start, end, name in sorted(ranges):
        if start != previous_end:
            yield f"{name} does not begin where the tensor before it ends"
        previous_end = end


def _check_regular(path: Path) -> None:
    """Raise UserError if there is no such file, or if opening it may block: a pipe or a device."""
    if not is_file(path):
        raise UserError(f"{path} is missing or not a regular file: copy the checkpoint again")


def is_file(path: Path) -> bool:
    """Whether ``path`` is a regular file or a link to one. False if the system refuses to look it up."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # no permission for a parent directory, or a name that is too long or has a NUL
        return False


def _are_integers(values: Any) -> bool:
    """Whether ``values`` is a list of non-negative 64-bit integers."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _explicit_name(directory: Path) -> str | None:
    """Return what config.json names as ``transformers_weights``. A missing config.json is reported elsewhere."""
    if not is_file(directory / "config.json"):
        return None
    config = read_json(directory / "config.json")
    name = config.get(WEIGHTS_KEY) if isinstance(config, dict) else None
    if is_notice(name):
        return None
    if name is not None and not (isinstance(name, str) and name.endswith((".safetensors", ".safetensors.index.json"))):
        raise UserError(
            f"config.json of {directory} names {name!r} as transformers_weights: gemq reads safetensors files alone, "
            "no pickled ones"
        )
    return name


def _weight_file(directory: Path, name: str, origin: str) -> Path:
    """Return the file ``name`` of a directory, which the file ``origin`` lists.

    Raises:
        UserError: the name leads out of the directory, is not that of a safetensors file, or there is no such file.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UserError(f"{origin} of {directory} names {name!r}, outside the directory: copy the model again")
    if not name.endswith(".safetensors"):
        raise UserError(f"{origin} of {directory} names {name!r}: gemq reads safetensors files alone, no pickled ones")
    if not is_file(directory / name):
        raise UserError(f"{directory / name} is missing, which {origin} names: copy the checkpoint again")
    return directory / name


def _explain_no_weights(directory: Path) -> str:
    """Return why a directory has no weights that gemq reads."""
    file_names = sorted(path.name for path in directory.glob("*.safetensors"))
    if file_names:
        return (
            f"{directory} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}, though it holds {file_names[0]}: "
            "copy the missing file, or rename the weights"
        )
    if any(path.suffix in PICKLED for path in directory.glob("*")):
        return (
            f"{directory} holds no safetensors weights: gemq reads no pickled files; load the model with Transformers "
            "and save it again with save_pretrained"
        )
    return f"{directory} holds no safetensors weights: copy the checkpoint again"
