"""Limits for models that are built from a config.json: its numbers must be consistent with the weight files.

Building a model takes memory and time in proportion to numbers in config.json, also on the meta device: a Python object
for each layer, a label for each class. A wrong digit must end in a message and not take hours. Counts are therefore
compared with the headers of the files before Transformers reads them, and construction stops when the model becomes
larger than its files.
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
"""Names of numbers that determine how many Python objects Transformers creates. Sizes, such as
``vocab_size_per_layer_input``, do not."""

ALWAYS_ALLOWED = 1 << 16
"""A count that costs nothing. Sizes of chunks and images, which are no dimension of a weight, are smaller."""

MAX_MODULES_PER_TENSOR = 100
ALWAYS_ALLOWED_MODULES = 1_000
MAX_MODULES_WITHOUT_FILES = 1_000_000
"""Limits for the number of modules, which includes modules without weights: activations, dropout, containers."""

MAX_ELEMENTS_PER_BYTE = 16
ALWAYS_ALLOWED_ELEMENTS = 100_000_000
"""Limits for the number of elements. A byte may hold eight codes, and buffers such as masks are not in the files."""


class StoredSize(NamedTuple):
    """Size of a model's weight files.

    Attributes:
        tensors: number of tensors
        bytes: of all tensors
        largest: dimension of a tensor
    """

    tensors: int
    bytes: int
    largest: int

    @classmethod
    def of(cls, tensors: Mapping[str, StoredTensor]) -> StoredSize:
        """Returns the size of tensors."""
        num_bytes = 0
        largest = 0
        for stored in tensors.values():
            num_bytes += stored.spec.bytes
            largest = max(largest, max(stored.spec.shape, default=0))
        return cls(len(tensors), num_bytes, largest)

    @classmethod
    def in_directory(cls, directory: Path) -> StoredSize:
        """Returns the size of a model's files, or zeros if there are none. Raises UserError for damaged headers."""
        try:
            files = weight_files(directory)
        except UserError:  # reported when the weights are read
            return cls(0, 0, 0)
        return _size_of_files(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=8)
def _size_of_files(files: tuple[tuple[Path, int, int], ...]) -> StoredSize:
    """Returns the size of files, given with their sizes and times. Cached, since a job calls it several times."""
    return StoredSize.of(stored_tensors(file for file, _, _ in files))


def check_config_sizes(config: Any, directory: Path, stored: StoredSize) -> None:
    """Raises UserError if a count in ``config``, the contents of config.json, exceeds what the files can hold."""
    limit = max(ALWAYS_ALLOWED, stored.tensors, stored.largest)
    for path, value in _integers(config, ""):
        if value > limit and COUNTS.search(path.rpartition(".")[2]):
            raise UserError(
                f"config.json of {directory} has {path} = {value}, more than its weights can hold "
                f"({stored.tensors} tensors): copy the checkpoint again"
            )


def check_source_sizes(directory: Path) -> None:
    """``check_config_sizes`` for a full-precision model. If there are no weight files, counts have a fixed limit."""
    check_config_sizes(read_json(directory / "config.json"), directory, StoredSize.in_directory(directory))


@contextmanager
def bounded_construction(directory: Path, stored: StoredSize | None = None) -> Iterator[None]:
    """Raises UserError inside the context when a model under construction becomes larger than its weight files.

    Counts submodules, and elements of parameters and buffers, when they are registered. Not thread-safe.

    Args:
        directory: of the model's files
        stored: size of the files, if it is known
    """
    from torch.nn.modules import module as hooks

    if stored is None:
        stored = StoredSize.in_directory(directory)
    max_modules = MAX_MODULES_WITHOUT_FILES
    max_elements = None
    if stored.tensors:
        max_modules = ALWAYS_ALLOWED_MODULES + MAX_MODULES_PER_TENSOR * stored.tensors
        max_elements = ALWAYS_ALLOWED_ELEMENTS + MAX_ELEMENTS_PER_BYTE * stored.bytes
    modules = elements = 0

    def count_module(module: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        if modules > max_modules:
            raise _too_large(directory)

    def count_elements(module: nn.Module, name: str, tensor: Any) -> None:
        nonlocal elements
        elements += 0 if tensor is None else tensor.numel()
        if max_elements is not None and elements > max_elements:
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
    """Yields the absolute values of all integers in JSON values, with their paths.

    Skips quantization settings, which have their own checks.
    """
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
    """Returns the error for a model that is larger than its files."""
    return UserError(f"config.json of {directory} describes a larger model than its weights: copy the checkpoint again")
