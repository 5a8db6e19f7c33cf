"""The quality contract: bounds on what steering may cost a run in loss and time, against its base schedule.

The base schedule is not trained beside the run, so its losses are forecast. Either the user knows them from an earlier
run, or the first part of this run follows the base schedule, and a `PowerLaw` through its losses is extrapolated. A run
that breaks its contract is rolled back to a state that has proven itself, and left to the base schedule. Against an
earlier run, a contract also bounds how long the run may learn more slowly than that one (`withheld.py`). In the paired
mode parts of the run are trained a second time under the base schedule instead (`paired.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.steering.power_law import PowerLaw
from trainpilot.agents.steering.withheld import LATE, STEP, ReferenceFall
from trainpilot.llm_runtime.plain_values import is_number
from trainpilot.llm_runtime.telemetry import Telemetry

SMOOTHING = 3
"""Intervals that are averaged before they are compared."""
WINDOWS = (SMOOTHING, 6, 12, 24)
"""Numbers of newest intervals whose mean is held against the bound: what is small is seen in many. The longer ones
begin where judging begins."""
RUNNING = 2
"""Consecutive intervals that must lie outside before the contract is broken."""
BAND = 2.0
"""Standard errors by which the loss may exceed the agreed bound."""
PAIRED, LEAST_PAIRED = 12, 6
"""Newest differences to a reference from which their spread is estimated, and the least number of them."""
JUDGED_FROM = 0.2
"""Share of the budget before which nothing is judged."""
EVIDENCE_INTERVALS = 4
"""Fewer losses than these determine no power law."""
ALMOST = 0.99
"""Share of the base schedule's speed that counts as the same."""
PAIRED_RANGE = (0.05, 1.0)
"""Least and largest share of the intervals that may be trained a second time."""
MOST_LOSS = 1e6
"""Nats/token. A larger loss is none of a base schedule that a run could be held against."""
GIVE_UP = 0.5
"""A base schedule that still warms up at this share of the budget leaves nothing to extrapolate from."""


