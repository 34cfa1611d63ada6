"""Selects the Auto class of Transformers for a model: text only, or multimodal.

A vision-language checkpoint keeps all of its modules. Only its language model is quantized.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

from gemq.runtime.compat import transformers_private


def auto_class(config: Any) -> Any:
    """Returns the Auto class for a configuration.

    It is the class that builds one of the configuration's ``architectures``, or else the first one that supports the
    configuration. Without either it is ``AutoModelForCausalLM``, which runs code of the model or raises a clear error.
    """
    architectures = set(getattr(config, "architectures", None) or ())
    default = None
    for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM):
        names = transformers_private.model_classes(auto, config)
        if names & architectures:
            return auto
        if names and default is None:
            default = auto
    return default or AutoModelForCausalLM
