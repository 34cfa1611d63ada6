"""Text generation: one prompt in, tokens streamed out.

Decodes with a static cache (``decoding.decoder``), on a GPU in a CUDA graph. Where the decoder does not support the
model or the request, ``model.generate`` of Transformers continues from the tokens written so far, and a warning says
so.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from gemq.calibration.tokens import check_tokens
from gemq.decoding.decoder import FALLBACKS, Decoder, Unsupported
from gemq.errors import UserError, short_repr
from gemq.models.chat_template import CannotRender, has_template, render
from gemq.models.config_values import embedding_rows
from gemq.runtime.display import printable
from gemq.runtime.fallbacks import pop_messages

SUPPORTED_KEYS = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens", "use_cache"),
    *("do_sample", "temperature", "top_k", "top_p"),
    *("transformers_version", "_from_model_config", "cache_implementation"),
}
"""Keys of a generation configuration that ``decoding.decoder`` supports or that arguments of ``generate`` override."""


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
    """Write text with a model, with a static cache and on a GPU in a CUDA graph.

    Args:
        model: a loaded causal language model, such as that of ``load``
        tokenizer: the tokenizer of the model, from Transformers
        prompt: text to continue, or to answer where the tokenizer has a chat template
        max_new_tokens: upper bound for the number of new tokens, at least 1
        temperature: 0 chooses the most likely token; otherwise tokens are sampled from the whole distribution
        seed: seed of the sampling
        raw: do not apply the chat template
        stream: print the text while it is written
        compile_layers: on a GPU, compile the decoder layers after the first token in place of fused kernels. This takes
            seconds, and is faster for models whose layers cannot be fused

    Returns:
        The new text, without the prompt.

    Raises:
        UserError: an argument is out of range, the chat template cannot be applied, or the prompt has tokens that the
            model does not have.
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens cannot be {max_new_tokens}: the minimum is 1")
    if not 0 <= temperature < math.inf:
        raise UserError(f"--temperature cannot be {temperature}: give 0 or more")
    if not -(2**63) <= seed < 2**64:
        raise UserError(f"--seed cannot be {short_repr(seed)}: give a number of at most 64 bits")
    ids = _encode(tokenizer, prompt, raw)
    check_tokens(ids, embedding_rows(model), tokenizer, "the prompt")
    ids = ids.to(model.device)
    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if stream else None
    tokens: list[int] = []
    try:
        _check_generation_config(model.generation_config)
        decoder = Decoder(model, 1, ids.shape[1] + max_new_tokens, temperature=temperature)
        for token in _decode(decoder, ids, max_new_tokens, compile_layers, _end_tokens(model)):
            tokens.append(token)
            if streamer:
                streamer.put(torch.tensor([token]))
        if streamer:
            streamer.end()
    except Unsupported as error:
        warn_once(f"{FALLBACKS['decoded_by_transformers']} ({error})")
        written = torch.tensor([tokens], dtype=ids.dtype, device=ids.device)
        ids = torch.cat([ids, written], dim=1)
        tokens += _generate_with_transformers(
            model, tokenizer, ids, max_new_tokens - len(tokens), temperature, streamer
        )
    for line in pop_messages():
        warn_once(line)
    return tokenizer.decode(tokens, skip_special_tokens=True)


def _encode(tokenizer: Any, prompt: str, raw: bool) -> Tensor:
    """Tokenizes a prompt, through the chat template unless ``raw``. Returns int64 [1, S] with at least one token."""
    if has_template(tokenizer) and not raw:
        try:
            text = render(tokenizer, [{"role": "user", "content": prompt}], answer=True)
        except CannotRender as error:
            raise UserError(
                f"the model's chat template cannot be applied ({error}): add --raw to continue the prompt without it"
            ) from error
        inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids: Tensor = inputs["input_ids"].long()  # tokenizers return float32 for an empty text
    if ids.shape[1] == 0:
        if tokenizer.bos_token_id is None:
            raise UserError("the prompt is empty: give some text with -p")
        ids = torch.tensor([[tokenizer.bos_token_id]])
    return ids


def _decode(
    decoder: Decoder, ids: Tensor, max_new_tokens: int, compile_layers: bool, end_tokens: set[int]
) -> Iterator[int]:
    """Yields new tokens up to and including the first end token. Raises Unsupported, possibly after some tokens."""
    token = int(decoder.prefill(ids))
    yield token  # before anything is compiled or captured
    if max_new_tokens == 1 or token in end_tokens:
        return
    decoder.prepare(compile_layers=compile_layers and decoder.device.type == "cuda")
    for name in decoder.fallbacks:
        warn_once(f"{FALLBACKS[name]} ({decoder.reasons[name]})")
    for (token,) in decoder.decode(max_new_tokens - 1):
        yield token
        if token in end_tokens:
            return


def _check_generation_config(config: GenerationConfig) -> None:
    """Raises Unsupported if a generation configuration sets penalties, bans, beams or any other unsupported key."""
    unsupported = set()
    for key, value in config.to_diff_dict().items():
        has_effect = value and (value is True or value != 1)  # 0, 1, None and False are neutral
        if has_effect and key not in SUPPORTED_KEYS:
            unsupported.add(key)
    if unsupported:
        raise Unsupported(f"its generation configuration sets {', '.join(sorted(unsupported))}")


def _generate_with_transformers(
    model: Any, tokenizer: Any, ids: Tensor, max_new_tokens: int, temperature: float, streamer: TextStreamer | None
) -> list[int]:
    """Returns the tokens that ``model.generate`` writes after ``ids`` [1, S]."""
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    if streamer:
        streamer.skip_prompt = True
        streamer.next_tokens_are_prompt = True
    pad_token = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad_token,
            streamer=streamer,
            **sampling,
        )
    return output[0, ids.shape[1] :].tolist()


def _end_tokens(model: Any) -> set[int]:
    """Returns the tokens that end a text."""
    end_tokens = model.generation_config.eos_token_id
    if end_tokens is None:
        return set()
    return set(end_tokens) if isinstance(end_tokens, list) else {end_tokens}


@functools.cache
def warn_once(line: str) -> None:
    """Logs a warning, unless the process has logged the same one before."""
    logging.getLogger("gemq").warning(printable(line))
