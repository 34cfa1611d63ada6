"""Writing checkpoints: streamed, atomic, with the same bytes every time.

Everything goes to a sibling directory ``.{name}.partial`` that is renamed once all is on disk: an output
directory is complete or absent. Files hold no time, path or host name.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor

from gemq.checkpoint.checksums import KEY, checksums_of
from gemq.checkpoint.format import PackedFormat
from gemq.checkpoint.names import hub_state
from gemq.checkpoint.outputs import partial_directory, remove_partial
from gemq.checkpoint.small_files import small_files
from gemq.errors import UserError
from gemq.runtime.files import disk_errors, flush_to_disk
from gemq.runtime.safetensors_files import stored_tensors, weight_files

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

SHARD_BYTES = 4_000_000_000


def write_checkpoint(
    out: Path,
    *,
    config: PreTrainedConfig,
    packed_format: PackedFormat,
    shards: Iterable[Mapping[str, Tensor]],
    source: Path | None,
    generation_config: GenerationConfig | None = None,
    model_card: str,
    shard_bytes: float = SHARD_BYTES,
) -> None:
    """Writes a packed checkpoint to ``out``, which must not exist or be empty.

    shards:  dicts of tensors under their final names, a layer each and then the rest; consumed one at a time
             and gathered into files of about ``shard_bytes`` bytes (a larger tensor gets its own file)
    source:  local directory of the original model, whose tokenizer and other small files are copied
    Raises UserError when ``out`` is taken or the disk refuses.
    """
    values = {**config_values(config), "quantization_config": packed_format.to_dict()}
    required = set(packed_format.tensor_names())
    write_directory(out, values, shards, source, generation_config, model_card, shard_bytes, required)


def dense_state(
    model: PreTrainedModel, packed_format: PackedFormat, tensors: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """What a checkpoint stores beside the packed tensors, under the names that the family uses on the hub.

    model:   the full-precision model; it gives names and conversions and may be on the meta device
    tensors: in-model name -> tensor, for a part of the model (whole layers); default ``model.state_dict()``
    Tied weights are left out: Transformers ties them again when it loads.
    """
    packed = packed_format.replaced_names()
    skipped = packed | set(model.all_tied_weights_keys)
    kept = model.state_dict() if tensors is None else tensors
    return hub_state(model, {name: tensor.detach() for name, tensor in kept.items() if name not in skipped}, packed)


def model_card(base_model: str | None = None, facts: str = "") -> str:
    """README.md of a packed checkpoint.

    base_model: hub id, never a local path
    facts:      Markdown on how it was made and what it scores
    """
    front = ["library_name: transformers", "tags:", "- gemq", "- moe", "- quantized"]
    if base_model:
        front.append(f"base_model: {base_model}")
    name = base_model or "A Mixture-of-Experts model"
    body = f"""# {name}, quantized with gemq

Every matrix of every expert has a bit-width of its own. Loading needs the `gemq` package:

```python
import gemq
from transformers import AutoTokenizer

path = "."  # the directory of this file, or its id on the hub
model = gemq.load(path)
tokenizer = AutoTokenizer.from_pretrained(path)
```

After `import gemq`, Transformers' Auto classes load it as well. Without that import Transformers only warns, and the
experts are RANDOM.
"""
    return "\n".join(["---", *front, "---", "", body]) + (f"\n{facts.strip()}\n" if facts.strip() else "")


def write_directory(
    out: Path,
    config: Mapping[str, Any],
    shards: Iterable[Mapping[str, Tensor]],
    source: Path | None,
    generation_config: GenerationConfig | None,
    readme: str | None,
    shard_bytes: float,
    required: set[str],
) -> None:
    """One atomic checkpoint directory. ``required`` are tensor names that must be among the shards."""
    out = Path(out).resolve()  # behind a link, so that the rename stays on one file system
    partial = partial_directory(out)
    check_free(out)
    copied = {} if source is None else small_files(source)
    with disk_errors(out):
        remove_partial(partial)
        partial.mkdir(parents=True)
    try:
        written = _write_shards(partial, shards, shard_bytes, out)
        if absent := required - written:
            raise ValueError(f"{len(absent)} packed tensors were not given, such as {min(absent)}")
        with disk_errors(out):
            for name, file in copied.items():
                (partial / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, partial / name)
            if generation_config is not None:
                _write_text(partial / "generation_config.json", generation_config.to_json_string(use_diff=True))
            if readme is not None:
                _write_text(partial / "README.md", readme)
            if "quantization_config" in config:
                checksums = checksums_of(config, stored_tensors(weight_files(partial)))
                config = {**config, KEY: checksums.to_dict()}
            _write_json(partial / "config.json", config)
            mode = (partial / "config.json").stat().st_mode
            for file in partial.rglob("*"):
                if file.is_file():
                    file.chmod(mode)  # safetensors makes files that only their owner can read
                flush_to_disk(file)
            flush_to_disk(partial)
            os.replace(partial, out)  # an empty directory in the way is replaced
            flush_to_disk(out.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already when all went well


def check_free(out: Path) -> None:
    """Raises UserError when ``out`` is there already, unless it is an empty directory."""
    with disk_errors(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out} exists and is not an empty directory: choose another output, or delete it")


def _write_shards(directory: Path, shards: Iterable[Mapping[str, Tensor]], shard_bytes: float, out: Path) -> set[str]:
    """Writes the tensors and, for more than one file, the index. Returns the names written."""
    files: list[list[str]] = []
    total = 0

    def flush(batch: dict[str, Tensor]) -> None:
        files.append(sorted(batch))
        with disk_errors(out):
            save_file(batch, directory / f"{len(files)}.safetensors", metadata={"format": "pt"})

    batch: dict[str, Tensor] = {}
    batch_bytes, written, places = 0, set(), set[int]()
    for name, tensor in (item for shard in shards for item in shard.items()):
        if name in written:
            raise ValueError(f"tensor {name} was given twice")
        if batch and batch_bytes + tensor.nbytes > shard_bytes:
            flush(batch)
            batch, batch_bytes, places = {}, 0, set()
        tensor = tensor.detach().to("cpu").contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes or tensor.data_ptr() in places:
            tensor = tensor.clone()  # views of one buffer would count as shared memory, which safetensors refuses
        batch[name] = tensor
        places.add(tensor.data_ptr())
        batch_bytes += tensor.nbytes
        total += tensor.nbytes
        written.add(name)
    flush(batch)

    n = len(files)
    names = [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)] if n > 1 else ["model.safetensors"]
    with disk_errors(out):
        for i, name in enumerate(names, start=1):
            os.rename(directory / f"{i}.safetensors", directory / name)
        if n > 1:
            weight_map = {tensor: file for file, tensors in zip(names, files, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            _write_json(directory / "model.safetensors.index.json", index)
    return written


def config_values(config: PreTrainedConfig) -> dict[str, Any]:
    """config.json as ``save_pretrained`` would write it: no path, no private state."""
    values = json.loads(config.to_json_string(use_diff=True))
    for name in ("quantization_config", "transformers_weights", KEY):  # true of the original's files only
        values.pop(name, None)
    return values


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    _write_text(file, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="\n")
