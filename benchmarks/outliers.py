"""Writes a variant of a model that computes the same function, bit for bit, and has outliers as large models do.

    python benchmarks/outliers.py MODEL OUT [--seed 0] [--channels 8] [--neurons 2] [--values 0]

Large language models have a few channels whose activations are 10 to 1,000 times the median, which makes them hard to
quantize. Small models have none. The variant gets them by moving powers of two between weights that multiply each
other:

- channels: the weight of a norm, against the columns of all linears that read its output
- neurons: rows of an up projection, against the columns of its down projection
- values: rows of the value projection, against the columns of the attention's output projection

Scaling by powers of two is exact, so the logits in float32 are equal, which is checked. A quantizer that is invariant
to such a rescaling has the same KL on both. Knows the stored names of Llama-like decoders: OLMoE, Mixtral, Qwen,
DeepSeek. The norm in front of the head stays as it is: the head is not quantized, and often shared with the
embeddings.
"""

from __future__ import annotations

import argparse
import math
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from gemq.errors import UserError
from gemq.evaluation.evaluate import open_model
from gemq.runtime.safetensors_files import stored_tensors, weight_files

NORM_READERS = {
    "input_layernorm": ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa"),
    "post_attention_layernorm": ("gate", "shared_expert_gate", "gate_proj", "up_proj", "w1", "w3"),
    "q_a_layernorm": ("q_b_proj",),
    "kv_a_layernorm": ("kv_b_proj",),
}
"""Linears that read the output of each norm of a layer, by the last parts of their names."""

REQUIRED_NORMS = ("input_layernorm", "post_attention_layernorm")
"""Norms that every layer has."""

DOWN_BY_UP = {"up_proj": "down_proj", "w3": "w2"}
"""The down projection that reads the neurons of an up projection."""

OUTPUT = "o_proj"
"""The linear that reads the values of an attention."""

KNOWN_LINEARS = {OUTPUT, *DOWN_BY_UP.values(), *(name for names in NORM_READERS.values() for name in names)}

CHECKED_WINDOWS, CHECKED_TOKENS = 2, 64
"""Number and length of the random windows on which logits are compared."""

Shapes = dict[str, tuple[int, ...]]
"""Shapes of stored tensors by name."""


@dataclass(frozen=True)
class Outliers:
    """Which outliers a variant has. Exponents are of two, and are used in turn.

    Attributes:
        seed: decides which channels, neurons and values become outliers.
        channels: outlier channels of each norm.
        channel_exponents: of these channels.
        neurons: outlier neurons of each up projection, of every expert on its own.
        neuron_exponents: of these neurons.
        values: outlier value channels of each attention.
        value_exponents: of these value channels.
    """

    seed: int = 0
    channels: int = 8
    channel_exponents: tuple[int, ...] = (4, 5, 6, 8)
    neurons: int = 2
    neuron_exponents: tuple[int, ...] = (3, 5, 7)
    values: int = 0
    value_exponents: tuple[int, ...] = (3, 5, 7)

    def draw(self, link: Link) -> Tensor:
        """Return the exponents of a link's units, int64 [size], 0 for units that stay as they are."""
        count, choices = {
            "channels": (self.channels, self.channel_exponents),
            "neurons": (self.neurons, self.neuron_exponents),
            "values": (self.values, self.value_exponents),
        }[link.kind]
        # A seed for each link: exponents do not depend on how the model is divided into files.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {link.name}".encode()))
        units = torch.randperm(link.size, generator=generator)[:count]
        exponents = torch.zeros(link.size, dtype=torch.int64)
        exponents[units] = torch.tensor(choices)[torch.arange(len(units)) % len(choices)]
        return exponents


@dataclass
class Link:
    """Weights that multiply each other through the same units: producers are scaled, consumers are divided.

    Attributes:
        kind: of its units: ``channels``, ``neurons`` or ``values``.
        name: of its first producer.
        size: number of its units.
        producers: tensors whose dimension 0 runs over the units.
        consumers: tensors whose dimension 1 runs over the units.
        producer_units: unit of each row of a producer, -1 for none. None: row i is unit i.
        consumer_units: unit of each column of a consumer. None: column i is unit i.
    """

    kind: str
    name: str
    size: int
    producers: list[str]
    consumers: list[str] = field(default_factory=list)
    producer_units: Tensor | None = None
    consumer_units: Tensor | None = None


