"""How accurate is each recipe? Quantizes the reference models by a list of recipes and appends one CSV row for each.

    python benchmarks/accuracy.py --models DIR --texts DIR [--model NAME ...] [--set core | --only NAME ...]
        [--outliers SEED ...] [--work DIR] [--device cuda]
    python benchmarks/accuracy.py ... --only "gemq 2.0" --recipe KEY=VALUE ... --label TEXT --out FILE

``--models`` holds the reference models, ``--texts`` the files ``calib_*.txt`` and ``val_*.txt``. Calibration takes 26
windows of 512 tokens from each calibration text, with self-generated windows as the recipe says. A row has KL and
perplexity, in float32, on the first 120 windows of each val text and on windows of the calibration texts that
calibration did not take ("inside"), and seconds per stage. Recipes that agree up to the candidates share one work
directory.

With ``--outliers`` the rows are of variants of the model with outliers (``outliers.py``), under the model's name with
``-outliers`` and the seed. With ``--recipe`` the keys replace those of the experiments, the names get the label in
brackets, and the rows go to a file of their own, so that they never count as results.

With ``--work`` a command that was stopped continues where it was: measured rows are skipped, jobs are resumed. Several
processes can share the directory and the file of rows. Two that need the same work directory take turns. Rows and work
directories belong to the code of gemq that made them: after a change of the code all is measured again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from experiments import EXPERIMENTS, FINISH_KEYS, SETS, Experiment
from gemq.calibration.windows import Windows, concat_sources, cut_windows, eval_windows, tokenize_text
from gemq.errors import UserError
from gemq.evaluation.evaluate import LoadedModel, evaluate, open_model
from gemq.models.structure import Structure, find_structure
from gemq.pipeline.job_record import read_job
from gemq.pipeline.quantize import Result, export, quantize
from gemq.quant.widths import ExpertWidths
from gemq.recipe import Recipe
from gemq.recipe_defaults import DEFAULT_BITS
from gemq.runtime.progress import Monitor
from outliers import Outliers, write_variant
from record import RESULTS as FOLDER
from record import append, code_digest, environment, locked, read
from rows import allocation_text, labelled, variant_name

WINDOW, PER_TEXT, VAL_WINDOWS, INSIDE_WINDOWS = 512, 26, 120, 12
RESULTS = FOLDER / "accuracy.csv"

MAX_LOGITS = 1 << 28
"""Upper bound for the logits of a batch in evaluation, which are float32."""

MAX_BATCH_TOKENS = 16_384
"""Upper bound for the tokens of a batch in evaluation."""

OPTIONAL_COLUMNS = {"val_top1": "top1_agreement", "val_kl_p99": "kl_p99"}
"""Columns of metrics that an evaluation may have, and their keys in its result. Empty where it has none."""

PRINTED = (
    *("name", "model", "stored_bits", "bytes", "val_kl", *OPTIONAL_COLUMNS, "val_perplexity", "inside_kl"),
    *("kl_by_text", "widths", "seconds", "fallbacks"),
)
"""Columns of a row that are printed when it is measured."""


def main() -> None:
    """Measures what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--model", nargs="+", default=["refmoe-olmoe-23m"], help="directories in --models")
    parser.add_argument("--outliers", type=int, nargs="+", metavar="SEED", help="measure variants with outliers")
    parser.add_argument("--outlier-values", type=int, default=0, help="outlier value channels of each attention")
    parser.add_argument("--set", nargs="+", default=["plain", "main"], choices=SETS)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names of experiments, instead of --set")
    parser.add_argument("--recipe", nargs="+", default=[], metavar="KEY=VALUE", help="keys for every experiment")
    parser.add_argument("--label", default="", help="of rows with --recipe")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, help="keeps work directories and variants here")
    parser.add_argument("--out", type=Path, help="file of the rows (default: results/accuracy.csv)")
    arguments = parser.parse_args()
    if arguments.recipe and not (arguments.label and arguments.out):
        parser.error("--recipe needs --label and --out: such rows are no results of gemq's own recipes")
    names = arguments.only or [experiment.name for name in arguments.set for experiment in SETS[name]]
    if unknown := sorted(set(names) - EXPERIMENTS.keys()):
        parser.error(f"no experiment is named {', '.join(unknown)}: choose from {', '.join(EXPERIMENTS)}")
    try:
        run(arguments, [EXPERIMENTS[name] for name in dict.fromkeys(names)])
    except UserError as error:
        sys.exit(f"error: {error}")


