"""Finds the folds of a model's layers (``models.equalization``), and verifies them.

One layer of each kind runs on a few tokens, while hooks record which modules read the output of which norm. Names
propose pairs of linears. Every fold is then tried with exponents that differ between channels, and the layer must
compute the same to the bit. A fold that changes the output, such as that of a norm with a reader that is not
understood, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gemq.models.equalization import Fold, NormFold, RowFold, Scaling, are_representable, scale_
from gemq.models.experts import scales_with_up, up_rows
from gemq.models.layer_calls import Call
from gemq.models.replay import Replay
from gemq.models.structure import Layer, is_norm

ROW_FOLDS = (
    *(("up_proj", "down_proj"), ("w3", "w2")),
    *(("v_proj", "o_proj"), ("v_proj", "out_proj"), ("v_proj", "dense"), ("kv_b_proj", "o_proj")),
)
"""Names of two linears of one module, where the columns of the second may take up a scaling of the rows of the first.
"""


PROBE_STEP = 5
"""Exponents that folds are tried with are -2 to 2 times this: enough to reach the bounds of families that clamp."""

MAX_DIFFERENCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Relative differences between two runs of one layer whose kernels add in another order. A wrong fold changes a
channel by up to 1,000 times."""


@dataclass(frozen=True)
class LayerFolds:
    """The folds of one layer.

    Attributes:
        folds: in the order of their application
        not_equalized: number of inputs of quantized matrices that no fold scales. Matrices with one input count once
    """

    folds: Sequence[Fold]
    not_equalized: int


@torch.no_grad()
def find_folds(
    replay: Replay, kinds: Sequence[int], ids: Tensor, stored_types: Mapping[str, torch.dtype]
) -> dict[int, LayerFolds]:
    """Finds the folds of the first layer of each kind, by its index.

    Args:
        replay: the full-precision model. Layers of one kind hold equal weights
        kinds: for each layer, the index of the first layer of its kind
        ids: token ids [B, S] to run on
        stored_types: dtypes of the model's tensors in files, by name inside the model
    """
    hidden, calls = replay.inputs(ids)
    result: dict[int, LayerFolds] = {}
    for index, call in enumerate(calls):
        if kinds[index] == index:
            search = _LayerSearch(replay, index, hidden, call, stored_types)
            result[index] = search.run()
            hidden = search.output
        else:
            hidden = replay.run(index, hidden, call)
    return result


