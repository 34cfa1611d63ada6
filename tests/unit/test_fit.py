"""Does a packed model fit? Counted bytes against those of real tensors, and what the command line answers."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import DynamicCache

from gemq.assets import builtin_model
from gemq.cli.fit_table import print_fit
from gemq.models.auto_class import auto_class
from gemq.models.cache_names import cache_argument
from gemq.models.cache_size import cache_size
from gemq.models.structure import find_structure
from gemq.pipeline.codes_stage import expected_recipe
from gemq.pipeline.fit import fit, fitting_recipe
from gemq.pipeline.preflight import check_allocation
from gemq.planning.serving_memory import ServingMemory
from gemq.quant.widths import TrellisWidth, Width
from gemq.recipe import Recipe
from shapes import SHAPES, packed_model
from support.cli import gemq
from support.families import TOY, random_model, tiny_config, tokens

CPU = torch.device("cpu")

TINY = replace(SHAPES["small-2.0"], changes={**SHAPES["small-2.0"].changes, "num_hidden_layers": 2})


def on_meta(config: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    with torch.device("meta"):
        return auto_class(config).from_config(config, dtype=dtype).eval()


def serving(gpus: int = 1, codes: str = "affine") -> ServingMemory:
    model = on_meta(TINY.dense_config())
    return ServingMemory(model, find_structure(model), Recipe(widths=(1, 2, 3, 4), codes=codes), gpus)


def cached_bytes(cache: Any) -> int:
    total = 0
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in value.values() if isinstance(value, dict) else [value]:
                total += tensor.nbytes if isinstance(tensor, torch.Tensor) else 0
    return total


@pytest.mark.sample
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "gpt_oss", "lfm2_moe"])
def test_the_cache_has_the_bytes_that_the_model_fills(family):
    """Grouped heads, latents, windows of 5 tokens, and states of convolutions."""
    config = tiny_config(family)
    model = random_model(config)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=tokens(1, 70), use_cache=True, **cache_argument(model, cache))
    skeleton = on_meta(config, torch.float32)
    size = cache_size(skeleton, find_structure(skeleton), torch.float32)
    assert size.estimated_layers == 0
    assert size.sequence_bytes(70) == pytest.approx(cached_bytes(cache), abs=64)
    assert size.windowed_layers == (1 if family == "gpt_oss" else 0)


def test_a_cache_that_cannot_be_measured_is_counted_as_such():
    skeleton = on_meta(tiny_config(TOY))
    skeleton.config.num_hidden_layers = skeleton.config.layers
    size = cache_size(skeleton, find_structure(skeleton), torch.bfloat16)
    assert size.estimated_layers == 3
    assert size.sequence_bytes(10) == 3 * 2 * 10 * 64 * 2


def test_gpus_share_heads_until_each_has_one():
    skeleton = on_meta(tiny_config("mixtral"))  # two heads of keys
    structure = find_structure(skeleton)
    single, double, quadruple = (
        cache_size(skeleton, structure, torch.bfloat16, gpus).sequence_bytes(100) for gpus in (1, 2, 4)
    )
    assert single == 2 * double == 2 * quadruple


def stored_bytes(model: Any) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def test_weights_have_the_bytes_of_a_packed_model():
    with_trellis = packed_model(replace(TINY, mix={TrellisWidth(16): 1}), "cpu")
    assert serving(codes="trellis").weight_bytes(2.0) == stored_bytes(with_trellis)
    stored = stored_bytes(packed_model(replace(TINY, mix={Width.TWO_BIT: 1}), "cpu"))
    assert serving().weight_bytes(2.0) == stored
    halves = 2 * serving(gpus=2).weight_bytes(2.0)
    assert stored < halves < 1.1 * stored  # norms and routers are on both


def test_the_largest_budget_is_the_last_that_fits():
    forecast = serving()
    memory = forecast.total_bytes(2.5, 2048, 1)
    bits = forecast.largest_bits(memory, 2048, 1)
    assert bits == 2.5
    assert forecast.total_bytes(bits + 0.01, 2048, 1) > memory
    context = forecast.longest_fitting_context(2.4, memory, 1)
    assert 2048 < context < 4096
    assert forecast.total_bytes(2.4, context, 1) <= memory < forecast.total_bytes(2.4, context + 1, 1)
    assert forecast.total_bytes(2.4, 512, 8) > forecast.total_bytes(2.4, 512, 1)


def test_rows_of_a_fit_lie_within_the_candidate_widths():
    model = on_meta(TINY.dense_config())
    largest = fit(model, find_structure(model), Recipe(widths=(2, 3)), 10**10, context=128)
    assert [row.bits for row in largest.rows] == [2.0, 2.5, 3.0]
    assert largest.bits == 3.0
    assert all(row.context == largest.longest_context for row in largest.rows)


def test_quantize_takes_the_budget_that_plan_names():
    planned = gemq("plan", builtin_model(), "--memory", "1GB", "--context", 512, "--device", "cpu", "--json", "-").json
    assert planned["bits"] == planned["fit"]["bits"] == 4.0
    assert planned["fit"]["context"] == 512
    memory = next(row["total_bytes"] for row in planned["fit"]["rows"] if row["bits"] == 2.5)
    assert fitting_recipe(builtin_model(), Recipe(), memory, CPU, context=512).stored_bits == 2.625


def test_a_budget_that_fits_with_trellis_codes_fits_with_affine_codes_too():
    """A GPU job may find that inputs of experts cannot be equalized, and then takes affine codes."""
    model = on_meta(TINY.dense_config())
    structure = find_structure(model)
    memory = serving().total_bytes(2.0, 512, 1)
    expected = expected_recipe(Recipe(), torch.device("cuda"), structure)
    largest = fit(model, structure, expected, memory, context=512)
    assert expected.codes == "trellis"
    assert largest.bits > 2.0
    budget = Recipe(stored_bits=largest.stored_bits, codes="affine")
    allocation = check_allocation(structure, budget, 0, None, reconstruct=False)
    assert allocation.nominal_bits <= 2.0
    assert serving().total_bytes(allocation.nominal_bits, 512, 1) <= memory + 1000  # four decimals


def test_the_table_says_what_fits_and_what_windows_save():
    model = on_meta(tiny_config("gpt_oss", sliding_window=64))
    console = Console(file=io.StringIO(), width=200)
    print_fit(console, fit(model, find_structure(model), Recipe(), 10**9, context=256))
    printed = console.file.getvalue()
    assert "Largest budget that fits: 4 bits, that of the widest candidates." in printed
    assert "Layers whose cache keeps a window of tokens: 1." in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("plan", "--memory", "10MB"), ("no budget fits into 10MB", "give at least --memory")),
        (("plan", "--memory", "lots"), ("--memory", "is not a size")),
        (("plan", "--memory", "1GB", "--context", "5000"), ("--context 5000", "give at most 1024")),
        (("plan", "--memory", "1GB", "--gpus", "0"), ("--gpus", "at least 1")),
        (("plan", "--context", "100"), ("add --memory",)),
        (("quantize", "--fit", "10MB", "-o", "out"), ("give at least --fit",)),
        (("quantize", "--fit", "1GB", "--bits", "2", "-o", "out"), ("--fit chooses the budget",)),
    ],
)
def test_what_does_not_fit_gets_one_line(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, *flags = arguments
    ran = gemq(command, builtin_model(), *flags)
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    assert all(word in ran.err for word in words), ran.err
    assert not list(tmp_path.iterdir())
