"""Checks that Triton distributes tensors to threads as gemq's inline assembly expects.

Triton does not guarantee these layouts, but has used them so far.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import triton

_checked_kernels: set[str] = set()
"""Hashes of compiled kernels that have passed."""


def check_layout(kernel: Any, instruction: str, is_expected: Callable[[int, str], bool]) -> None:
    """Check the layouts of the results of an instruction in a compiled kernel, once for each kernel.

    Args:
        kernel: compiled; None if the interpreter ran it
        instruction: regular expression of the shape of the results in the kernel's TTGIR, up to the size of the last
            dimension, which is a group
        is_expected: from the size of the last dimension and the text of a layout, whether the assembly expects it

    Raises:
        RuntimeError: a layout differs
    """
    if kernel is None or kernel.hash in _checked_kernels:
        return
    text = kernel.asm["ttgir"]
    for last_size, name in set(re.findall(rf"elementwise_inline_asm .*{instruction}xi32, (#\w+)>", text)):
        layout = re.search(rf"^{name} = (.*)$", text, re.MULTILINE)
        assert layout, name
        if not is_expected(int(last_size), layout[1]):
            raise RuntimeError(
                f"Triton {triton.__version__} distributes words to threads in an order that gemq's kernels do not "
                "support: set GEMQ_KERNELS=reference, or install triton 3.6"
            )
    _checked_kernels.add(kernel.hash)
