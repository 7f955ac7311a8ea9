"""Downloads in MB/s and peak memory: dtt against `huggingface_hub` alone, from a local server.

The server is a process of its own (tests/data/hub_server.py). Each measurement is a process too:
it asks for the list of files, downloads all, and ends with them on disk. dtt also hashes each file
(SHA-256), syncs it and writes its record; huggingface_hub does not look at what it wrote. "plain
loop" is the limit for one connection: urllib to a file, nothing else. MB are 10^6 bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from memory import peak_memory
from table import (
    in_process,
    median,
    parser,
    print_heading,
    print_table,
    ratio,
    summarize,
    take_turns,
)

SERVER = Path(__file__).parent.parent / "tests/data/hub_server.py"
VARIANTS = ("plain loop", "huggingface_hub", "dtt")
DATASET = "org/bench"


def make(root: Path, files: int, size: int) -> None:
    """Write a data set of incompressible files."""
    folder = root / "datasets" / DATASET
    folder.mkdir(parents=True)
    for number in range(files):
        with (folder / f"{number}.parquet").open("wb") as file:
            for _ in range(size // 10**6):
                file.write(os.urandom(10**6))


def work(spec: dict[str, Any]) -> dict[str, float]:
    """Download everything in one way; return seconds and the growth of the peak memory in MB."""
    prepare = {"plain loop": _plain, "huggingface_hub": _theirs, "dtt": _ours}[spec["variant"]]
    with tempfile.TemporaryDirectory(dir=spec["folder"]) as folder:
        call = prepare(Path(folder), spec["files"])
        before = peak_memory()
        begin = time.perf_counter()
        call()
        seconds = time.perf_counter() - begin
        came = [path for path in Path(folder).rglob("*.parquet") if path.is_file()]
        assert len(came) == spec["files"], came
    return {"seconds": seconds, "memory": (peak_memory() - before) / 1e6}


def _plain(folder: Path, files: int) -> Any:
    base = f"{os.environ['HF_ENDPOINT']}/datasets/{DATASET}/resolve/main"

    def call() -> None:
        for number in range(files):
            name = f"{number}.parquet"
            with (
                urllib.request.urlopen(f"{base}/{name}") as source,
                (folder / name).open("wb", buffering=0) as target,
            ):
                while block := source.read1(256 << 10):
                    target.write(block)

    return call


def _theirs(folder: Path, files: int) -> Any:
    from huggingface_hub import snapshot_download

    def call() -> None:
        snapshot_download(DATASET, repo_type="dataset", local_dir=folder)

    return call


def _ours(folder: Path, files: int) -> Any:
    from dtt.config.remote import Hub
    from dtt.data.remote.reader import download, select

    settings = Hub(dataset=DATASET, files=("*.parquet",))

    def call() -> None:
        download(settings, select(settings, folder))

    return call


def compare(files: int, size: int, rounds: int) -> None:
    """Print the table of one data set: `files` of `size` bytes each."""
    memory: dict[str, float] = {}
    os.environ.pop("HF_HUB_OFFLINE", None)  # it would forbid the local server too

    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder, "server"), files, size)
        os.environ["HF_HOME"] = f"{folder}/home"

        def measure(variant: str) -> float:
            spec = {"variant": variant, "files": files, "folder": folder}
            found = in_process(__file__, spec)
            memory[variant] = max(found["memory"], memory.get(variant, 0.0))
            return files * size / 1e6 / found["seconds"]

        command = [sys.executable, str(SERVER), f"{folder}/server"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            os.environ["HF_ENDPOINT"] = server.stdout.readline().strip()
            try:
                measure("dtt")  # the server hashes each file once
                found = take_turns(VARIANTS, measure, rounds)
            finally:
                server.terminate()
    theirs = median(found["huggingface_hub"])
    rows = [
        [name, max(v), median(v), ratio(median(v), theirs), memory[name]]
        for name, v in found.items()
    ]
    title = f"{files} x {size / 1e6:,.0f} MB"
    print_table([title, "MB/s, best", "median", "to huggingface_hub", "memory, +MB"], rows)
    reached = f"{ratio(median(found['dtt']), theirs)}, +{memory['dtt']:.0f} MB"
    summarize(f"download, {title}, to huggingface_hub", reached, "0.8x")


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(json.loads(sys.argv[2]))))
        return
    options = parser(__doc__).parse_args()
    rounds = options.rounds or (1 if options.quick else 5)
    print_heading("Download", options.threads, options.quick)
    sizes = ((1, 1), (2, 1)) if options.quick else ((1, 400), (8, 50))
    for files, megabytes in sizes:
        compare(files, megabytes * 10**6, rounds)


if __name__ == "__main__":
    main()
