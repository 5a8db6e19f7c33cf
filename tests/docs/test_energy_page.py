"""The page on energy: its example runs, and it names every source and the interpreter of Zeus."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from trainpilot.llm_runtime.energy.meter import SOURCES
from trainpilot.llm_runtime.energy.plausible import plausible_meter
from trainpilot.llm_runtime.energy.zeus import PYTHON

PAGE = (Path(__file__).parents[2] / "docs" / "energy.md").read_text(encoding="utf-8")


def test_the_example_is_a_meter() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.M | re.S)
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(block, "energy.md", "exec"), names)
    watt_hours = iter([5.0, 5.002])
    meter = plausible_meter(names["SmartPlug"](lambda: next(watt_hours)))

    found = meter.read()
    assert found.energy_j == pytest.approx(7.2)  # 0.002 Wh
    assert (meter.scope, meter.resolution_s, meter.description) == ("machine", 10.0, "smart plug at the wall")


def test_every_source_and_the_interpreter_of_zeus_are_named() -> None:
    assert all(f"| `{source}` |" in PAGE for source in SOURCES)
    assert f"export {PYTHON}=" in PAGE
