"""What bad input gets: one line that says what is wrong and what to do, exit code 2, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gemq.assets import builtin_model, builtin_texts
from gemq.pipeline.workdir import WorkDir
from support.cli import BUILTIN_TOKENS, SMALL, Finished, Ran, add_tokenizer, contents, gemq, make_tiny_model

LOW = ("--effort", "low", "--num-windows", "4", "--seq-len", "32")


def check_line(ran: Ran, *words: str) -> str:
    """One line, for people: no traceback, not too long, with ``words`` in it."""
    assert ran.code == 2, (ran.out, ran.err)
    assert ran.err.startswith("gemq: "), ran.err
    assert ran.err.endswith("\n")
    assert ran.err.count("\n") == 1, ran.err
    assert len(ran.err) < 600, ran.err
    for word in words:
        assert word in ran.err, ran.err
    assert ran.out == ""
    return ran.err


@pytest.fixture
def cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory, beside which tests keep what they need."""
    cwd = tmp_path / "here"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    return cwd


def refused(cwd: Path, *arguments: object, words: tuple[str, ...]) -> str:
    if arguments[0] == "quantize":  # should it not be refused, it fails within seconds
        arguments = ("quantize", "--effort", "low", "--num-windows", 4, *arguments[1:])
    contents_before = contents(cwd.parent)
    line = check_line(gemq(*arguments), *words)
    assert list(cwd.iterdir()) == []
    assert contents(cwd.parent) == contents_before
    return line


# Flags and recipes


@pytest.mark.sample
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bits", 0.5], ("0.5 bits", "give --bits from 1 to 3")),
        (["--bits", 9], ("9 bits", "give --bits from 1 to 4")),
        (["--bits", 5], ("5 bits", "give --bits from 1 to 4", "--widths 1,1.6,2,3,4,8")),
        (["--bits", 3.5, "--widths", "1,2"], ("3.5 bits", "from 1 to 2")),
        (["--bits", "two"], ("--bits", "gemq quantize --help")),
        (["--bits", 2, "--size", "3MB"], ("bits and size", "only one")),
        (["--stored-bits", 2, "--size", "3MB"], ("stored_bits and size", "only one")),
        (["--size", "1MB"], ("--size 1MB is too small", "at least 1.95MB")),
        (["--size", "lots"], ("'lots'", "12GB")),
        (["--stored-bits", 1.1], ("1.1 stored bits", "at least 1.125")),
        (["--stored-bits", 9], ("9 stored bits", "at most 4.125")),
        (["--seq-len", 5000], ("5000", "at most 1024")),
        (["--seq-len", 1], ("seq_len cannot be 1", "at least 2")),
        (["--num-windows", 0], ("windows cannot be 0",)),
        (["--seed", -1], ("seed cannot be -1",)),
        (["--widths", "2,5"], ("no width", "5", "1, 1.6, 2, 3, 4, 8")),
        (["--group-size", 100], ("100", "power of two")),
        (["--dense-bits", 5], ("5", "choose 2, 3, 4, 8, or 16")),
        (["--allocate", "best"], ("'best'", "global, uniform")),
        (["--effort", "heroic"], ("'heroic'", "low")),
        (["--dtype", "float16"], ("'float16'", "bfloat16")),
        (["--device", "tpu"], ("'tpu'", "cpu or cuda")),
        (["--revision", "main"], ("--revision", "local directory")),
        (["--bogus"], ("--bogus", "gemq quantize --help")),
        (["--calibration", "missing.txt"], ("missing.txt does not exist",)),
        (["--calibration", "self", "--calibration", "self"], ("self is given twice",)),
        (["--recipe", "missing.yaml"], ("missing.yaml", "No such file", "YAML")),
        (["--allocation", "missing.json"], ("missing.json", "allocation.json")),
        (["--work", "x"], ("x", "--work")),
        (["--work", "x/work"], ("x", "--work")),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_flags(cwd, flags, words):
    refused(cwd, "quantize", builtin_model(), "-o", "x", *flags, words=words)


