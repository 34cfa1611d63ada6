"""Cases on packed checkpoints: each is damaged in one or two ways, then read in one of the ways in which users do."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gemq
from fuzz import mutations as m
from fuzz import worker
from gemq.assets import builtin_model, builtin_texts
from gemq.checkpoint.format import CONFIG_KEY, QUANT_METHOD
from gemq.checkpoint.reader import check_checkpoint
from gemq.runtime.safetensors_files import read_json
from support.packed_checkpoints import olmoe_config, write_packed, write_trellis

IDS = torch.arange(3, 35).reshape(2, 16)
LARGE_NUMBER = 1 << 16
"""The vocabulary, which has the largest number of an intact config.json, is smaller."""

KINDS = {"affine": "one", "trellis": "trellis"}
"""Undamaged checkpoint by the kind of its experts' codes."""

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


class Packed:
    """Makes the checkpoints and runs cases on copies of them."""

    name = "packed"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = olmoe_config(vocab_size=4096, num_hidden_layers=3)
        source = folder / "source"
        source.mkdir()
        for name in TOKENIZER:
            shutil.copyfile(builtin_model() / name, source / name)
        self.bases = {
            "one": write_packed(folder / "one", config, source=source),
            "sharded": write_packed(folder / "sharded", config, shard_bytes=250_000, source=source),
        }
        self.bases["trellis"] = write_trellis(folder / "trellis", config, source=source)
        for base, copy in (("one", "unsealed"), ("trellis", "unsealed trellis")):
            self.bases[copy] = Path(shutil.copytree(folder / base, folder / copy))
            values = json.loads((folder / copy / "config.json").read_text())
            del values["gemq_checksums"]
            (folder / copy / "config.json").write_text(json.dumps(values))
        self.logits = {kind: logits(gemq.load(self.bases[base])) for kind, base in KINDS.items()}
        self.text = folder / "text.txt"
        self.text.write_text(builtin_texts()[0].read_text()[:2000])
        self.figures, self.twins = {}, {}
        for kind, base in KINDS.items():
            self._eval(self.bases[base], folder / "eval.json")
            self.figures[kind] = figures(folder / "eval.json")
            twin = folder / f"{base}-twin"
            assert worker.cli(["export", self.bases[base], "--dense", twin, "-q"]) == worker.SAME
            self.twins[kind] = load_file(twin / "model.safetensors")
        self.kind = "affine"  # of the case
        tokenizer = AutoModelForCausalLM.from_pretrained(twin)  # whatever is imported late is imported now
        del tokenizer

    def case(self, seed: int) -> tuple[str, worker.Outcome]:
        """What was done, and how it ended."""
        rng = random.Random(f"packed {seed}")
        base = rng.choice(("one", "one", "sharded", "unsealed", "trellis", "trellis", "unsealed trellis"))
        self.kind = "trellis" if "trellis" in base else "affine"
        directory = m.copied(self.bases[base], self.folder / "case")
        damage = m.pick(rng, DAMAGE)
        done = damage(rng, directory)
        if rng.random() < 0.1:
            with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, struct.error, SafetensorError):
                done += f", {m.pick(rng, DAMAGE)(rng, directory)}"  # if the first left it something to damage
        action = m.pick(rng, ACTIONS)
        if action is Packed.from_pretrained and not reaches_gemq(directory):
            action = Packed.load
        outcome = worker.run(lambda: action(self, directory))
        # without its checksums a checkpoint is like one that another program wrote
        sealed = "unsealed" not in base
        if outcome.kind == worker.CHANGED and sealed and CONFIG_KEY in read_json(directory / "config.json"):
            outcome = worker.Outcome(worker.SILENT)
        return f"{base}: {done}: {action.__name__}", outcome

    def load(self, directory: Path) -> str:
        return self._compared(gemq.load(directory))

    def from_pretrained(self, directory: Path) -> str:
        """What Transformers itself refuses before it asks gemq is a refusal, whatever exception that is."""
        try:
            return self._compared(AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False))
        except gemq.UserError:
            raise
        except Exception as error:
            if any("/gemq/" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
                raise
            raise gemq.UserError("refused by Transformers") from error

    def inspect(self, directory: Path) -> str:
        return worker.cli(["inspect", directory])

    def verify(self, directory: Path) -> str:
        return worker.cli(["inspect", directory, "--verify"])

    def evaluate(self, directory: Path) -> str:
        out = self.folder / "case.json"
        out.unlink(missing_ok=True)
        tokenizer = all(same_file(directory / name, self.bases["one"] / name) for name in TOKENIZER)
        return self._eval(directory, out, lambda: not tokenizer or figures(out) == self.figures[self.kind])

    def generate(self, directory: Path) -> str:
        return worker.cli(["generate", directory, "-p", "The", "--max-new-tokens", 2])

    def dense(self, directory: Path) -> str:
        out = self.folder / "case-twin"
        shutil.rmtree(out, ignore_errors=True)

        def unchanged() -> bool:
            tensors = load_file(out / "model.safetensors")
            twin = self.twins[self.kind]
            return tensors.keys() == twin.keys() and all(torch.equal(tensors[n], t) for n, t in twin.items())

        return worker.cli(["export", directory, "--dense", out, "-q"], unchanged)

    def vllm_reader(self, directory: Path) -> str:
        check_checkpoint(directory)
        return worker.SAME

    def _compared(self, model: Any) -> str:
        return worker.SAME if torch.equal(logits(model), self.logits[self.kind]) else worker.CHANGED

    def _eval(self, directory: Path, out: Path, unchanged: Callable[[], bool] = lambda: True) -> str:
        flags = ["--text", self.text, "--seq-len", 64, "--max-windows", 1, "-q", "--json", out]
        return worker.cli(["eval", directory, *flags], unchanged)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


def figures(file: Path) -> dict[str, Any]:
    values = json.loads(file.read_text())
    del values["model"]
    return values


def same_file(file: Path, reference: Path) -> bool:
    return file.is_file() and file.read_bytes() == reference.read_bytes()


def reaches_gemq(directory: Path) -> bool:
    """Whether ``from_pretrained`` of Transformers asks gemq before it can fail in a way that gemq would refuse.

    Transformers chooses its quantizer by ``quant_method``. If that does not name gemq, no code of gemq runs, and
    Transformers warns and loads the experts at random. Transformers also reads config.json first, and makes a label, a
    layer or a rotary factor for any number there, whatever that takes. ``gemq.load`` refuses both.
    """
    try:
        values = read_json(directory / "config.json")
    except gemq.UserError:
        return False
    quantization = values.get("quantization_config") if isinstance(values, dict) else None
    if not isinstance(quantization, dict) or quantization.get("quant_method") != QUANT_METHOD:
        return False
    paths = [path for path in m.leaves(values) if path[0] != "quantization_config"]
    numbers = [m.parent_of(values, path)[path[-1]] for path in paths]
    return all(abs(number) <= LARGE_NUMBER for number in numbers if isinstance(number, int | float))


ACTIONS: dict[Callable[[Packed, Path], str], int] = {
    Packed.load: 12,
    Packed.from_pretrained: 2,
    Packed.inspect: 2,
    Packed.verify: 1,
    Packed.evaluate: 2,
    Packed.generate: 2,
    Packed.dense: 2,
    Packed.vllm_reader: 1,
}


def weights(rng: random.Random, directory: Path) -> Path:
    return rng.choice(sorted(directory.glob("*.safetensors")))


def config(rng: random.Random, directory: Path) -> str:
    return m.edit_json(rng, directory / "config.json")


def quantization(rng: random.Random, directory: Path) -> str:
    return m.edit_json(rng, directory / "config.json", ("quantization_config",))


def code_kind(rng: random.Random, directory: Path) -> str:
    """Another version, kind of codes or number of state bits."""
    file = directory / "config.json"
    values = json.loads(file.read_text())
    key, options = rng.choice(
        (
            ("format_version", (1, 2, 3, 4, "3")),
            ("codes", ("affine", "trellis", "x", None)),
            ("state_bits", (0, 7, 8, 12, 13, 16, 17, 12.0, "12")),
            ("codebook", ("x",)),
        )
    )
    value = rng.choice(options)
    values["quantization_config"][key] = value
    file.write_text(json.dumps(values))
    return f"config.json: {key} = {value!r}"


def widths(rng: random.Random, directory: Path) -> str:
    """Another number of experts, other widths, exchanged lists."""
    file = directory / "config.json"
    values = json.loads(file.read_text())
    experts = values["quantization_config"]["experts"]
    path = rng.choice(sorted(experts))
    what = rng.choice(("longer", "shorter", "other width", "swap", "path", "projection"))
    if what == "longer":
        for expert_widths in experts[path].values():
            expert_widths.append(2)
    elif what == "shorter":
        for expert_widths in experts[path].values():
            expert_widths.pop()
    elif what == "other width":
        expert_widths = experts[path][rng.choice(("down_proj", "gate_up_proj"))]
        expert_widths[rng.randrange(len(expert_widths))] = rng.choice((1, 1.6, 2, 2.25, 3, 4, 8, 1.0, True, "2"))
    elif what == "swap":
        experts[path]["down_proj"], experts[path]["gate_up_proj"] = (
            *(experts[path]["gate_up_proj"], experts[path]["down_proj"]),
        )
    elif what == "path":
        experts[rng.choice(("model.layers.9.mlp.experts", "model.layers.0.mlp", "model", "x"))] = experts.pop(path)
    else:
        experts[path]["up_proj"] = experts[path].pop("gate_up_proj")
    file.write_text(json.dumps(values))
    return f"widths: {what} {path}"


def checksums(rng: random.Random, directory: Path) -> str:
    values = json.loads((directory / "config.json").read_text())
    if "gemq_checksums" not in values:
        return quantization(rng, directory)
    return m.edit_json(rng, directory / "config.json", ("gemq_checksums",))


def large_number(rng: random.Random, directory: Path) -> str:
    """One size in config.json that takes memory or time."""
    file = directory / "config.json"
    values = json.loads(file.read_text())
    keys = [k for k, v in values.items() if isinstance(v, int) and not isinstance(v, bool)]
    key = rng.choice([*keys, "num_labels", "head_dim", "max_position_embeddings"])
    values[key] = rng.choice((10**4, 10**5, 10**6, 10**7, 10**9, 10**13))
    file.write_text(json.dumps(values))
    return f"config.json: {key} = {values[key]:.0e}"


def config_text(rng: random.Random, directory: Path) -> str:
    return m.spoil_text(rng, directory / "config.json")


def index(rng: random.Random, directory: Path) -> str:
    """The index, which a checkpoint in one file does not have: it gets one that says something."""
    file = directory / "model.safetensors.index.json"
    if not file.exists():
        names = dict.fromkeys(("a", "b"), rng.choice(("model.safetensors", "x.bin", "../one/model.safetensors", "/x")))
        file.write_text(json.dumps({"metadata": {}, "weight_map": names}))
        if rng.random() < 0.7:
            (directory / "model.safetensors").rename(directory / "other.safetensors")
        return f"index: made, names {names['a']}"
    return m.spoil_text(rng, file) if rng.random() < 0.3 else m.edit_json(rng, file)


def header(rng: random.Random, directory: Path) -> str:
    return m.spoil_header(rng, weights(rng, directory))


def huge(rng: random.Random, directory: Path) -> str:
    return m.huge_header(rng, weights(rng, directory))


def data(rng: random.Random, directory: Path) -> str:
    return m.spoil_data(rng, weights(rng, directory))


def tokenizer(rng: random.Random, directory: Path) -> str:
    file = directory / rng.choice(TOKENIZER)
    return m.spoil_text(rng, file) if rng.random() < 0.4 else m.edit_json(rng, file)


def path(rng: random.Random, directory: Path) -> str:
    return m.spoil_path(rng, rng.choice(sorted(directory.iterdir())))


def additions(rng: random.Random, directory: Path) -> str:
    """Files that do not belong to the checkpoint."""
    what = rng.choice(("stale", "pickled", "adapter", "template", "code", "weights name"))
    file = weights(rng, directory)
    if what == "stale":
        tensors = {n: 255 - t if t.dtype == torch.uint8 else t for n, t in load_file(file).items()}
        name = rng.choice(("model-00001-of-00002.safetensors", "zzz.safetensors", "consolidated.safetensors"))
        save_file(tensors, directory / name, {"format": "pt"})
    elif what == "pickled":
        torch.save(load_file(file), directory / "pytorch_model.bin")
        if rng.random() < 0.5:
            file.unlink()
    elif what == "adapter":
        values = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": "x"}
        (directory / "adapter_config.json").write_text(json.dumps(values))
    elif what == "template":
        text = rng.choice(("{{", "{{ messages[0].x.y }}", "{% for x in range(10**9) %}{% endfor %}", "\x1b[2J"))
        (directory / "chat_template.jinja").write_text(text)
    else:
        values = json.loads((directory / "config.json").read_text())
        if what == "code":
            values["auto_map"] = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
            (directory / "code.py").write_text("import os\nos.abort()\n")
        else:
            values["transformers_weights"] = rng.choice(("x.bin", "../one/model.safetensors", file.name, 7, "gone"))
        (directory / "config.json").write_text(json.dumps(values))
    return f"added: {what}"


DAMAGE: dict[Callable[[random.Random, Path], str], int] = {
    config: 14,
    quantization: 8,
    code_kind: 4,
    widths: 6,
    checksums: 3,
    large_number: 8,
    config_text: 5,
    index: 8,
    header: 14,
    huge: 1,
    data: 14,
    tokenizer: 8,
    path: 6,
    additions: 5,
}

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
