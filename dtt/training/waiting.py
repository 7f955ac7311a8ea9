"""How long a rank waits for others inside of a step: known on CPUs for DDP and FSDP2.

There the wait is a call of this process. On GPUs collectives are work of the device, and between
the parts of a divided layer they are operations of the model: both stay in forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed import Work
from torch.nn.parallel import DistributedDataParallel

from dtt.metrics.meter import Meter
from dtt.parallel.model import ParallelModel

NANO = 1e-9


def knows_waits(model: ParallelModel) -> bool:
    """Whether the time in which this rank waits for others can be told from its own work."""
    layout = model.layout
    divided = layout.tensor * layout.context * layout.pipeline * layout.expert
    ours = not layout.is_plain or isinstance(model.called, DistributedDataParallel)
    return layout.ranks > 1 and divided == 1 and ours and model.mesh.runtime.device.type == "cpu"


def reducer_waits(model: ParallelModel) -> Callable[[], float] | None:
    """Return what tells the seconds that DDP's backward passes have waited after their own work was
    done, each told a step later; None where there is no DDP."""
    called = model.called
    if not isinstance(called, DistributedDataParallel) or not knows_waits(model):
        return None
    reducer: Any = called
    reducer._set_ddp_runtime_logging_sample_rate(1)  # of each step; the default is 100

    def seconds() -> float:
        data: dict[str, Any] = reducer._get_ddp_logging_data()
        sent = data.get("avg_backward_comm_time", 0)
        hidden = data.get("avg_backward_compute_comm_overlap_time", 0)
        return max(sent - hidden, 0) * data.get("iteration", 0) * NANO

    return seconds


@contextmanager
def waits_counted(model: ParallelModel, meter: Meter) -> Iterator[None]:
    """Inside, the time in waits for collectives, in a step, is the meter's part `exchange`."""
    if not knows_waits(model):
        yield
        return
    whole = Work.wait

    def wait(self: Work, *arguments: Any, **options: Any) -> Any:
        with meter.waiting():
            return whole(self, *arguments, **options)

    Work.wait = wait  # type: ignore[method-assign]
    try:
        yield
    finally:
        Work.wait = whole  # type: ignore[method-assign]
