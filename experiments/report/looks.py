"""Give the methods that charts show their colours, marks and dashes: the same in every chart."""

from __future__ import annotations

from dataclasses import dataclass

from trainpilot.experiments.compare.comparison import TUNED, UNTUNED
from trainpilot.experiments.report.material import Material

N_COLOURED = 6
"""Methods with a colour of their own besides the two baselines: more cannot be told apart."""
N_SUBJECTS = 3
"""Methods drawn as lines: more would hide each other."""
MARKS = {
    "o": "M14 3a3 3 0 1 0 .01 0z",
    "s": "M11 3h6v6h-6z",
    "D": "M14 2l4 4-4 4-4-4z",
    "^": "M14 2l4 7h-8z",
    "v": "M14 10l4-7h-8z",
    "P": "M13 2h2v3h3v2h-3v3h-2v-3h-3v-2h3z",
    "X": "M11 2l3 3 3-3 1.4 1.4-3 2.9 3 2.9-1.4 1.4-3-3-3 3-1.4-1.4 3-2.9-3-2.9z",
    "p": "M14 2l4 3-1.5 4.6h-5L10 5z",
}
"""Outlines of the marks in a legend's key, 28 by 12."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a method is drawn."""

    method: str
    title: str
    color: str
    """A CSS variable's name."""
    marker: str
    dash: tuple[float, ...] = ()
    """Lengths of strokes and gaps in line widths; empty for a whole line."""

    @property
    def linestyle(self) -> tuple[float, tuple[float, ...] | None]:
        """What matplotlib calls it."""
        return (0.0, self.dash or None)

    @property
    def outline(self) -> str:
        """Path of the mark in the legend."""
        return MARKS[self.marker]


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Which methods the charts show."""

    chosen: tuple[Look, ...]
    """The two baselines, as far as they were compared, then those with a colour."""
    subjects: tuple[Look, ...]
    """Those of the chosen that are followed through a run: policies, or else what came out best."""
    n_methods: int
    """How many there are in all, planted checks apart."""

    def of(self, method: str) -> Look | None:
        """Return a method's look; `None` for one that the charts leave grey."""
        return next((look for look in self.chosen if look.method == method), None)

    @property
    def baselines(self) -> tuple[Look, ...]:
        """The two baselines."""
        return tuple(look for look in self.chosen if look.method in (TUNED, UNTUNED))

    @property
    def n_grey(self) -> int:
        """How many methods have no colour."""
        return self.n_methods - len(self.chosen)


MARKERS = "o^vPXp"
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.5), (1.5, 1.2), (6, 1.5, 1.5, 1.5), (3, 1.2), (8, 2))
_BASELINES = {TUNED: ("ink", "s", ()), UNTUNED: ("soft", "D", (3.0, 1.6))}


def choose(material: Material) -> Looks:
    """Return the methods that charts show: the two baselines, the policies, then the best of what was not tuned."""
    coloured = [
        Look(
            method=name,
            title=material.title(name),
            color=f"s{index + 1}",
            marker=MARKERS[index],
            dash=DASHES[index],
        )
        for index, name in enumerate([name for name in material.ranked if material.was_run(name)][:N_COLOURED])
    ]
    baselines = [
        Look(method=name, title=material.title(name), color=color, marker=marker, dash=dash)
        for name, (color, marker, dash) in _BASELINES.items()
        if material.was_run(name)
    ]
    policies = [look for look in coloured if material.notes[look.method].kind == "policy"]
    n_methods = sum(note.kind != "check" and material.was_run(name) for name, note in material.notes.items())
    subjects = (policies or coloured[:2])[:N_SUBJECTS]
    return Looks(chosen=(*baselines, *coloured), subjects=tuple(subjects), n_methods=n_methods)
