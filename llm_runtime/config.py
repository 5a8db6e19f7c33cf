"""The configuration of a run, the controls of an interval, and the limits of these controls.

`RunConfig` describes a run: model, corpus, budget and starting settings. `Controls` are what a controller chooses for
one interval. `ControlLimits` and `batch_limits` say what it may choose from. Loads numpy, but not torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral
from typing import Annotated, Any, ClassVar, Literal, get_args, overload

import numpy as np
from numpy.typing import NDArray

from trainpilot.llm_runtime.budget import Budget, Currency
from trainpilot.llm_runtime.json_records import JsonRecord
from trainpilot.llm_runtime.plain_values import MAX_INT, shown
from trainpilot.llm_runtime.ranges import Range, Whole, check_ranges
from trainpilot.llm_runtime.schedules import PARTS, SCHEDULES, Schedule, ScheduleName

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
Pruning = Literal["none", "magnitude", "evolution", "width"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
PRUNINGS: tuple[Pruning, ...] = get_args(Pruning)

PruningImportance = Literal["weight", "activation"]
PRUNING_IMPORTANCES: tuple[PruningImportance, ...] = get_args(PruningImportance)


@dataclass(frozen=True, kw_only=True)
class Controls(JsonRecord):
    """Controls of one interval. `RunConfig.start()` returns those of the untouched base schedule."""

    learning_rate_scale: float = 1.0
    """Factor on the base schedule at the starting batch size, dimensionless."""
    batch_size: int
    """Sequences per optimiser step."""
    precision: Precision = "fp32"
    """Number format of the matrix products; weights and optimiser state stay in float32."""
    sparsity: float = 0.0
    """Share of the prunable weights held at zero, or of the feed-forward channels removed, in [0, 1)."""
    finish: bool = False
    """Cool down now: the learning rate falls linearly to zero over a fifth of the tokens so far, then the run ends."""

    def __post_init__(self) -> None:
        if not (self.learning_rate_scale >= 0 and math.isfinite(self.learning_rate_scale)):
            raise ValueError(f"learning_rate_scale must be a finite number >= 0, got {self.learning_rate_scale}")
        if not isinstance(self.batch_size, Integral) or not 1 <= self.batch_size <= MAX_INT:
            raise ValueError(f"batch_size must be a whole number of at least 1 sequence, got {shown(self.batch_size)}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity must be in [0, 1), got {self.sparsity}")


@dataclass(frozen=True, kw_only=True)
class StepPrice(JsonRecord):
    """What a training step costs at a batch and precision."""

    batch_size: int
    """Sequences."""
    precision: Precision
    time_s: float
    energy_j: float | None
    """`None` where nothing measured it."""


@dataclass(frozen=True, kw_only=True)
class ControlLimits:
    """What a controller may choose from in a run, and why it may not choose the rest."""

    start: Controls
    """Controls of the untouched base schedule."""
    min_batch_size: int
    """Smallest batch worth offering, in sequences."""
    max_batch_size: int
    """Largest batch that leaves enough steps in an interval, in sequences."""
    masked_precisions: Mapping[Precision, str]
    """Precisions not offered, each with the reason."""
    pruning: Pruning
    """What the sparsity control does in this run."""
    decisions: int
    """Decisions in the whole run."""
    timed_precisions: tuple[Precision, ...] = ()
    """Precisions that are offered or not because of measured seconds."""
    currency: Currency = "tokens"
    """What the budget is counted in."""
    learning_rate_over_law: float | None = None
    """Peak learning rate at the start over the one that a scaling law advises; `None` where none applies."""
    batch_over_law: float | None = None
    """Batch at the start over the advised one, in tokens."""
    prices: tuple[StepPrice, ...] = ()
    """What was measured before the start, at half, at the same and at double the starting batch."""

    def untimed(self) -> ControlLimits:
        """Return the limits of a run that must not depend on a clock: no precision is offered that was timed."""
        reason = "the precision stays, as only a clock could say whether another pays"
        return replace(
            self, masked_precisions={**self.masked_precisions, **dict.fromkeys(self.timed_precisions, reason)}
        )


LEARNING_RATE_SCALE_RANGE = (2.0**-6, 2.0**6)
"""Bounds on the learning-rate scale, for starts that are up to 30 times too low or too high."""
BATCH_RANGE = 16
"""The batch size stays within this factor of the one at the start."""
STEPS_PER_INTERVAL = 4
"""A larger batch leaves at least this many optimizer steps in an interval."""

Ints = NDArray[np.int64]


@overload
def batch_limits(start_batch_size: int, interval_sequences: int) -> tuple[int, int]: ...
@overload
def batch_limits(start_batch_size: Ints, interval_sequences: Ints) -> tuple[Ints, Ints]: ...
def batch_limits(start_batch_size: Any, interval_sequences: Any) -> tuple[Any, Any]:
    """Return the smallest and the largest batch size that are offered, in sequences; for numbers or arrays.

    From a sixteenth of the starting batch to 16 times as much, but no more than a quarter of an interval. The starting
    batch itself is always offered.

    Args:
        start_batch_size: Sequences per optimizer step at the beginning of the run.
        interval_sequences: Sequences between two decisions.
    """
    smallest = np.maximum(1, start_batch_size // BATCH_RANGE)
    most = np.minimum(start_batch_size * BATCH_RANGE, interval_sequences // STEPS_PER_INTERVAL)
    largest = np.maximum(start_batch_size, most)
    return (smallest, largest) if isinstance(start_batch_size, np.ndarray) else (int(smallest), int(largest))


BYTES, MAX_VOCABULARY = 256, 65_536
MAX_DECISIONS = 100_000
"""Most decisions per run."""

OptimizerName = Literal["adamw", "schedule-free", "prodigy"]

OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)


@dataclass(frozen=True, kw_only=True)
class RunConfig(JsonRecord):
    """One run, also called a case: one training of one model on one corpus under one budget."""

    left_out_at_default: ClassVar[tuple[str, ...]] = (
        *("vocabulary", "budget", "warmup_share", "pruning_importance"),
        *("teacher", "distillation_weight", "distillation_temperature"),
    )

    model: str = "llama-nano"
    """A preset or config JSON (trained from scratch), a folder (fine-tuned if it holds weights) or a Hub id."""
    text: tuple[str, ...] = ("stdlib",)
    """`stdlib`, parts of it (`stdlib:asyncio,json`), `python-docs`, UTF-8 files, folders, globs, `hub:OWNER/NAME`."""
    vocabulary: Annotated[int, Whole(BYTES, MAX_VOCABULARY)] = BYTES
    """256 for bytes; more, up to 65,536, for a byte-level BPE tokenizer of that size, trained on the text's training
    split. Only for a model that is trained from scratch and whose folder holds no tokenizer."""
    tokens: Annotated[int, Whole(1, 10**15)] = 1_000_000
    """Budget in tokens. Not read under a `budget` in seconds or joules: how many fit into it shows at its end."""
    budget: str | None = None
    """Budget in seconds or joules, such as `600s`, `2h` or `50kJ`; by default it is in `tokens`."""
    batch_size: Annotated[int, Whole(1, 2**24)] = 16
    """Starting batch, in sequences."""
    sequence_length: Annotated[int, Whole(1, 2**24)] = 128
    """Tokens per sequence."""
    base_learning_rate: Annotated[float, Range(0, above=True)] = 1e-3
    """Peak of the base schedule at the starting batch size."""
    schedule: ScheduleName = "linear"
    """Base schedule: linear (to zero), cosine (to 10 %), wsd (last 20 % to zero) or constant."""
    warmup_tokens: Annotated[int, Whole(0, 10**15)] | None = None
    """Tokens of linear warm-up; by default 2 % of the budget."""
    warmup_share: Annotated[float, Range(0, 1, below=True)] | None = None
    """The same as a share of the budget in [0, 1), whatever that is counted in."""
    precision: Precision = "fp32"
    """Starting precision."""
    pruning: Pruning = "none"
    """What the pruning control does: nothing, weight masks by magnitude or evolution, or feed-forward width."""
    pruning_importance: PruningImportance = "weight"
    """Which feed-forward channels `width` keeps: those of largest weights, or those of largest activations on the
    validation text, which costs less loss."""
    decisions: Annotated[int, Whole(1, MAX_DECISIONS)] = 50
    """Decisions per run, at equal shares of the budget."""
    optimizer: OptimizerName = "adamw"
    """`adamw`, or one that needs less tuning, at one batch size and without pruning: `schedule-free` AdamW, meant for
    the schedule `constant`, or `prodigy`, whose base_learning_rate is a factor on its own estimate: 1.0."""
    weight_decay: Annotated[float, Range(0)] = 0.1
    """Decoupled weight decay, on matrices only."""
    beta1: Annotated[float, Range(0, 1, below=True)] = 0.9
    """AdamW's first-moment decay. The other optimisers have their own decays."""
    beta2: Annotated[float, Range(0, 1, below=True)] = 0.95
    """AdamW's second-moment decay at the starting batch size; its half-life in tokens is kept."""
    gradient_clip: Annotated[float, Range(0, above=True)] = 1.0
    """Largest Euclidean norm of the gradient."""
    teacher: str | None = None
    """Folder of a larger model, or of a run that left one, whose predictions the run learns from too (distillation).
    It must have the run's vocabulary, and is not trained."""
    distillation_weight: Annotated[float, Range(0, 1)] = 0.5
    """Share w of the teacher in the gradient: (1 - w) x cross-entropy + w x T^2 x KL(teacher || model). With 0 the
    teacher is not even read. All losses that are reported are plain cross-entropy."""
    distillation_temperature: Annotated[float, Range(0, above=True)] = 1.0
    """T: both models' logits are divided by it before they are compared."""
    seed: Annotated[int, Whole(0, MAX_INT)] = 0
    """Seeds the initial weights and the data order."""
    device: str = "auto"
    """`auto` (`cuda` if there is such a GPU, otherwise `cpu`), `cpu`, `cuda` or `mps` (Apple silicon)."""

    def __post_init__(self) -> None:
        check_ranges(self)
        self._check_choices()
        self._check_optimiser()
        self._check_teacher()
        self._check_warmup()
        if self.measured_budget() is not None:
            return
        needed = self.decisions * self.batch_size * self.sequence_length
        if self.tokens < needed:
            raise ValueError(
                f"tokens must give every decision at least one step: {self.decisions} decisions x batch_size "
                f"{self.batch_size} x sequence_length {self.sequence_length} = {needed:,}, got {self.tokens:,}; "
                "raise the budget or lower one of the three"
            )
        if self.warmup_tokens is not None and self.warmup_tokens >= self.tokens:
            raise ValueError(f"warmup_tokens must be in [0, tokens), got {self.warmup_tokens}")

    def _check_warmup(self) -> None:
        tokens, share = self.warmup_tokens, self.warmup_share
        if tokens is not None and share is not None:
            raise ValueError(f"warmup_tokens cannot be combined with warmup_share, got {tokens} and {share}; give one")
        if tokens is not None and self.measured_budget() is not None:
            raise ValueError(
                f"warmup_tokens must be left out under budget {self.budget}, got {tokens}; give warmup_share"
            )

    def _check_choices(self) -> None:
        choices = {
            "schedule": SCHEDULES,
            "precision": PRECISIONS,
            "pruning": PRUNINGS,
            "pruning_importance": PRUNING_IMPORTANCES,
            "optimizer": OPTIMIZERS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.pruning_importance != "weight" and self.pruning != "width":
            raise ValueError(
                f"pruning_importance must be 'weight' where pruning is not 'width', got {self.pruning_importance!r}"
            )
        if not self.text:
            raise ValueError("text must name at least one source, got none; the default is 'stdlib'")

    def _check_teacher(self) -> None:
        if self.teacher is not None and not self.teacher.strip():
            raise ValueError(f"teacher must name a folder, got {self.teacher!r}; leave it out to learn from text alone")
        for name in ("distillation_weight", "distillation_temperature"):
            if self.teacher is None and (value := getattr(self, name)) != getattr(RunConfig, name):
                raise ValueError(f"{name} must be left out without a teacher, got {value}; give teacher a folder")

    def _check_optimiser(self) -> None:
        if self.optimizer != "adamw" and self.pruning != "none":
            raise ValueError(
                f"pruning must be 'none' with optimizer {self.optimizer!r}, got {self.pruning!r}; "
                "only optimizer 'adamw' can prune"
            )

    def measured_budget(self) -> Budget | None:
        """Return the budget in seconds or joules; `None` where it is in tokens.

        Raises:
            ValueError: `budget` is not in seconds or joules.
        """
        return None if self.budget is None else Budget.parse_measured(self.budget, "tokens={:.0f}")

    def n_sequences(self) -> int:
        """Return the budget in sequences. Raises `ValueError` where it is not in tokens."""
        if self.budget is not None:
            raise ValueError(f"budget must be in tokens for that, got {self.budget}; give tokens instead")
        return self.tokens // self.sequence_length

    def warmup(self) -> int:
        """Return the tokens of warm-up, or the `PARTS` of a budget in seconds or joules."""
        whole = self.tokens if self.budget is None else PARTS
        if self.warmup_share is not None:
            return int(self.warmup_share * whole)
        return whole // 50 if self.warmup_tokens is None else self.warmup_tokens

    def base_schedule(self) -> Schedule:
        """Return the base schedule: over the budget in whole sequences, or over its `PARTS`."""
        if self.budget is not None:
            return Schedule(name=self.schedule, budget_tokens=PARTS, warmup_tokens=self.warmup())
        tokens = self.n_sequences() * self.sequence_length
        return Schedule(name=self.schedule, budget_tokens=tokens, warmup_tokens=self.warmup())

    def settings(self) -> dict[str, Any]:
        """Return the fields as plain values; those that version 0.1 did not have only where they are set."""
        newer = {each.name: each.default for each in fields(self) if each.name in self.left_out_at_default}
        return {name: value for name, value in asdict(self).items() if name not in newer or value != newer[name]}

    def start(self) -> Controls:
        """Return the controls that leave the base schedule untouched."""
        return Controls(batch_size=self.batch_size, precision=self.precision)
