"""The command line: its commands in order, and what a mistake or an interrupt ends in. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Annotated, Any

import typer

from gemq.cli.console import use_any_encoding
from gemq.cli.model_commands import bench, demo, evaluate, generate, inspect
from gemq.cli.quantize_commands import export, plan, quantize
from gemq.errors import UserError
from gemq.models import file_hashes
from gemq.runtime import fallbacks
from gemq.runtime.display import printable, shortened
from gemq.runtime.processes import after_failing, before_failing, is_first
from gemq.runtime.tested_versions import untested_transformers

# from typer: some of its versions use the package click, others carry their own copy
ClickException: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    help="Shrinks Mixture-of-Experts language models: every matrix of every expert gets its own bit-width.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # what is no user's mistake is a bug: a plain traceback is the better report
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the versions of gemq and what it runs on.")] = False,
) -> None:
    if version:
        names = ("gemq", "torch", "transformers", "triton")
        print(", ".join(f"{name} {found}" for name in names if (found := _installed(name))))
        raise typer.Exit


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan,
    "quantize": quantize,
    "export": export,
    "eval": evaluate,
    "generate": generate,
    "bench": bench,
    "inspect": inspect,
    "demo": demo,
}
for name, function in COMMANDS.items():
    app.command(name)(function)


def run(arguments: list[str]) -> int:
    """Runs the command line and returns its exit code. A user's mistake is one line on stderr."""
    # torch reads this when it first takes memory: pages of 2 MB, with which a layer is read twice as fast
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    use_any_encoding()
    try:
        _warn_of_untested(arguments)
        code = app(arguments or ["--help"], prog_name="gemq", standalone_mode=False)
        sys.stdout.flush()
        for line in fallbacks.take_lines():  # those that no summary has shown
            print(f"gemq: {line}", file=sys.stderr)
        return code if isinstance(code, int) else 0
    except UserError as error:
        return _fail(str(error))
    except ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "gemq"
        return _fail(f"{error.format_message().rstrip('.')}: see {command} --help")
    except (KeyboardInterrupt, typer.Abort):
        print("\nInterrupted.", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        file_hashes.end()


def _warn_of_untested(arguments: list[str]) -> None:
    """One line before a command that runs a model with a Transformers that was never tested."""
    if arguments and arguments[0] in COMMANDS and is_first() and not {"-h", "--help"} & set(arguments):
        line = untested_transformers()
        if line is not None:
            print(f"gemq: {line}", file=sys.stderr)


def _fail(message: str) -> int:
    before_failing()
    print(f"gemq: {shortened(printable(' '.join(message.split())))}", file=sys.stderr)
    after_failing(2)
    return 2
