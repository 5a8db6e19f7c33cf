"""Fill the templates of the report's pages: one self-contained HTML file each, everything escaped but our own SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Protocol

from trainpilot.experiments.report.drawing import MethodStyle, Panel, to_svg
from trainpilot.llm_runtime.plain_values import printable


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """One panel, drawn."""

    title: str
    y: str
    svg: str


@dataclass(frozen=True, kw_only=True)
class Charts:
    """A figure of one or several panels with its legend."""

    drawings: tuple[Drawing, ...]
    legend: tuple[MethodStyle, ...] = ()
    heading: str = ""
    note: str = ""


def draw(
    name: str, panels: Sequence[Panel], legend: Sequence[MethodStyle], heading: str = "", note: str = ""
) -> Charts:
    """Return the panels as SVG; `name` keeps their ids apart from those of other figures of the page."""
    drawings = tuple(
        Drawing(title=drawn.title, y=drawn.y, svg=to_svg(drawn, f"{name}{index}")) for index, drawn in enumerate(panels)
    )
    return Charts(drawings=drawings, legend=tuple(legend), heading=heading, note=note)


class Titled(Protocol):
    """What a template shows."""

    @property
    def title(self) -> str:
        """Title of the page."""


def render_page(template: str, page: Titled) -> str:
    """Return the whole page that a template of this folder makes of `page`."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    folder = files("trainpilot.experiments.report")
    loader = FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=_on_the_page,
    )  # fmt: skip
    css = folder.joinpath("report.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(page=page, css=css) + "\n"


def _on_the_page(value: Any) -> Any:
    """Return text without characters that act on what is shown, such as overrides of its direction."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "\n".join(map(printable, value.split("\n")))
