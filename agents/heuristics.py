"""Control a run by a fixed rule: the heuristics that a policy is compared with, and the replay of a schedule.

The decorator `heuristic` gives a class the name that a run's spec holds; with a `HeuristicMethod` it is a method of
`trainpilot compare` too. A new heuristic is a class in this file, and its test.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import fmean, geometric_mean
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from trainpilot.agents.controller import Controller, Policy
from trainpilot.envs.action import FINISH_FROM, MAX_SPARSITY, Action, split_choices
from trainpilot.envs.decision import Preference
from trainpilot.llm_runtime.config import (
    LEARNING_RATE_SCALE_RANGE,
    PRECISIONS,
    ControlLimits,
    Controls,
    Precision,
    RunConfig,
)
from trainpilot.llm_runtime.schedules import EVALUATE_EVERY, cubic_sparsity
from trainpilot.llm_runtime.telemetry import Snapshot, Telemetry

if TYPE_CHECKING:
    from trainpilot.llm_runtime.live_run import LiveRun  # loads torch


@dataclass(frozen=True, kw_only=True)
class HeuristicMethod:
    """How `trainpilot compare` runs a heuristic."""

    title: str
    """Two or three words for tables and legends."""
    description: str
    """One sentence."""
    run: Mapping[str, Any]
    """What the heuristic needs of the run, as fields of `RunConfig`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the heuristic, as JSON values; its defaults where they are left out."""
    evaluate_every: int = EVALUATE_EVERY
    """Decisions between two evaluations."""
    max_decisions: int | None = None
    """Most decisions in a run; `None` is the case's own number."""


HEURISTICS: dict[str, type[Heuristic]] = {}
"""Every heuristic by name, in the order of this file."""
HEURISTIC_METHODS: dict[str, HeuristicMethod] = {}
"""Those that are methods of `trainpilot compare`."""

H = TypeVar("H", bound="type[Heuristic]")


def heuristic(name: str, method: HeuristicMethod | None = None) -> Callable[[H], H]:
    """Register a class under `name`, and as a method of `trainpilot compare` where `method` says how it is run."""

    def register(cls: H) -> H:
        HEURISTICS[name] = cls
        if method is not None:
            HEURISTIC_METHODS[name] = method
        return cls

    return register


class Heuristic:
    """A rule that sets the controls of a run.

    Args:
        limits: What the run can do.
    """

    def __init__(self, limits: ControlLimits) -> None:
        self.limits = limits

    @classmethod
    def of_run(cls, run: LiveRun, **settings: Any) -> Self:
        """Return the heuristic for a run, with its settings as JSON values.

        Raises:
            ValueError: a setting cannot be used, or the run lacks what the heuristic needs.
        """
        return cls(run.base_limits(), **settings)

    def decide(self, telemetry: Telemetry | None) -> Controls | None:
        """Return the controls of the next interval, or `None` to end the run now.

        Args:
            telemetry: The last interval's, `None` before the first.
        """
        raise NotImplementedError


@heuristic("keep")
class KeepBase(Heuristic):
    """Leave the base schedule as it is."""

    def decide(self, telemetry: Telemetry | None) -> Controls:
        """Return the starting controls."""
        return self.limits.start


