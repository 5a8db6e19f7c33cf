"""What a comparison will take is said beforehand, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from comparison_runs import CASE, CONFIG, Bowl, drive, made_ledger, made_table, with_config

from trainpilot.experiments.compare.command import estimate_workload, runs_on_a_case, seconds_of_a_run
from trainpilot.experiments.compare.methods import DEFAULT_METHODS, OPTIONAL, OPTIONAL_RUNS
from trainpilot.experiments.compare.programs import TunedStatic
from trainpilot.experiments.options import CompareOptions
from trainpilot.experiments.results import cost_key

TABLES = {cost_key(CONFIG): made_table(per_step=0.5, per_row=0.25)}
"""A step of 8 sequences takes 2.5 s."""


@pytest.mark.parametrize(
    ("names", "runs"),
    [
        (["linear"], 3),
        (["linear", "seesaw", "policy:x"], 9),
        (["cosine"], 3 + 0.25 + 0.5 + 2 + 4),
        (["tuned-halving"], 8 + 3),
        (["nsga2", "linear"], 60 + 3 + 3),
        (["pbt", "pbt@8", "linear"], 3 * (4 + 8 + 1)),
    ],
)
def test_runs_without_a_search_are_counted_exactly(names: list[str], runs: float) -> None:
    assert runs_on_a_case(CASE, names, 3) == runs


def test_policy_that_starts_at_the_tuned_rate_needs_the_search() -> None:
    search = runs_on_a_case(CASE, ["tuned"], 3)

    assert runs_on_a_case(CASE, ["policy:x@start=3"], 3) == search + 3
    assert runs_on_a_case(CASE, ["tuned", "policy:x", "policy:x@start=3", "policy:x@time=1@start=3"], 3) == search + 9


def test_seconds_come_from_the_cost_table() -> None:
    assert seconds_of_a_run(CASE, TABLES) == 0.5 + 250  # 100 steps
    assert seconds_of_a_run(with_config(batch_size=16), TABLES) == 0.5 + 50 * 4.5


def test_a_search_runs_mostly_smaller_batches() -> None:
    assert seconds_of_a_run(CASE, TABLES, searched=True) == 0.5 + 400 * 1.0  # 400 steps of 2 sequences


def test_a_plan_adds_up_the_cases_and_shares_them_among_the_jobs() -> None:
    cases = [CASE, replace(CASE, name="other", config=replace(CONFIG, tokens=25_600))]
    plan = estimate_workload(cases, ["linear", "wsd"], 2, TABLES, jobs=2)

    assert plan.n_runs == 8
    assert plan.time_s == (4 * 250.5 + 4 * 500.5) / 2


def test_every_optional_search_says_what_it_takes() -> None:
    assert set(OPTIONAL_RUNS) == set(OPTIONAL)


def test_the_plan_of_the_search_is_about_what_it_takes() -> None:
    names = [name for name in DEFAULT_METHODS if name.startswith(("tuned", "check"))]
    ledger = made_ledger(made_table(per_step=0.0, per_row=1.0), seeds=(0, 1, 2))
    _, waves = drive(TunedStatic(ledger, CASE, names).program(), Bowl())
    took = sum({spec.key(""): spec.config.tokens for wave in waves for spec in wave}.values()) / CONFIG.tokens

    assert runs_on_a_case(CASE, names, 3) == pytest.approx(took, rel=0.25)
    assert took > 100


def test_a_comparison_without_a_folder_is_named_after_its_cases() -> None:
    assert CompareOptions(cases="quick").folder == Path("runs/compare-quick")
    assert CompareOptions(cases="sets/mine.yaml").folder == Path("runs/compare-mine")
    assert CompareOptions(out=Path("elsewhere")).folder == Path("elsewhere")
