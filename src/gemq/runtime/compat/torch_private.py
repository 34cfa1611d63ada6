"""Private interfaces of PyTorch. "Since 2.11" means: in the oldest supported version, perhaps before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

disabled_torch_function = torch._C._disabled_torch_function_impl
"""Value of ``__torch_function__`` for a subclass of ``Tensor`` whose operations return plain tensors.

Relies on: ``torch._C._disabled_torch_function_impl``, which ``nn.Parameter`` has too. PyTorch compares the object, so
it cannot be wrapped. Since 1.7.
If it changes: activations with extra outputs stay of type ``HiddenStates`` after operations, or no job starts.
"""


def without_torch_function() -> AbstractContextManager[None]:
    """Return a context in which subclasses of ``Tensor`` are treated as plain tensors.

    Relies on: ``torch._C.DisableTorchFunctionSubclass``. Since 2.0.
    If it changes: any use of ``PackedLinear.weight`` fails or recurses, such as by adapters.
    """
    return torch._C.DisableTorchFunctionSubclass()


def map_instances(kind: type[Any], function: Callable[[Any], Any], tree: Any) -> Any:
    """Apply ``function`` to the instances of ``kind`` in nested tuples, lists and dictionaries.

    Relies on: ``torch.utils._pytree.tree_map_only``. Since 1.13.
    If it changes: any use of ``PackedLinear.weight`` fails, such as by adapters.
    """
    return tree_map_only(kind, function, tree)


def write_count(tensor: Tensor) -> int:
    """Return a number that grows with every write to ``tensor`` or to a view of it.

    Relies on: ``Tensor._version``, which raises RuntimeError for inference tensors. Since 0.4.
    If it changes: decode on a CPU uses outdated weights, and calibration misses inputs that a layer overwrites.
    """
    return tensor._version


def tensor_dict(module: nn.Module, key: str) -> dict[str, Any]:
    """Return the dictionary of a module that holds its parameter or buffer ``key``.

    Writing to it bypasses the hooks of ``nn.Module`` and permits a plain tensor in place of a parameter.

    Relies on: ``Module._parameters`` and ``Module._buffers``. Since 0.1.
    If they change: layers cannot be read from the files of a source model.
    """
    return module._parameters if key in module._parameters else module._buffers


def set_allocator_settings(settings: str) -> None:
    """Change settings of the allocator of GPU memory, in the form of ``PYTORCH_ALLOC_CONF``.

    Relies on: ``torch._C._accelerator_setAllocatorSettings``. Since 2.11.
    If it changes: jobs on a GPU fail at their start.
    """
    torch._C._accelerator_setAllocatorSettings(settings)


def close_graph_pool(device_index: int, pool: Any) -> None:
    """Stop allocating to the memory pool of a CUDA graph whose capture failed.

    Relies on: ``torch._C._cuda_endAllocateToPool(device, pool)``. Since 2.11. From 2.12 on a failed capture closes its
    pool, and this raises RuntimeError.
    If it changes: in 2.11 every later allocation after a failed capture goes to the pool of that graph.
    """
    torch._C._cuda_endAllocateToPool(device_index, pool)


def pack_int4(nibbles: Tensor) -> Tensor:
    """Pack a matrix of nibbles, int32 [rows, columns], into the layout of ``int4_matmul``.

    Relies on: ``torch._convert_weight_to_int4pack_for_cpu(nibbles, inner_k_tiles)``. Since 2.6.
    If it changes: decode on a CPU in bfloat16 is counted as a fallback, or gives wrong results.
    """
    return torch._convert_weight_to_int4pack_for_cpu(nibbles, 1)


def int4_matmul(x: Tensor, codes: Tensor, group_size: int, grid: Tensor) -> Tensor:
    """Multiply x [T, columns] with the matrix ``scale * (nibble - 8) + midpoint``: [T, rows].

    Relies on: ``torch._weight_int4pack_mm_for_cpu``. Since 2.6.
    If it changes: decode on a CPU in bfloat16 is counted as a fallback, or gives wrong results.

    Args:
        x: bfloat16
        codes: from ``pack_int4``
        group_size: columns that share a scale
        grid: [groups, rows, 2] bfloat16, scales and midpoints
    """
    return torch._weight_int4pack_mm_for_cpu(x, codes, group_size, grid)


def compile_backend(name: str) -> Callable[..., Any]:
    """Return the backend of ``torch.compile`` with this name.

    Relies on: ``torch._dynamo.lookup_backend``. Since 2.0.
    If it changes: compiled decode with a backend other than Inductor falls back to eager layers.
    """
    backend: Callable[..., Any] = torch._dynamo.lookup_backend(name)
    return backend


def dynamo_settings(max_recompilations: int) -> AbstractContextManager[Any]:
    """Return a context in which code compiles up to ``max_recompilations`` times, and sizes of parameters may differ.

    Relies on: ``torch._dynamo.config.patch`` and the settings ``recompile_limit``, ``accumulated_recompile_limit`` and
    ``force_parameter_static_shapes``. Since 2.6.
    If they change: compiled decode falls back to eager layers.
    """
    return torch._dynamo.config.patch(
        recompile_limit=max_recompilations,
        accumulated_recompile_limit=max_recompilations,
        force_parameter_static_shapes=False,
    )


def mark_dynamic(tensor: Tensor, dim: int) -> None:
    """Let compiled code take any size of ``tensor`` along ``dim``, unless the code depends on the size.

    Relies on: ``torch._dynamo.maybe_mark_dynamic``. Since 2.1.
    If it changes: compiled decode falls back to eager layers, or compiles each layer.
    """
    torch._dynamo.maybe_mark_dynamic(tensor, dim)


def compile_with_inductor(
    graph: Any, inputs: Any, options: Mapping[str, Any], decompositions: Mapping[Any, Callable[..., Any]]
) -> Any:
    """Compile a graph that Dynamo traced.

    Relies on: ``torch._inductor.compile_fx.compile_fx`` with ``config_patches`` and ``decompositions``, and
    ``torch._inductor.decomposition.select_decomp_table``. Since 2.1.
    If they change: compiled decode falls back to eager layers.

    Args:
        graph: the traced graph
        inputs: examples of its inputs
        options: of Inductor, such as ``combo_kernels``, by name in ``torch._inductor.config``
        decompositions: by operator, in addition to Inductor's. One returns NotImplemented where it does not apply
    """
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    table: dict[Any, Any] = {**select_decomp_table(), **decompositions}
    return compile_fx(graph, inputs, config_patches=dict(options), decompositions=table)
