"""A packed checkpoint on disk: config.json, the list of weight files, and their headers.

All readers of packed checkpoints start here, so that they read the same files and report damage with the same message.
Must not import torch or Transformers.
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
from gemq.runtime.safetensors_files import StoredTensor, TensorSpec, stored_tensors, weight_files

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class StoredCheckpoint:
    """The headers of a packed checkpoint.

    Attributes:
        directory: of the checkpoint
        config: contents of config.json
        format: which matrices are packed
        tensors: all tensors by their names in the files
    """

    directory: Path
    config: Mapping[str, Any]
    format: PackedFormat
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, directory: Path) -> StoredCheckpoint:
        """Reads config.json and headers.

        Raises:
            UserError: the directory is no packed checkpoint; its config.json, its index or a header is damaged; a file
                is missing or pickled; there is an adapter next to the weights; or config.json claims more layers,
                experts or labels than the files can hold.
        """
        config = read_packed_config(directory)
        packed_format = PackedFormat.from_dict(config["quantization_config"])
        check_no_adapter(directory)
        checkpoint = cls(directory, config, packed_format, stored_tensors(weight_files(directory)))
        check_config_sizes(config, directory, checkpoint.size)
        return checkpoint

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Dtype and shape of every tensor, by its name in the files."""
        return {name: stored.spec for name, stored in self.tensors.items()}

    @property
    def files(self) -> set[Path]:
        """The files that hold tensors."""
        return {stored.file for stored in self.tensors.values()}

    @cached_property
    def size(self) -> StoredSize:
        """Bytes and counts that limit what config.json may claim."""
        return StoredSize.of(self.tensors)

    @cached_property
    def checksums(self) -> Checksums:
        """The checksums in config.json. Raises UserError if they are damaged."""
        return Checksums.from_config(self.config)

    def check_config(self) -> None:
        """Raises UserError if config.json does not match its checksum, where there is one."""
        self.checksums.check_config(self.config, self.directory)

    def check_data(self) -> None:
        """Reads all weights. Raises UserError if they do not match their checksums, where there are any."""
        if self.checksums.tensors is not None:
            self.checksums.check_tensors(self.tensors, tensor_digests(self.tensors), self.directory)


class BackgroundDataCheck:
    """Runs ``StoredCheckpoint.check_data`` in a thread, while the caller reads the same files.

    Raises:
        UserError: from the constructor, if the checksums themselves are damaged.
    """

    def __init__(self, checkpoint: StoredCheckpoint) -> None:
        self._future: Future[None] | None = None
        if checkpoint.checksums.tensors is not None:
            pool = ThreadPoolExecutor(1, "gemq-checksums")
            self._future = pool.submit(checkpoint.check_data)
            pool.shutdown(wait=False)

    def result(self) -> None:
        """Waits for the check. Raises UserError if the weights do not match their checksums."""
        if self._future is not None:
            self._future.result()


def check_no_adapter(directory: Path) -> None:
    """Raises UserError if there is an adapter next to the model. Transformers would apply it if peft is installed."""
    if (directory / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{directory} holds an adapter next to the packed model ({ADAPTER_CONFIG}): move the adapter's files into "
            "a directory of their own and load it from there with peft"
        )
