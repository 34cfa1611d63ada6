"""Where things wait: on the device, in host memory, in files. And layers read one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from gemq import UserError
from gemq.layers.candidate_training import TRAIN_BYTES
from gemq.models.layer_cache import LayerCache
from gemq.models.replay import Replay
from gemq.models.source import Source
from gemq.models.structure import find_structure
from gemq.pipeline import scores_stage
from gemq.pipeline.scores_stage import reverse_order, segment_length
from gemq.pipeline.stage_costs import Footprint
from gemq.recipe import Recipe
from gemq.runtime.activation_store import ActivationStore, HiddenStates
from gemq.runtime.memory import ByteLimit, MemoryBudget, MemoryTier, OffloadedTensors, gigabytes
from support.families import FAMILIES, random_model, tiny_config, tokens

torch.set_num_threads(1)
CPU = torch.device("cpu")


def memory(device: int, host: int, directory: Path | None) -> MemoryBudget:
    """Bounds as on a GPU, the CPU standing for it."""
    return MemoryBudget(CPU, ByteLimit(device), ByteLimit(host), directory)


def ramp(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


# ActivationStore


def test_tensors_wait_where_there_is_room_and_come_back_the_same(tmp_path):
    m = memory(40, 64, tmp_path)
    tensors = [ramp(10), ramp(2, 5) + 1, ramp(10).to(torch.int64), ramp(3)]
    batches = ActivationStore(m, tensors)
    assert [entry._tensor.location for entry in batches._entries] == [
        MemoryTier.DEVICE,
        MemoryTier.HOST,
        MemoryTier.DISK,
        MemoryTier.DISK,
    ]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(batches, tensors, strict=True))
    assert m.spilled == {MemoryTier.HOST: 40, MemoryTier.DISK: 92}
    for i in range(4):
        batches[i] = tensors[i] * 2
        assert torch.equal(batches[i], tensors[i] * 2)
    copied = batches.copy()
    batches[1] = torch.zeros(2, 5)
    assert torch.equal(copied[1], tensors[1] * 2)
    batches[2].zero_()  # what is given out is not what is kept
    assert torch.equal(batches[2], tensors[2] * 2)
    batches.clear()
    del copied
    assert (m.on_device.used, m.host.used) == (0, 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("room", [1000, 0])
def test_extra_outputs_are_stored_with_hidden_states(room, tmp_path):
    positions = torch.tensor([1, 2])
    states = HiddenStates.with_extras(ramp(2, 3), {1: positions, 2: "word"})
    batches = ActivationStore(memory(room, 0, tmp_path), [states])
    for _ in range(2):
        loaded = batches[0]
        assert torch.equal(loaded, ramp(2, 3))
        assert torch.equal(loaded.extras[1], positions)
        assert loaded.extras[2] == "word"
        batches[0] = HiddenStates.with_extras(loaded + 0, loaded.extras)


def test_without_a_directory_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="give more with --host-memory"):
        ActivationStore(memory(10, 10, None), [ramp(10)])


@pytest.mark.parametrize(("device", "host"), [(10**6, 0), (0, 10**6), (0, 0)])
def test_an_optimizers_state_waits_with_its_parameters(device, host, tmp_path):
    """The same numbers wherever they wait."""
    fixed, parameter = ramp(4) + 1, torch.zeros(4, requires_grad=True)
    expected = torch.zeros(4, requires_grad=True)
    optimizers = [torch.optim.AdamW([p], lr=0.1) for p in (parameter, expected)]

    def tensors() -> tuple[list[Tensor], list[Tensor]]:
        return [fixed], [parameter, *(t for state in optimizers[0].state.values() for t in state.values())]

    m = memory(device, host, tmp_path)
    waiting = OffloadedTensors(m, tensors, 40)
    for _ in range(3):
        waiting.load()
        parameter.grad, expected.grad = fixed.clone(), ramp(4) + 1
        for optimizer in optimizers:
            optimizer.step()
        parameter.grad = None
        waiting.offload(changed=True)
    waiting.load()
    assert torch.equal(parameter, expected)
    waiting.close()
    assert (m.on_device.used, m.host.used) == (0, 0)
    assert not list(tmp_path.iterdir())


def test_sizes_are_rounded_up_to_what_would_do():
    assert gigabytes(20_000_000_001) == "20.01GB"
    assert gigabytes(5) == "0.01MB"


# Layers


def source_of(family: str, directory: Path) -> Source:
    random_model(tiny_config(family)).save_pretrained(directory)
    return Source(directory)


@pytest.mark.sample
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_read_alone_are_those_of_the_whole_model(family, tmp_path):
    source = source_of(family, tmp_path)
    full_model, stored = source.load(CPU, torch.float32)
    model, reader = source.open(CPU, torch.float32)
    assert {name: reader.types[name] for name in stored} == stored
    layer_cache = LayerCache(model, find_structure(model), reader, MemoryBudget.unlimited(CPU), torch.float32)
    with layer_cache.all_layers():
        state = model.state_dict()
        assert state.keys() == full_model.state_dict().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in full_model.state_dict().items())
        buffers = dict(model.named_buffers())
        assert all(torch.equal(buffers[name], tensor) for name, tensor in full_model.named_buffers())
    layer_cache.close()


def test_rest_of_a_layer_is_read_without_what_is_packed(tmp_path):
    model, reader = source_of("gpt_oss", tmp_path).open(CPU, torch.float32)
    layer = find_structure(model).layers[0]
    packed = {f"{layer.experts.path}.{m.name}" for m in layer.experts.matrices} | {
        f"{x.path}.weight" for x in layer.linears
    }
    unpacked = reader.read(0, packed)
    assert unpacked.keys() == reader.names_by_layer[0] - packed
    assert all(torch.equal(t, reader.read(0)[n]) for n, t in unpacked.items())


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
def test_a_layer_may_be_put_together_on_its_device(family, tmp_path):
    _, reader = source_of(family, tmp_path).open(CPU, torch.float32)
    assert reader.has_uniform_type
    last = len(reader.names_by_layer) - 1
    for index in (last, last, last - 1):  # put together, and from then on read into place
        on_host, on_device = reader.read(index), reader.read_to_device(CPU, index)
        assert on_host.keys() == on_device.keys()
        assert all(torch.equal(tensor, on_device[name]) for name, tensor in on_host.items())
        assert reader.knows_layout(index)
    _, reader = source_of(family, tmp_path).open(CPU, torch.float32)
    reader.learn_layout(last, reader.read(last))  # where memory had no room for its parts
    assert reader.knows_layout(last)
    assert all(
        torch.equal(tensor, reader.read(last)[name]) for name, tensor in reader.read_to_device(CPU, last).items()
    )


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss", "nemotron_h"])
def test_two_layers_at_a_time_compute_what_all_do(family, tmp_path):
    """Also verified: layers of a kind stand in for each other, so that few are read."""
    source, ids = source_of(family, tmp_path), tokens(2, 12)
    expected = source.load(CPU, torch.float32)[0](ids, use_cache=False).logits
    model, reader = source.open(CPU, torch.float32)
    structure = find_structure(model)
    free = LayerCache(model, structure, reader, MemoryBudget.unlimited(CPU), torch.float32)
    bound = ByteLimit(free.least_bytes)
    m = MemoryBudget(CPU, bound, bound)
    model, reader = source.open(CPU, torch.float32)
    layer_cache = LayerCache(model, structure, reader, m, torch.float32)
    assert not layer_cache.all_layers_fit()
    replay = Replay(model, structure, layer_cache)
    with layer_cache.with_one_layer_per_kind():
        replay._verify(ids)
    for _ in range(2):
        with torch.no_grad():
            hidden, calls = replay.inputs(ids)
            for index in replay.walk(range(len(calls))):
                hidden = replay.run(index, hidden, calls[index])
            assert torch.equal(replay.logits(ids, hidden), expected)
    assert bound.used == bound.limit


def test_layers_are_evicted_only_for_what_then_fits(tmp_path):
    """Otherwise what goes to host memory anyway would cost reading every layer again."""
    model, reader = source_of("olmoe", tmp_path).open(CPU, torch.float32)
    structure = find_structure(model)
    bound = ByteLimit(10**9)
    m = MemoryBudget(CPU, bound, bound)
    layer_cache = LayerCache(model, structure, reader, m, torch.float32)
    with layer_cache.all_layers():
        cached_bytes = layer_cache.evictable_bytes()
    assert cached_bytes > 0
    assert not m.try_reserve(m.max_device_bytes + 1)
    assert layer_cache.evictable_bytes() == cached_bytes
    assert m.try_reserve(m.max_device_bytes)
    assert (layer_cache.evictable_bytes(), bound.available) == (0, 0)


def test_a_changed_layer_is_read_anew(tmp_path):
    model, reader = source_of("olmoe", tmp_path).open(CPU, torch.float32)
    structure = find_structure(model)
    replay = Replay(model, structure, LayerCache(model, structure, reader, MemoryBudget.unlimited(CPU), torch.float32))
    ids = tokens()
    with torch.no_grad():
        hidden, calls = replay.inputs(ids)
        output = replay.run(1, hidden, calls[1])
        name = f"{structure.layers[1].linears[0].path}.weight"
        model.get_parameter(name).zero_()
        assert not torch.equal(replay.run(1, hidden, calls[1]), output)
        replay.restore(1)
        assert torch.equal(replay.run(1, hidden, calls[1]), output)


# The reverse pass


@pytest.mark.parametrize("layers", [1, 2, 5, 16])
def test_every_layer_goes_backward_once_after_its_input_is_there(layers):
    for k in range(1, layers + 1):
        last = (layers - 1) // k * k
        available_inputs = {i for i in range(layers) if i % k == 0 or i > last}
        done = []
        for index, backward in reverse_order(layers, k):
            assert index in available_inputs
            if backward:
                done.append(index)
            else:
                available_inputs.add(index + 1)
        assert done == list(reversed(range(layers)))


def test_as_few_layers_as_possible_are_computed_again():
    assert segment_length(16, 10, 10**6) == 1
    assert segment_length(16, 10, 180) == 1
    assert segment_length(16, 10, 170) == 2
    assert segment_length(16, 10, 90) == 4
    assert segment_length(16, 10, 0) == 4  # 4 + 3 + 2: the least there is


def test_scores_are_the_same_bytes_however_many_are_computed_again(tmp_path, monkeypatch):
    import gemq
    from gemq.assets import builtin_texts
    from gemq.recipe import Recipe

    source = tmp_path / "model"
    source_of("deepseek_v2", source)
    from support.tokenizer import save_tokenizer

    save_tokenizer(source)
    recipe = Recipe(
        effort="low",
        num_windows=4,
        seq_len=24,
        micro_batch_tokens=48,
        calibration=(str(builtin_texts()[0]),),
        guard=False,
    )
    scores: list[Any] = []
    for k in (1, 2, 3):
        monkeypatch.setattr(scores_stage, "segment_length", lambda *_, k=k: k)
        work = tmp_path / f"out{k}.work"
        gemq.quantize(str(source), recipe, out=tmp_path / f"out{k}", work=work, device="cpu")
        scores.append({f.name: f.read_bytes() for f in sorted(work.glob("scores-*/*.safetensors"))})
    assert scores[0]
    assert scores[0] == scores[1] == scores[2]


def test_fewer_experts_are_trained_at_once_where_memory_is_short():
    """What all trained at once would take is never the least that a job takes."""
    config = OlmoeConfig(num_hidden_layers=1, intermediate_size=1024)  # the sizes of OLMoE-1B-7B
    with torch.device("meta"):
        structure = find_structure(OlmoeForCausalLM(config))
    footprint = Footprint(structure, Recipe(codes="affine"), config, torch.bfloat16, torch.device("cuda"))
    min_bytes = footprint.min_working_bytes
    rooms = [footprint.training_bytes(left) for left in (1 << 40, 10_000_000_000, min_bytes, 0)]
    assert rooms[0] == TRAIN_BYTES[0] > rooms[2] >= rooms[3] == TRAIN_BYTES[-1]
    assert rooms == sorted(rooms, reverse=True)
    assert footprint.working_bytes(rooms[1]) <= 10_000_000_000
    assert footprint.working_bytes(rooms[2]) == min_bytes < footprint.working_bytes(rooms[0])
