"""Bounds for models that are built from a config.json: its numbers must agree with the headers of the weights.

Building a model takes memory and time by the numbers in config.json, also on the meta device: a Python object for each
layer, a label for each class. One wrong digit there must end in a line, not in hours. So counts are compared with the
headers before Transformers sees them, and construction stops as soon as a model grows larger than its files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gemq.errors import UserError
from gemq.runtime.safetensors_files import StoredTensor, read_json, stored_tensors, weight_files

if TYPE_CHECKING:
    from torch import nn

COUNTS = re.compile(r"^(?!.*(size|dim|length)).*(layer|expert|label|depth|block|stage|codebook|quantizer|level|head)")
"""Names of numbers for which Transformers makes so many Python objects. Sizes, such as ``vocab_size_per_layer_input``,
are none."""

ALWAYS_ALLOWED = 1 << 16
"""A count that costs nothing. Sizes of chunks and images, which no weight has, are below it."""

MODULES_PER_TENSOR, FEW_MODULES, MODULES_WITHOUT_FILES = 100, 1_000, 1_000_000
"""Modules without weights (activations, dropout, containers) come with those that have some."""

ELEMENTS_PER_BYTE, FEW_ELEMENTS = 16, 100_000_000
"""A byte may hold eight codes. Buffers such as masks are stored nowhere."""


class StoredSize(NamedTuple):
    """How much the weight files hold: tensors, their bytes, and the largest dimension of any."""

    tensors: int
    bytes: int
    largest: int

    @classmethod
    def of(cls, tensors: Mapping[str, StoredTensor]) -> StoredSize:
        specs = [stored.spec for stored in tensors.values()]
        largest = max((dimension for spec in specs for dimension in spec.shape), default=0)
        return cls(len(specs), sum(spec.bytes for spec in specs), largest)

    @classmethod
    def in_directory(cls, directory: Path) -> StoredSize:
        """Zeros where the weights are not there (yet). Raises UserError for damaged headers."""
        try:
            files = weight_files(directory)
        except UserError:  # whoever reads weights says so
            return cls(0, 0, 0)
        return _size_of(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=8)
def _size_of(files: tuple[tuple[Path, int, int], ...]) -> StoredSize:
    """Of files with their sizes and times: a job asks several times."""
    return StoredSize.of(stored_tensors(file for file, _, _ in files))


def check_config_sizes(config: Any, directory: Path, stored: StoredSize) -> None:
    """Raises UserError when a count in ``config``, the contents of config.json, is beyond what the files can hold."""
    bound = max(ALWAYS_ALLOWED, stored.tensors, stored.largest)
    for path, value in _integers(config, ""):
        if value > bound and COUNTS.search(path.rpartition(".")[2]):
            raise UserError(
                f"config.json of {directory} has {path} = {value}, more than its weights can hold "
                f"({stored.tensors} tensors): copy the checkpoint again"
            )


def check_source_sizes(directory: Path) -> None:
    """The same check for a full-precision model. Without weights beside config.json, counts have a fixed bound."""
    check_config_sizes(read_json(directory / "config.json"), directory, StoredSize.in_directory(directory))


@contextmanager
def bounded_construction(directory: Path, stored: StoredSize | None = None) -> Iterator[None]:
    """Raises UserError inside as soon as a model under construction has grown beyond the weights in ``directory``.

    Counts what modules register: submodules, and elements of parameters and buffers. Not for several threads.

    Args:
        directory: of the model's files
        stored: what they hold, where their headers have been read already
    """
    from torch.nn.modules import module as hooks

    if stored is None:
        stored = StoredSize.in_directory(directory)
    most_modules = FEW_MODULES + MODULES_PER_TENSOR * stored.tensors if stored.tensors else MODULES_WITHOUT_FILES
    most_elements = FEW_ELEMENTS + ELEMENTS_PER_BYTE * stored.bytes if stored.tensors else None
    modules = elements = 0

    def count_module(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > most_modules:
            raise _too_large(directory)

    def count_elements(module: nn.Module, name: str, tensor: Any) -> None:
        nonlocal elements
        elements += 0 if tensor is None else tensor.numel()
        if most_elements is not None and elements > most_elements:
            raise _too_large(directory)

    handles = [
        hooks.register_module_module_registration_hook(count_module),
        hooks.register_module_parameter_registration_hook(count_elements),
        hooks.register_module_buffer_registration_hook(count_elements),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _integers(values: Any, path: str) -> Iterator[tuple[str, int]]:
    """Every integer in JSON values, with the names that lead to it. Quantization settings have their own checks."""
    if isinstance(values, dict):
        for key, value in values.items():
            if key != "quantization_config":
                yield from _integers(value, f"{path}.{key}" if path else key)
    elif isinstance(values, list):
        for value in values:
            yield from _integers(value, path)
    elif isinstance(values, int):
        yield path, abs(values)


def _too_large(directory: Path) -> UserError:
    return UserError(f"config.json of {directory} describes a larger model than its weights: copy the checkpoint again")
