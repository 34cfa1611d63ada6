"""Cases on full-precision models: each is damaged, then planned for, quantized or evaluated.

A source carries no checksums, so that other weights or another configuration may well give another result.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from fuzz import mutations as m
from fuzz import worker
from fuzz.packed import TOKENIZER, config, config_text, data, header, huge, index, large_number, path, tokenizer
from gemq.assets import builtin_model, builtin_texts
from support.packed_checkpoints import olmoe_config


class Sources:
    """Makes the models and runs cases on copies of them."""

    name = "source"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bases = {"one": write_source(folder / "one"), "sharded": write_source(folder / "sharded", "300KB")}
        self.text = folder / "text.txt"
        self.text.write_text(builtin_texts()[0].read_text()[:3000])
        # CHANGED, since there is nothing to compare with yet
        assert worker.prepare(lambda: self.quantize(self.bases["one"])) == worker.CHANGED
        self.expected = (folder / "out" / "model.safetensors").read_bytes()
        assert worker.prepare(lambda: self.evaluate(self.bases["one"])) == worker.SAME

    expected = b""

    def case(self, seed: int) -> tuple[str, worker.Outcome]:
        """What was done, and how it ended."""
        rng = random.Random(f"source {seed}")
        base = rng.choice(("one", "sharded"))
        directory = m.copied(self.bases[base], self.folder / "case")
        done = m.pick(rng, DAMAGE)(rng, directory)
        action = m.pick(rng, ACTIONS)
        return f"{base}: {done}: {action.__name__}", worker.run(lambda: action(self, directory))

    def plan(self, directory: Path) -> str:
        return worker.cli(["plan", directory, *self._job()])

    def quantize(self, directory: Path) -> str:
        out = self.folder / "out"
        for leftover in (out, self.folder / "out.work"):
            shutil.rmtree(leftover, ignore_errors=True)
        weights = out / "model.safetensors"
        unchanged = lambda: weights.exists() and weights.read_bytes() == self.expected
        return worker.cli(["quantize", directory, "-o", out, "-q", *self._job()], unchanged)

    def evaluate(self, directory: Path) -> str:
        return worker.cli(["eval", directory, "--text", self.text, "--seq-len", 64, "--max-windows", 1, "-q"])

    def _job(self) -> list[object]:
        return ["--effort", "low", "--num-windows", 4, "--seq-len", 32, "--calibration", self.text, "--device", "cpu"]


def write_source(directory: Path, shard_size: str = "50GB") -> Path:
    """A small OLMoE of random weights with the built-in model's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(olmoe_config(vocab_size=4096), dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size=shard_size)
    for name in TOKENIZER:
        shutil.copyfile(builtin_model() / name, directory / name)
    return directory


ACTIONS: dict[Callable[[Sources, Path], str], int] = {Sources.plan: 2, Sources.quantize: 4, Sources.evaluate: 1}

DAMAGE: dict[Callable[[random.Random, Path], str], int] = {
    config: 16,
    large_number: 6,
    config_text: 4,
    index: 6,
    header: 14,
    huge: 1,
    data: 8,
    tokenizer: 8,
    path: 6,
}