def test_no_gpu(cwd):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused(cwd, "quantize", builtin_model(), "-o", "x", "--device", "cuda", words=("cuda", "--device cpu"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bitz: 2\n", ("unknown key 'bitz'", "did you mean 'bits'")),
        ("colour: 2\n", ("unknown key 'colour'", "docs/recipe.md lists the keys")),
        ("num_windows: many\n", ("num_windows cannot be 'many'", "int")),
        ("reconstruct: 1\n", ("reconstruct cannot be 1", "bool")),
        ("bits: [2]\n", ("bits cannot be [2]", "float")),
        ("widths: [1, 5]\n", ("no width 5",)),
        ("bits: 2\nsize: 3MB\n", ("bits and size", "only one")),
        ("quantizer: awq\n", ("'awq'", "gptq, rtn")),
        ("dampening: -1\n", ("dampening", "from 0 up")),
        ("- bits\n", ("holds no keys", "bits: 2.0")),
        (": : :\n- [", ("not valid YAML", "bits: 2.0")),
        (b"\xff\xfe\x00", ("not a text file", "YAML")),
    ],
)
def test_recipe_files(cwd, tmp_path, text, words):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(cwd, "quantize", builtin_model(), "-o", "x", "--recipe", path, words=words)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("is empty", "text")),
        (b" \n\n ", ("is empty", "text")),
        (b"\0\1\2" * 100, ("binary", "text file")),
        (b"caf\xe9 au lait " * 100, ("not UTF-8", "byte 3")),
        (b"far too short", ("tokens, fewer than a window of 1024", "--seq-len")),
    ],
)
def test_calibration_files(cwd, tmp_path, content, words):
    path = tmp_path / "calib.txt"
    path.write_bytes(content)
    refused(cwd, "quantize", builtin_model(), "-o", "x", "--calibration", path, words=("calib.txt", *words))
    refused(cwd, "eval", builtin_model(), "--text", path, "--seq-len", 1024, words=("calib.txt", *words))


def test_other_calibration_sources(cwd, tmp_path, monkeypatch):
    lines = tmp_path / "calib.jsonl"
    lines.write_text('{"text": "good"}\n{"text": bad}\n')
    arguments = ("quantize", builtin_model(), "-o", "x", "--calibration")
    refused(cwd, *arguments, lines, words=("calib.jsonl line 2 is not JSON",))
    refused(cwd, *arguments, tmp_path, words=("is a directory",))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(cwd, *arguments, "owner/texts", words=("owner/texts", "pip install datasets"))


def edited(change: Callable[[list[list[Any]]], None]) -> str:
    widths: list[list[Any]] = [[2] * 16 for _ in range(6)]
    change(widths)
    return json.dumps({"widths": widths})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (edited(lambda w: w[2].pop()), ("layer 2 has 16 experts, not 15",)),
        (edited(lambda w: w.pop()), ("5 layers, the model 6",)),
        (edited(lambda w: w[1].__setitem__(3, 5)), ("layer 1, expert 3", "5", "choose from 1, 1.6, 2, 3")),
        (edited(lambda w: w[1].__setitem__(3, 8)), ("layer 1, expert 3", "8", "choose from 1, 1.6, 2, 3")),
        (edited(lambda w: w[1].__setitem__(3, [2, 5])), ("layer 1, expert 3", "[2, 5]", "two in brackets")),
        (edited(lambda w: w[1].__setitem__(3, [2, 3, 1])), ("layer 1, expert 3", "[2, 3, 1]", "two in brackets")),
        ("[1, 2]", ('"widths"',)),
        ("{", ("not valid JSON",)),
    ],
)
def test_allocation_files(cwd, tmp_path, text, words):
    path = tmp_path / "allocation.json"
    path.write_text(text)
    refused(cwd, "quantize", builtin_model(), "-o", "x", "--allocation", path, words=("allocation.json", *words))


# Models


def change_config(path: Path, **values: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def _dense(path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=4096, **sizes)).save_pretrained(path)
    add_tokenizer(path)


def _unknown_experts(path: Path) -> None:
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    model = GraniteMoeForCausalLM(GraniteMoeConfig(vocab_size=4096, **sizes, **experts))
    model.model.layers[0].block_sparse_moe.experts = None
    model.save_pretrained(path)
    add_tokenizer(path)


def _odd_columns(path: Path) -> None:
    make_tiny_model(path, intermediate_size=24)


