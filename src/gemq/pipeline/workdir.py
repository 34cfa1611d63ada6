"""The work directory: each stage's results, written atomically beside a fingerprint of what they were made from.

A stage is a directory. Its ``stage.json`` names its inputs; a resumed job whose inputs differ is refused, with the
input that changed. What is there from an earlier run is verified before a stage goes on (``records``). Only one process
works in a directory at a time.

A directory counts as ours by its marker file alone. Without it nothing in the directory is changed or deleted, and
nothing is ever read or written through a link inside it. Must not import what stages compute.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from gemq.errors import UserError
from gemq.pipeline.records import (
    check_record,
    digest,
    read_about,
    read_json_record,
    read_object,
    tensor_metadata,
    write_json_record,
)
from gemq.runtime.files import disk_errors, is_temporary, lock_file, write_json, write_tensors
from gemq.runtime.memory import WAITING
from gemq.runtime.ranks import SINGLE, Ranks
from gemq.runtime.upload import spans_of, upload_to

MARKER = "gemq-work.json"
"""Names the directory as ours, so that nothing else is ever taken for a work directory."""

FORMAT_VERSION = 2
"""Of work directories. Since 2 their files hold checksums."""

LOCK, STAGE_FILE, JOB_FILE = ".lock", "stage.json", "job.json"


class WorkDir:
    """A work directory, locked while open. Use as a context manager.

    Of several ranks the first holds the lock and writes; all ask and write together.
    Raises UserError when the directory exists and ``resume`` is False, is not ours, or is in use.
    """

    def __init__(self, path: Path, *, resume: bool, ranks: Ranks = SINGLE):
        self.path, self.ranks = path, ranks
        self._is_new = False
        self._lock: int | None = None
        ranks.run_on_first(lambda: self._open(resume))

    def _open(self, resume: bool) -> None:
        path = self.path
        self.check(path, resume=resume)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                self._is_new = True
        with disk_errors(path / LOCK):
            self._lock = lock_file(path / LOCK)
        if self._lock is None:
            raise UserError(f"{path} is in use by another gemq process: wait for it, or name another with --work")
        try:
            with disk_errors(path):
                _remove_temporaries(path)
            if not (path / MARKER).exists():
                write_json(path / MARKER, {"format_version": FORMAT_VERSION})
        except UserError as error:
            self.__exit__(type(error), error, None)
            raise

    @staticmethod
    def check(path: Path, *, resume: bool) -> None:
        """Raises UserError for a path that is not ours, or that is taken and not to be resumed."""
        with disk_errors(path):
            if path.exists() and not path.is_dir():
                raise UserError(f"{path} is not a directory: name another with --work")
            if not path.exists() or not any(path.iterdir()):
                return
            marked = os.path.lexists(path / MARKER)
            if not marked and not _only_leftovers(path):
                raise UserError(f"{path} exists and is not a work directory of gemq: name another with --work")
            if not resume:
                raise UserError(f"{path} exists: go on with --resume, or delete it, or name another with --work")
            if marked:
                _check_marker(path)
            _check_no_links(path)

    @classmethod
    def existing(cls, path: Path, ranks: Ranks = SINGLE) -> WorkDir:
        """Opens a work directory that must be there already."""
        with disk_errors(path):
            if not (path / MARKER).is_file():
                raise UserError(f"{path} is not a work directory of gemq: give the one that quantize made (OUT.work)")
        return cls(path, resume=True, ranks=ranks)

    def __enter__(self) -> WorkDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_new and isinstance(value, UserError):
            _discard(self.path)  # a mistake before anything was computed leaves no trace
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def stage(self, name: str, inputs: dict[str, Any]) -> Stage:
        """The stage ``name`` made from ``inputs`` (plain values), begun or gone on with.

        Raises:
            UserError: results that are there already were made from other inputs, or are damaged.
        """
        inputs = json.loads(json.dumps(inputs))
        self.ranks.run_on_first(lambda: self._begin(self.path / name, inputs))
        return Stage(self.path / name, self.ranks, digest(inputs))

    def _begin(self, directory: Path, inputs: dict[str, Any]) -> None:
        recorded = directory / STAGE_FILE
        if not recorded.exists():
            write_json(recorded, inputs)
            before = inputs
        else:
            before = read_object(recorded)
        for key in [*inputs, *before]:
            if before.get(key) != inputs.get(key):
                raise UserError(
                    f"{self.path} was made with another {key.replace('_', ' ')} "
                    f"({_short(before.get(key))}, now {_short(inputs.get(key))}): "
                    "use the same, or start anew with another --work"
                )
        verify_stage(directory, digest(inputs))

    def finished(self, pattern: str, names: list[str]) -> Iterator[tuple[Stage, dict[str, Any]]]:
        """Stages whose directories match ``pattern`` and that have all of ``names``, verified, and their inputs."""
        for recorded in sorted(self.path.glob(f"{pattern}/{STAGE_FILE}")):
            inputs = read_object(recorded)
            stage = Stage(recorded.parent, self.ranks, digest(inputs))
            if all(stage.has(name) for name in names):
                verify_stage(stage.directory, stage.identity)
                yield stage, inputs

    def size(self) -> int:
        """Bytes of everything in the directory."""
        return sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())


class Stage:
    """One stage's results: named JSON values and named sets of tensors. All ranks ask and save together.

    Every rank sees the files that others write, which several machines share.
    """

    def __init__(self, directory: Path, ranks: Ranks = SINGLE, identity: str = ""):
        """identity: digest of the stage's inputs, which its files carry"""
        self.directory, self.ranks, self.identity = directory, ranks, identity

    def has(self, name: str) -> bool:
        """Whether the result ``name`` (with its suffix) is there. What is there is whole."""
        return self.ranks.run_on_first((self.directory / name).is_file)

    def save_tensors(self, name: str, tensors: dict[str, Tensor], about: dict[str, Any] | None = None) -> None:
        """Every rank gives the same tensors, and plain values to keep with them; the first writes them."""
        self.ranks.run_on_first(lambda: self._write(name, tensors, about))

    def _write(self, name: str, tensors: dict[str, Tensor], about: dict[str, Any] | None = None) -> None:
        on_host = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
        write_tensors(self.directory / name, on_host, tensor_metadata(name, on_host, self.identity, about or {}))

    @contextmanager
    def background_writer(self, every_rank: bool = False) -> Iterator[Callable[[str, dict[str, Tensor] | None], None]]:
        """Yields a ``save_tensors`` that returns before its file is written, or its tensors are computed on a GPU.

        All files are written when the context ends. At most one is being written, so that memory holds no more.

        Args:
            every_rank: every rank writes its own tensors, or nothing where they are None. Otherwise the first rank
                writes.
        """
        pending: list[Future[None]] = []

        def wait_for_pending() -> None:
            future = pending.pop() if pending else None
            self.ranks.run_on_all(lambda: future.result() if future is not None else None)

        with ThreadPoolExecutor(1, thread_name_prefix="gemq-files") as pool:

            def save(name: str, tensors: dict[str, Tensor] | None) -> None:
                wait_for_pending()
                if tensors is not None and (every_rank or self.ranks.is_first):
                    copy_to_host = host_copier(tensors)
                    pending.append(pool.submit(lambda: self._write(name, copy_to_host())))

            yield save
            wait_for_pending()

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

    def about(self, name: str) -> dict[str, Any]:
        """The plain values that were saved with a set of tensors."""
        return read_about(self.directory / name)

    def save_json(self, name: str, value: Any) -> None:
        self.ranks.run_on_first(lambda: write_json_record(self.directory / name, value, self.identity))

    def load_json(self, name: str) -> Any:
        return read_json_record(self.directory / name, self.identity)


