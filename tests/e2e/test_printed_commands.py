"""Every command that gemq prints or documents runs as it stands: in summaries, errors, help, model cards and docs."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from gemq.assets import builtin_texts
from gemq.cli import app
from support.cli import BUILTIN_TOKENS, few_guard_windows, gemq, make_tiny_model

ROOT = Path(__file__).parents[2]
PAGES = ("quantize", "budget", "transformers", "serve", "evaluate", "report", "several-gpus", "troubleshooting")
DOCUMENTS = [ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in PAGES)]
OTHER_FLAGS = {
    "--all2all-backend",
    "--attention-backend",
    "--dtype",
    "--enable-eplb",
    "--enable-expert-parallel",
    "--gpu-memory-utilization",
    "--install-completion",
    "--load-format",
    "--nproc-per-node",
    "--port",
    "--quantization",
    "--tensor-parallel-size",
    "--version",
}
"""Flags in documents that belong to torchrun, to vLLM or to gemq itself."""
VERBS = ("plan", "quantize", "export", "eval", "generate", "bench", "inspect", "report")
SMALL = ("--effort", "low", "--num-windows", "4", "--seq-len", "32")


def commands_in(text: str) -> list[list[str]]:
    """The commands of a summary, each after a colon or at the beginning of a line."""
    return [shlex.split(command) for command in re.findall(r"(?:^|: )(gemq .*)$", text, re.MULTILINE)]


def options_of(command: str) -> set[str]:
    parameters = typer.main.get_command(app).commands[command].params  # type: ignore[attr-defined]
    options = {option for p in parameters for option in (*p.opts, *p.secondary_opts)}
    return {"--help", *(option for option in options if option.startswith("-"))}


def flags_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", text))


# Summaries


@pytest.mark.parametrize("name", ["out", "out [v2]", "it's"])
def test_commands_of_a_summary_run_as_printed(name, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = gemq("quantize", tiny_model, "-o", name, *SMALL)
    assert ran.code == 0, ran.err
    assert name in ran.out
    verbs = []
    for command in commands_in(ran.out):
        verbs.append(command[1])
        again = gemq(*command[1:])
        assert again.code == 0, (command, again.err)
    assert verbs == ["export", "generate"]
    assert len([d for d in tmp_path.iterdir() if d.name.startswith(name)]) == 3  # the output, its work, the export


def test_no_budget_is_offered_where_the_ladder_has_none(tiny_model, tmp_path):
    ran = gemq("quantize", tiny_model, "-o", tmp_path / "out", *SMALL, "--widths", "2")
    assert ran.code == 0, ran.err
    assert [command[1] for command in commands_in(ran.out)] == ["generate"]


def test_the_command_that_makes_scores_runs_as_printed(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert gemq("quantize", tiny_model, "-o", "out", *SMALL, "--allocate", "uniform", "-q").code == 0
    ran = gemq("export", "out.work", "--curve")
    assert ran.code == 2
    match = re.search(r"with (gemq export .*)$", ran.err)
    assert match
    command = shlex.split(match.group(1).replace("OUT", "scored"))
    assert gemq(*command[1:]).code == 0
    assert gemq("export", "out.work", "--curve").code == 0


# Errors


def test_errors_name_flags_that_the_command_has(tiny_model, tmp_path, monkeypatch):
    """A message may name a flag of another command only after that command's name."""
    monkeypatch.chdir(tmp_path)
    assert gemq("quantize", tiny_model, "-o", "out", *SMALL, "-q").code == 0
    failing: list[list[Any]] = [
        ["export", "out.work", "-o", "a", "--bits", "9"],
        ["export", "out.work", "-o", "a", "--bits", "3.5"],
        ["export", "out.work", "-o", "a", "--bits", "0.5"],
        ["export", "out.work", "-o", "a", "--stored-bits", "9"],
        ["export", "out.work", "-o", "a", "--size", "1kB"],
        ["export", "out.work", "-o", "out"],
        ["export", "out.work", "-o", "out.work/inside"],
        ["export", "out.work"],
        ["export", "out.work", "--curve", "--allocate", "random"],
        ["export", "out.work", "-o", "a", "--host-memory", "1MB"],
        ["quantize", tiny_model, "-o", "b", "--bits", "4.5"],
        ["quantize", tiny_model, "-o", "b", "--stored-bits", "9"],
        ["quantize", tiny_model, "-o", "b", "--host-memory", "1MB"],
        ["quantize", tiny_model, "-o", "out"],
        ["plan", tiny_model, "--bits", "9"],
        ["plan", "nowhere"],
        ["eval", "out", "--seq-len", "9999"],
        ["eval", "out", "--seq-len", "64", "--host-memory", "1MB"],
        ["eval", "out", "--seq-len", "64", "--reference", "out"],
        ["generate", "out", "-p", "a", "--max-new-tokens", "0"],
        ["bench", "out", "--prefill", "9999"],
        ["inspect", "nowhere"],
    ]
    for command in failing:
        ran = gemq(*command)
        assert ran.code == 2, (command, ran.out, ran.err)
        message, *quantize_messages = re.split(r"quantize (?=with|then|goes)", ran.err)
        assert flags_in(message) <= options_of(command[0]), ran.err
        assert all(flags_in(text) <= options_of("quantize") for text in quantize_messages), ran.err


