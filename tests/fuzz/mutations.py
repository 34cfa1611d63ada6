"""Damage to files and JSON values, chosen by a random generator. Each function returns what it did, in words."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        "",
        "x",
        "64",
        "nan",
        "\x1b[31mred",
        "[/b]",
        "\ud800",
        "../x",
        [],
        {},
        [[]],
        [None],
        {"a": {}},
    ),
    *(-1, 0, 1, 2, 3, 7, 1000, 1 << 20, 10**6, 1 << 31, 10**9, 10**13, 1 << 63, 10**30, -(10**9)),
    *(0.5, -0.5, 1.5, 1e-30, 1e30, -1e30, float("inf"), float("nan"), "1" * 300, ["x"] * 50, [1] * 50),
)


def leaves(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside JSON values, containers included."""
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    return [p for key, value in items for p in [(*path, key), *leaves(value, (*path, key))]]


def parent_of(values: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        values = values[key]
    return values


def change_json(rng: random.Random, values: Any, below: tuple[Any, ...] = ()) -> str:
    """Changes one value in place: odd, deleted, renamed, moved or swapped with another."""
    inside = values
    for key in below:
        inside = inside[key]
    paths = leaves(inside, below)
    if not paths:
        return "nothing to change"
    # few of many alike: a width of an expert is not likelier than a size of the model
    path = rng.choice([p for p in paths if len(p) == rng.choice(sorted({len(p) for p in paths}))] or paths)
    holder, key = parent_of(values, path), path[-1]
    what = rng.choice(("odd", "odd", "odd", "scaled", "delete", "rename", "swap"))
    old = holder[key]
    if what == "scaled" and isinstance(old, int | float) and not isinstance(old, bool):
        holder[key] = rng.choice((old + 1, old - 1, old * 2, old // 2, -old, old * 1000, float(old)))
    elif what == "delete":
        del holder[key]
    elif what == "rename" and isinstance(holder, dict):
        holder[rng.choice((f"{key}_", key[:-1], key.upper(), "\x1b]0;x\x07", ""))] = holder.pop(key)
    elif what == "swap":
        swap_path = rng.choice(paths)
        swap_holder = parent_of(values, swap_path)
        swap_value = json.loads(json.dumps(swap_holder[swap_path[-1]]))
        holder[key], swap_holder[swap_path[-1]] = swap_value, json.loads(json.dumps(old))
    else:
        holder[key] = rng.choice(ODD_VALUES)
    return f"{what} {'.'.join(map(str, path))}"


def edit_json(rng: random.Random, file: Path, below: tuple[Any, ...] = ()) -> str:
    values = json.loads(file.read_text())
    done = change_json(rng, values, below)
    file.write_text(json.dumps(values))
    return f"{file.name}: {done}"


def spoil_text(rng: random.Random, file: Path) -> str:
    """Damages a text file as text: cut, bytes flipped, doubled, replaced."""
    data = bytearray(regular_bytes(file))
    what = rng.choice(("cut", "flip", "flip", "empty", "nested", "twice", "latin", "bom", "insert", "null", "number"))
    if what == "cut":
        data = data[: rng.randrange(len(data) + 1)]
    elif what == "flip":
        for _ in range(rng.choice((1, 1, 3, 20))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif what == "insert":
        position = rng.randrange(len(data))
        data[position:position] = rng.choice((b"\x00", b"}", b"\xff\xfe", b'"', b",,", b"NaN", b"9" * 5000))
    elif what == "twice" and data.startswith(b"{"):
        data = data.rstrip()[:-1] + b"," + data.lstrip()[1:]  # every key twice
    else:
        data = {
            "empty": b"",
            "nested": b"[" * 100_000 + b"]" * 100_000,
            "latin": b'{"a": "\xe9"}',
            "bom": b"\xef\xbb\xbf" + data,
            "null": b"null",
            "number": b"17",
        }.get(what, b"{}")
    file.write_bytes(data)
    return f"{file.name}: {what}"


def spoil_path(rng: random.Random, file: Path) -> str:
    """Puts something else in a file's place."""
    what = rng.choice(("missing", "directory", "pipe", "zero", "dangling", "loop", "empty", "null device", "self"))
    file.unlink()
    if what == "directory":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file)
    elif what == "zero":
        file.symlink_to("/dev/zero")
    elif what == "null device":
        file.symlink_to("/dev/null")
    elif what == "dangling":
        file.symlink_to(file.parent / "nowhere")
    elif what == "loop":
        file.symlink_to(file)
    elif what == "self":
        file.symlink_to(file.parent)
    elif what == "empty":
        file.touch()
    return f"{file.name}: {what}"


def regular_bytes(file: Path) -> bytes:
    """The content of a file. Raises OSError if an earlier mutation made it a device, which may have no end."""
    if not file.is_file():
        raise OSError(f"{file} is not a regular file")
    return file.read_bytes()


def read_header(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and the data behind it."""
    raw = regular_bytes(file)
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(file: Path, header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


HEADER_DAMAGE = (
    *("offsets swapped", "entries swapped", "type", "shape", "json", "json", "drop", "add", "length", "metadata"),
    *("reshaped", "text", "surplus", "overlap"),
)
TYPES = ("U8", "I8", "BOOL", "F16", "BF16", "I16", "F32", "F8_E4M3", "F8_E5M2", "F4", "X")


def spoil_header(rng: random.Random, file: Path) -> str:
    """Damages the header of a safetensors file."""
    header, data = read_header(file)
    what = rng.choice(HEADER_DAMAGE)
    names = [name for name in header if name != "__metadata__"]
    first, second = rng.sample(names, 2) if len(names) > 1 else names * 2
    if what == "json":
        change_json(rng, header)
    elif what == "metadata":
        header["__metadata__"] = rng.choice(({}, None, [], {"format": "tf"}, {"format": 1}, {"format": "pt", "x": "y"}))
    elif what == "surplus":
        end = len(data)
        name = rng.choice(("x.weight", "lm_head.weight", "model.layers.0.mlp.gate.bias"))
        header[name] = {"dtype": "U8", "shape": [8], "data_offsets": [end, end + 8]}
        data += bytes(8)
    else:
        change_entry(rng, header, first, second, what)
    write_header(file, header, data)
    raw = bytearray(regular_bytes(file))
    if what == "length":
        raw[:8] = struct.pack("<Q", rng.choice((0, 1, 7, len(raw), len(raw) - 8, 1 << 40, (1 << 64) - 1, 50_000_000)))
    elif what == "text":
        raw[8 + rng.randrange(struct.unpack("<Q", raw[:8])[0])] ^= 1 << rng.randrange(8)
    file.write_bytes(raw)
    return f"{file.name} header: {what} ({first}, {second})"


def change_entry(rng: random.Random, header: dict[str, Any], first: str, second: str, what: str) -> None:
    """Changes the entry ``one`` of a header, or swaps it with ``two``, or with another of the same type and shape."""
    entry = header[first]
    shape = entry["shape"]
    if what == "offsets swapped":
        same_spec = [
            n for n, e in header.items() if n != first and {**e, "data_offsets": 0} == {**entry, "data_offsets": 0}
        ]
        partner = header[rng.choice(same_spec or [second])]
        entry["data_offsets"], partner["data_offsets"] = partner["data_offsets"], entry["data_offsets"]
    elif what == "entries swapped":
        header[first], header[second] = header[second], entry
    elif what == "type":
        entry["dtype"] = rng.choice(TYPES)
    elif what == "shape":
        entry["shape"] = rng.choice(([], [0], [1, -1], [1 << 62, 4], [1 << 70], shape[::-1], "x", None))
    elif what == "reshaped":
        size = math.prod(shape)
        entry["shape"] = rng.choice(([size], [1, size], [size, 1], [2, size // 2]))
    elif what == "drop":
        del header[first]
    elif what == "add":
        name = rng.choice(("x", f"{first}_", "\x1b[2J", "", "model.layers.99.mlp.experts.0.down_proj.codes"))
        header[name] = entry
    elif what == "overlap":
        entry["data_offsets"] = header[second]["data_offsets"]


def huge_header(rng: random.Random, file: Path) -> str:
    """A header of very many entries without data."""
    count = rng.choice((100_000, 500_000, 2_000_000))
    entry = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    text = ("{" + ",".join(f'"{number:x}":{entry}' for number in range(count)) + "}").encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    return f"{file.name}: header of {count:,} entries"


def spoil_data(rng: random.Random, file: Path) -> str:
    """Damages the bytes behind the header, or the end of the file."""
    raw = bytearray(regular_bytes(file))
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    what = rng.choice(("flip", "flip", "flip", "zeros", "swap", "cut", "longer", "last bit"))
    if what == "flip":
        for _ in range(rng.choice((1, 1, 1, 8))):
            raw[rng.randrange(start, len(raw))] ^= 1 << rng.randrange(8)
    elif what == "zeros":
        position = rng.randrange(start, max(start + 1, len(raw) - 64))
        raw[position : position + 64] = b"\xff" * 64 if raw[position : position + 64] == bytes(64) else bytes(64)
    elif what == "swap":
        a, b = (rng.randrange(start, max(start + 1, len(raw) - 64)) // 64 * 64 for _ in range(2))
        raw[a : a + 64], raw[b : b + 64] = raw[b : b + 64], raw[a : a + 64]
    elif what == "cut":
        raw = raw[: rng.randrange(len(raw))]
    elif what == "longer":
        raw += bytes(rng.choice((1, 8, 4096)))
    else:
        raw[-1] ^= 128
    file.write_bytes(raw)
    return f"{file.name} data: {what}"


def copied(base: Path, to: Path) -> Path:
    """A fresh copy of a directory."""
    remove(to)
    return Path(shutil.copytree(base, to, symlinks=True))


def remove(path: Path) -> None:
    """Removes whatever damage has put at a path."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def pick(rng: random.Random, choices: dict[Callable[..., str], int]) -> Callable[..., str]:
    """One of the functions, by weight."""
    return rng.choices(list(choices), list(choices.values()))[0]