@heuristic(
    "plateau",
    HeuristicMethod(
        title="reduce on plateau",
        description="Halves the rate when the validation loss stalls; stops early.",
        run={"schedule": "constant"},
        # Half of the rate after one reading without a gain, the end after five; the threshold is torch's own.
        settings={"factor": 0.5, "patience": 0, "stop_patience": 5, "threshold": 1e-4},
        evaluate_every=2,
    ),
)
class ReduceOnPlateau(Heuristic):
    """Cut the learning rate where the validation loss stops falling; end the run where cuts no longer help.

    Meant for a constant base schedule, which it multiplies. Cuts come as in torch's `ReduceLROnPlateau`: after more
    than `patience` readings in a row that are not below `best * (1 - threshold)`. The threshold is torch's; its
    patience of 10 epochs would outlast a run of some 25 readings, so that here every failure counts.

    A reading is new when it differs from the last one: the telemetry repeats it until the next evaluation, and two
    evaluations with training between them do not agree to the last digit.

    Args:
        limits: What the run can do.
        factor: What a cut multiplies the learning-rate scale by.
        patience: Readings in a row without improvement that do not yet lead to a cut.
        stop_patience: Readings in a row without improvement, cuts or not, after which the run ends.
        threshold: Smallest improvement that counts, relative to the best loss.
        smallest_scale: The run ends when the learning-rate scale has fallen below this.
    """

    def __init__(
        self,
        limits: ControlLimits,
        *,
        factor: float = 0.5,
        patience: int = 0,
        stop_patience: int = 5,
        threshold: float = 1e-4,
        smallest_scale: float = 1 / 64,
    ) -> None:
        if not 0 < factor < 1:
            raise ValueError(f"factor must be in (0, 1), or no cut would lower the learning rate; got {factor}")
        if not 0 <= patience < stop_patience:
            raise ValueError(f"patience must be in [0, stop_patience {stop_patience}), got {patience}")
        super().__init__(limits)
        self.factor, self.threshold, self.smallest_scale = factor, threshold, smallest_scale
        self.patience, self.stop_patience = patience, stop_patience
        self.scale = limits.start.learning_rate_scale
        self._last: float | None = None
        self._best = math.inf
        self._since_best = 0
        self._since_best_or_cut = 0

    def decide(self, telemetry: Telemetry | None) -> Controls | None:
        """Return the starting controls at the present scale, or `None` when the run has stopped improving."""
        loss = telemetry.validation_loss if telemetry is not None else None
        if loss is not None and loss != self._last:
            self._count(loss)
        if self.scale < self.smallest_scale or self._since_best >= self.stop_patience:
            return None
        return replace(self.limits.start, learning_rate_scale=self.scale)

    def _count(self, loss: float) -> None:
        self._last = loss
        if loss < self._best * (1 - self.threshold):
            self._best = loss
            self._since_best = self._since_best_or_cut = 0
            return
        self._since_best += 1
        self._since_best_or_cut += 1
        if self._since_best_or_cut > self.patience:
            self.scale *= self.factor
            self._since_best_or_cut = 0


@heuristic("early-stop")
class EarlyStop(Heuristic):
    """End a run whose validation loss has stopped falling, and go back to the weights at which it was lowest.

    The rule is that of Prechelt 1998, "Early stopping - but when?": the controls stay as they are, and the run ends
    with the `patience`-th reading in a row that is no new lowest one.

    Args:
        limits: What the run can do.
        run: The run, whose state is copied at each new lowest loss.
        patience: Readings in a row without improvement that end the run.
    """

    def __init__(self, limits: ControlLimits, run: LiveRun, *, patience: int = 3) -> None:
        if patience < 1:
            raise ValueError(f"patience must be at least 1 reading, got {patience}")
        super().__init__(limits)
        self.run, self.patience = run, patience
        self._last: float | None = None
        self._best = math.inf
        self._best_state: Snapshot | None = None
        self._since_best = 0

    @classmethod
    def of_run(cls, run: LiveRun, **settings: Any) -> Self:
        """Return the heuristic for a run, with its settings as JSON values."""
        return cls(run.base_limits(), run, **settings)

    def decide(self, telemetry: Telemetry | None) -> Controls | None:
        """Return the starting controls, or `None` when the run has stopped improving."""
        loss = telemetry.validation_loss if telemetry is not None else None
        if loss is not None and loss != self._last:
            self._last = loss
            self._since_best += 1
            if loss < self._best:
                self._best, self._best_state, self._since_best = loss, self.run.snapshot(), 0
        return self.limits.start if self._since_best < self.patience else None

    def restore_best(self) -> None:
        """Bring the run back to its lowest loss, where its present one is not at least as low."""
        now = self.run.validation_loss
        if self._best_state is not None and not (now is not None and now <= self._best):
            self.run.restore(self._best_state)


