"""Checksums of a packed checkpoint: of its tensors, by layer, and of its config.json.

They find damage (flipped bits, swapped entries of a header, forgotten edits), not malice: whoever changes the weights
can change the checksums too. Every load verifies them, since XXH3 hashes 13 GB/s on a core on which SHA-256 does 1.5
and CRC-32 2.7. A checksum covers names, dtypes, shapes and bytes of tensors, whichever file holds them, so that a
checkpoint may be divided into other files. Imports neither torch nor Transformers.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_64, xxh3_64_hexdigest

from gemq.errors import UserError
from gemq.runtime.processes import block_sigterm
from gemq.runtime.safetensors_files import StoredTensor

KEY = "gemq_checksums"
"""Where config.json lists them. Not in its ``quantization_config``, which Transformers passes on to what it saves."""

ALGORITHM = "xxh3_64"
OUTSIDE = "other"
"""Group of the tensors that belong to no layer."""

THREADS = 8
READ_BYTES = 1 << 20
"""Bytes read and hashed together: they stay in the processor's cache."""

TASK_BYTES = 64 << 20
"""Bytes that one thread hashes before another may take over."""

_LAYER = re.compile(r".*?\.\d+(?=\.)")
_DIGEST = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Checksums:
    """What config.json lists as ``gemq_checksums``. None for what is not to be verified.

    tensors: checksum by group of tensors, a group being a layer's path or ``other``
    config:  checksum of config.json without its checksums
    """

    tensors: Mapping[str, str] | None = None
    config: str | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Checksums:
        """From the contents of config.json. Raises UserError for anything that ``to_dict`` does not write."""
        if KEY not in config:
            return cls()
        values: Any = config[KEY]
        if not isinstance(values, Mapping):
            raise _damaged("not an object")
        if values.get("algorithm") != ALGORITHM:
            raise UserError(
                f"the checkpoint's checksums are of the kind {values.get('algorithm')!r}, this gemq knows {ALGORITHM}: "
                "upgrade gemq"
            )
        tensors, of_config = values.get("tensors"), values.get("config")
        if tensors is not None and not isinstance(tensors, Mapping):
            raise _damaged("tensors is not an object")
        digests = [*(tensors or {}).values(), *([] if of_config is None else [of_config])]
        if not all(isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in digests):
            raise _damaged("a checksum is not 16 hexadecimal digits")
        return cls(tensors, of_config)

    def to_dict(self) -> dict[str, Any]:
        values = {"algorithm": ALGORITHM, "tensors": self.tensors, "config": self.config}
        return {key: value for key, value in values.items() if value is not None}

    def check_config(self, config: Mapping[str, Any], directory: Path) -> None:
        """Raises UserError when ``config`` (the contents of config.json) is not what gemq wrote."""
        if self.config is not None and self.config != config_checksum(config):
            raise UserError(
                f"config.json of {directory} is not what gemq wrote (checksum): copy it again; if you changed it on "
                f'purpose, delete "config" from "{KEY}" in it'
            )

    def check_tensors(self, tensors: Mapping[str, StoredTensor], digests: Mapping[str, str], directory: Path) -> None:
        """Raises UserError when the tensors are not those that gemq wrote. ``digests``: of their bytes, by name."""
        if self.tensors is None:
            return
        checksums = tensor_checksums(tensors, digests)
        differing = sorted(g for g in self.tensors.keys() | checksums if self.tensors.get(g) != checksums.get(g))
        if differing:
            files = sorted({stored.file.name for name, stored in tensors.items() if group_of(name) in differing})
            shown = ", ".join(files[:4]) + (" ..." if len(files) > 4 else "")
            raise UserError(
                f"{len(differing)} groups of tensors in {directory} are not what gemq wrote (checksums), first: "
                f"{differing[0]}: copy {shown or 'the checkpoint'} again; if you changed them on purpose, delete "
                f'"tensors" from "{KEY}" in config.json'
            )


def checksums_of(config: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> Checksums:
    """The checksums of a checkpoint, from its files."""
    return Checksums(tensor_checksums(tensors, tensor_digests(tensors)), config_checksum(config))


def config_checksum(config: Mapping[str, Any]) -> str:
    """Checksum of config.json without its checksums: of compact JSON with sorted keys, in ASCII."""
    values = {key: value for key, value in config.items() if key != KEY}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return xxh3_64_hexdigest(text.encode("ascii"))


def group_of(name: str) -> str:
    """The group of a tensor: its name up to the first number, which is the layer's."""
    layer = _LAYER.match(name)
    return layer.group() if layer else OUTSIDE


def tensor_checksums(tensors: Mapping[str, StoredTensor], digests: Mapping[str, str]) -> dict[str, str]:
    """Checksum of each group of tensors: of a line for each of them in the order of their names."""
    lines = defaultdict[str, list[str]](list)
    for name in sorted(tensors):
        spec = tensors[name].spec
        lines[group_of(name)].append(f"{name} {spec.dtype} {list(spec.shape)} {digests[name]}\n")
    return {group: xxh3_64_hexdigest("".join(some).encode()) for group, some in sorted(lines.items())}


def tensor_digests(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """XXH3 of every tensor's bytes, by name. Several threads read the files.

    Raises:
        UserError: a file cannot be read, or became shorter.
    """
    threads = min(THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, "gemq-checksums", initializer=block_sigterm) as pool:
        return {name: digest for part in pool.map(_digests, _tasks(tensors)) for name, digest in part}


def _tasks(tensors: Mapping[str, StoredTensor]) -> Iterator[list[tuple[str, StoredTensor]]]:
    """Neighbouring tensors of one file, about ``TASK_BYTES`` together."""
    task: list[tuple[str, StoredTensor]] = []
    size = 0
    for name, stored in sorted(tensors.items(), key=lambda item: (str(item[1].file), item[1].start)):
        if task and (size >= TASK_BYTES or stored.file != task[0][1].file):
            yield task
            task, size = [], 0
        task.append((name, stored))
        size += stored.spec.bytes
    if task:
        yield task


def _digests(task: Sequence[tuple[str, StoredTensor]]) -> list[tuple[str, str]]:
    """Name and digest of tensors that follow each other in one file, without gaps, as headers are checked for."""
    path = task[0][1].file
    buffer = memoryview(bytearray(READ_BYTES))
    unread = buffer[:0]
    digests = []
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(task[0][1].start)
            for name, stored in task:
                digest, left = xxh3_64(), stored.spec.bytes
                while left:
                    if not unread and not (unread := buffer[: file.readinto(buffer)]):
                        raise UserError(f"{path} became shorter while it was read: copy the checkpoint again")
                    digest.update(unread[:left])
                    left, unread = max(0, left - len(unread)), unread[left:]
                digests.append((name, digest.hexdigest()))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): copy the checkpoint again") from error
    return digests


def _damaged(what: str) -> UserError:
    return UserError(f"{KEY} in config.json is damaged ({what}): copy the checkpoint again")
