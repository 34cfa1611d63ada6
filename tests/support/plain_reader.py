"""A packed checkpoint read plainly, from what ``docs/checkpoint-format.md`` says and nothing else.

Shares no code with gemq, so that agreement of both means that the page describes what is written.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import safe_open

LEVEL_BITS = {1: 1, 2: 2, 4: 4}


def read_files(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by their stored names."""
    files = {"model.safetensors"}
    if not (directory / "model.safetensors").exists():
        files = set(json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"].values())
    tensors = {}
    for file in sorted(files):
        with safe_open(directory / file, framework="pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return tensors


def checksums(directory: Path) -> dict[str, Any]:
    """The ``gemq_checksums`` that config.json should have."""
    types = {torch.uint8: "U8", torch.bfloat16: "BF16", torch.float32: "F32"}
    lines: dict[str, str] = {}
    for name, tensor in sorted(read_files(directory).items()):
        components = name.split(".")
        numbers = [i for i, component in enumerate(components[:-1]) if component.isdigit()]
        group = ".".join(components[: numbers[0] + 1]) if numbers else "other"
        digest = xxhash.xxh3_64_hexdigest(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        line = f"{name} {types[tensor.dtype]} [{', '.join(map(str, tensor.shape))}] {digest}\n"
        lines[group] = lines.get(group, "") + line
    config = json.loads((directory / "config.json").read_text())
    del config["gemq_checksums"]
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return {
        "algorithm": "xxh3_64",
        "config": xxhash.xxh3_64_hexdigest(text.encode("ascii")),
        "tensors": {group: xxhash.xxh3_64_hexdigest(text.encode()) for group, text in lines.items()},
    }


def group_of(columns: int, group_size: int) -> int:
    group = group_size
    while group > 16 and columns % group:
        group //= 2
    assert columns % group == 0
    return group


def codes_of(stored: np.ndarray, width: float, group: int) -> np.ndarray:
    """[rows, bytes] -> [rows, columns], group by group, code by code."""
    per_group = {1: group // 8, 1.6: math.ceil(group / 5), 2: group // 4, 3: 3 * group // 8, 4: group // 2, 8: group}
    rows = stored.shape[0]
    groups = stored.reshape(rows, -1, per_group[width]).astype(np.int64)
    codes = np.zeros((rows, groups.shape[1], group), np.int64)
    if width == 8:
        codes = groups
    elif width == 3:
        low, high = groups[:, :, : group // 4], groups[:, :, group // 4 :]
        for k in range(group):
            n, m = group // 4, group // 8
            codes[:, :, k] = low[:, :, k % n] >> (2 * (k // n)) & 3
            codes[:, :, k] += 4 * (high[:, :, k % m] >> (k // m) & 1)
    elif width == 1.6:
        n = per_group[1.6]
        for k in range(group):
            codes[:, :, k] = groups[:, :, k % n] // 3 ** (k // n) % 3
    else:
        bits = LEVEL_BITS[width]
        n = group * bits // 8
        for k in range(group):
            codes[:, :, k] = groups[:, :, k % n] >> (bits * (k // n)) & (2**bits - 1)
    return codes.reshape(rows, -1)


def dequantized(tensors: dict[str, torch.Tensor], path: str, width: float, group_size: int) -> np.ndarray:
    """[rows, columns] float32 of one packed matrix; takes its tensors out of ``tensors``."""
    codes, scales, offsets = (
        tensors.pop(f"{path}.{tensor_name}").numpy() for tensor_name in ("codes", "scales", "offsets")
    )
    assert codes.dtype == np.uint8
    assert scales.dtype == offsets.dtype == np.uint8
    for group in (group_size >> i for i in range(20)):  # columns follow from the bytes; the group must agree
        if group < 16:
            raise AssertionError(f"{path}: no group size fits")
        columns = scales.shape[1] * group
        if group_of(columns, group_size) != group:
            continue
        per_group = {1: group / 8, 1.6: math.ceil(group / 5), 2: group / 4, 3: 3 * group / 8, 4: group / 2, 8: group}
        if codes.shape[1] == scales.shape[1] * per_group[width]:
            break
    values = codes_of(codes, width, group).reshape(*scales.shape, group).astype(np.float32)
    scale = 2.0 ** (scales.astype(np.float32) // 8 - 24) * (1 + scales % 8 / np.float32(8))
    highest = {1: 1, 1.6: 2, 2: 3, 3: 7, 4: 15, 8: 255}[width]
    offset = scale * highest * (64 - offsets.astype(np.float32)) / 128
    values = values * scale[..., None] + offset[..., None]
    return values.astype(np.float32).reshape(scales.shape[0], -1)


def read_packed(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """(dequantized weights by in-model name, [E, rows, columns] or [rows, columns]; all other tensors; the config)."""
    config = json.loads((directory / "config.json").read_text())
    listed = config.pop("quantization_config")
    config.pop("gemq_checksums", None)
    assert listed["quant_method"] == "gemq"
    assert listed["format_version"] == 2
    tensors = read_files(directory)
    weights = {}
    for path, projections in listed["experts"].items():
        for name, widths in projections.items():
            stack = [dequantized(tensors, f"{path}.{e}.{name}", w, listed["group_size"]) for e, w in enumerate(widths)]
            weights[f"{path}.{name}"] = torch.from_numpy(np.stack(stack))
    for path, width in listed["linears"].items():
        weights[f"{path}.weight"] = torch.from_numpy(dequantized(tensors, path, width, listed["group_size"]))
    return weights, tensors, config
