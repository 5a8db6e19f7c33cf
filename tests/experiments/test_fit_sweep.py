"""A past sweep becomes physics and predictions; a bad file gets one clear line."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from trainpilot.experiments import fit_sweep as command
from trainpilot.experiments.fit_sweep import Defaults, predict, read_sweep, usable
from trainpilot.experiments.options import FitSweepOptions
from trainpilot.llm_runtime.simulator.fitting import Fit
from trainpilot.llm_runtime.simulator.shipped import published_physics, shipped_law
from trainpilot.llm_runtime.simulator.sweeps import FinalLoss, of_final_losses

N, LENGTH = 150_000_000, 1_024
DEFAULTS = Defaults(schedule="cosine", warmup_steps=100, end_learning_rate=0.0)
COLUMNS = ("parameters", "tokens", "learning_rate", "batch_sequences", "sequence_length", "steps", "final_loss")
SETTINGS = [(rate, batch) for rate in (3e-4, 1e-3, 2e-3) for batch in (32, 64, 128)]
AROUND_BEST = [(rate, batch) for rate in (2e-3, 8e-3, 3.2e-2) for batch in (64, 256, 1024)]
"""Settings with the best inside: a fit promises nothing better outside of what was tried."""
SEQUENCES = 640_000


def measured(rate: float, batch: int, sequences: int = SEQUENCES) -> float:
    """Return the loss that the shipped law gives a model of this size, a hundredth of a nat higher."""
    run = FinalLoss(
        n_parameters=N, steps=sequences // batch, learning_rate=rate, batch=batch, final_loss=math.nan, warmup_steps=100
    )
    evidence = of_final_losses([run], [N])
    return float(evidence.at_end(shipped_law().at(N).losses(evidence))[0]) + 0.01


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def row(rate: float, batch: int, sequences: int = SEQUENCES, **changes: object) -> dict[str, object]:
    values = (N, sequences * LENGTH, rate, batch, LENGTH, sequences // batch, measured(rate, batch, sequences))
    return dict(zip(COLUMNS, values, strict=True)) | changes


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    file = write(folder / "sweep.csv", [row(*setting) for setting in AROUND_BEST])
    asked = [row(1.2e-2, 384, SEQUENCES), row(8e-3, 256, 4 * SEQUENCES), row(8e-3, 256, parameters=4 * N)]
    for each in asked:
        del each["final_loss"]
    larger = write(folder / "other.csv", [each | {"note": "mine"} for each in asked])
    options = FitSweepOptions(
        file=file, out=folder / "out", predict=larger, warmup_steps=100, end_learning_rate=0.0, initial_loss=10.9
    )
    patch = pytest.MonkeyPatch()
    patch.setattr(command, "MAX_STEPS", 12)
    command.fit_sweep(options, Console(quiet=True))
    patch.undo()
    return folder / "out"


def test_settings_that_were_not_fitted_are_predicted(fitted: Path) -> None:
    with (fitted / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(each["predicted_loss"]) for each in rows]

    assert list(rows[0]) == [name for name in COLUMNS if name != "final_loss"] + ["note", "predicted_loss"]
    assert losses[0] == pytest.approx(measured(1.2e-2, 384), abs=0.01)
    assert losses[1] == pytest.approx(measured(8e-3, 256, 4 * SEQUENCES), abs=0.03)
    assert losses[2] < losses[0]  # a larger model


def test_the_record_holds_physics_and_errors(fitted: Path) -> None:
    record = json.loads((fitted / "physics.json").read_text())

    assert [each["n_parameters"] for each in record["models"]] == [N]
    assert record["law"] is None
    assert record["sequence_length"] == LENGTH
    [cell] = record["cells"]
    assert cell["near_error"] < 0.005
    assert cell["regret"] < 0.005
    assert cell["n_runs"] == len(AROUND_BEST)


def test_batches_count_in_the_most_frequent_sequence_length(tmp_path: Path) -> None:
    rows = [row(1e-3, 64), row(2e-3, 64), row(1e-3, 128, sequence_length=LENGTH // 2)]
    sweep = read_sweep(write(tmp_path / "sweep.csv", rows), DEFAULTS)

    assert sweep.sequence_length == LENGTH
    assert [run.batch for run in sweep.runs] == [64, 64, 64]


def test_columns_override_the_defaults_and_steps_follow_from_tokens(tmp_path: Path) -> None:
    given = row(1e-3, 64, schedule="wsd", warmup_steps=7, end_learning_rate="")
    del given["steps"]
    [run] = read_sweep(write(tmp_path / "sweep.csv", [given]), DEFAULTS).runs

    assert (run.schedule, run.warmup_steps, run.end_learning_rate) == ("wsd", 7, 0.0)
    assert run.steps == SEQUENCES // 64


def test_lost_runs_and_runs_within_their_warm_up_are_not_fitted(tmp_path: Path) -> None:
    rows = [
        row(1e-3, 64),
        row(1e-3, 32, final_loss="nan"),
        row(2e-3, 64, final_loss=7.5),
        row(3e-4, 64, warmup_steps=9_900),
    ]
    sweep = read_sweep(write(tmp_path / "sweep.csv", [{"warmup_steps": "", **each} for each in rows]), DEFAULTS)

    assert [run.learning_rate for run in usable(sweep.runs)] == [1e-3]


def test_a_single_fitted_size_borrows_the_published_law() -> None:
    law = shipped_law()
    only = Fit(physics=(law.at(N),), law=None)
    runs = [
        FinalLoss(n_parameters=n, steps=5_000, learning_rate=1e-3, batch=128, final_loss=math.nan) for n in (N, 3 * N)
    ]
    evidence = [of_final_losses([run], [run.n_parameters]) for run in runs]
    expected = [float(e.at_end(law.at(r.n_parameters).losses(e))[0]) for e, r in zip(evidence, runs, strict=True)]

    assert predict(only, runs) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": "fast"}, "learning_rate must be a number above 0, got 'fast' in .*sweep.csv:2"),
        ({"batch_sequences": -4}, "batch_sequences must be a number above 0, got '-4'"),
        ({"schedule": "step"}, "schedule must be one of linear, cosine, wsd, constant, got 'step'"),
        ({"warmup_steps": -1}, "warmup_steps must be a number of at least 0, got '-1'"),
    ],
)
def test_bad_values_name_column_value_and_line(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    file = write(tmp_path / "sweep.csv", [row(1e-3, 64) | changes])
    with pytest.raises(ValueError, match=message):
        read_sweep(file, DEFAULTS)


def test_missing_columns_files_and_runs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"sweep must be a CSV file that can be read, got .*nothing\.csv: No such file"
    ):
        read_sweep(tmp_path / "nothing.csv", DEFAULTS)
    without = row(1e-3, 64)
    del without["final_loss"], without["parameters"]
    file = write(tmp_path / "sweep.csv", [without])
    with pytest.raises(ValueError, match="must have the columns parameters, final_loss, got"):
        read_sweep(file, DEFAULTS)
    options = FitSweepOptions(file=write(tmp_path / "few.csv", [row(1e-3, 64)]), out=tmp_path / "out")
    with pytest.raises(ValueError, match="at least 6 runs that trained, got"):
        command.fit_sweep(options, Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_shipped_physics_of_published_runs_are_named_after_their_source() -> None:
    models = published_physics()
    sizes = {each.n_parameters for each in models.values()}

    assert {name.split("-")[0] for name in models} == {"step", "schedules", "curves"}
    assert set(shipped_law().fitted_sizes) == sizes
    assert replace(shipped_law().reference, n_parameters=None).values.keys() == models["curves-25M"].values.keys()


def test_settings_beyond_the_edge_of_lost_runs_are_predicted_to_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "MAX_STEPS", 2)
    runs = [
        FinalLoss(
            n_parameters=N, steps=SEQUENCES // batch, learning_rate=rate, batch=batch, final_loss=measured(rate, batch),
            warmup_steps=100,
        )
        for rate, batch in SETTINGS
    ]  # fmt: skip
    lost = [replace(run, learning_rate=8e-3, final_loss=7.5) for run in runs[:2]]
    hot = [replace(runs[0], n_parameters=n, learning_rate=6e-3) for n in (N, 4 * N)]
    without, within = (predict(command.fit_final_losses(known), hot) for known in (runs, [*runs, *lost]))

    assert (without < 4).all()
    assert within[0] == pytest.approx(7.5, abs=0.6)
    assert within[1] > 6  # a larger model's edge is lower