def test_a_wider_width_is_offered_where_it_can_be_had(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = gemq("quantize", tiny_model, "-o", "out", *SMALL, "--bits", "4.5", "-q")
    flags = re.search(r"with (--widths \S+)$", ran.err)
    assert flags
    ran = gemq("quantize", tiny_model, "-o", "out", *SMALL, "--bits", "4.5", *flags.group(1).split(), "-q")
    assert ran.code == 0, ran.err
    ran = gemq("export", "out.work", "-o", "more", "--bits", "8.5")
    assert "--widths" not in ran.err  # there is none wider
    assert gemq("export", "out.work", "-o", "more", "--bits", "8").code == 0


# Help


def test_help_names_flags_that_the_command_has():
    for command in (*VERBS, "demo"):
        help_text = gemq(command, "--help").out or _help(command)
        assert flags_in(help_text) <= options_of(command), command


def _help(command: str) -> str:
    return subprocess.run([sys.executable, "-m", "gemq", command, "--help"], capture_output=True, text=True).stdout


# Documents and model card


def copy_model(model: Path, copy: Path, max_tokens: int) -> None:
    """Copies a model that takes as many tokens as the model whose name it gets."""
    shutil.copytree(model, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": max_tokens}))


@pytest.fixture(scope="module")
def documents_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what the documents name: a model, its results, and a text."""
    path = tmp_path_factory.mktemp("documents")
    model = make_tiny_model(path / "path" / "to" / "model", vocab_size=BUILTIN_TOKENS, max_position_embeddings=512)
    copy_model(model, path / "allenai" / "OLMoE-1B-7B-0924", max_tokens=4096)
    copy_model(model, path / "mistralai" / "Mixtral-8x7B-v0.1", max_tokens=32768)
    shutil.copy(builtin_texts()[0], path / "my.txt")
    with pytest.MonkeyPatch.context() as patch:
        few_guard_windows(patch)
        patch.chdir(path)
        ran = gemq("quantize", "path/to/model", "-o", "olmoe-2bit", "--bits", 2, *SMALL, "-q")
    assert ran.code == 0, ran.err
    shutil.copytree(path / "olmoe-2bit", path / "OUT")
    return path


def documented(language: str) -> list[tuple[str, str]]:
    """(document, code) of every block of code in a language."""
    return [
        (document.name, block)
        for document in DOCUMENTS
        for block in re.findall(rf"```{language}\n(.*?)```", document.read_text(), re.DOTALL)
    ]


def test_documented_commands_run_as_printed(documents_directory, monkeypatch):
    """All but those that take long, or need lm-eval and its data, are run, once for copies.

    Those that are not run must name options that there are.
    """
    monkeypatch.chdir(documents_directory)
    lines = [line for _, block in documented("") for line in block.splitlines()]
    commands: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("gemq "):
            command = shlex.split(line, comments=True)
            commands.setdefault(shlex.join(command).replace("olmoe-2bit", "OUT"), command)
    assert {command[1] for command in commands.values()} >= set(VERBS)
    for _, verb, *arguments in commands.values():
        if verb == "serve" or verb.startswith("-"):  # its flags belong to vLLM; gemq's options change shells
            continue
        assert {a for a in arguments if a.startswith("-")} <= options_of(verb)
        if verb in ("quantize", "demo") or "--tasks" in arguments:
            continue
        short = ["--new-tokens", "2", "--prefill", "16"] if verb == "bench" else []
        short += ["--max-windows", "1"] if verb == "eval" or "--reference" in arguments else []
        short += ["--max-new-tokens", "4"] if "--generate" in arguments else []
        ran = gemq(verb, *arguments, *short)
        assert ran.code == 0, (verb, arguments, ran.err)


def test_flags_in_documents_exist():
    """In running text as well."""
    known_flags = {flag for verb in VERBS for flag in options_of(verb)} | OTHER_FLAGS
    for document in DOCUMENTS:
        text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
        assert flags_in(text) <= known_flags, document.name


def test_documented_python_runs_as_printed(documents_directory):
    """And the code of a model card. In one process, since Python and torch take seconds to start; each piece of code
    with its own names.

    What needs vLLM or lm-eval is in ``test_vllm`` and ``test_round_trips``.
    """
    pytest.importorskip("peft")
    script = ""
    for name, code in documented("python"):
        if name != "serve.md" and "lm_eval" not in code:
            code = code.replace('device="cuda"', 'device="cpu"')
            code = code.replace(', gpu_memory="8GB", context=4096', "")  # for a GPU alone
            code = code.replace(
                "gemq.Recipe(bits=2.0)", 'gemq.Recipe(bits=2.0, effort="low", num_windows=2, seq_len=16)'
            )
            script += f"exec({code!r}, {{'__name__': '__main__'}})\n"
    assert script.count("exec(") > 2
    card = (documents_directory / "olmoe-2bit" / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    code += "\nimport torch\nassert model(torch.tensor([tokenizer.encode('Once')])).logits.isfinite().all()\n"
    script += f"import os\nos.chdir('olmoe-2bit')\nexec({code!r}, {{'__name__': '__main__'}})\n"
    ran = subprocess.run([sys.executable, "-c", script], cwd=documents_directory, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
