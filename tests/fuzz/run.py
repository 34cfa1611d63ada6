"""Damages checkpoints, models and work directories at random and sorts how gemq ends. See ``run.py -h``."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> int:
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TQDM_DISABLE="1")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # CUDA does not work in the forks that run cases
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from fuzz.cases import run_cases

    try:
        return run_cases(sys.argv[1:])
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
