"""The work directory: each stage's results, written atomically beside a fingerprint of what they were made from.

A stage is a directory. Its ``stage.json`` names its inputs; a resumed job whose inputs differ is refused, with the
input that changed. Only one process works in a directory at a time. Knows nothing of what stages compute.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch
from torch import Tensor

from gemq.errors import UserError
from gemq.files import disk_errors, replacing, write_json, write_tensors
from gemq.resources.ranks import ALONE, Ranks
from gemq.resources.upload import spans_of, upload_to

MARKER = "gemq-work.json"
"""Names the directory as ours, so that nothing else is ever taken for a work directory."""


class WorkDir:
    """A work directory, locked while open. Use as a context manager.

    Of several ranks the first holds the lock and writes; all ask and write together.
    Raises UserError when the directory exists and ``resume`` is False, is not ours, or is in use.
    """

    def __init__(self, path: Path, *, resume: bool, ranks: Ranks = ALONE):
        self.path, self.ranks = path, ranks
        self._is_new = False
        self._lock: TextIO | None = None
        ranks.agree(lambda: self._open(resume))

    def _open(self, resume: bool) -> None:
        path = self.path
        self.check(path, resume=resume)
        self._is_new = not path.exists()
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / ".lock", "w")  # noqa: SIM115 - held as long as the directory is open
        try:
            # the kernel lets go of the lock when a process dies, however it dies
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise UserError(
                f"{path} is in use by another gemq process: wait for it, or name another with --work"
            ) from error
        try:
            # what a killed job was writing: our temporary files, and those that safetensors names at random
            for leftover in path.rglob(".*"):
                if leftover.is_file() and leftover.name != ".lock":
                    leftover.unlink()
            if not (path / MARKER).exists():
                write_json(path / MARKER, {"format_version": 1})
        except UserError as error:
            self.__exit__(type(error), error, None)
            raise

    @staticmethod
    def check(path: Path, *, resume: bool) -> None:
        """Raises UserError for a path that is not ours, or that is taken and not to be resumed."""
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is not a directory: name another with --work")
        if path.exists() and any(path.iterdir()):
            if not (path / MARKER).exists() and not _only_leftovers(path):
                raise UserError(f"{path} exists and is not a work directory of gemq: name another with --work")
            if not resume:
                raise UserError(f"{path} exists: go on with --resume, or delete it, or name another with --work")

    @classmethod
    def existing(cls, path: Path, ranks: Ranks = ALONE) -> WorkDir:
        """Opens a work directory that must be there already."""
        if not (path / MARKER).is_file():
            raise UserError(f"{path} is not a work directory of gemq: give the one that quantize made (OUT.work)")
        return cls(path, resume=True, ranks=ranks)

    def __enter__(self) -> WorkDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_new and isinstance(value, UserError) and not any(self.path.rglob("*.safetensors")):
            shutil.rmtree(self.path, ignore_errors=True)  # a mistake before anything was computed leaves no trace
        if self._lock is not None:
            self._lock.close()

    def stage(self, name: str, inputs: dict[str, Any]) -> Stage:
        """The stage ``name`` made from ``inputs`` (plain values), begun or gone on with.

        Raises UserError naming the first input that differs from those of the results already there.
        """
        self.ranks.agree(lambda: self._begin(self.path / name, json.loads(json.dumps(inputs))))
        return Stage(self.path / name, self.ranks)

    def _begin(self, directory: Path, inputs: dict[str, Any]) -> None:
        recorded = directory / "stage.json"
        if not recorded.exists():
            write_json(recorded, inputs)
            return
        before = json.loads(recorded.read_text(encoding="utf-8"))
        for key in [*inputs, *before]:
            if before.get(key) != inputs.get(key):
                raise UserError(
                    f"{self.path} was made with another {key.replace('_', ' ')} "
                    f"({_short(before.get(key))}, now {_short(inputs.get(key))}): "
                    "use the same, or start anew with another --work"
                )

    def size(self) -> int:
        """Bytes of everything in the directory."""
        return sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())


class Stage:
    """One stage's results: named JSON values and named sets of tensors. All ranks ask and save together.

    Every rank sees the files that others write, which several machines share.
    """

    def __init__(self, directory: Path, ranks: Ranks = ALONE):
        self.directory, self.ranks = directory, ranks

    def has(self, name: str) -> bool:
        """Whether the result ``name`` (with its suffix) is there. What is there is whole."""
        return self.ranks.agree((self.directory / name).is_file)

    def save_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Every rank gives the same tensors; the first writes them."""
        self.ranks.agree(lambda: write_tensors(self.directory / name, tensors))

    @contextmanager
    def writing_behind(self, each: bool = False) -> Iterator[Callable[[str, dict[str, Tensor] | None], None]]:
        """Gives a ``save_tensors`` that returns before its file is written, or a GPU has computed what goes there.

        All are written when the context ends. ``each``: every rank writes what it gives, or nothing if that is None.
        """
        writing: list[Future[None]] = []  # one at most: memory holds no more

        def settle() -> None:
            last = [writing.pop()] if writing else []
            self.ranks.each(lambda: [future.result() for future in last])

        with ThreadPoolExecutor(1, thread_name_prefix="gemq-files") as pool:

            def save(name: str, tensors: dict[str, Tensor] | None) -> None:
                settle()
                if tensors is not None and (each or self.ranks.first):
                    on_host = copied_behind(tensors)
                    writing.append(pool.submit(lambda: write_tensors(self.directory / name, on_host())))

            yield save
            settle()

    def load_tensors(
        self,
        name: str,
        device: str = "cpu",
        wanted: Callable[[str], bool] | None = None,
        rows: slice | None = None,
    ) -> dict[str, Tensor]:
        """A set's tensors by their keys: all, or those that are ``wanted``, without reading the others.

        rows: of each tensor's first dimension, if not all
        """
        path, where = self.directory / name, torch.device(device)
        if where.type != "cpu":
            spans = {key: span for key, span in spans_of(path).items() if wanted is None or wanted(key)}
            if rows is not None:
                spans = {key: span.rows(rows) for key, span in spans.items()}
            return upload_to(where).tensors(spans)
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:  # a tensor is the mapped file
            keys = [key for key in file.keys() if wanted is None or wanted(key)]  # noqa: SIM118
            return {key: file.get_tensor(key) if rows is None else file.get_slice(key)[rows] for key in keys}

    def load_tensor(self, name: str, key: str) -> Tensor:
        """One tensor of a set, on the CPU, without reading the others."""
        return self.load_tensors(name, wanted=lambda other: other == key)[key]

    def save_json(self, name: str, value: Any) -> None:
        self.ranks.agree(lambda: write_json(self.directory / name, value))

    def save_bytes(self, name: str, data: bytes) -> None:
        """Every rank gives the same bytes; the first writes them."""

        def write() -> None:
            with replacing(self.directory / name) as temporary:
                temporary.write_bytes(data)

        self.ranks.agree(write)

    def load_json(self, name: str) -> Any:
        return json.loads((self.directory / name).read_text(encoding="utf-8"))

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def copied_behind(tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """What another thread calls for copies of tensors in host memory: it alone waits for the GPU, if they are there.

    Through pinned memory: while other memory is copied to, no kernel can be launched.
    """
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    if device is None:
        return lambda: tensors
    computed = torch.cuda.Event()
    computed.record(torch.cuda.current_stream(device))
    stream = torch.cuda.Stream(device)

    def copies() -> dict[str, Tensor]:
        with torch.cuda.stream(stream):
            stream.wait_event(computed)
            found = {k: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for k, t in tensors.items()}
            for key, tensor in tensors.items():
                found[key].copy_(tensor, non_blocking=True)
            stream.synchronize()
        return found

    return copies


def _only_leftovers(path: Path) -> bool:
    """A directory in which a killed job had not yet written anything but its lock and temporary files."""
    return all(f.name.startswith(".") for f in path.iterdir())


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 40 else text[:37] + "..."
