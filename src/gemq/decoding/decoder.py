"""Decoding with a static cache: one step of fixed shapes, captured in a CUDA graph and replayed.

The model is called as it is; no class is patched. Transformers fills a static cache with the prompt in one eager
call. A step then reads its token and position from buffers that stay where they are, writes keys and values at that
position, chooses the next token on the device and moves the position on, so that a graph of it can be replayed with
no word from the host. Before capture each decoder layer may go through ``torch.compile`` (regional: one compiled
layer serves all of its kind), which fuses the many small kernels between the packed ones.

What a model or a driver does not allow is left out step by step (compiled layers, then the graph) and counted,
whatever it raises: all of this rests on interfaces that change. Where even the static cache fails, ``Unsupported`` is
raised and the caller decodes without one. Causal language models of Transformers with full or sliding attention.
"""

from __future__ import annotations

import inspect
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from gemq.decoding import step_attention
from gemq.decoding.regional_compile import LayerCompiler
from gemq.kernels.decode.linear_fusion import merge_linears
from gemq.models.cache_names import cache_argument
from gemq.models.config_values import layer_configs, rotary_limit
from gemq.runtime.fallbacks import first_line
from gemq.runtime.graph_capture import capture

LENGTH_MULTIPLE = 64
"""Cache lengths are rounded up to this: attention kernels want aligned masks."""

LARGEST_PARTS = 64
"""Parts of a vocabulary whose largest logits are found apart, at most."""

IN_FLIGHT = 4
"""Steps that the GPU may be ahead of the token that is read: the host never keeps it waiting."""

ATTENTION = ("eager", "sdpa")
"""Attention implementations that take an additive mask."""

FALLBACKS = {
    "attention_by_transformers": "a decode step's attention goes through the whole cache under a mask",
    "layers_not_compiled": "decoder layers could not be compiled: their small kernels run one by one",
    "step_not_captured": "the decode step could not be captured in a CUDA graph: it is launched kernel by kernel",
    "decoded_by_transformers": "this model needs model.generate of Transformers, which runs without a CUDA graph",
}


class Unsupported(Exception):
    """The model's cache or attention is not one that a static step serves; the message says what."""


