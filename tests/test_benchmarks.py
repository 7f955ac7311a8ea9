"""The benchmarks run, and what they compare is equal work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
pytestmark = pytest.mark.thorough
NAMES = ("shapes", "reference", "table", "train_step", "ranks", "generate", "quality", "tokenizing")


@pytest.fixture(scope="module")
def bench() -> Iterator[dict[str, ModuleType]]:
    """The benchmarks as modules, which are a folder of scripts and no package."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: __import__(name) for name in NAMES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


def output(script: str, *arguments: str) -> str:
    command = [sys.executable, str(FOLDER / script), "--quick", "--threads", "1", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def first_cells(text: str) -> list[str]:
    """Return the first cell of every row of the tables, heads and rules left out."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [line.split("|")[1].strip() for line in lines]
    heads = {i for i, cell in enumerate(cells) if set(cell) == {"-"}}
    return [c for i, c in enumerate(cells) if i not in heads and i + 1 not in heads]


# --- equal work ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["tiny-0.8m", "nanogpt-10m", "gpt2-124m"])
def test_the_reference_has_as_many_parameters(bench: dict[str, ModuleType], shape: str) -> None:
    measured = bench["shapes"].SHAPES[shape]
    with torch.device("meta"):
        theirs = bench["reference"].GPT(measured)
    assert sum(p.numel() for p in theirs.parameters()) == measured.parameters()


def test_the_124m_shape_is_gpt2(bench: dict[str, ModuleType]) -> None:
    assert bench["shapes"].SHAPES["gpt2-124m"].parameters() == 124_439_808


def test_flops_are_those_that_nanogpt_counts(bench: dict[str, ModuleType]) -> None:
    # 6 * (124439808 - 1024 * 768) + 12 * 12 layers * 12 heads * 64 * 1024, with biases and norms
    assert bench["shapes"].SHAPES["gpt2-124m"].flops() == pytest.approx(855_166_464, rel=0.002)


def test_experts_that_a_token_does_not_pass_are_no_flops(bench: dict[str, ModuleType]) -> None:
    dense = bench["shapes"].QUICK
    mixed = replace(dense, experts=8)
    # Of 8 experts two are passed, where there was one MLP; and a router chooses them.
    more = 6 * dense.layers * (8 * dense.dim**2 + 8 * dense.dim)
    assert mixed.flops() - dense.flops() == more


@pytest.mark.parametrize("bias", [False, True])
def test_equal_weights_give_the_reference_the_loss_of_dtt(
    bench: dict[str, ModuleType], bias: bool
) -> None:
    from dtt.model.decoder import Decoder
    from dtt.model.objective import Objective

    shape = replace(bench["shapes"].QUICK, bias=bias)
    ours, theirs = Decoder(shape.settings()), bench["reference"].GPT(shape)
    ours.init_weights(1)
    for parameter in ours.parameters():  # biases and norms too
        parameter.data += 0.05 * torch.randn_like(parameter)
    theirs.load_state_dict(ours.state_dict())
    x, y = torch.randint(shape.vocab, (2, shape.batch, shape.context))
    mine = Objective(ours)(x, y) / y.numel()
    _, loss = theirs(x, y)
    torch.testing.assert_close(mine, loss, rtol=1e-6, atol=1e-6)
    mine.backward()
    loss.backward()
    for a, b in zip(
        ours.state_dict(keep_vars=True).items(), theirs.named_parameters(), strict=True
    ):
        assert a[0] == b[0]
        torch.testing.assert_close(a[1].grad, b[1].grad, rtol=1e-4, atol=1e-6)


def test_the_plain_loop_learns(bench: dict[str, ModuleType]) -> None:
    import numpy as np

    torch.manual_seed(0)
    shape, reference = bench["shapes"].QUICK, bench["reference"]
    tokens = np.tile(np.arange(shape.vocab, dtype="<u2"), 40)
    step = reference.training_step(
        reference.GPT(shape), shape, reference.SETTINGS["bf16, fused AdamW"], tokens
    )
    losses = [float(step()) for _ in range(60)]
    assert losses[-1] < 0.8 * losses[0]


def test_recomputing_writes_what_the_cache_writes(bench: dict[str, ModuleType]) -> None:
    generate, shape = bench["generate"], bench["shapes"].QUICK
    model = generate.decoder(shape, torch.float32)
    given = generate.prompts(shape, 3, 2)
    assert generate.recomputed(model, given, 10) == generate.cached(model, given, 10)


def test_tiktoken_alone_encodes_as_dtt_does(bench: dict[str, ModuleType]) -> None:
    from dtt.tokenizer import BpeTokenizer

    tokenizing, text = bench["tokenizing"], "Größe: the cat sat, 12 cats\n\tsat — 猫"
    trained = tokenizing.train_directly([text] * 3, 300)
    alone = tokenizing.tiktoken_encoding(trained)
    assert alone.encode(text) == BpeTokenizer(trained).encode(text).tolist()


# --- reading and printing ------------------------------------------------------------------------


def test_speeds_are_read_from_console_lines(bench: dict[str, ModuleType]) -> None:
    text = (
        "step 10/50  loss 4.1  ppl 60  lr 1e-3  grad 1.0  34.5k tok/s  2s left\n"
        "other\nstep 20/50  loss 4.0  ppl 55  lr 1e-3  grad 1.0  950 tok/s  2s left\n"
    )
    assert bench["ranks"].speeds(text) == [34500.0, 950.0]


def test_the_commands_of_quality_are_valid(bench: dict[str, ModuleType]) -> None:
    from dtt.config.flags import ConfigParser

    quality = bench["quality"]
    for task in quality.TASKS:
        parser = ConfigParser("dtt train", "", ())
        config = parser.config(parser.parse(quality.flags(task, "text.txt", quick=False)))
        if task.startswith("shakespeare"):
            assert config.training.max_steps * config.training.batch_size == 24_000
            assert config.model.context == 64


def test_tables_are_markdown(
    bench: dict[str, ModuleType], capsys: pytest.CaptureFixture[str]
) -> None:
    bench["table"].print_table(["what", "tokens/s"], [["a", 12345.6], ["longer", None]])
    assert capsys.readouterr().out.splitlines() == [
        "| what   | tokens/s |",
        "| ------ | -------- |",
        "| a      | 12,346   |",
        "| longer | -        |",
        "",
    ]


# --- whole scripts -------------------------------------------------------------------------------


@pytest.mark.processes
def test_train_step_prints_its_table() -> None:
    text = output("train_step.py", "--shape", "tiny-0.8m", "--setting", "bf16")
    assert first_cells(text) == [
        "float32 matrix product",
        "bfloat16 matrix product",
        "plain PyTorch: bf16",
        "dtt",
    ]


@pytest.mark.processes
def test_generate_prints_its_tables() -> None:
    pytest.importorskip("transformers")
    assert first_cells(output("generate.py")) == [
        "124M weights in bf16",
        "124M weights in fp32",
        "recomputing, 1 prompt",
        "cache, 1 prompt",
        "cache, 16 prompts",
        *("bf16", "bf16", "fp32", "fp32"),
    ]


@pytest.mark.processes
def test_hf_trainer_prints_its_table() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    assert first_cells(output("hf_trainer.py")) == ["transformers' Trainer", "dtt"]


@pytest.mark.processes
def test_checkpoint_and_loader_print_their_tables() -> None:
    assert first_cells(output("checkpoint.py")) == [
        "limit: copy of the state in memory",
        "limit: a plain file of that size, synced",
        "step alone",
        "the loop waits in save()",
        "until durable, with steps going on",
        "step during the save",
    ]
    shapes = ["tiny-0.8m", "nanogpt-10m", "gpt2-124m"]
    assert first_cells(output("loader.py", "--consumes", "1000")) == shapes


@pytest.mark.processes
def test_watching_prints_its_table() -> None:
    for name in ("wandb", "psutil"):
        pytest.importorskip(name)
    assert first_cells(output("watching.py"))[:2] == ["off", "on"]


@pytest.mark.processes
def test_the_gpu_script_runs_without_a_gpu() -> None:
    text = output("gpu/step.py", "--device", "cpu", "--part", "limits")
    assert first_cells(text)[-2:] == ["bf16 matrix product, GFLOP/s", "reading memory, GB/s"]
    if not torch.cuda.is_available():
        command = [sys.executable, str(FOLDER / "gpu/step.py")]
        refused = subprocess.run(command, capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert "no GPU" in refused.stderr


@pytest.mark.processes
def test_training_on_a_gpu_is_measured_by_code_that_a_cpu_runs() -> None:
    text = output("gpu/train_step.py", "--device", "cpu")
    dense, mixed = ["dense, 4 x 16"] * 2, ["8 experts, 4 x 16"]
    longer = ["dense, 1 x 64"] * 2 + ["8 experts, 1 x 64"]
    assert first_cells(text)[2:8] == dense + mixed + longer
    assert "failed" not in text
    late = output("gpu/train_step.py", "--device", "cpu", "--minutes", "0")
    assert first_cells(late) == ["bf16 matrix product, measured", "the maker's figure"]
    if not torch.cuda.is_available():
        assert "no GPU here" in output("gpu/train_step.py")


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="its ranks are forked")
@pytest.mark.parametrize(
    ("part", "cells"),
    [
        ("ways", ["one rank", "one rank, twice the batch", "DDP 2", "DDP 2, twice the batch"]),
        ("muon", ["adamw", "muon"]),
        ("checkpoint", ["save, shard 4, until the last rank has it on the disk"]),
        ("start", ["DDP 4"]),
    ],
)
def test_parallel_prints_its_tables(part: str, cells: list[str]) -> None:
    text = output("parallel.py", "--part", part)
    assert first_cells(text)[: len(cells)] == cells
    assert "to be reached" in text


@pytest.mark.processes
@pytest.mark.parametrize(
    ("script", "tables"), [("mixture.py", 2), ("dedup.py", 2), ("download.py", 2)]
)
def test_the_benchmarks_of_data_print_their_tables(script: str, tables: int) -> None:
    text = output(script)
    heads = [line for line in text.splitlines() if line.startswith("| --")]
    assert len(heads) == tables
    assert all(cell.strip() for line in text.splitlines()[8:] for cell in line.split("|")[1:-1])


@pytest.mark.processes
def test_engines_prints_its_table() -> None:
    pytest.importorskip("lightning")
    text = output("engines.py")
    engines = [
        line.split("|")[3].strip() for line in text.splitlines() if line.startswith("| 4 la")
    ]
    assert engines == ["dtt", "lightning"] * 2
