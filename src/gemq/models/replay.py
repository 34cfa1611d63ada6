"""Runs a causal LM layer by layer, by replaying the calls that the model itself makes to its decoder layers.

Masks, positions and all other arguments that a family passes to a layer, by position or by name, are captured once and
passed again. They are never rebuilt. The tail (final norm, head, logit scaling) also runs through the model's own
forward, with its layers replaced. ``models.layer_cache`` decides which layers are in memory. Must not import
quantization.

Shapes: B windows, S tokens in a window, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from gemq.errors import NotFiniteError, UserError
from gemq.models.arithmetic_check import check_arithmetic
from gemq.models.experts import use_experts_forward, use_fast_experts
from gemq.models.experts_adapter import as_adopted
from gemq.models.layer_cache import LayerCache
from gemq.models.layer_calls import Call, ExtraOutput, HiddenStatesChanged, SharedTensors, replaced_layers
from gemq.models.structure import Structure
from gemq.runtime.activation_store import HiddenStates
from gemq.runtime.fallbacks import first_line
from gemq.runtime.memory import MemoryBudget
from gemq.runtime.ranks import SINGLE, Ranks

_MODEL_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""Errors that a model's code raises when it receives other values than it expects."""

MAX_LOGITS_PER_CHUNK = 1 << 27
"""Upper bound of the logits that a loss takes in one go, unless one window has more. Each needs up to 22 bytes."""

MAX_TUPLE_SIZE = 3
"""Upper bound of the values that a layer may return: hidden states and extra outputs."""

_ATTENTION_BACKENDS = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class _AllCaptured(Exception):
    """Ends a forward pass once the last layer's call is captured."""


