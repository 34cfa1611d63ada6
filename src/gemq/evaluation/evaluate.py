"""``gemq eval``: the quality of a model on disk or in memory, alone or against a full-precision reference.

``evaluation.scoring`` defines the figures on windows, ``evaluation.generation_check`` those of written texts.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gemq.assets import builtin_texts
from gemq.calibration.rows import RowStats
from gemq.calibration.windows import Windows, eval_windows
from gemq.checkpoint.contents import Contents, inspect_checkpoint
from gemq.checkpoint.format import is_packed
from gemq.checkpoint.load import load
from gemq.errors import UserError
from gemq.evaluation.generation_check import GenerationCheck
from gemq.evaluation.model_files import (
    ModelFiles,
    check_dtype,
    check_memory,
    max_tokens_per_batch,
    predict_all,
)
from gemq.evaluation.predictions import WholeModel
from gemq.evaluation.scoring import compare
from gemq.evaluation.tasks import Tasks
from gemq.models.byte_sizes import parameter_bytes
from gemq.models.experts import use_fast_experts
from gemq.models.source import DTYPES, Source, max_seq_len
from gemq.models.structure import Structure, find_structure
from gemq.runtime.device import pick_device
from gemq.runtime.fallbacks import pop_messages
from gemq.runtime.memory import MemoryBudget
from gemq.runtime.progress import Monitor

MAX_TOKENS_PER_BATCH = 4096
"""Upper bound for the tokens of a batch of windows. A batch has at least one window."""


def evaluate(
    model: nn.Module,
    windows: Windows,
    *,
    reference: nn.Module | None = None,
    structure: Structure | None = None,
    micro_batch_tokens: int = MAX_TOKENS_PER_BATCH,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluates a loaded model on ``windows``.

    Args:
        reference: the full-precision model to compare with
        structure: of the reference; the paths of its experts must be valid in both models. Without it the routing is
            not compared
        micro_batch_tokens: upper bound for the tokens of a batch of windows

    Returns:
        The values that ``gemq eval --json`` prints: ``windows``, ``tokens``, ``perplexity``, ``mean_kl``, ``kl_p99``,
        ``kl_p999``, ``top1_agreement``, ``routing_agreement``, the standard errors of perplexity, KL and top-1,
        ``texts`` (the same by source) and ``layers`` (routing agreement of each layer with experts).
    """
    batches = [windows.tokens[batch] for batch in windows.batches(micro_batch_tokens)]
    expert_paths: list[str] = []
    if structure is not None and reference is not None:
        expert_paths = [layer.experts.path for _, layer in structure.moe_layers]
    reference_predictions = None if reference is None else WholeModel(reference, batches, expert_paths)
    return compare(windows, batches, WholeModel(model, batches, expert_paths), reference_predictions, progress)


