"""The entry of config.json that stops programs without gemq, which would give the model random experts.

Transformers only warns about a quantization method that it does not know, and initializes weights that it does not
find. But it takes the name of the weights file from ``transformers_weights``, and quotes a name that is none in its
error. gemq's quantizer removes the entry before Transformers reads it.
"""

from __future__ import annotations

WEIGHTS_KEY = "transformers_weights"

NOTICE = (
    "packed by gemq, which is not active here. Install the package gemq, or put `import gemq` before from_pretrained. "
    "If that changes nothing, quantization_config in config.json is damaged: copy the checkpoint again"
)


def is_notice(name: object) -> bool:
    """Whether a value of ``transformers_weights`` is the notice of any version of gemq."""
    return isinstance(name, str) and name.startswith("packed by gemq")
