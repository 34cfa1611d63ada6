"""Fusion of linears with the same input into one launch, in a graph that torch.compile has traced.

Query, key and value projections of a few tokens are small: a launch costs more than reading the weights. Whatever a
family names them, they are calls of the same operator with the same first argument.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

OPERATOR = "gemq.decode_linears.default"
"""String form of the operator's overload. It is compared as a string, since the operator is registered only in
processes with packed modules."""

MAX_LINEARS = 3
"""Matrices of one launch: query, key and value."""


def merge_linears(module: fx.GraphModule) -> int:
    """Replace calls of ``gemq::decode_linears`` with the same input and width by one call for all.

    Returns:
        The number of launches saved.
    """
    saved = 0
    for nodes in _fusible_calls(module.graph):
        for start in range(0, len(nodes), MAX_LINEARS):
            merged_nodes = nodes[start : start + MAX_LINEARS]
            if len(merged_nodes) > 1:
                _merge(module.graph, merged_nodes)
                saved += len(merged_nodes) - 1
    if saved:
        module.graph.lint()
        module.recompile()
    return saved


def _fusible_calls(graph: fx.Graph) -> list[list[fx.Node]]:
    """Return the calls of the operator, grouped by input, width, group size and presence of a bias."""
    groups: dict[Any, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and str(node.target) == OPERATOR:
            x, _, _, _, biases, levels, group_size = node.args
            key = (_input_source(x), bool(biases), levels, group_size)
            groups.setdefault(key, []).append(node)
    return list(groups.values())


def _input_source(x: fx.Node) -> Any:
    """Return what identifies the input. Each call flattens the hidden states by a reshape of its own."""
    if x.op == "call_method" and x.target == "reshape" and not x.kwargs:
        return x.args
    return x


def _merge(graph: fx.Graph, nodes: list[Any]) -> None:
    """Replace several calls by one, and each call's result by a slice of the merged result."""
    x, _, _, _, _, levels, group_size = nodes[0].args
    tensor_lists = []
    for argument in range(1, 5):  # codes, scales, offsets, biases
        tensor_lists.append([tensor for node in nodes for tensor in node.args[argument]])
    # Buffers and parameters are placeholders, which come before the first of the calls, as their input does.
    with graph.inserting_after(nodes[0]):
        merged = graph.call_function(nodes[0].target, (x, *tensor_lists, levels, group_size))
    start, previous = 0, merged
    for node in nodes:
        rows = node.args[1][0].meta["example_value"].shape[0]
        columns = slice(start, start + rows)
        with graph.inserting_after(previous):
            previous = graph.call_function(operator.getitem, (merged, (slice(None), columns)))
        node.replace_all_uses_with(previous)
        start += rows
    for node in nodes:
        graph.erase_node(node)
