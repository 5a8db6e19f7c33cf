"""Format figures as text, each kind in one way. An unknown figure becomes an en dash with the reason as its title."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trainpilot.experiments.analysis.figures import Estimate, SignTest

DASH, SPACE = "\N{EN DASH}", "\N{NO-BREAK SPACE}"
"""A figure and its unit stay on one line."""
Tone = Literal["", "better", "worse", "bad"]

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))
SIGNIFICANT = 3
_OTHER_WAY: dict[Tone, Tone] = {"better": "worse", "worse": "better", "": "", "bad": "bad"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One cell of a table."""

    text: str
    interval: str = ""
    """Behind the text, fainter: `[0.98, 1.07]`."""
    title: str = ""
    """Tooltip text."""
    tone: Tone = ""
    """Coloured where a figure clearly lies on one side of what it is compared with."""

    def __str__(self) -> str:
        return f"{self.text} {self.interval}".strip()


def dash(why: str) -> Cell:
    """Return what stands for an unknown figure."""
    return Cell(text=DASH, title=why)


def multiplier(estimate: Estimate | None, why_not: str = "there is no baseline for it", of: str = "cases") -> Cell:
    """Return a compute multiplier as `1.03 [0.98, 1.07]`, with `<` or `>` where only a bound is known."""
    if estimate is None or estimate.value is None:
        return dash(why_not)
    if estimate.value <= 0:
        return Cell(text="0", title="half of its runs or more diverged or failed", tone="worse")
    return Cell(
        text=f"{_sign(estimate)}{ratio(estimate.value)}",
        interval=interval(estimate, ratio),
        title=_spoken(estimate, of),
        tone=_side(estimate),
    )


def score(estimate: Estimate) -> Cell:
    """Return a product score, of which less is better."""
    if estimate.value is None:
        return dash("its runs failed, or its time or the untuned default's is unknown")
    return Cell(text=ratio(estimate.value), interval=interval(estimate, ratio), tone=_OTHER_WAY[_side(estimate)])


def quantity(estimate: Estimate | None, unit: str, why_not: str) -> Cell:
    """Return a time, an energy or a number of tokens with its unit; the tooltip holds the interval."""
    if estimate is None or estimate.value is None:
        return dash(why_not)
    form = duration if unit == "s" else lambda value: si(value, unit)
    return Cell(text=f"{_sign(estimate)}{form(estimate.value)}", title=interval(estimate, form))


def loss(estimate: Estimate | None, why_not: str = "no run ended with a finite loss") -> Cell:
    """Return a loss in nats/token."""
    if estimate is None or estimate.value is None:
        return dash(why_not)
    ends = interval(estimate, nats) if _spread(estimate) else ""
    return Cell(text=f"{_sign(estimate)}{nats(estimate.value)}", interval=ends, title=_spoken(estimate, "seeds"))


def sign_test(test: SignTest | None) -> Cell:
    """Return a sign test as `6 of 8, p = 0.29`."""
    if test is None or not (n := test.wins + test.losses + test.ties):
        return dash("nothing to compare on any case")
    title = f"better on {test.wins}, worse on {test.losses}, the same on {test.ties}"
    return Cell(text=f"{test.wins} of {n}", interval=probability(test.p_value), title=title)


def share(part: int, whole: int) -> Cell:
    """Return how many of how many, as in `2 of 24`; toned where it is not none."""
    if not whole:
        return dash("there was no run")
    return Cell(text=f"{part} of {whole}", tone="bad" if part else "")


def probability(p: float) -> str:
    """Return a p-value as `p = 0.29`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.01 else f"p = {p:.2f}"


def ratio(value: float) -> str:
    """Return a ratio near 1 with two decimals, a large or small one with as many digits as it carries."""
    if value >= 100:
        return f"{value:,.0f}"
    if value >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def nats(value: float) -> str:
    """Return a loss with four decimals; a change of 0.001 is a tenth of a percent of perplexity."""
    return f"{value:.4f}"


def si(value: float, unit: str = "") -> str:
    """Return a quantity with three digits and a metric prefix: `164 k`, `2.30 kJ`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}{SPACE}{unit}".strip()
    value = float(f"{value:.{SIGNIFICANT - 1}e}")
    limit, prefix = next((p for p in PREFIXES if abs(value) >= p[0]), PREFIXES[-1])
    decimals = max(0, SIGNIFICANT - 1 - math.floor(math.log10(abs(value / limit))))
    return f"{value / limit:.{decimals}f}{SPACE}{prefix}{unit}".strip()


def duration(seconds: float) -> str:
    """Return seconds as they are read: `12.3 s`, `3.5 min`, `2.4 h`."""
    if seconds < 100:
        return si(seconds, "s")
    if seconds < 7200:
        return f"{seconds / 60:.1f}{SPACE}min"
    return f"{seconds / 3600:.1f}{SPACE}h"


def rate(value: float) -> str:
    """Return a learning rate as `3e-4` or `1.1e-3`."""
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def percent(value: float, decimals: int = 0) -> str:
    """Return a share as `12 %`."""
    return f"{100 * value:.{decimals}f}{SPACE}%"


def count(n: int, noun: str, plural: str | None = None) -> str:
    """Return `1 case`, `3 cases`."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def listed(items: list[str]) -> str:
    """Return `a`, `a and b`, `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""


def _sign(estimate: Estimate) -> str:
    return f"{estimate.censored}{SPACE}" if estimate.censored else ""


def interval(estimate: Estimate, form: Callable[[float], str]) -> str:
    """Return the interval as `[0.98, 1.07]`; one without upper end as `[0.98, ∞)`."""
    if estimate.low is None:
        return ""
    end = f"{form(estimate.high)}]" if estimate.high is not None else "\N{INFINITY})"
    return f"[{form(estimate.low)}, {end}"


def _spread(estimate: Estimate) -> bool:
    """Return whether there is an interval to speak of: a budget in tokens is the same for every seed."""
    return estimate.low is not None and estimate.low != estimate.high


def _spoken(estimate: Estimate, of: str) -> str:
    bound = {"<": "an upper bound: ", ">": "a lower bound: ", "": ""}[estimate.censored]
    return f"{bound}median of {estimate.n} {of}, 95 % interval"


def _side(estimate: Estimate) -> Tone:
    """Return on which side of 1 the whole interval lies, as far as two decimals show it."""
    if estimate.low is not None and round(estimate.low, 2) > 1:
        return "better"
    return "worse" if estimate.high is not None and round(estimate.high, 2) < 1 else ""
