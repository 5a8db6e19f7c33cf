"""Hold what was found against what was planted, and against what the literature leads to expect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

from trainpilot.experiments.compare.comparison import UNTUNED, MethodNote
from trainpilot.experiments.measuring.baselines import CaseBaselines
from trainpilot.experiments.measuring.figures import CaseFigures, Estimate, MethodFigures, SanityCheck
from trainpilot.experiments.measuring.statistics import TIE

PLANTED_BUDGET = 1.25
INTERPOLATION = 0.01
"""Relative error of a multiplier that the curve's interpolation may add to its interval."""
PUBLISHED_QUARTER_RATE = 0.33
"""A quarter of the best peak costs 2.9 to 3.1 times the steps, for WSD on models of 25 to 400 M parameters."""
WIDE_MARGIN = 1.1
"""So many times the tokens at least must a tuned constant rate need; at equal peaks it needs 1.56 to 2.2 times."""
ABOUT_EQUAL = 0.95
PRESUMED_BUG = 1.05
"""A gain above this over the tuned static is presumed to be a bug in the baseline."""
DECAYS = ("tuned-linear", "tuned-cosine", "tuned-wsd")
SOME_DECAY = "decay, the best of three schedules, beats a constant rate"
LINEAR_DECAY = "linear to zero beats a constant rate"
WHY_NO_MARGIN = (
    "short runs are limited by how far the weights have moved, and linear to zero moves them half as far; "
    "decay pays where gradient noise is the limit"
)
AT_EQUAL_PEAKS = "long runs at equal peaks gave 1.56 to 2.2"
AS_GOOD = "linear to zero is about as good as cosine to 10 %, or better"

Worths = Mapping[str, Estimate]
"""Compute multipliers over all cases by method, in tokens against the tuned static; known ones only."""


def sanity_checks(
    cases: Sequence[CaseFigures],
    methods: Sequence[MethodFigures],
    notes: Mapping[str, MethodNote],
    baselines: Mapping[str, CaseBaselines],
) -> tuple[SanityCheck, ...]:
    """Return the checks, all in tokens and against the tuned static."""
    found = {figures.method: figures.multipliers["tuned"]["tokens"] for figures in methods}
    worths = {name: estimate for name, estimate in found.items() if estimate.value is not None}
    return (
        _itself(worths),
        _planted_budget(worths),
        _quarter_rate(worths),
        _more_helps(baselines),
        _ratio(SOME_DECAY, _ratios(cases, DECAYS, "tuned-constant"), WIDE_MARGIN, AT_EQUAL_PEAKS),
        _ratio(LINEAR_DECAY, _ratios(cases, DECAYS[:1], "tuned-constant"), WIDE_MARGIN, AT_EQUAL_PEAKS),
        _ratio(AS_GOOD, _ratios(cases, DECAYS[:1], "tuned-cosine"), ABOUT_EQUAL, "both tuned"),
        *(_in_between(name, worths) for name in ("schedule-free", "prodigy")),
        _no_wonder({name: worth for name, worth in worths.items() if notes[name].kind != "check"}),
    )


def _itself(worths: Worths) -> SanityCheck:
    worth = worths.get("check-self")
    return _check(
        "the tuned static against itself",
        "1.00",
        _told(worth),
        worth is not None and not worth.censored and abs(_value(worth) - 1) <= TIE,
    )


def _planted_budget(worths: Worths) -> SanityCheck:
    worth = worths.get("check-budget")
    return _check(
        "the tuned static with a quarter more tokens, not counted",
        f"{PLANTED_BUDGET}, within its interval (and 1 % for the interpolation)",
        _told(worth),
        worth is not None and _low(worth) * (1 - INTERPOLATION) <= PLANTED_BUDGET <= _high(worth) * (1 + INTERPOLATION),
    )


