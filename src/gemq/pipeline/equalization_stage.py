"""Equalization: finds how the channels of each kind of layer can be scaled, before any layer is used.

The result is stored, so that every job on a work directory scales layers alike. ``models.equalization`` then scales
each layer when it is loaded.
"""

from __future__ import annotations

from typing import Any

import torch

from gemq.models.equalization import fold_from_dict, fold_to_dict
from gemq.models.fold_search import find_folds
from gemq.models.layer_cache import LayerCache
from gemq.models.replay import Replay
from gemq.pipeline.context import Job
from gemq.pipeline.workdir import FOLDS_FILE

EQUALIZATION = "equalization"
"""Directory of the stage."""


def run_equalization(job: Job, replay: Replay, layer_cache: LayerCache, probe: torch.Tensor) -> None:
    """Finds the folds of all layers, which are equalized from now on when they are loaded.

    Args:
        job: the job.
        replay: the full-precision model.
        layer_cache: of the model.
        probe: token ids [B, S] to try folds on.
    """
    if not job.recipe.equalize:
        return
    stage = job.work.stage(EQUALIZATION, {"model": job.fingerprint})
    if not stage.has(FOLDS_FILE):
        with layer_cache.with_one_layer_per_kind():
            stage.save_json(FOLDS_FILE, replay.ranks.run_on_first(lambda: _find(replay, layer_cache, probe)))
    stored_folds: dict[str, Any] = stage.load_json(FOLDS_FILE)
    for index, kind in enumerate(stored_folds["first_of_kind"]):
        layer = stored_folds["layers"][str(kind)]
        layer_cache.equalization.set_folds(index, [fold_from_dict(fold) for fold in layer["folds"]])
        job.count_fallback("inputs_not_equalized", layer["not_equalized"])


def _find(replay: Replay, layer_cache: LayerCache, probe: torch.Tensor) -> dict[str, Any]:
    """The folds of the first layer of each kind, and for each layer the first layer of its kind, as plain values."""
    first_of_kind = layer_cache.first_of_kind()
    layers = {}
    for index, layer in find_folds(replay, first_of_kind, probe, layer_cache.reader.types).items():
        folds = [fold_to_dict(fold) for fold in layer.folds]
        layers[str(index)] = {"folds": folds, "not_equalized": layer.not_equalized}
    return {"first_of_kind": first_of_kind, "layers": layers}
