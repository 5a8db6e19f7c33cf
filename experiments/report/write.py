"""Write the report of a comparison: the page, its figures as JSON and CSV, and every run for TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from trainpilot.experiments.compare.comparison import Comparison
from trainpilot.experiments.compare.records import RunResult
from trainpilot.experiments.measuring.figures import Figures
from trainpilot.experiments.report.material import Material
from trainpilot.llm_runtime.cost_table import CostTable
from trainpilot.llm_runtime.files import whole_file, write_json

PAGE = "report.html"


def write_report(
    folder: Path,
    comparison: Comparison,
    results: Mapping[str, RunResult],
    tables: Mapping[str, CostTable],
    figures: Figures,
    *,
    tensorboard: bool = True,
) -> Path:
    """Write the report and return the path of its page.

    Args:
        folder: Takes `report.html`, `figures.json`, `per_case.csv`, `methods.csv`, `runs.csv` and `tensorboard/`.
        comparison: What was run.
        results: The runs by key; those that are missing are listed as such.
        tables: What a run costs, by `cost_key`.
        figures: What came out.
        tensorboard: Whether to write every judged run's curves too.
    """
    from trainpilot.experiments.report.page import render
    from trainpilot.experiments.report.sheets import write_sheets

    material = Material(comparison, results, tables, figures)
    write_json(folder / "figures.json", figures.to_json())
    write_sheets(folder, material)
    if tensorboard:
        from trainpilot.experiments.report.events import write_events

        write_events(folder / "tensorboard", material)
    page = render(material)
    with whole_file(folder / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / PAGE
