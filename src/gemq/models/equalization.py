"""Equalization: powers of two that make the channels of a layer's weights alike, without changing its function.

Large models have channels whose activations are hundreds of times those of others, and weights that are smaller by as
much. In a quantized matrix such a column gets the scale of its neighbors, and its codes round to zero. So column j of
the matrices that read an input is multiplied by 2^e[j], with

    e[j] = round(level - log2(rms(W[:, j]))),    level: near the usual size of trained weights

and what produces the input is divided by it (a *fold*):

- a norm, whose weight is divided. Everything that reads its output is multiplied, routers included
- up projections, whose rows are divided for the down projection
- value projections, whose rows are divided for the output projection

Floating-point numbers represent powers of two exactly, so the layer computes the same to the bit. A model whose
channels were rescaled gets the weights of the original. Activations do not enter: GPTQ weighs errors by them already,
and scales that balance activations with weights (SmoothQuant, AWQ) made its error larger (docs/lab-log.md, entry 49).

``models.fold_search`` finds the folds of a layer, and verifies them.

Shapes: E experts, R rows, C columns, I inputs of the down matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

ROW_LEVEL = -5.0
"""log2 of the root mean square of the columns whose inputs come from rows: near that of trained weights."""

ROWS_PER_CHUNK = 1024
"""Rows whose squares are computed in one go, in float64."""

SCALING_PREFIX, ONE_PLUS_SUFFIX = "scaling:", "+1"
"""Of the keys of scalings in files."""

MAX_EXPONENT = 60
"""Largest exponent: scaled weights stay far inside the range of bfloat16."""


@dataclass(frozen=True)
class Scaling:
    """Multiplies one tensor of a layer by powers of two.

    Attributes:
        name: of the tensor inside the layer
        exponents: int8, broadcast over the tensor
        one_plus: one plus the tensor is multiplied, since the norm that holds it multiplies by one plus its weight
    """

    name: str
    exponents: Tensor
    one_plus: bool = False

    def apply(self, tensor: Tensor) -> Tensor:
        """Returns the scaled tensor, in its dtype and on its device."""
        factors = self._factors(tensor.device)
        if self.one_plus:
            return ((1 + tensor.float()) * factors - 1).to(tensor.dtype)
        if tensor.dtype == torch.float16:  # factors may be outside the range of the type
            return (tensor.float() * factors).to(tensor.dtype)
        return tensor * factors.to(tensor.dtype)

    def apply_(self, tensor: Tensor) -> None:
        """Scales a tensor in place."""
        if self.one_plus or tensor.dtype == torch.float16:
            tensor.copy_(self.apply(tensor))
        else:
            tensor.mul_(self._factors(tensor.device).to(tensor.dtype))

    def _factors(self, device: torch.device) -> Tensor:
        """Returns the powers of two, float32."""
        return torch.exp2(self.exponents.to(device, torch.float32))

    def inverse(self) -> Scaling:
        """Returns the scaling that undoes this one."""
        return replace(self, exponents=-self.exponents)

    def is_exact(self, tensor: Tensor, dtype: torch.dtype) -> bool:
        """Returns whether ``dtype`` represents every scaled element of ``tensor``."""
        stored = tensor.to(dtype)
        return torch.equal(self.inverse().apply(self.apply(stored)), stored)


@dataclass(frozen=True)
class RowFold:
    """Rows that are divided, and the columns of the next matrix that read them and are multiplied.

    Attributes:
        producer: name of the weight inside the layer, [R, H], or [E, R, H] of experts
        consumer: name of the weight inside the layer, [H, C], or [E, H, C]
        producer_bias: name of the producer's bias, [R] or [E, R]; None if it has none
        rows: [C] int64, the producer's row that each column reads. Other rows stay as they are
        transposed: both weights are stored with their last two dimensions exchanged
        uniform: one exponent for all channels of a matrix, which makes producer and consumer equally large
    """

    producer: str
    consumer: str
    producer_bias: str | None
    rows: Tensor
    transposed: bool = False
    uniform: bool = False

    def choose(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Chooses the exponents of the producer's rows, [R] or [E, R] int8, from a layer's tensors by name."""
        producer, consumer = tensors[self.producer], tensors[self.consumer]
        if self.transposed:
            producer, consumer = producer.mT, consumer.mT
        rows = self.rows.to(consumer.device)
        column_squares = mean_squares(consumer)
        if self.uniform:
            row_squares = mean_squares(producer.mT)[..., rows].mean(-1, keepdim=True)
            level = (row_squares.log2() + column_squares.mean(-1, keepdim=True).log2()) / 4
            exponents = choose_exponents(column_squares.mean(-1, keepdim=True), level)
            return exponents.expand(*exponents.shape[:-1], producer.shape[-2])
        sums = column_squares.new_zeros(*column_squares.shape[:-1], producer.shape[-2])
        sums.index_add_(-1, rows, column_squares)
        squares = sums / torch.bincount(rows, minlength=producer.shape[-2])
        return choose_exponents(squares, squares.new_tensor(ROW_LEVEL))

    def scalings(self, exponents: Tensor) -> list[Scaling]:
        """Returns the scalings with given exponents of the producer's rows, [R] or [E, R] int8."""
        rows = self.rows.to(exponents.device)
        column_exponents = exponents[..., rows]
        row_exponents = torch.zeros_like(exponents)
        row_exponents[..., rows] = -column_exponents
        row_dim, column_dim = (-2, -1) if self.transposed else (-1, -2)
        scalings = [
            Scaling(self.producer, row_exponents.unsqueeze(row_dim)),
            Scaling(self.consumer, column_exponents.unsqueeze(column_dim)),
        ]
        if self.producer_bias is not None:
            scalings.append(Scaling(self.producer_bias, row_exponents))
        return scalings


