"""Cases on what a job reads beside its model: work directories, recipes, allocations and calibration files."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fuzz import mutations as m
from fuzz import worker
from fuzz.source import write_source
from gemq.assets import builtin_texts


class WorkDirectories:
    """Makes one finished job and runs cases on copies of its work directory and of its input files."""

    name = "work"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_source(folder / "model")
        self.text = folder / "text.txt"
        self.text.write_text(builtin_texts()[0].read_text()[:3000])
        self.base = folder / "base.work"
        self.case_directory = folder / "case"
        quantize = ["quantize", self.model, "-o", folder / "base", "--work", self.base, *self._job()]
        export = ["export", self.base, "-o", folder / "export", "--bits", "1.5", "-q"]
        for command in (quantize, export):
            assert worker.prepare(lambda command=command: worker.cli(command)) == worker.SAME
        self.quantized = (folder / "base" / "model.safetensors").read_bytes()
        self.exported = (folder / "export" / "model.safetensors").read_bytes()

    def case(self, seed: int) -> tuple[str, worker.Outcome]:
        """What was done, and how it ended."""
        rng = random.Random(f"work {seed}")
        m.copied(self.base, self.case_directory)
        for name in ("out", "out.work"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        damage = m.pick(rng, DAMAGE)
        done, arguments, expected = damage(self, rng)
        outcome = worker.run(lambda: worker.cli(arguments, lambda: self._is_same(expected)))
        return f"{done}: {' '.join(map(str, arguments[:1]))}", outcome

    def directory(self, rng: random.Random) -> tuple[str, list[Any], bytes]:
        """A damaged work directory: exported from, or gone on with."""
        files = sorted(f for f in self.case_directory.rglob("*") if f.is_file())
        file = rng.choice(files)
        kinds = [m.spoil_path, m.spoil_text]
        if file.suffix == ".json":
            kinds += [m.edit_json] * 4
        if file.suffix == ".safetensors":
            kinds += [m.spoil_header, m.spoil_header, m.spoil_data, m.spoil_data]
        if file.stat().st_size == 0:
            kinds = [m.spoil_path]
        done = f"{file.relative_to(self.case_directory).parent}/{rng.choice(kinds)(rng, file)}"
        if rng.random() < 0.5:
            command = ["export", self.case_directory, "-o", self.folder / "out", "--bits", "1.5", "-q"]
            return done, command, self.exported
        command = ["quantize", self.model, "-o", self.folder / "out", "--work", self.case_directory, "--resume"]
        return done, [*command, *self._job()], self.quantized

    def recipe(self, rng: random.Random) -> tuple[str, list[Any], bytes]:
        """A recipe with odd values, or odd YAML."""
        file = self.folder / "recipe.yaml"
        keys = (
            "bits",
            "size",
            "num_windows",
            "seq_len",
            "widths",
            "group_size",
            "dense_bits",
            "effort",
            "seed",
            "calibration",
        )
        keys += (
            "allocate",
            "progressive",
            "dtype",
            "reconstruction_epochs",
            "distill_epochs",
            "micro_batch_tokens",
            "guard",
        )
        values = {key: rng.choice((*m.ODD_VALUES, "2GB", [1, 2], [2.0], "low")) for key in rng.sample(keys, 2)}
        file.write_text(rng.choice((yaml.safe_dump(values), json.dumps(values))))
        done = f"recipe {values}"[:200]
        if rng.random() < 0.3:
            text = rng.choice(
                (bomb(), "- " * 20_000, "a: &a [*a]", "{" * 5000, "!!python/object/apply:os.abort []", "a: *b")
            )
            file.write_text(text)
            done = f"recipe {text[:30]}"
        elif rng.random() < 0.3:
            done = m.spoil_text(rng, file)
        command = ["quantize", self.model, "-o", self.folder / "out", "--recipe", file, *self._job()]
        return done, command, self.quantized

    def allocation(self, rng: random.Random) -> tuple[str, list[Any], bytes]:
        """A damaged allocation."""
        file = self.folder / "allocation.json"
        original = next(self.base.rglob("allocation*.json"))
        m.remove(file)
        shutil.copyfile(original, file)
        done = rng.choice((m.edit_json, m.edit_json, m.edit_json, m.spoil_text, m.spoil_path))(rng, file)
        command = ["export", self.case_directory, "-o", self.folder / "out", "--allocation", file, "-q"]
        return done, command, self.quantized

    def calibration(self, rng: random.Random) -> tuple[str, list[Any], bytes]:
        """A damaged calibration text, plain or as JSONL."""
        file = self.folder / rng.choice(("calib.txt", "calib.jsonl"))
        m.remove(file)
        text = self.text.read_text()
        if file.suffix == ".jsonl":
            rows = [{"text": line, "id": str(number)} for number, line in enumerate(text.splitlines())]
            for _ in range(rng.choice((0, 1, 1, 5))):
                m.change_json(rng, rows)
            text = "\n".join(map(json.dumps, rows))
        file.write_text(text)
        what: Callable[[random.Random, Path], str] = rng.choice((m.spoil_text, m.spoil_text, m.spoil_path, nothing))
        done = what(rng, file)
        command = ["quantize", self.model, "-o", self.folder / "out", *self._job()]
        return done, [*command[:-1], file], self.quantized

    def _job(self) -> list[Any]:
        flags = ["--effort", "low", "--num-windows", 4, "--seq-len", 32, "--device", "cpu", "-q"]
        return [*flags, "--calibration", self.text]

    def _is_same(self, expected: bytes) -> bool:
        weights = self.folder / "out" / "model.safetensors"
        return weights.exists() and weights.read_bytes() == expected


def bomb() -> str:
    """YAML whose aliases stand for 9^9 values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    return "\n".join(lines)


def nothing(rng: random.Random, file: Path) -> str:
    return file.name


DAMAGE: dict[Callable[[WorkDirectories, random.Random], tuple[str, list[Any], bytes]], int] = {
    WorkDirectories.directory: 5,
    WorkDirectories.recipe: 3,
    WorkDirectories.allocation: 2,
    WorkDirectories.calibration: 3,
}