@heuristic(
    "greedy",
    HeuristicMethod(
        title="GreedyLR",
        description="transformers' scheduler that raises the rate while the loss falls and lowers it otherwise.",
        run={"schedule": "wsd"},
    ),
)
class Greedy(Heuristic):
    """Raise the learning rate while the training loss falls, and lower it while it does not, as GreedyLR does.

    The scheduler is that of transformers (`get_greedy_schedule`, arXiv 2512.14527), stepped with the training loss of
    every interval; its factor and patience are set for some fifty steps instead of thousands. Its learning rate, over
    the first one, is the scale of the base schedule.

    Args:
        limits: What the run can do.
        factor: What the rate is divided and multiplied by.
        patience: Readings in a row in one direction that do not yet lead to a change.
    """

    def __init__(self, limits: ControlLimits, *, factor: float = 0.8, patience: int = 1) -> None:
        if not 0 < factor < 1:
            raise ValueError(f"factor must be in (0, 1), got {factor}")
        if patience < 0:
            raise ValueError(f"patience must be at least 0, got {patience}")
        super().__init__(limits)
        from trainpilot.llm_runtime.optimizer import greedy_schedule

        self.scale = limits.start.learning_rate_scale
        self._next = greedy_schedule(self.scale, LEARNING_RATE_SCALE_RANGE, factor=factor, patience=patience)

    def decide(self, telemetry: Telemetry | None) -> Controls:
        """Return the starting controls at the scheduler's learning rate."""
        if telemetry is not None:
            self.scale = self._next(telemetry.train_loss)
        return replace(self.limits.start, learning_rate_scale=self.scale)


MAX_DECISIONS_OF_BATCH_RULES = 20
"""An interval bounds the batch, as it must hold four steps: a rule that doubles the batch needs long intervals."""


@heuristic(
    "noise-batch",
    HeuristicMethod(
        title="noise-scale batch",
        description="Batch follows the gradient noise scale upwards.",
        run={"schedule": "linear"},
        max_decisions=MAX_DECISIONS_OF_BATCH_RULES,
    ),
)
class NoiseScaleBatch(Heuristic):
    """Let the batch follow the gradient noise scale tr(Sigma)/|G|^2, where steps and tokens are traded evenly.

    Rule: McCandlish et al. 2018, "An empirical model of large-batch training", arXiv 1812.06162. The batch doubles,
    once per decision at most, while the doubled one is not above the geometric mean of the last readings. It never
    falls: the noise scale grows as the loss falls, so that a lower reading is noise of the estimate, and a batch that
    followed it would swing. The learning rate moves with the batch as is neutral for Adam (x sqrt 2), which the run
    does by itself: the learning-rate scale stays 1.

    Args:
        limits: What the run can do.
        window: Intervals that the mean is taken over; the batch stays as it is until there are as many readings.
    """

    def __init__(self, limits: ControlLimits, *, window: int = 5) -> None:
        if window < 1:
            raise ValueError(f"window must be at least 1 interval, got {window}")
        super().__init__(limits)
        self.batch_size = limits.start.batch_size
        self._readings: deque[float] = deque(maxlen=window)

    def decide(self, telemetry: Telemetry | None) -> Controls:
        """Return the starting controls with the present batch."""
        if telemetry is not None and telemetry.noise_scale is not None:
            self._readings.append(max(telemetry.noise_scale, 1.0))  # no batch is below one sequence
        doubled = 2 * self.batch_size
        if doubled <= min(self._noise_scale(), self.limits.max_batch_size):
            self.batch_size = doubled
        return replace(self.limits.start, batch_size=self.batch_size)

    def _noise_scale(self) -> float:
        """Return the smoothed noise scale, in sequences; 0 until there are enough readings."""
        full = len(self._readings) == self._readings.maxlen
        return geometric_mean(self._readings) if full else 0.0


