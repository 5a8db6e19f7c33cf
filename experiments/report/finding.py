"""Say in plain words what a comparison found: no more than its figures carry."""

from __future__ import annotations

from dataclasses import dataclass

from trainpilot.experiments.compare.comparison import TUNED, UNTUNED
from trainpilot.experiments.measuring.figures import Estimate, SignTest
from trainpilot.experiments.report.material import Material
from trainpilot.experiments.report.numbers import count, listed, percent, ratio

LEVEL = 0.05
TOO_GOOD = 1.05
"""A gain over a tuned static schedule beyond this is presumed to be a fault in the baseline."""
SAME = 0.005
NAMES = {"untuned": "the untuned default", "tuned": "a tuned static schedule"}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The top of the report."""

    subject: str | None
    """The method that the headline is about."""
    title: str
    """One sentence."""
    lead: tuple[str, ...]
    """Paragraphs behind it: how many cases and seeds, which baselines, the figures."""
    cautions: tuple[str, ...]
    """What keeps a reader from believing too much."""


def finding(material: Material) -> Finding:
    """Return what was found about the first policy, or else about what came out best."""
    tuned = TUNED if TUNED in material.notes else None
    subject = next(iter(material.of_kind("policy")), next(iter(material.ranked), tuned))
    return Finding(
        subject=subject,
        title=_title(material, subject),
        lead=tuple(part for part in (_compared(material), _subject_line(material, subject)) if part),
        cautions=tuple(_cautions(material, subject)),
    )


def _title(material: Material, subject: str | None) -> str:
    others = [b for b in NAMES if subject and (b, subject) not in (("tuned", TUNED), ("untuned", UNTUNED))]
    known = [b for b in others if subject and material.multiplier(subject, b).value is not None]
    if subject is None or not known:
        n_methods = count(len(material.notes), "method")
        return f"{n_methods} on {count(len(material.case_names), 'case')}: no compute multiplier could be worked out"
    title = material.title(subject)
    parts = [claim(title, material.multiplier(subject, b), _test(material, subject, b), NAMES[b]) for b in known[::-1]]
    return "; ".join([parts[0], *(f"it{part.removeprefix(title)}" for part in parts[1:])])


def claim(name: str, worth: Estimate, test: SignTest | None, baseline: str) -> str:
    """Return how a method stands to a baseline, in one clause.

    Clear is what both the interval and the sign test support; what only one of them does `seems` so.
    """
    value = worth.value
    if value is None:
        return f"{name} could not be compared with {baseline}"
    if value <= 0:
        return f"{name} diverged or failed in half of its runs or more"
    apart = (worth.low is not None and worth.low > 1) or (worth.high is not None and worth.high < 1)
    surely = test is not None and test.p_value <= LEVEL
    if not (apart or surely) or abs(value - 1) < SAME:
        return f"{name} is neither clearly better nor clearly worse than {baseline}"
    verb = "needs" if apart and surely else "seems to need"
    bound = "more than " if worth.censored == (">" if value > 1 else "<") else ""
    return f"{name} {verb} {bound}{_tokens(value)} {baseline}"


def _tokens(worth: float) -> str:
    """Return how many tokens a method with this multiplier needs, compared with the baseline's."""
    if worth > 1:
        return f"{percent(1 - 1 / worth)} fewer tokens than"
    return f"{percent(1 / worth - 1)} more tokens than" if worth > 1 / 2 else f"{ratio(1 / worth)} times the tokens of"


def _compared(material: Material) -> str:
    """Return how much was compared, and how to read a multiplier."""
    cases = [case for case in material.case_names if material.judged_on(case)]
    waiting = len(material.case_names) - len(cases)
    n_methods = sum(material.was_run(name) for name in material.notes)
    n_runs = len({row.key for row in material.comparison.rows if row.key in material.results})
    seeds = f"{count(len(material.comparison.seeds), 'paired seed')}{' each' if len(cases) > 1 else ''}"
    unfinished = f" The comparison is not finished: {count(waiting, 'case')} have no runs yet." if waiting else ""
    return (
        f"{count(n_methods, 'method')} on {count(len(cases), 'case')} with {seeds}, {count(n_runs, 'run')} in all."
        f"{unfinished} A compute multiplier of 1.10 means that the baseline needs 1.10 times the method's budget to "
        "reach the method's final validation loss. Medians with bootstrap 95 % intervals over "
        f"{'cases' if len(cases) > 1 else 'seeds'}."
    )


def _subject_line(material: Material, subject: str | None) -> str:
    """Return which method the headline is about, against which baselines, and on what grounds it was chosen."""
    if subject is None:
        return ""
    policies, title = material.of_kind("policy"), material.title
    why = "which came out best; no policy was compared"
    if policies:
        others = listed([title(name) for name in policies[1:]])
        why = f"the first policy that was named ({others}: see the table)" if others else "the policy"
    return (
        f"The headline is about {title(subject)}, {why}. The tuned static baseline is the best setting of a search"
        f"{_searched(material)}; the untuned default is {title(UNTUNED)} at the case's own settings."
    )


def _searched(material: Material) -> str:
    trials = [found.n_trials for b in material.comparison.baselines.values() for found in b if found.method == TUNED]
    if not trials:
        return ""
    runs = f"{min(trials)}" if min(trials) == max(trials) else f"{min(trials)} to {max(trials)}"
    return f" over {runs} runs on each case"


def _cautions(material: Material, subject: str | None) -> list[str]:
    figures, found = material.figures, []
    if len(material.case_names) == 1:
        found.append("One case says nothing about other models: the intervals hold the spread over seeds alone.")
    worth = material.multiplier(subject).value if subject else None
    if worth is not None and worth > TOO_GOOD:
        found.append(
            "A gain above 5 % over a tuned static schedule is presumed to be a fault in the baseline "
            "until a second look confirms it."
        )
    if failed := [check.name for check in figures.checks if check.passed is False]:
        found.append(f"Sanity checks that failed: {'; '.join(failed)}.")
    return [*found, *([figures.rests_on] if figures.rests_on else []), *figures.notes]


def _test(material: Material, method: str, baseline: str) -> SignTest | None:
    found = material.by_method.get(method)
    return found.sign_tests.get(baseline, {}).get("tokens") if found else None
