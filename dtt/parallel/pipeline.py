"""Pipeline parallelism: each rank has some blocks, and forwards pass through the ranks.

The schedules are PyTorch's: GPipe (Huang et al. 2018), 1F1B and interleaved (Narayanan et al. 2021,
arxiv.org/abs/2104.04473), zero-bubble (Qi et al. 2023, arxiv.org/abs/2401.10241).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from dtt.errors import ConfigError

SCHEDULES: dict[str, Any] = {
    "gpipe": ScheduleGPipe,
    "1f1b": Schedule1F1B,
    "interleaved": ScheduleInterleaved1F1B,
    "zero-bubble": ScheduleInterleavedZeroBubble,
}


class Pipeline:
    """Runs the stages of this rank, with those of the other ranks, on the forwards of a step."""

    def __init__(
        self,
        stages: Sequence[tuple[int, nn.Module]],
        number: int,
        schedule: str,
        forwards: int,
        tokens: Tensor,
        stream: Tensor,
        group: ProcessGroup,
        device: torch.device,
    ) -> None:
        """`stages` are this rank's of `number`, with their indices. `tokens` and `stream` are what
        the first one and the others take, as examples on the meta device."""
        self._scale: Tensor | float = 1.0
        self.rows = len(tokens) * forwards
        """Sequences that go through together."""
        loss = torch.empty((), device="meta", requires_grad=True)
        made = [
            PipelineStage(
                stage,
                index,
                number,
                device,
                input_args=tokens if index == 0 else stream,
                output_args=loss if index == number - 1 else stream,
                group=group,
            )
            for index, stage in stages
        ]
        self.is_last = any(stage.is_last for stage in made)
        self._is_first = any(stage.is_first for stage in made)
        try:
            self._schedule = SCHEDULES[schedule](
                made if len(made) > 1 else made[0],
                n_microbatches=forwards,
                loss_fn=lambda loss, target: loss * self._scale,
                scale_grads=False,
            )
        except ValueError as error:
            raise ConfigError(
                f"parallel.schedule {schedule} with {number} stages and {forwards} forwards a "
                f"step: {str(error).rstrip('.')}",
                "change training.accumulation or training.micro_batch_size",
            ) from None

    def train(self, tokens: Tensor, given: dict[str, Tensor], scale: Tensor | float) -> Tensor:
        """Go forward and backward with the loss times `scale`; return the loss on the last rank,
        zero on others."""
        return self._run(self._schedule.step, tokens, given, scale)

    def loss(self, tokens: Tensor, given: dict[str, Tensor]) -> Tensor:
        """Go forward only."""
        return self._run(self._schedule.eval, tokens, given, 1.0)

    def _run(
        self,
        schedule: Callable[..., Any],
        tokens: Tensor,
        given: dict[str, Tensor],
        scale: Tensor | float,
    ) -> Tensor:
        self._scale, losses = scale, list[Tensor]()
        schedule(
            *([tokens] if self._is_first else []),
            target=given["targets"] if self.is_last else None,
            losses=losses if self.is_last else None,
            return_outputs=False,
            **given,
        )
        if not losses:
            return torch.zeros((), dtype=torch.float64, device=tokens.device)
        return torch.stack(losses).detach().sum().double() / scale
