"""Packed modules and the kernels that compute with them. ``dispatch`` chooses the kernel."""

from __future__ import annotations

from collections import Counter

fallbacks: Counter[str] = Counter()
"""Calls that ran on the reference because no kernel covers them, by reason."""
