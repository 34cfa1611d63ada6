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
SIGN_BITS = 0x07158AB795F381835B6913CD87684F34


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
    scale = scales_of(scales)
    highest = {1: 1, 1.6: 2, 2: 3, 3: 7, 4: 15, 8: 255}[width]
    offset = scale * highest * (64 - offsets.astype(np.float32)) / 128
    values = values * scale[..., None] + offset[..., None]
    return values.astype(np.float32).reshape(scales.shape[0], -1)


def trellis_values(ring_bytes: np.ndarray, state_bits: int) -> np.ndarray:
    """[tiles, bytes of a ring] -> [tiles, 256], weight by weight."""
    words = ring_bytes.reshape(len(ring_bytes), -1, 4)[:, :, ::-1]  # little-endian
    bits = np.unpackbits(words.reshape(len(ring_bytes), -1), axis=1).astype(np.int64)
    eighths = bits.shape[1] // 32
    values = np.zeros((len(bits), 256))
    for t in range(256):
        end = (t + 1) * eighths // 8
        state = np.zeros(len(bits), np.int64)
        for k in range(end - state_bits, end):
            state = 2 * state + bits[:, k % bits.shape[1]]
        product = state * 0xC5E2486D % 2**32
        values[:, t] = (sum(product >> shift & 255 for shift in (0, 8, 16, 24)) - 510) / 147.8
    return values


def rotation(side: int) -> np.ndarray:
    """Entry [i, j] is the sign of input j, and another minus for each bit that i and j share."""
    shared = [[(i & j).bit_count() + (SIGN_BITS >> j & 1) for j in range(side)] for i in range(side)]
    return (-1.0) ** np.array(shared) / math.sqrt(side)


def trellis_weights(tensors: dict[str, torch.Tensor], path: str, width: float, state_bits: int) -> np.ndarray:
    """[rows, columns] float32 of a matrix with trellis codes; takes its tensors out of ``tensors``."""
    codes, scales = (tensors.pop(f"{path}.{tensor_name}").numpy() for tensor_name in ("codes", "scales"))
    assert codes.dtype == scales.dtype == np.uint8
    ring_bytes = round(32 * width)
    tiles = trellis_values(codes.reshape(-1, ring_bytes), state_bits).reshape(len(codes), -1, 16, 16)
    values = tiles.transpose(0, 2, 1, 3).reshape(len(scales), -1)
    side = math.gcd(values.shape[1], 128)
    weights = (values.reshape(len(scales), -1, side) @ rotation(side)).reshape(values.shape)
    return (weights * scales_of(scales)[:, None]).astype(np.float32)


def scales_of(stored: np.ndarray) -> np.ndarray:
    return 2.0 ** (stored.astype(np.float32) // 8 - 24) * (1 + stored % 8 / np.float32(8))


def read_packed(directory: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """(dequantized weights by in-model name, [E, rows, columns] or [rows, columns]; all other tensors; the config)."""
    config = json.loads((directory / "config.json").read_text())
    listed = config.pop("quantization_config")
    config.pop("gemq_checksums", None)
    config.pop("transformers_weights", None)
    assert listed["quant_method"] == "gemq"
    kind = listed.get("codes", "affine")
    assert (listed["format_version"], kind) in ((2, "affine"), (3, "trellis"))
    tensors = read_files(directory)

    def expert(name: str, width: float) -> np.ndarray:
        if kind == "trellis":
            return trellis_weights(tensors, name, width, listed["state_bits"])
        return dequantized(tensors, name, width, listed["group_size"])

    weights = {}
    for path, projections in listed["experts"].items():
        for name, widths in projections.items():
            stack = [expert(f"{path}.{e}.{name}", width) for e, width in enumerate(widths)]
            weights[f"{path}.{name}"] = torch.from_numpy(np.stack(stack))
    for path, width in listed["linears"].items():
        weights[f"{path}.weight"] = torch.from_numpy(dequantized(tensors, path, width, listed["group_size"]))
    return weights, tensors, config
