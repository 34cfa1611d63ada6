"""Tasks such as ARC and GSM8K, through the package lm-eval.

lm-eval is optional. Names of tasks are checked before anything is computed.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemq.errors import UserError, short_repr
from gemq.runtime.fallbacks import first_line

INSTALL = 'pip install "lm-eval[hf]>=0.4.13"'
"""The command that installs lm-eval. ``load`` and results of tasks differ in older releases."""

_TASK_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError, RuntimeError)
"""Errors of a task's file, of its data set, and of packages that it needs."""


@dataclass(frozen=True)
class Tasks:
    """Tasks of lm-eval that were found and read.

    Attributes:
        manager: lm-eval's index of tasks.
        selected: tasks and groups of lm-eval.
        limit: documents of each task; None: all.
        num_fewshot: examples in each prompt; None: as each task defines.
        batch_size: documents that the model reads at the same time.
    """

    manager: Any
    selected: tuple[Any, ...]
    limit: int | None
    num_fewshot: int | None
    batch_size: int

    @classmethod
    def read(
        cls,
        names: Sequence[str],
        *,
        directories: Sequence[str | Path] = (),
        limit: int | None = None,
        num_fewshot: int | None = None,
        batch_size: int = 8,
    ) -> Tasks:
        """Finds tasks by name and reads their data sets, which are downloaded if necessary.

        Args:
            names: of tasks, groups and tags. ``*`` stands for any characters. Or paths of YAML files.
            directories: with YAML files of more tasks.
            limit: documents of each task; None: all.
            num_fewshot: examples in each prompt; None: as each task defines.
            batch_size: documents that the model reads at the same time.

        Raises:
            UserError: lm-eval is not installed, a task does not exist or its data cannot be read.
        """
        for directory in directories:
            if not Path(directory).is_dir():
                raise UserError(f"--task-path {directory} is no directory: name one with YAML files of tasks")
        are_files = all(_is_file(name) for name in names)
        manager = _import("lm_eval.tasks").TaskManager(
            include_path=[str(directory) for directory in directories],
            include_defaults=not are_files,  # reading thousands of files takes seconds
        )
        matched: list[str] = []
        for name in names:
            matched += _match(manager, name)
        try:
            loaded = manager.load(list(dict.fromkeys(matched)))
        except _TASK_ERRORS as error:
            raise UserError(
                f"tasks {', '.join(names)} cannot be read ({first_line(error)}): correct or leave out"
            ) from error
        return cls(manager, _outermost(loaded), limit, num_fewshot, batch_size)

    def evaluate(self, model: Any, tokenizer: Any, *, quiet: bool = True) -> dict[str, Any]:
        """Runs the tasks.

        Args:
            model: a loaded causal language model.
            tokenizer: of the model.
            quiet: hide lm-eval's progress bars.

        Returns:
            The value ``tasks`` of ``gemq eval --json``.

        Raises:
            UserError: a task cannot be run.
        """
        harness_model = _import("lm_eval.models.huggingface").HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=self.batch_size
        )
        try:
            with contextlib.redirect_stderr(io.StringIO()) if quiet else contextlib.nullcontext():
                results = _import("lm_eval").simple_evaluate(
                    harness_model,
                    tasks=list(self.selected),
                    task_manager=self.manager,
                    limit=self.limit,
                    num_fewshot=self.num_fewshot,
                    log_samples=False,
                )
        except (ImportError, ValueError) as error:  # a package that only this task needs, or a task that runs code
            raise UserError(f"lm-eval cannot run these tasks ({first_line(error)}): correct or leave out") from error
        return {
            "lm_eval": results.get("lm_eval_version"),
            "limit": self.limit,
            "results": {name: _row(name, results) for name in results["results"]},
        }


def _import(module: str) -> Any:
    """Imports a module of lm-eval. Raises UserError if it is not installed, or too old or new."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        importlib.import_module("lm_eval")
        imported = importlib.import_module(module)
    except ImportError as error:
        reason = "is not installed" if error.name == "lm_eval" else f"cannot be imported ({first_line(error)})"
        raise UserError(f"--tasks needs lm-eval, which {reason}: {INSTALL}") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return imported


def _is_file(name: str) -> bool:
    """Whether a task is named by the path of its file."""
    return name.endswith((".yaml", ".yml")) and Path(name).is_file()


def _match(manager: Any, name: str) -> list[str]:
    """The tasks of a name or pattern. Raises UserError if there are none."""
    if _is_file(name):
        return [name]
    matched: list[str] = manager.match_tasks([name])
    if not matched:
        near = difflib.get_close_matches(name[:80], manager.all_tasks, n=1)
        hint = f"did you mean {near[0]}?" if near else "lm-eval ls tasks lists them"
        raise UserError(f"lm-eval has no task {short_repr(name)}: {hint}")
    return matched


def _outermost(loaded: dict[str, Any]) -> tuple[Any, ...]:
    """The tasks and groups that are in no other group."""
    members = {member for names in loaded["group_map"].values() for member in names}
    everything = {**loaded["tasks"], **loaded["groups"]}
    return tuple(item for name, item in everything.items() if name not in members)


def _row(name: str, results: dict[str, Any]) -> dict[str, Any]:
    """The figures of a task or group, from lm-eval's results."""
    values = results["results"][name]
    higher_is_better = results.get("higher_is_better", {}).get(name, {})
    metrics = []
    for key, value in values.items():
        metric, comma, variant = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{variant}")
        row = {
            "metric": metric,
            "filter": variant,
            "value": float(value),
            "stderr": float(error) if isinstance(error, int | float) else None,
            "higher_is_better": higher_is_better.get(metric),
        }
        metrics.append(row)
    documents = results.get("n-samples", {}).get(name, {}).get("effective")
    return {
        "documents": documents,
        "num_fewshot": results.get("n-shot", {}).get(name),
        "version": results.get("versions", {}).get(name),
        "metrics": metrics,
    }
