"""What does a whole job take at a model's true size? Prints a table and appends one CSV row a stage.

    python benchmarks/scale.py olmoe [--layers 4] [--job low] [--gpu-memory 24GB] [--host-memory 24GB]

Random bfloat16 weights of the true shapes, written once as the family stores them (an expert a tensor); shuffled words
of the built-in texts in 128 windows of 2048. ``low`` is candidates of 1, 2 and 3 bits, scores, allocation and
reconstruction without training. ``defaults`` is everything: as many tokens again that the model writes itself, 1,
ternary, 2 and 3 bits, two epochs of candidates and of reconstruction, one of distillation, guard. ``routers``
quantizes as ``low`` and tunes nothing but routers, for one epoch. With fewer layers than the
model has, ``seconds_all_layers`` counts each stage as often as it has layers. Nothing
ends early: distillation could after an epoch that did no good, and has one.

    python benchmarks/scale.py qwen3-30b --job defaults --extrapolate 3 6

runs nothing: from the newest rows with 3 and with 6 layers it tells what of a stage does not grow with layers
(compilation, embeddings and head, sampling), which the rows of one depth count once for each layer as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, MixtralConfig, OlmoeConfig, PreTrainedConfig, Qwen3MoeConfig

import gemq
from gemq.assets import builtin_model, builtin_texts
from gemq.checkpoint.names import hub_state
from gemq.models.source import Source
from gemq.models.structure import find_structure
from gemq.pipeline.sensitivity_stage import sensitivity_work
from gemq.planning.cost_model import Workload
from gemq.recipe import Recipe, parse_size
from gemq.runtime.device import Rates
from gemq.runtime.progress import Monitor
from record import RESULTS, append, environment, read
from shapes import MIXTRAL, OLMOE, SMALL, STD

FILE = RESULTS / "scale.csv"
ENDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "dtype": "bfloat16"}
QWEN3 = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
}
SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "olmoe": (OlmoeConfig, OLMOE),
    "mixtral": (MixtralConfig, MIXTRAL),
    "qwen3-30b": (Qwen3MoeConfig, QWEN3),
    "small": (OlmoeConfig, SMALL),  # to try the script out
}
H100 = Rates(products=6.5e14, bytes=2e12, calls=6e4)
"""As ``gemq.runtime.device`` measures them."""

ONCE = ("load", "allocate")
"""Stages that do not take longer with more layers, or not in proportion."""
JOBS: dict[str, dict[str, Any]] = {
    "low": {"effort": "low", "widths": (1, 2, 3), "guard": False},
    "routers": {
        "effort": "low",
        "widths": (1, 2, 3),
        "guard": False,
        "distill_epochs": 1,
        "distill_loss": "next_token",
        "distill_parameters": ("routers",),
    },
    "defaults": {"effort": "medium", "candidate_epochs": 2, "reconstruction_epochs": 2, "distill_epochs": 1},
}


def write_model(shape: str, layers: int, out: Path) -> None:
    """A checkpoint of random weights, a file a layer, four written at a time."""
    kind, values = SHAPES[shape]
    config = kind(**{**values, "num_hidden_layers": layers}, **ENDS)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config.save_pretrained(partial)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(builtin_model() / name, partial / name)
    left = dict(model.state_dict())
    shards = []
    for layer in find_structure(model).layers:
        shards.append({name: left.pop(name) for name in list(left) if name.startswith(f"{layer.path}.")})

    def write(numbered: tuple[int, dict[str, Tensor]]) -> dict[str, str]:
        number, shard = numbered
        file = f"model-{number:05d}.safetensors"
        shapes = {name: tensor.shape for name, tensor in hub_state(model, shard).items()}
        _write_random(partial / file, shapes, number)
        return dict.fromkeys(shapes, file)

    with ThreadPoolExecutor(4) as pool:
        index = {name: file for files in pool.map(write, enumerate([*shards, left])) for name, file in files.items()}
    text = json.dumps({"metadata": {}, "weight_map": index})
    (partial / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    partial.rename(out)


def _write_random(path: Path, shapes: dict[str, torch.Size], seed: int) -> None:
    """A safetensors file of bfloat16 tensors, one at a time; other threads run meanwhile."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    max_numel = max(shape.numel() for shape in shapes.values())
    staging = torch.empty(max_numel, dtype=torch.bfloat16, pin_memory=device == "cuda")
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            values = torch.empty(shape.numel(), dtype=torch.bfloat16, device=device)
            values.fill_(1.0) if len(shape) == 1 else values.normal_(std=STD, generator=generator)
            on_host = staging[: shape.numel()].copy_(values)
            file.write(on_host.view(torch.uint8).numpy().data)


