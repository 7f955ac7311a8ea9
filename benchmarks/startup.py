"""Wall time from the command to what it first says.

`dtt train` is the default run, which in a fresh folder makes its corpus and its tokenizer first.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from table import median, parser, print_heading, print_table, take_turns

FIRST_STEP = re.compile(r"step\s+1/")


def dtt_command() -> list[str]:
    """Return the installed `dtt`, which users start, or the module where there is none."""
    script = shutil.which("dtt", path=str(Path(sys.executable).parent))
    return [script] if script else [sys.executable, "-m", "dtt"]


COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "python -c 'import torch'": [sys.executable, "-c", "import torch"],
    "python -c 'import dtt'": [sys.executable, "-c", "import dtt"],
    "dtt --help": [*dtt_command(), "--help"],
    "dtt train --help": [*dtt_command(), "train", "--help"],
}
FRESH = "dtt train, fresh folder, to the first step"
AGAIN = "dtt train, prepared data, to the first step"


def whole(name: str) -> float:
    """Return the milliseconds of a command."""
    begin = time.perf_counter()
    subprocess.run(COMMANDS[name], stdout=subprocess.DEVNULL, check=True)
    return 1e3 * (time.perf_counter() - begin)


def first_step(folder: Path, extra: list[str]) -> float:
    """Return the milliseconds until `dtt train` prints the line of its first step."""
    command = [*dtt_command(), "train", "--max-steps", "1", "--name", "run", "--fresh", *extra]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    begin, seconds = time.perf_counter(), 0.0
    with subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not seconds and FIRST_STEP.search(line):
                seconds = time.perf_counter() - begin
    if process.returncode or not seconds:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return 1e3 * seconds


def main() -> None:
    options = parser(__doc__).parse_args()
    quick, rounds = options.quick, options.rounds or (2 if options.quick else 15)
    extra = ["--data.source.stories", "500"] if quick else []
    print_heading("Start-up", options.threads, quick)
    found = take_turns(list(COMMANDS), whole, rounds)

    def train(name: str) -> float:
        if name == FRESH:
            shutil.rmtree(folder / "data", ignore_errors=True)
        return first_step(folder, extra)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        found |= take_turns([FRESH, AGAIN], train, 1 if quick else max(3, rounds // 3))
    rows = [
        [name, len(times), f"{min(times):,.0f} ms", f"{median(times):,.0f} ms"]
        for name, times in found.items()
    ]
    print_table(["command", "runs", "least", "median"], rows)


if __name__ == "__main__":
    main()
