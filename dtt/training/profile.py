"""A profiler trace of a few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

WAIT, WARMUP, ACTIVE = 3, 2, 3


class StepProfiler:
    """Records steps 6 to 8 of this process to RUN/profile/, for chrome://tracing or Perfetto."""

    def __init__(self, folder: Path, report: Callable[[str], None]) -> None:
        self._path, self._report = folder / "profile" / "trace.json", report
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def step(self) -> None:
        """Say that an optimizer step is done."""
        self._profile.step()

    def close(self) -> None:
        """End the recording; a run of fewer steps has none."""
        self._profile.stop()

    def _write(self, recorded: Any) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        recorded.export_chrome_trace(str(self._path))
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        self._report(recorded.key_averages().table(sort_by=key, row_limit=12))
        self._report(f"trace of {ACTIVE} steps: {self._path}")
