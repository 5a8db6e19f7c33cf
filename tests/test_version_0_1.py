"""Files that version 0.1 wrote are read, reused and resumed. `golden/version_0_1/README.md` says how they were made."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from steering_loops import Loop

from trainpilot.agents import bundle as bundles
from trainpilot.agents.bundle import PolicyBundle, policy_digest, policy_path
from trainpilot.envs.environments import SimulatedTraining
from trainpilot.envs.observation import BASIC, fields_of
from trainpilot.experiments import cli
from trainpilot.experiments.calibrate import command as calibrate_command
from trainpilot.experiments.calibrate.calibration import load_calibrations
from trainpilot.experiments.train_agent import physics_of
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.files import load_checkpoint
from trainpilot.llm_runtime.simulator.fitting import FittedPhysics
from trainpilot.llm_runtime.simulator.physics import ADDED
from trainpilot.llm_runtime.simulator.runs import Pool, SimulatedRuns

GOLDEN = Path(__file__).with_name("golden") / "version_0_1"
REPLAY = (
    "replay --model model.json --text text.txt --batch-size 4 --sequence-length 16 --threads 1 --tokens 2560 "
    "--decisions 10 --base-learning-rate 2e-3 --policy zigzag.safetensors --pruning magnitude --out killed"
)
CALIBRATE = (
    "calibrate --model model.json --text text.txt --tokens 256 --batch-size 4 --sequence-length 16 --decisions 2 "
    "--effort quick --jobs 1 --device cpu --out calibration"
)
SIMULATED_ACTIONS = ((3, 1, 0, 0, 0), (4, 0, 0, 0, 0), (3, 1, 0, 1, 0))
OTHER_CPU = 1e-5
"""Relative difference that another CPU's rounding may make in a loss; here it is a few 1e-8."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of the files, which is the current folder: their paths are relative. Its policy is the default."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bundles, "POLICIES", tmp_path)
    return tmp_path


