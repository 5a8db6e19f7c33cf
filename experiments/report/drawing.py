"""Draw small matplotlib charts as SVG that takes its colours from the page, in light, dark and print.

Here are an empty panel and its conversion to SVG, the colour, mark and dash of each method (the same in every chart),
and the choice of axis ranges and ticks.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, MaxNLocator, NullLocator

from trainpilot.experiments.report.formatting import SPACE, si
from trainpilot.experiments.report.report_data import ReportData
from trainpilot.experiments.results import TUNED, UNTUNED
from trainpilot.llm_runtime.plain_values import printable

INKS = (
    *("ink", "soft", "faint", "paper"),
    *("s1", "s2", "s3", "s4", "s5", "s6"),
    *("part1", "part2", "part3", "part4"),
)
"""CSS variables that a chart may use as a colour: `--ink` and so on."""
WIDTH, HEIGHT = 4.1, 2.7
"""Of a panel, in inches at 72 points; the page scales it to its column."""
LEFT, RIGHT, TOP, BOTTOM = 0.54, 0.1, 0.1, 0.46
"""Margins in inches: the same in all panels, so that their axes stand in line."""
TEXT = 8.6

_STAND_IN = re.compile(r"#0000([0-9a-f]{2})\b")
_FONT = re.compile(r"font-family:[^;]*;?\s*")
_LONG_NUMBER = re.compile(r"\d+\.\d{3,}")
_REFERENCE = re.compile(r"#([^)]+)")


@dataclass
class Panel:
    """One small chart."""

    title: str
    """Above it, as HTML."""
    y: str
    """What the y-axis counts, behind the title."""
    figure: Figure
    axes: Axes
    about: str = ""
    """What a screen reader says."""


def ink(name: str) -> str:
    """Return the colour that stands in for a CSS variable until the chart is SVG."""
    return f"#0000{INKS.index(name) + 1:02x}"


def panel(title: str, y: str = "", *, about: str = "", height: float = HEIGHT, left: float = LEFT) -> Panel:
    """Return an empty chart with the report's margins and rules."""
    figure = Figure(figsize=(WIDTH, height))
    figure.patch.set_visible(False)
    width, tall = WIDTH - left - RIGHT, height - TOP - BOTTOM
    axes = figure.add_axes((left / WIDTH, BOTTOM / height, width / WIDTH, tall / height))
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set(color=ink("soft"), linewidth=0.7)
    axes.tick_params(which="both", length=0, pad=4, labelsize=TEXT, labelcolor=ink("soft"))
    axes.grid(axis="y", color=ink("faint"), linewidth=0.7)
    axes.set_axisbelow(True)
    return Panel(title, y, figure, axes, about)


def label(text: str) -> str:
    """Return a name as matplotlib draws it, which takes text between dollar signs for a formula."""
    return printable(text).replace("$", r"\$")


def name_x(axes: Axes, text: str) -> None:
    """Name the x-axis, below its right end. The page names y above the panel, where nobody has to turn their head."""
    axes.set_xlabel(label(text), loc="right", color=ink("soft"), fontsize=TEXT, labelpad=3)


def to_svg(drawn: Panel, name: str) -> str:
    """Return the chart as an `svg` element for HTML; `name` keeps its ids apart from other charts'."""
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "trainpilot"}):
        drawn.figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())
    _tidy(root, name)
    view = root.attrib["viewBox"]
    about = printable(drawn.about or f"{drawn.y}, {drawn.title}")
    root.attrib.clear()
    root.attrib |= {"class": "chart", "viewBox": view, "role": "img", "aria-label": about}
    return ElementTree.tostring(root, encoding="unicode")


def _tidy(root: ElementTree.Element, name: str) -> None:
    """Take out what a page has no use for, name colours by variables, and keep ids unique."""
    for parent in list(root.iter()):
        for child in list(parent):
            if _local(child.tag) in ("metadata", "style"):
                parent.remove(child)
    wanted = _referenced(root)
    for element in list(root.iter()):
        element.tag = _local(element.tag)
        element.text = element.text if element.tag in ("text", "tspan") else None
        element.tail = None
        element.attrib = {_local(key): _value(_local(key), value, name) for key, value in element.attrib.items()}
        identity = element.attrib.pop("id", "")
        if identity in wanted:
            element.set("id", f"{name}-{identity}")


