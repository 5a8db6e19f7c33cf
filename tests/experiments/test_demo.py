"""The demo's table and verdict say what was measured, also where the steered run is worse."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trainpilot.agents import bundle
from trainpilot.experiments import replay
from trainpilot.experiments.demo import SWEEP_RATES, best_of, comparison, cost_of, demo, verdict
from trainpilot.experiments.options import DemoOptions, ReplayOptions


def summary(loss: float | None, *, energy_j: float | None = 5.0, time_s: float = 10.0, rate: float = 1e-3) -> Any:
    return {
        "model": "gpt2-micro",
        "n_parameters": 1000,
        "final_validation_loss": loss,
        "final_test_loss": loss,
        "tokens": 1000,
        "time_s": time_s,
        "energy_j": energy_j,
        "energy_source": "estimated",
        "n_changes": 3,
        "final_controls": {"learning_rate_scale": 2.0, "batch_size": 8, "precision": "bf16", "sparsity": 0.05},
        "diverged": loss is None,
        "base_learning_rate": rate,
    }


def swept(*losses: float | None, energy_j: float | None = 5.0) -> list[Any]:
    return [summary(loss, rate=rate, energy_j=energy_j) for loss, rate in zip(losses, SWEEP_RATES, strict=True)]


SWEEP = swept(2.4, 2.1, 2.0, None, 3.0)


def shown(*arguments: Any) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(comparison(*arguments))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_sweep_is_told_by_its_best_run_and_by_what_all_cost() -> None:
    assert best_of(SWEEP)["final_validation_loss"] == 2.0
    assert cost_of(SWEEP) == {"tokens": 5000, "time_s": 50.0, "energy_j": 25.0}
    assert cost_of([*SWEEP, summary(2.0, energy_j=None)])["energy_j"] is None


def test_the_table_has_untuned_steered_best_and_cost() -> None:
    text = shown(summary(2.5), summary(2.125), SWEEP)

    row = next(line for line in text.splitlines() if "validation" in line)
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["2.5000", "2.1250", "2.0000", "-"]
    row = next(line for line in text.splitlines() if "energy" in line)
    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["5.0", "5.0", "5.0", "25.0"]


def test_unknown_energy_is_shown_as_unknown() -> None:
    sweep = swept(2.4, 2.1, 2.0, None, 3.0, energy_j=None)
    row = next(
        line for line in shown(summary(2.5, energy_j=None), summary(2.1), sweep).splitlines() if "energy" in line
    )

    assert [cell.strip() for cell in row.split("│")[2:-1]] == ["-", "5.0", "-", "-"]


def test_the_verdict_tells_better_and_worse() -> None:
    said = verdict(summary(2.5), summary(2.125, energy_j=4.0), SWEEP)

    assert "0.3750 nats/token lower than untuned and 0.1250 nats/token higher than the sweep's best" in said
    assert "The sweep took 6.2 times the steered run's joules; its best run alone took 1.25 times" in said
    assert "edge" not in said
    assert "0.5000 nats/token higher than untuned" in verdict(summary(2.0), summary(2.5), SWEEP)


def test_the_verdict_turns_to_seconds_without_joules() -> None:
    said = verdict(summary(2.5), summary(2.1, energy_j=None), SWEEP)

    assert "The sweep took 5.0 times the steered run's seconds" in said


def test_the_verdict_warns_of_the_sweeps_edge_and_of_divergence() -> None:
    assert "edge of the sweep" in verdict(summary(2.5), summary(2.1), swept(2.0, 2.1, 2.2, None, 3.0))
    assert "diverged" in verdict(summary(2.5), summary(None), SWEEP)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[ReplayOptions]:
    made: list[ReplayOptions] = []

    def fake(options: ReplayOptions, console: Console) -> Any:
        made.append(options)
        rate = options.base_learning_rate
        assert rate != "auto"
        return summary(2.0 + rate, rate=rate)

    monkeypatch.setattr(replay, "replay", fake)
    return made


def test_all_runs_differ_only_in_what_they_compare(
    runs: list[ReplayOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from policies import random_weights

    bundle.PolicyBundle(random_weights(), {"training_cases": [{"model": "llama-nano"}]}).save(
        tmp_path / "default.safetensors"
    )
    monkeypatch.setattr(bundle, "POLICIES", tmp_path)
    console = Console(file=io.StringIO(), width=120)
    demo(DemoOptions(out=tmp_path / "out", seed=3), console)

    assert isinstance(console.file, io.StringIO)
    assert "which was not trained on gpt2-micro" in console.file.getvalue()
    base, steered, *sweep = runs
    assert (base.policy, steered.policy) == ("none", "default")
    assert {run.policy for run in sweep} == {"none"}
    assert base.base_learning_rate == steered.base_learning_rate == 3e-4
    assert [run.base_learning_rate for run in sweep] == list(SWEEP_RATES)
    assert {run.schedule for run in sweep} == {"wsd"}
    assert {run.warmup_tokens for run in sweep} == {60_000}
    assert {(run.model, run.tokens, run.batch_size, run.sequence_length, run.seed) for run in runs} == {
        ("gpt2-micro", 600_000, 8, 128, 3)
    }
    assert len({run.out for run in runs}) == len(runs)
    assert not base.probe
    assert steered.probe


def test_all_runs_of_a_demo_may_have_a_budget_in_seconds(runs: list[ReplayOptions], tmp_path: Path) -> None:
    demo(DemoOptions(out=tmp_path / "out", budget="30s"), Console(quiet=True))
    configs = [run.run_config(50) for run in runs]
    assert {config.budget for config in configs} == {"30s"}
    assert {config.warmup_share for config in configs[2:]} == {0.1}


def test_a_demo_without_its_policy_runs_nothing(
    runs: list[ReplayOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "POLICIES", tmp_path)
    with pytest.raises(ValueError, match="no policy named 'default'"):
        demo(DemoOptions(out=tmp_path / "out"), Console(quiet=True))
    assert runs == []
