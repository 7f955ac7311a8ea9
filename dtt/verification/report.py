"""Does every layout of ranks train the model that one rank trains? Proven on this machine's CPU.

The user's own model, made small, takes the same steps on one process and on each layout, in fp32.
Losses alone hide errors, so every gradient and every update is compared. Each step starts from the
state that one process had: what differs is then the step's own, not a rounding that twenty steps
have blown up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from torch import Tensor

from dtt.config.schema import Config
from dtt.data.progress import Advance, progress, silent
from dtt.errors import EXIT_DONE, ConfigError, NumericError
from dtt.training.refusals import require_plan
from dtt.verification import cases as sizes
from dtt.verification.cases import ALONE, VOCABULARY, Case, cases_for, shrink, small
from dtt.verification.training import outcomes, run


@dataclass(frozen=True)
class Difference:
    """How far a case is from one process."""

    loss: float
    norm: float
    gradient: float
    parameter: str
    """Where the gradients differ most."""
    update: float

    def within(self, case: Case) -> bool:
        """Whether it is what the order of sums may make; False for what is not a number."""
        gradient = max(self.gradient, self.norm)
        return self.loss <= case.loss and gradient <= case.gradient and self.update <= case.update


def compare(found: Mapping[str, Tensor], alone: Mapping[str, Tensor]) -> Difference:
    """Return how far a case is from one process; what is missing differs by infinity."""
    worst, where, update = 0.0, "-", 0.0
    for name, tensor in alone.items():
        step, _, rest = name.partition(".")
        group, _, parameter = rest.partition(".")
        if group == "gradient":
            error = _apart(found[name], tensor) if name in found else math.inf
            if not error <= worst:
                worst, where = error, f"{parameter}, step {int(step) + 1}"
        elif group == "model" and step != "0":
            moved = (tensor - alone[f"{int(step) - 1}.{rest}"]).norm().item()
            apart = (found[name] - tensor).norm().item()
            update = max(update, apart / moved if moved else apart)
    losses = ((found["losses"] - alone["losses"]) / alone["losses"]).abs().max().item()
    norms = ((found["norms"] - alone["norms"]) / alone["norms"]).abs().max().item()
    return Difference(losses, norms, worst, where, update)


def _apart(found: Tensor, alone: Tensor) -> float:
    largest = alone.abs().max().item()
    apart = (found - alone).abs().max().item()
    return apart / largest if largest else apart


def verify(config: Config, advance: Advance = silent) -> Iterator[tuple[Case, Difference | str]]:
    """Yield each case with its difference from one process, or why this model does not go so."""
    wanted, done = cases_for(config), 0
    advance("training on 1 rank", done, len(wanted))
    (alone,) = run(config, [ALONE])
    for ranks, group in itertools.groupby(wanted, lambda case: case.ranks):
        reasons, going = {}, []
        for case in group:
            try:
                require_plan(small(config, case), case.ranks)
                going.append(case)
            except ConfigError as error:
                reasons[case] = error.what
        yield from reasons.items()
        advance(f"training on {ranks} ranks", done, len(wanted))
        results = outcomes(config, going, alone) if going else []
        for case, found in zip(going, results, strict=True):
            yield case, found.what if isinstance(found, ConfigError) else compare(found, alone)
        done += len(going) + len(reasons)


def verify_command(config: Config) -> int:
    """Print a table of all cases; NumericError names the first that differs."""
    model, console = shrink(config.model), Console()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for head in ("layout", "ranks", "loss", "norm", "gradient", "update", ""):
        table.add_column(head, justify="left" if head in ("layout", "") else "right", no_wrap=True)
    wrong: list[str] = []
    reasons: list[str] = []
    with progress() as advance:
        outcome = dict(verify(config, advance))
    for case, found in outcome.items():
        if isinstance(found, str):
            table.add_row(case.name, str(case.ranks), *"----", "refused")
            reasons.append(found)
            continue
        good = found.within(case)
        if not good:
            wrong.append(f"{case.name}, where {found.parameter} is {found.gradient:.1e} off")
        values = (found.loss, found.norm, found.gradient, found.update)
        figures = (f"{value:.1e}" for value in values)
        verdict = "[green]same[/]" if good else "[red bold]DIFFERS[/]"
        table.add_row(case.name, str(case.ranks), *figures, verdict)
    console.print(
        f"{model.layers} layers x {model.dim}, {model.heads} heads, vocabulary {VOCABULARY}, "
        f"{config.optimizer.name}, fp32, {sizes.STEPS} steps.\n"
        "Largest differences from one process:"
    )
    console.print(table)
    for reason in dict.fromkeys(reasons):
        console.print(f"refused: {reason}", soft_wrap=True)
    if wrong:
        raise NumericError(
            f"{len(wrong)} of {len(outcome)} layouts do not train the same model: {wrong[0]}",
            "do not trust runs with these layouts",
        )
    return EXIT_DONE