class Replay:
    """A causal LM that is cut at its decoder layers.

    ``inputs`` returns the first layer's hidden states and every layer's call, ``run`` runs one layer, and ``logits``
    runs everything after the last layer.

    In some families a layer returns extra outputs that the next layer receives, such as the positions that sparse
    attention chose. ``run`` returns them with the hidden states (see ``HiddenStates``), since they depend on these and
    not on the call. No gradient flows through them.

    Attributes:
        model: the model, in evaluation mode, its parameters frozen
        structure: of the model
        layer_cache: loads layers when they are needed; None if the model holds all of them
        ranks: the processes that share the job, each of which holds a model
        memory: the job's memory budget
        layers: the decoder layers
    """

    def __init__(self, model: Any, structure: Structure, layer_cache: LayerCache | None = None, ranks: Ranks = SINGLE):
        """Captures the calls of a short text.

        Raises:
            UserError: the model does more between its layers than passing on what they return, or it does not support
                this number of processes
        """
        self.model: Any = model.eval().requires_grad_(False)
        self.structure = structure
        self.layer_cache, self.ranks = layer_cache, ranks
        self.memory = (
            layer_cache.memory if layer_cache else MemoryBudget.unlimited(next(self.model.parameters()).device)
        )
        self.layers = list(model.get_submodule(structure.layers_path).children())
        self._tuple_size = 0  # number of values in the tuple that a layer returns; 0: it returns a tensor
        self._extra_arguments: dict[int, str | int] = {}  # index in that tuple -> argument of the next layer
        self._shared_tensors = SharedTensors()
        if getattr(model.config, "output_router_logits", False):
            model.config.output_router_logits = False  # the auxiliary loss has no meaning in a replay
        self._probe()
        self._check_ranks()

    def _probe(self) -> None:
        """Finds out what layers return, and which of it the next layer receives.

        Raises:
            UserError: the layers return none of the supported types
        """
        ids = torch.zeros(1, 4, dtype=torch.long, device=self.device)
        reason = ""
        for self._tuple_size in range(MAX_TUPLE_SIZE + 1):
            self._extra_arguments = {}
            try:
                self.inputs(ids)
                return
            except (UserError, torch.OutOfMemoryError):
                raise
            except HiddenStatesChanged as error:
                reason = reason or f"before layer {error.args[0]}"
            except _MODEL_ERRORS as error:  # such as unpacking a tensor where the layer returns a tuple
                reason = reason or first_line(error)
        raise UserError(
            f"{type(self.model).__name__} does more between its decoder layers than passing hidden states on "
            f"({reason}): gemq cannot replay it; this family is not supported yet"
        )

    def _check_ranks(self) -> None:
        """Rejects more ranks than a layer has experts, and several ranks if layers have extra outputs."""
        fewest_experts = min((layer.experts.count for _, layer in self.structure.moe_layers), default=self.ranks.count)
        if fewest_experts < self.ranks.count:
            raise UserError(
                f"{self.ranks.count} processes share layers of {fewest_experts} experts: start at most {fewest_experts}"
            )
        if self.has_extra_outputs and self.ranks.count > 1:
            raise UserError(
                f"{type(self.model).__name__} passes more than hidden states between its layers, which several "
                "processes do not share yet: start one, without torchrun"
            )

    @property
    def device(self) -> torch.device:
        """The device that computes."""
        return self.memory.device

    @property
    def has_extra_outputs(self) -> bool:
        """Whether layers receive extra outputs of the layer before them."""
        return bool(self._extra_arguments)

    def single_rank(self) -> Replay:
        """Returns a replay of the same model for work that this rank does without the others."""
        replay = copy.copy(self)
        replay.ranks = Ranks(device=self.ranks.device)
        return replay

    def walk(self, order: Sequence[int], prefetch: bool = True) -> Iterator[int]:
        """Yields the indices of ``order``, each while the model holds its layer.

        Args:
            order: indices of layers
            prefetch: whether the next layer is loaded meanwhile
        """
        return iter(order) if self.layer_cache is None else self.layer_cache.walk(order, prefetch)

    @contextmanager
    def full_model(self) -> Iterator[Any]:
        """Yields the model with all of its layers, for its own forward. Call only if ``LayerCache.all_layers_fit``."""
        if self.layer_cache is None:
            yield self.model
            return
        with self.layer_cache.all_layers():
            use_fast_experts(self.model)
            try:
                yield self.model
            finally:
                use_experts_forward(self.model)

    def layer_tensors(self, index: int, excluded: Collection[str]) -> dict[str, Tensor]:
        """Returns a layer's parameters and buffers on the device, except ``excluded``, by name inside the model."""
        if self.layer_cache is not None:
            return self.layer_cache.read_layer(index, excluded)
        prefix = self.structure.layers[index].path + "."
        state = self.model.state_dict()
        return {name: t for name, t in state.items() if name.startswith(prefix) and name not in excluded}

    def stored_state(self, excluded: Collection[str]) -> dict[str, Tensor]:
        """Returns the full-precision model's state except ``excluded``, in the types that the files store.

        It is read from the files to the CPU, since the model holds tensors in its compute type. Layers are equalized.
        """
        state = {name: tensor for name, tensor in self.model.state_dict().items() if name not in excluded}
        if self.layer_cache is None:
            return state
        reader = self.layer_cache.reader
        for name, tensor in reader.read_outside().items():
            if name in state:
                state[name] = as_adopted(tensor, state[name])
        for index in range(len(self.layers)):
            state.update(self.layer_cache.stored_layer(index, excluded))
        return state

    def restore(self, index: int) -> None:
        """Undoes changes of a layer's weights if they can be read again."""
        if self.layer_cache is not None:
            self.layer_cache.restore(index)

    @torch.no_grad()
    def inputs(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """Returns the hidden states [B, S, H] before the first layer, and one call per layer, of ids [B, S] int64."""
        calls: list[Call] = []
        first_hidden: Tensor | None = None
        replaced: dict[int, tuple[Tensor, Tensor]] = {}
        share = self._shared_tensors.share

        def capture(hidden: Tensor, call: Call) -> Tensor:
            nonlocal first_hidden
            if first_hidden is None:
                first_hidden = hidden
            elif hidden is not first_hidden:
                raise HiddenStatesChanged(len(calls))
            self._note_extra_arguments(call)
            calls.append(Call(share(call.args, replaced), share(call.kwargs, replaced)))
            if len(calls) == len(self.layers):
                raise _AllCaptured
            return hidden

        with replaced_layers(self.layers, capture, self._tuple_size):
            try:
                self.model(input_ids=ids.to(self.device), use_cache=False)
            except _AllCaptured:
                assert first_hidden is not None
                return first_hidden, calls
        raise UserError(
            f"{type(self.model).__name__} has {len(self.layers)} decoder layers and calls {len(calls)} of them: "
            "gemq cannot replay it; this family is not supported yet"
        )

    def _note_extra_arguments(self, call: Call) -> None:
        """Records which arguments of a call are extra outputs of the layer before."""
        arguments: list[tuple[str | int, Any]] = [*enumerate(call.args), *call.kwargs.items()]
        for argument, value in arguments:
            if isinstance(value, ExtraOutput):
                self._extra_arguments[value.index] = argument

    def run(self, index: int, hidden: Tensor, call: Call, overrides: dict[str, Tensor] | None = None) -> Tensor:
        """Runs layer ``index``. Differentiable.

        Args:
            index: of the layer
            hidden: its input [B, S, H]
            call: its other arguments
            overrides: tensors that replace the model's parameters, by name inside the model

        Returns:
            Its output [B, S, H].
        """
        if self.layer_cache is not None and not (overrides and self.layer_cache.covers(index, overrides)):
            self.layer_cache.load(index)
        layer = self.layers[index]
        call = self._with_extra_arguments(index, hidden, call)
        prefix_length = len(self.structure.layers[index].path) + 1
        layer_overrides = {name[prefix_length:]: tensor for name, tensor in (overrides or {}).items()}
        with self._attention_backends():
            if layer_overrides:
                output = functional_call(layer, layer_overrides, (hidden, *call.args), call.kwargs)
            else:
                output = layer(hidden, *call.args, **call.kwargs)
        if not isinstance(output, tuple):
            return output
        if not self._extra_arguments:
            return output[0]
        extras = {}
        for position in self._extra_arguments:
            value = output[position]
            extras[position] = value.detach() if isinstance(value, Tensor) else value
        return HiddenStates.with_extras(output[0], extras)

    def _with_extra_arguments(self, index: int, hidden: Tensor, call: Call) -> Call:
        """Returns the call with the extra outputs of the layer before in place of their placeholders."""
        if not self._extra_arguments or index == 0:
            return call
        assert isinstance(hidden, HiddenStates)
        args, kwargs = list(call.args), dict(call.kwargs)
        for position, argument in self._extra_arguments.items():
            if isinstance(argument, int):
                args[argument] = hidden.extras[position]
            else:
                kwargs[argument] = hidden.extras[position]
        return Call(tuple(args), kwargs)

    def _attention_backends(self) -> AbstractContextManager[None]:
        """Prefers attention kernels that are compiled already, where no gradients are needed.

        PyTorch would try cuDNN first, which compiles a kernel for every shape in half a second or more. This pays off
        only with gradients.
        """
        if self.device.type != "cuda" or torch.is_grad_enabled():
            return nullcontext()
        return sdpa_kernel(_ATTENTION_BACKENDS, set_priority=True)

    @staticmethod
    def leaf(hidden: Tensor) -> Tensor:
        """Returns a layer's input as a leaf of autograd, with its extra outputs."""
        leaf = hidden.detach()
        if isinstance(hidden, HiddenStates):
            leaf = HiddenStates.with_extras(leaf, hidden.extras)
        return leaf.requires_grad_()

    def logits(self, ids: Tensor, hidden: Tensor, overrides: dict[str, Tensor] | None = None) -> Tensor:
        """Computes logits by the model's own tail. Differentiable.

        Args:
            ids: token ids [B, S] int64
            hidden: the last layer's output [B, S, H]
            overrides: tensors that replace the tail's parameters, by name inside the model

        Returns:
            Logits [B, S, V].
        """
        num_calls = 0

        def last_output(layer_input: Tensor, call: Call) -> Tensor:
            nonlocal num_calls
            num_calls += 1
            return hidden if num_calls == len(self.layers) else layer_input

        with replaced_layers(self.layers, last_output, self._tuple_size):
            inputs = {"input_ids": ids.to(self.device), "use_cache": False}
            return functional_call(self.model, overrides or {}, (), inputs).logits

    def logit_chunks(self, ids: Tensor) -> list[slice]:
        """Slices of the windows [B, S] whose logits are computed in one go: all windows if the vocabulary is small."""
        logits_per_window = ids.shape[1] * self.model.config.get_text_config().vocab_size
        step = max(1, MAX_LOGITS_PER_CHUNK // logits_per_window)
        return [slice(start, start + step) for start in range(0, len(ids), step)]

    def verify(self, ids: Tensor) -> None:
        """Compares a replay of token ids [B, S] with the model's own forward.

        This verifies code, not weights. So where layers are loaded when they are needed, every layer holds the weights
        of the first one of its kind, which takes few reads.

        Raises:
            UserError: they differ, or gemq's arithmetic of the experts differs from the model's
        """
        weights = nullcontext() if self.layer_cache is None else self.layer_cache.with_one_layer_per_kind()
        with weights, torch.no_grad(), self._attention_backends():
            self._verify(ids)

    def _verify(self, ids: Tensor) -> None:
        """Does the work of ``verify``, with the weights that the layers hold."""
        expected = self._model_logits(ids)
        if not expected.isfinite().all():
            raise NotFiniteError(
                f"{type(self.model).__name__} computes logits that are not finite: its activations overflow; try "
                "--dtype float32, or look for weights that are far too large"
            )
        paths = [layer.experts.path for _, layer in self.structure.moe_layers]
        check_arithmetic(self.model, paths, ids.to(self.device))
        replayed = self._interleaved_logits(ids)
        # The operations and their order are equal. Results differ where memory alignment selects another kernel and, on
        # a GPU, where sums take another order. In bfloat16 such roundings change a token's experts now and then: the
        # built-in model differs by 0.032. Layers that share state differ by about 1.
        difference = (replayed - expected).norm() / expected.norm().clamp_min(1e-12)
        if not difference < (1e-2 if self.model.dtype == torch.float32 else 0.1):
            raise UserError(
                f"replaying {type(self.model).__name__} layer by layer gives other logits than its own forward "
                f"(relative difference {difference:.2g}): its layers share state; this family is not supported yet"
            )

    def _interleaved_logits(self, ids: Tensor) -> Tensor:
        """Replays token ids [B, S] and a second batch alternately, to detect state that layers keep.

        Returns:
            Logits [B, S, V] of the first batch, float32.
        """
        hidden, calls = self.inputs(ids)
        second_hidden, second_calls = self.inputs(ids[:, :1].expand_as(ids))
        try:
            for index, (call, second_call) in enumerate(zip(calls, second_calls, strict=True)):
                hidden = self.run(index, hidden, call)
                second_hidden = self.run(index, second_hidden, second_call)
        except torch.OutOfMemoryError:
            raise
        except _MODEL_ERRORS as error:
            raise UserError(
                f"{type(self.model).__name__}'s layers cannot be run on their own ({first_line(error)}): "
                "they share state; this family is not supported yet"
            ) from error
        return self.logits(ids, hidden).float()

    def _model_logits(self, ids: Tensor) -> Tensor:
        """Returns the logits [B, S, V] of the model's own forward, float32.

        Raises:
            UserError: the installed Transformers cannot run the model
        """
        try:
            return self.model(input_ids=ids.to(self.device), use_cache=False).logits.float()
        except (AttributeError, TypeError) as error:
            raise UserError(
                f"Transformers {transformers.__version__} cannot run {type(self.model).__name__} on text alone "
                f"({first_line(error)}): install another release of Transformers"
            ) from error
