"""The README says first what matters, and its Python blocks run one after the other, as a reader would type them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, flags=re.M | re.S)
FIRST_SCREEN = README[: README.index("make demo")]


def test_the_first_screen_says_what_is_measured_and_what_is_refused() -> None:
    assert "benchmarks/results/live_budgets.json" in FIRST_SCREEN
    for refused in ("DeepSpeed", "FSDP1", "tensor parallelism", "fp16", "torch_compile", "bf16"):
        assert refused in FIRST_SCREEN


def test_the_readme_is_short_and_its_results_are_there() -> None:
    assert len(README.split()) <= 1_750
    for result in re.findall(r"\((benchmarks/results/[^)]+)\)", README):
        assert (ROOT / result).is_file(), result


def test_systems_and_pythons_are_named_as_the_package_has_them() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pythons = [each.split()[-1] for each in project["classifiers"] if each.startswith("Programming Language :: Python")]

    assert f"Python {pythons[0]} to {pythons[-1]}" in README
    for system in ("Linux", "Apple silicon", "on Windows"):
        assert system in README


def test_rllib_is_installed_without_the_pinned_versions() -> None:
    page = " ".join((ROOT / "docs" / "environment.md").read_text(encoding="utf-8").split())

    assert re.search(r"RLlib.{0,60}older Gymnasium: install it without `constraints.txt`", page)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_no_page_installs_from_an_index_what_is_not_there(page: str) -> None:
    pages = [ROOT / page, *((ROOT / "docs" / "tutorials").glob("*.md") if page == "README.md" else ())]
    for each in pages:
        assert not re.search(r"pip install[^`\n]*\btrainpilot\b", each.read_text(encoding="utf-8")), each


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore", "error:policy outside")
def test_the_python_blocks_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    assert len(BLOCKS) >= 2
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"README.md, block {number}", "exec"), names)

    assert names["steering"].summary()["tokens"] == 800 * 64
    assert len(names["reward"]) == 3
    assert names["ended"]
