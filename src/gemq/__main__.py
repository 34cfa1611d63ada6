"""``python -m gemq`` and the ``gemq`` command: exit codes and one-line errors."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Runs the command line. Exit codes: 0 done, 1 failed or interrupted, 2 bad usage or bad input."""
    from gemq.cli import run

    code = run(sys.argv[1:])
    gc.freeze()  # or Python looks for garbage in all that was imported before it ends: a second
    sys.exit(code)


if __name__ == "__main__":
    main()
