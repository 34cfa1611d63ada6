"""Replaying a model layer by layer: equal to its own forward and backward, or refused."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from gemq import UserError
from gemq.models.replay import Replay
from gemq.models.structure import find_structure
from support.families import FAMILIES, TOY, ToyLayer, ToyModel, tiny, tokens

torch.set_num_threads(1)


def replayed(replay: Replay, ids: Tensor) -> Tensor:
    hidden, calls = replay.inputs(ids)
    for i, call in enumerate(calls):
        hidden = replay.run(i, hidden, call)
    return replay.logits(ids, hidden)


@pytest.mark.sample
@pytest.mark.parametrize("family", [*FAMILIES, TOY])
def test_logits_equal_the_models_own(family):
    """The same operations on the same numbers: equal to the bit."""
    model = tiny(family)
    replay = Replay(model, find_structure(model))
    replay.verify(tokens(2, 16))
    for windows, length in ((1, 1), (3, 12), (2, 20)):
        ids = tokens(windows, length)
        with torch.no_grad():
            assert torch.equal(replayed(replay, ids), model(ids, use_cache=False).logits)


def test_logits_in_bfloat16():
    model = tiny("qwen2_moe", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(replayed(Replay(model, find_structure(model)), tokens()), model(tokens()).logits)


@pytest.mark.sample
def test_layers_differ_in_their_calls():
    """gpt_oss alternates sliding and full attention: masks differ between layers and stay in their place."""
    model = tiny("gpt_oss")
    replay = Replay(model, find_structure(model))
    _, calls = replay.inputs(tokens(2, 12))
    assert [x.self_attn.sliding_window for x in replay.layers] == [5, None]
    masks = [call.kwargs["attention_mask"] for call in calls]
    assert not torch.equal(*masks)


def test_masks_are_kept_once():
    model = tiny("olmoe")
    replay = Replay(model, find_structure(model))
    _, first = replay.inputs(tokens(2, 12))
    _, second = replay.inputs(tokens(2, 12, seed=5))
    seen_ids = {id(x) for call in first for x in tensors_of(call.kwargs)}
    assert {id(x) for call in second for x in tensors_of(call.kwargs)} <= seen_ids


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [t for item in items for t in tensors_of(item)]


@pytest.mark.parametrize("family", [*FAMILIES, TOY])
def test_gradients_equal_whole_model_autograd(family):
    """At the inputs of every layer, from a random direction at the logits."""
    model = tiny(family)
    replay = Replay(model, find_structure(model))
    ids = tokens(2, 10)
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = (args[0] if args else kwargs["hidden_states"]).requires_grad_()
        seen.append(hidden)
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    handles = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in replay.layers]
    logits = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    expected = torch.autograd.grad((logits * direction).sum(), seen)

    hidden, calls = replay.inputs(ids)
    states = [hidden]
    for i, call in enumerate(calls):
        states.append(replay.run(i, states[-1], call).detach())
    leaf = states.pop().requires_grad_()
    (gradient,) = torch.autograd.grad((replay.logits(ids, leaf) * direction).sum(), leaf)
    for i in reversed(range(len(calls))):
        leaf = states.pop().requires_grad_()
        (gradient,) = torch.autograd.grad(replay.run(i, leaf, calls[i]), leaf, gradient)
        # the same kernels in the same order: measured equal to the bit in all of these families
        torch.testing.assert_close(gradient, expected[i], rtol=1e-6, atol=1e-6 * expected[i].abs().max().item())


# Toy models: our own family with other layers, which is replayed or refused.


def toy(layer: type[ToyLayer], model: type[ToyModel] | None = None) -> ToyModel:
    toy_model = tiny(TOY)
    for old in toy_model.stack:
        old.__class__ = layer
    toy_model.__class__ = model or ToyModel
    return toy_model


class _Loop(ToyModel):
    """The model's forward, with a method ``between`` that runs the layers."""

    def forward(self, input_ids: Any = None, use_cache: Any = None, **kwargs: Any) -> CausalLMOutput:
        hidden = self.words(input_ids)
        decay = torch.ones(hidden.shape[1], hidden.shape[1]).tril()
        hidden = self.between(hidden, decay / decay.sum(-1, keepdim=True))
        return CausalLMOutput(logits=self.out(self.final(hidden)))

    def between(self, hidden: Tensor, decay: Tensor) -> Tensor:
        raise NotImplementedError


class _TupleLayer(ToyLayer):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (super().forward(*args, **kwargs),)


