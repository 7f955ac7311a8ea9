"""The run itself: do its settings load, its ranks divide it, its data and tokenizer exist, and does
the model fit?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dtt.config.data import Data, data_of_parts
from dtt.config.data import Tokenizer as TokenizerSettings
from dtt.config.model import HfModel
from dtt.config.remote import Hub, Remote
from dtt.config.schema import Config
from dtt.doctor.disk import BYTES_OF_PARAMETER
from dtt.doctor.finding import Finding, Subject, failed, ok, skipped, warning
from dtt.errors import ConfigError, DataError
from dtt.machine import memory
from dtt.parallel.layout import Layout, resolve
from dtt.training.batching import divide

UNKNOWN_VOCABULARY = 256
"""Stands for the size of a vocabulary of characters that have not been counted."""
ACTIVATIONS = 34
"""Numbers that a block keeps for each token and unit of width, with fused attention (Korthikanti et
al. 2022, arxiv.org/abs/2205.05198, table 2, in numbers of two bytes)."""
TIGHT = 0.8
"""Share of the free memory above which a rough figure is a warning."""


def check_settings(subject: Subject) -> Iterator[Finding]:
    config, error = subject.config, subject.error
    if error is not None:
        yield failed(error.what.replace("\n", "; "), error.fix or "correct it: `dtt train --help`")
        return
    yield ok(f"{config.name}: valid", {"run": config.name})


def check_layout(subject: Subject) -> Iterator[Finding]:
    if subject.error is not None:
        yield skipped("the configuration does not load")
        return
    yield judge_layout(subject.config, subject.ranks)


def judge_layout(config: Config, ranks: int) -> Finding:
    """Say how so many ranks divide the model and a step; ConfigError with the arithmetic."""
    layout = resolve(config.parallel, config.model, ranks)
    if isinstance(config.model, HfModel):
        from dtt.training.refusals import require_plan

        require_plan(config, ranks)
    division = divide(config.training, layout.data, layout.pipeline)
    who = f"{ranks} ranks: {layout}" if ranks > 1 else "one rank"
    return ok(
        f"{who}; {config.training.batch_size} sequences a step = "
        f"{division.micro_batch_size} x {division.accumulation} forwards x {layout.data} ranks",
        {
            "ranks": ranks,
            "micro_batch_size": division.micro_batch_size,
            "accumulation": division.accumulation,
        },
    )


def check_data(subject: Subject) -> Iterator[Finding]:
    if subject.error is not None:
        yield skipped("the configuration does not load")
        return
    config = subject.config
    for part, data in zip(
        [part.name for part in config.data.mixture] or [""], data_of_parts(config.data), strict=True
    ):
        name = f"data {part}".strip()
        try:
            found = subject.bench.run(find_corpus, data, config.tokenizer, seconds=45)
        except DataError as error:
            if may_still_come(data, subject.hub_answers):
                mend = "run `dtt download` with the same settings now, before all ranks wait for it"
                yield warning(f"not here yet: {error.what}", mend, name=name)
            else:
                yield failed(error.what, error.fix or "check data.source", name=name)
            continue
        yield ok(shown_corpus(found), found, name=name)


def may_still_come(data: Data, hub_answers: bool) -> bool:
    """Whether what is not here can be downloaded when training starts."""
    source = data.source
    if not isinstance(source, Remote) or source.offline:
        return False
    return hub_answers or not isinstance(source, Hub)


def find_corpus(data: Data, tokenizer: TokenizerSettings) -> dict[str, Any]:
    """Return what is there of a corpus, without making or downloading anything; DataError if its
    files or its shards are missing or damaged."""
    from dtt.data.preparation.encoding import is_finished
    from dtt.data.preparation.prepare import VERIFIED_TOKENS, open_corpus, plan_corpus
    from dtt.data.shards import SPLITS

    if isinstance(data.source, Remote):
        source = data.source.model_copy(update={"offline": True})
        data = data.model_copy(update={"source": source})
    plan = plan_corpus(data, tokenizer)
    found: dict[str, Any] = {"folder": str(plan.folder), "prepared": is_finished(plan.folder)}
    if found["prepared"]:
        corpus = open_corpus(plan.folder)
        for split in SPLITS:
            corpus.verify(split)
        manifest = corpus.manifest
        tokens = manifest.total("train", "tokens")
        found |= {"vocabulary": manifest.vocab_size, "tokens": tokens}
        found["hashed"] = tokens <= VERIFIED_TOKENS
    return found


def shown_corpus(found: dict[str, Any]) -> str:
    if not found["prepared"]:
        return "its source is here; it will be tokenized at the start (`dtt tokenize` does it now)"
    state = "whole" if found["hashed"] else "files of the right sizes (too many to be hashed here)"
    return f"{found['folder']}: {found['tokens']:,} training tokens, {state}"


def check_tokenizer(subject: Subject) -> Iterator[Finding]:
    if subject.error is not None:
        yield skipped("the configuration does not load")
        return
    tokenizer = subject.config.tokenizer
    if tokenizer.name != "file":
        yield ok(f"{tokenizer.name}, made with the corpus")
        return
    size = subject.bench.run(try_tokenizer, tokenizer.path, tokenizer.end_of_text, seconds=30)
    yield ok(f"{tokenizer.path}: {size:,} tokens, text comes back as it was", {"vocabulary": size})


def try_tokenizer(path: Any, end_of_text: str | None) -> int:
    """Load a tokenizer and bring a text there and back; its size. DataError if it cannot."""
    from dtt.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(path, end_of_text)
    text = "Once upon a time, 3 small cats."
    back = tokenizer.decode(list(map(int, tokenizer.encode(text))))
    if "".join(back.split()) != "".join(text.split()):
        raise DataError(
            f"{path}: {text!r} comes back as {back!r}", "use another tokenizer for this text"
        )
    return tokenizer.vocab_size


def check_model(subject: Subject) -> Iterator[Finding]:
    if subject.error is not None:
        yield skipped("the configuration does not load")
        return
    config = subject.config
    if isinstance(config.model, HfModel):
        yield skipped("how much memory a model of transformers needs is not estimated")
        return
    subject.parameters = subject.bench.run(count, config, seconds=30)
    try:
        layout = resolve(config.parallel, config.model, subject.ranks)
        micro = divide(config.training, layout.data, layout.pipeline).micro_batch_size
    except ConfigError:  # the check of the layout has said so
        layout, micro = Layout(), 1
    need = rough_memory(config, layout, micro, subject.parameters)
    free, where = memory()[0] / max(1, subject.ranks_here), "memory"
    if subject.gpus and config.training.device in ("auto", "cuda"):
        free, where = min(gpu["memory_free_gb"] for gpu in subject.gpus) * 1e9, "GPU memory"
    yield judge_model(subject.parameters, need, free, where)


def count(config: Config) -> int:
    """Return the parameters of the run's model; a vocabulary that is not known yet is a guess."""
    import torch

    from dtt.data.preparation.encoding import is_finished
    from dtt.data.preparation.prepare import plan_corpus
    from dtt.data.shards import read_manifest
    from dtt.model.decoder import count_parameters
    from dtt.training.build import build_model

    size = config.model.vocab_size or getattr(config.tokenizer, "vocab_size", None)
    if size is None and config.tokenizer.name == "file":
        size = try_tokenizer(config.tokenizer.path, config.tokenizer.end_of_text)
    if size is None and config.tokenizer.name == "char" and not config.data.mixture:
        folder = plan_corpus(config.data, config.tokenizer).folder
        size = read_manifest(folder).vocab_size if is_finished(folder) else None
    model = config.model.model_copy(update={"vocab_size": size or UNKNOWN_VOCABULARY + 1})
    return count_parameters(build_model(config.model_copy(update={"model": model}), torch.float32))


