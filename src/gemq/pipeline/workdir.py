"""The work directory: the results of each stage, written atomically, with a fingerprint of the stage's inputs.

A stage is a directory. Its ``stage.json`` names its inputs. A resumed job with other inputs is refused, and the message
names the input that changed. Results of an earlier run are verified before a stage continues (``records``). Only one
process works in a directory at a time.

The marker file alone makes a directory a work directory. Without it nothing in the directory is changed or deleted.
Nothing is ever read or written through a link inside it. Must not import what stages compute.
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
from gemq.runtime.memory import SPILL_PREFIX
from gemq.runtime.ranks import SINGLE, Ranks
from gemq.runtime.upload import read_spans, upload_to

MARKER = "gemq-work.json"
"""Marks a work directory, so that no other directory is mistaken for one."""

FORMAT_VERSION = 2
"""Version of the layout of work directories. Files hold checksums since version 2."""

LOCK, STAGE_FILE, JOB_FILE = ".lock", "stage.json", "job.json"

FOLDS_FILE = "folds.json"
"""How layers are equalized (``equalization_stage``)."""

CODES_FILE = "codes.json"
"""The kind of codes of the experts (``codes_stage``)."""

MAX_VERIFY_THREADS = 16
"""Files that are verified at the same time."""

MAX_SHOWN_CHARACTERS = 40
"""Of a value in an error message."""

MAX_LEFTOVER_BYTES = {"lock": 0, "marker": 64}
"""Sizes of the files that a job creates first, its lock and its marker's temporary file."""


class WorkDir:
    """A work directory, locked while it is open. Use it as a context manager.

    With several ranks the first one holds the lock and writes. All ranks must make the same calls.
    """

    def __init__(self, path: Path, *, resume: bool, ranks: Ranks = SINGLE):
        """Opens or creates a work directory.

        Args:
            path: of the directory.
            resume: whether a directory that exists may be used.
            ranks: of the job.

        Raises:
            UserError: the directory exists and is not to be resumed, is not a work directory, or is in use.
        """
        self.path, self.ranks = path, ranks
        self._is_new = False
        self._lock: int | None = None
        ranks.run_on_first(lambda: self._open(resume))

    def _open(self, resume: bool) -> None:
        """Creates, locks and marks the directory, and removes what a killed job was writing."""
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
        """Raises UserError for a path that is no work directory, or that exists and is not to be resumed."""
        with disk_errors(path):
            if path.exists() and not path.is_dir():
                raise UserError(f"{path} is not a directory: name another with --work")
            if not path.exists() or not any(path.iterdir()):
                return
            marked = os.path.lexists(path / MARKER)
            if not marked and not _only_leftovers(path):
                raise UserError(f"{path} exists and is not a work directory of gemq: name another with --work")
            if not resume:
                raise UserError(f"{path} exists: continue it with --resume, or delete it, or name another with --work")
            if marked:
                _check_marker(path)
            _check_no_links(path)

    @classmethod
    def existing(cls, path: Path, ranks: Ranks = SINGLE) -> WorkDir:
        """Opens a work directory that must exist."""
        with disk_errors(path):
            if not (path / MARKER).is_file():
                raise UserError(f"{path} is not a work directory of gemq: name the one that quantize made (OUT.work)")
        return cls(path, resume=True, ranks=ranks)

    def __enter__(self) -> WorkDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_new and isinstance(value, UserError):
            _discard(self.path)  # an error before anything was computed leaves no directory behind
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def stage(self, name: str, inputs: dict[str, Any]) -> Stage:
        """Begins or continues a stage.

        Args:
            name: of the stage's directory.
            inputs: plain values that name all that the stage's results depend on.

        Raises:
            UserError: earlier results were made from other inputs, or are damaged.
        """
        inputs = json.loads(json.dumps(inputs))
        self.ranks.run_on_first(lambda: self._begin(self.path / name, inputs))
        return Stage(self.path / name, self.ranks, digest(inputs))

    def _begin(self, directory: Path, inputs: dict[str, Any]) -> None:
        """Records the inputs of a stage, or compares them with the recorded ones and verifies earlier results."""
        stage_file = directory / STAGE_FILE
        if not stage_file.exists():
            write_json(stage_file, inputs)
        recorded = read_object(stage_file)
        for key in [*inputs, *recorded]:
            if recorded.get(key) != inputs.get(key):
                raise UserError(
                    f"{self.path} was made with another {key.replace('_', ' ')} "
                    f"({_short(recorded.get(key))}, now {_short(inputs.get(key))}): "
                    "use the same, or start again with another --work"
                )
        verify_stage(directory, digest(inputs))

    def recorded_inputs(self, name: str) -> dict[str, Any]:
        """Returns the inputs of a stage as they were recorded; empty if the stage has not begun."""
        stage_file = self.path / name / STAGE_FILE
        return read_object(stage_file) if stage_file.exists() else {}

    def finished(self, pattern: str, names: list[str]) -> Iterator[tuple[Stage, dict[str, Any]]]:
        """Yields finished stages, verified, and their inputs.

        Args:
            pattern: of the stages' directories.
            names: files that a finished stage has.
        """
        for stage_file in sorted(self.path.glob(f"{pattern}/{STAGE_FILE}")):
            inputs = read_object(stage_file)
            stage = Stage(stage_file.parent, self.ranks, digest(inputs))
            if all(stage.has(name) for name in names):
                verify_stage(stage.directory, stage.inputs_digest)
                yield stage, inputs

    def size(self) -> int:
        """Bytes of everything in the directory."""
        return sum(f.stat().st_size for f in self.path.rglob("*") if f.is_file())


