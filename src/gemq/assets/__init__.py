"""What ships inside the package: a toy Mixture-of-Experts model, and short texts to measure on."""

from importlib.resources import files
from pathlib import Path


def builtin_model() -> Path:
    """Directory of refmoe-olmoe-6m: a trained OLMoE of 5.7 million weights with its tokenizer."""
    return _directory() / "refmoe-olmoe-6m"


def builtin_texts() -> list[Path]:
    """The built-in texts, one for each kind of text that the model was trained on, sorted by name."""
    return sorted((_directory() / "texts").glob("*.txt"))


def _directory() -> Path:
    # pip unpacks packages, so a resource is a plain file and its path can go to Transformers.
    return Path(str(files(__name__)))
