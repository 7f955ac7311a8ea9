"""The model card: what a person who finds an exported model wants to know of its run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dtt.config.data import data_of_parts
from dtt.config.schema import Config
from dtt.config.sources import source_label
from dtt.config.yaml_text import write_yaml
from dtt.huggingface.hub import NAME
from dtt.metrics.loggers import read_metrics
from dtt.model.decoder import count_active_parameters, count_parameters
from dtt.model.kinds import empty_model
from dtt.training.saved import Saved
from dtt.version import __version__

SHOWN = ("model", "tokenizer", "training", "optimizer", "schedule")
"""Sections of the configuration that made the model; others are about a machine."""

USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0], skip_special_tokens=True))
```

"""


def portable(config: Config) -> dict[str, Any]:
    """Return the settings of a run without its places: folders and files by their last name."""
    tree = config.model_dump(mode="json", exclude={"dir": True, "logging": True, "name": True})
    if config.data.mixture:
        del tree["data"]["source"]
    if config.init_from is not None and not NAME.fullmatch(config.init_from.partition("@")[0]):
        tree["init_from"] = Path(config.init_from).name
    return {key: _without_places(value) for key, value in tree.items()}


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        inner = {key: _without_places(one) for key, one in value.items() if key != "dir"}
        for key in ("path", "urls"):
            paths = inner.get(key)
            if isinstance(paths, str):
                inner[key] = Path(paths).name
            elif isinstance(paths, list):
                inner[key] = [Path(str(path).partition("?")[0]).name for path in paths]
        return inner
    return [_without_places(one) for one in value] if isinstance(value, list) else value


def _said(section: dict[str, Any]) -> dict[str, Any]:
    """Return a section without what is null, which says that something is as usual."""
    return {
        key: _said(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value is not None
    }


def card(
    saved: Saved,
    config: Config,
    run: Path,
    *,
    family: str | None,
    proven: Mapping[str, str],
    loaded: str | None,
) -> str:
    """Return README.md of an exported model.

    `run` is where the metrics are, `family` the architecture of transformers (None: dtt's own
    names), `proven` what was found, in words, by what it is of; `loaded` what transformers loads
    it by (None: it cannot, or has no tokenizer).
    """
    label = config.name or run.name
    front = {"tags": ["dtt", "text-generation"], "pipeline_tag": "text-generation"}
    if family is not None:
        front |= {"library_name": "transformers"}
    if config.init_from and NAME.fullmatch(config.init_from.partition("@")[0]):
        front |= {"base_model": config.init_from.partition("@")[0]}
    rows = "".join(f"| {key} | {value} |\n" for key, value in _facts(saved, config, run).items())
    proofs = "".join(f"- {key}: {value}\n" for key, value in proven.items())
    kept = portable(config)
    settings = write_yaml({key: _said(kept[key]) for key in SHOWN})
    use = USE.format(name=loaded) if loaded else ""
    return (
        f"---\n{write_yaml(front)}---\n\n# {label}\n\n"
        f"A language model trained with dtt{f', as {family}' if family else ''}.\n\n"
        f"| | |\n|---|---|\n{rows}\n{use}"
        f"{'## Checked' if proofs else ''}\n\n{proofs}\n"
        f"## Settings\n\n```yaml\n{settings}```\n"
    )


def _facts(saved: Saved, config: Config, run: Path) -> dict[str, str]:
    model = empty_model(config.model)
    total, active = count_parameters(model), count_active_parameters(model)
    sources = [source_label(data.source) for data in data_of_parts(config.data)]
    found = {
        "parameters": f"{total:,}" + (f" ({active:,} active)" if active != total else ""),
        "data": f"{', '.join(sources)} (prepared as `{saved.state['corpus']}`)",
        "steps": f"{saved.step:,}",
        "tokens seen": f"{saved.state['tokens']:,}",
        "context": f"{config.model.context:,} tokens",
    }
    if config.init_from is not None:
        found["started from"] = portable(config)["init_from"]
    found |= _figures(run / "metrics.jsonl", saved.step)
    found |= {
        "seed": str(config.seed),
        "made with": f"dtt {saved.manifest['dtt']}, exported with dtt {__version__}, "
        f"PyTorch {torch.__version__.partition('+')[0]}",
    }
    return found


def _figures(metrics: Path, step: int) -> dict[str, str]:
    """The validation of the step, or the last one before it."""
    if not metrics.is_file():
        return {}
    rows = [row for row in read_metrics(metrics) if "val_loss" in row and row["step"] <= step]
    if not rows:
        return {}
    row = rows[-1]
    at = "" if row["step"] == step else f" (at step {row['step']})"
    found = {"validation loss": f"{row['val_loss']:.4f}{at}"}
    if row.get("val_bits_per_byte") is not None:
        floor = row.get("val_floor")
        lowest = f" (the lowest possible is {floor:.4f})" if floor else ""
        found["bits per byte"] = f"{row['val_bits_per_byte']:.4f}{lowest}"
    return found