@dataclass(frozen=True)
class NormFold:
    """A norm whose weight is divided, and everything that reads its output and is multiplied.

    Attributes:
        norm: name of the norm's weight inside the layer, [C]
        bias: name of its bias; None if it has none
        one_plus: the norm multiplies by one plus its weight
        readers: names of the weights that read its output, with C inputs in their last dimension
        transposed: readers with C inputs in the dimension before the last
        quantized: the readers that are quantized, which decide the scaling
    """

    norm: str
    bias: str | None
    one_plus: bool
    readers: tuple[str, ...]
    transposed: tuple[str, ...]
    quantized: tuple[str, ...]

    def choose(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Chooses the exponents of the readers' columns, [C] int8, from a layer's tensors by name.

        Their rows must be equalized already. The norm's median factor becomes nearly one. Training then changes norms
        and routers at the rate for which its learning rate was chosen.
        """
        sums: Tensor | None = None
        rows = 0
        for name in self.quantized:
            weight = tensors[name].mT if name in self.transposed else tensors[name]
            squares = mean_squares(weight)
            squares = squares.mean(0) if squares.dim() == 2 else squares
            count = weight[..., 0].numel()
            sums = squares * count if sums is None else sums + squares * count
            rows += count
        assert sums is not None
        squares = sums / rows
        factor = tensors[self.norm].double() + self.one_plus
        sizes = squares.log2() / 2 + factor.abs().log2()  # independent of how channels are scaled
        sizes = sizes[sizes.isfinite()]
        level = sizes.median() if len(sizes) else squares.new_zeros(())
        return choose_exponents(squares, level)

    def scalings(self, exponents: Tensor) -> list[Scaling]:
        """Returns the scalings with given exponents of the readers' columns, [C] int8."""
        scalings = [Scaling(self.norm, -exponents, self.one_plus)]
        if self.bias is not None:
            scalings.append(Scaling(self.bias, -exponents))
        scalings += [Scaling(name, exponents) for name in self.readers]
        scalings += [Scaling(name, exponents.unsqueeze(-1)) for name in self.transposed]
        return scalings


Fold = RowFold | NormFold


def fold_to_dict(fold: Fold) -> dict[str, Any]:
    """Returns a fold as plain values."""
    values = vars(fold).copy()
    if isinstance(fold, RowFold):
        values["rows"] = fold.rows.tolist()
    return values


def fold_from_dict(values: Mapping[str, Any]) -> Fold:
    """Reads what ``fold_to_dict`` has returned, possibly after a detour through JSON."""
    if "rows" in values:
        return RowFold(**{**values, "rows": torch.tensor(values["rows"])})
    arguments: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
    }
    return NormFold(**arguments)


def choose_exponents(squares: Tensor, level: Tensor) -> Tensor:
    """Returns the exponents of channels [..., C] int8 that bring their root mean squares near 2^level.

    The level moves by up to a half, so that channels that differ little get the same exponent. Half of them could be
    rounded up and half of them down otherwise. The move depends on the fractional parts of the channels' logarithms
    alone, which powers of two leave as they are. Channels without weights get no exponent.

    Args:
        squares: [..., C] float64, mean squares of the channels' weights
        level: [..., 1] or a scalar, log2 of the root mean square to reach
    """
    sizes = squares.log2() / 2
    alive = sizes.isfinite()
    angles = 2 * math.pi * torch.where(alive, sizes, torch.zeros_like(sizes))
    sine = (angles.sin() * alive).sum(-1, keepdim=True)
    cosine = (angles.cos() * alive).sum(-1, keepdim=True)
    fraction = torch.atan2(sine, cosine) / (2 * math.pi)  # circular mean of the fractional parts
    exponents = (level - fraction).round() + (fraction - sizes).round()
    exponents = torch.where(alive & exponents.isfinite(), exponents, torch.zeros_like(exponents))
    return exponents.clamp(-MAX_EXPONENT, MAX_EXPONENT).to(torch.int8)


def mean_squares(weight: Tensor) -> Tensor:
    """Returns the mean square of each column of weights [R, C] or [E, R, C]: [C] or [E, C] float64."""
    if weight.dim() == 3:
        return torch.stack([mean_squares(matrix) for matrix in weight])
    sums = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    for rows in weight.split(ROWS_PER_CHUNK):
        sums += rows.double().square().sum(0)
    return sums / len(weight)


