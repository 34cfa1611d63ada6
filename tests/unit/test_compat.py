"""The private interfaces of PyTorch still are as ``gemq.runtime.compat`` relies on, and gemq uses no others.

A failure here after an upgrade names the function to correct, and says what breaks without it.
"""

from __future__ import annotations

import ast
import inspect
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gemq.kernels.modules import PackedExperts
from gemq.runtime.compat import torch_private
from support.compat_checks import check_complete, relies_on

for_torch = partial(relies_on, torch_private)
torch.set_num_threads(1)
SOURCES = Path(torch_private.__file__).parents[2]


class RecordingTensor(Tensor):
    """Counts the calls of its ``__torch_function__``."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        RecordingTensor.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


@for_torch("disabled_torch_function")
def test_operations_on_a_subclass_return_plain_tensors() -> None:
    plain = type("Plain", (Tensor,), {"__torch_function__": torch_private.disabled_torch_function})
    x = torch.ones(2).as_subclass(plain)
    assert type(x) is plain
    assert type(x + 1) is Tensor
    assert type(x.detach()) is Tensor
    assert torch_private.disabled_torch_function is nn.Parameter.__torch_function__


@for_torch("without_torch_function")
def test_a_subclass_is_a_plain_tensor_inside_the_context() -> None:
    x = torch.ones(2).as_subclass(RecordingTensor)
    RecordingTensor.calls = 0
    with torch_private.without_torch_function():
        assert torch.equal(x + 1, torch.full((2,), 2.0))
    assert RecordingTensor.calls == 0
    x + 1
    assert RecordingTensor.calls > 0


@for_torch("map_instances")
def test_only_instances_in_nested_values_are_mapped() -> None:
    tree = ((torch.ones(1), 2), {"a": [torch.zeros(1), "b", None]})
    (first, number), named = torch_private.map_instances(Tensor, lambda x: x + 1, tree)
    assert (first.item(), number, named["a"][0].item(), named["a"][1:]) == (2.0, 2, 1.0, ["b", None])


@for_torch("write_count")
def test_writes_to_a_tensor_and_its_views_are_counted() -> None:
    x = torch.zeros(4)
    counts = [torch_private.write_count(x)]
    for write in (lambda: x.add_(1), lambda: x[:2].fill_(3), lambda: x.copy_(torch.ones(4))):
        write()
        counts.append(torch_private.write_count(x))
    assert counts == sorted(set(counts))
    x.sum()
    assert torch_private.write_count(x) == counts[-1]
    with torch.inference_mode():
        inference = torch.zeros(1)
    with pytest.raises(RuntimeError):
        torch_private.write_count(inference)


@for_torch("tensor_dict")
def test_tensors_of_a_module_can_be_replaced_in_its_dictionaries() -> None:
    module = nn.BatchNorm1d(3)
    plain = torch.full((3,), 2.0)
    torch_private.tensor_dict(module, "weight")["weight"] = plain
    torch_private.tensor_dict(module, "running_mean")["running_mean"] = plain
    assert module.weight is plain
    assert module.running_mean is plain
    assert dict(module.named_buffers())["running_mean"] is plain
    assert "weight" in module.state_dict()
    assert not torch_private.tensor_dict(module, "weight").keys() & {"running_mean"}


@for_torch("set_allocator_settings")
def test_the_allocator_takes_expandable_segments() -> None:
    torch_private.set_allocator_settings("expandable_segments:False")


@for_torch("close_graph_pool")
def test_the_pool_of_a_graph_is_closed_by_device_and_id() -> None:
    """A call needs a GPU: see tests/gpu/test_capture_failure.py."""
    declarations = ast.parse((Path(torch.__file__).parent / "_C/__init__.pyi").read_text())
    functions = {node.name: node for node in declarations.body if isinstance(node, ast.FunctionDef)}
    arguments = [argument.arg for argument in functions["_cuda_endAllocateToPool"].args.args]
    assert arguments == ["device", "mempool_id"]


@for_torch("pack_int4")
@for_torch("int4_matmul")
def test_a_product_with_nibbles_is_that_of_their_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    rows, columns, group_size = 32, 64, 32
    nibbles = torch.randint(0, 16, (rows, columns), dtype=torch.int32, generator=generator)
    grid = torch.rand(columns // group_size, rows, 2, generator=generator).bfloat16()
    scales, midpoints = grid.float().repeat_interleave(group_size, 0).permute(2, 1, 0)
    weights = (nibbles - 8) * scales + midpoints
    x = torch.randn(3, columns, generator=generator).bfloat16()
    y = torch_private.int4_matmul(x, torch_private.pack_int4(nibbles), group_size, grid)
    assert y.dtype == torch.bfloat16
    expected = x.float() @ weights.T
    assert (y - expected).norm() < 0.01 * expected.norm()


@for_torch("compile_backend")
def test_a_backend_is_returned_by_name() -> None:
    graph = torch.fx.symbolic_trace(lambda x: x + 1)
    compiled = torch_private.compile_backend("eager")(graph, [torch.zeros(1)])
    assert compiled(torch.zeros(1)).item() == 1


@for_torch("dynamo_settings")
def test_settings_of_dynamo_hold_inside_the_context() -> None:
    config = torch._dynamo.config
    names = ("recompile_limit", "accumulated_recompile_limit", "force_parameter_static_shapes")
    values = [getattr(config, name) for name in names]
    with torch_private.dynamo_settings(12_345):
        assert [getattr(config, name) for name in names] == [12_345, 12_345, False]
    assert [getattr(config, name) for name in names] == values


@for_torch("mark_dynamic")
def test_marked_sizes_share_one_compilation() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda x: x * 2, backend=backend, fullgraph=True, dynamic=False)
    for size in (5, 6, 7):
        x = torch.ones(size)
        torch_private.mark_dynamic(x, 0)
        assert torch.equal(compiled(x), torch.full((size,), 2.0))
    assert len(graphs) == 1


@for_torch("compile_with_inductor")
def test_inductor_takes_options_and_decompositions() -> None:
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    assert hasattr(config, "combo_kernels")
    assert {"config_patches", "decompositions"} <= inspect.signature(compile_fx).parameters.keys()
    if shutil.which("g++") is None:
        pytest.skip("Inductor needs a compiler")
    shapes = []

    def decompose(a: Tensor, b: Tensor) -> Any:
        shapes.append((tuple(a.shape), tuple(b.shape)))
        return (a.unsqueeze(2) * b.unsqueeze(0)).sum(1) if len(shapes) == 1 else NotImplemented

    def backend(graph: Any, inputs: Any) -> Any:
        options = {"combo_kernels": True}
        return torch_private.compile_with_inductor(graph, inputs, options, {torch.ops.aten.mm.default: decompose})

    x = torch.randn(3, 4)
    compiled = torch.compile(lambda x: (x @ x.T) @ x, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), (x @ x.T) @ x)
    assert ((3, 4), (4, 3)) in shapes
    assert ((3, 3), (3, 4)) in shapes


def test_packed_experts_save_and_load_by_the_hooks_of_modules() -> None:
    for name in ("_save_to_state_dict", "_load_from_state_dict"):
        parameters = [list(inspect.signature(getattr(c, name)).parameters) for c in (PackedExperts, nn.Module)]
        assert parameters[0] == parameters[1], f"correct PackedExperts.{name} in src/gemq/kernels/modules.py"


def test_every_function_has_a_test() -> None:
    check_complete(torch_private)


ALLOWED = {
    *("_fields", "_asdict"),  # documented, of NamedTuple
    "_exit",  # documented, of os
}
"""Names with an underscore that may be used outside of ``gemq.runtime.compat`` though gemq does not define them."""

PRIVATE_MODULES = ("transformers.core_model_loading", "transformers.integrations.moe", "transformers.quantizers.auto")
"""Undocumented modules, besides those with an underscore in their names."""


def _private_names(tree: ast.Module) -> Iterator[tuple[int, str, bool]]:
    """Line and name of each private attribute and module that a file uses, and whether it is one of ``self``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            yield node.lineno, node.attr, ast.unparse(node.value) in ("self", "cls", "super()")
        elif isinstance(node, ast.ImportFrom) and node.module:
            components = node.module.split(".")
            is_private = node.module in PRIVATE_MODULES or any(
                component.startswith("_") for component in components[1:]
            )
            if components[0] in ("torch", "transformers") and is_private:
                yield node.lineno, node.module, False


def _defined_names(tree: ast.Module) -> set[str]:
    """Names of functions, classes, variables and attributes of ``self`` that a file defines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    return names


def test_private_interfaces_are_used_in_compat_only() -> None:
    trees = {path: ast.parse(path.read_text()) for path in SOURCES.rglob("*.py")}
    in_compat = [trees.pop(path) for path in list(trees) if path.parent.name == "compat"]
    private = {name for tree in in_compat for _, name, _ in _private_names(tree)}
    public = ALLOWED.union(*map(_defined_names, trees.values()))
    uses = []
    for path, tree in trees.items():
        for line, name, is_of_self in _private_names(tree):
            if name not in public or (name in private and not is_of_self):
                uses.append(f"{path.relative_to(SOURCES)}:{line} {name}")
    assert not uses, f"move these to gemq/runtime/compat: {uses}"
