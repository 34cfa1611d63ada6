"""Runs a causal LM layer by layer by replaying the calls that the model itself makes to its decoder layers.

Masks, positions and whatever else a family passes to a layer are captured once and passed again, never rebuilt by
hand. The tail (final norm, head, logit scaling) runs through the model's own forward as well, with layers replaced
for the moment. Which layers are in memory is the affair of ``residency``. Knows nothing of quantization.

Shapes: B windows, S tokens in a window, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gemq.errors import NotFiniteError, UserError
from gemq.models.experts import check_arithmetic, use_experts_forward, use_fast_experts, watch_experts
from gemq.models.experts_adapter import as_adopted
from gemq.models.layer_cache import Residency
from gemq.models.structure import Structure
from gemq.runtime.memory import Memory
from gemq.runtime.ranks import SINGLE, Ranks


@dataclass(frozen=True)
class Call:
    """What a model passes to one decoder layer beside the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_WRONG_STATE = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What model code raises when it is given something else than it expects."""


LOGITS_TOGETHER = 1 << 27
"""Numbers that go through a loss at once, at most, if that is a window or more: each takes up to 22 bytes there."""

_ATTENTION = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]

MOST_OUTPUTS = 3
"""Values that a layer may return: hidden states and what belongs to them."""


class _AllCaptured(Exception):
    """Ends a forward pass once the last layer's call is known."""


