"""``python -m gemq`` and the ``gemq`` command: exit codes and one-line errors."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run the command line. Exit codes: 0 success, 1 failure or interrupt, 2 wrong usage or input."""
    from gemq.cli import run

    code = run(sys.argv[1:])
    gc.freeze()  # otherwise a last garbage collection visits all imported objects, which takes a second
    sys.exit(code)


if __name__ == "__main__":
    main()
