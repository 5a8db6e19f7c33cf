"""Draw small charts as SVG that lives inside the page: its colours are the page's, in light, dark and print."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from xml.etree import ElementTree

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    hover: dict[str, str] = field(default_factory=dict)
    """What a pointer is told over the artist with that gid."""

    def mark(self, text: str) -> str:
        """Return a gid under which an artist says `text` to a pointer."""
        name = f"hover{len(self.hover)}"
        self.hover[name] = text
        return name


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


def name_x(axes: Axes, text: str) -> None:
    """Name the x-axis, below its right end. The page names y above the panel, where nobody has to turn their head."""
    axes.set_xlabel(text, loc="right", color=ink("soft"), fontsize=TEXT, labelpad=3)


def to_svg(drawn: Panel, name: str) -> str:
    """Return the chart as an `svg` element for HTML; `name` keeps its ids apart from other charts'."""
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "trainpilot"}):
        drawn.figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(stream.getvalue())
    _tidy(root, name, drawn.hover)
    view = root.attrib["viewBox"]
    about = drawn.about or f"{drawn.y}, {drawn.title}"
    root.attrib.clear()
    root.attrib |= {"class": "chart", "viewBox": view, "role": "img", "aria-label": about}
    return ElementTree.tostring(root, encoding="unicode")


def _tidy(root: ElementTree.Element, name: str, hover: Mapping[str, str]) -> None:
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
        if identity in hover:
            title = ElementTree.Element("title")
            title.text = hover[identity]
            element.insert(0, title)


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
