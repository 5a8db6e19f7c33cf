"""A run that goes back to a snapshot goes on bit for bit as it did: the same object, and a fresh one from a file."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_runs import DROPOUT, GPT2, LLAMA, advance, case, live_run, same_bits, weights

from trainpilot.llm_runtime.config import Controls
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.telemetry import Snapshot

MEASURED = ("time_s", "probe_time_s", "switch_time_s", "evaluation_time_s", "memory_share")

CASES: dict[str, tuple[dict[str, Any], str]] = {
    "llama-none": (LLAMA, "none"),
    "llama-magnitude": (LLAMA, "magnitude"),
    "llama-evolution": (LLAMA, "evolution"),
    "llama-width": (LLAMA, "width"),
    "gpt2-dropout": (GPT2 | DROPOUT, "none"),
    "gpt2-dropout-evolution": (GPT2 | DROPOUT, "evolution"),
    "gpt2-dropout-width": (GPT2 | DROPOUT, "width"),
}


def before(pruning: str) -> list[dict[str, Any]]:
    """Return the controls up to the snapshot: every control has moved once."""
    pruned = 0.0 if pruning == "none" else 0.25
    return [{}, {"batch_size": 4, "sparsity": pruned, "precision": "bf16", "learning_rate_scale": 1.4}]


def after(pruning: str) -> list[dict[str, Any]]:
    """Return the controls after the snapshot: every control moves again, and the run ends early."""
    pruned = [0.0, 0.0, 0.0] if pruning == "none" else [0.25, 0.5, 0.6]
    return [
        {"batch_size": 4, "sparsity": pruned[0], "precision": "bf16"},
        {"batch_size": 1, "sparsity": pruned[1], "precision": "fp32"},
        {"batch_size": 3, "sparsity": pruned[2], "precision": "bf16", "finish": True},
    ]


def go_on(run: LiveRun, controls: list[dict[str, Any]]) -> list[str]:
    """Train under `controls`; return all that was measured but seconds and memory, as text: NaN equals NaN there."""
    records = []
    for changes in controls:
        record = asdict(advance(run, **changes))
        records.append(repr({key: value for key, value in record.items() if key not in MEASURED}))
    return records


@pytest.mark.parametrize("name", CASES)
def test_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    model, pruning = CASES[name]
    config = case(tmp_path, model, pruning=pruning)
    run = live_run(config, probe=True)
    go_on(run, before(pruning))
    snapshot = run.snapshot()
    torch.save(snapshot, tmp_path / "snapshot.pt")
    start = weights(run)
    expected, end = go_on(run, after(pruning)), weights(run)
    loss = run.evaluate()
    assert not same_bits(start, end)
    assert run.finished

    torch.manual_seed(999)  # nobody else's random numbers matter
    run.restore(snapshot)
    assert not run.finished
    assert same_bits(weights(run), start)
    assert go_on(run, after(pruning)) == expected
    assert same_bits(weights(run), end)

    fresh = live_run(config, probe=True)
    fresh.restore(torch.load(tmp_path / "snapshot.pt", weights_only=True))
    assert same_bits(weights(fresh), start)
    assert go_on(fresh, after(pruning)) == expected
    assert same_bits(weights(fresh), end)
    assert fresh.evaluate() == loss


@pytest.mark.parametrize("pruning", ["none", "magnitude", "evolution", "width"])
def test_goes_back_to_before_the_first_step(pruning: str, tmp_path: Path) -> None:
    config = case(tmp_path, pruning=pruning)
    run = live_run(config, probe=True)
    snapshot, start = run.snapshot(), weights(run)
    controls = before(pruning) + after(pruning)
    expected, end = go_on(run, controls), weights(run)

    run.restore(snapshot)

    assert same_bits(weights(run), start)
    assert go_on(run, controls) == expected
    assert same_bits(weights(run), end)


def test_goes_back_into_the_middle_of_a_cool_down(tmp_path: Path) -> None:
    run = live_run(case(tmp_path, decisions=50), probe=True)
    go_on(run, [{}] * 25 + [{"finish": True}] * 2)
    snapshot = run.snapshot()
    expected, end = go_on(run, [{}] * 3), weights(run)

    fresh = live_run(run.config, probe=True)
    fresh.restore(snapshot)

    assert go_on(fresh, [{}] * 3) == expected
    assert fresh.finished
    assert same_bits(weights(fresh), end)


def test_one_snapshot_serves_many_times(tmp_path: Path) -> None:
    run = live_run(case(tmp_path, pruning="evolution"))
    go_on(run, before("evolution"))
    snapshot = run.snapshot()

    def content(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: content(value) for key, value in part.items()}
        return part.tolist() if isinstance(part, torch.Tensor) else part

    expected = content(snapshot)
    for _ in range(2):
        run.restore(snapshot)
        go_on(run, after("evolution"))
        assert content(snapshot) == expected


def test_two_runs_of_one_seed_are_equal_and_of_two_seeds_are_not(tmp_path: Path) -> None:
    records = [go_on(live_run(case(tmp_path, seed=seed), probe=True), before("none")) for seed in (0, 0, 1)]
    assert records[0] == records[1] != records[2]


def test_snapshot_holds_nothing_that_could_run_code(tmp_path: Path) -> None:
    run = live_run(case(tmp_path))
    # A policy's choices may come as NumPy numbers, which a file of weights may not hold.
    advance(run, batch_size=np.int64(4), learning_rate_scale=np.float64(0.5))
    torch.save(run.snapshot(), tmp_path / "snapshot.pt")

    loaded: Snapshot = torch.load(tmp_path / "snapshot.pt", weights_only=True)

    assert loaded["trainer"]["batch_size"] == 4


def test_a_snapshot_holds_the_controls_as_plain_numbers(tmp_path: Path) -> None:
    run = live_run(case(tmp_path))
    numbers: dict[str, Any] = {"batch_size": np.int64(2), "learning_rate_scale": np.float64(1.4)}
    run.trainer.controls = Controls(**numbers)
    snapshot = run.snapshot()
    kept = {name: snapshot["trainer"][name] for name in asdict(run.trainer.controls)}

    assert repr(kept) == repr(asdict(Controls(batch_size=2, learning_rate_scale=1.4)))
    run.check_snapshot(snapshot)
    for name, value in (("learning_rate_scale", -1.0), ("sparsity", 1.5), ("finish", "perhaps"), ("precision", "fp64")):
        with pytest.raises(ValueError, match=name):
            run.check_snapshot({**snapshot, "trainer": {**snapshot["trainer"], name: value}})
    for name in ("batch_size", "precision"):
        without = {key: value for key, value in snapshot["trainer"].items() if key != name}
        with pytest.raises(ValueError, match=f"missing or unknown: {name}"):
            run.check_snapshot({**snapshot, "trainer": without})
