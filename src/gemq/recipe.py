"""The recipe: everything that decides the bytes of a result, in one validated dataclass.

YAML files, command-line flags and Python all end here and are checked alike. What only decides where and how fast a job
runs (device, memory bounds, work directory) is not part of it. Must not import models, stages or files of a job.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from gemq.errors import UserError, shown
from gemq.quant.widths import LEVELS, SMALLEST_GROUP, Width, nominal_bits, parse_width, width_name
from gemq.recipe_values import MAX_SEED, convert, read_yaml
from gemq.recipe_values import parse_size as parse_size

DEFAULT_BITS = 2.0
DEFAULT_WIDTHS: tuple[Width, ...] = (1, 1.6, 2, 3)
CHOICES = {
    "effort": ("low", "medium", "high"),
    "quantizer": ("gptq", "rtn"),
    "score_form": ("token", "elementwise"),
    "score_labels": ("sampled", "data"),
    "score_weights": ("ladder", "rtn"),
    "allocate": ("global", "uniform", "random", "layerwise", "frequency"),
    "allocate_by": ("matrix", "expert"),
    "dtype": ("auto", "float32", "bfloat16"),
    "distil_loss": ("kl", "next_token"),
}
FROM_EFFORT = -1
BUDGETS = ("bits", "stored_bits", "size")
TUNABLE = ("routers", "norms", "grids")
EFFORTS: dict[str, dict[str, int]] = {
    "low": {"total_tokens": 0, "ladder_epochs": 0, "layer_epochs": 0, "distil_epochs": 0},
    "medium": {"total_tokens": 1_048_576, "ladder_epochs": 1, "layer_epochs": 1, "distil_epochs": 1},
    "high": {"total_tokens": 1_572_864, "ladder_epochs": 2, "layer_epochs": 2, "distil_epochs": 2},
}
"""What an effort means where a recipe does not say: see ``docs/accuracy.md`` for the measurements behind it."""


INTEGERS = {
    "windows": (1, 1_000_000),
    "batch_tokens": (1, 1 << 31),
    "seed": (0, MAX_SEED),
    "total_tokens": (0, 1 << 40),
    "score_tokens": (0, 1 << 40),
    "ladder_epochs": (0, 1000),
    "layer_epochs": (0, 1000),
    "distil_epochs": (0, 1000),
}
"""Least and most of whole numbers. The most is far beyond use, and far below what ends a job after hours."""

NUMBERS = ("damping", "hessian_shrink", "smoothing", "rate_ladder", "rate_codes", "rate_grids", "rate_tuned")
MOST, MOST_BYTES, LARGEST_GROUP = 1e6, 10**18, 1 << 20
"""Upper bounds of the numbers above, of a size in bytes, and of a group size."""

BUILT_IN: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "effort": "low",
        "widths": [1, 2, 3],
        "hessian_shrink": 0.0,
        "score_weights": "rtn",
        "score_form": "elementwise",
        "score_labels": "data",
        "smoothing": 0.0,
        "rescale": False,
        "allocate_by": "expert",
        "layer_rule": True,
        "progressive": [3.0, 2.5, 2.0],
        "guard": False,
        "distil_epochs": 1,
        "distil_loss": "next_token",
        "distil_sets": ["routers"],
        "rate_tuned": 1e-4,
    },
}
"""GEMQ as published (arXiv:2605.23078)."""


@dataclass(frozen=True)
class Recipe:
    """One quantization job. At most one of ``bits``, ``stored_bits`` and ``size`` sets the budget (default 2.0 bits).

    Raises UserError when a value cannot be used, with what would do.
    """

    # Budget
    bits: float | None = None
    """Average nominal bits per expert weight."""
    stored_bits: float | None = None
    """Average stored bits per expert weight: scales and offsets included."""
    size: int | None = None
    """Bytes of all the checkpoint's tensors."""
    progressive: tuple[float, ...] = ()
    """Budgets in bits on the way to ``bits``, the last of them, in falling order. After each but the last the model is
    quantized and tuned, and scores are computed again around it."""

    effort: str = "medium"
    """How much is computed. Sets ``total_tokens`` and epochs where they are not given; ``low`` trains nothing."""

    # Calibration
    calib: tuple[str, ...] = ("self",)
    """Sources: text or JSONL files, data set ids, or ``self`` for windows that the model itself writes."""
    calib_column: str | None = None
    """Column of rows whose text is taken. None: text, a conversation, or a prompt with its response."""
    windows: int = 128
    """Windows taken from all sources together."""
    window: int | None = None
    """Tokens per window; None is 2048, or the longest that the model takes."""
    total_tokens: int = FROM_EFFORT
    """Self-generated windows are added until calibration has this many tokens."""
    self_width: float | None = None
    """Let a packed copy with experts rounded to this width write the model's own windows. None: the model itself, or
    where memory does not hold it, the widest copy that it holds."""
    seed: int = 0

    # Grids
    widths: tuple[Width, ...] | None = None
    """Candidate widths of the experts; None is 1, 1.6, 2, 3, and 4 for budgets above 2.5 bits."""
    group_size: int = 128
    attention_bits: int = 4
    """Width of attention and every other linear outside the routed experts; 16 leaves them unquantized."""
    quantizer: str = "gptq"
    """``gptq``, or ``rtn`` for round to nearest."""
    damping: float = 0.01
    """Added to the diagonal of a Hessian, as a fraction of its mean."""
    hessian_shrink: float = 0.1
    """Weight of the layer's mean Hessian in every expert's, as a fraction of an expert's mean token count."""

    # Scores and allocation
    score_form: str = "token"
    """``token``: (g . D)^2 of each token; ``elementwise``: sum of (g * D)^2, as in the paper."""
    score_labels: str = "sampled"
    """Labels of the loss: ``sampled`` from the model's own prediction, or the next tokens of the ``data``."""
    score_weights: str = "ladder"
    """Weights whose errors are scored: those of the ``ladder``, or ``rtn`` as in the paper."""
    score_tokens: int = 262_144
    """Calibration tokens that are scored, the same share of every source. 0 scores all."""
    smoothing: float = 2.0
    """k of usage smoothing: a score is multiplied by (n + k mean n) / ((1 + k) n) for an expert's n tokens."""
    rescale: bool = True
    """Scale a layer's scores at each width to the KL measured with all of the layer's experts at that width."""
    allocate: str = "global"
    allocate_by: str = "matrix"
    """What the global program gives a width: every ``matrix`` of every expert (gate and up are one), or the ``expert``
    as a whole, as in the paper. The other ways to allocate go by expert."""
    layer_rule: bool = False
    """The paper's rule: every layer has an expert at the highest and one at the second-highest width."""

    guard: bool = True
    """Judge the allocation against uniform of the same budget on held-out windows, and soften it if it fails."""

    # Finish
    refine: bool = True
    """Quantize again at the chosen widths, layer by layer, on the activations of the quantized layers before."""

    # Training
    ladder_epochs: int = FROM_EFFORT
    """Epochs in which each expert is trained on its own at every width; 0 keeps GPTQ's ladder."""
    layer_epochs: int = FROM_EFFORT
    """Epochs in which each layer is trained at the chosen widths; needs ``refine``."""
    distil_epochs: int = FROM_EFFORT
    """Epochs of distillation of the whole quantized model."""
    distil_loss: str = "kl"
    """``kl`` from the full-precision model, or ``next_token`` as in the paper."""
    distil_sets: tuple[str, ...] = TUNABLE
    """What distillation trains: any of routers, norms and grids (the experts' scales and offsets)."""
    rate_ladder: float = 1e-2
    """Learning rate of the ladder's codes, as a share of the range between lowest and highest code."""
    rate_codes: float = 5e-3
    """Learning rate of a layer's codes, in codes."""
    rate_grids: float = 2e-3
    """Learning rate of scales and offsets, relative."""
    rate_tuned: float = 1e-3
    """Learning rate of routers and norms."""
    held_out: float = 0.05
    """Share of the micro-batches that training does not see and is judged on."""

    # Numerics
    batch_tokens: int = 4096
    """Tokens in a micro-batch. Fixes the order of sums, so that results do not depend on memory."""
    dtype: str = "auto"
    """Compute type of the full-precision model: float32, bfloat16, or auto (float32 on CPU, bfloat16 on GPU)."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = convert(field.name, getattr(self, field.name), str(field.type), "recipe")
            object.__setattr__(self, field.name, value)
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise UserError(f"{' and '.join(budgets)} each set the budget: give only one of them")
        self._check_progressive()
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name} cannot be {shown(getattr(self, name))}: choose from {', '.join(choices)}")
        for name, value in EFFORTS[self.effort].items():
            if getattr(self, name) == FROM_EFFORT:
                object.__setattr__(self, name, value)
        for name in self.distil_sets:
            if name not in TUNABLE:
                raise UserError(f"distil_sets cannot have {shown(name)}: choose from {', '.join(TUNABLE)}")
        if self.self_width is not None:
            object.__setattr__(self, "self_width", parse_width(self.self_width))
        if self.widths is not None:
            widths = tuple(sorted(set(self.widths)))
            if not widths:
                raise UserError("widths is empty: name at least one, such as 2")
            object.__setattr__(self, "widths", widths)
        if not SMALLEST_GROUP <= self.group_size <= LARGEST_GROUP or self.group_size & (self.group_size - 1):
            raise UserError(
                f"group_size {shown(self.group_size)} is not a power of two from {SMALLEST_GROUP} up: try 128"
            )
        if self.attention_bits not in (2, 3, 4, 8, 16):
            raise UserError(
                f"attention_bits cannot be {shown(self.attention_bits)}: choose 2, 3, 4, 8, or 16 for unquantized"
            )
        if not self.calib:
            raise UserError("calib names no source: give a text file, a data set id or self")
        self._check_numbers()
        if self.quantizer == "rtn" and (self.ladder_epochs or self.layer_epochs):
            raise UserError("quantizer rtn gives no start for training: set ladder_epochs and layer_epochs to 0")
        self._check_budget()

    def _check_numbers(self) -> None:
        for name, (least, most) in INTEGERS.items():
            value = getattr(self, name)
            if value < least:
                raise UserError(f"{name} cannot be {shown(value)}: the least is {least}")
            if value > most:
                raise UserError(f"{name} cannot be {shown(value)}: the most is {most}")
        if self.window is not None and self.window < 2:
            raise UserError(f"window cannot be {shown(self.window)}: a window has at least 2 tokens")
        for name in NUMBERS:
            value = getattr(self, name)
            if not 0 <= value < math.inf:  # NaN is neither
                raise UserError(f"{name} must be a number from 0 up (it is {value})")
            if value > MOST:
                raise UserError(f"{name} cannot be {value:g}: the most is {MOST:g}")
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out must be a share from 0 up and below 1 (it is {self.held_out})")

    def _check_progressive(self) -> None:
        steps = self.progressive
        if not steps:
            return
        text = ",".join(f"{b:g}" for b in steps)
        if any(a <= b for a, b in pairwise(steps)):
            raise UserError(f"progressive {text} does not fall: give budgets such as 3.0,2.5,2.0")
        if self.stored_bits is not None or self.size is not None:
            raise UserError("progressive goes by --bits: leave out stored_bits and size")
        if self.bits is None:
            object.__setattr__(self, "bits", steps[-1])
        if steps[-1] != self.bits:
            raise UserError(f"progressive {text} does not end at bits {self.bits:g}: make that its last budget")
        if not self.refine or self.allocate not in ("global", "layerwise"):
            raise UserError("progressive needs refine, and allocate global or layerwise: it scores refined models")

    def _check_budget(self) -> None:
        """Nominal budgets must lie within the widths. Stored and total bytes are checked when shapes are known."""
        low, high = nominal_bits(min(self.ladder_widths)), nominal_bits(max(self.ladder_widths))
        budgets = self.progressive or ((self.bits,) if self.bits is not None else ())
        bits = next((b for b in budgets if not low <= b <= high), None)
        if bits is not None:
            advice = f"give --bits from {low:g} to {high:g}"
            if bits > high and (wider := [w for w in LEVELS if nominal_bits(w) >= bits]):
                names = ",".join(width_name(w) for w in (*self.ladder_widths, wider[0]))
                by_quantize = " with" if self.widths is None else ": quantize with"  # export has the ladder's widths
                advice += f", or allow a wider width{by_quantize} --widths {names}"
            raise UserError(f"no allocation of widths {self.width_names} has {bits:g} bits: {advice}")
        for name in ("stored_bits", "size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be a positive number (it is {shown(value)})")
        if self.size is not None and self.size > MOST_BYTES:
            raise UserError(f"size cannot be {shown(self.size)}: the most is {MOST_BYTES} bytes")

    @property
    def ladder_widths(self) -> tuple[Width, ...]:
        """The candidate widths, defaults filled in, in ascending order."""
        if self.widths is not None:
            return self.widths
        return (*DEFAULT_WIDTHS, 4) if self.size or (self.bits or self.stored_bits or 0) > 2.5 else DEFAULT_WIDTHS

    @property
    def units(self) -> int:
        """How many widths an expert gets: one for each of its two matrices, or one for all of it."""
        return 2 if self.allocate_by == "matrix" else 1

    @property
    def width_names(self) -> str:
        return ", ".join(width_name(w) for w in self.ladder_widths)

    @property
    def budget_text(self) -> str:
        """``2 bits``, ``2.25 stored bits`` or ``12 GB``: how the summary names the budget."""
        if self.size is not None:
            return f"{self.size / 1e9:g} GB"
        if self.stored_bits is not None:
            return f"{self.stored_bits:g} stored bits"
        return f"{self.bits if self.bits is not None else DEFAULT_BITS:g} bits"

    def replace(self, **changes: Any) -> Recipe:
        """A copy with some keys changed. A new budget replaces the old one, whatever its kind, and a new effort the
        keys that the old one had set. Raises UserError for unknown keys."""
        changes = _clean(changes, origin="changes")
        if "effort" in changes:
            old = {name: FROM_EFFORT for name, value in EFFORTS[self.effort].items() if getattr(self, name) == value}
            changes = {**old, **changes}
        if any(changes.get(name) is not None for name in BUDGETS):
            steps = steps_to(changes.get("bits"), self.progressive)
            changes = {**dict.fromkeys(BUDGETS), "progressive": steps, **changes}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, for JSON and YAML."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "recipe") -> Recipe:
        """A recipe from plain values. Raises UserError for unknown keys and for values of the wrong kind."""
        return cls(**_clean(values, origin))

    @classmethod
    def from_yaml(cls, path: str | Path, flags: dict[str, Any] | None = None) -> Recipe:
        """A recipe from a YAML file of ``key: value`` lines, or a built-in one (``default``, ``paper``).

        flags: keys that go before the file's; a budget among them replaces the file's, whatever its kind
        Raises UserError when the file cannot be read.
        """
        values = _clean(BUILT_IN[str(path)] if str(path) in BUILT_IN else _read_file(path), origin=str(path))
        flags = flags or {}
        if any(name in flags for name in BUDGETS):
            values = {name: value for name, value in values.items() if name not in BUDGETS}
            if values.get("progressive"):
                values["progressive"] = steps_to(_clean(flags, "flag").get("bits"), values["progressive"])
        return cls(**{**values, **_clean(flags, origin="flag")})


def steps_to(bits: float | None, steps: tuple[float, ...]) -> tuple[float, ...]:
    """A progressive schedule with another end: its budgets above ``bits``, then ``bits``. Empty where there is none."""
    above = tuple(b for b in steps if bits is not None and b > bits)
    return (*above, bits) if above and bits is not None else ()


def _read_file(path: str | Path) -> dict[str, Any]:
    values = read_yaml(Path(path), hint=f"a YAML file of lines such as 'bits: 2.0', or {', '.join(BUILT_IN)}")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no keys: write lines such as 'bits: 2.0'")
    return values


def _clean(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """Values of the types that the recipe's fields have. Raises UserError for unknown keys and wrong kinds."""
    fields = {f.name: f for f in dataclasses.fields(Recipe)}
    clean: dict[str, Any] = {}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key)[:80], fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(fields)}"
            raise UserError(f"{origin}: unknown key {shown(key)}: {hint}")
        where = "--" + key.replace("_", "-") if origin == "flag" else origin
        clean[key] = convert(key, value, str(fields[key].type), where)
    return clean
