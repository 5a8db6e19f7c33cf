"""The form of a steered run's saved state, by which a state from a file is checked before anything is changed.

The states of version 0.1 lack some fields; these have defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.steering.course import Course
from trainpilot.agents.steering.guardrails import MOVED, LossLevel, Past, RollbackHistory
from trainpilot.agents.steering.throughput import Throughput
from trainpilot.envs.action import Action, check_action
from trainpilot.envs.decision import Advice, Decision
from trainpilot.llm_runtime.config import Controls
from trainpilot.llm_runtime.plain_values import shown
from trainpilot.llm_runtime.ranges import Range
from trainpilot.llm_runtime.saved_loop import Count, NotNegative, Number, Positive, SavedRecord, check_saved_controls
from trainpilot.llm_runtime.telemetry import Telemetry


@dataclass(frozen=True, kw_only=True)
class SavedDecision(SavedRecord):
    """The decision in force."""

    requested: Action
    allowed: Action
    controls: Controls
    refusals: list[str]
    advice: Advice | None = None

    def __post_init__(self) -> None:
        check_action(self.requested)
        check_action(self.allowed)
        check_saved_controls(self.controls)

    def decision(self) -> Decision:
        """Return the decision."""
        return Decision(self.requested, self.allowed, self.controls, self.refusals, self.advice)


@dataclass(frozen=True, kw_only=True)
class SavedLosses(SavedRecord):
    """The recent losses that spikes are told from."""

    losses: list[Number]
    errors: list[NotNegative]
    lowest: Number | None
    paid_scale: NotNegative

    def __post_init__(self) -> None:
        if len(self.losses) != len(self.errors):
            raise ValueError(f"losses must have an error each, got {len(self.losses)} and {len(self.errors)}")


@dataclass(frozen=True, kw_only=True)
class SavedLearning(SavedRecord):
    """How the run has learnt, for the rules against slow damage: the fields of `course.Course`."""

    start_scale: NotNegative | None
    tokens: list[NotNegative]
    losses: list[Number]
    errors: list[NotNegative]
    scales: list[NotNegative]
    settled: Count
    used: NotNegative
    rate_before: NotNegative
    since_low: Count
    risen: Count
    grace: Count
    floor: NotNegative | None
    bends: list[Annotated[float, Range()]]
    peak: NotNegative
    trusted: NotNegative | None
    trusted_until: Count

    def __post_init__(self) -> None:
        if len({len(self.tokens), len(self.losses), len(self.errors), len(self.scales)}) != 1:
            raise ValueError("tokens, losses, errors and scales must be equally many")
        if max(self.settled, self.trusted_until) > len(self.losses):
            raise ValueError(f"settled and trusted_until must be at most the {len(self.losses)} intervals")


@dataclass(frozen=True, kw_only=True)
class SavedPast(SavedRecord):
    """What the guardrails know of the run so far."""

    moves: dict[str, list[Annotated[int, Range(-1, 1)]]]
    batch_requests: list[Annotated[int, Range(-1, 1)]] | None = None
    held: dict[str, Count]
    losses: SavedLosses
    since_snapshot: Count | None
    course: SavedLearning | None = None

    def __post_init__(self) -> None:
        if set(self.moves) != set(MOVED):
            raise ValueError(f"moves must be of {', '.join(MOVED)}, got {shown(list(self.moves))}")


@dataclass(frozen=True, kw_only=True)
class SavedHistory(SavedRecord):
    """The rollbacks so far."""

    rollbacks: Count
    held: dict[str, Count]
    corrections: Count = 0
    ceiling: NotNegative = RollbackHistory.ceiling


@dataclass(frozen=True, kw_only=True)
class SavedThroughput(SavedRecord):
    """How fast each batch is: the fields of `throughput.Throughput`."""

    costs: dict[Annotated[int, Range(1)], Positive]
    batch_size: Count
    stayed: Count
    newest: list[Positive]
    machine: Positive | None

    def __post_init__(self) -> None:
        if self.stayed and not self.newest:
            raise ValueError(f"newest must hold the newest of {self.stayed} intervals, got none")


@dataclass(frozen=True, kw_only=True)
class SavedGuardrails(SavedRecord):
    """The state of the guardrails."""

    past: SavedPast
    scars: SavedHistory
    throughput: SavedThroughput | None = None

    def parts(self) -> tuple[Past, RollbackHistory, Throughput | None]:
        """Return what the guardrails know of the run, of its rollbacks, and of the device's throughput."""
        own = {name: value for name, value in vars(self.past).items() if name not in ("losses", "course")}
        course = None if self.past.course is None else Course(**vars(self.past.course))
        past = Past(**own, losses=LossLevel(**vars(self.past.losses)), course=course)
        throughput = None if self.throughput is None else Throughput(**deepcopy(vars(self.throughput)))
        return past, RollbackHistory(**vars(self.scars)), throughput


