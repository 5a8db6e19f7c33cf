"""Read what a Lightning Trainer was told: budget, batch, clipping and precision of a fit that is to be steered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from dataclasses import dataclass, fields, replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from trainpilot.agents.steering.settings import BATCH_RANGE, SteeringSettings
from trainpilot.llm_runtime.process_group import OneProcess, Ranks

TRIED_OUT: dict[str, Any] = {
    "policy": "none",
    "decisions": 1,
    "sequences": None,
    "batch_size": None,
    "min_batch_size": None,
    "max_batch_size": None,
    "contract": None,
}
"""What `fast_dev_run` sets: too few batches for decisions."""


@dataclass(frozen=True, kw_only=True)
class Feed:
    """What the Trainer is fed with, and for how long."""

    micro_batch_size: int
    """Sequences of one batch of the data loader in one process."""
    world_size: int
    """Processes."""
    accumulate: int
    """Micro-batches of an optimiser step at the start."""
    epoch_sequences: int | None
    """Sequences of an epoch in all processes; unknown where the loader has no length."""
    max_epochs: int
    """-1 is without limit."""
    max_steps: int
    """-1 is without limit."""

    @classmethod
    def of(
        cls,
        trainer: pl.Trainer,
        micro_batch_size: int | None,
        max_steps: int,
        accumulate: int,
        began_at: tuple[int, int] = (0, 0),
    ) -> Feed:
        """Read it from a Trainer whose data are set up; of its limits, what is left after `began_at` steps and epochs.

        Raises:
            ValueError: the loader does not say how many sequences its batches have.
        """
        loader = trainer.train_dataloader
        micro = micro_batch_size or _batch_size(loader)
        if micro is None:
            raise ValueError(
                "micro_batch_size must be given where the training data loader has no batch_size, got None; "
                "LightningSteering(micro_batch_size=8) for batches of 8 sequences"
            )
        return cls(
            micro_batch_size=micro,
            world_size=trainer.world_size,
            accumulate=accumulate,
            epoch_sequences=_epoch_sequences(trainer, loader, micro),
            max_epochs=-1 if trainer.max_epochs in (None, -1) else trainer.max_epochs - began_at[1],
            max_steps=-1 if max_steps == -1 else max_steps - began_at[0],
        )

    @property
    def unit(self) -> int:
        """Sequences of one micro-batch in every process."""
        return self.micro_batch_size * self.world_size

    def limits(self, batch_size: int) -> dict[str, int]:
        """Return how many sequences the Trainer's own limits leave to a run, each by its name."""
        limits: dict[str, int] = {}
        if self.max_epochs != -1 and self.epoch_sequences is not None:
            limits["max_epochs passes over the data"] = self.max_epochs * self.epoch_sequences
        if self.max_steps != -1:
            limits["max_steps x batch_size"] = self.max_steps * batch_size
        return limits


def _batch_size(loader: Any) -> int | None:
    size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
    return size if isinstance(size, int) else None


def _epoch_sequences(trainer: pl.Trainer, loader: Any, micro: int) -> int | None:
    batches = trainer.num_training_batches
    if math.isinf(batches):
        return None
    sequences, sampler = int(batches) * micro, getattr(loader, "sampler", None)
    if isinstance(sampler, Sized):
        sequences = min(sequences, len(sampler))
    return sequences * trainer.world_size


@dataclass(frozen=True, kw_only=True)
class Own:
    """What the Trainer was given, to be given back."""

    max_steps: int
    accumulate: int
    precision: Precision