def run(arguments: argparse.Namespace, experiments: list[Experiment]) -> None:
    """Measures experiments on all models and variants of the command line."""
    overrides = parse_overrides(arguments.recipe)
    work = arguments.work or Path(tempfile.mkdtemp(prefix="gemq-accuracy-"))
    for name in arguments.model:
        model = arguments.models / name
        if not (model / "config.json").is_file():
            raise UserError(f"{model} is not a model directory: name others with --models and --model")
        for seed in [None] if arguments.outliers is None else arguments.outliers:
            if seed is not None:
                outliers = Outliers(seed=seed, values=arguments.outlier_values)
                model = make_variant(arguments.models / name, outliers, work / "variants")
            bench = Bench(model, arguments.texts, work, arguments.device, arguments.out or RESULTS)
            for experiment in experiments:
                bench.run(experiment, overrides, arguments.label)


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Recipe keys and values from texts such as ``lr_codes=1e-3`` and ``widths=[1,2,3]``, whose values are YAML."""
    overrides: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--recipe cannot be {text!r}: write KEY=VALUE, such as lr_codes=1e-3")
        overrides[key] = yaml.safe_load(value)
    return overrides


def make_variant(model: Path, outliers: Outliers, folder: Path) -> Path:
    """Return the directory of a model's variant in ``folder``, which is written if it does not exist."""
    variant = folder / variant_name(model.name, outliers.seed, outliers.values)
    with locked(folder / f"{variant.name}.lock"):
        if not variant.exists():
            write_variant(model, variant, outliers)
    return variant