def _quarter_rate(worths: Worths) -> SanityCheck:
    worth = worths.get("check-rate")
    return _check(
        "the tuned static with a quarter of its learning rate",
        f"clearly below 1; published {PUBLISHED_QUARTER_RATE} on larger models. At 1 the tuned rate would be too high",
        _told(worth),
        worth is not None and _high(worth) < 1,
    )


def _more_helps(baselines: Mapping[str, CaseBaselines]) -> SanityCheck:
    curves = {case: found.tuned["tokens"].curve for case, found in baselines.items() if "tokens" in found.tuned}
    known = [case for case, curve in curves.items() if len(curve.points) + curve.n_pooled > 1]
    beaten = [case for case in known if curves[case].whole_beaten]
    return _check(
        "the tuned static gets better with more budget",
        "no smaller budget is as good as the whole one; if one is, a lucky setting was taken for the best",
        (f"not on {', '.join(beaten)}" if beaten else f"on all of {len(known)} cases") if known else None,
        not beaten,
    )


def _ratio(name: str, ratios: Sequence[float], least: float, published: str) -> SanityCheck:
    found = f"{median(ratios):.2f} in the median of {len(ratios)} cases" if ratios else None
    expected = f"a ratio of multipliers of at least {least} ({published})"
    passed = bool(ratios) and median(ratios) >= least
    if found and not passed and name != AS_GOOD:
        found = f"{found}. A likely reason: {WHY_NO_MARGIN}"
    return _check(name, expected, found, passed)


def _ratios(cases: Sequence[CaseFigures], methods: Sequence[str], other: str) -> list[float]:
    """Return, case by case, the best method's multiplier over another's; infinite where the other is worth nothing."""
    worths = {(found.case, found.method): found.multipliers["tuned"]["tokens"].value for found in cases}
    names = dict.fromkeys(found.case for found in cases)
    found = []
    for case in names:
        known = [worth for method in methods if (worth := worths.get((case, method))) is not None]
        against = worths.get((case, other))
        if known and against is not None:
            found.append(max(known) / against if against else float("inf"))
    return found


def _in_between(name: str, worths: Worths) -> SanityCheck:
    untuned, worth = worths.get(UNTUNED), worths.get(name)
    expected = f"at least the untuned default, and at most {PRESUMED_BUG} times the tuned static"
    if untuned is None or worth is None:
        return _check(f"{name} lies between the untuned default and the tuned static", expected, None, False)
    return _check(
        f"{name} lies between the untuned default and the tuned static",
        expected,
        f"{_told(worth)}, the untuned default {_told(untuned)}",
        _value(untuned) <= _value(worth) <= PRESUMED_BUG,
    )


def _no_wonder(worths: Worths) -> SanityCheck:
    wonders = [f"{name} {_told(worth)}" for name, worth in worths.items() if _value(worth) > PRESUMED_BUG]
    found = ", ".join(wonders) or f"none of {len(worths)}"
    return _check(
        "no method beats the tuned static by more than 5 %",
        "none; if one does, presume a bug in the baseline and look a second time",
        found if worths else None,
        not wonders,
    )


def _check(name: str, expected: str, found: str | None, passed: bool) -> SanityCheck:
    """Return a check; without anything found it was not made."""
    return SanityCheck(name=name, expected=expected, found=found or "not compared", passed=passed if found else None)


def _told(worth: Estimate | None) -> str | None:
    if worth is None:
        return None
    interval = "" if worth.low is None else f" [{worth.low:.2f}, {_high(worth):.2f}]"
    return f"{worth.censored}{_value(worth):.2f}{interval}"


def _value(worth: Estimate) -> float:
    assert worth.value is not None
    return worth.value


def _low(worth: Estimate) -> float:
    return _value(worth) if worth.low is None else worth.low


def _high(worth: Estimate) -> float:
    """Return the interval's upper end; a single number is its own interval, and one without upper end has none."""
    if worth.high is not None:
        return worth.high
    return float("inf") if worth.censored == ">" or worth.low is not None else _value(worth)
