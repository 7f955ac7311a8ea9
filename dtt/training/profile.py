"""A profiler trace of a few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile, schedule

WARMUP = 2
"""Steps before the profiled ones in which the profiler runs already and keeps nothing."""
ROWS = 12
NAME = 44
"""Characters of an operation's name in the table."""


class StepProfiler:
    """Records `steps` ("6-8") of this process, the first being 1, to RUN/profile/trace.json, for
    chrome://tracing or Perfetto, and reports what costs most in them.

    `most` is how many steps there will be, at most: what comes after the last one is not recorded.
    `cuda` says where the steps are computed, and so what is recorded and told.
    """

    def __init__(
        self, folder: Path, steps: str, most: int, report: Callable[[str], None], *, cuda: bool
    ) -> None:
        first, last = (int(number) for number in (steps.split("-") * 2)[:2])
        last = max(min(last, most), first)
        self._steps, self._first, self._last = steps, first, last
        self._path, self._report, self._cuda = folder / "profile" / "trace.json", report, cuda
        self._count, self._done = 0, False
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        warmup = min(WARMUP, first - 1)
        self._profile = profile(
            activities=activities,
            schedule=schedule(
                wait=first - 1 - warmup, warmup=warmup, active=last - first + 1, repeat=1
            ),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def step(self) -> None:
        """Say that an optimizer step is done."""
        if not self._done:
            self._count += 1
            self._profile.step()

    def close(self) -> None:
        """End the recording, and say so if the run was too short for one."""
        if not self._done:
            self._profile.stop()
        if not self._done:
            self._report(f"no trace: the run ended before steps {self._steps} of this process")

    def _write(self, recorded: Any) -> None:
        """Take up what was recorded: torch calls it after the last step, or when it is stopped."""
        number = min(self._count, self._last) - self._first + 1
        if number < 1:
            return
        self._done = True
        self._path.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self._path))
        self._report("\n".join(self._table(recorded.key_averages(), number)))
        steps = f"{self._first}-{self._first + number - 1}" if number > 1 else str(self._first)
        self._report(f"trace of steps {steps}: {self._path} (for ui.perfetto.dev)")

    def _table(self, events: Any, number: int) -> list[str]:
        """Return lines: what operations cost in one of so many steps, by themselves, where it is
        computed."""
        key = "self_device_time_total" if self._cuda else "self_cpu_time_total"
        rows = [e for e in events if getattr(e, key) > 0 and not e.key.startswith("ProfilerStep")]
        rows.sort(key=lambda event: -getattr(event, key))
        total = sum(getattr(event, key) for event in rows)
        where = "GPU" if self._cuda else "CPU"
        lines = [f"what costs most, by itself, of {total / number / 1000:.1f} ms {where} a step"]
        lines.append(f"{'operation':<{NAME}} {'ms a step':>9} {'share':>6} {'calls a step':>12}")
        for event in rows[:ROWS]:
            spent, name = getattr(event, key), event.key
            name = name if len(name) <= NAME else f"{name[: NAME - 3]}..."
            lines.append(
                f"{name:<{NAME}} {spent / number / 1000:>9.2f} {spent / total:>6.1%} "
                f"{event.count / number:>12.0f}"
            )
        return lines