def _cut(path: Path) -> None:
    file = make_tiny_model(path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _pickled(path: Path) -> None:
    (make_tiny_model(path) / "model.safetensors").rename(path / "pytorch_model.bin")


def _without_tokenizer(path: Path) -> None:
    for file in make_tiny_model(path).glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, ("does not exist", "org/name")),
        (lambda path: path.mkdir(), ("no config.json", "directory")),
        (lambda path: path.write_text("hello"), ("no config.json", "directory")),
        (_dense, ("LlamaForCausalLM has no experts", "GPTQ or AWQ")),
        (_odd_columns, ("down_proj", "24 inputs")),
        (_pickled, ("no safetensors weights", "save_pretrained")),
        (_cut, ("model.safetensors", "copy the checkpoint again")),
        (_without_tokenizer, ("no tokenizer", "copy")),
        (
            lambda path: change_config(make_tiny_model(path), quantization_config={"quant_method": "gptq", "bits": 4}),
            ("quantized already (gptq)", "full-precision"),
        ),
        (
            lambda path: change_config(make_tiny_model(path), model_type="nonesuch"),
            ("'nonesuch'", "upgrade Transformers"),
        ),
        (lambda path: (make_tiny_model(path) / "config.json").write_text("{"), ("configuration", "copy")),
    ],
    ids=lambda value: "" if callable(value) else value[0],
)
def test_models(cwd, tmp_path, make, words):
    model = tmp_path / "model"
    make(model)
    refused(cwd, "quantize", model, "-o", "x", *LOW, words=words)


def test_missing_tensors(cwd, tmp_path):
    """Transformers would make random ones up. It takes loading to know, so a lock has been taken by then."""
    from safetensors.torch import load_file, save_file

    model = make_tiny_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors.pop("model.layers.1.mlp.gate.weight")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    refused(
        cwd,
        *("quantize", model, "-o", "x", *LOW, "-q"),
        words=("lacks 1 of the model's tensors", "layers.1.mlp.gate", "copy"),
    )


