"""Derive steering settings from a Lightning Trainer: budget, batch size, clipping and precision of a fit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.types import LRSchedulerConfig

from trainpilot.agents.integrations.common import Accumulation, GivenSettings, merge_settings, settings_fields
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.torch_schedules import schedule_of
from trainpilot.llm_runtime.config import batch_limits

FAST_DEV_RUN: dict[str, Any] = {
    "policy": "none",
    "decisions": 1,
    "sequences": None,
    "budget": None,
    "batch_size": None,
    "min_batch_size": None,
    "max_batch_size": None,
    "contract": None,
}
"""Settings under `fast_dev_run`, which has too few batches for decisions."""


@dataclass(frozen=True, kw_only=True)
class LoaderInfo(Accumulation):
    """Micro-batches of the data loader, and the Trainer's limits on epochs and steps."""

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
    ) -> LoaderInfo:
        """Read it from a Trainer whose data are set up; its limits count from `began_at`, steps and epochs.

        Raises:
            ValueError: the size of the loader's batches is unknown.
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

    def limits(self, batch_size: int, *, short_steps: bool = False) -> dict[str, int]:
        """Return the largest budget in sequences under each of the Trainer's own limits, by the limit's name.

        Args:
            batch_size: Sequences of a step.
            short_steps: Whether the last step of an epoch, which may be short, counts as a step of `max_steps`.
        """
        limits: dict[str, int] = {}
        if self.max_epochs != -1 and self.epoch_sequences is not None:
            limits["max_epochs passes over the data"] = self.max_epochs * self.epoch_sequences
        if self.max_steps != -1:
            limits["max_steps x batch_size"] = self.max_steps * batch_size
            if short_steps and self.epoch_sequences:
                epochs, steps = divmod(self.max_steps, -(-self.epoch_sequences // batch_size))
                limits["max_steps x batch_size"] = epochs * self.epoch_sequences + steps * batch_size
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
class OriginalSettings:
    """Settings of the Trainer that steering replaces during a fit and restores afterwards."""

    max_steps: int
    accumulate: int
    precision: Precision


def check_fit(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Raise `ValueError` for a fit that cannot be steered from a callback."""
    if type(trainer).__module__.startswith("pytorch_lightning"):
        raise ValueError(
            "the Trainer must be one of lightning.pytorch, got one of pytorch_lightning, the library's old name, whose "
            "classes are others; write `import lightning.pytorch as pl`"
        )
    if not module.automatic_optimization:
        raise ValueError(
            "automatic_optimization must be True for LightningSteering, got False; a manual loop takes "
            "Steering itself: `with steering.step() as step: step.backward(...)`"
        )
    if len(trainer.lr_scheduler_configs) > 1:
        raise ValueError(
            "configure_optimizers must return one learning-rate scheduler at most, got "
            f"{len(trainer.lr_scheduler_configs)}; it becomes the base schedule"
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


def starting_precision(plugin: Precision) -> str:
    """Return the Trainer's precision. Raises `ValueError` for one that cannot be changed during a run."""
    if type(plugin) is Precision:
        return "fp32"
    if type(plugin) is MixedPrecision and plugin.precision == "bf16-mixed":
        return "bf16"
    raise ValueError(
        f"precision must be 32-true or bf16-mixed, whose weights are float32, got {plugin.precision} "
        f"({type(plugin).__name__}); set Trainer(precision='32-true') and offer bf16 in SteeringSettings.precisions"
    )


def settings_for(
    trainer: pl.Trainer,
    given: GivenSettings,
    info: LoaderInfo,
    plugin: Precision,
    scheduler: LRSchedulerConfig | None = None,
) -> SteeringSettings:
    """Return the settings of a fit: the given ones, and the rest from the Trainer.

    Args:
        trainer: The Trainer, its data set up.
        given: Settings, or some of their fields.
        info: Micro-batches of the data, and the Trainer's limits.
        plugin: The Trainer's precision.
        scheduler: What `configure_optimizers` returned; it becomes the base schedule, unless one is given.

    Raises:
        ValueError: what is given contradicts the Trainer.
    """
    if getattr(trainer, "fast_dev_run", False):
        given, info = settings_fields(given) | FAST_DEV_RUN, replace(info, accumulate=1)
    by_norm = trainer.gradient_clip_algorithm != "value"
    wanted = merge_settings(
        given,
        info,
        batch_rule="micro-batch x processes x accumulate_grad_batches",
        clip=float(trainer.gradient_clip_val) if trainer.gradient_clip_val and by_norm else None,
        clip_rule="what Trainer(gradient_clip_val=...) clips the norm to",
    )
    batch_size = wanted["batch_size"]
    if batch_size % info.unit:
        raise ValueError(
            f"batch_size must be a multiple of the {info.micro_batch_size} sequences that the data loader gives to "
            f"each of {info.world_size} processes, got {batch_size}"
        )
    given_least = wanted.get("min_batch_size")
    wanted["min_batch_size"] = _least_batch(given_least, batch_size, info)
    if given_least is None and wanted["min_batch_size"] == batch_size > 1 and wanted.get("policy") != "none":
        warnings.warn(
            f"the batch size cannot fall below {batch_size}, one batch of the data loader in every process; to let it "
            "fall, make the loader's batch smaller and set accumulate_grad_batches",
            stacklevel=2,
        )
    if wanted.get("budget") is None:
        wanted["sequences"] = _budget(
            wanted.get("sequences"), info.limits(batch_size, short_steps=wanted.get("mode") == "advise")
        )
    if scheduler is not None and wanted.get("base_schedule") is None:
        wanted["base_schedule"] = _base_schedule(scheduler, wanted, info)
    elif scheduler is not None:
        name = type(scheduler.scheduler).__name__
        warnings.warn(f"base schedule: the base_schedule that is given, not the {name} of the module", stacklevel=2)
    wanted["epoch_sequences"] = wanted.get("epoch_sequences") or info.epoch_sequences
    wanted["precisions"] = _precisions(wanted.get("precisions"), starting_precision(plugin))
    return SteeringSettings(**wanted)


def _base_schedule(scheduler: LRSchedulerConfig, wanted: Mapping[str, Any], info: LoaderInfo) -> Any:
    """Return the module's own scheduler as base schedule: over the steps, or the epochs, of the whole run."""
    sequences, batch_size = wanted.get("sequences"), wanted["batch_size"]
    per = batch_size if scheduler.interval == "step" else info.epoch_sequences
    if sequences is None or per is None:
        missing = "the budget" if sequences is None else "the length of the data"
        raise ValueError(
            f"base_schedule must be given where the scheduler counts in {scheduler.interval}s and {missing} is not "
            "known in sequences, got None; or leave the scheduler out"
        )
    return schedule_of(scheduler.scheduler, max(math.ceil(sequences / (per * scheduler.frequency)), 1))


def _least_batch(given: int | None, batch_size: int, info: LoaderInfo) -> int:
    """Return the smallest batch that halving reaches in whole micro-batches."""
    least, (smallest, _) = batch_size, batch_limits(batch_size, batch_size)
    while least % (2 * info.unit) == 0 and least // 2 >= smallest:
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


def _precisions(given: tuple[str, ...] | None, start: str) -> tuple[str, ...]:
    precisions = given or (start,)
    if start == "bf16" and precisions[0] != "bf16":
        raise ValueError(
            f"precisions must begin with bf16 under Trainer(precision='bf16-mixed'), got {precisions}; "
            "set precision='32-true', or put bf16 first"
        )
    return precisions
