"""Special tokens of a model and its tokenizer, as far as the generation of windows needs them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gemq.errors import UserError, short_repr


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens begin and end documents, and which may be sampled."""

    bos: int | None
    ends: frozenset[int]
    allowed: frozenset[int]
    """Tokens of the tokenizer, except pad. The embedding may have more rows, which no text contains."""
    starts: Tensor
    """int64 [n]: tokens that may open a document if there is no BOS."""

    @classmethod
    def from_model(cls, model: Any, tokenizer: Any) -> Vocabulary:
        """Reads the special tokens of a model and its tokenizer.

        Raises:
            UserError: the id of a special token is not a number, or BOS is not in the vocabulary.
        """
        config = model.config.get_text_config()
        holders = [getattr(model, "generation_config", None), config, tokenizer]
        bos = next(iter(_token_ids(holders, "bos_token_id")), None)
        if bos is not None and not 0 <= bos < config.vocab_size:
            raise UserError(
                f"bos_token_id of the model is {bos}, and its vocabulary has {config.vocab_size} tokens: correct it in "
                "generation_config.json or config.json"
            )
        ends = frozenset(_token_ids(holders, "eos_token_id"))
        # a pad token that also ends documents must be allowed, or no document would end
        forbidden = frozenset(_token_ids(holders, "pad_token_id")) - ends - {bos}
        allowed = frozenset(i for i in tokenizer.get_vocab().values() if i < config.vocab_size) - forbidden
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        starts = sorted(allowed - special - ends - set(tokenizer.all_special_ids))
        return cls(bos, ends, allowed, torch.tensor(starts, dtype=torch.int64))


def _token_ids(holders: Iterable[Any], name: str) -> list[int]:
    """All token ids that the holders have under ``name``, in order. A value may be missing, one id or a list.

    Raises:
        UserError: a value is not a number.
    """
    ids: list[int] = []
    for holder in holders:
        value = getattr(holder, name, None)
        if isinstance(value, list | tuple):
            ids += value
        elif value is not None:
            ids.append(value)
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise UserError(
                f"{name} of the model is {short_repr(token_id)}: give a number in generation_config.json or config.json"
            )
    return ids