def write_variant(model: Path, out: Path, outliers: Outliers, check: bool = True) -> None:
    """Write a variant of a model. The directory appears complete or not at all.

    Args:
        model: directory of the model.
        out: directory of the variant, which must not exist.
        outliers: of the variant.
        check: compare the logits of both in float32, which loads both on the CPU.

    Raises:
        UserError: a tensor's name is unknown, a weight cannot be scaled exactly, or the logits differ.
    """
    if out.exists():
        raise UserError(f"{out} exists: name another directory")
    files = weight_files(model)
    shapes = {name: tensor.spec.shape for name, tensor in stored_tensors(files).items()}
    exponents = plan_exponents(shapes, AutoConfig.from_pretrained(model).get_text_config(), outliers)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".variant-") as directory:
        variant = Path(directory) / out.name
        shutil.copytree(model, variant, ignore=shutil.ignore_patterns("*.safetensors"))
        for file in files:
            tensors = {name: rescale(name, tensor, exponents) for name, tensor in load_file(file).items()}
            save_file(tensors, variant / file.name, metadata={"format": "pt"})
        if check and not has_equal_logits(model, variant):
            raise UserError(f"{model} with outliers has other logits: its norms or linears work in an unknown way")
        variant.rename(out)


def plan_exponents(shapes: Shapes, config: Any, outliers: Outliers) -> dict[tuple[str, int], Tensor]:
    """Return by tensor and dimension the exponents of two by which its slices are scaled.

    Args:
        shapes: of all tensors of the model.
        config: the text configuration of the model.
        outliers: of the variant.

    Raises:
        UserError: the model has no layers, or a layer has a linear of unknown name.
    """
    layers: dict[str, Shapes] = {}
    for name, shape in shapes.items():
        if match := re.match(r"(?:.*\.)?layers\.\d+\.", name):
            layers.setdefault(match[0], {})[name] = shape
    if not layers:
        raise UserError("no tensor is named 'layers.N.': only Llama-like decoders can get outliers")
    exponents: dict[tuple[str, int], Tensor] = {}
    for prefix, layer in layers.items():
        _check_names(prefix, layer)
        for link in [*_norm_links(prefix, layer), *_neuron_links(layer), *_value_links(layer, config)]:
            drawn = outliers.draw(link)
            drawn = torch.cat([drawn, drawn.new_zeros(1)])  # unit -1 reads the zero
            for name in link.producers:
                exponents[name, 0] = drawn[:-1] if link.producer_units is None else drawn[link.producer_units]
            for name in link.consumers:
                exponents[name, 1] = -(drawn[:-1] if link.consumer_units is None else drawn[link.consumer_units])
    return exponents


def rescale(name: str, tensor: Tensor, exponents: dict[tuple[str, int], Tensor]) -> Tensor:
    """Return a stored tensor with its slices scaled. Raises UserError where its dtype cannot hold the result."""
    for dim in range(tensor.dim()):
        if (name, dim) not in exponents:
            continue
        factors = torch.tensor([math.ldexp(1.0, e) for e in exponents[name, dim].tolist()], dtype=torch.float64)
        shape = [1] * tensor.dim()
        shape[dim] = -1
        exact = tensor.double() * factors.view(shape)
        tensor = exact.to(tensor.dtype)
        if not torch.equal(tensor.double(), exact):
            raise UserError(f"{name} cannot be scaled exactly in {tensor.dtype}: give smaller exponents")
    return tensor.contiguous()


@torch.no_grad()
def has_equal_logits(model: Path, variant: Path) -> bool:
    """Return whether two models have the same float32 logits, bit for bit, on random windows."""
    logits = []
    for path in (model, variant):
        opened = open_model(str(path), "float32", "cpu").model
        generator = torch.Generator().manual_seed(0)
        vocabulary = opened.config.get_text_config().vocab_size
        ids = torch.randint(vocabulary, (CHECKED_WINDOWS, CHECKED_TOKENS), generator=generator)
        logits.append(opened(ids).logits)
    return torch.equal(*logits)