@dataclass(frozen=True)
class LoadedModel:
    """A model that was loaded from disk.

    Attributes:
        model: in eval mode
        source: its files
        contents: of the packed checkpoint, or None for a model that is not packed
        stored_bytes: size of its tensors in the files
    """

    model: PreTrainedModel
    source: Source
    contents: Contents | None
    stored_bytes: int

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer. Raises UserError when the model has none."""
        return self.source.tokenizer


def open_model(
    path: str,
    dtype: str,
    device: str,
    trust_remote_code: bool = False,
    gpu_memory: int | None = None,
    context: int | None = None,
    batch: int = 1,
) -> LoadedModel:
    """Loads a packed checkpoint or any Transformers model.

    Args:
        path: directory or name on the Hugging Face Hub
        dtype: ``float32``, ``bfloat16``, or ``auto`` for the one in the configuration
        device: ``cpu``, ``cuda``, or ``auto``
        gpu_memory: upper bound of GPU memory in bytes, for a packed checkpoint
        context: tokens of a text that are to fit into ``gpu_memory``; not used without it
        batch: texts at the same time that are to fit into ``gpu_memory``

    Raises:
        UserError: the model cannot be loaded.
    """
    check_dtype(dtype)
    target = pick_device(device)
    source = Source.resolve(path, trust_remote_code=trust_remote_code)
    if is_packed(source.path):
        contents = inspect_checkpoint(source.path)
        load_dtype: Any = DTYPES.get(dtype, "auto")
        limits: Any = {}
        if gpu_memory is not None:
            limits = {"gpu_memory": gpu_memory, "context": context, "batch": batch}
        model = load(source.path, device=str(target), dtype=load_dtype, trust_remote_code=trust_remote_code, **limits)
        return LoadedModel(model, source, contents, contents.stored_bytes)
    if gpu_memory is not None:
        raise UserError(f"--gpu-memory is for packed checkpoints and {path} is none: leave it out")
    model, stored_dtypes = source.load(target, DTYPES.get(dtype))
    return LoadedModel(model, source, None, parameter_bytes(model, stored_dtypes))


def evaluate_paths(
    model: str | Path,
    *,
    reference: str | Path | None = None,
    texts: Sequence[str | Path] | None = None,
    text_column: str | None = None,
    seq_len: int = 512,
    max_windows: int | None = None,
    generate: bool = False,
    max_new_tokens: int | None = None,
    tasks: Sequence[str] = (),
    task_directories: Sequence[str | Path] = (),
    task_limit: int | None = None,
    num_fewshot: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
    gpu_memory: int | None = None,
    host_memory: int | None = None,
    trust_remote_code: bool = False,
    monitor: Monitor | None = None,
) -> dict[str, Any]:
    """Measure the quality of a model on disk: perplexity, and KL to a full-precision reference.

    Windows do not overlap. The first token of each is not scored. Memory limits decide where layers and activations
    lie. They do not change the result, except that a model writes texts only if memory holds all of its layers.

    Args:
        model: directory or hub id of a packed checkpoint or any Transformers model
        reference: directory or hub id of the full-precision model to compare with; None: only perplexity is computed
        texts: text or JSONL files with different stems; None: the built-in texts
        text_column: column of rows that holds the text; None: as ``calibration_column`` of a recipe
        seq_len: tokens per window
        max_windows: number of windows to take from the start of each text; None: all
        generate: let both models continue 32 prompts from the texts, greedily and sampled, and compare what they write
        max_new_tokens: upper bound for the tokens of each continuation; None: 512, on a CPU 128
        tasks: names of tasks, groups or tags of lm-eval that the model also runs, or paths of YAML files
        task_directories: directories with YAML files of more tasks
        task_limit: documents of each task to take from its start; None: all
        num_fewshot: examples in each prompt of a task; None: as each task defines
        dtype: compute type: ``float32``, ``bfloat16``, or ``auto`` for the one in the configuration
        device: ``auto``, ``cpu`` or ``cuda``
        gpu_memory: limit in bytes; None: 90 % of the free memory
        host_memory: limit in bytes; None: 90 % of the free memory
        trust_remote_code: allow Python code that comes with the models to run
        monitor: shows progress and collects seconds and memory of the stages; None: nothing is shown

    Returns:
        The values that ``gemq eval --json`` writes. A standard error is that of the mean over windows.

        - ``model``, ``stored_bytes``: the model, and bytes of its tensors
        - ``expert_bits_nominal``, ``expert_bits_stored``: mean bits per expert weight without and with scales and
          offsets, None for a model that is not packed
        - ``reference``, ``seq_len``, ``dtype``, ``device``: how it was measured
        - ``built_in_texts``: whether the texts are those that come with gemq
        - ``windows``, ``tokens``: number of windows and of scored tokens
        - ``perplexity``, ``perplexity_stderr``: of the model
        - ``texts``: windows, tokens and all metrics of each text, by the stem of its file
        - ``layers``: routing agreement of each layer with experts, empty without a reference
        - ``rows``: the columns that were read, if a text has rows
        - ``fallbacks``: what was not done in the usual way, a line each

        With a reference also, and by text too:

        - ``reference_perplexity``: of the reference
        - ``mean_kl``, ``mean_kl_stderr``: KL(reference || model) in nats per token
        - ``kl_p99``, ``kl_p999``: the KL that 99 % and 99.9 % of the tokens stay below, exact
        - ``top1_agreement``, ``top1_agreement_stderr``: share of tokens whose most likely next token is the same
        - ``routing_agreement``: share of the reference's chosen experts that the model chose as well

        With ``generate``, under ``generation``:

        - ``prompts``, ``prompts_in_chat_template``, ``max_new_tokens``, ``seed``: what was continued, and how
        - ``model``, ``reference``: by ``greedy`` and ``sampled``, the figures of what each wrote, if memory held it:
          ``repetition_rate`` (share of repeated 4-grams), ``loops`` and ``loop_share`` (continuations that end in a
          loop), ``ended``, ``ended_share`` and ``ended_mean_tokens`` (continuations with an end token, and their
          length). With a reference also ``mean_kl`` and ``mean_kl_stderr``: the KL along the model's continuations
        - ``texts``: ``source`` and ``prompt``, and by model and mode the ``text`` that continues it, with its figures

        With ``tasks``, under ``tasks``:

        - ``lm_eval``, ``limit``: version of lm-eval, and ``task_limit``
        - ``results``: by task and group ``documents``, ``num_fewshot``, ``version`` and ``metrics``, a list of
          ``metric``, ``filter``, ``value``, ``stderr`` and ``higher_is_better``

    Raises:
        UserError: the model cannot be evaluated. Most causes are detected before any weight is read.
    """
    if max_new_tokens is not None and not generate:
        raise UserError("--max-new-tokens is the length of generated texts: add --generate")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UserError(f"--max-new-tokens cannot be {max_new_tokens}: the minimum is 1")
    model = str(model)
    reference = None if reference is None else str(reference)
    target = pick_device(device)
    models = _open_models(model, reference, seq_len, dtype, trust_remote_code)
    subject, reference_files = models[-1], models[0] if len(models) > 1 else None

    rows: dict[str, RowStats] = {}
    windows = eval_windows(
        subject.source.tokenizer,
        texts or builtin_texts(),
        seq_len,
        max_windows,
        column=text_column,
        embeddings=subject.embeddings,
        row_stats=rows,
    )
    batch_size = max_tokens_per_batch(models, MAX_TOKENS_PER_BATCH)
    monitor = monitor or Monitor()
    task_values = None
    if tasks:
        requested = Tasks.read(tasks, directories=task_directories, limit=task_limit, num_fewshot=num_fewshot)
        task_values = _run_tasks(requested, model, dtype, target, trust_remote_code, quiet=monitor.console is None)
    check = GenerationCheck.plan(subject, reference_files, windows, target, max_new_tokens) if generate else None
    with tempfile.TemporaryDirectory(prefix="gemq-eval-") as directory:
        memory = MemoryBudget.bounded(target, gpu_memory, host_memory, Path(directory))
        with memory.enforced():
            values, model_bytes = _run_models(models, windows, batch_size, check, memory, monitor)
    if not math.isfinite(values["perplexity"]):
        raise UserError(
            f"{model} produces non-finite predictions: its weights hold NaN or infinity, or overflow in {dtype}"
        )

    contents = subject.contents
    properties = {
        "model": model,
        "stored_bytes": model_bytes,
        "expert_bits_nominal": contents.expert_bits_nominal if contents else None,
        "expert_bits_stored": contents.expert_bits_stored if contents else None,
        "reference": reference,
        "built_in_texts": not texts,
        "seq_len": seq_len,
        "dtype": dtype,
        "device": target.type,
    }
    if rows:
        values["rows"] = {name: text_rows.to_dict() for name, text_rows in rows.items()}
    if check is not None:
        values["generation"] = check.values()
    if task_values is not None:
        values["tasks"] = task_values
    values["fallbacks"] = (check.fallbacks if check else []) + pop_messages()
    return properties | values


def _open_models(
    model: str, reference: str | None, seq_len: int, dtype: str, trust_remote_code: bool
) -> list[ModelFiles]:
    """Opens the reference, if there is one, and then the evaluated model. Raises UserError if they do not go together.

    Arguments as of ``evaluate_paths``.
    """
    subject = ModelFiles.open(model, dtype, trust_remote_code)
    _check_window(subject, seq_len)
    if reference is None:
        return [subject]
    reference_files = ModelFiles.open(reference, dtype, trust_remote_code)
    _check_comparable(subject, reference_files)
    return [reference_files, subject]


def _run_tasks(
    tasks: Tasks, path: str, dtype: str, device: torch.device, trust_remote_code: bool, quiet: bool
) -> dict[str, Any]:
    """Loads a model as a whole and runs tasks of lm-eval with it. See ``Tasks.evaluate``."""
    loaded = open_model(path, dtype, str(device), trust_remote_code)
    if loaded.contents is None:
        use_fast_experts(loaded.model)
    return tasks.evaluate(loaded.model, loaded.tokenizer, quiet=quiet)


def _run_models(
    models: Sequence[ModelFiles],
    windows: Windows,
    batch_size: int,
    check: GenerationCheck | None,
    memory: MemoryBudget,
    monitor: Monitor,
) -> tuple[dict[str, Any], int]:
    """Runs the models and compares them.

    Args:
        models: the reference, if there is one, and the evaluated model
        windows: of the evaluation
        batch_size: tokens of a batch
        check: continues prompts with both models, and measures the texts
        memory: limits
        monitor: progress

    Returns:
        The values of ``compare``, and the bytes of the evaluated model's tensors.
    """
    batches = [windows.tokens[batch] for batch in windows.batches(batch_size)]
    text_batches: list[Tensor] = []
    if check is not None:
        shapes = [(batches[0].shape[0], windows.seq_len), (check.batch_rows(batch_size), check.seq_len)]
        check_memory(models, memory, shapes)
        check.write(memory, monitor)
        text_batches = check.batches(batch_size)
    predictions, model_bytes = predict_all(models, memory, [*batches, *text_batches], monitor)
    reference = predictions[0] if len(models) > 1 else None
    with monitor.stage("score", len(windows)) as tick:
        values = compare(windows, batches, predictions[-1], reference, tick)
    if check is not None and reference is not None and text_batches:
        indices = range(len(batches), len(batches) + len(text_batches))
        with monitor.stage("score texts", check.num_texts) as tick:
            check.measure(predictions[-1], reference, indices, tick)
    return values, model_bytes


def _check_window(model: ModelFiles, seq_len: int) -> None:
    """Raises UserError if a window is longer than the model supports."""
    longest = max_seq_len(model.config)
    if seq_len > longest:
        raise UserError(f"--seq-len {seq_len} is longer than the model takes: give at most {longest}")


def _check_comparable(subject: ModelFiles, reference: ModelFiles) -> None:
    """Raises UserError if ``subject`` cannot be compared with ``reference``."""
    name = reference.name
    if reference.contents is not None:
        raise UserError(f"{name} is a packed checkpoint: --reference takes the full-precision model")
    if reference.structure is None:
        find_structure(reference.source.skeleton())  # raises the UserError that names the unsupported module
    if reference.source.tokenizer.get_vocab() != subject.source.tokenizer.get_vocab():
        raise UserError(f"{name} has another vocabulary than {subject.name}: give the model that it was made from")
    if reference.vocabulary != subject.vocabulary:
        raise UserError(f"{name} has other logits than {subject.name}: give the model that it was made from")
    if reference.expert_paths != subject.expert_paths:
        raise UserError(f"{name} has other experts than {subject.name}: give the model that it was made from")