class _LayerSearch:
    """Finds and verifies the folds of one layer."""

    def __init__(self, replay: Replay, index: int, hidden: Tensor, call: Call, stored_types: Mapping[str, torch.dtype]):
        self._replay, self._index, self._hidden, self._call = replay, index, hidden, call
        self._layer = replay.structure.layers[index]
        self._module = replay.model.get_submodule(self._layer.path)
        self._tensors = dict(self._module.named_parameters())
        self._stored_types = {self._inside(name): kind for name, kind in stored_types.items()}
        self._trace = _Trace(self._module, self._layer)
        with self._trace.recording():
            self.output = self._run()

    def run(self) -> LayerFolds:
        """Returns the folds that leave the layer's output as it is, whatever their exponents are."""
        folds = [*self._row_folds(), *self._expert_folds(), *self._norm_folds(), *self._expert_folds(uniform=True)]
        shapes: list[torch.Size] = []  # of the folds' exponents
        representable: list[Fold] = []
        for fold in folds:
            exponents = fold.choose(self._tensors)
            # norms of trained models that add one to their weight often fail
            if are_representable(fold.scalings(exponents), self._tensors, self._stored_types):
                representable.append(fold)
                shapes.append(exponents.shape)
        folds = representable
        if not self._verify(folds, shapes):
            folds = [fold for fold, shape in zip(folds, shapes, strict=True) if self._verify([fold], [shape])]
        return LayerFolds(folds, self._count_missing(folds))

    def _run(self) -> Tensor:
        """Runs the layer: [B, S, H]."""
        return self._replay.run(self._index, self._hidden, self._call)

    def _verify(self, folds: Sequence[Fold], shapes: Sequence[torch.Size]) -> bool:
        """Returns whether the output stays the same with exponents that differ between channels."""
        scalings: list[Scaling] = []
        for fold, shape in zip(folds, shapes, strict=True):
            exponents = (torch.arange(shape[-1], device=self._hidden.device) % 5 - 2) * PROBE_STEP
            scalings += fold.scalings(exponents.to(torch.int8).expand(shape))
        # adding one to a norm's weight rounds it, so that only a copy restores it
        copies = {scaling.name: self._tensors[scaling.name].clone() for scaling in scalings if scaling.one_plus}
        scale_(scalings, self._tensors)
        output = self._run()
        scale_([scaling.inverse() for scaling in reversed(scalings)], self._tensors)
        for name, weight in copies.items():
            self._tensors[name].copy_(weight)
        if torch.equal(output, self.output):
            return True
        difference = (output.float() - self.output.float()).norm() / self.output.float().norm()
        return float(difference) <= MAX_DIFFERENCE.get(output.dtype, 0.0)

    def _row_folds(self) -> Iterator[Fold]:
        """Pairs of linears: up and down of dense feed-forward parts, values and output of attention."""
        for consumer in self._quantized_linears():
            parent_name, _, name = consumer.rpartition(".")
            parent = self._module.get_submodule(parent_name)
            for producer_name, consumer_name in ROW_FOLDS:
                producer = getattr(parent, producer_name, None)
                if name != consumer_name or type(producer) is not nn.Linear:
                    continue
                rows = _rows_of_columns(parent, producer, self._tensors[f"{consumer}.weight"].shape[1])
                path = f"{parent_name}.{producer_name}"
                if rows is not None:
                    bias = f"{path}.bias" if producer.bias is not None else None
                    yield RowFold(f"{path}.weight", f"{consumer}.weight", bias, rows)

    def _expert_folds(self, uniform: bool = False) -> Iterator[Fold]:
        """The up rows and the down columns of the experts, if the input of down is linear in the up rows."""
        if self._layer.experts is None:
            return
        path = self._inside(self._layer.experts.path)
        module: Any = self._module.get_submodule(path)
        if not module.has_gate or not scales_with_up(module):
            return
        gate_up, down = self._layer.experts.matrices
        rows = up_rows(module, torch.arange(gate_up.rows).view(1, -1, 1), transposed=False).flatten()
        bias = f"{path}.{gate_up.name}_bias" if module.has_bias else None
        yield RowFold(f"{path}.{gate_up.name}", f"{path}.{down.name}", bias, rows, module.is_transposed, uniform)

    def _norm_folds(self) -> Iterator[Fold]:
        """The norms whose output a quantized matrix reads."""
        experts = self._layer.experts
        experts_path = self._inside(experts.path) if experts else ""
        quantized_linears = set(self._quantized_linears())
        for norm_path, modules in self._trace.readers().items():
            norm: Any = self._module.get_submodule(norm_path)
            one_plus = _multiplies_by_one_plus(norm)
            readers: list[str] = []
            transposed: list[str] = []
            quantized: list[str] = []
            for path in modules:
                if experts is not None and path == experts_path:
                    name = f"{path}.{experts.matrices[0].name}"
                    is_transposed = bool(getattr(self._module.get_submodule(path), "is_transposed", False))
                    (transposed if is_transposed else readers).append(name)
                    quantized.append(name)
                    continue
                names = self._matrices(path, norm.weight.shape[0])
                readers += names
                if path in quantized_linears:
                    quantized += names
            if quantized and one_plus is not None:
                bias = f"{norm_path}.bias" if getattr(norm, "bias", None) is not None else None
                yield NormFold(
                    f"{norm_path}.weight", bias, one_plus, tuple(readers), tuple(transposed), tuple(quantized)
                )

    def _matrices(self, path: str, columns: int) -> list[str]:
        """Names of the 2-D weights of a module with a given number of inputs: that of a linear, those of a router."""
        names = []
        for name, parameter in self._module.get_submodule(path).named_parameters():
            if parameter.dim() == 2 and parameter.shape[1] == columns:
                names.append(f"{path}.{name}")
        return names

    def _count_missing(self, folds: Sequence[Fold]) -> int:
        """Counts the inputs of quantized matrices that no fold scales."""
        scaled: set[str] = set()
        for fold in folds:
            if isinstance(fold, NormFold):
                scaled.update(fold.quantized)
            else:
                scaled.add(fold.consumer)
        missing = set()
        for path in self._quantized_linears():
            if f"{path}.weight" not in scaled and path in self._trace.inputs:
                missing.add(self._trace.inputs[path][0])
        count = len(missing)
        if self._layer.experts is not None:
            path = self._inside(self._layer.experts.path)
            count += sum(f"{path}.{matrix.name}" not in scaled for matrix in self._layer.experts.matrices)
        return count

    def _quantized_linears(self) -> list[str]:
        """Paths inside the layer of the linears that can be quantized."""
        return [self._inside(linear.path) for linear in self._layer.linears]

    def _inside(self, path: str) -> str:
        """Returns the path of a module inside the layer."""
        return path.removeprefix(f"{self._layer.path}.")