@heuristic(
    "seesaw",
    HeuristicMethod(
        title="Seesaw",
        description="Doubles the batch where the cosine schedule would halve the rate.",
        run={"schedule": "constant"},
        max_decisions=MAX_DECISIONS_OF_BATCH_RULES,
    ),
)
class Seesaw(Heuristic):
    """Grow the batch where a cosine would cut the learning rate: fewer steps for the same tokens.

    Rule: Meterez et al. 2025, "Seesaw: Accelerating training by balancing learning rate and batch size scheduling",
    arXiv 2510.14717. At the k-th point where the cosine (to 10 %) has fallen to alpha^-k, the batch grows by alpha and
    the learning rate falls by sqrt(alpha) only. The base schedule is constant with warm-up.

    In this package a batch change alone moves the learning rate by sqrt(B / B_start), so that

        learning rate after k cuts = scale * sqrt(alpha^k) = alpha^(-k/2)    =>    scale = alpha^-k

    Where the largest batch is reached after m cuts, the further ones are the cosine's own, by alpha each:

        scale * sqrt(alpha^m) = alpha^(-m/2) * alpha^-(k - m)                =>    scale = alpha^-k, once more.

    Args:
        limits: What the run can do.
        config: The run, for its budget and warm-up.
        alpha: Factor of one cut, a whole number.
    """

    def __init__(self, limits: ControlLimits, config: RunConfig, *, alpha: int = 2) -> None:
        if config.schedule != "constant":
            raise ValueError(f"schedule must be constant for Seesaw, which brings its own cuts, got {config.schedule}")
        if alpha < 2 or alpha != int(alpha):
            raise ValueError(f"alpha must be a whole number of at least 2, as it multiplies the batch; got {alpha}")
        super().__init__(limits)
        self.alpha = int(alpha)
        self.cosine = replace(config.base_schedule(), name="cosine")

    @classmethod
    def of_run(cls, run: LiveRun, **settings: Any) -> Self:
        """Return the heuristic for a run, whose schedule must be constant."""
        return cls(run.base_limits(), run.config, **settings)

    def decide(self, telemetry: Telemetry | None) -> Controls:
        """Return the controls after as many cuts as the cosine has made by now."""
        cuts = self.cuts(telemetry.tokens if telemetry is not None else 0)
        start = self.limits.start
        sizes = [start.batch_size * self.alpha**k for k in range(cuts + 1)]
        batch_size = max(size for size in sizes if size <= max(self.limits.max_batch_size, start.batch_size))
        scale = start.learning_rate_scale * float(self.alpha) ** -cuts
        return replace(start, learning_rate_scale=scale, batch_size=batch_size)

    def cuts(self, tokens: int) -> int:
        """Return how often the cosine has fallen by a further factor alpha after `tokens`; warm-up does not count."""
        factor = self.cosine.factor(max(tokens, self.cosine.warmup_tokens), step_tokens=0)
        return math.floor(-math.log(factor, self.alpha) + 1e-9)


@heuristic(
    "gradual-pruning",
    HeuristicMethod(
        title="gradual pruning",
        description="Half of the weights go between 25 % and 75 % of it.",
        run={"schedule": "linear", "pruning": "magnitude"},
    ),
)
class GradualPruning(Heuristic):
    """Prune along the cubic schedule of Zhu and Gupta 2017 between a quarter and three quarters of the budget.

    These two points were near the best of 80 schedules in Jin et al. 2025, "The journey matters: average parameter
    count over pre-training unifies sparse and dense scaling laws", arXiv 2501.12486.

    Args:
        limits: What the run can do.
        final_sparsity: Sparsity at the end, in [0, 1).
        start: Share of the budget at which pruning begins.
        end: Share of the budget at which it is complete.
    """

    def __init__(
        self, limits: ControlLimits, *, final_sparsity: float = 0.5, start: float = 0.25, end: float = 0.75
    ) -> None:
        if limits.pruning == "none":
            raise ValueError("pruning must be magnitude, evolution or width for gradual pruning, got none")
        if not 0 <= final_sparsity < 1:
            raise ValueError(f"final_sparsity must be in [0, 1), got {final_sparsity}")
        if not 0 <= start < end <= 1:
            raise ValueError(f"start and end must satisfy 0 <= start < end <= 1, got {start} and {end}")
        super().__init__(limits)
        self.final_sparsity, self.begin_share, self.end_share = final_sparsity, start, end

    def decide(self, telemetry: Telemetry | None) -> Controls:
        """Return the starting controls with the sparsity to be reached at the next interval's end."""
        interval = telemetry.decision + 1 if telemetry is not None else 0
        share = (interval + 1) / self.limits.decisions
        progress = (share - self.begin_share) / (self.end_share - self.begin_share)
        return replace(self.limits.start, sparsity=cubic_sparsity(0.0, self.final_sparsity, progress))