class Bench:
    """One model and its texts."""

    def __init__(self, model: Path, texts: Path, work: Path, device: str, out: Path):
        """Args:
        model: directory of the full-precision model
        texts: directory of the calibration and val texts
        work: directory of all work directories
        device: ``auto``, ``cpu`` or ``cuda``
        out: file of the rows
        """
        self.model, self.work, self.device, self.out = model, work / model.name, device, out
        self.calibration = [file.resolve() for file in sorted(texts.glob("calib_*.txt"))]
        self.val_texts = sorted(texts.glob("val_*.txt"))
        self.code = code_digest()

    @cached_property
    def reference(self) -> LoadedModel:
        """The full-precision model."""
        return open_model(str(self.model), "float32", self.device)

    @cached_property
    def structure(self) -> Structure:
        """Of the full-precision model."""
        return find_structure(self.reference.model)

    @cached_property
    def val(self) -> Windows:
        """Windows of the val texts."""
        return eval_windows(self.reference.tokenizer, self.val_texts, WINDOW, VAL_WINDOWS)

    def run(self, experiment: Experiment, overrides: dict[str, Any], label: str) -> None:
        """Measures an experiment and appends its row, unless the row exists.

        Args:
            experiment: to be measured
            overrides: recipe keys that replace those of the experiment
            label: added to the name in brackets, unless it is empty
        """
        recipe = self.recipe(experiment, overrides)
        origin = {
            "name": labelled(experiment.name, label),
            "model": self.model.name,
            "code": self.code,
            "recipe": json.dumps({**experiment.keys, **overrides}, sort_keys=True),
        }
        work = self.work / self._work_name(recipe)
        with locked(work.with_suffix(".lock")) as lock:
            if self._is_measured(origin):
                print(f"{origin['name']}, {origin['model']}: measured before", flush=True)
                return
            # What an earlier process computed is not among this one's seconds.
            is_resumed = origin["name"] in lock.read_text(encoding="utf-8").splitlines()
            with lock.open("a", encoding="utf-8") as file:
                file.write(f"{origin['name']}\n")
            row = {**self.measure(experiment, recipe, work, is_resumed), **environment(self.device), **origin}
        first = {key: origin[key] for key in ("name", "model")}
        append(self.out, {**first, **row})
        print({k: v for k, v in {**first, **row}.items() if k in PRINTED}, flush=True)

    def recipe(self, experiment: Experiment, overrides: dict[str, Any]) -> Recipe:
        """The recipe of an experiment with ``overrides``. A new budget or effort replaces the experiment's."""
        keys = {
            "seq_len": WINDOW,
            "num_windows": PER_TEXT * len(self.calibration),
            "dtype": "float32",
            "calibration": [str(file) for file in self.calibration] if experiment.texts else ["self"],
            **experiment.keys,
        }
        return Recipe.from_dict(keys).replace(**overrides)

    def _work_name(self, recipe: Recipe) -> str:
        """Name of the work directory of a recipe: a digest of the code and of all that the candidates depend on."""
        shared = {key: value for key, value in recipe.to_dict().items() if key not in FINISH_KEYS}
        shared |= {"widths": [width.value for width in recipe.candidate_widths], "code": self.code}
        return hashlib.sha256(json.dumps(shared).encode()).hexdigest()[:12]

    def _is_measured(self, origin: dict[str, str]) -> bool:
        """Whether the file of rows has a row with these columns."""
        rows = read(self.out) if self.out.exists() else []
        return any(all(row.get(key) == value for key, value in origin.items()) for row in rows)

    def measure(self, experiment: Experiment, recipe: Recipe, work: Path, is_resumed: bool) -> dict[str, Any]:
        """Quantizes and evaluates the model. Returns the measured columns, without seconds of a resumed job."""
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            result = self.quantize(experiment, recipe, work, out)
            seconds = time.perf_counter() - begin
            packed = open_model(str(out), "float32", self.device).model
            val = self.evaluate(packed, self.val)
            inside = self.evaluate(packed, self.inside(work))
        return {
            "bits": f"{result.expert_bits_nominal:.4f}",
            "stored_bits": f"{result.expert_bits_stored:.4f}",
            "bytes": result.stored_bytes,
            "val_kl": f"{val['mean_kl']:.5f}",
            **{column: f"{val[key]:.5f}" if key in val else "" for column, key in OPTIONAL_COLUMNS.items()},
            "val_perplexity": f"{val['perplexity']:.4f}",
            "inside_kl": f"{inside['mean_kl']:.5f}",
            "kl_by_text": _short({n: t["mean_kl"] for n, t in val["texts"].items()}),
            "perplexity_by_text": _short({n: t["perplexity"] for n, t in val["texts"].items()}),
            "predicted_cost": "" if result.predicted_cost is None else f"{result.predicted_cost:.6g}",
            "widths": _counts(result.allocation),
            "allocation": allocation_text(result.allocation),
            "gains": _short(result.gains),
            "seconds": "" if is_resumed else f"{seconds:.1f}",
            "seconds_by_stage": "" if is_resumed else _short({n: s["seconds"] for n, s in result.stages.items()}),
            "tokens": sum(result.windows.values()) * result.seq_len,
            "fallbacks": _short({n: c for n, c in result.fallbacks.items() if c}),
        }

    def quantize(self, experiment: Experiment, recipe: Recipe, work: Path, out: Path) -> Result:
        """Writes the checkpoint of an experiment: by a job of its own, or from a work directory that others made."""
        if not experiment.reconstruct:
            recipe = recipe.replace(reconstruct=False, reconstruction_epochs=0, distill_epochs=0, guard=False)
        record = read_job(work)
        monitor = Monitor()
        if record is None or record.recipe == recipe.to_dict():
            return quantize(
                self.model, recipe, out=out, work=work, resume=work.exists(), device=self.device, monitor=monitor
            )
        budget = {} if recipe.bits is not None else {"bits": DEFAULT_BITS}
        changes = {key: getattr(recipe, key) for key in FINISH_KEYS}
        return export(
            work,
            out=out,
            changes=changes | budget,
            reconstruct=experiment.reconstruct,
            device=self.device,
            monitor=monitor,
        )

    def evaluate(self, model: Any, windows: Windows) -> dict[str, Any]:
        """Metrics of a model against the full-precision model."""
        vocabulary = self.reference.model.config.get_text_config().vocab_size
        return evaluate(
            model,
            windows,
            reference=self.reference.model,
            structure=self.structure,
            micro_batch_tokens=min(MAX_BATCH_TOKENS, MAX_LOGITS // vocabulary),
        )

    def inside(self, work: Path) -> Windows:
        """Windows of the calibration texts that calibration did not take."""
        calibration_rows = {
            tuple(row) for row in Windows.load(work / "windows" / "windows.safetensors").tokens.tolist()
        }
        windows_by_text = []
        for file in self.calibration:
            stream = torch.tensor(tokenize_text(self.reference.tokenizer, file.read_text(encoding="utf-8")))
            free = [w for w in cut_windows(stream, WINDOW) if tuple(w.tolist()) not in calibration_rows]
            windows_by_text.append(torch.stack(free[:INSIDE_WINDOWS]))
        return concat_sources(windows_by_text, [f.stem for f in self.calibration], [p.numel() for p in windows_by_text])


def _short(values: dict[str, float]) -> str:
    """Names and values in one cell."""
    return " ".join(f"{name.removeprefix('val_').replace(' ', '_')}={value:.4g}" for name, value in values.items())


def _counts(allocation: Iterable[list[ExpertWidths]]) -> str:
    """Matrices at each width: of experts, or of gate and up and of down apart where these differ."""
    first, down = zip(*(expert for row in allocation for expert in row), strict=True)
    texts = [" ".join(f"{w}:{widths.count(w)}" for w in sorted(set(widths))) for widths in (first, down)]
    return texts[0] if first == down else " / ".join(texts)


if __name__ == "__main__":
    main()
