"""The command line: its commands, exit codes and one-line errors. Must not import torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from gemq.cli.console import use_any_encoding
from gemq.cli.model_commands import bench, demo, evaluate, generate, inspect, serve
from gemq.cli.quantize_commands import export, plan, quantize
from gemq.cli.rank_exit import after_error, before_error, exit_after_unreachable_rank, exit_on_sigterm
from gemq.cli.report_command import report
from gemq.errors import UserError
from gemq.models import file_hashes
from gemq.runtime import fallbacks
from gemq.runtime.display import printable, shortened
from gemq.runtime.processes import RankLostError, has_other_ranks, is_first
from gemq.runtime.tested_versions import installed_version, untested_transformers

# taken from typer, since its versions depend on the package click or contain a copy of it
ClickException: Any = typer.BadParameter.__mro__[2]

app = typer.Typer(
    help="Shrinks Mixture-of-Experts language models: every matrix of every expert gets its own bit-width.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # any error but a UserError is a bug, for which a plain traceback is best
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the versions of gemq and what it runs on.")] = False,
) -> None:
    """Print versions for ``gemq --version``."""
    if version:
        versions = {name: installed_version(name) for name in ("gemq", "torch", "transformers", "triton")}
        print(", ".join(f"{name} {number}" for name, number in versions.items() if number is not None))
        raise typer.Exit


COMMANDS: dict[str, Callable[..., None]] = {
    "plan": plan,
    "quantize": quantize,
    "export": export,
    "eval": evaluate,
    "generate": generate,
    "serve": serve,
    "bench": bench,
    "inspect": inspect,
    "report": report,
    "demo": demo,
}
CONTEXT_SETTINGS = {"serve": {"allow_extra_args": True, "allow_interspersed_args": False}}
"""Of commands that pass what follows their first argument to another program."""
for name, function in COMMANDS.items():
    app.command(name, context_settings=CONTEXT_SETTINGS.get(name))(function)


def run(arguments: list[str]) -> int:
    """Run the command line and return its exit code. A UserError is one line on stderr."""
    # torch reads this at its first allocation: with pages of 2 MB a layer is read twice as fast
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    use_any_encoding()
    if has_other_ranks():
        exit_on_sigterm()
    try:
        _warn_of_untested_transformers(arguments)
        code = app(arguments or ["--help"], prog_name="gemq", standalone_mode=False)
        sys.stdout.flush()
        for line in fallbacks.pop_messages():  # those that no summary has shown yet
            print(f"gemq: {line}", file=sys.stderr)
        return code if isinstance(code, int) else 0
    except UserError as error:
        return _fail(str(error))
    except ClickException as error:
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "gemq"
        return _fail(f"{error.format_message().rstrip('.')}: see {command} --help")
    except RankLostError as error:
        exit_after_unreachable_rank(error)
    except (KeyboardInterrupt, typer.Abort):
        print("\nInterrupted.", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # the process that reads our output has ended, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    finally:
        file_hashes.stop_hashing()


def _warn_of_untested_transformers(arguments: list[str]) -> None:
    """Print one line before a command that runs with a release of Transformers that gemq was not tested with."""
    is_command = bool(arguments) and arguments[0] in COMMANDS
    asks_for_help = "-h" in arguments or "--help" in arguments
    if is_command and is_first() and not asks_for_help:
        line = untested_transformers()
        if line is not None:
            print(f"gemq: {line}", file=sys.stderr)


def _fail(message: str) -> int:
    """Print a UserError as one line and return the exit code."""
    before_error()
    print(f"gemq: {shortened(printable(' '.join(message.split())))}", file=sys.stderr)
    after_error(2)
    return 2
