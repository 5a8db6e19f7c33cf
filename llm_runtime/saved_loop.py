"""The form of a loop's saved state, by which a state from a file is checked before anything is changed.

The states of version 0.1 lack some fields; these have defaults.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import count
from typing import Annotated, Any, ClassVar, Self

from trainpilot.llm_runtime.config import LEARNING_RATE_SCALE_RANGE, Controls, Precision
from trainpilot.llm_runtime.json_records import LARGEST, JsonRecord
from trainpilot.llm_runtime.plain_values import MAX_INT, shown
from trainpilot.llm_runtime.ranges import COUNT, Range

Count = Annotated[int, COUNT]
Number = Annotated[float, Range(-LARGEST, LARGEST)]
NotNegative = Annotated[float, Range(0, LARGEST)]
Positive = Annotated[float, Range(0, LARGEST, above=True)]


class SavedRecord(JsonRecord):
    """Base of the parts of a saved state. Its numbers are used as they are, so a text is taken for none."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Return the record. Raises `ValueError` as `JsonRecord.from_json`, and where a value was made up or turned."""
        record = super().from_json(content)
        _check_as_given(record, content)
        return record


def _check_as_given(read: Any, given: Any) -> None:
    """Raise `ValueError` where a number was read from a text, or a control that is missing has its default."""
    if read is given:
        return
    pairs: Iterable[tuple[Any, Any, Any]]
    if isinstance(given, Mapping):
        own = read if isinstance(read, Mapping) else vars(read)
        if type(read) is Controls and (missing := _CONTROLS - given.keys()):
            raise ValueError(f"controls must hold {min(missing)}, got none")
        pairs = ((name, own.get(name), value) for name, value in given.items())
    else:
        pairs = zip(count(), read, given)
    for name, one, value in pairs:
        if type(value) in _NUMBERS:  # as most of what a long run's state holds
            continue
        if isinstance(value, str | bytes):
            if isinstance(one, int | float):
                raise ValueError(f"state must hold {name} as a number, got the text {shown(value)}")
        elif isinstance(value, Mapping | list | tuple) and (
            isinstance(one, Mapping | list | tuple) or is_dataclass(one)
        ):
            _check_as_given(one, value)


_NUMBERS = frozenset({int, float, bool, type(None)})
_CONTROLS = frozenset(each.name for each in fields(Controls))


@dataclass(frozen=True, kw_only=True)
class SavedCooldown(SavedRecord):
    """The cool-down, once it has begun."""

    start_tokens: Count
    end_tokens: Count
    start_factor: NotNegative


@dataclass(frozen=True, kw_only=True)
class SavedCourse(SavedRecord):
    """Where the run stands in its budget."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "ignore"}

    sequences: Count
    decision: Count
    cooldown: SavedCooldown | None
    begun: Count = 0


@dataclass(frozen=True, kw_only=True)
class SavedMeasuredCourse(SavedCourse):
    """The same of a budget in seconds or joules."""

    step_share: NotNegative
    end_share: NotNegative
    planned: NotNegative
    first: NotNegative
    steps: Count
    finished: bool
    spent: Number
    reserve: Number


@dataclass(frozen=True, kw_only=True)
class SavedLevers(SavedRecord):
    """The learning rates, the masks and the number format."""

    masks: dict[str, Any] | None
    peak: Positive
    ratios: list[NotNegative]
    set: list[NotNegative]
    output_precision: str

    @classmethod
    def of(cls, state: object) -> SavedLevers:
        """Return the levers in a loop's state. Raises `ValueError` where they are missing or wrong."""
        if not isinstance(state, Mapping):
            raise ValueError(f"state must be what state_dict returned, got {shown(state)}")
        return cls.from_json(state.get("levers", {}))


@dataclass(frozen=True, kw_only=True)
class SavedProbe(SavedRecord):
    """The result of a curvature probe."""

    linear: float
    quadratic: float
    relative_update: float


@dataclass(frozen=True, kw_only=True)
class SavedInterval(SavedRecord):
    """What has been measured of an interval that is under way. A loss of a diverged run is not finite."""

    losses: list[float]
    norms: list[float]
    adam_norms: list[float | None] | None = None
    moments: list[float]
    since: tuple[Number, Number | None]
    probe: SavedProbe | None
    probe_s: Number

    def __post_init__(self) -> None:
        if len(self.losses) != len(self.norms):
            raise ValueError(f"losses must have a norm each, got {len(self.losses)} and {len(self.norms)}")
        if self.adam_norms is not None and len(self.adam_norms) != len(self.losses):
            raise ValueError(f"losses must have an adam_norm each, got {len(self.losses)} and {len(self.adam_norms)}")


@dataclass(frozen=True, kw_only=True)
class SavedReadings(SavedRecord):
    """What the recorder of the intervals holds."""

    start_sequences: Count
    start_sparsity: NotNegative
    mask_updates: Count
    switch_s: Number
    evaluation_s: Number
    micro_batches: Count
    taken: Count
    decision: Count
    skipped_steps: Count = 0
    begun: tuple[Number, Number | None] | None
    interval: SavedInterval | None = None
    before: list[Any]


def check_saved_controls(controls: Controls) -> None:
    """Raise `ValueError` for a learning-rate scale that no controller can have set, as it would overflow."""
    if (scale := controls.learning_rate_scale) > LEARNING_RATE_SCALE_RANGE[1]:
        raise ValueError(f"learning_rate_scale must be at most {LEARNING_RATE_SCALE_RANGE[1]:g}, got {scale:g}")


@dataclass(frozen=True, kw_only=True)
class SavedLoop(SavedRecord):
    """The whole state of a loop, but for its model and optimizer."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "ignore"}

    course: dict[str, Any]
    controls: Controls
    levers: SavedLevers
    readings: SavedReadings

    def __post_init__(self) -> None:
        check_saved_controls(self.controls)


@dataclass(frozen=True, kw_only=True)
class SavedSnapshot(SavedRecord, Controls):
    """A snapshot of what training changes, the controls among it."""

    weights: dict[str, Any]
    width: Count
    optimizer: dict[str, Any]
    precision: Precision = field()
    """Unlike in `Controls`, it has to be there."""
    masks: dict[str, Any]
    scaler: dict[str, Any]
    effective_precision: str
    micro_batch_size: Annotated[int, Range(1, MAX_INT)] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_saved_controls(self)


@dataclass(frozen=True, kw_only=True)
class SavedPosition(SavedRecord):
    """A position in a stream of batches, in sequences."""

    position: Count


@dataclass(frozen=True, kw_only=True)
class SavedRun(SavedRecord):
    """A snapshot of a live run; its position in the budget is checked apart."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "ignore"}

    trainer: dict[str, Any]
    stream: SavedPosition
    random_state: dict[str, Any]
    target_share: NotNegative
    validation_loss: Number | None
