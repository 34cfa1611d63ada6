"""Decoding with a static cache: one step of fixed shapes, captured in a CUDA graph and replayed.

The model is called as it is. No class is patched. Transformers fills a static cache with the prompt in one call.
A decode step then reads its token and position from buffers, writes keys and values at that position, chooses the next
token on the device, and increments the position. A CUDA graph of the step can therefore be replayed without any input
from the host. Before the capture, the many small kernels between the packed ones are fused (``decoding.fused_layers``).
Layers may be compiled instead (``decoding.regional_compile``), which takes longer. Prompts of a length that
came before are replayed as well (``decoding.prompt_graphs``).

All of this relies on interfaces that change. Whatever a model or a driver does not support is left out and counted:
first fused or compiled layers, then the graph. If even the static cache fails, ``Unsupported`` is raised and the caller
decodes without one. Supports causal language models of Transformers with full or sliding attention.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemq.decoding import step_attention
from gemq.decoding.prompt_graphs import PromptGraphs
from gemq.decoding.regional_compile import LayerCompiler
from gemq.decoding.static_cache import (
    ALL_LAYERS,
    PromptCache,
    StepCache,
    Unsupported,
    as_unsupported,
    attention_windows,
    check_rotary,
    decoder_layers,
    last_logits_argument,
    modules_around_layers,
    single_device,
    static_cache,
)
from gemq.decoding.step_operations import advance, argmax, visible_ranges
from gemq.kernels import dispatch
from gemq.kernels.decode.linear_fusion import merge_linears
from gemq.models.cache_names import cache_argument
from gemq.runtime.fallbacks import first_line
from gemq.runtime.graph_capture import capture

if TYPE_CHECKING:
    from gemq.decoding.fused_layers import FusedLayers

__all__ = ["FALLBACKS", "Decoder", "Unsupported"]

LENGTH_MULTIPLE = 64
"""Cache lengths are rounded up to a multiple of this, since attention kernels need aligned masks."""

MAX_STEPS_IN_FLIGHT = 4
"""Steps that the GPU may be ahead of the token that the host reads, so that the GPU never waits for the host."""

FALLBACKS = {
    "attention_by_transformers": "a decode step's attention goes through the whole cache under a mask",
    "layers_not_fused": "some decoder layers run the small kernels of Transformers one by one",
    "layers_not_compiled": "decoder layers could not be compiled: their small kernels run one by one",
    "prompts_not_captured": "prompts could not be captured in a CUDA graph: they are launched kernel by kernel",
    "step_not_captured": "the decode step could not be captured in a CUDA graph: it is launched kernel by kernel",
    "decoded_by_transformers": "this model needs model.generate of Transformers, which runs without a CUDA graph",
}
"""Accelerations that may be left out, with the text that users see."""


class Decoder:
    """Decodes with one model, for a fixed batch size and maximum length.

    A decoder serves any number of prompts: each call of ``prefill`` starts a new one. All methods that run the model
    raise Unsupported for any error in it, except OutOfMemoryError.

    Args:
        model: a causal language model on one device, in eval mode
        batch: number of sequences; their prompts have the same length
        length: upper bound for the tokens of prompt and answer
        temperature: 0 chooses the most likely token; otherwise tokens are sampled from the whole distribution

    Attributes:
        execution: of a step: ``fused layers`` or ``compiled layers``, alone or ``in a CUDA graph``; ``CUDA graph``; or
            ``eager``
        fallbacks: counts of accelerations that were left out, by the keys of ``FALLBACKS``
        reasons: the first error of each fallback, in one line
        seconds: duration of ``warm_up`` (the first eager step), ``fuse``, ``compile`` and ``capture``

    Raises:
        Unsupported: the model cannot be decoded with a step of fixed shapes.
    """

    def __init__(self, model: Any, batch: int, length: int, *, temperature: float = 0.0) -> None:
        self.model = model
        self.batch = batch
        self.temperature = temperature
        self.length = math.ceil(length / LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        self._num_positions = length
        self.device: torch.device = single_device(model)
        self.execution = "eager"
        self.fallbacks: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self._config = model.config.get_text_config(decoder=True)
        with as_unsupported():
            check_rotary(self._config, length)
            self._windows = attention_windows(model, self._config)
            self._cache = static_cache(model.config, self.length)
        self._token = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self._position = torch.zeros(1, dtype=torch.long, device=self.device)
        self._cache_positions = torch.arange(self.length, device=self.device)
        self._step_cache = StepCache(self._cache.layers, self._position)
        self._uses_decode_attention = False
        # Compiled versions replace these two functions while ``_compiled_parts`` is active.
        self._visible_ranges = visible_ranges
        self._advance = advance
        self._fused: FusedLayers | None = None
        self._graph: torch.cuda.CUDAGraph | None = None
        self._prompt_graphs: PromptGraphs | None = PromptGraphs(batch, length)

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Starts new sequences: prompts [batch, S] -> the first new tokens [batch]."""
        if ids.shape[0] != self.batch or not 0 < ids.shape[1] <= self.length:
            raise ValueError(f"prompts are {list(ids.shape)}, not [{self.batch}, 1 .. {self.length}]")
        with as_unsupported():
            logits = self._replayed_logits(ids)
            if logits is None:
                logits = self._prompt_logits(ids)
            self._token.copy_(self._choose(logits))
            self._position.fill_(ids.shape[1])
            return self._token[:, 0].clone()

    def _replayed_logits(self, ids: Tensor) -> Tensor | None:
        """Runs prompts in a CUDA graph, captured at the second prompt of a length. Returns None without a graph."""
        graphs, length = self._prompt_graphs, ids.shape[1]
        if graphs is None or not graphs.record_length(length) or self._graph is None:
            return None
        if not graphs.is_captured(length):
            capture_prompt = partial(graphs.capture, self._prompt_logits, length, self.device)
            if not self._try(capture_prompt, "prompts_not_captured"):
                self._prompt_graphs = None  # frees the memory of the others
                return None
        return graphs.replay(ids)

    def _prompt_logits(self, ids: Tensor, last: Tensor | None = None) -> Tensor:
        """Writes the keys and values of prompts, from the first position on.

        Args:
            ids: prompts [batch, S]
            last: position of the last token, int64 [1]; None: S - 1

        Returns:
            Logits of the last token, [batch, V].
        """
        cache = self._cache
        is_initialized = all(layer.is_initialized for layer in cache.layers)
        if is_initialized:
            cache = (PromptCache if self._fused is None else self._fused.prompt_cache)(layers=cache.layers)
        else:
            for layer in cache.layers:
                layer.cumulative_length.zero_()
        arguments = last_logits_argument(self.model, 1 if last is None else last)
        with ExitStack() as stack:
            if self._fused is not None:
                stack.enter_context(self._fused.active(is_prompt=True))
            is_causal = step_attention.sees_all_before(self._windows, ids.shape[1])
            if is_initialized and is_causal and self._uses_decode_attention:
                stack.enter_context(step_attention.use_attention(self._config, step_attention.attend_causally))
            output = self.model(input_ids=ids, use_cache=True, **arguments, **cache_argument(self.model, cache))
        logits: Tensor = output.logits
        if last is not None and not arguments:
            logits = logits.index_select(1, last)
        return logits[:, -1]

    @torch.no_grad()
    def prepare(self, *, compile_layers: bool = True, backend: str = "inductor") -> None:
        """Fuses or compiles the layers of a step, and captures it. Call it after a first ``prefill``.

        What fails is counted in ``fallbacks`` and left out. On a CPU there is nothing to do without ``compile_layers``.

        Args:
            compile_layers: whether to compile the decoder layers
            backend: of ``torch.compile``
        """
        cuda = self.device.type == "cuda"
        has_kernels = (cuda and dispatch.mode != "reference") or dispatch.mode == "triton"
        if not has_kernels and not compile_layers and not cuda:
            return
        self._prepare_eager_step()
        if compile_layers:
            start = time.perf_counter()
            compiler = LayerCompiler(backend, merge_linears)
            run = self._capture if cuda else self._warm_up
            if self._try(partial(run, compiler), "layers_not_compiled"):
                self.execution = "compiled layers in a CUDA graph" if cuda else "compiled layers"
                self.seconds["compile"] = time.perf_counter() - start - self.seconds.get("capture", 0.0)
                return
        if has_kernels:
            self._try(self._fuse_layers, "layers_not_fused")
        is_fused = self._fused is not None and self._fused.count > 0
        if is_fused:
            self.execution = "fused layers"
        if cuda and self._try(self._capture, "step_not_captured"):
            self.execution = "fused layers in a CUDA graph" if is_fused else "CUDA graph"

    def _prepare_eager_step(self) -> None:
        """Selects the attention of a step, and runs one step to load and compile the packed kernels without Dynamo."""
        start = time.perf_counter()
        if step_attention.usable(self.model, self._config):
            self._uses_decode_attention = True
            self._uses_decode_attention = self._try(self._warm_up, "attention_by_transformers")
        if not self._uses_decode_attention:
            with as_unsupported():
                self._warm_up()
        self.seconds["warm_up"] = time.perf_counter() - start

    def _fuse_layers(self) -> None:
        """Finds the layers that can be fused. Raises RuntimeError if there are others, which run as they are."""
        from gemq.decoding.fused_layers import FusedLayers  # triton is not installed with torch for CPUs

        start = time.perf_counter()
        layers = decoder_layers(self.model, len(self._cache.layers))
        positions = (self._position, self._num_positions)
        self._fused = FusedLayers(layers, modules_around_layers(self.model), self.device, *positions)
        try:
            self._fused.verify(self._warm_up)
        except BaseException:
            self._fused = None
            raise
        self.seconds["fuse"] = time.perf_counter() - start
        if self._fused.count < len(layers):
            raise RuntimeError(f"{len(layers) - self._fused.count} of {len(layers)} layers are of another form")

    def step(self) -> Tensor:
        """Decodes one token of each sequence on the device.

        Returns:
            [batch, 1], a buffer that the next step overwrites.
        """
        if self._graph is not None:
            self._graph.replay()
        else:
            with torch.no_grad(), as_unsupported():
                self._step()
        return self._token

    def decode(self, count: int) -> Iterator[list[int]]:
        """Yields the tokens [batch] of ``count`` further steps, in order.

        The device runs up to ``MAX_STEPS_IN_FLIGHT`` steps ahead. If the caller stops early, the results of these steps
        are dropped.
        """
        if self.device.type != "cuda":
            for _ in range(count):
                yield self.step()[:, 0].tolist()
            return

        tokens = torch.empty(count, self.batch, dtype=torch.long, pin_memory=True)
        copied = [torch.cuda.Event() for _ in range(count)]
        for index in range(count + MAX_STEPS_IN_FLIGHT):
            if index < count:
                tokens[index].copy_(self.step()[:, 0], non_blocking=True)
                copied[index].record()
            oldest = index - MAX_STEPS_IN_FLIGHT
            if oldest >= 0:
                copied[oldest].synchronize()
                yield tokens[oldest].tolist()

    def _step(self) -> None:
        """Runs one step on the buffers."""
        cache = self._step_cache
        with ExitStack() as stack:
            attend = step_attention.attend
            if self._fused is not None:
                stack.enter_context(self._fused.active())
                attend = self._fused.attend
            if self._uses_decode_attention:
                stack.enter_context(step_attention.use_attention(self._config, attend))
                cache = cache if self._fused is None else self._fused.cache(cache)
            logits = self.model(
                input_ids=self._token,
                attention_mask=self._attention_mask(),
                position_ids=self._position.expand(self.batch, 1),
                use_cache=True,
                **cache_argument(self.model, cache),
            ).logits[:, -1]
        self._finish_step(logits)

    def _finish_step(self, logits: Tensor) -> None:
        """Writes the next tokens and the next position into the buffers. Logits are [batch, V]."""
        if self._fused is not None and self.temperature == 0:
            from gemq.kernels.decode import choice  # triton is not installed with torch for CPUs

            choice.advance(logits, self._token, self._position)
        else:
            self._advance(self._token, self._position, self._choose, logits)

    def _choose(self, logits: Tensor) -> Tensor:
        """Chooses the next tokens: logits [batch, V] -> [batch, 1]."""
        if self.temperature > 0:
            # argmax(p / Exp(1)) is distributed as p. torch.multinomial would synchronize with the host.
            probabilities = (logits.float() / self.temperature).softmax(-1)
            exponential = torch.empty_like(probabilities).exponential_()
            return (probabilities / exponential).argmax(-1, keepdim=True)
        return argmax(logits)

    def _attention_mask(self) -> Any:
        """Returns the attention mask of a step in the form that the model takes: by layer type, or a single one."""
        if self._uses_decode_attention:
            return self._visible_ranges(self._position, self._windows)
        return self._additive_masks()

    def _additive_masks(self) -> Any:
        """Returns additive masks, [batch, 1, 1, length]."""
        is_written = self._cache_positions <= self._position
        lowest = torch.finfo(self.model.dtype).min
        masks = {}
        for layer_type, window in self._windows.items():
            is_visible = is_written
            if window is not None:
                is_visible = is_written & (self._cache_positions > self._position - window)
            mask = torch.zeros(self.length, dtype=self.model.dtype, device=self.device)
            mask.masked_fill_(~is_visible, lowest)
            masks[layer_type] = mask.expand(self.batch, 1, 1, self.length)
        return masks.get(ALL_LAYERS, masks)

    def _capture(self, compiler: LayerCompiler | None = None) -> None:
        """Captures the step in a CUDA graph, with compiled layers if there is a compiler."""
        self._warm_up(compiler)
        start = time.perf_counter()
        with self._compiled_parts(compiler):
            self._graph, _ = capture(self._step, self.device)
        torch.cuda.synchronize()
        self.seconds["capture"] = time.perf_counter() - start

    def _warm_up(self, compiler: LayerCompiler | None = None) -> None:
        """Runs a step and restores the buffers, so that compilers, autotuners and libraries run before a capture."""
        token = self._token.clone()
        position = self._position.clone()
        stream = torch.cuda.Stream() if self.device.type == "cuda" else None
        with self._compiled_parts(compiler):
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step()
                self._token.copy_(token)
                self._position.copy_(position)
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)

    @contextmanager
    def _compiled_parts(self, compiler: LayerCompiler | None) -> Iterator[None]:
        """Runs the parts of a step compiled while the context is active. Does nothing without a compiler."""
        if compiler is None:
            yield
            return
        layer_caches = [StepCache([layer], self._position) for layer in self._cache.layers]
        layers = decoder_layers(self.model, len(layer_caches))
        self._visible_ranges = compiler.compile_function(visible_ranges)
        if self.temperature == 0:  # Inductor draws other random numbers than torch
            self._advance = compiler.compile_function(advance)
        try:
            with compiler.compiled(layers, layer_caches, modules_around_layers(self.model)):
                yield
        finally:
            self._visible_ranges = visible_ranges
            self._advance = advance

    def _try(self, run: Callable[[], None], fallback: str) -> bool:
        """Runs a function that may fail. Returns whether it succeeded.

        A failure is recorded under ``fallback``, and the buffers are restored.
        """
        token = self._token.clone()
        position = self._position.clone()
        try:
            run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - Dynamo, Inductor, CUDA and model code raise all kinds
            self.fallbacks[fallback] += 1
            self.reasons[fallback] = first_line(error)
            self._token.copy_(token)
            self._position.copy_(position)
            return False
        return True
