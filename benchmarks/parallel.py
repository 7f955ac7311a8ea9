"""Ways to divide a model among ranks of one thread each, on the CPU with gloo.

The same step of a 30M-parameter model on two ranks in each way, against DDP; Muon against AdamW;
a checkpoint of four ranks against what the disk gives; and how soon four ranks have taken their
first step. Two limits: twice the speed of one rank alone, and, of each way, the same step with
collectives that come back at once (PyTorch's "fake" backend). What is above that is the time that
exchanging and waiting for each other costs; for a pipeline, its bubble too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from parallel_checkpoint import print_checkpoint
from parallel_ranks import Rank, fork_ranks, random_share, stepper_of
from parallel_start import print_start
from table import (
    median,
    parser,
    print_heading,
    print_table,
    ratio,
    summarize,
    summary,
    take_turns,
)

from dtt.config.schema import Config

MODEL = {"layers": 8, "dim": 512, "heads": 8, "context": 256, "vocab_size": 4096}
"""29.4M parameters; 32 sequences are 8,192 tokens."""
SMALL = {"layers": 2, "dim": 32, "heads": 2, "context": 32, "vocab_size": 128}
"""Instead of it with --quick."""
BATCH = 32
WARMUP = 2
"""Steps before the first that counts; DDP arranges its buckets anew after the first of all."""
APART = ", no exchange"


@dataclass(frozen=True)
class Way:
    """Ranks, their layout, and sequences per forward where it is not all that a rank has."""

    ranks: int
    parallel: Mapping[str, Any]
    micro: int | None = None
    batch: int = BATCH
    """Sequences of a step."""


ONE, DDP, FSDP = "one rank", "DDP 2", "FSDP2 2"
TWICE = ", twice the batch"
WAYS = {
    ONE: Way(1, {}),
    ONE + TWICE: Way(1, {}, batch=2 * BATCH),
    DDP: Way(2, {}),
    DDP + TWICE: Way(2, {}, batch=2 * BATCH),
    FSDP: Way(2, {"shard": 2}),
    "FSDP2 2, not resharded": Way(2, {"shard": 2, "reshard": False}),
    "TP 2": Way(2, {"tensor": 2}),
    "PP 2, 1F1B, 16 forwards": Way(2, {"pipeline": 2}, micro=BATCH // 16),
    "CP 2": Way(2, {"context": 2}),
}


def config_of(way: Way, optimizer: str, quick: bool) -> Config:
    training = {"batch_size": way.batch, "micro_batch_size": way.micro, "device": "cpu"}
    return Config.model_validate(
        {
            "model": SMALL if quick else MODEL,
            "training": training,
            "optimizer": {"name": optimizer},
            "parallel": way.parallel,
        }
    )


def step_seconds(config: Config, ranks: int, steps: int, *, exchange: bool = True) -> float:
    """Return the median time of a step, which ends when its last rank is done with it."""

    def work(rank: Rank) -> list[float]:
        stepper = stepper_of(config, rank.runtime)
        share, found = random_share(config, stepper), []
        for number in range(WARMUP + steps):
            rank.barrier.wait()
            begin = time.perf_counter()
            result = stepper.step(share, number, stop=False)
            stepper.update(1.0)
            result.totals.tolist()  # as the loop reads them
            found.append(time.perf_counter() - begin)
        return found[WARMUP:]

    found = fork_ranks(work, ranks, exchange=exchange)
    return median(map(max, zip(*found, strict=True)))


def print_ways(rounds: int, steps: int, quick: bool) -> None:
    """One step in each way, with exchanges and without."""

    def measure(name: str) -> float:
        way = WAYS[name.removesuffix(APART)]
        config = config_of(way, "adamw", quick)
        return step_seconds(config, way.ranks, steps, exchange=not name.endswith(APART))

    alone = {name for name, way in WAYS.items() if way.ranks == 1}
    names = [n for name in WAYS for n in ((name,) if name in alone else (name, name + APART))]
    found = {name: median(seconds) for name, seconds in take_turns(names, measure, rounds).items()}
    context = config_of(WAYS[ONE], "adamw", quick).model.context
    rows = [way_row(name, found, context) for name in WAYS]
    heads = [f"speed to {DDP}", "of linear", "of linear, no exchange", "exposed"]
    rest = ["tokens/s", "step, s", "no exchange, s"]
    print_table([f"a step of {BATCH * context:,} tokens", *heads, *rest], rows)
    for name, *cells in rows:
        if name.startswith(DDP):
            summarize(f"{name}: speed to twice one rank's", cells[1], "0.95x")
            summarize(f"{name}, no exchange: speed to twice one rank's", cells[2])
        elif name not in alone:
            wanted = "0.8x" if name == FSDP else "reported"
            summarize(f"{name}: speed to {DDP}", cells[0], wanted)


def way_row(name: str, found: Mapping[str, float], context: int) -> list[Any]:
    """Return the row of one way, given the seconds of all of them."""
    twice, tokens = TWICE * name.endswith(TWICE), WAYS[name].batch * context
    seconds, linear = found[name], found[ONE + twice] / 2
    if WAYS[name].ranks == 1:
        return [name, *[None] * 4, tokens / seconds, seconds, None]
    alone = found[name + APART]
    speed = ratio(found[DDP + twice], seconds)
    ratios = [speed, ratio(linear, seconds), ratio(linear, alone)]
    exposed = f"{1 - alone / seconds:.0%}"
    return [name, *ratios, exposed, tokens / seconds, seconds, alone]


def print_muon(rounds: int, steps: int, quick: bool) -> None:
    """The whole step with either optimizer, where two ranks divide the matrices."""
    way = WAYS[FSDP]

    def measure(optimizer: str) -> float:
        return step_seconds(config_of(way, optimizer, quick), way.ranks, steps)

    found = take_turns(["adamw", "muon"], measure, rounds)
    first = median(found["adamw"])
    rows = [[n, ratio(median(s), first), min(s), median(s)] for n, s in found.items()]
    print_table([f"{FSDP}, whole step", "time to adamw", "best, s", "median, s"], rows)
    reached = ratio(median(found["muon"]), first)
    summarize(f"Muon, {FSDP}: time of a step to AdamW's", reached, "at most 1.25x")


def main() -> None:
    asked = parser(__doc__)
    parts: dict[str, Callable[[], None]] = {
        "ways": lambda: print_ways(rounds, steps, quick),
        "muon": lambda: print_muon(rounds, steps, quick),
        "checkpoint": lambda: print_checkpoint(options.folder, rounds, quick),
        "start": lambda: print_start(rounds, quick),
    }
    asked.add_argument("--part", choices=parts, action="append", help="default: all")
    asked.add_argument("--folder", help="checkpoints below this folder (default: TMPDIR)")
    options = asked.parse_args()
    quick, rounds = options.quick, options.rounds or (1 if options.quick else 3)
    steps = 1 if quick else 3
    print_heading("Parallelism", 1, quick)
    with summary(1):
        for name in options.part or parts:
            parts[name]()


if __name__ == "__main__":
    main()
