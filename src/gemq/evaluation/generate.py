"""Writing text with a model: one prompt in, tokens streamed out.

Decodes with a static cache (``decoding.decoder``), in a CUDA graph on a GPU. What that cannot serve goes to
Transformers' own ``model.generate``, from wherever it stopped, and that is said.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from gemq.calibration.tokens import check_tokens
from gemq.decoding.decoder import FALLBACKS, Decoder, Unsupported
from gemq.errors import UserError, shown
from gemq.models.chat_template import CannotRender, has_template, render
from gemq.models.config_values import embedding_rows
from gemq.runtime.display import printable
from gemq.runtime.fallbacks import take_lines

SERVED = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "use_cache"),
    *("do_sample", "temperature", "top_k", "top_p"),
    *("transformers_version", "_from_model_config", "cache_implementation"),
}
"""Keys of a generation configuration that ``decoding.decoder`` serves or that the arguments of ``generate``
override."""


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    seed: int = 0,
    raw: bool = False,
    stream: bool = False,
    compile_layers: bool = False,
) -> str:
    """The text that ``model`` writes after ``prompt`` (without it).

    temperature:    0 takes the likeliest token each time; above, tokens are sampled from the whole distribution
    raw:            leave the prompt as it is, even when the tokenizer has a chat template
    stream:         print the text while it is written
    compile_layers: on a GPU, compile the decoder layers after the first token: seconds at first, then faster
    Raises UserError for a prompt that the chat template does not take, and for tokens that the model does not have.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens cannot be {max_new_tokens}: the least is 1")
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature cannot be {temperature}: give 0 or more")
    if not -(2**63) <= seed < 2**64:
        raise UserError(f"--seed cannot be {shown(seed)}: give a number of at most 64 bits")
    ids = _encode(tokenizer, prompt, raw)
    check_tokens(ids, embedding_rows(model), tokenizer, "the prompt")
    ids = ids.to(model.device)
    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    tokens: list[int] = []
    try:
        _check_served(model.generation_config)
        decoder = Decoder(model, 1, ids.shape[1] + max_new_tokens, temperature=temperature)
        _decode(decoder, ids, max_new_tokens, compile_layers, _end_tokens(model), streamer, tokens)
    except Unsupported as why:
        say_once(f"{FALLBACKS['decoded_by_transformers']} ({why})")
        written = torch.tensor([tokens], dtype=ids.dtype, device=ids.device)
        ids, rest = torch.cat([ids, written], dim=1), max_new_tokens - len(tokens)
        tokens += _by_transformers(model, tokenizer, ids, rest, temperature, streamer)
    for line in take_lines():
        say_once(line)
    return tokenizer.decode(tokens, skip_special_tokens=True)


def _encode(tokenizer: Any, prompt: str, raw: bool) -> Tensor:
    """Token ids int64 [1, S], at least one."""
    if has_template(tokenizer) and not raw:
        try:
            text = render(tokenizer, [{"role": "user", "content": prompt}], answer=True)
        except CannotRender as why:
            raise UserError(
                f"the model's chat template cannot be applied ({why}): add --raw to go on from the prompt as it is"
            ) from why
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids: Tensor = inputs["input_ids"].long()  # of an empty text it is float32
    if ids.shape[1] == 0:
        if tokenizer.bos_token_id is None:
            raise UserError("the prompt is empty: give some text with -p")
        ids = torch.tensor([[tokenizer.bos_token_id]])
    return ids


def _decode(
    decoder: Decoder,
    ids: Tensor,
    count: int,
    compile_layers: bool,
    ends: set[int],
    streamer: TextStreamer | None,
    tokens: list[int],
) -> None:
    """Appends up to ``count`` tokens to ``tokens``, an end token last. Those stay when it ends in ``Unsupported``."""
    tokens += decoder.prefill(ids).tolist()
    if streamer:
        streamer.put(torch.tensor(tokens))  # before anything is compiled or captured
    if count > 1 and tokens[0] not in ends:
        decoder.prepare(compile_layers=compile_layers and decoder.device.type == "cuda")
        for name in decoder.fallbacks:
            say_once(f"{FALLBACKS[name]} ({decoder.reasons[name]})")
        for (token,) in decoder.decode(count - 1):
            tokens.append(token)
            if streamer:
                streamer.put(torch.tensor([token]))
            if token in ends:
                break
    if streamer:
        streamer.end()


def _check_served(config: GenerationConfig) -> None:
    """Raises Unsupported when a configuration asks for penalties, bans, beams or anything else of that kind."""
    asked = {
        key
        for key, value in config.to_diff_dict().items()
        if value and (value is True or value != 1)  # 0, 1, None and False change nothing
    }
    if unserved := sorted(asked - SERVED):
        raise Unsupported(f"its generation configuration sets {', '.join(unserved)}")


def _by_transformers(
    model: Any, tokenizer: Any, ids: Tensor, count: int, temperature: float, streamer: TextStreamer | None
) -> list[int]:
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    if streamer:
        streamer.skip_prompt = streamer.next_tokens_are_prompt = True
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            pad_token_id=pad,
            streamer=streamer,
            **sampling,
        )
    return out[0, ids.shape[1] :].tolist()


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}


@functools.cache
def say_once(line: str) -> None:
    logging.getLogger("gemq").warning(printable(line))
