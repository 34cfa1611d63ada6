"""The records of a work directory: its job (``job.json``), and the outputs that were made from it (``results.json``).

Both are untrusted data. What they say about the model is compared with the model's files.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemq.calibration.sources import SELF, source_digest
from gemq.checkpoint.format import read_quantization_config
from gemq.checkpoint.reader import check_checkpoint
from gemq.checkpoint.small_files import small_files
from gemq.errors import UserError
from gemq.models.source import DTYPES, Source
from gemq.pipeline.candidates_stage import CANDIDATES
from gemq.pipeline.codes_stage import decided_recipe
from gemq.pipeline.preflight import read_allocation_file
from gemq.pipeline.records import damaged, digest, read_object
from gemq.pipeline.workdir import JOB_FILE, WorkDir
from gemq.recipe import Recipe
from gemq.runtime.files import write_json

RESULTS_FILE = "results.json"

_TYPES: dict[str, type | tuple[type, ...]] = {
    "model": str,
    "fingerprint": str,
    "files": dict,
    "recipe": dict,
    "candidate_widths": list,
    "calibration": list,
    "sources": list,
}


@dataclass(frozen=True)
class JobRecord:
    """The contents of ``job.json``.

    Attributes:
        model: directory of the full-precision model. A later command may name another one.
        fingerprint: digest of the model's contents.
        files: size, modification time and digest of each of the model's files (``Source.fingerprint``).
        recipe: keys and values.
        candidate_widths: the candidate widths, which stay the same when an export changes the budget.
        calibration: digest of each calibration source.
        sources: where each calibration source is: an absolute path, the id of a data set, or ``self``.
    """

    model: str
    fingerprint: str
    files: dict[str, list[Any]]
    recipe: dict[str, Any]
    candidate_widths: list[float]
    calibration: list[str]
    sources: list[str]

    @classmethod
    def of(cls, source: Source, recipe: Recipe, fingerprint: str, files: dict[str, list[Any]]) -> JobRecord:
        """The record of a job. ``fingerprint`` and ``files`` are those of ``Source.fingerprint``."""
        return cls(
            model=str(source.path.resolve()),
            fingerprint=fingerprint,
            files=files,
            recipe=recipe.to_dict(),
            candidate_widths=[width.value for width in recipe.candidate_widths],
            calibration=[source_digest(s) for s in recipe.calibration],
            sources=[_absolute(s) for s in recipe.calibration],
        )

    def write(self, work: Path) -> None:
        """Writes ``job.json``."""
        values = asdict(self)
        write_json(work / JOB_FILE, {**values, "checksum": _checksum(values)})


def read_job(work: Path) -> JobRecord | None:
    """The record of a work directory; None if it has none. Raises UserError when it is damaged."""
    path = work / JOB_FILE
    if not path.exists() and not path.is_symlink():
        return None
    values = read_object(path)
    checksum = values.pop("checksum", None)
    for key, expected_type in _TYPES.items():
        if not isinstance(values.get(key), expected_type):
            raise damaged(path, f"its {key} is missing or of the wrong type")
    if values.keys() != _TYPES.keys():
        raise damaged(path, "it has other keys")
    if checksum != _checksum(values):
        raise damaged(path, "its contents do not match its checksum")
    values["recipe"].setdefault("codes", "affine")  # absent in directories that older versions made
    return JobRecord(**values)


def _absolute(source: str) -> str:
    """A calibration source that does not depend on the current directory."""
    is_file = source != SELF and os.path.exists(source)
    return str(Path(source).resolve()) if is_file else source


def known_files(work: Path) -> dict[str, list[Any]]:
    """The model's files as an earlier job in this directory read them; empty if there was none."""
    record = read_job(work)
    return {} if record is None else record.files


def _checksum(values: dict[str, Any]) -> str:
    """A checksum of everything but the model's directory, which may be edited: the fingerprint identifies the model."""
    return digest({key: value for key, value in values.items() if key != "model"})


def record_job(work: Path, record: JobRecord) -> None:
    """Records the job of a work directory. Raises UserError if the directory holds another job.

    A model or a text that was moved is the same one. The record then gets its new place.
    """
    existing = read_job(work)
    if existing is not None:
        _check_recipe(work, existing, record.recipe, record.calibration)
        if existing.fingerprint != record.fingerprint:
            raise _changed(work, "model")
    if existing != record:
        record.write(work)


def check_same_recipe(work: Path, recipe: Recipe) -> None:
    """Raises UserError when the work directory, if there is one, was made with another recipe."""
    record = read_job(work)
    if record is not None:
        _check_recipe(work, record, recipe.to_dict(), [source_digest(s) for s in recipe.calibration])


def _check_recipe(work: Path, record: JobRecord, recipe: dict[str, Any], calibration: list[str]) -> None:
    """Raises UserError that names the first difference between two recipes or their texts.

    Args:
        work: the work directory.
        record: of the job that made it.
        recipe: keys and values that are requested now.
        calibration: digest of each calibration source now.
    """
    same_texts = record.calibration == calibration
    for key, value in recipe.items():
        if record.recipe.get(key) != value and not (key == "calibration" and same_texts):
            raise UserError(
                f"{work} was made with {key} {_value_text(record.recipe.get(key))} and the recipe now has "
                f"{_value_text(value)}: resume with the same, or start again with another --work"
            )
    if not same_texts:
        raise _changed(work, "calibration text")


