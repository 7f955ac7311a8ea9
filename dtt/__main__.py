"""`python -m dtt`: the same as the `dtt` command, for torchrun, Slurm and MPI."""

from __future__ import annotations

import sys

from dtt.cli import main

if __name__ == "__main__":
    sys.exit(main())
