"""Regional compilation: one compiled decoder layer serves all layers of its kind.

Start-up time therefore does not grow with the depth of the model. The ``forward`` of the layers is replaced only while
``LayerCompiler.compiled`` is active. The layers may be of any family, packed or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gemq.models.cache_names import cache_name
from gemq.models.module_forwards import replaced_forwards
from gemq.runtime.compat import torch_private

MAX_LAYER_KINDS = 6
"""Models with more kinds of decoder layers are refused, since compiling them would take minutes."""

MAX_SORTED_VALUES = 256
"""Top-k over at most this many values is compiled as a sort, which Inductor fuses. Top-k itself takes two kernels."""

MAX_FUSED_ROWS = 16
MAX_FUSED_COLUMNS = 256
"""Matrix products of at most this many rows and columns, such as a router's, are compiled as products and sums.
Inductor fuses these with the operations around them. A vendor kernel takes longer than reading the weights."""

INDUCTOR_OPTIONS: dict[str, Any] = {"combo_kernels": True}
"""Combines independent small kernels in one launch, since a launch takes about as long as most of them run."""

MAX_RECOMPILATIONS = 10_000
"""Limit of Dynamo, which also counts compilations for other batch sizes. The effective limit is MAX_LAYER_KINDS."""


class LayerCompiler:
    """Compiles decoder layers for fixed shapes.

    Args:
        backend: any backend of ``torch.compile``
        rewrite: transforms each traced layer before it is compiled

    Attributes:
        kinds: number of different layers that were compiled
    """

    def __init__(
        self, backend: str = "inductor", rewrite: Callable[[torch.fx.GraphModule], Any] = lambda graph: None
    ) -> None:
        self.kinds = 0
        self._rewrite = rewrite
        self._backend = _inductor if backend == "inductor" else torch_private.compile_backend(backend)
        self._layer_forward = torch.compile(_class_forward, backend=self._compile_layer, fullgraph=True, dynamic=False)
        self._module_forward = self.compile_function(_class_forward)

    @contextmanager
    def compiled(
        self, layers: Sequence[nn.Module], caches: Sequence[Any], modules: Sequence[nn.Module] = ()
    ) -> Iterator[None]:
        """Runs modules compiled while the context is active.

        Each layer receives its own cache in place of the model's. With one cache for all layers, the index of a layer
        would be a constant of the compiled code, which could then serve no other layer.

        Args:
            layers: decoder layers
            caches: a cache for each layer
            modules: other modules to compile, which take no cache

        Raises:
            Exception: of any type, from the first call of a module that cannot be compiled.
        """
        _mark_differing_sizes(layers)
        replaced: dict[nn.Module, Callable[..., Any]] = {}
        for layer, cache in zip(layers, caches, strict=True):
            replaced[layer] = partial(self._call_layer, layer, cache)
        for module in modules:
            replaced[module] = partial(self._module_forward, module)
        with replaced_forwards(replaced), torch_private.dynamo_settings(MAX_RECOMPILATIONS):
            yield

    def compile_function(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compiles a function of tensors for fixed shapes."""
        return torch.compile(function, backend=self._backend, fullgraph=True, dynamic=False)

    def _call_layer(self, layer: nn.Module, cache: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Runs a compiled layer with ``cache`` in place of the one that the model passes."""
        name = cache_name(kwargs)
        if name is None:
            raise RuntimeError(f"{type(layer).__name__} is not given its cache by name")
        return self._layer_forward(layer, *args, **{**kwargs, name: cache})

    def _compile_layer(self, graph: Any, inputs: Any) -> Any:
        """Backend of ``torch.compile`` for layers: counts, rewrites and compiles the traced layer."""
        self.kinds += 1
        if self.kinds > MAX_LAYER_KINDS:
            raise RuntimeError(f"its layers differ in more than {MAX_LAYER_KINDS} ways")
        self._rewrite(graph)
        return self._backend(graph, inputs)


def _class_forward(module: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
    """Calls the ``forward`` of the module's class. That of the instance is replaced and would lead back here."""
    return type(module).forward(module, *args, **kwargs)


def _mark_differing_sizes(layers: Sequence[nn.Module]) -> None:
    """Makes buffer sizes that differ between layers symbolic, so that the same code serves all of them.

    Packed experts have other byte counts in each layer.
    """
    buffers_by_name: dict[tuple[type, str], list[Tensor]] = {}
    for layer in layers:
        for name, buffer in layer.named_buffers():
            buffers_by_name.setdefault((type(layer), name), []).append(buffer)
    for buffers in buffers_by_name.values():
        if len({buffer.dim() for buffer in buffers}) != 1:
            continue
        for dim in range(buffers[0].dim()):
            sizes = {buffer.shape[dim] for buffer in buffers}
            if len(sizes) > 1:
                for buffer in buffers:
                    torch_private.mark_dynamic(buffer, dim)


def _inductor(graph: Any, inputs: Any) -> Any:
    """Compiles a graph with Inductor and the decompositions below."""
    decompositions: dict[Any, Callable[..., Any]] = {
        torch.ops.aten.topk.default: _topk_by_sort,
        torch.ops.aten.mm.default: _mm_by_sum,
    }
    return torch_private.compile_with_inductor(graph, inputs, INDUCTOR_OPTIONS, decompositions)


def _mm_by_sum(a: Tensor, b: Tensor) -> Any:
    """Decomposes small matrix products into products and sums."""
    if a.shape[0] > MAX_FUSED_ROWS or b.shape[1] > MAX_FUSED_COLUMNS or not a.dtype.is_floating_point:
        return NotImplemented
    return (a.unsqueeze(2) * b.unsqueeze(0)).sum(1)


def _topk_by_sort(x: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    """Decomposes top-k over few values into a sort."""
    if not x.dim() or x.shape[dim] > MAX_SORTED_VALUES:
        return NotImplemented
    values, indices = torch.sort(x, dim=dim, descending=largest, stable=True)
    return values.narrow(dim, 0, k), indices.narrow(dim, 0, k)