def _changed(work: Path, name: str) -> UserError:
    """The error for a model or a text that has changed."""
    return UserError(
        f"{work} was made from another {name}, or the {name} has changed since: "
        "start again with another --work, or delete this one"
    )


def recorded_job(
    directory: WorkDir, changes: dict[str, Any] | None = None, model: str | None = None, trust_remote_code: bool = False
) -> tuple[Source, Recipe, JobRecord]:
    """The model of a work directory, its recipe with ``changes``, and its record.

    Codes, candidate widths and compute type stay those of the candidates, on any device.

    Args:
        directory: a work directory of ``quantize``.
        changes: recipe keys that replace those of the record.
        model: where the model is now, a directory or a hub id; None: where it was.
        trust_remote_code: whether code that the model brings may run. The record does not decide that.

    Raises:
        UserError: there is no record, or it is damaged, or the model is gone.
    """
    work = directory.path
    record = read_job(work)
    if record is None:
        raise UserError(f"{work} holds no job yet: run gemq quantize first")
    recorded = Recipe.from_dict({**record.recipe, "calibration": record.sources}, origin=str(work / JOB_FILE))
    recipe = decided_recipe(directory, recorded)
    widths: tuple[Any, ...] = tuple(record.candidate_widths)
    if recipe.codes == "trellis" and recorded.codes == "auto":  # the record is older than the decision
        widths = recipe.candidate_widths
    if recipe.dtype == "auto":
        recipe = recipe.replace(dtype=_recorded_dtype(directory))
    recipe = recipe.replace(**(changes or {}))
    if recipe.candidate_widths != widths:
        recipe = recipe.replace(widths=widths)
    if model is not None:
        return Source.resolve(model, trust_remote_code=trust_remote_code), recipe, record
    source = Source(Path(record.model), trust_remote_code)
    if not source.path.exists():
        raise UserError(
            f"{source.path}, the model of {work}, is gone: put it back, or name its new place with --model "
            "(its unquantized parts are needed)"
        )
    return source, recipe, record


def _recorded_dtype(directory: WorkDir) -> str:
    """The compute type of a directory's candidates; ``auto`` if there are none."""
    recorded = directory.recorded_inputs(CANDIDATES).get("dtype")
    return next((name for name, dtype in DTYPES.items() if str(dtype) == recorded), "auto")


def check_config(source: Source, record: JobRecord) -> None:
    """Raises UserError for a model with another config.json than the recorded one. Reads no weights."""
    try:
        config_digest = hashlib.sha256((source.path / "config.json").read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read config.json of {source.path} ({error.strerror}): check --model") from error
    if record.files.get("config.json", [None])[-1] != config_digest:
        raise UserError(f"{source.path} is not the model that the work directory was made from: check --model")


def check_texts(work: Path, sources: Sequence[str], record: JobRecord) -> None:
    """Raises UserError for a calibration text that has changed since the work directory was made."""
    for source, expected in zip(sources, record.calibration, strict=True):
        if source != SELF and source_digest(source) != expected:
            raise UserError(
                f"{source}, a calibration text of {work}, has changed or is gone, and windows are still to be "
                "drawn from it: put it back"
            )


def _value_text(value: Any) -> str:
    """A recipe's value for a message."""
    if isinstance(value, list):
        return ",".join(f"{item:g}" if isinstance(item, float) else str(item) for item in value)
    return "unset" if value is None else f"{value}"


# Outputs


def result_key(recipe: Recipe, allocation: Path | None) -> str:
    """The key of the output that ``quantize`` makes in a work directory with this recipe and allocation file."""
    recipe_values = {key: value for key, value in recipe.to_dict().items() if key != "calibration"}
    file_digest = None
    if allocation is not None:
        file_digest = hashlib.sha256(read_allocation_file(allocation).encode()).hexdigest()
    return digest({"recipe": recipe_values, "allocation": file_digest})


def record_result(work: Path, key: str, fingerprint: str) -> None:
    """Records the fingerprint of an output that is about to be written."""
    write_json(work / RESULTS_FILE, {**_results(work), key: fingerprint})


def check_own_output(out: Path, work: Path, key: str) -> None:
    """Raises UserError unless the checkpoint ``out`` has the fingerprint of an output of the job in ``work``.

    Otherwise a resumed job would compute for hours only to find that its output holds something else.
    """
    fingerprint = read_quantization_config(out).get("fingerprint")
    if not (work / JOB_FILE).is_file() or _results(work).get(key) != fingerprint:
        raise UserError(
            f"{out} exists and is not what the job in {work} writes: name another output, or delete it first"
        )


def check_whole(out: Path, source: Source) -> None:
    """Raises UserError for a finished checkpoint if a part of it was deleted or replaced. Reads no weights."""
    try:
        check_checkpoint(out, trust_remote_code=source.trust_remote_code)
        for name, original in small_files(source.path).items():
            if not (out / name).is_file() or not filecmp.cmp(original, out / name, shallow=False):
                raise UserError(f"{name} is not the model's")
    except UserError as error:
        raise UserError(f"{out} is no longer complete ({error}): delete it, and --resume writes it again") from error


def _results(work: Path) -> dict[str, Any]:
    """The contents of ``results.json``: fingerprints by key; empty if there is no such file."""
    path = work / RESULTS_FILE
    return read_object(path) if path.exists() else {}
