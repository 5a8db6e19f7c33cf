"""The paired mode of the quality contract: now and then a part of the run is trained twice, from the same state.

A decision that departs from the base schedule is on trial for `TRIAL` intervals. First a shadow trains under the base
schedule, then the run goes back and trains on the same data as the policy decides. If the shadow ends better by more
than was agreed, the run goes on from its weights, under the base schedule for a while. Between trials the controls that
stood theirs are held. So what a policy does is measured, and no reference run is needed.

Over a few intervals a low learning rate looks too good, as it has less noise, and a high one too bad. A high one has to
pay within its trial all the same, or from what earlier trials have gained: a lead in budget, which is worth less as the
losses flatten. What a low one withholds is counted as against a reference (`withheld.py`), by the fall of the run's own
losses, and shares what was agreed with what the trials have cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.steering.contract import ALMOST, JUDGED_FROM, SMOOTHING, ContractWatch, QualityContract
from trainpilot.agents.steering.guardrails import is_lost
from trainpilot.agents.steering.saved_state import SavedTrial
from trainpilot.agents.steering.withheld import ReferenceFall
from trainpilot.llm_runtime.config import Controls
from trainpilot.llm_runtime.energy.meter import sum_known
from trainpilot.llm_runtime.telemetry import Telemetry

if TYPE_CHECKING:
    from trainpilot.llm_runtime.loop import ControlledLoop
    from trainpilot.llm_runtime.rollback import RollbackCopy, Stateful

TRIAL = 2
"""Intervals of a trial. Its last one decides, when what a change stirs up has settled a little."""
FITTED = 4
"""Fewer losses than these show no fall."""
PACES = 12
"""Newest intervals of shadows by which the base schedule's speed is known."""
LONGEST = 16
"""Losses in a row after which the wait for the next trial no longer doubles."""
LOST = "taken back: the shadow of the base schedule ended better than the policy's controls, by more than was agreed"
HELD = "everything refused: the quality contract holds the controls until the next trial"


