"""The zero-shot benchmark's figures, on comparisons whose multipliers are known."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from planted_comparison import Planted

from trainpilot.experiments.analysis.figures import Estimate
from trainpilot.experiments.analysis.modelled_cost import Runs
from trainpilot.llm_runtime.files import write_json

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
WORTH = {"0.1": 0.9, "0.333": 1.0, "1": 1.1, "3": 1.0, "10": 0.8}
"""Planted multiplier against the tuned static, by start."""


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield import_module("zero_shot")
    finally:
        sys.path.remove(str(BENCHMARKS))


def planted(benchmark: ModuleType, worth: Mapping[str, float] = WORTH, **more: Any) -> Planted:
    started = {
        benchmark.started_name("default", axis, s): w for axis in benchmark.PREFERENCES for s, w in worth.items()
    }
    own = {"policy:default": 0.95, "open-loop:default": 0.9}
    return Planted(efficiencies={"cosine": 0.5, "tuned": 1.0, **own, **started}, **more)


def figures(benchmark: ModuleType, made: Planted) -> dict[str, Any]:
    result: dict[str, Any] = benchmark.zero_shot(Runs(made.comparison(), made.results, made.tables()), "default")
    return result


def test_the_methods_are_every_start_under_every_preference(benchmark: ModuleType) -> None:
    names = benchmark.names("default")

    assert names[:4] == ["cosine", "tuned", "policy:default", "open-loop:default"]
    assert "policy:default@quality=0.4+energy=0.3+time=0.3@start=0.333" in names
    assert len(names) == len(set(names)) == 4 + 2 * 5


def test_planted_multipliers_come_out_by_start_and_over_all(benchmark: ModuleType) -> None:
    found = figures(benchmark, planted(benchmark))

    for axis in ("tokens", "time_s", "energy_j"):
        starts = found["axes"][axis]["starts"]
        assert {start: one["tuned"]["value"] for start, one in starts.items()} == pytest.approx(WORTH, rel=0.02)
        assert found["axes"][axis]["all_starts"]["tuned"]["value"] == pytest.approx(1.0, rel=0.02)  # of the five
        assert found["axes"][axis]["all_starts"]["untuned"]["value"] == pytest.approx(2.0, rel=0.02)
        assert starts["10"]["worst_case"]["tuned"]["value"] == pytest.approx(0.8, rel=0.02)
        assert set(starts["10"]["validation_losses"]) == {"planted-a", "planted-b"}
        assert [len(losses) for losses in starts["10"]["validation_losses"].values()] == [3, 3]


def test_targets_say_what_was_reached(benchmark: ModuleType) -> None:
    found = figures(benchmark, planted(benchmark))
    tokens = {(one["kind"], one["what"]): one["reached"] for one in found["targets"] if one["axis"] == "tokens"}

    assert list(tokens.values()) == [True, True, False, False, False, True]  # sweep: 1.0 + 4 runs is 5, not 10
    assert len(found["targets"]) == 3 * 6


def test_a_sweep_paid_for_counts_only_at_a_loss_near_the_tuned_statics(benchmark: ModuleType) -> None:
    def sweep(worth: float) -> dict[str, Any]:
        found = figures(benchmark, planted(benchmark, {"1": worth}, n_trials=20))
        goal: dict[str, Any]
        [goal] = [one for one in found["targets"] if one["axis"] == "tokens" and one.get("at_least") == 10.0]
        return goal

    assert sweep(1.0)["found"]["value"] == pytest.approx(21, rel=0.02)
    assert sweep(1.0)["reached"]
    assert sweep(0.5)["found"]["value"] == pytest.approx(20.5, rel=0.02)
    assert not sweep(0.5)["reached"]


def test_a_run_that_diverged_counts_as_worst_and_is_told(benchmark: ModuleType) -> None:
    name = benchmark.started_name("default", "tokens", "10")
    failing = [("planted-a", name, seed) for seed in (0, 1)]
    found = figures(benchmark, planted(benchmark, failing=failing))
    start = found["axes"]["tokens"]["starts"]["10"]

    assert start["n_diverged"] == 2
    assert start["worst_case"]["case"] == "planted-a"
    assert start["worst_case"]["tuned"] == {
        "value": 0.0,
        "low": 0.0,
        "high": pytest.approx(0.8, rel=0.02),
        "bound": "<",
    }
    assert start["validation_losses"]["planted-a"].count(None) == 2
    [none] = [one for one in found["targets"] if one["axis"] == "tokens" and "at_most" in one]
    assert (none["found"], none["reached"]) == (2, False)


def test_closed_loop_and_open_loop_are_compared_case_by_case(benchmark: ModuleType) -> None:
    found = figures(benchmark, planted(benchmark))["closed_against_open"]

    assert (found["cases"], found["closed_better"], found["open_better"]) == (2, 2, 0)
    assert found["tuned"]["closed"]["value"] == pytest.approx(0.95, rel=0.02)
    assert all(saved > 0 for saved in found["nats_saved_by_case"])


def test_a_bound_from_above_reaches_nothing(benchmark: ModuleType) -> None:
    assert benchmark.reached(Estimate(value=1.0), 1.0)
    assert benchmark.reached(Estimate(value=1.4, censored=">"), 1.3)
    assert not benchmark.reached(Estimate(value=1.4, censored="<"), 1.3)
    assert not benchmark.reached(Estimate(value=None), 1.3)


def test_the_result_is_plain_json_and_can_be_drawn(benchmark: ModuleType, tmp_path: Path) -> None:
    found = figures(benchmark, planted(benchmark, failing=[("planted-a", "policy:default@quality=1@start=10", 0)]))
    write_json(tmp_path / "found.json", found)
    benchmark.draw(json.loads((tmp_path / "found.json").read_text()), tmp_path / "images" / "found.png")

    assert (tmp_path / "images" / "found.png").stat().st_size > 10_000


def test_what_has_not_been_run_yet_is_left_out(benchmark: ModuleType, tmp_path: Path) -> None:
    found = figures(benchmark, planted(benchmark, {"1": 1.0}))
    benchmark.draw(found, tmp_path / "found.png")

    assert list(found["axes"]["tokens"]["starts"]) == ["1"]
    assert (tmp_path / "found.png").is_file()
