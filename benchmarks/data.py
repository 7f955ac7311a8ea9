"""All benchmarks of preparing and loading data in one run, and one table of what they found.

Each is a script of its own, with its peer beside it: tokenizing, crew, mixture, download, dedup.
Peers that are not installed are left out with a word.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from table import note, parser, summary

SCRIPTS = ("tokenizing", "crew", "mixture", "download", "dedup")


def main() -> None:
    options = parser(__doc__).parse_args()
    flags = ["--quick"] * options.quick + ["--threads", str(options.threads)]
    if options.rounds:
        flags += ["--rounds", str(options.rounds)]
    with summary(options.threads):
        for name in SCRIPTS:
            note(f"{name}.py")
            script = Path(__file__).with_name(f"{name}.py")
            subprocess.run([sys.executable, script, *flags], check=True)


if __name__ == "__main__":
    main()
