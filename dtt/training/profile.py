"""A profiler trace of a few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WARMUP = 2
"""Steps before the profiled ones in which the profiler runs already and keeps nothing."""
ROWS = 12
NAME = 44
"""Characters of an operation's name in the table."""


class StepProfiler:
    """Records `steps` ("6-8") of this process, the first being 1, to RUN/profile/trace.json, for
    chrome://tracing or Perfetto, and reports what costs most in them."""

    def __init__(self, folder: Path, steps: str, report: Callable[[str], None]) -> None:
        first, last = (int(number) for number in (steps.split("-") * 2)[:2])
        self._steps, self._number = steps, last - first + 1
        self._path, self._report, self._done = folder / "profile" / "trace.json", report, False
        self._cuda = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._cuda
        warmup = min(WARMUP, first - 1)
        self._profile = profile(
            activities=activities,
            schedule=schedule(
                wait=first - 1 - warmup, warmup=warmup, active=self._number, repeat=1
            ),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def step(self) -> None:
        """Say that an optimizer step is done."""
        if not self._done:
            self._profile.step()

    def close(self) -> None:
        """End the recording, and say so if the run was too short for one."""
        if not self._done:
            self._profile.stop()
        if not self._done:
            self._report(f"no trace: the run ended before steps {self._steps} of this process")

    def _write(self, recorded: Any) -> None:
        self._done = True
        self._path.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self._path))
        self._report("\n".join(self._table(recorded.key_averages())))
        self._report(f"trace of steps {self._steps}: {self._path} (for ui.perfetto.dev)")

    def _table(self, events: Any) -> list[str]:
        """Return lines: what operations cost in a step, by themselves, where it is computed."""
        key = "self_device_time_total" if self._cuda else "self_cpu_time_total"
        rows = [e for e in events if getattr(e, key) > 0 and not e.key.startswith("ProfilerStep")]
        rows.sort(key=lambda event: -getattr(event, key))
        total = sum(getattr(event, key) for event in rows)
        where = "GPU" if self._cuda else "CPU"
        lines = [
            f"what costs most, by itself, of {total / self._number / 1000:.1f} ms {where} a step"
        ]
        lines.append(f"{'operation':<{NAME}} {'ms a step':>9} {'share':>6} {'calls a step':>12}")
        for event in rows[:ROWS]:
            spent, name = getattr(event, key), event.key
            name = name if len(name) <= NAME else f"{name[: NAME - 3]}..."
            lines.append(
                f"{name:<{NAME}} {spent / self._number / 1000:>9.2f} {spent / total:>6.1%} "
                f"{event.count / self._number:>12.0f}"
            )
        return lines
