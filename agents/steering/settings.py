"""Settings of a steered training loop, and what follows from them: policy, base schedule and control limits.

`SteeringSettings` is what the user sets. `ResolvedSettings` adds what follows from them and the policy bundle: the
policy, the number of decisions and the base schedule. `control_limits` says what the policy may choose from.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch.optim import Adam

from trainpilot.agents.bundle import BaseSchedule, PolicyBundle, policy_path
from trainpilot.agents.controller import Policy, keep
from trainpilot.agents.steering.contract import QualityContract
from trainpilot.agents.steering.guardrails import GuardrailSettings
from trainpilot.llm_runtime.budget import Budget
from trainpilot.llm_runtime.config import (
    BATCH_RANGE,
    PRECISIONS,
    STEPS_PER_INTERVAL,
    ControlLimits,
    Precision,
    batch_limits,
)
from trainpilot.llm_runtime.layers import body_parameters
from trainpilot.llm_runtime.loop import ControlledLoop, MaskPruning
from trainpilot.llm_runtime.plain_values import is_number
from trainpilot.llm_runtime.precision import lacking
from trainpilot.llm_runtime.progress import BudgetProgress, MeasuredProgress, TokenProgress
from trainpilot.llm_runtime.scaling_laws import step_law
from trainpilot.llm_runtime.schedules import PARTS, FactorOf, OwnSchedule, Schedule

Mode = Literal["steer", "advise"]


@dataclass(frozen=True, kw_only=True)
class SteeringSettings:
    """Settings of a steered run: budget (`sequences`, or `budget`), start, policy and bounds."""

    sequences: int | None = None
    """Budget in sequences; a sequence that is seen twice counts twice. Under a `budget` in seconds or joules an
    estimate, which bounds the largest batch; it may be left out then."""
    sequences_done: int = 0
    """Sequences of the budget that were trained on before: the run is under way, and is steered from here on. The
    schedule, the share of the budget and the decisions go on from there. At first the policy only watches, for a fifth
    of the decisions that are left and at most six: what changes is held against that."""
    budget: str | None = None
    """Budget in seconds or joules, such as `600s`, `2h` or `50kJ`; by default it is in `sequences`."""
    batch_size: int
    """Sequences of an optimiser step at the start, of all processes and accumulated micro-batches together."""
    sequence_length: int = 1
    """Tokens of a sequence. Only the log, the schedule and the advice of a scaling law use it, so an estimate is
    enough; 1 is taken for unknown."""
    epoch_sequences: int | None = None
    """Sequences of one pass over the data, of all processes together, by which the policy knows the epoch. By default
    the `data` of `Steering` say it, and the adapters of frameworks; else it is unknown."""
    policy: str | Path | PolicyBundle | Policy = "default"
    """`default`, the file of a bundle, a bundle, `none` for the base schedule without control, or a function of
    observation and masks that returns an action. A function sees all observation fields, or those in its attribute
    `fields`."""
    mode: Mode = "steer"
    """`steer`, or `advise`: the policy sees the run and what it would do is recorded, but nothing is changed: to
    the last bit the run is that of its base schedule."""
    preference: str = "quality=1"
    """Weights of quality, energy and time, as `quality=0.5,energy=0.5`."""
    decisions: int | None = None
    """Decisions in the whole run; by default as many as the policy was trained with, at most as many as steps."""
    base_schedule: BaseSchedule | FactorOf | None = None
    """Schedule that the policy's learning-rate scale multiplies; by default the one that it was trained with. Any
    function from the share of the budget to a factor on the optimizer's learning rate will do; `schedule_of` makes one
    of a torch scheduler."""
    gradient_clip: float | None = 1.0
    """Largest norm of the gradient; `None` clips nothing."""
    min_batch_size: int | None = None
    """Smallest batch size that the policy may choose; by default a sixteenth of the first."""
    max_batch_size: int | None = None
    """Largest batch size; by default 16 times the first, but at most a quarter of an interval, if `sequences` is known.
    """
    precisions: tuple[Precision, ...] = ("fp32",)
    """Precisions that may be used, the first at the start. Offer bf16 where you know that it pays. With fp32 alone a
    `torch.autocast` that the loop opens itself holds."""
    pruning: MaskPruning = "none"
    """What the sparsity control does: nothing, or weight masks by `magnitude` or `evolution`."""
    probe: bool = True
    """Whether to probe the curvature now and then: three forward passes on one micro-batch."""
    guardrails: GuardrailSettings = field(default_factory=GuardrailSettings)
    """Bounds that hold for any policy."""
    contract: QualityContract | None = None
    """Bounds on what steering may cost against the base schedule; `None` for none."""
    fine_tuning: bool | None = None
    """Whether the model is pretrained; by default that is detected. The learning rate of a pretrained model rises at
    most by a factor of 2 above the optimizer's, unless the guardrails have a `learning_rate_range`."""
    strict_domain: bool = False
    """Refuse to steer a run unlike those that the policy was trained on, instead of warning."""

    def __post_init__(self) -> None:
        if self.measured_budget() is None and self.sequences is None:
            raise ValueError(
                "sequences, the budget, must be given, got None; or give a budget such as '600s' or '50kJ'"
            )
        self._check_kinds()
        for name in ("batch_size", "sequence_length"):
            _check_count(name, getattr(self, name))
        for name in ("sequences", "epoch_sequences", "decisions", "min_batch_size", "max_batch_size"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        self._check_done()
        if self.max_batch_size is not None and self.max_batch_size < self.batch_size:
            raise ValueError(f"max_batch_size must be at least batch_size {self.batch_size}, got {self.max_batch_size}")
        if self.min_batch_size is not None and self.min_batch_size > self.batch_size:
            raise ValueError(f"min_batch_size must be at most batch_size {self.batch_size}, got {self.min_batch_size}")

    def _check_done(self) -> None:
        """Raise `ValueError` for a number of sequences done that leaves nothing of the budget, or is none."""
        done, whole = self.sequences_done, self.sequences
        if not isinstance(done, int) or isinstance(done, bool) or done < 0:
            raise ValueError(f"sequences_done must be a whole number of at least 0, got {done!r}")
        if done and self.budget is not None:
            raise ValueError(
                f"sequences_done must be 0 under a budget in seconds or joules, got {done:,}; give what is left of the "
                "budget, and a base_schedule that begins where the run stands"
            )
        if whole is not None and done >= whole:
            raise ValueError(
                f"sequences_done must be below sequences {whole:,}, the budget of the whole run, got {done:,}"
            )

    def _check_kinds(self) -> None:
        """Raise `ValueError` for a value of the wrong kind, the counts apart."""
        _check_policy(self.policy)
        _check_base_schedule(self.base_schedule)
        _check_word("mode", self.mode, get_args(Mode))
        _check_word("pruning", self.pruning, get_args(MaskPruning))
        for name in ("probe", "strict_domain", "fine_tuning"):
            _check_word(name, getattr(self, name), (True, False) + (None,) * (name == "fine_tuning"))
        _check_precisions(self.precisions)
        _check_kind("guardrails", self.guardrails, GuardrailSettings)
        if self.contract is not None:
            _check_kind("contract", self.contract, QualityContract)
        if not isinstance(self.preference, str):
            raise ValueError(f"preference must be text such as quality=0.5,energy=0.5, got {self.preference!r}")
        clip = self.gradient_clip
        if clip is not None and not (is_number(clip) and clip > 0):
            raise ValueError(f"gradient_clip must be above 0, got {clip!r}; None clips nothing")

    def measured_budget(self) -> Budget | None:
        """Return the budget in seconds or joules; `None` where it is in sequences.

        Raises:
            ValueError: `budget` is not in seconds or joules.
        """
        if not isinstance(self.budget, str | None):
            raise ValueError(f"budget must be text such as '600s' or '50kJ', got {self.budget!r}")
        return None if self.budget is None else Budget.parse_measured(self.budget, "sequences instead")

    def known_sequences(self) -> int:
        """Return `sequences`. Raises `ValueError` where they are not known."""
        if self.sequences is None:
            raise ValueError(f"sequences must be given here, as an estimate under budget {self.budget}, got None")
        return self.sequences

    def most_decisions(self, decisions: int) -> int:
        """Return so many decisions, or as many as a budget in sequences has steps at the starting batch."""
        if self.budget is not None:
            return decisions
        return max(min(decisions, self.known_sequences() // self.batch_size), 1)

    def decisions_left(self, decisions: int) -> int:
        """Return how many of a whole run's decisions fall into what is left of it."""
        if not self.sequences_done:
            return decisions
        whole = self.known_sequences()
        return max(decisions * (whole - self.sequences_done) // whole, 1)

    def check_steps(self, decisions: int) -> None:
        """Raise `ValueError` if the budget in sequences is too small for a step in every interval."""
        if self.budget is not None:
            return
        sequences = self.known_sequences()
        if sequences < decisions * self.batch_size:
            raise ValueError(
                f"sequences must give every decision at least one step: {decisions} decisions x batch_size "
                f"{self.batch_size} = {decisions * self.batch_size:,}, got {sequences:,}; "
                "train for longer, or lower decisions or batch_size"
            )


def _check_policy(policy: Any) -> None:
    if not (isinstance(policy, str | Path | PolicyBundle) or callable(policy)):
        raise ValueError(
            "policy must be a name, the file of a bundle, a PolicyBundle, 'none', or a function of observation and "
            f"masks, got {type(policy).__name__}"
        )


def _check_base_schedule(base: Any) -> None:
    if not (base is None or isinstance(base, BaseSchedule) or callable(base)):
        raise ValueError(
            "base_schedule must be a BaseSchedule, or a function from the share of the budget to a factor, got "
            f"{base!r}; for a named one: BaseSchedule(schedule='cosine', warmup_share=0.02)"
        )


def _check_word(name: str, value: Any, words: tuple[str | bool | None, ...]) -> None:
    if not any(type(value) is type(word) and value == word for word in words):
        raise ValueError(f"{name} must be one of {', '.join(map(str, words))}, got {value!r}")


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def _check_precisions(value: Any) -> None:
    if not isinstance(value, list | tuple) or not value or any(name not in PRECISIONS for name in value):
        raise ValueError(f"precisions must be some of {', '.join(PRECISIONS)}, got {value!r}")
    if "fp16" in value:
        raise ValueError("precisions must be without fp16, whose loss scaler is the loop's; offer bf16")


def _check_kind(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} must be {kind.__name__}(...), got {value!r}")


WITHOUT_POLICY = BaseSchedule(schedule="linear", warmup_share=0.02)
DECISIONS = 50


@dataclass(frozen=True)
class ResolvedSettings:
    """What follows from the settings and the policy bundle."""

    bundle: PolicyBundle | None
    """The bundle, if the policy comes from one."""
    policy: Policy
    base: BaseSchedule | FactorOf
    """Base schedule, which the policy's learning-rate scale multiplies."""
    decisions: int
    """Decisions in the whole run."""
    usual_decisions: int
    """Decisions that it would have if it were long enough."""

    @classmethod
    def of(cls, settings: SteeringSettings) -> ResolvedSettings:
        """Load the policy, and resolve what the settings leave open.

        Raises:
            ValueError: there is no such policy, or the budget is too small for its decisions.
        """
        bundle, policy = _policy(settings.policy)
        usual = settings.decisions or (bundle.decisions if bundle else DECISIONS)
        decisions = usual if settings.decisions else settings.most_decisions(usual)
        settings.check_steps(decisions)
        base = settings.base_schedule or (bundle and bundle.base_schedule) or WITHOUT_POLICY
        return cls(bundle, policy, base, decisions, usual)

    def progress(self, settings: SteeringSettings, grain: int) -> BudgetProgress:
        """Return the budget of a run of which nothing is used, but for what the settings say."""
        length, measured = settings.sequence_length, settings.measured_budget()
        if measured is not None:
            return MeasuredProgress(
                schedule=self._schedule(PARTS),
                budget=measured,
                sequence_length=length,
                decisions=self.decisions,
                expected_sequences=settings.sequences,
            )
        sequences = settings.known_sequences()
        return TokenProgress(
            schedule=self._schedule(sequences * length),
            budget=sequences,
            sequence_length=length,
            decisions=settings.decisions_left(self.decisions),
            sequences=settings.sequences_done,
            first=settings.sequences_done,
            grain=grain,
        )

    def _schedule(self, whole: int) -> Schedule | OwnSchedule:
        if not isinstance(self.base, BaseSchedule):
            return OwnSchedule(factor_of=self.base, budget_tokens=whole)
        return Schedule(name=self.base.schedule, budget_tokens=whole, warmup_tokens=self.base.warmup_tokens(whole))


def bundle_of(policy: str | Path | PolicyBundle | Policy) -> PolicyBundle | None:
    """Return the bundle that the setting names or is; `None` for `none` and for a function.

    Raises:
        ValueError: there is no such policy, or its file is no bundle of this version.
    """
    if isinstance(policy, PolicyBundle):
        return policy
    if isinstance(policy, Path):
        return PolicyBundle.load(policy)
    return PolicyBundle.load(policy_path(policy)) if isinstance(policy, str) and policy != "none" else None


def _policy(policy: str | Path | PolicyBundle | Policy) -> tuple[PolicyBundle | None, Policy]:
    bundle = bundle_of(policy)
    if bundle is not None:
        return bundle, bundle.act
    return None, policy if callable(policy) else keep


def name_of(policy: str | Path | PolicyBundle | Policy) -> str:
    """Return a policy's name, for logs and to recognise it where a run goes on."""
    if isinstance(policy, PolicyBundle):
        return f"PolicyBundle {policy.digest()}"
    if isinstance(policy, str | Path):
        return str(policy)
    return getattr(policy, "__name__", type(policy).__name__)


def control_limits(settings: SteeringSettings, loop: ControlledLoop, decisions: int) -> ControlLimits:
    """Return the limits of a run's controls: batch sizes, precisions and pruning.

    Raises:
        ValueError: the processes cannot share the batch evenly.
    """
    start, processes = loop.controls, loop.ranks.world_size
    if start.batch_size % processes:
        raise ValueError(f"batch_size must be a multiple of the {processes} processes, got {start.batch_size}")
    smallest, largest = _batches(settings, decisions, processes) if loop.changes_batch else (start.batch_size,) * 2
    return ControlLimits(
        start=start,
        min_batch_size=smallest,
        max_batch_size=largest,
        masked_precisions=_masked_precisions(settings.precisions, loop.device),
        pruning=settings.pruning,
        decisions=decisions,
        currency=loop.progress.currency,
    )


def with_law(
    limits: ControlLimits, settings: SteeringSettings, loop: ControlledLoop, *, peak: float, fine_tuning: bool
) -> ControlLimits:
    """Return the limits with the start of the run over what a scaling law advises.

    None applies to a pretrained model, to one that is nothing but a vocabulary, to another optimizer than Adam, or
    where the sequences or their length are unknown. `peak` is the peak learning rate at the start.
    """
    length, sequences, n_parameters = settings.sequence_length, settings.sequences, body_parameters(loop.model)
    if fine_tuning or not isinstance(loop.optimizer, Adam) or length == 1 or sequences is None or not n_parameters:
        return replace(limits, learning_rate_over_law=None, batch_over_law=None)
    advice = step_law(n_parameters, sequences * length)
    tokens = settings.batch_size * settings.sequence_length
    over = peak / advice.learning_rate
    return replace(limits, learning_rate_over_law=over, batch_over_law=tokens / advice.batch_tokens)


def _masked_precisions(offered: tuple[Precision, ...], device: torch.device) -> dict[Precision, str]:
    """Return the precisions that a policy may not choose, each with the reason."""
    reasons = lacking(device)
    reasons.setdefault("fp16", "needs a loss scaler, which is the loop's")
    for name in PRECISIONS:
        if name not in offered:
            reasons.setdefault(name, "not among the precisions that were offered")
    return reasons


def _batches(settings: SteeringSettings, decisions: int, processes: int) -> tuple[int, int]:
    """Return the smallest and the largest batch."""
    unbounded = decisions * STEPS_PER_INTERVAL * BATCH_RANGE * settings.batch_size
    smallest, largest = batch_limits(settings.batch_size, (settings.sequences or unbounded) // decisions)
    smallest = max(settings.min_batch_size or smallest, _least_shared(settings.batch_size, processes))
    return smallest, settings.max_batch_size or largest


def _least_shared(batch_size: int, processes: int) -> int:
    """Return the smallest batch that halving leads to and that the processes share evenly."""
    while processes > 1 and batch_size % (2 * processes) == 0:
        batch_size //= 2
    return batch_size if processes > 1 else 1
