"""Which of Transformers' Auto classes builds a model: text alone, or text inside a model that also sees or hears.

A vision-language checkpoint is kept whole: its language model is quantized, the rest stays as it is.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM


def auto_class(config: Any) -> Any:
    """The Auto class for a configuration.

    The one that makes what the checkpoint says it holds (``architectures``); else the first that knows the
    configuration; else ``AutoModelForCausalLM``, which says why it cannot (or runs code that the model brings).
    """
    known = {auto: _classes(auto, config) for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM)}
    wanted = set(getattr(config, "architectures", None) or ())
    for auto, names in known.items():
        if names & wanted:
            return auto
    return next((auto for auto, names in known.items() if names), AutoModelForCausalLM)


def _classes(auto: Any, config: Any) -> set[str]:
    """Names of the model classes that ``auto`` has for a configuration."""
    if type(config) not in auto._model_mapping:
        return set()
    found = auto._model_mapping[type(config)]
    return {c.__name__ for c in (found if isinstance(found, list | tuple) else (found,))}
