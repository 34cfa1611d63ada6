"""A model as a job sees it: its layers read from files and equalized."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch

from gemq.models.equalization import scale_
from gemq.models.experts_adapter import adopt_experts
from gemq.models.fold_search import LayerFolds, find_folds
from gemq.models.layer_cache import LayerCache
from gemq.models.replay import Replay
from gemq.models.source import Source
from gemq.models.structure import find_structure
from gemq.runtime.memory import MemoryBudget

CPU = torch.device("cpu")


@contextmanager
def equalized_model(folder: Path, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Any, list[LayerFolds]]]:
    """Yields a model of a folder with all of its layers, equalized, and the folds of each layer."""
    model, reader = Source(folder).open(CPU, dtype)
    structure = find_structure(model)
    cache = LayerCache(model, structure, reader, MemoryBudget.unlimited(CPU), dtype)
    with closing(cache):
        replay = Replay(model, structure, cache)
        with cache.with_one_layer_per_kind():
            ids = torch.arange(16).unsqueeze(0)
            first_of_kind = cache.first_of_kind()
            folds_by_kind = find_folds(replay, first_of_kind, ids, reader.types)
        folds_by_layer = [folds_by_kind[first] for first in first_of_kind]
        for index, layer_folds in enumerate(folds_by_layer):
            cache.equalization.set_folds(index, layer_folds.folds)
        with cache.all_layers():
            yield model, folds_by_layer


@torch.no_grad()
def rescaled(model: Any, folds_by_layer: list[LayerFolds], seed: int = 0, largest: int = 9) -> Any:
    """A copy of a model whose channels are multiplied by random powers of two. It computes the same function."""
    variant = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    adopted = copy.deepcopy(model)
    adopt_experts(adopted)
    for layer, layer_folds in zip(find_structure(adopted).layers, folds_by_layer, strict=True):
        tensors = {}
        for name, parameter in adopted.get_submodule(layer.path).named_parameters():
            tensor = variant.get_parameter(f"{layer.path}.{name}").data
            tensors[name] = tensor[: len(parameter)]  # families may have experts that do nothing at the end
        for fold in layer_folds.folds:
            if getattr(fold, "one_plus", False):
                continue  # stored types cannot represent other weights of these norms
            scale_(fold.scalings(_draw(fold.choose(tensors).shape, generator, largest)), tensors)
    return variant


def _draw(shape: torch.Size, generator: torch.Generator, largest: int) -> torch.Tensor:
    """Exponents from 0 to ``largest``, three quarters of them 0."""
    exponents = torch.randint(0, largest + 1, shape, generator=generator)
    return (exponents * (torch.rand(shape, generator=generator) < 0.25)).to(torch.int8)