class _Trace:
    """Records which modules of a layer read the output of which norm.

    Attributes:
        inputs: by path inside the layer, addresses of the tensors that a linear, the router or the experts received
    """

    def __init__(self, module: nn.Module, layer: Layer):
        """``module``: the layer. ``layer``: its structure."""
        self._modules = dict(module.named_modules())
        prefix = f"{layer.path}."
        self._readers = [path for path, submodule in self._modules.items() if isinstance(submodule, nn.Linear)]
        self._router = layer.router.removeprefix(prefix) if layer.router else None
        self._experts = layer.experts.path.removeprefix(prefix) if layer.experts else None
        self._readers += [path for path in (self._router, self._experts) if path is not None]
        self._outputs: dict[str, list[Tensor]] = {}
        self._tensors: list[Tensor] = []  # alive until the trace ends, so that no address is used twice
        self.inputs: dict[str, list[int]] = {}

    def recording(self) -> ExitStack:
        """Returns a context in which the layer runs."""
        stack = ExitStack()
        for path, module in self._modules.items():
            weight = getattr(module, "weight", None)
            if is_norm(module) and isinstance(weight, Tensor) and weight.dim() == 1:
                stack.callback(module.register_forward_hook(self._output_hook(path)).remove)
        for path in self._readers:
            hook = self._modules[path].register_forward_pre_hook(self._input_hook(path), with_kwargs=True)
            stack.callback(hook.remove)
        return stack

    def _output_hook(self, path: str) -> Callable[..., None]:
        """Returns a hook that records the output of a norm."""

        def record(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                self._outputs.setdefault(path, []).append(output)

        return record

    def _input_hook(self, path: str) -> Callable[..., None]:
        """Returns a hook that records the input of a module."""

        def record(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor):
                    self._tensors.append(value)
                    self.inputs.setdefault(path, []).append(_address(value))
                    return

        return record

    def readers(self) -> dict[str, list[str]]:
        """Returns the paths of the modules that read each norm's output, by the norm's path.

        Experts that read no norm's output are taken to read what their router reads: some families hand them rows that
        are multiplied by routing weights.
        """
        readers: dict[str, list[str]] = {}
        for norm, outputs in self._outputs.items():
            addresses = {_address(output) for output in outputs}
            readers[norm] = [path for path in self._readers if addresses & set(self.inputs.get(path, []))]
        if self._experts is not None and not any(self._experts in paths for paths in readers.values()):
            for paths in readers.values():
                if self._router in paths:
                    paths.append(self._experts)
        return readers


def _address(tensor: Tensor) -> int:
    """Returns the address of a tensor's storage, which views share."""
    return tensor.untyped_storage().data_ptr()


def _multiplies_by_one_plus(norm: Any) -> bool | None:
    """Returns whether a norm multiplies by one plus its weight. None if it does something else with it."""
    weight = norm.weight
    hidden = torch.linspace(-2, 2, 2 * len(weight), dtype=weight.dtype, device=weight.device).view(1, 2, -1)
    exponents = (torch.arange(len(weight), device=weight.device) % 3 - 1).to(torch.int8)
    tolerance = 1e-5 if weight.dtype == torch.float32 else 1e-2
    try:
        expected = norm(hidden).float() * torch.exp2(exponents.float())
        for one_plus in (False, True):
            state = {"weight": Scaling("", exponents, one_plus).apply(weight)}
            if getattr(norm, "bias", None) is not None:
                state["bias"] = Scaling("", exponents).apply(norm.bias)
            output = torch.func.functional_call(norm, state, (hidden,)).float()
            if torch.allclose(output, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
                return one_plus
    except Exception:  # noqa: BLE001 (a norm of the family's own code that needs more than hidden states)
        return None
    return None


def _rows_of_columns(parent: Any, producer: nn.Linear, columns: int) -> Tensor | None:
    """Returns the producer's row for each column of the consumer, [C] int64. None if shapes do not fit.

    Several query heads read the values of one head, in the order in which ``repeat_kv`` of Transformers copies them.
    In multi-head latent attention, a head's keys precede its values.
    """
    rows = producer.out_features
    indices = torch.arange(columns)
    if rows == columns:
        return indices
    key_dim, value_dim = getattr(parent, "qk_nope_head_dim", None), getattr(parent, "v_head_dim", None)
    if isinstance(key_dim, int) and isinstance(value_dim, int):
        if columns % value_dim or rows != columns // value_dim * (key_dim + value_dim):
            return None
        return indices // value_dim * (key_dim + value_dim) + key_dim + indices % value_dim
    head_dim = getattr(parent, "head_dim", None)
    if not isinstance(head_dim, int) or columns % rows or rows % head_dim:
        return None
    head, channel = indices // head_dim, indices % head_dim
    return head // (columns // rows) * head_dim + channel
