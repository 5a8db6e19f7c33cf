from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_input import ReportInput, report_input
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainpilot.experiments.analysis.figures import Estimate
from trainpilot.experiments.analysis.modelled_cost import modelled_cost
from trainpilot.experiments.report.page import write_report
from trainpilot.experiments.report.report_data import ReportData
from trainpilot.experiments.report.tables import flat, write_sheets
from trainpilot.experiments.report.tensorboard import slug, write_events

METHODS = ("policy:agent", "tuned", "cosine", "prodigy", "random")


@pytest.fixture(scope="module")
def two_cases() -> ReportInput:
    return report_input(2, METHODS, seeds=(1, 2, 3))


@pytest.fixture(scope="module")
def sheets(two_cases: ReportInput, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sheets")
    write_sheets(folder, ReportData(*two_cases.all()))
    return folder


def rows(path: Path) -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        yield from csv.DictReader(stream)


def test_per_case_csv_holds_the_figures_unrounded(two_cases: ReportInput, sheets: Path) -> None:
    found = {(row["case"], row["method"]): row for row in rows(sheets / "per_case.csv")}

    assert len(found) == 2 * len(METHODS)
    for figures in two_cases.figures.cases:
        row = found[figures.case, figures.method]
        assert float(row["validation_loss"]) == figures.validation_loss.value
        assert float(row["validation_loss_low"]) == figures.validation_loss.low
        worth = figures.multipliers["tuned"]["tokens"]
        assert float(row["multipliers_tuned_tokens"]) == worth.value
        assert row["multipliers_tuned_tokens_censored"] == worth.censored
        assert float(row["time_parts_s_training"]) == figures.time_parts_s["training"]
        assert int(row["n_diverged"]) == figures.n_diverged


def test_what_is_unknown_is_empty_in_a_sheet(sheets: Path) -> None:
    prodigy = next(row for row in rows(sheets / "per_case.csv") if row["method"] == "prodigy")

    assert prodigy["energy_j"] == prodigy["product_score"] == ""
    assert float(prodigy["time_s"]) > 0


def test_methods_csv_has_a_row_for_each_method(two_cases: ReportInput, sheets: Path) -> None:
    found = {row["method"]: row for row in rows(sheets / "methods.csv")}

    assert list(found) == [figures.method for figures in two_cases.figures.methods]
    assert float(found["policy:agent"]["break_even_runs"]) == 140.0
    assert found["cosine"]["sign_tests_tuned_tokens_wins"] == "0"


def test_runs_csv_has_every_run_with_measured_and_modelled_cost(two_cases: ReportInput, sheets: Path) -> None:
    found = {row["key"]: row for row in rows(sheets / "runs.csv")}

    assert list(found) == [row.key for row in two_cases.comparison.rows]
    row, run = found["llama-0-tuned-1"], two_cases.results["llama-0-tuned-1"]
    cost = modelled_cost(run, next(iter(two_cases.tables.values())))
    assert float(row["final_validation_loss"]) == run.final_validation_loss
    assert float(row["modelled_time_s"]) == cost.time_s
    assert float(row["modelled_energy_j"]) == cost.energy_j
    assert float(row["measured_time_s"]) == pytest.approx(50 * 0.4 + 5 * 0.1)
    assert float(row["measured_energy_j"]) == pytest.approx(50 * 8.0 + 5 * 2.0)
    assert row["role"] == "method"
    assert found["llama-0-sweep"]["role"] == "sweep"
    assert found["llama-0-random-2"]["diverged"] == "True"
    assert found["gpt2-1-prodigy-3"]["failure"] == "killed by signal 9"


def test_a_run_without_a_cost_table_or_a_file_is_told_of(two_cases: ReportInput, tmp_path: Path) -> None:
    missing = {key: run for key, run in two_cases.results.items() if key != "llama-0-tuned-1"}
    write_sheets(tmp_path, ReportData(two_cases.comparison, missing, {}, two_cases.figures))

    found = {row["key"]: row for row in rows(tmp_path / "runs.csv")}

    assert found["llama-0-tuned-1"]["failure"] == "its file is missing"
    assert found["llama-0-tuned-2"]["modelled_time_s"] == ""


def test_nested_names_are_joined() -> None:
    estimate = Estimate(value=2.0, low=1.0, n=3, censored=">")

    assert flat({"a": {"b": 1, "c": {"d": None}}}) == {"a_b": 1, "a_c_d": None}
    assert flat({"e": estimate}) == {"e": 2.0, "e_low": 1.0, "e_high": None, "e_n": 3, "e_censored": ">"}


def events(folder: Path) -> EventAccumulator:
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return accumulator


def test_tensorboard_holds_the_run_under_the_usual_tags(two_cases: ReportInput, tmp_path: Path) -> None:
    write_events(tmp_path / "tensorboard", ReportData(*two_cases.all()))

    run = two_cases.results["llama-0-policy:agent-1"]
    found = events(tmp_path / "tensorboard" / "llama-0" / "policy-agent" / "seed-1")
    losses = [(e.step, e.value) for e in found.Scalars("loss/validation")]
    assert losses[0] == (0, pytest.approx(5.55))
    assert losses[-1] == (163840, pytest.approx(run.final_validation_loss))
    assert len(losses) == 6
    assert len(found.Scalars("loss/train")) == 50
    assert [e.value for e in found.Scalars("controls_effective/batch_size")][-1] == 16
    assert [e.value for e in found.Scalars("controls_effective/precision")][-1] == 2, "bf16"
    assert found.Scalars("final/validation_loss")[0].value == pytest.approx(run.final_validation_loss)
    assert "_hparams_/session_start_info" in found.summary_metadata


def test_tensorboard_holds_judged_runs_alone_and_each_in_its_folder(two_cases: ReportInput, tmp_path: Path) -> None:
    (tmp_path / "tensorboard" / "old").mkdir(parents=True)
    write_events(tmp_path / "tensorboard", ReportData(*two_cases.all()))

    files = list((tmp_path / "tensorboard").rglob("events*"))

    assert len(files) == 2 * len(METHODS) * 3
    assert not (tmp_path / "tensorboard" / "old").exists()


def test_a_diverged_run_has_no_final_loss_in_tensorboard(two_cases: ReportInput, tmp_path: Path) -> None:
    write_events(tmp_path / "tensorboard", ReportData(*two_cases.all()))

    tags = events(tmp_path / "tensorboard" / "llama-0" / "random" / "seed-2").Tags()["scalars"]

    assert "loss/train" in tags
    assert "final/validation_loss" not in tags


def test_folder_names_are_plain() -> None:
    assert slug("policy:runs/agent/policy.safetensors@0.5,0.5,0") == "policy-runs-agent-policy.safetensors@0.5-0.5-0"
    assert slug("../..") == "unnamed"


def test_a_report_without_tensorboard_leaves_no_folder_for_it(tmp_path: Path) -> None:
    small = report_input(1, ("tuned", "cosine"), seeds=(1,))

    page = write_report(tmp_path / "out", *small.all(), tensorboard=False)

    names = sorted(path.name for path in page.parent.iterdir())
    assert names == ["figures.json", "methods.csv", "per_case.csv", "report.html", "runs.csv"]
    assert json.loads((page.parent / "figures.json").read_text()) == json.loads(json.dumps(small.figures.to_json()))