def growth(source: Source, chosen: Recipe, true_layers: int, own_windows: bool) -> Callable[[str], float]:
    """How many times longer each stage takes with all layers, by its name.

    In proportion, but for sensitivities, whose work is counted: each layer's changes pass all layers behind it.
    """
    counted = []
    model = source.skeleton()
    structure = find_structure(model)
    layers = len(structure.layers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seq_len = chosen.seq_len or 2048
    for count in (layers, true_layers):
        full_structure = dataclasses.replace(structure, layers=(structure.layers * count)[:count])
        workload = Workload(full_structure, chosen, model.config, seq_len, torch.bfloat16, device)
        counted.append(sensitivity_work(workload).seconds(H100) if chosen.rescale else 1.0)

    def times(stage: str) -> float:
        if stage in ONCE or (stage == "calibration windows" and not own_windows):
            return 1.0
        return counted[1] / counted[0] if stage == "sensitivity" else true_layers / layers

    return times


def extrapolate(rows: list[dict[str, str]], shape: str, job: str, depths: tuple[int, int]) -> dict[str, float]:
    """Seconds of each stage with all layers, from the newest runs with two numbers of layers.

    A row says what it took and what that is times the growth of the stage's work, hence its share of the whole work. A
    stage that takes no longer with more layers counts as it is.
    """
    few, many = (
        {r["stage"]: r for r in rows if (r["shape"], r["job"], r["layers"]) == (shape, job, str(n))} for n in depths
    )
    seconds_by_stage = {}
    for stage in many:
        if stage in ("all", "export") or stage not in few:
            continue
        (a, share_a), (b, share_b) = (
            (float(r["seconds"]), float(r["seconds"]) / float(r["seconds_all_layers"]))
            for r in (few[stage], many[stage])
        )
        slope = (b - a) / (share_b - share_a) if share_b > share_a else 0.0
        seconds_by_stage[stage] = b + max(slope, 0.0) * (1 - share_b)
    return seconds_by_stage


def write_text(path: Path, words: int) -> None:
    """Shuffled words of the built-in texts."""
    vocabulary = " ".join(file.read_text(encoding="utf-8") for file in builtin_texts()).split()
    draw = random.Random(0)
    path.write_text(" ".join(draw.choice(vocabulary) for _ in range(words)), encoding="utf-8")


def recipe(job: str, windows: int, seq_len: int, text: Path) -> Recipe:
    tokens = 2 * windows * seq_len if job == "defaults" else 0
    return Recipe(num_windows=windows, seq_len=seq_len, calibration=(str(text),), total_tokens=tokens, **JOBS[job])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="fewer than the model has; the rest is extrapolated")
    parser.add_argument("--job", default="low", choices=JOBS)
    parser.add_argument("--extrapolate", type=int, nargs=2, metavar="LAYERS", help="from rows of --out; runs nothing")
    parser.add_argument("--num-windows", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--changes", nargs="*", default=[], help="recipe keys, such as guard=false total_tokens=0")
    parser.add_argument("--gpu-memory")
    parser.add_argument("--host-memory")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dir", type=Path, default=Path("/tmp/scale"))
    parser.add_argument("--out", type=Path, default=FILE)
    parser.add_argument("--keep", action="store_true", help="keep the result and the work directory")
    args = parser.parse_args()
    if args.extrapolate:
        stages = extrapolate(read(args.out), args.shape, args.job, tuple(args.extrapolate))
        for name, seconds in {**stages, "all": sum(stages.values())}.items():
            print(f"{name:20} {seconds:8.1f} s")
        return

    true_layers = SHAPES[args.shape][1]["num_hidden_layers"]
    layers = args.layers or true_layers
    model = args.dir / f"{args.shape}-{layers}"
    if not model.exists():
        write_model(args.shape, layers, model)
    text = args.dir / f"text-{args.num_windows * args.seq_len}.txt"
    if not text.exists():
        write_text(
            text, round(1.1 * args.num_windows * args.seq_len)
        )  # two tokens a word: as many again may be asked for
    chosen = recipe(args.job, args.num_windows, args.seq_len, text)
    if args.changes:
        values = dict(change.split("=") for change in args.changes)
        chosen = Recipe.from_dict({**chosen.to_dict(), **{k: _plain(v) for k, v in values.items()}})
    out = args.dir / f"{args.shape}-{layers}-{args.job}-{args.gpu_memory or 'free'}"
    for path in (out, out.with_name(out.name + ".work")):
        shutil.rmtree(path, ignore_errors=True)
    result = gemq.quantize(
        str(model),
        chosen,
        out=out,
        device=args.device,
        gpu_memory=parse_size(args.gpu_memory) if args.gpu_memory else None,
        host_memory=parse_size(args.host_memory) if args.host_memory else None,
        monitor=Monitor(),
    )
    table = Table(title=f"{args.shape}, {layers} of {true_layers} layers, {args.job}")
    for column in ("stage", "seconds", "all layers", "GPU GB", "host GB"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    common = {"shape": args.shape, "layers": layers, "job": args.job}
    common |= {"tokens": sum(result.windows.values()) * result.seq_len}
    common |= {"changes": " ".join(args.changes), "gpu_memory": args.gpu_memory or "", "bound": args.host_memory or ""}
    times = growth(Source.resolve(str(model)), chosen, true_layers, "self" in result.windows)
    total = {"seconds": 0.0, "all": 0.0, "gpu": 0, "host": 0}
    for name, cost in [*result.stages.items(), ("all", None)]:
        if cost is not None:
            all_layers = cost["seconds"] * times(name)
            row = (cost["seconds"], all_layers, cost["peak_gpu_bytes"], cost["peak_host_bytes"])
            total["seconds"] += row[0]
            total["all"] += row[1]
            total["gpu"], total["host"] = max(total["gpu"], row[2]), max(total["host"], row[3])
        else:
            row = (total["seconds"], total["all"], int(total["gpu"]), int(total["host"]))
        table.add_row(name, f"{row[0]:.1f}", f"{row[1]:.1f}", f"{row[2] / 1e9:.2f}", f"{row[3] / 1e9:.2f}")
        names = ("seconds", "seconds_all_layers", "peak_gpu_bytes", "peak_host_bytes")
        waited = {f"waited_{tier.split()[0]}_bytes": count for tier, count in result.spilled_bytes.items()}
        cells = {**common, "stage": name, **dict(zip(names, row, strict=True)), **waited}
        append(args.out, {**cells, "work_bytes": result.work_bytes, **environment()})
    Console().print(table)
    Console().print({name: count for name, count in result.fallbacks.items() if count}, result.gains)
    if args.job != "defaults":
        begin = time.perf_counter()
        command = [sys.executable, "-m", "gemq", "export", str(result.work), "-o", f"{out}-other", "--bits", "2.5"]
        subprocess.run([*command, "--device", args.device, "--quiet"], check=True)
        seconds = time.perf_counter() - begin
        Console().print(f"another budget from the work directory, as a command of its own: {seconds:.1f} s")
        cells = {**common, "stage": "export", "seconds": seconds, "seconds_all_layers": seconds * true_layers / layers}
        append(args.out, {**cells, **environment()})
        shutil.rmtree(f"{out}-other")
    if not args.keep:
        for path in (out, out.with_name(out.name + ".work")):
            shutil.rmtree(path, ignore_errors=True)


def _plain(text: str) -> Any:
    return {"true": True, "false": False}.get(text, text)


if __name__ == "__main__":
    main()