def test_experts_that_are_not_understood(cwd, tmp_path, monkeypatch):
    """They are named, rather than left unquantized in silence."""
    from transformers.models.olmoe import modeling_olmoe

    model = make_tiny_model(tmp_path / "model")

    class StrangeExperts(torch.nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.weights = torch.nn.Parameter(torch.zeros(4, 32, 32))

    monkeypatch.setattr(modeling_olmoe, "OlmoeExperts", StrangeExperts)
    refused(
        cwd, "quantize", model, "-o", "x", *LOW, words=("model.layers.0.mlp.experts", "StrangeExperts", "supported")
    )


def test_packed_checkpoints_are_no_models_to_quantize(cwd, finished: Finished):
    refused(cwd, "quantize", finished.out, "-o", "x", words=("quantized already (gemq)", "full-precision"))


# Outputs and work directories


def test_output_that_exists(cwd, tmp_path, finished: Finished):
    existing = tmp_path / "taken"
    existing.mkdir()
    (existing / "precious.txt").write_text("mine")
    words = ("exists", "name another output")
    for out in (existing, existing / "precious.txt", finished.model):
        refused(cwd, "quantize", builtin_model(), "-o", out, words=words)
        refused(cwd, "export", finished.work, "-o", out, "--bits", 2, words=words)
        refused(cwd, "quantize", builtin_model(), "-o", out, "--resume", words=words)
    refused(cwd, "export", finished.out, "--dense", existing, words=("exists",))
    refused(cwd, "demo", "-o", existing, words=("exists",))


@pytest.mark.parametrize("out", ["/proc/gemq/x", "/sys/gemq-x"])
def test_read_only_output(cwd, finished: Finished, out):
    refused(cwd, "quantize", builtin_model(), "-o", out, words=("cannot write", "name a"))
    refused(cwd, "quantize", builtin_model(), "-o", out, "--work", "w", words=("cannot write", "name a"))
    refused(cwd, "quantize", builtin_model(), "-o", "x", "--work", out, words=("cannot write", "name a"))
    refused(cwd, "export", finished.work, "-o", out, "--bits", 1.5, words=("cannot write", "name a"))
    refused(cwd, "inspect", finished.out, "--json", f"{out}.json", words=("cannot write", "name a"))
    refused(cwd, "quantize", builtin_model(), "-o", "x", "--json", f"{out}.json", words=("cannot write", "name a"))


def test_wrong_work_directories(cwd, tmp_path, finished: Finished, work):
    directory = tmp_path / "other"
    directory.mkdir()
    (directory / "thesis.txt").write_text("mine")
    quantize = ("quantize", builtin_model(), "-o", "x", "--work")
    refused(cwd, *quantize, directory, words=("not a work directory", "--work"))
    refused(cwd, *quantize, directory, "--resume", words=("not a work directory", "--work"))
    refused(cwd, *quantize, directory / "thesis.txt", words=("not a directory", "--work"))
    refused(cwd, *quantize, work, words=("exists", "--resume", "delete it", "--work"))
    for path in (directory, tmp_path / "nowhere", finished.out):
        refused(cwd, "export", path, "-o", "x", words=("not a work directory", "OUT.work"))
    refused(cwd, "export", work, words=("-o OUT",))
    refused(cwd, "export", work, "-o", "x", "--dense", "y", words=("--dense", "leave -o out"))
    refused(cwd, "export", finished.out, "--dense", "y", "--bits", 2, words=("--dense", "--bits"))
    refused(cwd, "export", work, "--dense", "y", words=("no readable config.json", "gemq wrote"))


def test_export_beyond_the_ladder(cwd, finished: Finished, work):
    refused(cwd, "export", work, "--curve", "-o", "x", words=("--curve", "remove -o"))
    refused(cwd, "export", work, "--curve", "--allocate", "random", words=("random", "layerwise"))
    refused(cwd, "export", work, "-o", "x", "--bits", 3.5, words=("3.5 bits", "from 1 to 3"))
    refused(cwd, "export", work, "-o", "x", "--bits", 0.9, words=("0.9 bits", "from 1 to 3"))
    refused(cwd, "export", work, "-o", "x", "--size", "1MB", words=("--size 1MB is too small", "1.9"))
    job = json.loads((work / "job.json").read_text())
    (work / "job.json").write_text(json.dumps({**job, "model": "/gone"}))
    refused(cwd, "export", work, "-o", "x", "--bits", 2, words=("/gone", "is gone", "put it back"))


def test_a_work_directory_in_use(cwd, tmp_path, tiny_model):
    path = tmp_path / "w"
    with WorkDir(path, resume=False):
        arguments = ("quantize", tiny_model, "-o", "x", "--work", path, *LOW, "-q")
        refused(cwd, *arguments, "--resume", words=("in use by another", "wait", "--work"))
    assert gemq(*arguments, "--resume").code == 0


def test_full_disk_is_noticed_before_anything_is_computed(cwd, finished: Finished, work, monkeypatch):
    full = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    words = ("GB free", "free some space")
    refused(cwd, "quantize", builtin_model(), "-o", "x", *SMALL, words=words)
    refused(cwd, "export", work, "-o", "x", "--bits", 2, words=words)


def test_disk_that_fills_up(cwd, tmp_path, tiny_model, monkeypatch):
    """At any write: one line, no half-written file, and with space again ``--resume`` gives the same bytes."""
    import safetensors.torch

    real, calls = safetensors.torch.save_file, []
    arguments = ("quantize", tiny_model, *LOW, "-q", "--work", tmp_path / "work")
    assert gemq("quantize", tiny_model, *LOW, "-q", "-o", tmp_path / "expected").code == 0

    def save_file(tensors: Any, path: Path, **options: Any) -> None:
        calls.append(path)
        if len(calls) % 2:
            real({name: t[:1] for name, t in tensors.items() if t.dim()}, path, **options)  # some of it arrived
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(tensors, path, **options)

    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    monkeypatch.setattr("gemq.checkpoint.save.save_file", save_file)
    for attempt in range(20):
        ran = gemq(*arguments, "-o", "x", *(["--resume"] if attempt else []))
        if ran.code == 0:
            break
        check_line(ran, "the disk is full while writing", "free some space", "--resume")
        assert not [p for p in [*tmp_path.rglob("*.tmp"), *tmp_path.rglob("*.partial")] if p]
        assert not Path("x").exists()
    assert attempt >= 4
    assert contents(cwd / "x") == contents(tmp_path / "expected")


def test_a_write_that_the_system_refuses(cwd, tiny_model):
    """The real thing, through safetensors' own writer: files may not grow beyond 20 kB."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        ran = gemq("quantize", tiny_model, "-o", "x", *LOW, "-q")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_line(ran, "cannot write", "File too large")
    assert not Path("x").exists()
    assert not list(cwd.rglob("*.tmp"))


# eval, generate, inspect


def test_eval_and_generate(cwd, tmp_path, finished: Finished):
    a, b = tmp_path / "a" / "text.txt", tmp_path / "b" / "text.md"
    for path in (a, b):
        path.parent.mkdir()
        shutil.copy(builtin_texts()[0], path)
    model = finished.out
    refused(cwd, "eval", model, "--text", a, "--text", b, words=("share the stem 'text'", "rename"))
    refused(cwd, "eval", a.parent, words=("no config.json", "directory"))
    refused(cwd, "eval", tmp_path / "nothing", words=("does not exist",))
    refused(cwd, "eval", model, "--seq-len", 2000, words=("2000", "at most 1024"))
    refused(cwd, "eval", model, "--seq-len", 1, words=("1", "at least 2"))
    refused(cwd, "eval", model, "--max-windows", 0, words=("--max-windows 0", "at least 1"))
    refused(cwd, "eval", model, "--dtype", "int8", words=("'int8'", "float32"))
    refused(cwd, "eval", model, "--text", "missing.txt", words=("missing.txt does not exist",))
    refused(cwd, "eval", model, "--reference", model, words=("packed checkpoint", "full-precision"))
    refused(cwd, "generate", model, "-p", "a", "--max-new-tokens", 0, words=("--max-new-tokens", "minimum is 1"))
    refused(cwd, "generate", model, "-p", "a", "--temperature", -1, words=("--temperature", "0 or more"))
    refused(cwd, "generate", model, words=("-p", "gemq generate --help"))
    refused(cwd, "generate", tmp_path / "nothing", "-p", "a", words=("does not exist",))
    for path in (finished.model, tmp_path / "nothing", a):
        refused(cwd, "inspect", path, words=("gemq",))
    refused(cwd, "plan", tmp_path / "nothing", words=("does not exist",))


def test_reference_with_another_vocabulary(cwd, tmp_path, finished: Finished):
    reference = make_tiny_model(tmp_path / "other", vocab_size=BUILTIN_TOKENS)
    tokenizer = json.loads((reference / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[tokens[0]], vocabulary[tokens[1]] = vocabulary[tokens[1]], vocabulary[tokens[0]]
    (reference / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(
        cwd,
        "eval",
        finished.out,
        "--reference",
        reference,
        words=("another vocabulary", "the model that it was made from"),
    )


def test_reference_of_another_shape(cwd, tmp_path, finished: Finished):
    reference = make_tiny_model(tmp_path / "other", vocab_size=BUILTIN_TOKENS)
    refused(
        cwd,
        "eval",
        finished.out,
        "--reference",
        reference,
        words=("other experts", "the model that it was made from"),
    )


def test_damaged_checkpoints(cwd, tmp_path, finished: Finished):
    broken = Path(shutil.copytree(finished.out, tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    for command in (["eval", broken], ["generate", broken, "-p", "a"], ["inspect", broken]):
        refused(cwd, *command, words=("model.safetensors", "copy the checkpoint again"))
    weights.unlink()
    for command in (["eval", broken], ["generate", broken, "-p", "a"], ["inspect", broken]):
        refused(cwd, *command, words=("safetensors", "copy the checkpoint again"))


# In a process of its own


@pytest.mark.sample
def test_stderr_of_a_real_process_holds_one_line(cwd, tiny_model, tmp_path):
    model = tmp_path / "model"
    _dense(model)
    command = [sys.executable, "-m", "gemq", "quantize", model, "-o", "x", *LOW]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    check_line(Ran(ran.returncode, ran.stdout, ran.stderr), "no experts")
    assert list(cwd.iterdir()) == []


def test_ctrl_c(cwd, tmp_path):
    """Interrupted during a stage: exit code 1, a line that says how to go on, and going on works."""
    # enough layers for the job to be running when the signal arrives
    model = make_tiny_model(tmp_path / "model", num_hidden_layers=6)
    Path("quick.yaml").write_text("effort: low\nnum_windows: 4\nseq_len: 16\nguard: false\n")
    job = ["quantize", str(model), "-o", "x", "--recipe", "quick.yaml"]
    with open("log", "w") as log:
        process = subprocess.Popen([sys.executable, "-m", "gemq", *job], stdout=log, stderr=subprocess.STDOUT)
    first = Path("x.work/candidates/layer-000.safetensors")
    deadline = time.monotonic() + 60
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 1
    output = Path("log").read_text()
    last = output.splitlines()[-1]
    for words in ("Interrupted", "--resume", "x.work"):
        assert words in last, output
    assert "Traceback" not in output
    assert not Path("x").exists()
    layer = first.stat().st_mtime_ns
    ran = gemq(*job, "--resume", "--json", "-")
    assert ran.code == 0, ran.err
    assert first.stat().st_mtime_ns == layer
    assert Path("x/model.safetensors").stat().st_size > ran.json["stored_bytes"]
