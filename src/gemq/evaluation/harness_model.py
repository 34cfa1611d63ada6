"""The model type ``gemq`` of lm-eval: ``lm_eval run --model gemq --model_args pretrained=OUT``.

Importing this module registers it. Releases of lm-eval with plugins find it through the entry point ``lm_eval.models``
of pyproject.toml. Imports lm-eval, which is optional, so no other module of gemq may import this one.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from gemq.checkpoint.load import load


@register_model("gemq")
class GemqLM(HFLM):
    """A packed checkpoint as a model of lm-eval.

    Args:
        pretrained: directory or hub id of the packed checkpoint.
        device: as for ``gemq.load``. None: the GPU if there is one.
        dtype: type of activations; ``auto`` for the checkpoint's.
        revision: branch, tag or commit on the hub; None: the default branch.
        trust_remote_code: allow Python code that comes with the model to run.
        tokenizer: directory or hub id; None: that of the checkpoint.
        arguments: of ``HFLM``, such as ``batch_size`` and ``max_length``.

    Raises:
        UserError: it is not a packed checkpoint, or it is damaged.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        trust_remote_code: bool = False,
        tokenizer: str | None = None,
        **arguments: Any,
    ) -> None:
        options: dict[str, Any] = {} if revision is None else {"revision": revision}
        model = load(pretrained, device=device or "auto", dtype=dtype, trust_remote_code=trust_remote_code, **options)
        super().__init__(
            pretrained=model, tokenizer=tokenizer or pretrained, trust_remote_code=trust_remote_code, **arguments
        )