class Decoder:
    """One model, batch size and longest sequence; prompts follow each other through ``prefill``.

    execution: how a step runs: ``compiled layers in a CUDA graph``, ``CUDA graph`` or ``eager``
    fallbacks: what was not done as asked, by the names in ``FALLBACKS``
    reasons:   the first error behind each fallback, one line each
    seconds:   what ``warm_up`` (the first eager step), ``compile`` and ``capture`` took
    """

    def __init__(self, model: Any, batch: int, length: int, *, temperature: float = 0.0) -> None:
        """
        model:       a causal language model on one device, in eval mode
        batch:       sequences that are decoded together, all with prompts of the same length
        length:      tokens of prompt and answer together, at most
        temperature: 0 takes the likeliest token; above, tokens are drawn from the whole distribution
        Raises Unsupported where the model is not one for a static step. So do all other methods that run the model,
        whatever it raises there, but for OutOfMemoryError.
        """
        self.model, self.batch, self.temperature = model, batch, temperature
        self.length = -(-length // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        self.device: torch.device = _only_device(model)
        self.execution = "eager"
        self.fallbacks: Counter[str] = Counter()
        self.reasons: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self._config = model.config.get_text_config(decoder=True)
        with _supported():
            _check_rotary(self._config, length)
            self._windows = _attention_windows(model, self._config)
            self._cache = _static_cache(model.config, self.length)
        self._token = torch.zeros(batch, 1, dtype=torch.long, device=self.device)
        self._position = torch.zeros(1, dtype=torch.long, device=self.device)
        self._places = torch.arange(self.length, device=self.device)
        self._own_attention = False
        self._seen, self._advance = _seen, _advance
        self._step_cache = _StepCache(self._cache.layers, self._position)
        self._graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def prefill(self, ids: Tensor) -> Tensor:
        """Prompts [batch, S] -> the first new tokens [batch]. Forgets what was decoded before."""
        if ids.shape[0] != self.batch or not 0 < ids.shape[1] <= self.length:
            raise ValueError(f"prompts are {list(ids.shape)}, not [{self.batch}, 1 .. {self.length}]")
        with _supported():
            layers: list[Any] = list(self._cache.layers)
            for layer in layers:
                layer.cumulative_length.zero_()  # what lies behind is masked, and overwritten on the way
            cache = cache_argument(self.model, self._cache)
            out = self.model(input_ids=ids, use_cache=True, **cache, **_last_logits(self.model))
            self._token.copy_(self._choose(out.logits[:, -1]))
            self._position.fill_(ids.shape[1])
            return self._token[:, 0].clone()

    @torch.no_grad()
    def prepare(self, *, compile_layers: bool = True, backend: str = "inductor") -> None:
        """Compiles and captures the step; call it after a first ``prefill``. On a CPU without ``compile_layers`` it
        does nothing. What fails is counted and left out.
        """
        cuda = self.device.type == "cuda"
        if not cuda and not compile_layers:
            return
        start = time.perf_counter()
        if step_attention.usable(self.model, self._config):
            self._own_attention = True
            self._own_attention = self._try(partial(self._warm_up, None), "attention_by_transformers")
        if not self._own_attention:
            with _supported():
                self._warm_up(None)  # loads and compiles the packed kernels, out of Dynamo's sight
        self.seconds["warm_up"] = time.perf_counter() - start
        if compile_layers:
            start = time.perf_counter()
            attempt = self._capture if cuda else self._warm_up
            if self._try(partial(attempt, LayerCompiler(backend, merge_linears)), "layers_not_compiled"):
                self.execution = "compiled layers in a CUDA graph" if cuda else "compiled layers"
                self.seconds["compile"] = time.perf_counter() - start - self.seconds.get("capture", 0.0)
                return
        if cuda and self._try(self._capture, "step_not_captured"):
            self.execution = "CUDA graph"

    def step(self) -> Tensor:
        """Decodes one token of each sequence on the device: [batch, 1], a buffer that the next step overwrites."""
        if self._graph is not None:
            self._graph.replay()
        else:
            with torch.no_grad(), _supported():
                self._step()
        return self._token

    def decode(self, count: int) -> Iterator[list[int]]:
        """``count`` further tokens of each sequence, a list [batch] for each step, in order.

        The device runs ahead by up to ``IN_FLIGHT`` steps; stop reading, and what it has done more is dropped.
        """
        cuda = self.device.type == "cuda"
        read = torch.empty(count, self.batch, dtype=torch.long, pin_memory=cuda)
        done = []
        for i in range(count):
            read[i].copy_(self.step()[:, 0], non_blocking=True)
            if not cuda:
                yield read[i].tolist()
                continue
            done.append(torch.cuda.Event())
            done[-1].record()
            if i >= IN_FLIGHT:
                done[i - IN_FLIGHT].synchronize()
                yield read[i - IN_FLIGHT].tolist()
        for i in range(max(0, count - IN_FLIGHT), count) if cuda else ():
            done[i].synchronize()
            yield read[i].tolist()

    def _step(self) -> None:
        with step_attention.attending(self._config) if self._own_attention else nullcontext():
            logits = self.model(
                input_ids=self._token,
                attention_mask=self._seen(self._position, self._windows) if self._own_attention else self._masks(),
                position_ids=self._position.expand(self.batch, 1),
                use_cache=True,
                **cache_argument(self.model, self._step_cache),
            ).logits[:, -1]
        self._advance(self._token, self._position, self._choose, logits)

    def _choose(self, logits: Tensor) -> Tensor:
        """Logits [batch, V] -> tokens [batch, 1]."""
        if self.temperature > 0:
            # The largest of p / Exp(1) is drawn with probability p; torch.multinomial would wait for the device.
            chances = (logits.float() / self.temperature).softmax(-1)
            return (chances / torch.empty_like(chances).exponential_()).argmax(-1, keepdim=True)
        return _largest(logits)

    def _masks(self) -> Any:
        """Additive masks [batch, 1, 1, length] in the form in which Transformers passes them: by kind, or one alone."""
        seen = self._places <= self._position
        masks = {}
        for kind, window in self._windows.items():
            allowed = seen if window is None else seen & (self._places > self._position - window)
            mask = torch.zeros(self.length, dtype=self.model.dtype, device=self.device)
            mask.masked_fill_(~allowed, torch.finfo(self.model.dtype).min)
            masks[kind] = mask.expand(self.batch, 1, 1, self.length)
        return masks.get("all", masks)

    def _capture(self, compiler: LayerCompiler | None = None) -> None:
        self._warm_up(compiler)
        start = time.perf_counter()
        with self._layers(compiler):
            self._graph, _ = capture(self._step, self.device)
        torch.cuda.synchronize()
        self.seconds["capture"] = time.perf_counter() - start

    def _warm_up(self, compiler: LayerCompiler | None) -> None:
        """A step whose outcome is undone: compilers, autotuners and libraries settle outside of the capture."""
        token, position = self._token.clone(), self._position.clone()
        stream = torch.cuda.Stream() if self.device.type == "cuda" else None
        with self._layers(compiler):
            if stream is not None:
                stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._step()
                self._token.copy_(token)
                self._position.copy_(position)
            if stream is not None:
                torch.cuda.current_stream().wait_stream(stream)

    @contextmanager
    def _layers(self, compiler: LayerCompiler | None) -> Iterator[None]:
        """While open, a step's parts run compiled."""
        if compiler is None:
            yield
            return
        own = [_StepCache([layer], self._position) for layer in self._cache.layers]
        self._seen = compiler.function(_seen)
        if self.temperature == 0:  # Inductor's random numbers are not those of torch
            self._advance = compiler.function(_advance)
        try:
            with compiler.through(_decoder_layers(self.model, len(own)), own, _around_layers(self.model)):
                yield
        finally:
            self._seen, self._advance = _seen, _advance

    def _try(self, attempt: Callable[[], None], name: str) -> bool:
        token, position = self._token.clone(), self._position.clone()
        try:
            attempt()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - Dynamo, Inductor, CUDA and model code raise all kinds
            self.fallbacks[name] += 1
            self.reasons[name] = first_line(error)
            self._token.copy_(token)
            self._position.copy_(position)
            return False
        return True


def _advance(token: Tensor, position: Tensor, choose: Callable[[Tensor], Tensor], logits: Tensor) -> None:
    token.copy_(choose(logits))
    position.add_(1)


def _largest(logits: Tensor) -> Tensor:
    """Argmax of logits [batch, V] -> [batch, 1]: of parts of a row first, for which a GPU has more programs."""
    parts = math.gcd(logits.shape[1], LARGEST_PARTS)
    values, places = logits.view(logits.shape[0], parts, -1).max(-1)
    part = values.argmax(-1, keepdim=True)
    return part * (logits.shape[1] // parts) + places.gather(-1, part)


def _seen(position: Tensor, windows: dict[str, int | None]) -> Any:
    """What ``step_attention`` takes for a mask, int32 [1, 1, 1, 2], in the forms of ``Decoder._masks``."""
    end = position.to(torch.int32) + 1
    bounds = {}
    for kind, window in windows.items():
        first = torch.zeros_like(end) if window is None else (end - window).clamp(min=0)
        bounds[kind] = torch.cat([first, end]).view(1, 1, 1, 2)
    return bounds.get("all", bounds)


class _StepCache(Cache):
    """What a decode step sees of a static cache: keys and values are written at one position, the same in all layers.

    With a single layer it is that layer's own, whatever index is asked for.
    """

    def __init__(self, layers: Sequence[Any], position: Tensor) -> None:
        super().__init__(layers=list(layers))
        self._position = position

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        layer: Any = self.layers[layer_idx if len(self.layers) > 1 else 0]
        layer.keys.index_copy_(2, self._position, key_states)
        layer.values.index_copy_(2, self._position, value_states)
        return layer.keys, layer.values


@contextmanager
def _supported() -> Iterator[None]:
    """Makes everything that a static cache ends in an ``Unsupported``: the model itself may still do without one."""
    try:
        yield
    except (Unsupported, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise Unsupported(first_line(error)) from error


def _only_device(model: nn.Module) -> torch.device:
    devices = {p.device for p in model.parameters()} | {b.device for b in model.buffers()}
    if len(devices) != 1 or "meta" in {d.type for d in devices}:
        raise Unsupported("it lies on several devices")
    return devices.pop()


def _attention_windows(model: Any, config: Any) -> dict[str, int | None]:
    """Which masks the model takes: layer type -> tokens that it looks back (None: all). One mask for all layers, where
    the family has no layer types, is called ``all``."""
    if not model._can_compile_fullgraph:  # Transformers' own word for static shapes
        raise Unsupported(f"Transformers does not run {type(model).__name__} with a static cache")
    if config._attn_implementation not in ATTENTION:
        raise Unsupported(f"its attention ({config._attn_implementation}) takes no additive mask")
    configs = layer_configs(config)
    windows = [getattr(layer, "sliding_window", None) for layer in configs]
    if hasattr(config, "layer_types"):
        if unknown := set(config.layer_types) - {"full_attention", "sliding_attention"}:
            raise Unsupported(f"it has layers of type {', '.join(sorted(unknown))}")
        seen = {
            (kind, window if kind == "sliding_attention" else None)
            for kind, window in zip(config.layer_types, windows, strict=False)
        }
    else:
        if any(getattr(layer, "attention_chunk_size", None) is not None for layer in configs):
            raise Unsupported("it attends in chunks")
        seen = {("all", window) for window in windows}
    if len(dict(seen)) != len(seen):
        raise Unsupported("its layers of one type have sliding windows of several lengths")
    return dict(sorted(seen))


def _check_rotary(config: Any, length: int) -> None:
    """Refuses sequences in which rotary factors change: Transformers then computes the whole cache again."""
    limit = rotary_limit(config)
    if limit is not None and length > limit:
        raise Unsupported(f"its rotary factors change at {limit} tokens, and prompt and answer may have {length}")


def _static_cache(config: Any, length: int) -> Any:
    """A cache of ``length`` places in each layer."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    cache = StaticCache(config=config, max_cache_len=length)
    if {type(layer) for layer in cache.layers} - {StaticLayer, StaticSlidingWindowLayer}:
        raise Unsupported("its cache holds more than keys and values")
    # A sliding layer keeps its length in Python, where a graph cannot follow; a full one under a mask is the same.
    cache.layers = [StaticLayer(max_cache_len=length) for _ in cache.layers]
    return cache


def _last_logits(model: Any) -> dict[str, int]:
    """Asks for the last position's logits only, where the family can."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _around_layers(model: Any) -> list[nn.Module]:
    """The last norm and the rotary embedding: many small kernels, run one by one."""
    lists = (nn.ModuleList, nn.Embedding)
    return [child for child in model.get_decoder().children() if not isinstance(child, lists)]


def _decoder_layers(model: Any, count: int) -> list[nn.Module]:
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != count:
        raise RuntimeError(f"{type(model).__name__} has no list of {count} decoder layers")
    return list(layers)
