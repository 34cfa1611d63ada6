"""Downloads models from the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from gemq.errors import UserError
from gemq.models.library_errors import summary


def download_model(model: str, revision: str | None, weights: bool) -> Path:
    """Downloads a model from the hub, or finds it in the cache.

    Args:
        model: hub id
        revision: branch, tag or commit
        weights: whether weights are downloaded. Pickled weights never are.

    Returns:
        The directory of its files.

    Raises:
        UserError: the hub cannot be reached, or refuses the model
    """
    from huggingface_hub import snapshot_download  # not needed for local models
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "README.md", "LICENSE*", "NOTICE*"]
    if weights:
        patterns.append("*.safetensors")
    try:
        path = snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=["original/*"])
    except GatedRepoError as error:
        raise UserError(
            f"model {model} is gated: accept its terms on https://huggingface.co/{model}, then run hf auth login, or "
            "set HF_TOKEN"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model {model} is not a local directory and cannot be downloaded from the hub: check the name and the "
            "network"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"model {model} is no local directory and the hub refuses it ({summary(error)}): check the name"
        ) from error
    return Path(path)
