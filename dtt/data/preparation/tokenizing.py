"""`dtt tokenize`: prepare a configuration's corpora, alone or with other ranks.

Ranks read who they are from their environment and meet in the data folder; no MPI library is
loaded.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time

import numpy as np

from dtt.config.data import Bpe
from dtt.config.schema import Config
from dtt.data.corpora import Corpora, prepare_corpora
from dtt.data.preparation.crew import Crew
from dtt.data.preparation.prepare import Corpus
from dtt.data.preparation.workers import LocalWorkers, Workers
from dtt.data.progress import progress
from dtt.data.shards import SPLITS
from dtt.errors import EXIT_DONE, ConfigError
from dtt.place import Place, cores_of, find_array, find_place, launch_name


def prepare_command(config: Config, *, force: bool, dask: str | None = None) -> int:
    """Prepare a configuration's corpora, say what they hold, and return the exit code."""
    begun, data = time.perf_counter(), config.data
    place, array = find_place(os.environ), find_array(os.environ)
    launch = launch_name(place, os.environ, sys.argv) if place.ranks > 1 else ""
    if dask and (place.ranks > 1 or array):
        others = f"{place.ranks} ranks of {place.launcher}" if place.ranks > 1 else "a Slurm array"
        raise ConfigError(
            f"--dask in {others}", "give --dask in one process, which needs no others"
        )
    with contextlib.ExitStack() as stack:
        crew = stack.enter_context(Crew(data.dir, place, launch, array))
        advance = stack.enter_context(progress(speaks=crew.speaks))
        workers = _workers(config, place, dask, stack)
        corpora = prepare_corpora(
            data,
            config.tokenizer,
            force=force,
            report=lambda line: print(f"dtt tokenize: warning: {line}", file=sys.stderr),
            advance=advance,
            crew=crew,
            workers=workers,
        )
    if crew.speaks:
        corpora.pack(config.model.context)
        _say(config, corpora, time.perf_counter() - begun)
    return EXIT_DONE


def _workers(
    config: Config, place: Place, dask: str | None, stack: contextlib.ExitStack
) -> Workers:
    count = config.data.workers
    if dask is None:
        return LocalWorkers(count or cores_of(place, os.environ))
    from dtt.data.preparation.dask import DaskWorkers

    return stack.enter_context(DaskWorkers(dask, count))


def _say(config: Config, corpora: Corpora, seconds: float) -> None:
    manifest, settings = corpora.portions[0].corpus.manifest, config.tokenizer
    before = all(portion.corpus.found for portion in corpora.portions)
    fewer = ""
    if isinstance(settings, Bpe) and manifest.vocab_size < settings.vocab_size:
        fewer = f" ({settings.vocab_size:,} asked: the text has no more pairs)"
    print(
        f"tokenizer {settings.name}, {manifest.vocab_size:,} tokens{fewer}, "
        f"{np.dtype(manifest.dtype).itemsize} bytes each"
        f"  ({'prepared before' if before else f'{seconds:.1f} s'})"
    )
    for portion in corpora.portions:
        if portion.name:
            old = "  (prepared before)" if portion.corpus.found and not before else ""
            print(f"{portion.name}: {portion.corpus.folder}{old}")
        else:
            print(portion.corpus.folder)
        _say_corpus(portion.corpus, "  " if portion.name else "")


def _say_corpus(corpus: Corpus, indent: str) -> None:
    manifest = corpus.manifest
    for step in manifest.cleaning:
        print(f"{indent}{step['name']}: {step['removed']:,} removed, {step['changed']:,} changed")
    for split in SPLITS:
        size, tokens = manifest.total(split, "bytes"), manifest.total(split, "tokens")
        ideal = manifest.ideal_bits(split)
        print(
            f"{indent}{split:>5}: {manifest.total(split, 'documents'):,} documents, "
            f"{size:,} bytes, {tokens:,} tokens ({size / tokens:.2f} bytes each)"
            + (f", floor {ideal / size:.4f} bits/byte" if ideal else "")
        )
