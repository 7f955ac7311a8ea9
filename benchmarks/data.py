"""All benchmarks of preparing and loading data, one after another on the same machine.

Each is a script of its own: tokenizing, crew, mixture, download, dedup. Peers that are not
installed are left out with a word.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from table import note, parser

SCRIPTS = ("tokenizing", "crew", "mixture", "download", "dedup")


def main() -> None:
    options = parser(__doc__).parse_args()
    flags = ["--quick"] * options.quick + ["--threads", str(options.threads)]
    if options.rounds:
        flags += ["--rounds", str(options.rounds)]
    for name in SCRIPTS:
        note(f"{name}.py")
        subprocess.run([sys.executable, Path(__file__).with_name(f"{name}.py"), *flags], check=True)


if __name__ == "__main__":
    main()