@torch.no_grad()
def equalize_(
    folds: Sequence[Fold], tensors: Mapping[str, Tensor], stored_types: Mapping[str, torch.dtype]
) -> list[Scaling]:
    """Chooses the scalings of a layer and scales its tensors in place.

    Args:
        folds: of the layer, in order: row folds, norm folds, uniform row folds. Rows decide the size of columns
        tensors: the layer's tensors by name
        stored_types: dtypes of the tensors in files, by name

    Returns:
        The scalings in the order of their application. Folds whose result the stored types do not represent have none.
    """
    scalings: list[Scaling] = []
    for fold in folds:
        fold_scalings = fold.scalings(fold.choose(tensors))
        if are_representable(fold_scalings, tensors, stored_types):
            scale_(fold_scalings, tensors)
            scalings += fold_scalings
    return scalings


def are_representable(
    scalings: Iterable[Scaling], tensors: Mapping[str, Tensor], stored_types: Mapping[str, torch.dtype]
) -> bool:
    """Returns whether files represent scaled tensors. Float32 and bfloat16 represent products with powers of two."""
    for scaling in scalings:
        tensor = tensors[scaling.name]
        stored = stored_types.get(scaling.name, tensor.dtype)
        always_exact = not scaling.one_plus and stored in (torch.float32, torch.bfloat16)
        if not always_exact and not scaling.is_exact(tensor, stored):
            return False
    return True


@torch.no_grad()
def scale_(scalings: Iterable[Scaling], tensors: Mapping[str, Tensor]) -> None:
    """Scales those of a layer's tensors, by name, that are present, in place."""
    for scaling in scalings:
        if scaling.name in tensors:
            scaling.apply_(tensors[scaling.name])


class Equalization:
    """The folds of a model's layers, and the scalings of the layers that were loaded."""

    def __init__(self, prefixes: Sequence[str], stored_types: Mapping[str, torch.dtype]):
        """
        Args:
            prefixes: of the names of each layer's tensors, with a dot at the end
            stored_types: dtypes of the model's tensors in files, by name inside the model
        """
        self._prefixes, self._stored_types = prefixes, stored_types
        self._folds: list[Sequence[Fold]] = [()] * len(prefixes)
        self._scalings: dict[int, list[Scaling]] = {}

    def set_folds(self, index: int, folds: Sequence[Fold]) -> None:
        """Sets the folds of a layer. Call before the layer is loaded for a stage."""
        self._folds[index] = folds
        self._scalings.pop(index, None)

    def to_tensors(self, index: int) -> dict[str, Tensor]:
        """Returns the scalings of a loaded layer as tensors by key, for a file."""
        tensors = {}
        for number, scaling in enumerate(self._scalings.get(index, ())):
            suffix = ONE_PLUS_SUFFIX if scaling.one_plus else ""
            # a copy, since the tensors of a file must not share memory
            tensors[f"{SCALING_PREFIX}{number}:{scaling.name}{suffix}"] = scaling.exponents.clone()
        return tensors

    def read_tensors(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Sets the scalings of a layer to what ``to_tensors`` has returned."""
        numbered = {}
        for key, exponents in tensors.items():
            number, _, name = key.removeprefix(SCALING_PREFIX).partition(":")
            one_plus = name.endswith(ONE_PLUS_SUFFIX)
            numbered[int(number)] = Scaling(name.removesuffix(ONE_PLUS_SUFFIX), exponents, one_plus)
        self._scalings[index] = [numbered[number] for number in sorted(numbered)]

    def scales_columns(self, index: int, name: str) -> bool:
        """Returns whether the columns of a weight are scaled one by one.

        Args:
            index: of the layer
            name: of the weight inside the layer
        """
        for fold in self._folds[index]:
            if isinstance(fold, RowFold) and fold.consumer == name and not fold.uniform:
                return True
            if isinstance(fold, NormFold) and name in (*fold.readers, *fold.transposed):
                return True
        return False

    def is_known(self, index: int) -> bool:
        """Returns whether the scalings of a layer are known, so that a part of its tensors can be scaled."""
        return not self._folds[index] or index in self._scalings

    def equalize_(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Scales a layer's tensors, by name inside the model, in place. All of them, unless ``is_known``."""
        if not self._folds[index]:
            return
        prefix = self._prefixes[index]
        local = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        if index in self._scalings:
            scale_(self._scalings[index], local)
            return
        types = {name: self._stored_types.get(prefix + name, tensor.dtype) for name, tensor in local.items()}
        scalings = equalize_(self._folds[index], local, types)
        self._scalings[index] = [replace(scaling, exponents=scaling.exponents.cpu()) for scaling in scalings]

    def folded(self, index: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns some of a layer's tensors, by name inside the model, scaled. Call only if ``is_known``."""
        prefix = self._prefixes[index]
        result = dict(tensors)
        for scaling in self._scalings.get(index, ()):
            if prefix + scaling.name in result:
                result[prefix + scaling.name] = scaling.apply(result[prefix + scaling.name])
        return result
