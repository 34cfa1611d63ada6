"""Writing text with a model: one prompt in, tokens streamed out.

Decodes with a static cache (``decoder``), in a CUDA graph on a GPU. What that cannot serve goes to Transformers' own
``model.generate``, and that is said.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from gemq.decoder import FALLBACKS, Decoder, Unsupported
from gemq.display import printable
from gemq.errors import UserError

SERVED = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "use_cache"),
    *("do_sample", "temperature", "top_k", "top_p"),
    *("transformers_version", "_from_model_config", "cache_implementation"),
}
"""Keys of a generation configuration that ``decoder`` serves or that the arguments of ``generate`` override."""


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
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens cannot be {max_new_tokens}: the least is 1")
    if temperature < 0:
        raise UserError(f"--temperature cannot be {temperature}: give 0 or more")
    ids = _encode(tokenizer, prompt, raw).to(model.device)
    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    try:
        _check_served(model.generation_config)
        decoder = Decoder(model, 1, ids.shape[1] + max_new_tokens, temperature=temperature)
    except Unsupported as why:
        say_once(f"{FALLBACKS['decoded_by_transformers']} ({why})")
        tokens = _by_transformers(model, tokenizer, ids, max_new_tokens, temperature, streamer)
    else:
        tokens = _decode(decoder, ids, max_new_tokens, compile_layers, _end_tokens(model), streamer)
    return tokenizer.decode(tokens, skip_special_tokens=True)


def _encode(tokenizer: Any, prompt: str, raw: bool) -> Tensor:
    """Token ids [1, S], at least one."""
    if getattr(tokenizer, "chat_template", None) and not raw:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids: Tensor = inputs["input_ids"]
    if ids.shape[1] == 0:
        if tokenizer.bos_token_id is None:
            raise UserError("the prompt is empty: give some text with -p")
        ids = torch.tensor([[tokenizer.bos_token_id]])
    return ids


def _decode(
    decoder: Decoder, ids: Tensor, count: int, compile_layers: bool, ends: set[int], streamer: TextStreamer | None
) -> list[int]:
    """Up to ``count`` tokens, an end token last."""
    tokens = decoder.prefill(ids).tolist()
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
    return tokens


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
        streamer.skip_prompt = True
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
