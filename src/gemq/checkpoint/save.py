"""Writes checkpoints: streamed, atomic, and with the same bytes every time.

Everything is written to a sibling directory ``.{name}.partial``, which is renamed at the end. An output directory is
therefore complete or absent. Files contain no path or host name, and only the report page contains times.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from gemq.checkpoint.checksums import compute_checksums
from gemq.checkpoint.format import CONFIG_KEY, PackedFormat
from gemq.checkpoint.names import hub_state
from gemq.checkpoint.outputs import partial_directory, remove_partial
from gemq.checkpoint.small_files import small_files
from gemq.errors import UserError
from gemq.runtime.compat import transformers_private
from gemq.runtime.files import disk_errors, flush_to_disk
from gemq.runtime.safetensors_files import stored_tensors, weight_files
from gemq.runtime.weights_notice import NOTICE, WEIGHTS_KEY

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

SHARD_BYTES = 4_000_000_000


def write_checkpoint(
    out: Path,
    *,
    config: PreTrainedConfig,
    packed_format: PackedFormat,
    shards: Iterable[Mapping[str, Tensor]],
    source: Path | None,
    texts: Mapping[str, str] | None = None,
    about: Mapping[str, Any] | None = None,
    shard_bytes: float = SHARD_BYTES,
) -> None:
    """Writes a packed checkpoint.

    Args:
        out: directory to write, which must not exist or be empty
        config: of the model
        packed_format: which matrices are packed
        shards: dicts of tensors by name in the files, such as one dict per layer; consumed one at a time
        source: local directory of the original model, whose tokenizer and other small files are copied
        texts: contents of further files by name, such as README.md
        about: more values for ``quantization_config``, see ``checkpoint.format.ABOUT_KEYS``
        shard_bytes: approximate size of a file; a larger tensor gets its own file

    Raises:
        UserError: ``out`` exists, or the disk is full or not writable.
    """
    about = {**packed_format.to_dict(), **(about or {})}
    values = {**config_values(config), WEIGHTS_KEY: NOTICE, "quantization_config": about}
    required = set(packed_format.tensor_names())
    write_directory(out, values, shards, source, texts=texts, shard_bytes=shard_bytes, required=required)


def dense_state(
    model: PreTrainedModel, packed_format: PackedFormat, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Returns the unpacked tensors of a checkpoint by hub name.

    Tied weights are left out, since Transformers ties them again when it loads the model.

    Args:
        model: the full-precision model; provides names and conversions, and may be on the meta device
        packed_format: which matrices are packed
        tensors: by name in the model, for part of the model (complete layers); None: ``model.state_dict()``
    """
    packed = packed_format.replaced_names()
    skipped = packed | set(transformers_private.tied_weights(model))
    state = model.state_dict() if tensors is None else tensors
    unpacked = {name: tensor.detach() for name, tensor in state.items() if name not in skipped}
    return hub_state(model, unpacked, packed)


def write_directory(
    out: Path,
    config: Mapping[str, Any],
    shards: Iterable[Mapping[str, Tensor]],
    source: Path | None,
    *,
    texts: Mapping[str, str] | None = None,
    shard_bytes: float,
    required: Collection[str] = (),
) -> None:
    """Writes a checkpoint directory atomically.

    Args:
        out: directory to write, which must not exist or be empty
        config: contents of config.json
        texts: contents of further files by name
        required: names of tensors that must be in the shards
    """
    out = Path(out).resolve()  # follows links, so that the rename stays on one file system
    partial = partial_directory(out)
    _check_vacant(out)
    copied_files = {} if source is None else small_files(source)
    with disk_errors(out):
        remove_partial(partial)
        partial.mkdir(parents=True)
    try:
        written = _write_shards(partial, shards, shard_bytes, out)
        missing = set(required) - written
        if missing:
            raise ValueError(f"{len(missing)} packed tensors were not given, such as {min(missing)}")
        with disk_errors(out):
            for name, file in copied_files.items():
                (partial / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, partial / name)
            for name, text in (texts or {}).items():
                _write_text(partial / name, text)
            if "quantization_config" in config:
                checksums = compute_checksums(config, stored_tensors(weight_files(partial)))
                config = {**config, CONFIG_KEY: checksums.to_dict()}
            _write_json(partial / "config.json", config)
            _flush_files(partial)
            os.replace(partial, out)  # also replaces an empty directory
            flush_to_disk(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # after a success it does not exist


def _flush_files(directory: Path) -> None:
    """Flushes a directory to disk, with the same permissions for all files. safetensors files are private at first."""
    mode = (directory / "config.json").stat().st_mode
    for file in directory.rglob("*"):
        if file.is_file():
            file.chmod(mode)
        flush_to_disk(file)
    flush_to_disk(directory)


def _check_vacant(out: Path) -> None:
    """Raises UserError if ``out`` exists, unless it is an empty directory."""
    with disk_errors(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and is not an empty directory: choose another output, or delete it")


def _write_shards(directory: Path, shards: Iterable[Mapping[str, Tensor]], shard_bytes: float, out: Path) -> set[str]:
    """Writes the tensors and, if there are several files, the index. Returns the names of the tensors.

    Args:
        directory: to write to
        shard_bytes: approximate size of a file
        out: the final directory, for error messages
    """
    names_by_file: list[list[str]] = []
    batch: dict[str, Tensor] = {}
    batch_bytes = 0
    total_bytes = 0
    written: set[str] = set()
    addresses: set[int] = set()

    def flush() -> None:
        names_by_file.append(sorted(batch))
        with disk_errors(out):
            save_file(batch, _numbered_file(directory, len(names_by_file)), metadata={"format": "pt"})

    for shard in shards:
        for name, tensor in shard.items():
            if name in written:
                raise ValueError(f"tensor {name} was given twice")
            if batch and batch_bytes + tensor.nbytes > shard_bytes:
                flush()
                batch = {}
                batch_bytes = 0
                addresses = set()
            tensor = tensor.detach().to("cpu").contiguous()
            if tensor.untyped_storage().nbytes() != tensor.nbytes or tensor.data_ptr() in addresses:
                tensor = tensor.clone()  # safetensors refuses views of a shared buffer
            batch[name] = tensor
            addresses.add(tensor.data_ptr())
            batch_bytes += tensor.nbytes
            total_bytes += tensor.nbytes
            written.add(name)
    flush()
    with disk_errors(out):
        _name_shards(directory, names_by_file, total_bytes)
    return written


def _numbered_file(directory: Path, number: int) -> Path:
    """Returns the file of a shard before the number of shards is known. ``number`` starts at 1."""
    return directory / f"{number}.safetensors"


def _name_shards(directory: Path, names_by_file: list[list[str]], total_bytes: int) -> None:
    """Gives the numbered files their final names and, if there are several, writes the index."""
    count = len(names_by_file)
    if count == 1:
        os.rename(_numbered_file(directory, 1), directory / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(names_by_file, start=1):
        file_name = f"model-{number:05d}-of-{count:05d}.safetensors"
        os.rename(_numbered_file(directory, number), directory / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(directory / "model.safetensors.index.json", index)


def config_values(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns config.json as ``save_pretrained`` would write it, without entries that describe the original's files."""
    values = json.loads(config.to_json_string(use_diff=True))
    for name in ("quantization_config", WEIGHTS_KEY, CONFIG_KEY):
        values.pop(name, None)
    return values


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Writes indented JSON with sorted keys."""
    _write_text(file, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _write_text(file: Path, text: str) -> None:
    """Writes UTF-8 text with LF line endings."""
    file.write_text(text, encoding="utf-8", newline="\n")
