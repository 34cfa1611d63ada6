"""Releases of Transformers that gemq was tested with. Must not import Transformers."""

from __future__ import annotations

import re
from importlib import metadata

OLDEST, NEWEST = (5, 17), (5, 24)
"""First and last minor release. tests/conformance-results has the results."""


def untested_transformers() -> str | None:
    """Return one line of warning if gemq was not tested with the installed Transformers, otherwise None."""
    try:
        version = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return None
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None:
        return None
    release = (int(numbers[1]), int(numbers[2]))
    if OLDEST <= release <= NEWEST:
        return None
    oldest, newest = (f"{major}.{minor}" for major, minor in (OLDEST, NEWEST))
    age = "newer" if release > NEWEST else "older"
    return (
        f"Transformers {version} is {age} than the releases that gemq was tested with ({oldest} to {newest}): if "
        f"something fails or looks wrong, pip install 'transformers=={newest}.*'"
    )
