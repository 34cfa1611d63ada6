"""The recipe: everything that decides the bytes of a result, in one validated dataclass.

YAML files, command-line flags and Python arguments become a recipe and are validated in the same way. Device, memory
bounds and work directory are not part of it: they only decide where and how fast a job runs. Must not import models or
stages.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from gemq.errors import UserError, short_repr
from gemq.quant.widths import ALL_TRELLIS_WIDTHS, SMALLEST_GROUP, AnyWidth, Width
from gemq.recipe_defaults import (
    BUDGETS,
    BUILT_IN,
    DEFAULT_BITS,
    DEFAULT_WIDTHS,
    EFFORTS,
    FROM_EFFORT,
    TUNABLE,
    WIDE_BUDGETS,
)
from gemq.recipe_values import (
    CHOICES,
    DENSE_BITS,
    MAX_GROUP_SIZE,
    MAX_SIZE_BYTES,
    UNQUANTIZED_BITS,
    check_numbers,
    convert,
    convert_keys,
    plain_value,
    read_keys,
    read_widths,
    steps_to,
)
from gemq.recipe_values import parse_size as parse_size


@dataclass(frozen=True)
class Recipe:
    """The settings of a quantization job: everything that decides the bytes of its result.

    All keys are optional. At most one of ``bits``, ``stored_bits`` and ``size`` sets the budget. A recipe does not
    change: ``replace`` returns a changed copy.

    Raises:
        UserError: a value cannot be used. The message says which values can.
    """

    # Budget
    bits: float | None = None
    """Budget: mean nominal bits per expert weight, without scales and offsets. 2.0 if no budget is given."""
    stored_bits: float | None = None
    """Budget: mean stored bits per expert weight, with scales and offsets."""
    size: int | None = None
    """Budget: bytes of all the checkpoint's tensors. Texts such as ``12GB`` are read too (1 GB is 1e9 bytes)."""
    progressive: tuple[float, ...] = ()
    """Budgets in bits in falling order, such as 3.0, 2.5, 2.0. The last one is ``bits``. After each of the others the
    model is reconstructed, and scores are computed again around it."""

    # Effort
    effort: str = "medium"
    """How much is computed. Sets ``total_tokens`` and epochs that are not given. ``low`` trains nothing."""

    # Calibration
    calibration: tuple[str, ...] = ("self",)
    """Sources of calibration text: text or JSONL files, data set ids, or ``self`` (windows that the model writes)."""
    calibration_column: str | None = None
    """Column of rows that holds the text. None: ``text``, else a conversation, else a prompt with its response, else
    ``content``, ``body`` or ``document``."""
    num_windows: int = 128
    """Number of windows from all sources together."""
    seq_len: int | None = None
    """Tokens per window. None: 2048, or the longest sequence that the model supports if that is shorter."""
    total_tokens: int = FROM_EFFORT
    """Self-generated windows are added until calibration has this many tokens. 0 adds none."""
    generator_width: Width | None = None
    """Generate windows with a packed copy of the model whose experts are rounded to this width. None: with the model
    itself, or where memory does not hold it, with the widest copy that fits."""
    seed: int = 0
    """Seed of every random choice."""

    # Equalization
    equalize: bool = True
    """Scale channels of the full-precision model by powers of two, so that they are alike. It computes the same, and
    outlier channels cost less. Norms and up projections take up the scales, so that inference costs nothing."""

    # Codes
    codes: str = "auto"
    """Codes of the experts: ``affine`` (scale times code plus offset) or ``trellis``, which are more accurate, but slow
    to compute without a GPU. ``auto``: ``trellis`` on a GPU where the model and the widths allow it."""
    widths: tuple[AnyWidth, ...] | None = None
    """Candidate widths of the experts. Affine codes: any of 1, 1.6, 2, 3, 4 and 8. None: 1, 1.6, 2 and 3, and for
    budgets above 2.5 bits or in bytes also 4. Trellis codes: any multiples of 0.125 from 1 to 4. None: 1, 1.5, 2, 2.5
    and 3, and for budgets from 2.25 bits up or in bytes also 4. Reconstruction then uses all multiples of 0.125 between
    them."""
    group_size: int = 128
    """Weights that share a scale and an offset: a power of two from 16 up. Halved for a matrix whose number of columns
    it does not divide."""
    dense_bits: int = 4
    """Width of the dense linears, which are all quantized linears outside the routed experts: 2, 3, 4 or 8. 16
    leaves them unquantized."""
    quantizer: str = "gptq"
    """``gptq``, or ``rtn`` (round to nearest), which needs ``candidate_epochs`` and ``reconstruction_epochs`` of 0."""
    dampening: float = 0.01
    """Added to the diagonal of a Hessian, as a fraction of its mean."""
    hessian_shrinkage: float = 0.1
    """Weight of the layer's mean Hessian in each expert's Hessian, as a fraction of an expert's mean token count."""

    # Scores and allocation
    score_form: str = "token"
    """``token``: (g . D)^2 of each token, for its gradient g and the error D of the expert's output. ``elementwise``:
    the sum of (g * D)^2 over dimensions, as in the paper."""
    score_labels: str = "sampled"
    """Labels of the loss: ``sampled`` from the model's own prediction, or the next tokens of the ``data``."""
    score_weights: str = "candidates"
    """Weights whose errors are scored: the ``candidates``, or weights rounded to nearest (``rtn``) as in the paper."""
    score_tokens: int = 262_144
    """Calibration tokens that are scored, the same share of each source. 0: all."""
    smoothing: float = 2.0
    """Strength k of usage smoothing, 0 for none: a score of an expert with n tokens is multiplied by
    (n + k mean n) / ((1 + k) n)."""
    rescale: bool = True
    """Scale a layer's scores at each width to the KL measured with all of the layer's experts at that width."""
    allocate: str = "global"
    """How widths are allocated: ``global`` or ``layerwise`` by scores, or ``uniform``, ``random`` or ``frequency``."""
    allocate_by: str = "matrix"
    """What gets a width: each ``matrix`` of an expert (gate and up count as one), or the whole ``expert``, as in the
    paper. Methods other than ``global`` allocate by expert."""
    layer_rule: bool = False
    """The paper's rule: each layer has an expert at the highest and one at the second-highest width."""
    guard: bool = True
    """Compare the allocation with uniform widths of the same budget on held-out windows. Soften it if it is worse."""

    # Reconstruction
    reconstruct: bool = True
    """Quantize again at the chosen widths, layer by layer, on the activations of the preceding quantized layers."""
    compensate: bool = True
    """Let an expert's down projection make up for the quantization of its gate and up. Needs ``reconstruct``."""

    # Training
    candidate_epochs: int = FROM_EFFORT
    """Epochs of training each candidate on its own. 0 keeps the codes of the ``quantizer``."""
    reconstruction_epochs: int = FROM_EFFORT
    """Epochs of training each layer at the chosen widths. Needs ``reconstruct``."""
    distill_epochs: int = FROM_EFFORT
    """Epochs of distillation of the whole quantized model."""
    distill_loss: str = "kl"
    """Loss of distillation: ``kl`` from the full-precision model, or ``next_token`` as in the paper."""
    distill_parameters: tuple[str, ...] = TUNABLE
    """What distillation trains: any of ``routers``, ``norms`` and ``grids`` (scales and offsets of experts)."""
    lr_candidates: float = 1e-2
    """Learning rate of the candidates' codes, as a share of the range between lowest and highest code."""
    lr_codes: float = 5e-3
    """Learning rate of codes in reconstruction, in codes."""
    lr_grids: float = 2e-3
    """Learning rate of scales and offsets, relative to their values."""
    lr_tuned: float = 1e-3
    """Learning rate of routers and norms."""
    val_fraction: float = 0.05
    """Share of the micro-batches that are not trained on, and that decide whether training helped. Below 1."""

    # Numerics
    micro_batch_tokens: int = 4096
    """Tokens in a micro-batch. It fixes the order of sums, so that results do not depend on memory."""
    dtype: str = "auto"
    """Compute type of the full-precision model. ``auto``: ``float32`` on a CPU, ``bfloat16`` on a GPU."""

    def __post_init__(self) -> None:
        """Converts, completes and checks all values."""
        for field in dataclasses.fields(self):
            self._set(field.name, convert(field.name, getattr(self, field.name), str(field.type), "recipe"))
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(budgets) > 1:
            raise UserError(f"{' and '.join(budgets)} each set the budget: give only one of them")
        self._check_progressive()
        self._check_choices()
        for name, value in EFFORTS[self.effort].items():
            if getattr(self, name) == FROM_EFFORT:
                self._set(name, value)
        self._check_widths()
        if not self.calibration:
            raise UserError("calibration names no source: give a text file, a data set id or self")
        check_numbers(self)
        if self.codes == "trellis" and "rtn" in (self.quantizer, self.score_weights):
            raise UserError("trellis codes have no rtn: choose quantizer gptq and score_weights candidates")
        if self.quantizer == "rtn" and (self.candidate_epochs or self.reconstruction_epochs):
            raise UserError("quantizer rtn allows no training: set candidate_epochs and reconstruction_epochs to 0")
        self._check_budget()

    def _set(self, name: str, value: Any) -> None:
        """Sets a value while the recipe is constructed."""
        object.__setattr__(self, name, value)

    def _check_choices(self) -> None:
        """Raises UserError for a value that is not among the choices of its key."""
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"{name} cannot be {short_repr(getattr(self, name))}: choose from {', '.join(choices)}")
        for name in self.distill_parameters:
            if name not in TUNABLE:
                raise UserError(f"distill_parameters cannot have {short_repr(name)}: choose from {', '.join(TUNABLE)}")

    def _check_widths(self) -> None:
        """Sorts the candidate widths, and raises UserError for widths and group sizes that do not exist."""
        if self.widths is not None:
            if not self.widths:
                raise UserError("widths is empty: name at least one, such as 2")
            codes, widths = read_widths(self.widths, self.codes)
            self._set("codes", codes)
            self._set("widths", tuple(sorted(set(widths))))
        is_power_of_two = self.group_size & (self.group_size - 1) == 0
        if not SMALLEST_GROUP <= self.group_size <= MAX_GROUP_SIZE or not is_power_of_two:
            raise UserError(
                f"group_size {short_repr(self.group_size)} is not a power of two from {SMALLEST_GROUP} up: try 128"
            )
        if self.dense_bits not in DENSE_BITS:
            raise UserError(
                f"dense_bits cannot be {short_repr(self.dense_bits)}: choose 2, 3, 4, 8, or 16 for unquantized"
            )

    def _check_progressive(self) -> None:
        """Checks a progressive schedule, whose last budget becomes ``bits``."""
        steps = self.progressive
        if not steps:
            return
        text = ",".join(f"{budget:g}" for budget in steps)
        if any(budget <= next_budget for budget, next_budget in pairwise(steps)):
            raise UserError(f"progressive {text} does not fall: give budgets such as 3.0,2.5,2.0")
        if self.stored_bits is not None or self.size is not None:
            raise UserError("progressive needs a budget in bits: leave out stored_bits and size")
        if self.bits is None:
            self._set("bits", steps[-1])
        if steps[-1] != self.bits:
            raise UserError(f"progressive {text} does not end at bits {self.bits:g}: make that its last budget")
        if not self.reconstruct or self.allocate not in ("global", "layerwise"):
            raise UserError(
                "progressive needs reconstruct, and allocate global or layerwise: it scores reconstructed models"
            )

    def _check_budget(self) -> None:
        """Checks that nominal budgets lie within the candidate widths. Other budgets are checked with the model."""
        low, high = min(self.candidate_widths).bits, max(self.candidate_widths).bits
        budgets = self.progressive
        if not budgets and self.bits is not None:
            budgets = (self.bits,)
        for bits in budgets:
            if not low <= bits <= high:
                advice = f"give --bits from {low:g} to {high:g}{self._wider_advice(bits)}"
                raise UserError(f"no allocation of widths {self.width_names} has {bits:g} bits: {advice}")
        for name in ("stored_bits", "size"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} must be a positive number (it is {short_repr(value)})")
        if self.size is not None and self.size > MAX_SIZE_BYTES:
            raise UserError(f"size cannot be {short_repr(self.size)}: the maximum is {MAX_SIZE_BYTES} bytes")

    def _wider_advice(self, bits: float) -> str:
        """For messages: how to reach ``bits`` with one more width; empty where no width helps."""
        all_widths: Iterable[AnyWidth] = ALL_TRELLIS_WIDTHS if self.codes == "trellis" else Width
        wider = [width for width in all_widths if width.bits >= bits]
        if bits < max(self.candidate_widths).bits or not wider:
            return ""
        names = ",".join(str(width) for width in (*self.candidate_widths, wider[0]))
        command = " with" if self.widths is None else ": quantize with"  # an export cannot add widths
        return f", or allow a wider width{command} --widths {names}"

    @property
    def candidate_widths(self) -> tuple[AnyWidth, ...]:
        """The candidate widths in ascending order. Without ``widths``, those that suit the budget."""
        if self.widths is not None:
            return self.widths
        bits = self.bits or self.stored_bits or 0
        kind = "trellis" if self.codes == "trellis" else "affine"
        widths = DEFAULT_WIDTHS[kind]
        return widths if self.size or bits > WIDE_BUDGETS[kind] else widths[:-1]

    @property
    def allocated_widths(self) -> tuple[AnyWidth, ...]:
        """The widths of a reconstructed model: for trellis codes also all between the candidates."""
        widths = self.candidate_widths
        if self.codes != "trellis":
            return widths
        low, high = widths[0].bits, widths[-1].bits
        return tuple(width for width in ALL_TRELLIS_WIDTHS if low <= width.bits <= high)

    @property
    def has_output_feedback(self) -> bool:
        """Whether reconstruction feeds errors back between rows: with trellis codes.

        This takes the second moments of the gradients at the experts' output.
        """
        return self.codes == "trellis"

    @property
    def has_budget(self) -> bool:
        """Whether a budget was chosen. Without one it is ``DEFAULT_BITS``."""
        return bool(self.progressive) or any(getattr(self, key) is not None for key in BUDGETS)

    @property
    def dense_width(self) -> Width | None:
        """The width of the dense linears; None leaves them unquantized."""
        return Width(self.dense_bits) if self.dense_bits < UNQUANTIZED_BITS else None

    @property
    def units_per_expert(self) -> int:
        """Number of widths of an expert: 2, one for each of its matrices, or 1 for the whole expert."""
        return 2 if self.allocate_by == "matrix" else 1

    @property
    def width_names(self) -> str:
        """The candidate widths for messages."""
        return ", ".join(str(w) for w in self.candidate_widths)

    @property
    def budget_text(self) -> str:
        """The budget for the summary: ``2 bits``, ``2.25 stored bits`` or ``12 GB``."""
        if self.size is not None:
            return f"{self.size / 1e9:g} GB"
        if self.stored_bits is not None:
            return f"{self.stored_bits:g} stored bits"
        return f"{self.bits if self.bits is not None else DEFAULT_BITS:g} bits"

    def replace(self, **changes: Any) -> Recipe:
        """Return a copy with some keys changed.

        A new budget replaces the old one, whatever its kind. A new effort replaces the values that the old one had set.

        Args:
            changes: keys and their new values.

        Raises:
            UserError: a key is unknown, or a value cannot be used.
        """
        changes = _converted(changes, origin="changes")
        if "effort" in changes:
            for name, value in EFFORTS[self.effort].items():
                if getattr(self, name) == value:
                    changes.setdefault(name, FROM_EFFORT)
        if any(changes.get(name) is not None for name in BUDGETS):
            steps = steps_to(changes.get("bits"), self.progressive)
            changes = {**dict.fromkeys(BUDGETS), "progressive": steps, **changes}
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON and YAML."""
        return {field.name: plain_value(getattr(self, field.name)) for field in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "recipe") -> Recipe:
        """Make a recipe from plain values.

        Args:
            values: values by key. Keys that are left out get their defaults.
            origin: where the values were written, for messages.

        Raises:
            UserError: a key is unknown, or a value cannot be used.
        """
        return cls(**_converted(values, origin))

    @classmethod
    def from_yaml(cls, path: str | Path, flags: dict[str, Any] | None = None) -> Recipe:
        """Read a recipe from a YAML file of ``key: value`` lines, or take a built-in one.

        Args:
            path: path of the file, or the name of a built-in recipe (``default``, ``paper``).
            flags: values by key that override the file's. A budget among them replaces the file's, whatever its kind.

        Raises:
            UserError: the file cannot be read, a key is unknown, or a value cannot be used.
        """
        built_in = BUILT_IN.get(str(path))
        values = _converted(read_keys(path, BUILT_IN) if built_in is None else built_in, origin=str(path))
        flags = flags or {}
        if any(name in flags for name in BUDGETS):
            values = {name: value for name, value in values.items() if name not in BUDGETS}
            if values.get("progressive"):
                values["progressive"] = steps_to(_converted(flags, "flag").get("bits"), values["progressive"])
        return cls(**{**values, **_converted(flags, origin="flag")})


def _converted(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """Converts values to the types of the recipe's fields, see ``convert_keys``."""
    return convert_keys(values, {field.name: str(field.type) for field in dataclasses.fields(Recipe)}, origin)