def _value(key: str, value: str, name: str) -> str:
    if key == "style":
        value = _FONT.sub("", _STAND_IN.sub(lambda code: f"var(--{INKS[int(code[1], 16) - 1]})", value))
    elif key in ("href", "clip-path"):
        value = _REFERENCE.sub(lambda found: f"#{name}-{found[1]}", value)
    elif key == "d":
        value = " ".join(value.split())
    return _LONG_NUMBER.sub(lambda number: f"{float(number[0]):.2f}", value)


def _referenced(root: ElementTree.Element) -> set[str]:
    values = (value for element in root.iter() for key, value in element.attrib.items() if key != "style")
    return {found[1] for value in values if "#" in value for found in _REFERENCE.finditer(value)}


def _local(tag: str) -> str:
    return tag.rpartition("}")[2]


ROW = 0.235
"""Height of a named row, in inches."""
NAMES = 1.4
"""Width of the names before the rows, in inches."""
LONGEST_NAME = 20
PART_NAMES = ("training", "curvature probe", "evaluation", "switching controls")
PART_INKS = ("part1", "part2", "part3", "part4")
"""What a run's time and energy went to, and in which colours."""


def named_rows(title: str, names: Sequence[str], about: str, y: str = "") -> Panel:
    """Return a panel with a named row for each of `names`, the first on top."""
    height = TOP + BOTTOM + ROW * max(len(names), 2)
    drawn = panel(title, y, about=about, height=height, left=NAMES)
    drawn.axes.set_ylim(max(len(names), 2) - 0.5, -0.5)
    drawn.axes.set_yticks(range(len(names)), [label(_shortened(name)) for name in names])
    drawn.axes.tick_params(axis="y", labelcolor=ink("ink"), pad=8)
    drawn.axes.grid(visible=False)
    drawn.axes.grid(axis="x", color=ink("faint"), linewidth=0.7)
    return drawn


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"


def stack(drawn: Panel, rows: Sequence[Sequence[float]], inks: Sequence[str], form: Callable[[float], str]) -> None:
    """Draw each row's parts as one bar, with their sum behind it."""
    longest = max(sum(parts) for parts in rows)
    for row, parts in enumerate(rows):
        start = 0.0
        for part, name in zip(parts, inks, strict=True):
            drawn.axes.barh(row, part, left=start, height=0.62, color=ink(name))
            start += part
        drawn.axes.text(start + longest * 0.015, row, form(start), va="center", fontsize=TEXT, color=ink("ink"))


N_COLOURED = 6
"""Methods with a colour of their own besides the two baselines: more could not be distinguished."""
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
class MethodStyle:
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
class MethodStyles:
    """Which methods the charts show."""

    chosen: tuple[MethodStyle, ...]
    """The two baselines, as far as they were compared, then those with a colour."""
    subjects: tuple[MethodStyle, ...]
    """Those of the chosen that are followed through a run: policies, or else what came out best."""
    n_methods: int
    """How many there are in all, planted checks apart."""

    def of(self, method: str) -> MethodStyle | None:
        """Return a method's look; `None` for one that the charts leave grey."""
        return next((look for look in self.chosen if look.method == method), None)

    @property
    def baselines(self) -> tuple[MethodStyle, ...]:
        """The two baselines."""
        return tuple(look for look in self.chosen if look.method in (TUNED, UNTUNED))

    @property
    def n_grey(self) -> int:
        """How many methods have no colour."""
        return self.n_methods - len(self.chosen)


MARKERS = "o^vPXp"
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.5), (1.5, 1.2), (6, 1.5, 1.5, 1.5), (3, 1.2), (8, 2))
_BASELINES = {TUNED: ("ink", "s", ()), UNTUNED: ("soft", "D", (3.0, 1.6))}


