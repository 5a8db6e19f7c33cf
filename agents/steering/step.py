"""Make one optimiser step of a plain PyTorch loop under steering."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from trainpilot.agents.steering.steering import Steering


class Step:
    """One optimiser step, for a `with`: gradients are gathered inside, and the step is made at its end.

    An exception inside drops the step: the weights stay as they were, and the loop may try again. One of several
    processes cannot: the others have gone on.

    Args:
        steering: What steers the loop.
    """

    def __init__(self, steering: Steering) -> None:
        self._steering = steering
        self._done = 0
        self.batch_size = 0
        """Sequences that this process is to train on in this step."""
        self.learning_rate = 0.0
        """Learning rate of this step."""

    def __enter__(self) -> Step:
        steering = self._steering
        self.batch_size = -(-steering.begin_step() // steering.ranks.world_size)
        self.learning_rate = steering.levers.learning_rate()
        steering.levers.optimizer.zero_grad(set_to_none=True)
        return self

    def backward(
        self,
        loss: Callable[[], torch.Tensor],
        sequences: int | None = None,
        *,
        probe_loss: Callable[[int], torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Add the gradient of a micro-batch, and return its loss.

        Args:
            loss: Computes the micro-batch's mean loss in nats/token, a scalar; called under the precision in force,
                and now and then three times more for the curvature probe.
            sequences: Sequences of the micro-batch; by default the whole of the step's.
            probe_loss: Computes the mean loss of the micro-batch's first so many sequences. The curvature probe then
                takes no more than it needs; without it, the whole micro-batch.

        Raises:
            ValueError: the step would get more sequences than its batch.
        """
        steering, sequences = self._steering, self.batch_size if sequences is None else sequences
        if sequences < 1 or self._done + sequences > self.batch_size:
            raise ValueError(
                f"sequences must add up to the step's batch_size {self.batch_size}, got {sequences} after "
                f"{self._done}; take as many as step.batch_size says"
            )
        self._done += sequences
        if steering.probe_wanted:
            count = min(steering.probe_sequences, sequences)
            steering.probe(loss if probe_loss is None else lambda: probe_loss(count))
        share = sequences / self.batch_size
        steering.ranks.synchronise_gradients(steering.levers.model, self._done == self.batch_size)
        with steering.levers.autocast():
            value = loss()
        torch.autograd.backward(value * share)
        steering.note_loss(value, share)
        return value.detach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        steering = self._steering
        if kind is not None:
            self._drop()
            return
        if self._done != self.batch_size:
            self._drop()
            raise ValueError(
                f"sequences must add up to the step's batch_size {self.batch_size}, got {self._done}; "
                "call step.backward for every micro-batch"
            )
        clip = steering.settings.gradient_clip
        parameters = steering.levers.parameters()
        try:
            norm = nn.utils.clip_grad_norm_(parameters, float("inf") if clip is None else clip)
            steering.levers.optimizer.step()
        except BaseException:
            self._drop()
            raise
        steering.levers.optimizer.zero_grad(set_to_none=True)
        steering.end_step(norm, self._done * steering.ranks.world_size)

    def _drop(self) -> None:
        steering = self._steering
        steering.levers.optimizer.zero_grad(set_to_none=True)
        if steering.ranks.world_size > 1:
            steering.ranks.synchronise_gradients(steering.levers.model, True)
        steering.drop_step()