@heuristic(
    "random",
    HeuristicMethod(
        title="random policy",
        description="Random allowed actions under the safety layer.",
        run={"schedule": "linear"},
    ),
)
class RandomPolicy(Heuristic):
    """Take a random allowed choice of every action, under the same limits as a policy.

    From a fifth of the budget on, when it is allowed, the cool-down begins with probability 1/2 at every decision.

    Args:
        limits: What the run can do.
        seed: The same seed gives the same choices under the same limits.
    """

    def __init__(self, limits: ControlLimits, seed: int) -> None:
        super().__init__(limits)
        self.controller = Controller(uniform_policy(seed), limits, Preference())

    @classmethod
    def of_run(cls, run: LiveRun, **settings: Any) -> Self:
        """Return the heuristic for a run, with the run's own seed."""
        return cls(run.limits(), run.config.seed, **settings)

    def decide(self, telemetry: Telemetry | None) -> Controls:
        """Return the controls that follow from a random action."""
        return self.controller.decide(telemetry)


def uniform_policy(seed: int) -> Policy:
    """Return a policy that takes every allowed choice of a field with the same probability, each field on its own."""
    random = np.random.default_rng(seed)

    def choose(observation: np.ndarray, masks: np.ndarray) -> Action:
        return tuple(int(random.choice(np.flatnonzero(allowed))) for allowed in split_choices(masks))

    return choose