@dataclass(frozen=True, kw_only=True)
class SavedRow(SavedRecord):
    """One interval as the contract knows it."""

    share: NotNegative
    tokens: NotNegative
    end_tokens: NotNegative
    loss: Number
    error: Positive
    s_per_token: Number
    learning_rate: Number
    speed: NotNegative = 1.0


@dataclass(frozen=True, kw_only=True)
class SavedIntervals(SavedRecord):
    """The intervals that the contract knows."""

    rows: list[SavedRow]
    outside: Count


@dataclass(frozen=True, kw_only=True)
class SavedPairs(SavedRecord):
    """What the trials of a paired contract have shown and cost: the fields of `paired.PairedWatch`."""

    cost: NotNegative
    lead: NotNegative
    newest: Number | None
    on_trial: bool
    hold: Count
    lost_running: Annotated[int, Range(0, 64)]
    trials: dict[Literal["passed", "lost"], Count]
    sequences: Count
    not_kept: tuple[NotNegative, NotNegative | None]
    unrecorded: tuple[NotNegative, NotNegative | None]
    paces: list[NotNegative]


@dataclass(frozen=True, kw_only=True)
class SavedContract(SavedRecord):
    """The state of a contract."""

    left_out_at_default: ClassVar[tuple[str, ...]] = ("pairs",)

    past: SavedIntervals
    broken: tuple[str, Count] | None
    steers: bool = True
    pairs: SavedPairs | None = None


@dataclass(frozen=True, kw_only=True)
class SavedRollback(SavedRecord):
    """One rollback, for the summary."""

    after_decision: Count
    reason: str


@dataclass(frozen=True, kw_only=True)
class SavedStanding(SavedRecord):
    """The state of a guarded controller but for its records."""

    seen: list[Count]
    recorded: bool
    decision: SavedDecision | None
    guardrails: SavedGuardrails
    contract: SavedContract | None
    fallen_back: tuple[str | None, Count | None]
    failures: Count
    refusals: dict[str, Count]
    rollbacks: list[SavedRollback]

    def __post_init__(self) -> None:
        if self.decision is None and not self.recorded:
            raise ValueError("decision must be held while its interval is not recorded, got none")
        if (self.fallen_back[0] is None) != (self.fallen_back[1] is None):
            raise ValueError(f"fallen_back must be a reason and a decision, or neither, got {shown(self.fallen_back)}")


@dataclass(frozen=True, kw_only=True)
class SavedPoint(SavedRecord):
    """What a controller knew before a decision."""

    seen: list[Count]
    guardrails: SavedPast
    contract: SavedIntervals


@dataclass(frozen=True, kw_only=True)
class SavedTrial(SavedRecord):
    """A trial under way: `start` and `end` are copies of the run before the trial and after its shadow."""

    n_records: Count
    snapshot: bool
    shadow: list[Telemetry]
    point: SavedPoint
    start: dict[str, Any] | None
    end: dict[str, Any] | None

    def __post_init__(self) -> None:
        if (self.start is None) == (self.end is None):
            raise ValueError("start or end must be held, and one of the two alone")
        if self.end is not None and not self.shadow:
            raise ValueError("shadow must hold the intervals before end, got none")


@dataclass(frozen=True, kw_only=True)
class SavedController(SavedStanding):
    """The whole state of a guarded controller."""

    records: list[DecisionRecord]

    def __post_init__(self) -> None:
        super().__post_init__()
        seen = self.seen
        if seen != sorted(set(seen)) or (seen and seen[-1] >= len(self.records)):
            raise ValueError(f"seen must be rising places in the {len(self.records)} records, got {shown(seen)}")
        if (most := max(map(len, self.guardrails.past.moves.values()))) > len(seen) + 1:
            raise ValueError(f"moves must be of the {len(seen) + 1} decisions so far, got {most}")


@dataclass(frozen=True, kw_only=True)
class SavedSteering(SavedRecord):
    """The state of a steered loop but for the loop's own and the controller's, which check theirs."""

    settings: dict[str, Any]
    mode: str = "steer"
    process: tuple[Count, Count]
    fine_tuning: bool
    spoilt: list[Count]
    validation_loss: Number | None
    controller: dict[str, Any]
    trial: SavedTrial | None = None

    @classmethod
    def of(cls, state: object) -> SavedSteering:
        """Return the parts of a saved state. Raises `ValueError` where one is missing or wrong."""
        if not isinstance(state, Mapping):
            raise ValueError(f"state must be what state_dict returned, got {shown(state)}")
        return cls.from_json({name: state[name] for name in cls.__dataclass_fields__ if name in state})
