"""`python -m dtt.main`: the same as `python -m dtt`, a name that older scripts use."""

from __future__ import annotations

import sys

from dtt.cli import main

if __name__ == "__main__":
    sys.exit(main())
