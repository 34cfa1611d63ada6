"""The safetensors files of a model directory: which files hold its weights, and what their headers list.

Every reader of weights takes its list of files from here, so that all of them read the same files as Transformers.
Reads JSON and headers only. Imports neither torch nor Transformers.
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

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
"""Suffixes of files in which weights are pickled."""

MAX_HEADER_BYTES = 32_000_000
"""Upper bound for one header: about 250,000 tensors with names of usual length, read in about two seconds. The largest
published models have 100,000 to 200,000 tensors in all their files together."""

MAX_TENSORS = 1_000_000
"""Upper bound for the tensors of all files together."""

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
    """A tensor as a safetensors header describes it: dtype (``U8`` if packed) and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BITS[self.dtype] // 8


class StoredTensor(NamedTuple):
    """Where a tensor is stored: its file, its specification, and the position of its first byte in the file."""

    file: Path
    spec: TensorSpec
    start: int


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that hold a model's weights, in the order of their names.

    The choice is Transformers': the file that config.json names as ``transformers_weights``, else model.safetensors,
    else the files of model.safetensors.index.json. Other safetensors files in the directory do not belong to the model.

    Raises:
        UserError: no such file, a missing shard, a damaged index, or an index that names files outside the directory
            or files that are not safetensors.
    """
    chosen = _explicit_name(directory) or (WEIGHTS_NAME if is_file(directory / WEIGHTS_NAME) else INDEX_NAME)
    if not chosen.endswith(".json"):
        return [_inside(directory, chosen, "config.json")]
    index = directory / chosen
    if not is_file(index):
        raise UserError(_no_weights(directory))
    shards = sorted(set(read_index(index).values()))
    return [_inside(directory, name, index.name) for name in shards]


def read_index(index: Path) -> dict[str, str]:
    """The ``weight_map`` of an index: name of each tensor -> name of its file. Raises UserError for a damaged one."""
    values = read_json(index)
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise UserError(f"{index} lists no files (its weight_map is damaged): copy the checkpoint again")
    if not isinstance(values.get("metadata"), dict):
        raise UserError(f"{index} has no metadata, which Transformers needs: copy the checkpoint again")
    return weight_map


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """The tensors of safetensors files by name, from their headers.

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
    """The contents of a small JSON file.

    Args:
        path: a regular file of UTF-8 text
        unique_keys: refuse an object that has a key twice; JSON parsers take the first or the last of them

    Raises:
        UserError: the file is missing, too large, or not JSON.
    """
    _check_regular(path)
    try:
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
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
    """A JSON object with a key twice."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """``object_pairs_hook`` of json.loads that refuses duplicate keys."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise _DuplicateKeyError(Counter(key for key, _ in pairs).most_common(1)[0][0])
    return values


def read_header(file: Path) -> dict[str, TensorSpec]:
    """Tensors of a safetensors file, from its header alone. Raises UserError when it is missing or damaged."""
    header, _ = tensor_entries(file)
    return {name: TensorSpec(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}


def tensor_entries(path: Path) -> tuple[dict[str, Any], int]:
    """The entry of each tensor in a safetensors header, and the position in the file that offsets count from.

    Every entry is checked: a known dtype, a shape of integers, and offsets that fit both and leave no gap.

    Raises:
        UserError: the file is missing, cut short, or its header is damaged.
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
    length = len(text)
    if damage := next(_damages(header), None):
        raise UserError(f"the header of {path} is damaged ({damage}): copy the checkpoint again")
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise UserError(f"{path} has {size} bytes instead of {8 + length + end}: copy the checkpoint again")
    return header, 8 + length


def _header_text(path: Path) -> tuple[bytes, int]:
    """The header of a safetensors file, empty when the file is too short for it, and the size of the file."""
    _check_regular(path)
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            length = int.from_bytes(stream.read(8), "little")
            if length > size - 8:
                return b"", size
            if length > MAX_HEADER_BYTES:
                raise UserError(f"the header of {path} has {length:,} bytes: gemq reads at most {MAX_HEADER_BYTES:,}")
            return stream.read(length), size
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): copy the checkpoint again") from error


def _damages(header: dict[str, Any]) -> Iterator[str]:
    """What is wrong with the entries of a header."""
    begins = []
    for name, entry in header.items():
        values: list[Any] = [None] * 3
        if isinstance(entry, dict):
            values = [entry.get(key) for key in ("dtype", "shape", "data_offsets")]
        dtype, shape, offsets = values
        if not name.isprintable():
            yield f"a tensor has the name {name!r}"
        elif not isinstance(dtype, str) or dtype not in BITS:
            yield f"{name} has the unknown type {dtype!r}"
        elif not _is_integers(shape):
            yield f"{name} has the shape {shape!r}"
        elif not _is_integers(offsets) or len(offsets) != 2:
            yield f"{name} has the offsets {offsets!r}"
        elif 8 * (offsets[1] - offsets[0]) != math.prod(shape) * BITS[dtype]:
            yield f"{name} has {offsets[1] - offsets[0]} bytes, which do not fit {dtype} {shape}"
        else:
            begins.append((offsets[0], offsets[1], name))
    position = 0
    for begin, end, name in sorted(begins):
        if begin != position:
            yield f"{name} does not begin where the tensor before it ends"
        position = end


def _check_regular(path: Path) -> None:
    """Refuses what is absent, and what opening would wait for: pipes and devices."""
    if not is_file(path):
        raise UserError(f"{path} is missing or not a regular file: copy the checkpoint again")


def is_file(path: Path) -> bool:
    """Whether a regular file is there, which links may lead to. False for what the system refuses to look up."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # no permission for a directory on the way, a name that is too long or has a NUL
        return False


def _is_integers(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def _explicit_name(directory: Path) -> str | None:
    """What config.json names as ``transformers_weights``. None without config.json, which other checks report."""
    if not is_file(directory / "config.json"):
        return None
    config = read_json(directory / "config.json")
    name = config.get("transformers_weights") if isinstance(config, dict) else None
    if name is not None and not (isinstance(name, str) and name.endswith((".safetensors", ".safetensors.index.json"))):
        raise UserError(
            f"config.json of {directory} names {name!r} as transformers_weights: gemq reads safetensors files alone, "
            "no pickled ones"
        )
    return name


def _inside(directory: Path, name: str, origin: str) -> Path:
    """The file ``name`` of a directory. Raises UserError for a path that leaves it and for what is not safetensors."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name:
        raise UserError(f"{origin} of {directory} names {name!r}, outside the directory: copy the model again")
    if not name.endswith(".safetensors"):
        raise UserError(f"{origin} of {directory} names {name!r}: gemq reads safetensors files alone, no pickled ones")
    if not is_file(directory / name):
        raise UserError(f"{directory / name} is missing, which {origin} names: copy the checkpoint again")
    return directory / name


def _no_weights(directory: Path) -> str:
    """Why a directory has no weights that gemq reads."""
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        return (
            f"{directory} holds neither {WEIGHTS_NAME} nor {INDEX_NAME}, though it holds {others[0]}: "
            "copy the missing file, or rename the weights"
        )
    if any(path.suffix in PICKLED for path in directory.glob("*")):
        return (
            f"{directory} holds no safetensors weights: gemq reads no pickled files; load the model with Transformers "
            "and save it again with save_pretrained"
        )
    return f"{directory} holds no safetensors weights: copy the checkpoint again"