class Replay:
    """A causal LM cut at its decoder layers.

    ``inputs`` gives the first layer's hidden states and every layer's call, ``run`` runs one layer, ``logits`` runs
    what follows the last layer. Raises UserError from the constructor when the model does more between its layers
    than passing on what they return.

    Where layers return something beside hidden states that the next layer receives (such as the positions that sparse
    attention chose), it travels with the hidden states, as an attribute of the tensor that ``run`` returned: it is a
    function of those very hidden states, not of the call. ``leaf`` takes it along. No gradient flows through it.

    With ``residency``, layers are read when they are needed; without, the model holds them all. ``ranks`` are the
    processes that share the job: each holds a model.
    """

    def __init__(self, model: Any, structure: Structure, residency: Residency | None = None, ranks: Ranks = SINGLE):
        self.model: Any = model.eval().requires_grad_(False)
        self.structure = structure
        self.residency, self.ranks = residency, ranks
        self.memory = residency.memory if residency else Memory.unlimited(next(self.model.parameters()).device)
        self.layers = list(model.get_submodule(structure.layers_path).children())
        self._outputs = 0  # how many values a layer returns in a tuple; 0: a tensor
        self._passed: dict[int, str | int] = {}  # place in that tuple -> the next layer's argument that receives it
        self._shared: dict[tuple[torch.Size, torch.dtype], list[Tensor]] = {}
        if getattr(model.config, "output_router_logits", False):
            model.config.output_router_logits = False  # the auxiliary loss has no meaning in a replay
        self._probe()
        fewest = min((x.experts.count for _, x in structure.moe_layers if x.experts), default=ranks.count)
        if fewest < ranks.count:
            raise UserError(f"{ranks.count} processes share layers of {fewest} experts: start at most {fewest}")
        if self._passed and ranks.count > 1:
            raise UserError(
                f"{type(model).__name__} passes more than hidden states between its layers, which several processes do "
                "not share yet: start one, without torchrun"
            )

    def _probe(self) -> None:
        """Finds out what layers return, and what of it the next layer receives. UserError when it is not understood."""
        ids = torch.zeros(1, 4, dtype=torch.long, device=self.device)
        found = ""
        for self._outputs in range(MOST_OUTPUTS + 1):
            self._passed = {}
            try:
                self.inputs(ids)
                return
            except (UserError, torch.OutOfMemoryError):
                raise
            except _NotPassedOn as error:
                found = found or f"before layer {error.args[0]}"
            except _WRONG_STATE as error:  # such as unpacking a tensor where the layer returns several
                found = found or _first_line(error)
        raise UserError(
            f"{type(self.model).__name__} does more between its decoder layers than passing hidden states on "
            f"({found}): gemq cannot replay it; this family is not supported yet"
        )

    @property
    def device(self) -> torch.device:
        return self.memory.device

    @property
    def passes_more(self) -> bool:
        """Whether layers give each other more than hidden states."""
        return bool(self._passed)

    def alone(self) -> Replay:
        """The same model for what this rank does by itself."""
        other = copy.copy(self)
        other.ranks = Ranks(device=self.ranks.device)
        return other

    def walk(self, order: Sequence[int], ahead: bool = True) -> Iterator[int]:
        """Gives the indices of ``order``, each layer being held while it is looked at; ``ahead``: the next one read."""
        return iter(order) if self.residency is None else self.residency.walk(order, ahead)

    @contextmanager
    def whole(self) -> Iterator[Any]:
        """The model with all of its layers, to be run as it is. Ask ``Residency.fits`` before."""
        if self.residency is None:
            yield self.model
            return
        with self.residency.all():
            use_fast_experts(self.model)
            try:
                yield self.model
            finally:
                use_experts_forward(self.model)

    def rest(self, index: int, without: Collection[str]) -> dict[str, Tensor]:
        """A layer's parameters and buffers by name inside the model, on the device, but for those named."""
        if self.residency is not None:
            return self.residency.rest(index, without)
        prefix = self.structure.layers[index].path + "."
        state = self.model.state_dict()
        return {n: t for n, t in state.items() if n.startswith(prefix) and n not in without}

    def unpacked(self, without: Collection[str]) -> dict[str, Tensor]:
        """The full-precision model's tensors by name but for those named, as the files store them.

        They are read again, to the CPU: those of the model are in the type that it computes with.
        """
        state = {name: tensor for name, tensor in self.model.state_dict().items() if name not in without}
        if self.residency is not None:
            reader = self.residency.reader
            outside = {name: tensor for name, tensor in reader.read_outside().items() if name in state}
            state.update({name: as_adopted(tensor, state[name]) for name, tensor in outside.items()})
            for index in range(len(self.layers)):
                state.update(reader.read(index, without))
        return state

    def restore(self, index: int) -> None:
        """Forgets what was written into a layer's weights, where they can be read again."""
        if self.residency is not None:
            self.residency.restore(index)

    @torch.no_grad()
    def inputs(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """Token ids [B, S] int64 -> (hidden states [B, S, H] before the first layer, one call per layer)."""
        calls: list[Call] = []
        first: list[Tensor] = []
        seen: dict[int, tuple[Tensor, Tensor]] = {}  # most layers are given the same: comparing waits for the device

        def record(hidden: Tensor, call: Call) -> Tensor:
            if first and hidden is not first[0]:
                raise _NotPassedOn(len(calls))
            first.append(hidden)
            self._note_passed(call)
            calls.append(Call(self._share(call.args, seen), self._share(call.kwargs, seen)))
            if len(calls) == len(self.layers):
                raise _AllCaptured
            return hidden

        with self._patched(record):
            try:
                self.model(input_ids=ids.to(self.device), use_cache=False)
            except _AllCaptured:
                return first[0], calls
        raise UserError(
            f"{type(self.model).__name__} has {len(self.layers)} decoder layers and calls {len(calls)} of them: "
            "gemq cannot replay it; this family is not supported yet"
        )

    def run(self, index: int, hidden: Tensor, call: Call, overrides: dict[str, Tensor] | None = None) -> Tensor:
        """Hidden states [B, S, H] after layer ``index``. Differentiable.

        overrides: tensors to take in place of the model's parameters, by their name inside the model
        """
        if self.residency is not None and not (overrides and self.residency.covered(index, overrides)):
            self.residency.need(index)
        layer = self.layers[index]
        call = self._with_passed(index, hidden, call)
        args, prefix = (hidden, *call.args), len(self.structure.layers[index].path) + 1
        own = {name[prefix:]: tensor for name, tensor in (overrides or {}).items()}
        with self._attention():
            out = functional_call(layer, own, args, call.kwargs) if own else layer(*args, **call.kwargs)
        if not isinstance(out, tuple):
            return out
        if self._passed:
            passed = {place: out[place] for place in self._passed}
            out[0].gemq_passed = {p: v.detach() if isinstance(v, Tensor) else v for p, v in passed.items()}
        return out[0]

    def _attention(self) -> AbstractContextManager[None]:
        """Lets attention without gradients take a kernel that is there, if one fits.

        cuDNN, which is otherwise asked first, compiles one for every shape, half a second or more. With gradients it is
        worth that.
        """
        if self.device.type != "cuda" or torch.is_grad_enabled():
            return nullcontext()
        return sdpa_kernel(_ATTENTION, set_priority=True)

    @staticmethod
    def leaf(hidden: Tensor) -> Tensor:
        """A layer's input as a leaf of autograd."""
        leaf = hidden.detach().requires_grad_()
        if hasattr(hidden, "gemq_passed"):
            leaf.gemq_passed = hidden.gemq_passed  # type: ignore[attr-defined]
        return leaf

    def _note_passed(self, call: Call) -> None:
        """Remembers which arguments are what the layer before returned beside hidden states."""
        arguments: list[tuple[str | int, Any]] = [*enumerate(call.args), *call.kwargs.items()]
        self._passed.update({value.place: name for name, value in arguments if isinstance(value, _Output)})

    def _with_passed(self, index: int, hidden: Tensor, call: Call) -> Call:
        """The call with what the layer before returned in place of what stood for it when it was captured."""
        if not self._passed or index == 0:
            return call
        passed: dict[int, Any] = hidden.gemq_passed  # type: ignore[attr-defined]
        args, kwargs = list(call.args), dict(call.kwargs)
        for place, name in self._passed.items():
            if isinstance(name, int):
                args[name] = passed[place]
            else:
                kwargs[name] = passed[place]
        return Call(tuple(args), kwargs)

    def logits(self, ids: Tensor, hidden: Tensor, overrides: dict[str, Tensor] | None = None) -> Tensor:
        """Logits [B, S, V] from the last layer's hidden states [B, S, H], by the model's own tail. Differentiable.

        overrides: tensors to take in place of the tail's parameters, by their name inside the model
        """
        seen = 0

        def substitute(before: Tensor, call: Call) -> Tensor:
            nonlocal seen
            seen += 1
            return hidden if seen == len(self.layers) else before

        with self._patched(substitute):
            inputs = {"input_ids": ids.to(self.device), "use_cache": False}
            return functional_call(self.model, overrides or {}, (), inputs).logits

    def windows_together(self, ids: Tensor) -> list[slice]:
        """Slices of windows [B, S] whose logits are looked at together: all in one where the vocabulary is small."""
        each = ids.shape[1] * self.model.config.get_text_config().vocab_size
        step = max(1, LOGITS_TOGETHER // each)
        return [slice(start, start + step) for start in range(0, len(ids), step)]

    def verify(self, ids: Tensor) -> None:
        """Compares a replay of token ids [B, S] with the model's own forward. Raises UserError when they differ.

        What is compared is code, not weights: where layers are read as they are needed, one of each kind stands in for
        all, and nothing waits for files.
        """
        with nullcontext() if self.residency is None else self.residency.alike(), torch.no_grad(), self._attention():
            self._verify(ids)

    def _verify(self, ids: Tensor) -> None:
        expected = self._own_logits(ids)
        if not expected.isfinite().all():
            raise NotFiniteError(
                f"{type(self.model).__name__} computes logits that are not finite: its activations overflow; try "
                "--dtype float32, or look for weights that are far too large"
            )
        self._check_arithmetic(ids)
        hidden, calls = self.inputs(ids)
        other, other_calls = self.inputs(ids[:, :1].expand_as(ids))
        try:
            for index, call in enumerate(calls):  # two batches at once: what a layer keeps of one shows in the other
                hidden = self.run(index, hidden, call)
                other = self.run(index, other, other_calls[index])
        except torch.OutOfMemoryError:
            raise
        except _WRONG_STATE as error:
            raise UserError(
                f"{type(self.model).__name__}'s layers cannot be run on their own ({_first_line(error)}): "
                "they share state; this family is not supported yet"
            ) from error
        replayed = self.logits(ids, hidden).float()
        # The same operations in the same order: equal but for kernels chosen by memory alignment and, on a GPU, sums in
        # another order. In bfloat16 such roundings change a token's experts here and there: 0.032 was measured on
        # the built-in model. Layers that share state give differences of the order of 1.
        difference = (replayed - expected).norm() / expected.norm().clamp_min(1e-12)
        if not difference < (1e-2 if self.model.dtype == torch.float32 else 0.1):
            raise UserError(
                f"replaying {type(self.model).__name__} layer by layer gives other logits than its own forward "
                f"(relative difference {difference:.2g}): its layers share state; this family is not supported yet"
            )

    def _own_logits(self, ids: Tensor) -> Tensor:
        """The model's logits of token ids [B, S] in float32. Raises UserError where its parts do not fit together."""
        try:
            return self.model(input_ids=ids.to(self.device), use_cache=False).logits.float()
        except (AttributeError, TypeError) as error:
            raise UserError(
                f"Transformers {transformers.__version__} cannot run {type(self.model).__name__} on text alone "
                f"({_first_line(error)}): install another release of Transformers"
            ) from error

    def _check_arithmetic(self, ids: Tensor) -> None:
        """Compares gemq's arithmetic of each layer's experts with their own."""
        paths = [layer.experts.path for _, layer in self.structure.moe_layers if layer.experts]
        modules = [self.model.get_submodule(path) for path in paths]
        with ExitStack() as stack:
            watched = [stack.enter_context(watch_experts(module)) for module in modules]
            self.model(input_ids=ids.to(self.device), use_cache=False)
        for path, module, calls in zip(paths, modules, watched, strict=True):
            for call in calls:
                difference = check_arithmetic(module, call)
                if not difference < 2e-2:  # another order of sums; bfloat16 rounds to 4e-3
                    raise UserError(
                        f"cannot quantize {path} ({type(module).__name__}): it computes something else than gemq "
                        f"understands (relative difference {difference:.2g}); this family is not supported yet"
                    )

    @contextmanager
    def _patched(self, function: Callable[[Tensor, Call], Tensor]) -> Iterator[None]:
        """Replaces every layer's forward for the moment. The instance stays, with the attributes a model reads."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if args:
                hidden, rest = args[0], args[1:]
            else:
                kwargs = dict(kwargs)
                hidden, rest = kwargs.pop("hidden_states"), ()
            if not isinstance(hidden, Tensor):
                raise _NotPassedOn(0)
            out = function(hidden, Call(rest, kwargs))
            return (out, *map(_Output, range(1, self._outputs))) if self._outputs else out

        # accelerate's hooks, where there are any, are such attributes of an instance
        before = [vars(layer).get("forward") for layer in self.layers]
        for layer in self.layers:
            layer.forward = forward
        try:
            yield
        finally:
            for layer, own in zip(self.layers, before, strict=True):
                del layer.forward
                if own is not None:
                    layer.forward = own

    def _share(self, value: Any, seen: dict[int, tuple[Tensor, Tensor]]) -> Any:
        """Replaces tensors by equal ones seen before: masks and positions are alike in nearly all micro-batches.

        seen: those of this call of the model, by ``id``, and what replaced them
        """
        if isinstance(value, Tensor):
            if id(value) not in seen:
                known = self._shared.setdefault((value.shape, value.dtype), [])
                same = next((other for other in known if other is value or torch.equal(other, value)), None)
                if same is None and len(known) < 8:
                    known.append(value)
                seen[id(value)] = value, value if same is None else same
            return seen[id(value)][1]
        if isinstance(value, tuple | list):
            return type(value)(self._share(v, seen) for v in value)
        if isinstance(value, dict):
            return {k: self._share(v, seen) for k, v in value.items()}
        return value


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


@dataclass(frozen=True)
class _Output:
    """Stands for what a layer returns at a place of its tuple while calls are captured."""

    place: int


class _NotPassedOn(Exception):
    """A layer did not receive what the layer before returned. Holds the layer's index."""
