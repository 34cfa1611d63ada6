"""Linears that take the same input become one launch, in a graph that torch.compile has traced.

Query, key and value projections of a few tokens are small: a launch each costs more than what it reads. Whatever a
family calls them, they are calls of the same operator with the same first argument.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

LINEARS = "gemq.decode_linears.default"
"""How the operator's overload prints. It is compared by name: without packed modules it is not registered."""

MOST_LINEARS = 3
"""Matrices that one launch takes at most: query, key and value."""


def merge_linears(module: fx.GraphModule) -> int:
    """Puts one ``gemq::decode_linears`` in place of those of one input, width and kind of bias; returns how many
    launches that saves.
    """
    saved = 0
    for nodes in _alike(module.graph):
        for start in range(0, len(nodes), MOST_LINEARS):
            together = nodes[start : start + MOST_LINEARS]
            if len(together) > 1:
                _merge(module.graph, together)
                saved += len(together) - 1
    if saved:
        module.graph.lint()
        module.recompile()
    return saved


def _alike(graph: fx.Graph) -> Iterator[list[Any]]:
    groups: dict[Any, list[Any]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and str(node.target) == LINEARS:
            arguments: Any = node.args
            x, _, _, _, biases, levels, group_size = arguments
            groups.setdefault((_source(x), bool(biases), levels, group_size), []).append(node)
    yield from groups.values()


def _source(x: Any) -> Any:
    """What x is: each call flattens the hidden states for itself."""
    if x.op == "call_method" and x.target == "reshape" and not x.kwargs:
        return x.args
    return x


def _merge(graph: fx.Graph, nodes: list[Any]) -> None:
    first = nodes[0]
    lists = [[tensor for node in nodes for tensor in node.args[i]] for i in range(1, 5)]
    # Buffers and parameters are placeholders: they stand before the first of the calls, as their input does.
    with graph.inserting_after(first):
        merged = graph.call_function(first.target, (first.args[0], *lists, *first.args[5:]))
    begin, place = 0, merged
    for node in nodes:
        end = begin + node.args[1][0].meta["example_value"].shape[0]
        with graph.inserting_after(place):
            place = graph.call_function(operator.getitem, (merged, (slice(None), slice(begin, end))))
        node.replace_all_uses_with(place)
        begin = end
    for node in nodes:
        graph.erase_node(node)