def rough_memory(config: Config, layout: Layout, micro: int, parameters: int) -> float:
    """Return about how many bytes a rank needs: weights, gradients and optimizer state, and what
    the forward of one micro-batch keeps for the backward."""
    model, training = config.model, config.training
    parts = layout.shard * layout.tensor * layout.pipeline * layout.expert
    state = parameters * BYTES_OF_PARAMETER / parts
    tokens = micro * model.context / layout.context
    numbers = ACTIVATIONS * model.layers / layout.pipeline
    if training.gradient_checkpointing and training.recompute == "full":
        numbers = model.layers / layout.pipeline + ACTIVATIONS
    width = 4 if training.precision == "fp32" else 2
    logits = min(tokens, 2048) * (model.vocab_size or 0) * 4 * 2
    return state + tokens * numbers * model.dim * width / layout.tensor + logits


def judge_model(parameters: int, need: float, free: float, where: str) -> Finding:
    """Judge the rough need of a rank, in bytes, against what is free for it."""
    shown = f"{parameters / 1e6:,.2f}M parameters, a rank needs about {need / 1e9:.2f} GB"
    figures = {"parameters": parameters, "needed_gb": round(need / 1e9, 3)}
    if not free:
        return ok(f"{shown}; how much is free is not known", figures)
    shown += f" of {free / 1e9:.1f} GB {where} that is free for it"
    figures["free_gb"] = round(free / 1e9, 2)
    mend = (
        "lower --micro-batch-size, set --training.gradient_checkpointing, divide the model "
        "(--parallel.shard -1), or take a smaller one"
    )
    if need > free:
        return failed(shown, mend, figures)
    return warning(shown, mend, figures) if need > TIGHT * free else ok(shown, figures)