@dataclass(frozen=True, kw_only=True)
class SchedulePoint:
    """Controls that hold from one share of the budget on, in ratios that mean the same on every run."""

    share: float
    """Share of the budget at which they begin to hold, in [0, 1)."""
    learning_rate_scale: float = 1.0
    """Factor on the base schedule at the starting batch size."""
    batch_factor: float = 1.0
    """Batch over starting batch."""
    sparsity: float = 0.0
    """Share of zero weights or of removed channels, in [0, 1)."""
    precision: Precision | None = None
    """Number format of the matrix products; `None` is the run's own."""
    finish: bool = False
    """Cool down now."""

    def __post_init__(self) -> None:
        for name in ("share", "sparsity"):
            if not (_is_number(value := getattr(self, name)) and 0 <= value < 1):
                raise ValueError(f"schedule {name} must be in [0, 1), got {value!r}")
        for name in ("learning_rate_scale", "batch_factor"):
            if not (_is_number(value := getattr(self, name)) and value > 0):
                raise ValueError(f"schedule {name} must be a positive number, got {value!r}")
        if self.precision not in (None, *PRECISIONS):
            raise ValueError(f"schedule precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if not isinstance(self.finish, bool):
            raise ValueError(f"schedule finish must be true or false, got {self.finish!r}")


@dataclass(frozen=True, kw_only=True)
class ControlledRun:
    """The controls that a closed loop set along one run that ended by itself."""

    start_batch_size: int
    """Starting batch, in sequences."""
    controls: Sequence[Controls]
    """Controls of every interval, as requested; fewer than the run's decisions where it finished early."""


def average_schedule(runs: Sequence[ControlledRun], decisions: int) -> tuple[SchedulePoint, ...]:
    """Return what the runs did on average, decision by decision.

    Geometric means of the learning-rate scale and of the batch over its start, the mean sparsity, and the most
    frequent precision, of equally frequent ones the more exact. The cool-down begins when at least half of the
    runs have begun theirs. A run that has ended goes on counting with its last controls.

    Args:
        runs: Runs of the closed loop.
        decisions: Decisions in the whole of each run.

    Raises:
        ValueError: there is no run, or one has no interval or more than `decisions`.
    """
    lengths = [len(run.controls) for run in runs]
    if not lengths or min(lengths) < 1 or max(lengths) > decisions:
        raise ValueError(f"runs must be at least one, each of 1 to {decisions} intervals, got intervals {lengths}")
    return tuple(_average(runs, index, index / decisions) for index in range(max(lengths)))


def _average(runs: Sequence[ControlledRun], index: int, share: float) -> SchedulePoint:
    present = [run.controls[min(index, len(run.controls) - 1)] for run in runs]
    batches = [controls.batch_size / run.start_batch_size for controls, run in zip(present, runs, strict=True)]
    precisions = [controls.precision for controls in present]
    most_frequent = max(PRECISIONS, key=precisions.count)  # the first of equals
    return SchedulePoint(
        share=share,
        learning_rate_scale=geometric_mean([controls.learning_rate_scale for controls in present]),
        batch_factor=geometric_mean(batches),
        sparsity=fmean(controls.sparsity for controls in present),
        precision=most_frequent,
        finish=2 * sum(controls.finish for controls in present) >= len(present),
    )


def schedule_to_json(schedule: Sequence[SchedulePoint]) -> list[dict[str, Any]]:
    """Return plain JSON values."""
    return [asdict(point) for point in schedule]


def schedule_from_json(record: Sequence[Mapping[str, Any]]) -> tuple[SchedulePoint, ...]:
    """Rebuild from `schedule_to_json`. Raises `ValueError` for an unknown field or a value outside its range."""
    names = [field.name for field in fields(SchedulePoint)]
    for point in record:
        if not isinstance(point, Mapping) or "share" not in point or set(point) - set(names):
            raise ValueError(f"schedule points must have share, and may have {', '.join(names[1:])}, got {point!r}")
    return tuple(SchedulePoint(**point) for point in record)


@heuristic("open-loop")
class OpenLoop(Heuristic):
    """Replay a schedule without feedback from the run, within the limits of a policy.

    An interval gets the last point that begins before its middle, so that a schedule fits a run with another number
    of decisions. The learning-rate scale is clipped, the batch becomes the nearest power-of-two multiple of the
    starting batch that the run can do, a precision that it cannot do becomes its starting one, and a run that does
    not prune stays dense. Sparsity never falls, and a cool-down once begun goes on.

    Args:
        schedule: Points in order of their share, the first at 0.
        limits: What the run can do.
    """

    def __init__(self, schedule: Sequence[SchedulePoint], limits: ControlLimits) -> None:
        shares = [point.share for point in schedule]
        if not shares or shares[0] != 0 or shares != sorted(set(shares)):
            raise ValueError(f"schedule must begin at share 0 and rise, got shares {shares[:5]}")
        super().__init__(limits)
        self.schedule = tuple(schedule)

    @classmethod
    def of_run(cls, run: LiveRun, **settings: Any) -> Self:
        """Return the replay of `settings["schedule"]`, a schedule in JSON, on a run."""
        return cls.from_json(settings["schedule"], run.base_limits())

    @classmethod
    def from_json(cls, record: Sequence[Mapping[str, Any]], limits: ControlLimits) -> Self:
        """Return the replay of a schedule in JSON. Raises `ValueError` where it is none."""
        return cls(schedule_from_json(record), limits)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the schedule, before any limits, as plain JSON values."""
        return schedule_to_json(self.schedule)

    def decide(self, telemetry: Telemetry | None) -> Controls:
        """Return the schedule's controls for the next interval; of `telemetry` only the number of decisions counts."""
        interval = telemetry.decision + 1 if telemetry is not None else 0
        middle = (interval + 0.5) / self.limits.decisions
        begun = [point for point in self.schedule if point.share < middle - 1e-9]
        point = begun[-1]
        low, high = LEARNING_RATE_SCALE_RANGE
        return Controls(
            learning_rate_scale=min(max(point.learning_rate_scale, low), high),
            batch_size=self._nearest_batch(point.batch_factor),
            precision=self._usable_precision(point.precision),
            sparsity=self._sparsity(begun),
            finish=interval / self.limits.decisions >= FINISH_FROM and any(earlier.finish for earlier in begun),
        )

    def _nearest_batch(self, factor: float) -> int:
        """Return the allowed batch with the smallest ratio to `factor` times the start; of two the smaller."""
        wanted = math.log2(factor * self.limits.start.batch_size)
        # Rounded, as two runs that differ by a doubling average to a tie.
        return min(_allowed_batches(self.limits), key=lambda size: round(abs(math.log2(size) - wanted), 9))

    def _usable_precision(self, precision: Precision | None) -> Precision:
        if precision is None or precision in self.limits.masked_precisions:
            return self.limits.start.precision
        return precision

    def _sparsity(self, begun: Sequence[SchedulePoint]) -> float:
        if self.limits.pruning == "none":
            return 0.0
        return min(max(point.sparsity for point in begun), MAX_SPARSITY)


def _allowed_batches(limits: ControlLimits) -> list[int]:
    """Return the batches that halving and doubling can reach from the start, smallest first."""
    sizes = [limits.start.batch_size * 2.0**power for power in range(-16, 17)]
    return [int(size) for size in sizes if size.is_integer() and limits.min_batch_size <= size <= limits.max_batch_size]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
