"""How accurate is each recipe? Quantizes the reference models by a list of recipes and appends one CSV row for each.

    python benchmarks/accuracy.py --models DIR --texts DIR [--model refmoe-olmoe-23m] [--set main] [--device cuda]

``--models`` holds the reference models, ``--texts`` the files ``calib_*.txt`` and ``val_*.txt``. Calibration takes 26
windows of 512 tokens from each calibration text, with self-generated windows as the recipe says. A row has KL and
perplexity, in float32, on the first 120 windows of each val text and on windows of the calibration texts that
calibration did not take ("inside"), and seconds per stage. Recipes that agree up to the candidates share one work
directory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gemq.calibration.windows import Windows, concat_sources, cut_windows, eval_windows, tokenize_text
from gemq.evaluation.evaluate import evaluate, open_model
from gemq.models.structure import find_structure
from gemq.pipeline.quantize import export, quantize
from gemq.quant.widths import ExpertWidths
from gemq.recipe import BUILT_IN, DEFAULT_BITS, Recipe
from gemq.runtime.progress import Monitor
from record import RESULTS as FOLDER
from record import append, environment
from rows import allocation_text

WINDOW, PER_TEXT, VAL_WINDOWS, INSIDE_WINDOWS = 512, 26, 120, 12
RESULTS = FOLDER / "accuracy.csv"

FINISH_KEYS = (
    *("bits", "stored_bits", "size", "progressive", "allocate", "layer_rule", "smoothing", "reconstruct", "guard"),
    *("score_form", "score_labels", "score_tokens", "rescale"),
    *("reconstruction_epochs", "distill_epochs", "distill_loss", "distill_parameters"),
)
"""Recipe keys that change neither candidates nor scores: recipes that differ in these alone share a work directory."""


@dataclass(frozen=True)
class Experiment:
    """A recipe under a name, with ``texts`` or self-generated windows alone, reconstructed or assembled."""

    name: str
    keys: dict[str, Any] = field(default_factory=dict)
    texts: bool = True
    reconstruct: bool = True


def uniform(bits: float, **keys: Any) -> dict[str, Any]:
    return {"allocate": "uniform", "bits": bits, **keys}


PLAIN = {"effort": "low"}
SCORE_KEYS: dict[str, dict[str, Any]] = {
    "default": {},
    "smoothing 0": {"smoothing": 0},
    "smoothing 0.5": {"smoothing": 0.5},
    "smoothing 8": {"smoothing": 8},
    "smoothing 1e9": {"smoothing": 1e9},
    "elementwise": {"score_form": "elementwise", "allocate_by": "expert"},
    "by expert": {"allocate_by": "expert"},
    "labels of the text": {"score_labels": "data"},
    "all tokens": {"score_tokens": 0},
    "a quarter of the tokens": {"score_tokens": 65_536},
    "an eighth of the tokens": {"score_tokens": 32_768},
    "no rescaling": {"rescale": False},
    "layer rule": {"layer_rule": True},
    "layerwise": {"allocate": "layerwise"},
    "frequency": {"allocate": "frequency"},
    "uniform": {"allocate": "uniform"},
}
SETS: dict[str, list[Experiment]] = {
    "plain": [
        Experiment("plain uniform 2", uniform(2, **PLAIN)),
        Experiment("plain uniform 3", uniform(3, **PLAIN)),
        Experiment("plain random 2.0", {"allocate": "random", "bits": 2, **PLAIN}),
        Experiment("plain random 1.5", {"allocate": "random", "bits": 1.5, **PLAIN}),
        Experiment("plain random 2.5", {"allocate": "random", "bits": 2.5, **PLAIN}),
        Experiment("low 2.0", {"bits": 2, **PLAIN}),
    ],
    "main": [
        Experiment("gemq 2.0", {"bits": 2}),
        Experiment("treated uniform 2", uniform(2)),
        Experiment("assembled 2.0", {"bits": 2}, reconstruct=False),
        Experiment("gemq 1.5", {"bits": 1.5}),
        Experiment("treated random 1.5", {"allocate": "random", "bits": 1.5}),
        Experiment("gemq 2.5", {"bits": 2.5}),
        Experiment("treated random 2.5", {"allocate": "random", "bits": 2.5}),
    ],
    "paper": [
        Experiment("paper 2.0", {**BUILT_IN["paper"], "bits": 2}),
        Experiment("paper 1.5", {**BUILT_IN["paper"], "bits": 1.5}),
        Experiment("paper 2.5", {**BUILT_IN["paper"], "bits": 2.5}),
    ],
    "methods": [
        Experiment(f"treated {method} {bits}", {"allocate": method, "bits": bits, "guard": False})
        for bits in (2.0, 1.5, 2.5)
        for method in ("frequency", "layerwise")
    ],
    "progressive": [
        Experiment("gemq 2.0 progressive", {"bits": 2, "progressive": [3.0, 2.5, 2.0]}),
        Experiment("gemq 1.5 progressive", {"bits": 1.5, "progressive": [2.5, 2.0, 1.5]}),
    ],
    "scores": [
        Experiment(f"assembled {bits} {name}", {"bits": bits, **keys}, reconstruct=False)
        for bits in (2.0, 1.5, 2.5)
        for name, keys in SCORE_KEYS.items()
    ],
    "self": [Experiment("self only 2.0", {"bits": 2}, texts=False)],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--model", default="refmoe-olmoe-23m")
    parser.add_argument("--set", nargs="+", default=["plain", "main"], choices=SETS)
    parser.add_argument("--only", nargs="*", help="names of experiments")
    parser.add_argument("--keys", default="{}", help="JSON of recipe keys for every experiment")
    parser.add_argument("--label", default="", help="added to every name")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--work", type=Path, help="keeps work directories here")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="gemq-accuracy-"))
    bench = Bench(arguments.models / arguments.model, arguments.texts, work, arguments.device, arguments.out)
    for name in arguments.set:
        for experiment in SETS[name]:
            if not arguments.only or experiment.name in arguments.only:
                bench.run(experiment, json.loads(arguments.keys), arguments.label)


class Bench:
    """One model and its texts."""

    def __init__(self, model: Path, texts: Path, work: Path, device: str, out: Path):
        self.model, self.work, self.device, self.out = model, work, device, out
        self.calibration = sorted(texts.glob("calib_*.txt"))
        self.reference = open_model(str(model), "float32", device)
        self.structure = find_structure(self.reference.model)
        self.val = eval_windows(self.reference.tokenizer, sorted(texts.glob("val_*.txt")), WINDOW, VAL_WINDOWS)

    def run(self, experiment: Experiment, overrides: dict[str, Any], label: str) -> None:
        begin = time.perf_counter()
        keys = {
            "seq_len": WINDOW,
            "num_windows": PER_TEXT * len(self.calibration),
            "dtype": "float32",
            **overrides,
            **experiment.keys,
        }
        calibration = tuple(str(f) for f in self.calibration) if experiment.texts else ("self",)
        recipe = Recipe.from_dict({**keys, "calibration": list(calibration)})
        shared = {k: v for k, v in recipe.to_dict().items() if k not in FINISH_KEYS}
        work = self.work / hashlib.sha256(json.dumps(shared).encode()).hexdigest()[:12]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            monitor = Monitor()
            if work.exists():
                budget = {} if recipe.bits is not None else {"bits": DEFAULT_BITS}
                changes = {**{k: getattr(recipe, k) for k in FINISH_KEYS}, **budget}
                result = export(
                    work,
                    out=out,
                    changes=changes,
                    reconstruct=experiment.reconstruct,
                    device=self.device,
                    monitor=monitor,
                )
            else:
                if not experiment.reconstruct:
                    recipe = recipe.replace(reconstruct=False, reconstruction_epochs=0, distill_epochs=0, guard=False)
                result = quantize(str(self.model), recipe, out=out, work=work, device=self.device, monitor=monitor)
            seconds = time.perf_counter() - begin
            opened = open_model(str(out), "float32", self.device)
            val = self.measure(opened.model, self.val)
            inside = self.measure(opened.model, self.inside(work))
        row = {
            "name": experiment.name + label,
            "model": self.model.name,
            "bits": f"{result.expert_bits_nominal:.4f}",
            "stored_bits": f"{result.expert_bits_stored:.4f}",
            "bytes": result.stored_bytes,
            "val_kl": f"{val['mean_kl']:.5f}",
            "val_perplexity": f"{val['perplexity']:.4f}",
            "inside_kl": f"{inside['mean_kl']:.5f}",
            "kl_by_text": _short({n: t["mean_kl"] for n, t in val["texts"].items()}),
            "perplexity_by_text": _short({n: t["perplexity"] for n, t in val["texts"].items()}),
            "predicted_cost": "" if result.predicted_cost is None else f"{result.predicted_cost:.6g}",
            "widths": _counts(result.allocation),
            "allocation": allocation_text(result.allocation),
            "gains": _short(result.gains),
            "seconds": f"{seconds:.1f}",
            "seconds_by_stage": _short({n: s["seconds"] for n, s in result.stages.items()}),
            "tokens": sum(result.windows.values()) * result.seq_len,
            "fallbacks": _short({n: c for n, c in result.fallbacks.items() if c}),
            **environment(self.device),
            "recipe": json.dumps({**overrides, **experiment.keys}, sort_keys=True),
        }
        append(self.out, row)
        print({k: row[k] for k in list(row)[:16] if k != "allocation"}, flush=True)

    def measure(self, model: Any, windows: Windows) -> dict[str, Any]:
        return evaluate(
            model, windows, reference=self.reference.model, structure=self.structure, micro_batch_tokens=16384
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
    return " ".join(f"{name.removeprefix('val_').replace(' ', '_')}={value:.4g}" for name, value in values.items())


def _counts(allocation: Iterable[list[ExpertWidths]]) -> str:
    """Matrices at each width: of experts, or of gate and up and of down apart where these differ."""
    first, down = zip(*(expert for row in allocation for expert in row), strict=True)
    texts = [" ".join(f"{w}:{widths.count(w)}" for w in sorted(set(widths))) for widths in (first, down)]
    return texts[0] if first == down else " / ".join(texts)


if __name__ == "__main__":
    main()
