"""A GPT-2 of transformers, trained by dtt and by transformers' own Trainer: tokens a second.

Both train the same class with the same settings, in bf16 by autocast, with AdamW, clipping and no
dropout, on random tokens; each in a process of its own, in turn. What is timed is the whole step of
the loop: batches, forward, backward, clipping, update. Neither logs or saves anything. The Trainer
needs the package accelerate, which dtt does not.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from table import in_process, median, parser, print_heading, print_table, ratio, take_turns
from train_step import dtt_step, random_stream

THEIRS, OURS = "transformers' Trainer", "dtt"
SHAPES: dict[str, dict[str, Any]] = {
    "124m": {
        "sizes": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
        "vocab": 50257,
        "context": 1024,
        "batch": 2,
    },
    "quick": {
        "sizes": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
        "vocab": 1024,
        "context": 64,
        "batch": 4,
    },
}
WARMUP = 2


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The rows of a stream of tokens, as the Trainer wants them."""

    def __init__(self, tokens: torch.Tensor, context: int) -> None:
        self.rows = tokens[: len(tokens) // context * context].view(-1, context)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def settings_of(shape: dict[str, Any]) -> Any:
    from dtt.config.model import HfModel
    from dtt.model.hf.settings import complete

    asked = HfModel(
        architecture="gpt2",
        settings=shape["sizes"],
        context=shape["context"],
        vocab_size=shape["vocab"],
    )
    return complete(asked, "gpt2")


def by_trainer(shape: dict[str, Any], steps: int, folder: Path, threads: int) -> list[float]:
    """Return the seconds of each step after the warm-up."""
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from dtt.model.hf.settings import config_of

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(settings_of(shape)))
    stream = random_stream(folder, shape["vocab"])
    tokens = torch.from_numpy(stream.read(0, len(stream)).astype("int64"))
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            times.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=shape["batch"],
        max_steps=steps + WARMUP,
        bf16=True,
        use_cpu=True,
        learning_rate=1e-3,
        weight_decay=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    rows = Rows(tokens, shape["context"])
    Trainer(model, arguments, train_dataset=rows, callbacks=[Clock()]).train()
    return [b - a for a, b in zip(times[WARMUP - 1 :], times[WARMUP:], strict=False)]


def by_dtt(shape: dict[str, Any], steps: int, folder: Path, threads: int) -> list[float]:
    """Return the seconds of each step after the warm-up."""
    from types import SimpleNamespace

    from dtt.config.optim import AdamW
    from dtt.config.schema import Config, Training
    from dtt.dist import Place, start
    from dtt.parallel.layout import Layout
    from dtt.training.build import build_model, build_stepper

    runtime = start(Place(), "cpu", threads)
    config = Config(
        model=settings_of(shape),
        optimizer=AdamW(),
        training=Training(batch_size=shape["batch"], precision="bf16"),
    )
    model = build_model(config, torch.bfloat16)
    stepper = build_stepper(model, Layout(), config, runtime, torch.bfloat16)
    sizes: Any = SimpleNamespace(context=shape["context"], batch=shape["batch"])
    step = dtt_step(stepper, sizes, random_stream(folder, shape["vocab"]))
    times = [time.perf_counter()]
    for _ in range(steps + WARMUP):
        step()
        times.append(time.perf_counter())
    return [b - a for a, b in zip(times[WARMUP:], times[WARMUP + 1 :], strict=False)]


def work(spec: dict[str, Any]) -> dict[str, float]:
    """Measure one of the two in this process."""
    measure = by_dtt if spec["who"] == OURS else by_trainer
    with tempfile.TemporaryDirectory() as folder:
        seconds = measure(SHAPES[spec["shape"]], spec["steps"], Path(folder), spec["threads"])
    return {"seconds": median(seconds)}


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(work(json.loads(sys.argv[2]))))
        return
    asked = parser(__doc__)
    asked.add_argument("--steps", type=int, help="per measurement, after the warm-up")
    options = asked.parse_args()
    quick = options.quick
    name, rounds = "quick" if quick else "124m", options.rounds or (1 if quick else 3)
    steps = options.steps or (5 if quick else 6)
    shape = SHAPES[name]
    tokens = shape["batch"] * shape["context"]

    def measure(who: str) -> float:
        spec = {"who": who, "shape": name, "steps": steps, "threads": options.threads}
        return tokens / float(in_process(__file__, spec)["seconds"])

    print_heading("A GPT-2 of transformers", options.threads, quick)
    speeds = take_turns([THEIRS, OURS], measure, rounds)
    first = median(speeds[THEIRS])
    rows = [
        [who, max(found), median(found), ratio(median(found), first)]
        for who, found in speeds.items()
    ]
    print(f"### {name}: {tokens:,} tokens a step, bf16\n")
    print_table(["trained by", "tokens/s, best", "median", "to the Trainer"], rows)


if __name__ == "__main__":
    main()
