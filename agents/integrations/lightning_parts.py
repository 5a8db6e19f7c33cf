"""Parts put into a Lightning Trainer: how it counts, in which precision it trains, its loss without a trace."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor

from trainpilot.agents.integrations.lightning_fit import pl
from trainpilot.llm_runtime.loop import Levers


class Window(int):
    """How many micro-batches an optimiser step has, counted from its first one.

    Lightning steps where the number of batches so far, modulo `accumulate_grad_batches`, is 0. This number takes the
    remainder from `start` on, so that steps of any length may follow one another.
    """

    start: int

    def __new__(cls, count: int, start: int = 0) -> Window:
        """Return `count`, to be counted from batch number `start`."""
        window = super().__new__(cls, count)
        window.start = start
        return window

    def __rmod__(self, number: int, /) -> int:
        return (number - self.start) % int(self)


class SteeredPrecision(Precision):
    """Runs training in the precision that steering has in force, the rest in the Trainer's own.

    Args:
        levers: Know the precision.
        own: The Trainer's plugin.
    """

    def __init__(self, levers: Levers, own: Precision) -> None:
        self._levers, self._own = levers, own
        self.precision = own.precision

    def forward_context(self) -> AbstractContextManager[Any]:
        """Return the Trainer's own context, for validation."""
        return self._own.forward_context()

    def train_step_context(self) -> AbstractContextManager[Any]:  # type: ignore[override]
        """Return the context of the precision in force."""
        return self._levers.autocast()


def sequences_in_first(batch: Any) -> int:
    """Return the length of the first tensor in a batch."""
    return int(extract_batch_size(batch))


def training_loss(module: pl.LightningModule, batch: Any, batch_idx: int) -> Tensor:
    """Return the loss of the module's own training step. Raises `ValueError` where it has none."""
    numbered = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    output = module.training_step(batch, batch_idx) if numbered else module.training_step(batch)
    loss = output["loss"] if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"training_step must return a loss for the curvature probe, got {type(loss).__name__}; "
            "give SteeringCallback(probe_loss=...), or set probe=False in its settings"
        )
    return loss


@contextmanager
def without_log(module: pl.LightningModule) -> Iterator[None]:
    """Have `self.log` and `self.log_dict` do nothing."""
    vars(module)["log"] = lambda *_, **__: None
    try:
        yield
    finally:
        del vars(module)["log"]