class _TupleModel(_Loop):
    def between(self, hidden: Tensor, decay: Tensor) -> Tensor:
        for layer in self.stack:
            hidden = layer(hidden, decay, scale=1.0)[0]
        return hidden


@pytest.mark.sample
def test_layers_that_return_tuples():
    model = toy(_TupleLayer, _TupleModel)
    replay = Replay(model, find_structure(model))
    for ids in (tokens(1, 4), tokens(3, 12)):
        replay.verify(ids)
        with torch.no_grad():
            assert torch.equal(replayed(replay, ids), model(ids).logits)


@pytest.mark.sample
@pytest.mark.parametrize("kind", ["by place", "by name"])
def test_extra_outputs_are_passed_with_hidden_states(kind):
    """Two batches in turns: extra outputs of one must not reach the other."""
    model = toy(_TwoStreamsLayer, _TwoStreams if kind == "by place" else _NamedStream)
    replay = Replay(model, find_structure(model))
    replay.verify(tokens())
    ids = tokens(2, 10)
    hidden, calls = replay.inputs(ids)
    shifted = hidden + 1.0
    for i, call in enumerate(calls):
        hidden, shifted = replay.run(i, hidden, call), replay.run(i, shifted, call)
    with torch.no_grad():
        assert torch.equal(replay.logits(ids, hidden), model(ids).logits)
    leaf = replay.leaf(hidden)
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert replay.run(1, leaf, calls[1]).shape == hidden.shape  # with its extra outputs


class _KeywordModel(_Loop):
    def between(self, hidden: Tensor, decay: Tensor) -> Tensor:
        for layer in self.stack:
            hidden = _named(layer, hidden_states=hidden, decay=decay)
        return hidden


def _named(layer: nn.Module, **kwargs: Any) -> Any:
    return layer(**kwargs)


class _KeywordLayer(ToyLayer):
    def forward(self, hidden_states: Tensor, decay: Tensor) -> Any:  # type: ignore[override]
        return super().forward(hidden_states, decay, scale=1.0)


def test_layers_called_by_keyword():
    """The replay passes hidden states as the first argument, however the model passes them."""
    model = toy(_KeywordLayer, _KeywordModel)
    replay = Replay(model, find_structure(model))
    replay.verify(tokens())


class _Mask(NamedTuple):
    decay: Tensor
    scale: float


class _NamedTupleLayer(ToyLayer):
    def forward(self, hidden: Tensor, mask: _Mask) -> Any:  # type: ignore[override]
        return super().forward(hidden, mask.decay, scale=mask.scale)


class _NamedTupleModel(_Loop):
    def between(self, hidden: Tensor, decay: Tensor) -> Tensor:
        for layer in self.stack:
            hidden = layer(hidden, _Mask(decay, scale=1.0))
        return hidden


def test_layers_called_with_named_tuples():
    model = toy(_NamedTupleLayer, _NamedTupleModel)
    replay = Replay(model, find_structure(model))
    replay.verify(tokens())


class _Scaled(_Loop):
    def between(self, hidden: Tensor, decay: Tensor) -> Tensor:
        for layer in self.stack:
            hidden = layer(hidden, decay, scale=1.0) * 0.9
        return hidden


class _TwoStreamsLayer(ToyLayer):
    def forward(self, hidden: Tensor, decay: Tensor, memory: Any = None) -> Any:  # type: ignore[override]
        out = super().forward(hidden, decay, scale=1.0)
        if memory is not None:
            out = out + memory
        return out, out.mean(1, keepdim=True)


class _TwoStreams(_Loop):
    """Layers have extra outputs, such as the positions that sparse attention chose."""

    def between(self, hidden: Tensor, decay: Tensor) -> Tensor:
        memory = None
        for layer in self.stack:
            hidden, memory = layer(hidden, decay, memory)
        return hidden


class _ChangedStream(_Loop):
    def between(self, hidden: Tensor, decay: Tensor) -> Tensor:
        memory = None
        for layer in self.stack:
            hidden, memory = layer(hidden, decay, memory)
            memory = memory * 2
        return hidden


class _NamedStream(_Loop):
    def between(self, hidden: Tensor, decay: Tensor) -> Tensor:
        memory = None
        for layer in self.stack:
            hidden, memory = layer(hidden, decay, memory=memory)
        return hidden


class _EarlyExit(_Loop):
    def between(self, hidden: Tensor, decay: Tensor) -> Tensor:
        for layer in list(self.stack)[:2]:
            hidden = layer(hidden, decay, scale=1.0)
        return hidden


