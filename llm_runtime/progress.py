"""Keep where a run stands in its budget: in the present interval, in its cool-down, and how far from its end.

`TokenProgress` counts whole sequences. `MeasuredProgress` counts seconds or joules: it reads them as the run goes, and
predicts in between from what a step has cost of late. Loads numpy, but not torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trainpilot.llm_runtime.budget import Budget, Currency, Gauge
from trainpilot.llm_runtime.saved_loop import SavedCourse, SavedMeasuredCourse
from trainpilot.llm_runtime.schedules import PARTS, Cooldown, OwnSchedule, Schedule


@dataclass(kw_only=True)
class BudgetProgress(ABC):
    """Where a run stands in its budget.

    A position is what the schedule counts: tokens, or billionths of a budget in seconds or joules.
    """

    schedule: Schedule | OwnSchedule
    """The base schedule, over positions. A cool-down replaces it."""
    sequence_length: int
    """Tokens of a sequence."""
    decisions: int
    """Number of intervals in the run."""
    sequences: int = 0
    """Sequences trained on so far."""
    decision: int = 0
    """Number of intervals that have ended, which is also the index of the present one."""
    cooldown: Cooldown | None = None
    """The cool-down, once it has begun."""
    begun: int = 0
    """Position at which the present interval began."""

    @property
    def tokens(self) -> int:
        """Tokens trained on, by the nominal length of a sequence."""
        return self.sequences * self.sequence_length

    @property
    @abstractmethod
    def position(self) -> int:
        """Position at which the next step begins."""

    @property
    @abstractmethod
    def used(self) -> float:
        """Share of the budget that is used up, in [0, 1]."""

    @property
    @abstractmethod
    def end(self) -> int:
        """Sequences at which the run ends; an estimate unless the budget is in tokens."""

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether the budget is used up or the cool-down complete."""

    @property
    @abstractmethod
    def interval_end(self) -> int:
        """Position at which the present interval ends."""

    @property
    @abstractmethod
    def interval_over(self) -> bool:
        """Whether the present interval has used its share of the budget."""

    @property
    def begun_share(self) -> float:
        """Share of the budget that was used when the present interval began."""
        return self.begun / self.schedule.budget_tokens

    @property
    def interval_progress(self) -> float:
        """Share of the present interval that has gone by."""
        return (self.position - self.begun) / max(self.interval_end - self.begun, 1)

    @abstractmethod
    def ends_within(self, steps: int, batch_size: int) -> bool:
        """Return whether the present interval ends with the next `steps` steps of `batch_size` sequences, or before."""

    @abstractmethod
    def _extent(self, batch_size: int) -> int:
        """Return the length of a step of `batch_size` sequences, in positions."""

    @abstractmethod
    def step_sequences(self, batch_size: int) -> int:
        """Return the sequences of the next step; the last one of a run may be smaller than the batch in force."""

    @abstractmethod
    def begin_interval(self, end_share: float | None = None, *, reading: bool = True) -> None:
        """Begin an interval, after a cool-down that begins with it.

        Args:
            end_share: Share of the budget at which it ends; by default all intervals are equal.
            reading: Whether seconds and joules are counted from here on, and not from the first step.
        """

    @abstractmethod
    def begin_step(self) -> None:
        """Begin a step: seconds and joules are counted from here on, if they are not already."""

    def end_step(self, sequences: int) -> None:
        """Count a step of `sequences` sequences."""
        self.sequences += sequences

    def factor(self, batch_size: int) -> float:
        """Return the factor on the learning rate of a step of `batch_size` sequences, in [0, 1]."""
        if self.cooldown is not None:
            return self.cooldown.factor(self.position)
        return self.schedule.factor(self.position, self._extent(batch_size))

    def begin_cooldown(self, batch_size: int) -> None:
        """Begin the cool-down with steps of `batch_size` sequences, unless it has begun."""
        if self.cooldown is None:
            self.cooldown = Cooldown.begin(self.schedule, self.position, self._extent(batch_size))

    @property
    @abstractmethod
    def currency(self) -> Currency:
        """What the budget is counted in."""

    @abstractmethod
    def read(self) -> float:
        """Read the seconds or joules so far, in all processes at once; 0 under a budget in tokens."""

    @abstractmethod
    def suspend(self) -> None:
        """Stop counting seconds and joules until the next reading or step."""

    @abstractmethod
    def end_evaluation(self, before: float) -> None:
        """End an evaluation that began when `read` returned `before`; as much is kept for the one after the last step.

        An evaluation before the first step is no cost of the run.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the budget as plain JSON values."""
        cooldown = asdict(self.cooldown) if self.cooldown is not None else None
        return {"sequences": self.sequences, "decision": self.decision, "cooldown": cooldown, "begun": self.begun}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError` for a state that `load_state_dict` cannot load."""
        SavedCourse.from_json(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position that `state_dict` returned."""
        self.sequences, self.decision = state["sequences"], state["decision"]
        self.cooldown = Cooldown(**state["cooldown"]) if state["cooldown"] is not None else None
        self.begun = state.get("begun", self.position)  # version 0.1 did not write it


@dataclass(kw_only=True)
class TokenProgress(BudgetProgress):
    """Where a run stands in a budget of tokens, in whole sequences."""

    budget: int
    """Sequences of the whole run."""
    grain: int = 1
    """Intervals and the run end only after a multiple of this number of sequences."""
    first: int = 0
    """Sequences trained on before the first interval."""
    _end_share: float | None = field(default=None, init=False)

    @property
    def position(self) -> int:
        """Tokens trained on."""
        return self.tokens

    @property
    def used(self) -> float:
        """Share of the budget that is used up, in [0, 1]."""
        return self.sequences / self.budget

    @property
    def end(self) -> int:
        """Sequences at which the run ends: the budget, or the end of the cool-down."""
        if self.cooldown is None:
            return self._rounded_up(self.budget)
        return self._rounded_up(-(-self.cooldown.end_tokens // self.sequence_length))

    @property
    def finished(self) -> bool:
        """Whether the budget is used up or the cool-down complete."""
        return self.sequences >= self.end

    @property
    def interval_end(self) -> int:
        """Tokens at which the present interval ends."""
        return self._interval_end * self.sequence_length

    @property
    def interval_over(self) -> bool:
        """Whether the present interval has used its share of the budget."""
        return self.ends_within(0, 0)

    @property
    def _interval_end(self) -> int:
        """Sequences at which the present interval ends."""
        if self._end_share is None:
            return self._end_of(self.first + (self.decision + 1) * (self.budget - self.first) / self.decisions)
        return self._end_of(self._end_share * self.budget)

    def _end_of(self, sequences: float) -> int:
        return self._rounded_up(min(round(sequences), self.end))

    def _rounded_up(self, sequences: int) -> int:
        return min(-(-sequences // self.grain) * self.grain, self.budget)

    def ends_within(self, steps: int, batch_size: int) -> bool:
        """Return whether the present interval ends with the next `steps` steps of `batch_size` sequences, or before."""
        return self.sequences + steps * batch_size >= self._interval_end

    def _extent(self, batch_size: int) -> int:
        return batch_size * self.sequence_length

    def step_sequences(self, batch_size: int) -> int:
        """Return the sequences of the next step; the last one of a run may be smaller than the batch in force."""
        return min(batch_size, self.end - self.sequences)

    def begin_interval(self, end_share: float | None = None, *, reading: bool = True) -> None:
        """Begin an interval that ends at a share of the budget; by default all intervals are equal."""
        self.begun, self._end_share = self.position, end_share

    def begin_step(self) -> None:
        """Do nothing: tokens are counted when a step ends."""

    @property
    def currency(self) -> Currency:
        """What the budget is counted in."""
        return "tokens"

    def read(self) -> float:
        """Return 0: there are no seconds or joules to read."""
        return 0.0

    def suspend(self) -> None:
        """Do nothing: tokens do not run on."""

    def end_evaluation(self, before: float) -> None:
        """Do nothing: an evaluation costs no tokens of the budget."""


GUESSED_STEPS = 50
"""Steps of an interval that the first step of a run goes by, which nothing has been measured for yet."""


@dataclass(kw_only=True)
class MeasuredProgress(BudgetProgress):
    """Where a run stands in a budget of seconds or joules.

    They are read at the beginning of an interval, after its first step, and then each time that half of the steps that
    seem to be left of it are done, so that an interval ends within half a step of its share, and a reading costs
    nothing. In between, each step counts as the mean of the interval's so far. What an interval uses too much or too
    little, the others share. What has been used stays used: going back to an earlier state brings no seconds back.
    """

    budget: Budget
    """Seconds or joules of the whole run."""
    expected_sequences: int | None = None
    """Sequences that the whole run is expected to have, if that is known."""
    reserve: float = 0.0
    """Seconds or joules kept for the evaluation that follows the last step."""
    spent: float = 0.0
    """Seconds or joules at the newest reading."""
    gauge: Gauge | None = None
    """Counts them; the loop that takes the steps sets it."""
    _used: float = field(default=0.0, init=False)
    """Share of the budget used before the next step: read, or predicted."""
    _step_share: float = field(init=False)
    """Share of the budget that a step takes."""
    _end_share: float = field(default=0.0, init=False)
    """Share used at which the present interval ends."""
    _planned: float = field(default=0.0, init=False)
    """Share at which the present interval was planned to end, had all others ended where they were."""
    _first: float = field(default=0.0, init=False)
    """Share used at the interval's first reading, from which its steps are counted."""
    _steps: int = field(default=0, init=False)
    """Steps since then."""
    _until_reading: int = field(default=1, init=False)
    """Steps until the next reading."""
    _before: float = field(default=0.0, init=False)
    """Seconds or joules of earlier processes of the run."""
    _finished: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._step_share = 1 / (self.decisions * GUESSED_STEPS)

    def expect(self, step_cost: float, batch_size: int) -> None:
        """Take what a first step of `batch_size` sequences is expected to cost, in seconds or joules."""
        self._step_share = step_cost / self.budget.amount
        self.expected_sequences = round(self.budget.amount / step_cost * batch_size)

    # Where it stands -------------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """Billionths of the budget that are used."""
        return round(self.used * PARTS)

    @property
    def used(self) -> float:
        """Share of the budget that is used up, in [0, 1]."""
        return min(self._used, 1.0)

    @property
    def end(self) -> int:
        """Sequences at which the run is expected to end at its pace so far."""
        if self.finished:
            return self.sequences
        pace = self.sequences / self._used if self._used > 0 else self.expected_sequences or 0
        return max(round(self._run_end * pace), self.sequences + 1)

    @property
    def finished(self) -> bool:
        """Whether the budget was used up, or the cool-down complete, after the last step, to within half a step."""
        return self._finished

    @property
    def _run_end(self) -> float:
        return 1.0 if self.cooldown is None else self.cooldown.end_tokens / PARTS

    @property
    def interval_end(self) -> int:
        """Billionths of the budget at which the present interval ends."""
        return round(self._end_share * PARTS)

    @property
    def interval_over(self) -> bool:
        """Whether the present interval has used its share of the budget, to within half a step."""
        return self.ends_within(0, 0)

    def ends_within(self, steps: int, batch_size: int) -> bool:
        """Return whether the present interval ends with the next `steps` steps of `batch_size` sequences, or before."""
        return self._used + steps * self._step_share >= self._end_share - self._step_share / 2

    def _extent(self, batch_size: int) -> int:
        return round(self._step_share * PARTS)

    def step_sequences(self, batch_size: int) -> int:
        """Return the batch size in force."""
        return batch_size

    # Steps and intervals ---------------------------------------------------------------------------------------------

    def begin_interval(self, end_share: float | None = None, *, reading: bool = True) -> None:
        """Begin an interval that ends at a share of the budget; by default all that are left are equal.

        What has been used since the last one ended, or since an evaluation, is part of it.
        """
        ended = self._used
        if reading:
            self.read()
        self._first, self._steps, self._until_reading = self._used, 0, 1
        self.begun = self.position
        planned = (self.decision + 1) / self.decisions if end_share is None else end_share
        before = self.decision / self.decisions if end_share is None else self._planned
        part = (planned - before) / (1 - before) if before < 1 - 1e-9 else 1.0
        end = ended + part * max(1 - ended, 0.0) if part < 1 - 1e-9 else 1.0
        self._end_share, self._planned = min(end, self._run_end), planned

    def begin_step(self) -> None:
        """Begin a step: seconds and joules are counted from here on, if they are not already."""
        self._counting().resume()

    def end_step(self, sequences: int) -> None:
        """Count a step of `sequences` sequences; now and then read what has been used."""
        super().end_step(sequences)
        self._used += self._step_share
        self._steps += 1
        self._until_reading -= 1
        if self._until_reading <= 0:
            self._read_steps()
        self._finished = self._used >= self._run_end - self._step_share / 2

    def _read_steps(self) -> None:
        """Read what has been used, with it the cost of a step, and plan the next reading."""
        self.read()
        self._step_share = max(self._used - self._first, 0.0) / self._steps
        left = (self._end_share - self._used) / self._step_share if self._step_share > 0 else 0.0
        self._until_reading = max(int(left / 2), 1)

    # What measures ---------------------------------------------------------------------------------------------------

    @property
    def currency(self) -> Currency:
        """What the budget is counted in."""
        return self.budget.currency

    def _counting(self) -> Gauge:
        assert self.gauge is not None, "a loop gives it one"
        return self.gauge

    def read(self) -> float:
        """Read the seconds or joules so far, in all processes at once."""
        gauge = self._counting()
        gauge.resume()
        self.spent = self._before + gauge.read()
        self._used = self.spent / self._for_steps
        return self.spent

    @property
    def _for_steps(self) -> float:
        """Seconds or joules without the reserve, at least half of the budget."""
        return max(self.budget.amount - self.reserve, self.budget.amount / 2)

    def suspend(self) -> None:
        """Stop counting until the next reading or step."""
        self._counting().suspend()

    def end_evaluation(self, before: float) -> None:
        """End an evaluation that began when `read` returned `before`; as much is kept for the one after the last step.

        An evaluation before the first step is no cost of the run.
        """
        self.reserve = self.read() - before
        if not self.sequences:
            self._before, self.spent = self._before - self.spent, 0.0
            self.suspend()
        self._used = self.spent / self._for_steps

    # Saving and resuming ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the budget as plain JSON values; seconds and joules as last read or predicted."""
        own = {name: getattr(self, f"_{name}") for name in _SAVED}
        return {**super().state_dict(), **own, "spent": self._used * self._for_steps, "reserve": self.reserve}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise `ValueError` for a state that `load_state_dict` cannot load."""
        SavedMeasuredCourse.from_json(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the position that `state_dict` returned; in a run that has used more since, that stays used."""
        super().load_state_dict(state)
        for name in _SAVED:
            setattr(self, f"_{name}", state[name])
        more = max(state["spent"] - self.spent, 0.0)
        self._before += more
        self.spent += more
        self.reserve = state["reserve"]
        self._used = self.spent / self._for_steps
        self._until_reading = 1


_SAVED = ("step_share", "end_share", "planned", "first", "steps", "finished")
