"""Regional compilation: one compiled decoder layer serves all layers of its kind, so that start-up does not grow with
the model's depth.

The layers' own ``forward`` is compiled from outside; classes and instances stay as they are but for the time that
``through`` is open. Knows Transformers' way of handing its cache to a layer, no family and no packed weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gemq.models.cache_names import cache_name

MOST_KINDS = 6
"""A model with more kinds of decoder layer would spend minutes on compiling: it is refused."""

WIDEST_SORT = 256
"""Top-k over at most this many values is compiled as a sort, which Inductor fuses; top-k itself takes two kernels."""

FEW_ROWS, FEW_COLUMNS = 16, 256
"""A product with so few rows and columns at most, a router's, is compiled as products and sums, which Inductor fuses
with what stands around it; a vendor's kernel for it takes longer than to read its weights."""

INDUCTOR: dict[str, Any] = {"combo_kernels": True}
"""One launch for small kernels that do not need each other: a launch takes about as long as most of them run."""


class LayerCompiler:
    """Compiles decoder layers for fixed shapes with ``backend`` (any that ``torch.compile`` takes).

    rewrite: what is done to each traced layer before
    kinds:   how many different layers have been compiled so far
    """

    def __init__(
        self, backend: str = "inductor", rewrite: Callable[[torch.fx.GraphModule], Any] = lambda graph: None
    ) -> None:
        self.kinds = 0
        self._rewrite = rewrite
        self._inner = _inductor if backend == "inductor" else torch._dynamo.lookup_backend(backend)
        options: dict[str, Any] = {"fullgraph": True, "dynamic": False}
        self._compiled = torch.compile(_forward, backend=self._backend, **options)
        self._around = torch.compile(_forward, backend=self._inner, **options)

    @contextmanager
    def through(
        self, layers: Sequence[nn.Module], caches: Sequence[Any], around: Sequence[nn.Module] = ()
    ) -> Iterator[None]:
        """While open, each of ``layers`` runs compiled, with its own of ``caches`` in place of the model's: with one
        cache for all, a layer's index would be a constant of the code, which would then serve that layer alone.
        Modules ``around`` the layers run compiled as well; they take no cache.

        The first call of a layer that cannot be compiled raises: Dynamo and Inductor RuntimeError, model code anything.
        """
        _mark_sizes_that_differ(layers)
        for layer, cache in zip(layers, caches, strict=True):
            layer.forward = partial(self._call, layer, cache)
        for module in around:
            module.forward = partial(self._around, module)
        try:
            # The limits count what this process compiled for other batch sizes too; ours is MOST_KINDS.
            with torch._dynamo.config.patch(
                recompile_limit=10_000, accumulated_recompile_limit=10_000, force_parameter_static_shapes=False
            ):
                yield
        finally:
            for module in (*layers, *around):
                del module.forward

    def function(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, of tensors alone, compiled for fixed shapes."""
        return torch.compile(call, backend=self._inner, fullgraph=True, dynamic=False)

    def _call(self, layer: nn.Module, cache: Any, /, *args: Any, **kwargs: Any) -> Any:
        name = cache_name(kwargs)
        if name is None:
            raise RuntimeError(f"{type(layer).__name__} is not given its cache by name")
        return self._compiled(layer, *args, **{**kwargs, name: cache})

    def _backend(self, graph: Any, inputs: Any) -> Any:
        self.kinds += 1
        if self.kinds > MOST_KINDS:
            raise RuntimeError(f"its layers differ in more than {MOST_KINDS} ways")
        self._rewrite(graph)
        return self._inner(graph, inputs)


def _forward(layer: Any, /, *args: Any, **kwargs: Any) -> Any:
    return type(layer).forward(layer, *args, **kwargs)  # not layer.forward, which leads back here


def _mark_sizes_that_differ(layers: Sequence[nn.Module]) -> None:
    """Packed experts take other byte counts in each layer: such sizes become symbols, so that one code serves all."""
    by_name: dict[tuple[type, str], list[Tensor]] = {}
    for layer in layers:
        for name, buffer in layer.named_buffers():
            by_name.setdefault((type(layer), name), []).append(buffer)
    for buffers in by_name.values():
        if len({buffer.dim() for buffer in buffers}) != 1:
            continue
        for dim in range(buffers[0].dim()):
            if len({buffer.shape[dim] for buffer in buffers}) > 1:
                for buffer in buffers:
                    torch._dynamo.maybe_mark_dynamic(buffer, dim)


def _inductor(graph: Any, inputs: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    own: dict[Any, Any] = {torch.ops.aten.topk.default: _topk, torch.ops.aten.mm.default: _mm}
    return compile_fx(graph, inputs, config_patches=INDUCTOR, decompositions={**select_decomp_table(), **own})


def _mm(a: Tensor, b: Tensor) -> Any:
    if a.shape[0] > FEW_ROWS or b.shape[1] > FEW_COLUMNS or not a.dtype.is_floating_point:
        return NotImplemented
    return (a.unsqueeze(2) * b.unsqueeze(0)).sum(1)


def _topk(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if not x.dim() or x.shape[dim] > WIDEST_SORT:
        return NotImplemented
    values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k), indices.narrow(dim, 0, k)