class _SkipModel(_Loop):
    def between(self, hidden: Tensor, decay: Tensor) -> Tensor:
        first = hidden
        for layer in self.stack:
            hidden = layer(hidden, decay, scale=1.0)
        return hidden + first


@pytest.mark.sample
@pytest.mark.parametrize(
    ("layer", "model", "message"),
    [
        (ToyLayer, _Scaled, r"between its decoder layers.*before layer 1"),
        (_TwoStreamsLayer, _ChangedStream, r"between its decoder layers"),
        (ToyLayer, _EarlyExit, r"has 3 decoder layers and calls 2"),
    ],
)
def test_models_that_cannot_be_cut_are_refused_by_the_constructor(layer, model, message):
    toy_model = toy(layer, model)
    with pytest.raises(UserError, match=message) as caught:
        Replay(toy_model, find_structure(toy_model))
    assert "not supported yet" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all("forward" not in vars(x) for x in toy_model.stack)


def test_a_skip_around_all_layers_is_replayed():
    """It belongs to the head and the tail of the model, which are not replaced."""
    model = toy(ToyLayer, _SkipModel)
    Replay(model, find_structure(model)).verify(tokens())


class _SharedDictLayer(ToyLayer):
    """Like models whose later layers reuse keys and values of earlier ones."""

    def forward(self, hidden: Tensor, decay: Tensor, shared: dict[str, Tensor]) -> Any:  # type: ignore[override]
        if self.number == 0:
            shared["x"] = hidden.mean(1, keepdim=True)
        return super().forward(hidden + shared["x"], decay, scale=1.0)


class _SharedDict(_Loop):
    def between(self, hidden: Tensor, decay: Tensor) -> Tensor:
        shared: dict[str, Tensor] = {}
        for layer in self.stack:
            hidden = layer(hidden, decay, shared)
        return hidden


class _MemoryLayer(ToyLayer):
    """The first layer stores state on the class for later layers, which works only if batches do not alternate."""

    memory: Any = None

    def forward(self, hidden: Tensor, decay: Tensor, *, scale: float) -> Any:
        if self.number == 0:
            _MemoryLayer.memory = hidden.mean(1, keepdim=True)
        return super().forward(hidden + _MemoryLayer.memory, decay, scale=scale)


@pytest.mark.sample
@pytest.mark.parametrize(("layer", "model"), [(_SharedDictLayer, _SharedDict), (_MemoryLayer, ToyModel)])
def test_layers_that_share_state_are_refused(layer, model):
    toy_model = toy(layer, model)
    replay = Replay(toy_model, find_structure(toy_model))
    with pytest.raises(UserError, match=r"share state; this family is not supported yet") as caught:
        replay.verify(torch.arange(16).unsqueeze(0))
    assert "\n" not in str(caught.value)


@pytest.mark.sample
def test_errors_of_the_model_itself_are_not_converted():
    """A failure of the model's own forward says nothing about shared state."""
    model = tiny("olmoe")
    replay = Replay(model, find_structure(model))
    with pytest.raises(IndexError):
        replay.verify(torch.full((1, 3), 10_000))


def test_a_model_that_this_transformers_cannot_run_is_refused(monkeypatch):
    """Such as multimodal Llama 4 in Transformers 5.24, whose parts do not fit each other."""
    model = tiny("olmoe")
    replay = Replay(model, find_structure(model))
    monkeypatch.setattr(model, "forward", lambda **_: model.nothing.of.the.kind)
    with pytest.raises(
        UserError, match=r"Transformers 5\.\S+ cannot run OlmoeForCausalLM on text alone \(AttributeError"
    ):
        replay.verify(torch.full((1, 3), 5))


@pytest.mark.sample
def test_layers_keep_their_forward():
    """Including one that is set on the instance, as accelerate's hooks are, and after an error."""
    model = tiny("olmoe")
    structure = find_structure(model)
    layer = model.model.layers[1]
    plain, calls = layer.forward, []

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    layer.forward = hooked
    replay = Replay(model, structure)
    replay.inputs(tokens())
    with pytest.raises(IndexError):
        replay.inputs(torch.full((1, 3), 10_000))  # no such token: the error is the model's own
    assert layer.forward is hooked
    assert "forward" not in vars(model.model.layers[0])
    assert not calls
    replay.verify(tokens())
    assert calls


def test_the_model_comes_out_frozen_and_in_eval_mode():
    model = tiny("mixtral").train()
    model.config.output_router_logits = True
    replay = Replay(model, find_structure(model))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config.output_router_logits is False
    assert replay.logits(tokens(), replay.inputs(tokens())[0]).requires_grad is False
