"""A packed checkpoint as it is stored: config.json, the list of weight files and their headers, all of them checked.

Every reader of packed checkpoints starts here, so that all of them read the same files and refuse a damaged checkpoint
with the same line. Imports neither torch nor Transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gemq.checkpoint.checksums import Checksums, tensor_digests
from gemq.checkpoint.format import PackedFormat, read_packed_config
from gemq.errors import UserError
from gemq.models.size_limits import StoredSize, check_config_sizes
from gemq.runtime.processes import block_sigterm
from gemq.runtime.safetensors_files import StoredTensor, TensorSpec, stored_tensors, weight_files

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class StoredCheckpoint:
    """The contents of config.json, what it lists as packed, and the tensors of the files under their stored names."""

    directory: Path
    config: Mapping[str, Any]
    format: PackedFormat
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, directory: Path) -> StoredCheckpoint:
        """Reads config.json and headers.

        Raises:
            UserError: the directory is no packed checkpoint, its config.json, its index or a header is damaged, a file
                is missing or pickled, an adapter lies beside the weights, or config.json claims more layers, experts
                or labels than the files can hold.
        """
        config = read_packed_config(directory)
        packed_format = PackedFormat.from_dict(config["quantization_config"])
        check_no_adapter(directory)
        checkpoint = cls(directory, config, packed_format, stored_tensors(weight_files(directory)))
        check_config_sizes(config, directory, checkpoint.size)
        return checkpoint

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor by its stored name."""
        return {name: stored.spec for name, stored in self.tensors.items()}

    @property
    def files(self) -> set[Path]:
        """The weight files that hold tensors."""
        return {stored.file for stored in self.tensors.values()}

    @cached_property
    def size(self) -> StoredSize:
        return StoredSize.of(self.tensors)

    @cached_property
    def checksums(self) -> Checksums:
        """Those that config.json lists. Raises UserError when they are damaged."""
        return Checksums.from_config(self.config)

    def check_config(self) -> None:
        """Raises UserError when config.json is not the one that gemq wrote. Nothing happens without a checksum."""
        self.checksums.check_config(self.config, self.directory)

    def check_data(self) -> None:
        """Reads every byte of the weights. Raises UserError when they are not those that gemq wrote."""
        if self.checksums.tensors is not None:
            self.checksums.check_tensors(self.tensors, tensor_digests(self.tensors), self.directory)


class DataCheck:
    """``StoredCheckpoint.check_data`` in a thread, while something else reads the same files."""

    def __init__(self, checkpoint: StoredCheckpoint) -> None:
        """Begins. Raises UserError for damaged checksums."""
        self._result: Future[None] | None = None
        if checkpoint.checksums.tensors is not None:
            pool = ThreadPoolExecutor(1, "gemq-checksums", initializer=block_sigterm)
            self._result = pool.submit(checkpoint.check_data)
            pool.shutdown(wait=False)

    def result(self) -> None:
        """Waits for the end. Raises UserError when the weights are not those that gemq wrote."""
        if self._result is not None:
            self._result.result()


def check_no_adapter(directory: Path) -> None:
    """Refuses a directory with an adapter beside the model: Transformers would apply it if peft is installed."""
    if (directory / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{directory} holds an adapter beside the packed model ({ADAPTER_CONFIG}): move the adapter's files into a "
            "directory of their own and load it from there with peft"
        )