def host_copier(tensors: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """A function that copies tensors to host memory in another thread, which alone waits for the GPU.

    Copies go through pinned memory: while pageable memory is copied to, no kernel can be launched.
    """
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    if device is None:
        return lambda: tensors
    computed = torch.cuda.Event()
    computed.record(torch.cuda.current_stream(device))
    stream = torch.cuda.Stream(device)

    def copy() -> dict[str, Tensor]:
        with torch.cuda.stream(stream):
            stream.wait_event(computed)
            copies = {key: torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for key, t in tensors.items()}
            for key, tensor in tensors.items():
                copies[key].copy_(tensor, non_blocking=True)
            stream.synchronize()
        return copies

    return copy


def verify_stage(directory: Path, identity: str) -> None:
    """Reads all results that a stage has. Raises UserError for one that is damaged or belongs to another stage.

    Files are read by several threads, so that this takes little longer than the disk.
    """
    files = sorted(path for path in directory.iterdir() if path.name != STAGE_FILE and not path.name.startswith("."))
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="gemq-verify") as pool:
        for checked in [pool.submit(check_record, path, identity) for path in files]:
            checked.result()


def _check_marker(path: Path) -> None:
    """Raises UserError unless the directory's marker is one of this format."""
    try:
        version = read_object(path / MARKER).get("format_version")
    except UserError as error:
        raise UserError(
            f"{path} is not a work directory of gemq, or its {MARKER} is damaged: name another with --work"
        ) from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} is a work directory of format version {_short(version)}, and this gemq reads {FORMAT_VERSION}: "
            "start anew with another --work"
        )


def _check_no_links(path: Path) -> None:
    """Raises UserError for anything below ``path`` that is neither a plain file nor a directory."""
    for directory, directories, files in os.walk(path):
        for name in (*directories, *files):
            entry = Path(directory) / name
            if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                raise UserError(
                    f"{entry} is a link or no regular file, and gemq makes none: "
                    "put a copy of what it points to there, or name another with --work"
                )


def _only_leftovers(path: Path) -> bool:
    """A directory in which a killed job had not yet written anything but its lock and its marker's temporary file."""
    most = {"lock": 0, "marker": 64}  # bytes
    names = re.compile(rf"(?P<lock>{re.escape(LOCK)})|(?P<marker>\.{re.escape(MARKER)}(\.\w+)?\.tmp)")
    for entry in path.iterdir():
        kind, found = names.fullmatch(entry.name), entry.lstat()
        if not kind or not stat.S_ISREG(found.st_mode) or found.st_size > most[str(kind.lastgroup)]:
            return False
    return True


def _remove_temporaries(path: Path) -> None:
    """Removes what a killed job was writing when it ended, from the directory and its stages."""
    for directory in (path, *(entry for entry in path.iterdir() if entry.is_dir())):
        for entry in directory.iterdir():
            if entry.is_file() and (is_temporary(entry.name) or entry.name.startswith(WAITING)):
                entry.unlink()


def _discard(path: Path) -> None:
    """Removes a directory that this job made, unless it holds a result, or something that is not ours."""
    ours = {STAGE_FILE, JOB_FILE, MARKER, LOCK}
    if all(entry.is_dir() or entry.name in ours for entry in path.rglob("*")):
        shutil.rmtree(path, ignore_errors=True)


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 40 else text[:37] + "..."


def layer_file(layer: int) -> str:
    """Name of a layer's file in a stage's directory."""
    return f"layer-{layer:03d}.safetensors"
