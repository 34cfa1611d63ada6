"""Data files of the package: a small Mixture-of-Experts model, and short texts to evaluate it on."""

from importlib.resources import files
from pathlib import Path


def builtin_model() -> Path:
    """Return the directory of refmoe-olmoe-6m: a trained OLMoE of 5.7 million weights with its tokenizer."""
    return _directory() / "refmoe-olmoe-6m"


def builtin_texts() -> list[Path]:
    """Return the built-in texts, one for each kind of text that the model was trained on, sorted by name."""
    return sorted((_directory() / "texts").glob("*.txt"))


def _directory() -> Path:
    """Return the directory of this package. pip unpacks packages, so that it has ordinary files."""
    return Path(str(files(__name__)))
