"""Writing text with a model: one prompt in, tokens streamed out."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TextStreamer

from gemq.errors import UserError


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
) -> str:
    """The text that ``model`` writes after ``prompt`` (without it).

    temperature: 0 takes the likeliest token each time; above, tokens are sampled from the whole distribution
    raw:         leave the prompt as it is, even when the tokenizer has a chat template
    stream:      print the text while it is written
    """
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens cannot be {max_new_tokens}: the least is 1")
    if temperature < 0:
        raise UserError(f"--temperature cannot be {temperature}: give 0 or more")
    if getattr(tokenizer, "chat_template", None) and not raw:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids = inputs["input_ids"].to(model.device)
    if ids.shape[1] == 0:
        bos = tokenizer.bos_token_id
        if bos is None:
            raise UserError("the prompt is empty: give some text with -p")
        ids = torch.tensor([[bos]], device=model.device)
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None,
            **sampling,
        )
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
