"""Everything that the report is made of, with the look-ups that its parts share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from trainpilot.experiments.analysis.figures import CaseFigures, Estimate, Figures, MethodFigures
from trainpilot.experiments.costs.table import CostTable
from trainpilot.experiments.results import TUNED, UNTUNED, Comparison, MethodNote, Role, Row, RunResult

KINDS = {
    "policy": "Policies",
    "tuned": "Tuned static",
    "untuned": "Untuned",
    "heuristic": "Heuristics",
    "tuning-free": "Tuning-free",
    "compressed": "Smaller models",
    "check": "Planted checks",
}
"""Groups of the tables, in their order."""
NOTHING = Estimate(value=None)


@dataclass(frozen=True)
class ReportData:
    """A comparison with its runs and figures."""

    comparison: Comparison
    results: Mapping[str, RunResult]
    """By key."""
    tables: Mapping[str, CostTable]
    """By `cost_key`."""
    figures: Figures

    @cached_property
    def notes(self) -> dict[str, MethodNote]:
        """Methods with figures by name, in the comparison's order."""
        known = {note.name: note for note in self.comparison.methods}
        names = [found.method for found in self.figures.methods] + [found.method for found in self.figures.cases]
        judged = dict.fromkeys(names)
        rest = {name: _plain_note(name) for name in judged if name not in known}
        return {name: note for name, note in (known | rest).items() if name in judged}

    @cached_property
    def case_names(self) -> list[str]:
        """Names of the cases, in the comparison's order."""
        return [case.name for case in self.comparison.cases]

    def title(self, method: str) -> str:
        """Return what a method is called in tables and legends."""
        return self.notes[method].title if method in self.notes else method

    def of_kind(self, *kinds: str) -> list[str]:
        """Return the methods of these kinds."""
        return [name for name, note in self.notes.items() if note.kind in kinds]

    @cached_property
    def by_case(self) -> dict[tuple[str, str], CaseFigures]:
        """Figures by case and method."""
        return {(found.case, found.method): found for found in self.figures.cases}

    def judged_on(self, case: str) -> list[str]:
        """Return the methods that have figures on a case."""
        return [name for name in self.notes if (case, name) in self.by_case]

    @cached_property
    def by_method(self) -> dict[str, MethodFigures]:
        """Figures over all cases, by method."""
        return {found.method: found for found in self.figures.methods}

    def multiplier(self, method: str, baseline: str = "tuned", axis: str = "tokens") -> Estimate:
        """Return a method's compute multiplier over all cases."""
        found = self.by_method.get(method)
        return found.multipliers.get(baseline, {}).get(axis, NOTHING) if found else NOTHING

    def case_multiplier(self, case: str, method: str, baseline: str = "tuned", axis: str = "tokens") -> Estimate:
        """Return a method's compute multiplier on one case."""
        found = self.by_case.get((case, method))
        return found.multipliers.get(baseline, {}).get(axis, NOTHING) if found else NOTHING

    @cached_property
    def _by_place(self) -> dict[tuple[str, str, str], list[Row]]:
        places: dict[tuple[str, str, str], list[Row]] = {}
        for row in self.comparison.rows:
            places.setdefault((row.case, row.method, row.role), []).append(row)
        return places

    def was_run(self, method: str) -> bool:
        """Return whether there are figures of a method on any case."""
        return any((case, method) in self.by_case for case in self.case_names)

    def rows(self, case: str, method: str, role: Role = "method") -> list[Row]:
        """Return a method's rows on a case, by seed."""
        return sorted(self._by_place.get((case, method, role), []), key=lambda row: row.seed)

    def runs(self, case: str, method: str, role: Role = "method") -> list[RunResult]:
        """Return a method's runs on a case, by seed."""
        return [self.results[row.key] for row in self.rows(case, method, role) if row.key in self.results]

    @cached_property
    def ranked(self) -> list[str]:
        """Methods other than the two baselines and the planted checks: policies, then the best multiplier first.

        What was tuned itself comes last: it is a variant of what the others are measured against.
        """
        rest = [n for n, note in self.notes.items() if note.kind != "check" and n not in (TUNED, UNTUNED)]
        place = {"policy": 0, "tuned": 2}
        return sorted(rest, key=lambda name: (place.get(self.notes[name].kind, 1), -self._worth(name)))

    def _worth(self, method: str) -> float:
        values = (self.multiplier(method, baseline).value for baseline in ("tuned", "untuned"))
        return next((value for value in values if value is not None), 0.0)


def by_kind(data: ReportData, names: Iterable[str] | None = None) -> list[tuple[str, list[str]]]:
    """Return the methods in groups, each with its heading; kinds unknown to this file come last."""
    chosen = list(data.notes if names is None else names)
    kinds = [*KINDS, *dict.fromkeys(data.notes[n].kind for n in chosen if data.notes[n].kind not in KINDS)]
    groups = ((KINDS.get(kind, kind), [n for n in chosen if data.notes[n].kind == kind]) for kind in kinds)
    return [(heading, members) for heading, members in groups if members]


def _plain_note(name: str) -> MethodNote:
    kind = "tuned" if name.startswith("tuned") else "check" if name.startswith("check") else "untuned"
    return MethodNote(name=name, title=name, description="", family=name, kind=kind)