@dataclass(frozen=True, kw_only=True)
class QualityContract:
    """Bounds on what steering may cost. Off by default, as the evidence takes a tenth of the run from the policy.

    The forecast from a run's own beginning is an extrapolation over ten times its tokens, and does not include the
    gain when the base schedule's learning rate falls at the end, so it finds gross damage early and little else. With
    the losses of an earlier run it is an interpolation.
    """

    max_loss_increase: float = 0.01
    """In nats/token above the base schedule's training loss at the same tokens, and two standard errors.

    Judged from a fifth of the budget on: a policy may lose at first what it wins back.
    """
    max_slowdown: float = 0.05
    """Share of the seconds per token of the base schedule, probes and switching included."""
    evidence_share: float = 0.1
    """Share of the budget left to the base schedule, from the end of its warm-up, where no reference is given."""
    reference: Sequence[tuple[float, float]] | None = None
    """The base schedule's training losses: (share of the budget at the interval's end, nats/token).

    Between two of them lies a straight line above the true curve, so give every interval; `against` does.
    """
    reference_s_per_token: float | None = None
    """Seconds per token of the base schedule on this machine; without it, a `reference` says nothing of time."""

    paired: float | None = None
    """Share of the intervals that may be trained a second time, under the base schedule from the same state and on the
    same data, in [0.05, 1]: the policy's controls are tried against that, and no reference is needed (`paired.py`). It
    needs `data` in `Steering`. `None` pairs nothing."""

    from_start: bool = False
    """Take a run that breaks its contract back to its beginning, so that nothing done to it stays.

    That costs what was trained on up to there, and a rollback for another reason then costs as much. It needs `data` in
    `Steering`: the budget begins anew with the data, and initial weights in the last part of a budget would be worse
    than any policy.
    Otherwise it goes back to a state whose loss had lain within for ten decisions. Too large a learning rate can do
    lasting damage that shows only later.
    """

    @classmethod
    def against(cls, records: Sequence[DecisionRecord], **terms: Any) -> QualityContract:
        """Return a contract against an earlier run on this machine, of which the records are at hand.

        Args:
            records: `steering.records` of a run with `policy="none"` and the same base schedule, none of it taken back.
            terms: Further fields.

        Raises:
            ValueError: there are fewer than two records, or they are of a run that was taken back.
        """
        intervals = [record.telemetry for record in records]
        reference = tuple((each.budget_used, each.train_loss) for each in intervals)
        tokens = sum(each.interval_tokens for each in intervals)
        pace = sum(each.time_s for each in intervals) / tokens if tokens else 0.0
        known = pace if pace > 0 else None  # a clock that stands still says nothing
        return cls(**{"reference": reference, "reference_s_per_token": known, **terms})

    def __post_init__(self) -> None:
        for name in ("max_loss_increase", "max_slowdown"):
            value = getattr(self, name)
            if not (is_number(value) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a number >= 0, got {value!r}")
        if not (is_number(self.evidence_share) and 0 < self.evidence_share < GIVE_UP):
            raise ValueError(f"evidence_share must be in (0, {GIVE_UP}), got {self.evidence_share!r}")
        if self.reference is not None:
            _check_reference(self.reference)
        self._check_paired()
        pace = self.reference_s_per_token
        if pace is not None and not (is_number(pace) and math.isfinite(pace) and pace > 0):
            raise ValueError(f"reference_s_per_token must be a number of seconds above 0 or None, got {pace!r}")

    def _check_paired(self) -> None:
        """Raise `ValueError` for a share of pairs that makes no sense, or beside what it replaces."""
        least, most = PAIRED_RANGE
        if self.paired is None:
            return
        if not (is_number(self.paired) and least <= self.paired <= most):
            raise ValueError(
                f"paired must be a share of the intervals in [{least}, {most}] or None, got {self.paired!r}"
            )
        for name in ("reference", "from_start"):
            if value := getattr(self, name):
                raise ValueError(
                    f"paired must be None beside {name}, got {self.paired!r}: trials take the place of "
                    f"{'a reference' if value is not True else 'the way back to the start'}; leave one of the two out"
                )


class ContractWatch:
    """Records the intervals of a run, and detects when the run breaks its contract."""

    def __init__(self, contract: QualityContract) -> None:
        self.contract = contract
        self.broken: tuple[str, int] | None = None
        """Why the contract was broken, and after which decision."""
        self._rows: list[dict[str, float]] = []
        self._outside = 0
        self._steers = False
        """Whether any control has differed from the base schedule's."""
        self._fitted: tuple[tuple[int, int], PowerLaw] | None = None
        self._fall = ReferenceFall.of(contract.reference) if contract.reference is not None else None

    @property
    def observing(self) -> bool:
        """Whether the run still follows the base schedule, to gather evidence."""
        if self.contract.reference is not None:
            return False
        return self._evidence() is None and not (self._rows and self._rows[-1]["share"] >= GIVE_UP)

    def _evidence(self) -> tuple[int, int] | None:
        """Return which intervals are evidence, once there are enough: from the end of the warm-up, its share long."""
        begin = next((i for i in range(1, len(self._rows)) if self._settled(i)), None)
        if begin is None:
            return None
        until = self._rows[begin - 1]["share"] + self.contract.evidence_share
        for end in range(begin + EVIDENCE_INTERVALS, len(self._rows) + 1):
            if self._rows[end - 1]["share"] >= until - 1e-9:
                return begin, end
        return None

    def _settled(self, index: int) -> bool:
        return not self._rows[index]["learning_rate"] > 1.01 * self._rows[index - 1]["learning_rate"]

    def observe(self, telemetry: Telemetry, *, steers: bool = True, speed: float = 1.0) -> str | None:
        """Record an interval; return why the contract is broken, in the interval that broke it.

        Args:
            telemetry: The interval.
            steers: Whether its controls differ from the base schedule's. Until they do, the run is that of its base
                schedule, and its loss is what the data have made it.
            speed: How fast its controls learn per token, over those of the base schedule.
        """
        if not math.isfinite(telemetry.train_loss) or not telemetry.interval_tokens:
            return None
        self._steers |= steers
        self._rows.append(_row(telemetry, speed))
        reason = None if self.broken else self._breach()
        self._outside = self._outside + 1 if reason else 0
        if reason is None or self._outside < RUNNING:
            return None
        self.broken = reason, telemetry.decision
        return reason

    @property
    def endangered(self) -> bool:
        """Whether the loss lies above the agreed bound, though it may be by chance."""
        return self._loss_outside(band=0.0, windows=WINDOWS[:1]) is not None

    def _loss_outside(self, band: float = BAND, windows: Sequence[int] = WINDOWS) -> float | None:
        """Return the increase of the loss over the first window in which it is outside; `None` where it is in none."""
        for window in windows:
            found = self.loss_increase(window)
            if found is not None and found[0] > self.contract.max_loss_increase + band * found[1]:
                return found[0]
        return None

    @property
    def harmed(self) -> bool:
        """Whether the loss broke the contract: a rollback mends that, but not lost time."""
        return self.broken is not None and self._loss_outside() is not None

    def _breach(self) -> str | None:
        terms, increase = self.contract, self._loss_outside()
        if self._rows[-1]["share"] < JUDGED_FROM - 1e-9:
            return None
        if increase is not None and self._steers:
            return f"training loss {increase:.3f} nats above the base schedule's, agreed {terms.max_loss_increase:g}"
        slowdown = self.slowdown()
        if slowdown is not None and slowdown > terms.max_slowdown:
            return f"{slowdown:.0%} more seconds per token than the base schedule, agreed {terms.max_slowdown:.0%}"
        return None

    def loss_increase(self, window: int = SMOOTHING) -> tuple[float, float] | None:
        """Return the mean loss less the base schedule's, and its standard error; `None` where that is unknown.

        Args:
            window: Number of newest intervals; fewer than these are taken up to `SMOOTHING` only.
        """
        rows = self._steered()[-window:]
        if window > SMOOTHING and (len(rows) < window or rows[0]["share"] < JUDGED_FROM - 1e-9):
            return None
        forecasts = [self._forecast(row["share"], row["tokens"]) for row in rows]
        if not rows or None in forecasts:
            return None
        known = [each for each in forecasts if each is not None]
        increase = sum(row["loss"] - mean for row, (mean, _) in zip(rows, known, strict=True)) / len(rows)
        excess = law.excess if (law := self._law()) is not None else 1.0
        noise = excess * sum(row["error"] ** 2 for row in rows) / len(rows) ** 2
        if (paired := self._paired_variance()) is not None:
            noise = min(noise, paired / len(rows))
        return increase, math.sqrt(noise + max(error for _, error in known) ** 2)

    def _paired_variance(self) -> float | None:
        """Return the variance of the difference to the reference in an interval, `None` where it is not yet known.

        Both runs have the same data as a rule, and their losses swing together: the difference tells much more than
        the spread of the losses.
        """
        if self.contract.reference is None:
            return None
        rows = self._rows[-PAIRED - 1 :]
        found = [row["loss"] - each[0] for row in rows if (each := self._forecast(row["share"], 0.0)) is not None]
        squares = [(after - before) ** 2 / 2 for before, after in pairwise(found) if after != before]
        return sum(squares) / len(squares) if len(squares) >= LEAST_PAIRED else None

    def _steered(self) -> list[dict[str, float]]:
        if self.contract.reference is not None:
            return self._rows
        evidence = self._evidence()
        return [] if evidence is None else self._rows[evidence[1] :]

    def _forecast(self, share: float, tokens: float) -> tuple[float, float] | None:
        """Return a forecast of the base schedule's loss and its standard error; `None` where there is no evidence."""
        if (reference := self.contract.reference) is not None:
            shares, losses = zip(*reference, strict=True)
            within = shares[0] - 1e-9 <= share <= shares[-1] + 1e-9
            return (float(np.interp(share, shares, losses)), 0.0) if within else None
        law = self._law()
        return None if law is None else law.at(tokens)

    def _law(self) -> PowerLaw | None:
        evidence = self._evidence() if self.contract.reference is None else None
        if evidence is None:
            return None
        if self._fitted is None or self._fitted[0] != evidence:
            columns = [[row[name] for row in self._rows[slice(*evidence)]] for name in ("tokens", "loss", "error")]
            self._fitted = evidence, PowerLaw.fit(*(np.array(column) for column in columns))
        return self._fitted[1]

    def slowdown(self) -> float | None:
        """Return how much longer a token takes than under the base schedule, as a share; `None` where unknown."""
        base, steered = self._base_s_per_token(), self._steered()[-SMOOTHING:]
        pace = median(row["s_per_token"] for row in steered) if len(steered) >= SMOOTHING else 0.0
        return pace / base - 1 if base and pace else None  # 0 comes from a clock that stands still

    def _base_s_per_token(self) -> float | None:
        if self.contract.reference_s_per_token is not None:
            return self.contract.reference_s_per_token
        evidence = None if self.contract.reference is not None else self._evidence()
        return None if evidence is None else median(row["s_per_token"] for row in self._rows[slice(*evidence)])

    def refuses_finish(self) -> str | None:
        """Return why the run may not end early; `None` where its loss already is what the base schedule ends with."""
        rows = self._steered()[-SMOOTHING:]
        end = self._forecast(1.0, rows[-1]["end_tokens"] / rows[-1]["share"]) if rows else None
        if end is None:
            return "the base schedule's final loss is not known"
        smoothed = sum(row["loss"] for row in rows) / len(rows)
        chance = 0.0 if self._fall is None else BAND * self._fall.swing * math.sqrt(1 + 1 / len(rows))
        if smoothed + chance > end[0] + self.contract.max_loss_increase:
            return f"training loss {smoothed:.3f}, and the base schedule's is expected to end at {end[0]:.3f}"
        return None

    def least_speed(self, speed: float, present: float, started: float) -> float:
        """Return the speed at which the next interval is to learn if another one is chosen: that, or a higher one.

        Speeds are those of `relative_speed`. Without a reference every speed is allowed.

        Args:
            speed: The speed chosen.
            present: The speed in force.
            started: The speed that the policy began at.
        """
        if self._fall is None or speed > ALMOST or not self._rows:
            return speed
        used, before = self._rows[-1]["share"], self._rows[-2]["share"] if len(self._rows) > 1 else 0.0
        searches, lowest = used < JUDGED_FROM - 1e-9, started**2  # from below if it begins there, as in `course.py`
        if searches and speed > ALMOST * lowest:
            return speed
        ahead = self._fall.rate * (1 - speed) * (used - before)
        if self.withheld() + ahead <= self.contract.max_loss_increase + 1e-9 or self._is_paid(speed):
            return speed
        return min(max(lowest if searches else present * STEP, speed), 1.0)

    def withheld(self) -> float:
        """Return what the run may have given up by learning more slowly than the reference, in nats/token."""
        rate = self._fall.rate if self._fall is not None else 0.0
        shares = [0.0, *(row["share"] for row in self._rows)]
        return rate * sum(
            max(1 - row["speed"], 0.0) * (after - before)
            for row, (before, after) in zip(self._rows, pairwise(shares), strict=True)
        )

    def _is_paid(self, speed: float) -> bool:
        """Return whether the loss is lower than the reference's by more than what a low rate hides.

        That is at most the same share of what the reference still gains in the later half of its budget: a cool-down
        takes the noise of its rate away, and what a slower run has less of it was gained before.
        """
        rows, found = self._rows[-SMOOTHING:], self.loss_increase()
        if self._fall is None or found is None or len(rows) < SMOOTHING:
            return False
        mean = sum(row["loss"] for row in rows) / len(rows) - found[0]
        slow = min(speed, sum(row["speed"] for row in rows) / len(rows))
        return found[0] + found[1] + (1 - slow) * self._fall.left(rows[-1]["share"], mean) < 0

    def most_speed(self, present: float) -> float:
        """Return the highest speed allowed in the next interval, by the present one."""
        late = self._fall is not None and bool(self._rows) and self._rows[-1]["share"] > LATE - 1e-9
        return max(1.0, present) if late else math.inf

    def summary(self) -> dict[str, Any]:
        """Return whether the contract was kept. `held` is `None` where the evidence does not decide it.

        `detects_from` is the smallest increase of the loss, in nats/token, that would be seen where the run stands.
        """
        found, slowdown = self.loss_increase(), self.slowdown()
        known = [increase[1] for window in WINDOWS if (increase := self.loss_increase(window)) is not None]
        return {
            "held": self._held(found, slowdown),
            "evidence": self._evidence_text(found) + ("; seconds were not compared" if slowdown is None else ""),
            "loss_increase": found[0] if found else None,
            "standard_error": found[1] if found else None,
            "detects_from": self.contract.max_loss_increase + BAND * min(known) if known else None,
            "slowdown": slowdown,
            "broken_at_decision": self.broken[1] if self.broken else None,
            "broken_because": self.broken[0] if self.broken else None,
        }

    def _held(self, found: tuple[float, float] | None, slowdown: float | None) -> bool | None:
        if self.broken is not None:
            return False
        if found is None or found[0] + BAND * found[1] > self.contract.max_loss_increase:
            return None
        return True if slowdown is None or slowdown <= self.contract.max_slowdown else None

    def _evidence_text(self, found: tuple[float, float] | None) -> str:
        if found is None:
            return "none: the base schedule's loss is not known where the run stands"
        if self.contract.reference is not None:
            return "interpolated between the base schedule's losses from an earlier run"
        begin, end = self._evidence() or (0, 0)
        return f"power law carried on from {end - begin} intervals under the base schedule, without its final decay"

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain JSON values."""
        broken = list(self.broken) if self.broken else None
        return {"past": self.past_state(), "broken": broken, "steers": self._steers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.load_past_state(state["past"])
        self._steers = state.get("steers", True)  # versions before did not write it
        self.broken = (str(state["broken"][0]), int(state["broken"][1])) if state["broken"] else None

    def past_state(self) -> dict[str, Any]:
        """Return the part that a rollback restores: the intervals. That the contract is broken stays."""
        return {"rows": [dict(row) for row in self._rows], "outside": self._outside}

    def load_past_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `past_state` returned."""
        self._rows, self._outside, self._fitted = [dict(row) for row in state["rows"]], state["outside"], None


def _row(telemetry: Telemetry, speed: float) -> dict[str, float]:
    spread = telemetry.train_loss_std if math.isfinite(telemetry.train_loss_std) else 0.0
    return {
        "share": telemetry.budget_used,
        "tokens": telemetry.tokens - telemetry.interval_tokens / 2,  # where the interval's mean loss belongs
        "end_tokens": float(telemetry.tokens),
        "loss": telemetry.train_loss,
        "error": max(spread / math.sqrt(max(telemetry.steps, 1)), 1e-4),
        "s_per_token": telemetry.time_s / telemetry.interval_tokens,
        "learning_rate": telemetry.learning_rate,
        "speed": speed,
    }


def _check_reference(reference: Any) -> None:
    if not _is_reference(reference):
        plain = isinstance(reference, str) or not isinstance(reference, Sequence)
        shown = repr(reference if plain else list(reference))
        raise ValueError(
            "reference must be at least two (share of the budget, loss) in rising order of shares from 0 on, with "
            f"losses above 0 and at most {MOST_LOSS:g} nats/token, got {shown[:200]}; "
            "QualityContract.against(steering.records) makes it"
        )


def _is_reference(reference: Any) -> bool:
    if isinstance(reference, str) or not isinstance(reference, Sequence) or len(reference) < 2:
        return False
    if not all(isinstance(pair, Sequence) and len(pair) == 2 and all(map(is_number, pair)) for pair in reference):
        return False
    rising = all(one[0] < other[0] for one, other in pairwise(reference))
    within = reference[0][0] >= 0 and reference[-1][0] <= 1 + 1e-6
    return rising and within and all(0 < loss <= MOST_LOSS for _, loss in reference)
