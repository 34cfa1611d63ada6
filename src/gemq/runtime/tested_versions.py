"""Which releases of Transformers gemq was tested with. Imports none of them."""

from __future__ import annotations

import re
from importlib import metadata

OLDEST, NEWEST = (5, 17), (5, 24)
"""Minor releases; tests/conformance-results holds a run with each."""


def untested_transformers() -> str | None:
    """One line of warning when the installed Transformers is none that gemq was tested with; else None."""
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return None
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        return None
    minor = (int(numbers[1]), int(numbers[2]))
    if OLDEST <= minor <= NEWEST:
        return None
    oldest, newest = (".".join(map(str, x)) for x in (OLDEST, NEWEST))
    age = "newer" if minor > NEWEST else "older"
    return (
        f"Transformers {version} is {age} than the releases that gemq was tested with ({oldest} to {newest}): if "
        f"something fails or looks wrong, pip install 'transformers=={newest}.*'"
    )