class Stage:
    """The results of a stage: named JSON values and named sets of tensors.

    All ranks must make the same calls. Machines share the directory, so that every rank sees the files of all others.
    """

    def __init__(self, directory: Path, ranks: Ranks = SINGLE, inputs_digest: str = ""):
        """``inputs_digest``: digest of the stage's inputs, which its files carry."""
        self.directory, self.ranks, self.inputs_digest = directory, ranks, inputs_digest

    def has(self, name: str) -> bool:
        """Whether the file ``name`` exists. Files are never partial."""
        return self.ranks.run_on_first((self.directory / name).is_file)

    def save_tensors(self, name: str, tensors: dict[str, Tensor], about: dict[str, Any] | None = None) -> None:
        """Writes a set of tensors, the same on every rank, and plain values that are stored with it."""
        self.ranks.run_on_first(lambda: self._write(name, tensors, about))

    def _write(self, name: str, tensors: dict[str, Tensor], about: dict[str, Any] | None = None) -> None:
        """Writes a set of tensors on this rank."""
        on_host = {key: tensor.detach().cpu() for key, tensor in tensors.items()}
        write_tensors(self.directory / name, on_host, tensor_metadata(name, on_host, self.inputs_digest, about or {}))

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
        is_wanted: Callable[[str], bool] | None = None,
        rows: slice | None = None,
    ) -> dict[str, Tensor]:
        """Reads tensors of a set, by their keys.

        Args:
            name: of the file.
            device: where the tensors go.
            is_wanted: selects keys; by default all. Other tensors are not read.
            rows: slice of each tensor's first dimension; by default all.
        """
        path, target = self.directory / name, torch.device(device)
        if target.type != "cpu":
            spans = {key: span for key, span in read_spans(path).items() if is_wanted is None or is_wanted(key)}
            if rows is not None:
                spans = {key: span.rows(rows) for key, span in spans.items()}
            return upload_to(target).tensors(spans)
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:  # tensors map the file
            keys = [key for key in file.keys() if is_wanted is None or is_wanted(key)]  # noqa: SIM118
            return {key: file.get_tensor(key) if rows is None else file.get_slice(key)[rows] for key in keys}

    def load_tensor(self, name: str, key: str) -> Tensor:
        """Reads one tensor of a set to the CPU."""
        return self.load_tensors(name, is_wanted=lambda stored_key: stored_key == key)[key]

    def about(self, name: str) -> dict[str, Any]:
        """The plain values that are stored with a set of tensors."""
        return read_about(self.directory / name)

    def save_json(self, name: str, value: Any) -> None:
        """Writes plain values."""
        self.ranks.run_on_first(lambda: write_json_record(self.directory / name, value, self.inputs_digest))

    def load_json(self, name: str) -> Any:
        """Reads plain values. Raises UserError when the file is damaged."""
        return read_json_record(self.directory / name, self.inputs_digest)


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


def verify_stage(directory: Path, inputs_digest: str) -> None:
    """Reads all results of a stage. Raises UserError for one that is damaged or belongs to another stage.

    Several threads read files at the same time, so that the disk limits the speed.
    """
    files = sorted(path for path in directory.iterdir() if path.name != STAGE_FILE and not path.name.startswith("."))
    threads = min(MAX_VERIFY_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, thread_name_prefix="gemq-verify") as pool:
        checks = [pool.submit(check_record, path, inputs_digest) for path in files]
        for check in checks:
            check.result()


def _check_marker(path: Path) -> None:
    """Raises UserError unless the directory's marker has this format version."""
    try:
        version = read_object(path / MARKER).get("format_version")
    except UserError as error:
        raise UserError(
            f"{path} is not a work directory of gemq, or its {MARKER} is damaged: name another with --work"
        ) from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} is a work directory of format version {_short(version)}, and this gemq reads {FORMAT_VERSION}: "
            "start again with another --work"
        )


def _check_no_links(path: Path) -> None:
    """Raises UserError for anything below ``path`` that is neither a plain file nor a directory."""
    for directory, directories, files in os.walk(path):
        for name in (*directories, *files):
            entry = Path(directory) / name
            if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
                raise UserError(
                    f"{entry} is a link or no regular file, and gemq creates none: "
                    "replace it with a copy of what it points to, or name another with --work"
                )


def _only_leftovers(path: Path) -> bool:
    """Whether a killed job had written nothing to the directory but its lock and its marker's temporary file."""
    names = re.compile(rf"(?P<lock>{re.escape(LOCK)})|(?P<marker>\.{re.escape(MARKER)}(\.\w+)?\.tmp)")
    for entry in path.iterdir():
        match, status = names.fullmatch(entry.name), entry.lstat()
        if match is None or not stat.S_ISREG(status.st_mode):
            return False
        kind = "lock" if match["lock"] else "marker"
        if status.st_size > MAX_LEFTOVER_BYTES[kind]:
            return False
    return True


def _remove_temporaries(path: Path) -> None:
    """Removes unfinished files of a killed job from the directory and its stages."""
    for directory in (path, *(entry for entry in path.iterdir() if entry.is_dir())):
        for entry in directory.iterdir():
            if entry.is_file() and (is_temporary(entry.name) or entry.name.startswith(SPILL_PREFIX)):
                entry.unlink()


def _discard(path: Path) -> None:
    """Removes a directory that this job created, unless it holds a result or a file of somebody else."""
    bookkeeping = {STAGE_FILE, JOB_FILE, MARKER, LOCK, FOLDS_FILE, CODES_FILE}  # the last two are quick to find
    if all(entry.is_dir() or entry.name in bookkeeping for entry in path.rglob("*")):
        shutil.rmtree(path, ignore_errors=True)


def _short(value: Any) -> str:
    """A value for a message, shortened."""
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 3] + "..."


def layer_file(layer: int) -> str:
    """Name of a layer's file in a stage's directory."""
    return f"layer-{layer:03d}.safetensors"