def _leaf(name: str) -> str:
    """The last part of a module's name: ``q_proj`` of ``layers.0.self_attn.q_proj.weight``."""
    return name.split(".")[-2]


def _check_names(prefix: str, layer: Shapes) -> None:
    """Raises UserError for a layer whose linears or norms have unknown names."""
    for name, shape in layer.items():
        if len(shape) > 1 and not (len(shape) == 2 and name.endswith(".weight") and _leaf(name) in KNOWN_LINEARS):
            raise UserError(f"{name} is unknown: add the norm that it reads to NORM_READERS of outliers.py")
    for norm in REQUIRED_NORMS:
        if f"{prefix}{norm}.weight" not in layer:
            raise UserError(f"{prefix}{norm}.weight does not exist: the norms of this model have unknown names")


def _norm_links(prefix: str, layer: Shapes) -> Iterator[Link]:
    """A link from each norm of a layer to the linears that read it. ``prefix``: of the layer's names."""
    for name, shape in layer.items():
        norm = _leaf(name)
        if norm not in NORM_READERS:
            continue
        readers = [n for n, s in layer.items() if len(s) == 2 and _leaf(n) in NORM_READERS[norm]]
        yield Link("channels", name, shape[0], [name], readers)


def _neuron_links(layer: Shapes) -> Iterator[Link]:
    """A link from each up projection of a layer to its down projection."""
    for name, shape in layer.items():
        up = _leaf(name)
        if up in DOWN_BY_UP and len(shape) == 2:
            module = name.removesuffix(f"{up}.weight")
            yield Link("neurons", name, shape[0], _with_bias(name, layer), [f"{module}{DOWN_BY_UP[up]}.weight"])


def _value_links(layer: Shapes, config: Any) -> Iterator[Link]:
    """A link from the value rows of each attention of a layer to the columns of its output projection.

    Heads that share a value head share its exponents. With a compressed cache (DeepSeek) ``kv_b_proj`` holds, for each
    head, rows of its keys and then rows of its values.
    """
    for name, shape in layer.items():
        if _leaf(name) != OUTPUT or len(shape) != 2:
            continue
        module, columns = name.removesuffix(f"{OUTPUT}.weight"), shape[1]
        values, compressed = f"{module}v_proj.weight", f"{module}kv_b_proj.weight"
        if values in layer:
            head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            size = layer[values][0]
            by_head = torch.arange(size).view(-1, head_size)
            units = by_head.repeat_interleave(columns // size, dim=0).flatten()
            yield Link("values", values, size, _with_bias(values, layer), [name], consumer_units=units)
        elif compressed in layer:
            by_head = torch.arange(columns).view(-1, config.v_head_dim)
            keys = torch.full((len(by_head), config.qk_nope_head_dim), -1)
            units = torch.cat([keys, by_head], dim=1).flatten()
            yield Link("values", compressed, columns, _with_bias(compressed, layer), [name], producer_units=units)


def _with_bias(name: str, layer: Shapes) -> list[str]:
    """A linear's weight, and its bias if it has one, which is scaled with the rows of the weight."""
    bias = name.removesuffix("weight") + "bias"
    return [name, bias] if bias in layer else [name]


def main() -> None:
    """Writes a variant as the command line says."""
    defaults = Outliers()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    for kind, described in (
        ("channel", "outlier channels of each norm"),
        ("neuron", "outlier neurons of each up projection"),
        ("value", "outlier value channels of each attention"),
    ):
        parser.add_argument(f"--{kind}s", type=int, default=getattr(defaults, f"{kind}s"), help=described)
        default = getattr(defaults, f"{kind}_exponents")
        parser.add_argument(f"--{kind}-exponents", type=int, nargs="+", default=default, help="of two, used in turn")
    parser.add_argument("--no-check", action="store_true", help="do not compare the logits of both models")
    arguments = vars(parser.parse_args())
    model, out, no_check = (arguments.pop(name) for name in ("model", "out", "no_check"))
    keys: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    try:
        write_variant(model, out, Outliers(**keys), check=not no_check)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(f"{out}: the function of {model}, with outliers" + ("" if no_check else ", logits equal bit for bit"))


if __name__ == "__main__":
    main()
