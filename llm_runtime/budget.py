"""Define the budget of a run in tokens, seconds or joules, and measure how much of it has been used.

`Budget.parse` reads what people write: `1M`, `600s`, `50kJ`. `Gauge` counts the seconds or joules of a run while it
runs. Loads neither numpy nor torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Self, get_args

from trainpilot.llm_runtime.energy.meter import EnergyMeter

Currency = Literal["tokens", "time_s", "energy_j"]
"""What a budget is counted in."""
CURRENCIES: tuple[Currency, ...] = get_args(Currency)

_THOUSANDS = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9}
_UNITS: dict[str, tuple[Currency, float]] = {
    **{name + word: ("tokens", factor) for name, factor in _THOUSANDS.items() for word in ("", "tokens")},
    "s": ("time_s", 1.0), "min": ("time_s", 60.0), "h": ("time_s", 3600.0),
    "J": ("energy_j", 1.0), "kJ": ("energy_j", 1e3), "MJ": ("energy_j", 1e6), "kWh": ("energy_j", 3.6e6),
}  # fmt: skip
_TEXT = re.compile(r"([0-9]+(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)([A-Za-z]*)")
_SHOWN: dict[Currency, str] = {"tokens": " tokens", "time_s": "s", "energy_j": "J"}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much a run may use."""

    amount: float
    """Tokens, seconds or joules, above 0; whole tokens."""
    currency: Currency
    """Which of the three."""

    def __post_init__(self) -> None:
        if self.currency not in CURRENCIES:
            raise ValueError(f"currency must be one of {', '.join(CURRENCIES)}, got {self.currency!r}")
        if not (math.isfinite(self.amount) and self.amount > 0):
            raise ValueError(f"budget must be above 0, got {self}")
        if self.currency == "tokens" and self.amount != round(self.amount):
            raise ValueError(f"budget must be a whole number of tokens, got {self}")

    def __mul__(self, share: float) -> Budget:
        """Return a share of the budget."""
        return Budget(amount=self.amount * share, currency=self.currency)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the budget that a text such as `600s`, `10min`, `2h`, `50kJ`, `1.5MJ`, `1M` or `2.5e6tokens` names.

        A number alone, or one with k, M or B, is in tokens.

        Raises:
            ValueError: the text names no budget above 0.
        """
        found = _TEXT.fullmatch("".join(text.split()))
        if found is None or found.group(2) not in _UNITS:
            raise ValueError(
                "budget must be tokens such as 1M, seconds such as 600s, 10min or 2h, or joules such as 50kJ, "
                f"got {text!r}"
            )
        currency, factor = _UNITS[found.group(2)]
        amount = float(found.group(1)) * factor
        if currency == "tokens" and math.isfinite(amount):
            amount = float(round(amount, 3))  # 1.1k is 1100 tokens, and not a rounding error more
        return cls(amount=amount, currency=currency)

    @classmethod
    def parse_measured(cls, text: str, otherwise: str) -> Self:
        """Return the budget in seconds or joules that a text names.

        Args:
            text: As for `parse`.
            otherwise: What to give for a budget in tokens; `{:.0f}` in it becomes their number.

        Raises:
            ValueError: the text names no budget above 0, or one in tokens.
        """
        budget = cls.parse(text)
        if budget.currency == "tokens":
            way_out = otherwise.format(budget.amount)
            raise ValueError(f"budget must be in seconds or joules, got {text!r}; give {way_out}")
        return budget

    def __str__(self) -> str:
        whole = math.isfinite(self.amount) and self.amount == round(self.amount)
        return f"{self.amount:.0f}{_SHOWN[self.currency]}" if whole else f"{self.amount!r}{_SHOWN[self.currency]}"


Total = Callable[[float, float | None], tuple[float, float | None]]
"""Turns the seconds and joules of this process into those of all processes: the longest time, the sum of joules."""


class Gauge:
    """Counts the seconds or joules of a run: everything between `resume` and `suspend`, in all of its processes.

    Where the meter fails in the middle of a run, joules are extrapolated at the last known power: a meter may not stop
    a run.

    Args:
        currency: `time_s` or `energy_j`.
        clock: Returns seconds.
        meter: Energy meter; read for joules only.
        total: Adds up the processes.
        wait: Waits until the device has done what it was asked.

    Raises:
        ValueError: joules are to be counted, and the meter counts none.
    """

    def __init__(
        self,
        currency: Currency,
        clock: Callable[[], float],
        meter: EnergyMeter,
        *,
        total: Total = lambda time_s, energy_j: (time_s, energy_j),
        wait: Callable[[], None] = lambda: None,
    ) -> None:
        self._clock, self._total, self._wait = clock, total, wait
        self._meter = meter if currency == "energy_j" else None
        if self._meter is not None and self._meter.read().energy_j is None:
            raise ValueError(
                f"budget in joules needs a meter that counts them, got none ({meter.description}); "
                "give a budget in seconds or tokens"
            )
        self._counted = (0.0, 0.0)
        """Seconds and joules of this process up to the last `suspend`."""
        self._since: tuple[float, float] | None = None
        """Readings of clock and meter at the last `resume`."""
        self._newest: tuple[float, float, float] | None = None
        """Seconds, joules and watts when the meter last told."""

    def resume(self) -> None:
        """Begin to count, or go on; does nothing while it counts."""
        if self._since is None:
            self._since = self._read()

    def suspend(self) -> None:
        """Stop counting until `resume`."""
        if self._since is not None:
            self._wait()
            self._counted, self._since = self._here(), None

    def read(self) -> float:
        """Return the seconds or joules so far, of all processes, which must all ask at once. Waits for the device."""
        self._wait()
        time_s, energy_j = self._here()
        time_s, total_j = self._total(time_s, None if self._meter is None else energy_j)
        return time_s if self._meter is None else (total_j or 0.0)

    def _here(self) -> tuple[float, float]:
        time_s, energy_j = self._counted
        if self._since is None:
            return time_s, energy_j
        now, since = self._read(), self._since
        return time_s + now[0] - since[0], energy_j + now[1] - since[1]

    def _read(self) -> tuple[float, float]:
        now_s = self._clock()
        if self._meter is None:
            return now_s, 0.0
        energy_j, before = self._meter.read().energy_j, self._newest
        if energy_j is None:
            assert before is not None, "it counted when the gauge was made"
            return now_s, before[1] + before[2] * (now_s - before[0])
        power_w = (energy_j - before[1]) / (now_s - before[0]) if before and now_s > before[0] else 0.0
        self._newest = (now_s, energy_j, power_w)
        return now_s, energy_j