def choose(data: ReportData) -> MethodStyles:
    """Return the methods that charts show: the two baselines, the policies, then the best of what was not tuned."""
    coloured = [
        MethodStyle(
            method=name,
            title=data.title(name),
            color=f"s{index + 1}",
            marker=MARKERS[index],
            dash=DASHES[index],
        )
        for index, name in enumerate([name for name in data.ranked if data.was_run(name)][:N_COLOURED])
    ]
    baselines = [
        MethodStyle(method=name, title=data.title(name), color=color, marker=marker, dash=dash)
        for name, (color, marker, dash) in _BASELINES.items()
        if data.was_run(name)
    ]
    policies = [look for look in coloured if data.notes[look.method].kind == "policy"]
    n_methods = sum(note.kind != "check" and data.was_run(name) for name, note in data.notes.items())
    subjects = (policies or coloured[:2])[:N_SUBJECTS]
    return MethodStyles(chosen=(*baselines, *coloured), subjects=tuple(subjects), n_methods=n_methods)


STEPS = (1, 1.5, 2, 3, 5, 7)
"""Where the ticks of a logarithmic axis stand within a decade, as far as there is room."""
Form = Callable[[float], str]


def window(values: Iterable[float], spare: float = 0.08) -> tuple[float, float]:
    """Return the range of a loss axis: from the best to those not far off the middle, hiding none for one bad run."""
    ordered = sorted(values)
    low, middle = ordered[0], median(ordered)
    reach = low + 2.5 * max(middle - low, 0.01 * abs(low), 1e-6)
    high = max(value for value in ordered if value <= reach)
    room = spare * max(high - low, 0.01 * abs(low), 1e-6)
    return low - room, high + room


def log_window(values: Iterable[float], spare: float = 0.06) -> tuple[float, float]:
    """Return a logarithmic axis's range around values above 0."""
    ordered = sorted(values)
    room = max(ordered[-1] / ordered[0], 1.1) ** spare
    return ordered[0] / room, ordered[-1] * room


def log_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return round numbers on a logarithmic axis: between three and `most` of them where the range allows."""
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), STEPS):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        inside = [tick for tick in ticks if low <= tick <= high]
        if len(inside) >= 3:
            return inside[:: math.ceil(len(inside) / most)]
    even = [float(tick) for tick in MaxNLocator(most - 1).tick_values(low, high)]
    return [tick for tick in even if low <= tick <= high]


def log_axis(axes: Axes, which: str, limits: tuple[float, float], form: Form, ticks: Sequence[float] = ()) -> None:
    """Make the x or y axis logarithmic, with ticks at round numbers."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    (axes.set_xlim if which == "x" else axes.set_ylim)(limits)
    places = [tick for tick in ticks or log_ticks(*limits) if limits[0] <= tick <= limits[1]]
    axis.set_major_locator(FixedLocator(places))
    axis.set_major_formatter(FixedFormatter([form(place) for place in places]))
    axis.set_minor_locator(NullLocator())


def plain_axis(axes: Axes, which: str, limits: tuple[float, float], form: Form | None = None, n: int = 4) -> None:
    """Make the x or y axis linear with about `n` ticks."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xlim if which == "x" else axes.set_ylim)(limits)
    ticks = MaxNLocator(n, steps=[1, 2, 2.5, 5, 10]).tick_values(*limits)
    places = [float(tick) for tick in ticks if limits[0] <= tick <= limits[1]]
    axis.set_major_locator(FixedLocator(places))
    axis.set_major_formatter(FixedFormatter([form(place) if form else f"{place:.4g}" for place in places]))


def counted(value: float) -> str:
    """Return a number of tokens for an axis: `50 k`."""
    return "0" if value == 0 else _short(si(value))


def measured(unit: str) -> Form:
    """Return the form of an axis in `unit`."""
    return lambda value: f"0{SPACE}{unit}" if value == 0 else _short(si(value, unit))


def _short(text: str) -> str:
    """Drop the zeros that an axis does not need: `50.0 k` is `50 k`."""
    number, _, unit = text.partition(SPACE)
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number}{SPACE}{unit}".strip()