def check_fit(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raise `ValueError` for a fit that cannot be steered from a callback."""
    if not module.automatic_optimization:
        raise ValueError(
            "automatic_optimization must be True for LightningSteering, got False; a manual loop takes "
            "Steering itself: `with steering.step() as step: step.backward(...)`"
        )
    if trainer.lr_scheduler_configs:
        name = type(trainer.lr_scheduler_configs[0].scheduler).__name__
        raise ValueError(
            f"configure_optimizers must return no learning-rate scheduler, got {name}; remove it, as steering has "
            "the base schedule in it"
        )
    if trainer.min_epochs or trainer.min_steps:
        raise ValueError(
            f"min_epochs and min_steps must be unset, got {trainer.min_epochs} and {trainer.min_steps}; the run ends "
            "with its budget, SteeringSettings.sequences"
        )
    known = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
    if not known or trainer.strategy.handles_gradient_accumulation:
        raise ValueError(
            f"strategy must be a single device or DDP, got {type(trainer.strategy).__name__}; a plain loop takes "
            "FSDP2 too: Steering(..., ranks=ProcessGroupRanks())"
        )
    starting_precision(trainer.precision_plugin)


def ranks_of(trainer: pl.Trainer) -> Ranks:
    """Return the Trainer's processes."""
    if trainer.world_size == 1:
        return OneProcess()
    from trainpilot.agents.integrations.common import ProcessGroupRanks

    return ProcessGroupRanks()


def starting_precision(plugin: Precision) -> str:
    """Return the precision that the Trainer was given. Raises `ValueError` for one that cannot be changed in a run."""
    if type(plugin) is Precision:
        return "fp32"
    if type(plugin) is MixedPrecision and plugin.precision == "bf16-mixed":
        return "bf16"
    raise ValueError(
        f"precision must be 32-true or bf16-mixed, whose weights are float32, got {plugin.precision} "
        f"({type(plugin).__name__}); set Trainer(precision='32-true') and offer bf16 in SteeringSettings.precisions"
    )


def settings_for(
    trainer: pl.Trainer, given: SteeringSettings | Mapping[str, Any] | None, feed: Feed, plugin: Precision
) -> SteeringSettings:
    """Return the settings of a fit: what is given, and the rest from the Trainer.

    Raises:
        ValueError: what is given contradicts the Trainer.
    """
    wanted = _given(given)
    if getattr(trainer, "fast_dev_run", False):
        wanted, feed = wanted | TRIED_OUT, replace(feed, accumulate=1)
    wanted["batch_size"] = batch_size = _start_batch(wanted.get("batch_size"), feed)
    wanted["min_batch_size"] = _least_batch(wanted.get("min_batch_size"), batch_size, feed)
    wanted["sequences"] = _budget(wanted.get("sequences"), feed.limits(batch_size))
    wanted["gradient_clip"] = _clip(wanted.get("gradient_clip"), trainer)
    wanted["precisions"] = _precisions(wanted.get("precisions"), starting_precision(plugin))
    return SteeringSettings(**wanted)


def _given(given: SteeringSettings | Mapping[str, Any] | None) -> dict[str, Any]:
    names = [field.name for field in fields(SteeringSettings)]
    if isinstance(given, SteeringSettings):
        return {name: getattr(given, name) for name in names}
    wanted = dict(given or {})
    if unknown := sorted(set(wanted) - set(names)):
        raise ValueError(f"settings must be fields of SteeringSettings, got {', '.join(unknown)}")
    return wanted


def _start_batch(given: int | None, feed: Feed) -> int:
    batch_size = given or feed.unit * feed.accumulate
    if batch_size % feed.unit:
        raise ValueError(
            f"batch_size must be a multiple of the {feed.micro_batch_size} sequences that the data loader gives to "
            f"each of {feed.world_size} processes, got {batch_size}"
        )
    if feed.accumulate != 1 and batch_size != feed.unit * feed.accumulate:
        raise ValueError(
            f"batch_size must be micro-batch x processes x accumulate_grad_batches = {feed.unit * feed.accumulate}, "
            f"got {batch_size}; leave one of the two out"
        )
    return batch_size


def _least_batch(given: int | None, batch_size: int, feed: Feed) -> int:
    """Return the smallest batch that halving reaches in whole micro-batches."""
    least = batch_size
    while least % (2 * feed.unit) == 0 and least * BATCH_RANGE > batch_size:
        least //= 2
    if given is None or given >= least:
        return given or least
    raise ValueError(
        f"min_batch_size must be at least {least}, what whole batches of the data loader allow, got {given}; "
        "make the data loader's batch smaller"
    )


def _budget(given: int | None, limits: Mapping[str, int]) -> int:
    if not limits and given is None:
        raise ValueError(
            "sequences, the budget, must be given where the Trainer has neither max_steps nor max_epochs of a "
            "data loader with a length, got None"
        )
    name, most = min(limits.items(), key=lambda item: item[1]) if limits else ("", given)
    if given is not None and most is not None and given > most:
        raise ValueError(
            f"sequences must be at most what {name} give, {most:,}, got {given:,}; raise the limit, or leave "
            "sequences out"
        )
    return given or most or 0


def _clip(given: float | None, trainer: pl.Trainer) -> float | None:
    by_norm = trainer.gradient_clip_algorithm != "value"
    actual = float(trainer.gradient_clip_val) if trainer.gradient_clip_val and by_norm else None
    if given is not None and given != actual:
        raise ValueError(
            f"gradient_clip must be what Trainer(gradient_clip_val=...) clips the norm to, {actual}, got {given}; "
            "set the Trainer's, and gradient_clip=None here"
        )
    return actual


def _precisions(given: tuple[str, ...] | None, start: str) -> tuple[str, ...]:
    precisions = given or (start,)
    if start == "bf16" and precisions[0] != "bf16":
        raise ValueError(
            f"precisions must begin with bf16 under Trainer(precision='bf16-mixed'), got {precisions}; "
            "set precision='32-true', or put bf16 first"
        )
    return precisions