class PairedWatch(ContractWatch):
    """Counts what a policy has cost in its trials, and says when the next one is due."""

    def __init__(self, contract: QualityContract) -> None:
        super().__init__(contract)
        assert contract.paired is not None, "the mode is on"
        self.round = math.ceil(TRIAL / contract.paired - 1e-9)
        """Intervals from the beginning of a trial that was passed to that of the next."""
        self.cost = 0.0
        """What the trials that were passed have cost, in nats/token, less what later ones have gained; at least 0."""
        self.lead = 0.0
        """What they have gained at no lower speed than the base schedule's, as a share of the budget that it saves."""
        self.newest: float | None = None
        """Loss less the shadow's in the newest trial that was passed, in nats/token."""
        self.on_trial, self.hold = False, 0
        """Whether a trial is under way, and the number of intervals for which the controls are held."""
        self.lost_running = 0
        """Trials lost in a row. With each the wait for the next one doubles."""
        self.trials = {"passed": 0, "lost": 0}
        self.sequences = 0
        """Sequences that were trained on and not kept."""
        self.not_kept: tuple[float, float | None] = (0.0, 0.0)
        """Seconds and joules of these; and of those of them that are in no record."""
        self.unrecorded: tuple[float, float | None] = (0.0, 0.0)
        self.paces: list[float] = []
        """Seconds per token of the newest shadows."""
        self.impossible: str | None = None
        """Why there can be no further trial; the contract is broken then, as nothing measures the policy any more."""

    @property
    def observing(self) -> bool:
        """Whether the run gathers evidence under the base schedule: never, as its shadows do."""
        return False

    @property
    def holds(self) -> str | None:
        """Why the policy may change nothing now; `None` where it may."""
        return HELD if (self.hold and not self.on_trial) or self.impossible else None

    def observe(self, telemetry: Telemetry, *, steers: bool = True, speed: float = 1.0) -> str | None:
        """Record an interval; return why the contract is broken: by lost time, or as there can be no further trial."""
        broken = super().observe(telemetry, steers=steers, speed=speed)
        self.hold = max(self.hold - 1, 0)
        self._fall = self._own_fall()
        return broken

    def _own_fall(self) -> ReferenceFall | None:
        """Return the fall of the run's own losses over the later half of what it has trained on."""
        rows = [row for row in self._rows if row["share"] >= self._rows[-1]["share"] / 2]
        if len(rows) < FITTED:
            return None
        shares, losses = [row["share"] for row in rows], [row["loss"] for row in rows]
        rate = max(-float(np.polyfit(shares, losses, 1)[0]), 0.0)
        swing = float(np.sqrt((np.diff(losses) ** 2).mean() / 2))
        return ReferenceFall(rate=rate, end=fmean(losses[-SMOOTHING:]) - rate * (1 - shares[-1]), swing=swing)

    def judge(self, difference: float | None) -> bool:
        """End a trial, before its last interval is observed; return whether the policy's controls have stood it.

        Args:
            difference: Loss of the last interval less the shadow's, in nats/token. It is not finite where the weights
                are lost, and `None` where the shadow's are.
        """
        cost = self.cost if difference is None else max(self.cost + difference, 0.0)
        rate = self._fall.rate if self._fall is not None else 0.0
        passed = difference is None or self._is_better(difference)
        passed = passed or self._is_within(cost + self.withheld() - self.lead * rate)
        if passed:
            self.cost, self.newest, self.lost_running = cost, difference, 0
            if difference is not None and rate and self._slow() > ALMOST:
                self.lead += max(-difference, 0.0) / rate
        else:
            self.newest, self.lost_running = None, min(self.lost_running + 1, LONGEST)
        self.trials["passed" if passed else "lost"] += 1
        self.on_trial = False
        self.hold = self.round * 2 ** max(self.lost_running - 1, 0) - TRIAL + 1
        return passed

    def _slow(self) -> float:
        """Return the speed of the newest interval over the base schedule's, at most 1."""
        return min(self._rows[-1]["speed"], 1.0) if self._rows else 1.0

    def _is_better(self, difference: float) -> bool:
        """Return whether a trial ended better than its shadow, by more than a lower rate can hide."""
        left = self._fall.left(self._rows[-1]["share"], self._rows[-1]["loss"]) if self._fall is not None else 0.0
        return difference + (1 - self._slow()) * left < 0

    def least_speed(self, speed: float, present: float, started: float) -> float:
        """Return the speed at which the next interval is to learn: the one chosen while a trial measures it."""
        return speed if self.on_trial else super().least_speed(speed, present, started)

    def _is_within(self, increase: float) -> bool:
        """Return whether an increase of the loss is no more than was agreed; NaN is more."""
        return increase <= self.contract.max_loss_increase + 1e-9

    def note_shadow(self, telemetry: Telemetry) -> None:
        """Note the speed of a shadow's interval."""
        if telemetry.interval_tokens:
            self.paces = [*self.paces, telemetry.time_s / telemetry.interval_tokens][-PACES:]

    def count(self, sequences: int, time_s: float, energy_j: float | None, *, recorded: bool) -> None:
        """Add what was trained and not kept to the cost of the mode."""
        self.sequences += sequences
        self.not_kept = self.not_kept[0] + time_s, sum_known([self.not_kept[1], energy_j])
        if not recorded:
            self.unrecorded = self.unrecorded[0] + time_s, sum_known([self.unrecorded[1], energy_j])

    # What a contract asks of its evidence ----------------------------------------------------------------------------

    def loss_increase(self, window: int = SMOOTHING) -> tuple[float, float] | None:
        """Return the newest trial's difference, whose standard error is not known; `None` where there is none."""
        return None if self.newest is None else (self.newest, 0.0)

    def _breach(self) -> str | None:
        if self.impossible:
            return self.impossible
        slowdown, agreed = self.slowdown(), self.contract.max_slowdown
        if self._rows[-1]["share"] < JUDGED_FROM - 1e-9 or slowdown is None or slowdown <= agreed:
            return None
        return f"{slowdown:.0%} more seconds per token than the base schedule, agreed {agreed:.0%}"

    def _steered(self) -> list[dict[str, float]]:
        return self._rows

    def _forecast(self, share: float, tokens: float) -> tuple[float, float] | None:
        return None

    def _base_s_per_token(self) -> float | None:
        return median(self.paces) if self.paces else None

    def summary(self) -> dict[str, Any]:
        """Return whether the contract was kept by its trials, and what they cost, as plain JSON values."""
        withheld, slowdown = self.withheld(), self.slowdown()
        total = self.cost + withheld
        kept = self._is_within(total) and (slowdown is None or slowdown <= self.contract.max_slowdown)
        return super().summary() | {
            "held": False if self.broken is not None else kept or None,
            "evidence": f"{sum(self.trials.values())} trials against a shadow of the base schedule",
            "loss_increase": total,
            "standard_error": None,
            "detects_from": None,
            "paired": {
                **self.trials,
                "withheld": withheld,
                "sequences": self.sequences,
                "time_s": self.not_kept[0],
                "energy_j": self.not_kept[1],
            },
        }

    # Saving and resuming ---------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON values."""
        pairs = {name: getattr(self, name) for name in _SAVED}
        lists = {name: list(pairs[name]) for name in ("not_kept", "unrecorded", "paces")}
        return {**super().state_dict(), "pairs": {**pairs, **lists, "trials": dict(self.trials)}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        super().load_state_dict(state)
        for name, value in (state.get("pairs") or {}).items():
            setattr(self, name, tuple(value) if name in ("not_kept", "unrecorded") else value)

    def load_past_state(self, state: Mapping[str, Any]) -> None:
        """Restore the intervals; what the trials have shown and cost stays."""
        super().load_past_state(state)
        self._fall = self._own_fall() if self._rows else None


_SAVED = (
    "cost", "lead", "newest", "on_trial", "hold", "lost_running", "trials", "sequences", "not_kept", "unrecorded",
    "paces",
)  # fmt: skip


class Pairing:
    """Carries out the trials of a run: the copies to go back to, and what a shadow has measured.

    Args:
        watch: Judges the trials.
        loop: The loop, before any control was changed.
        data: Position of the data, which goes back with the run.
        warn: Told of data that fail, after which there is no further trial.
    """

    def __init__(self, watch: PairedWatch, loop: ControlledLoop, data: Stateful, warn: Callable[[str], None]) -> None:
        from trainpilot.llm_runtime.rollback import RollbackCopy  # guarded controllers load without torch

        def fails(message: str) -> None:
            watch.impossible = message
            warn(message)

        self.watch, self._loop, self._start_controls = watch, loop, loop.controls
        self._start, self._end = RollbackCopy(loop, data, fails), RollbackCopy(loop, data, fails)
        """The run before the trial under way, and after its shadow: one of the two is held."""
        self.snapshot = False
        """Whether the decision on trial asks for a snapshot."""
        self.point: Mapping[str, Any] = {}
        """What the controller knew before that decision."""
        self._n_records = 0
        """Number of records before the trial."""
        self._shadow: list[Telemetry] = []

    @classmethod
    def of(
        cls, watch: ContractWatch | None, loop: ControlledLoop, data: Stateful | None, warn: Callable[[str], None]
    ) -> Self | None:
        """Return the trials of a contract; `None` where it is not paired.

        Raises:
            ValueError: the run cannot go back to where a trial began.
        """
        if not isinstance(watch, PairedWatch):
            return None
        if data is None:
            raise ValueError(
                "contract must be without paired where the data cannot be trained on twice, got no data; give "
                "Steering(data=...), an object with state_dict and load_state_dict, or leave paired out"
            )
        if loop.progress.currency != "tokens":
            raise ValueError(
                "contract must be without paired under a budget in seconds or joules, which trials use up for good, "
                f"got budget in {loop.progress.currency}; give sequences instead, or a reference"
            )
        if loop.ranks.world_size > 1:
            raise ValueError(
                f"contract must be without paired in several processes, got {loop.ranks.world_size}; "
                "train in one process, or give a reference"
            )
        return cls(watch, loop, data, warn)

    @property
    def shadowing(self) -> bool:
        """Whether the interval under way is a shadow's."""
        return self._start.exists

    def base_controls(self) -> Controls:
        """Return the controls of the base schedule; the present sparsity stays."""
        now = self._loop.controls
        return replace(self._start_controls, sparsity=now.sparsity, finish=now.finish)

    def is_due(self, controls: Controls) -> bool:
        """Return whether these controls have to stand a trial before the run goes on with them."""
        waits = self.watch.on_trial or self.watch.hold or self.watch.impossible
        return not waits and controls != self.base_controls()

    def begin(self, point: Mapping[str, Any], *, snapshot: bool, n_records: int) -> None:
        """Begin a trial with its shadow.

        Args:
            point: What the controller knew before its decision.
            snapshot: Whether the decision asks for a snapshot.
            n_records: Number of records so far.
        """
        self.watch.on_trial = True
        self.point, self.snapshot, self._n_records, self._shadow = point, snapshot, n_records, []
        self._start.take()

    def goes_on(self, telemetry: Telemetry) -> bool:
        """Take an interval of the shadow; return whether it goes on. After its last one the run is taken back."""
        self._shadow.append(telemetry)
        self.watch.note_shadow(telemetry)
        if len(self._shadow) < TRIAL and not telemetry.finished and not is_lost(telemetry):
            return True
        begin_s = self._loop.recorder.seconds()
        self._end.take()
        self._go_to(self._start)
        self.watch.count(0, self._loop.recorder.seconds() - begin_s, 0.0, recorded=False)
        return False

    def _go_to(self, copy: RollbackCopy) -> None:
        """Restore a copy, data and budget with it, and free it."""
        copy.rolled_back.clear()
        copy.restore()
        copy.drop()
        self._loop.recorder.decision = self._loop.progress.decision

    def ends(self, telemetry: Telemetry) -> bool:
        """Return whether a trial ends with this interval: where its shadow ended, or as the weights are lost."""
        copied = self._end.state_dict()
        if copied is None:
            return False
        return is_lost(telemetry) or self._loop.progress.sequences >= copied["progress"]["sequences"]

    def passed(self, records: Sequence[DecisionRecord]) -> bool:
        """End a trial; return whether the run goes on as it is. Else `take_shadow` is to be called.

        Args:
            records: Those of the controller.
        """
        steered, shadow = [record.telemetry for record in records[self._n_records :]], self._shadow
        difference = None if is_lost(shadow[-1]) else _loss(steered[-1]) - _loss(shadow[-1])
        passed = self.watch.judge(difference)
        if passed:
            self._end.drop()
        self._count(shadow if passed else steered, recorded=not passed)
        return passed

    def take_shadow(self) -> list[Telemetry]:
        """Bring the run to the end of the shadow, and return the shadow's intervals."""
        self._go_to(self._end)
        return self._shadow

    def abandon(self) -> None:
        """End a trial that is under way without a verdict, as the run is taken back."""
        if self._end.exists:
            self._end.drop()
            self._count(self._shadow, recorded=False)
        self.watch.on_trial = False

    def drop(self) -> None:
        """Free the copies."""
        self._start.drop()
        self._end.drop()

    def _count(self, intervals: Sequence[Telemetry], *, recorded: bool) -> None:
        tokens, length = sum(each.interval_tokens for each in intervals), self._loop.progress.sequence_length
        joules = sum_known(each.energy_j for each in intervals)
        self.watch.count(tokens // length, sum(each.time_s for each in intervals), joules, recorded=recorded)

    def state_dict(self) -> dict[str, Any] | None:
        """Return the trial under way, with its copy of the run, which `torch.save` can write; `None` without one."""
        if not (self._start.exists or self._end.exists):
            return None
        return {
            "snapshot": self.snapshot,
            "point": dict(self.point),
            "n_records": self._n_records,
            "shadow": [telemetry.to_json() for telemetry in self._shadow],
            "start": self._start.state_dict(),
            "end": self._end.state_dict(),
        }

    def check_state(self, saved: SavedTrial | None) -> None:
        """Raise `ValueError` for a trial that `load_state_dict` cannot load."""
        for copied in () if saved is None else (saved.start, saved.end):
            if copied is not None:
                self._start.check_state(copied)

    def load_state_dict(self, saved: SavedTrial | None) -> None:
        """Go on in the trial that was under way."""
        self._start.load_state_dict(None if saved is None else saved.start)
        self._end.load_state_dict(None if saved is None else saved.end)
        if saved is not None:
            self.snapshot, self.point, self._n_records = saved.snapshot, saved.point.to_json(), saved.n_records
            self._shadow = list(saved.shadow)


def _loss(telemetry: Telemetry) -> float:
    """Return an interval's loss; NaN where the weights are lost."""
    return math.nan if is_lost(telemetry) else telemetry.train_loss