def trainpilot(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Carry a command out in this process; it must succeed."""
    monkeypatch.setattr(sys, "argv", ["trainpilot", *command.split()])
    cli.main()


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def losses(folder: Path) -> list[float]:
    lines = (folder / "telemetry.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["telemetry"]["train_loss"] for line in lines]


def written(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return when each file was written, and its content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# Runs -------------------------------------------------------------------------------------------------------------


def test_finished_run_is_shown_and_explained(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainpilot("inspect finished", monkeypatch)
    shown = " ".join(capsys.readouterr().out.split())
    summary = read(place / "finished" / "summary.json")

    assert policy_digest(policy_path("default")) == read(place / "finished" / "config.json")["policy_digest"]
    assert "2,048 tokens" in shown
    assert f"{summary['final_validation_loss']:.4f}" in shown
    assert "cannot be explained" not in shown
    assert "would repeat only" not in shown  # today's code decides the same from what was observed


def test_finished_run_is_not_run_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written(place / "finished")
    trainpilot(
        "replay --model model.json --text text.txt --batch-size 4 --sequence-length 16 --threads 1 --tokens 2048 "
        "--decisions 8 --base-learning-rate 1e-3 --policy default --preference quality=0.8,energy=0.2 --reference "
        "--out finished",
        monkeypatch,
    )

    assert written(place / "finished") == before


def test_killed_run_goes_on_and_ends_as_it_would_have(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = read(place / "killed" / "ending.json")
    kept = losses(place / "killed")
    trainpilot(REPLAY, monkeypatch)
    lines = (place / "killed" / "telemetry.jsonl").read_text(encoding="utf-8").splitlines()
    summary = read(place / "killed" / "summary.json")

    assert losses(place / "killed")[:6] == kept == ending["train_loss"][:6]
    assert losses(place / "killed") == pytest.approx(ending["train_loss"], rel=OTHER_CPU)
    assert [json.loads(line)["allowed"] for line in lines] == ending["allowed"]
    for name in ("initial_validation_loss", "final_validation_loss", "final_test_loss", "n_changes"):
        assert summary[name] == pytest.approx(ending[name], rel=OTHER_CPU), name


def test_saved_steering_goes_on_in_a_plain_loop(place: Path) -> None:
    state, ending = load_checkpoint(place / "steering" / "state.pt"), read(place / "steering" / "ending.json")
    config = RunConfig(
        model="model.json",
        text=("text.txt",),
        tokens=2_560,
        batch_size=4,
        sequence_length=16,
        decisions=10,
        base_learning_rate=2e-3,
        pruning="magnitude",
        device="cpu",
    )
    preference = "quality=0.7,energy=0.15,time=0.15"
    loop = Loop(config, "zigzag.safetensors", pruning="magnitude", preference=preference)
    assert state is not None
    loop.model.load_state_dict(state["model"])
    loop.optimizer.load_state_dict(state["optimizer"])
    loop.stream.load_state_dict(state["stream"])
    loop.steering.load_state_dict(state["steering"])
    loop.train()
    records = loop.steering.records

    assert len(loop.rates) == ending["steps"] - 34
    assert [record.telemetry.train_loss for record in records] == pytest.approx(ending["train_loss"], rel=OTHER_CPU)
    assert [list(record.allowed) for record in records] == ending["allowed"]


# Comparisons and calibrations -------------------------------------------------------------------------------------


def test_runs_of_a_comparison_are_found_and_none_runs_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read(place / "comparison" / "comparison.json")
    runs, costs = written(place / "comparison" / "runs"), written(place / "comparison" / "costs")
    trainpilot(
        "compare --cases cases.yaml --methods cosine,plateau,policy:zigzag.safetensors@unguarded --seeds 1 --jobs 1 "
        "--out comparison",
        monkeypatch,
    )
    after = read(place / "comparison" / "comparison.json")

    assert len(runs) == 7
    assert written(place / "comparison" / "runs") == runs
    assert written(place / "comparison" / "costs") == costs
    assert [row["key"] for row in after["rows"]] == [row["key"] for row in before["rows"]]
    page = (place / "comparison" / "report.html").read_text(encoding="utf-8")
    assert "reduce on plateau" in page


def test_report_is_written_from_an_old_comparison_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = written(place / "comparison" / "runs")
    trainpilot(
        "compare --cases cases.yaml --methods cosine,plateau --seeds 1 --report-only --out comparison", monkeypatch
    )
    figures = read(place / "comparison" / "figures.json")

    assert written(place / "comparison" / "runs") == runs
    assert {case["method"]: case["validation_loss"]["value"] for case in figures["cases"]} == {
        row["method"]: read(place / "comparison" / "runs" / f"{row['key']}.json")["final_validation_loss"]
        for row in read(place / "comparison" / "comparison.json")["rows"]
        if row["role"] == "method"
    }


def test_calibration_goes_into_the_simulator(place: Path) -> None:
    [calibration] = load_calibrations("calibration")
    [physics] = physics_of(["calibration"])
    stored, simulated = read(place / "calibration" / "calibration.json"), read(place / "calibration" / "simulated.json")
    pool = Pool.draw(4, 0, [physics])
    fields = fields_of(BASIC)  # those of version 0.1
    env = SimulatedTraining(make_plant=lambda seed: SimulatedRuns(n_runs=1, seed=seed, pool=pool), fields=fields)
    observations = [env.reset(seed=0)[0]]
    observations += [env.step(np.array(action))[0] for action in SIMULATED_ACTIONS]

    assert dict(physics.values) == ADDED | stored["physics"]["values"]
    assert calibration.held_out.final_loss == stored["held_out"]["final_loss"]
    assert calibration.cost_table.device == stored["cost_table"]["device"]
    np.testing.assert_allclose(observations, simulated, atol=1e-4)


def test_runs_of_a_calibration_are_found_and_none_runs_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, table = written(place / "calibration" / "runs"), (place / "calibration" / "cost_table.json").read_bytes()
    [physics] = physics_of(["calibration"])
    monkeypatch.setattr(calibrate_command, "_precisions", lambda base, run: ["fp32"])  # what pays is the machine's
    monkeypatch.setattr(calibrate_command, "fit", lambda runs: physics)
    stored = read(place / "calibration" / "calibration.json")
    trainpilot(CALIBRATE, monkeypatch)
    again = read(place / "calibration" / "calibration.json")

    assert len(runs) == 14
    assert written(place / "calibration" / "runs") == runs
    assert (place / "calibration" / "cost_table.json").read_bytes() == table
    assert again["physics"] == FittedPhysics.from_json(stored["physics"]).to_json()
    assert again["physics"]["values"] == ADDED | stored["physics"]["values"]
    assert again["held_out"] == pytest.approx(stored["held_out"])
    assert again["fitted"] == pytest.approx(stored["fitted"])
    assert again["command"] == stored["command"]


# Policies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["default", "policy.safetensors", "zigzag.safetensors"])
def test_bundle_decides_the_same(place: Path, name: str) -> None:
    bundle, expected = PolicyBundle.load(policy_path(name)), read(place / "actions.json")[name]
    n_inputs = bundle.weights["hidden.0.weight"].shape[1]
    observations = np.random.default_rng(0).uniform(-1, 1, (20, n_inputs)).round(3)
    masks = np.ones(len(bundle.weights["action.bias"]), bool)

    assert [list(bundle.act(each, masks)) for each in observations] == expected["actions"]
    assert bundle.logits(observations[0]) == pytest.approx(expected["logits_of_first"], abs=1e-4)


@pytest.mark.slow
def test_killed_training_of_an_agent_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainpilot("train-agent --recipe recipe.yaml --out agent", monkeypatch)
    bundle = PolicyBundle.load(place / "agent" / "policy.safetensors")

    assert bundle.provenance["training_cost"]["decisions"] == 24
    assert bundle.provenance["ppo"] == read(place / "agent" / "recipe.json")["ppo"]
    assert bundle.weights.keys() == PolicyBundle.load(place / "policy.safetensors").weights.keys()
