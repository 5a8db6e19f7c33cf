"""`trainpilot inspect` shows a policy's origin and inputs, and why a run was steered as it was."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from decision_records import decision_record, write_run
from explained_runs import NOISE_BY_DECISION, planted, seen, steered
from policies import random_weights
from rich.console import Console

from trainpilot.agents import bundle as bundle_module
from trainpilot.agents.bundle import PolicyBundle, policy_digest
from trainpilot.agents.controller import DecisionRecord
from trainpilot.envs.action import KEEP
from trainpilot.experiments.inspect_policy import changes_to_explain
from trainpilot.experiments.inspect_run import inspect_path


def shown(path: Path, width: int = 100, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=width, **options)
    inspect_path(path, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def steered_run(folder: Path, **config: Any) -> list[DecisionRecord]:
    """Write a run of four decisions and the policy that steered it; the batch is doubled in the last two."""
    bundle = planted()
    bundle.save(folder / "policy.safetensors")
    records = steered(
        [seen(decision, noise_scale=noise, curvature=0.1) for decision, noise in enumerate(NOISE_BY_DECISION)], bundle
    )
    write_run(folder / "run", records)
    settings = {"policy": str(folder / "policy.safetensors")} | config
    (folder / "run" / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return records


def test_a_run_says_which_fields_moved_its_decisions(tmp_path: Path) -> None:
    steered_run(tmp_path, policy_digest=policy_digest(_saved(tmp_path)))
    text = shown(tmp_path / "run")

    line = next(line for line in text.splitlines() if line.startswith("2 ("))
    assert line.split("  ")[0] == "2 (50%)"
    assert "double, not keep" in " ".join(line.split())
    assert "noise_scale (2.75, high) +1.5" in line
    row = next(line for line in text.split("Mean effect")[1].splitlines() if line.startswith("noise_scale"))
    assert float(row.split()[1]) == pytest.approx(0.525, abs=0.0051)
    assert "has changed since" not in text
    assert "would repeat only" not in text
    assert max(map(len, text.partition("Why:")[2].splitlines())) <= 100


def _saved(folder: Path) -> Path:
    planted().save(folder / "policy.safetensors")
    return folder / "policy.safetensors"


def test_a_policy_that_has_changed_since_is_told(tmp_path: Path) -> None:
    steered_run(tmp_path, policy_digest="0123")
    PolicyBundle(random_weights()).save(tmp_path / "policy.safetensors")
    text = " ".join(shown(tmp_path / "run").split())

    assert "has changed since it steered this run." in text
    assert "would repeat only" in text


def test_a_run_whose_policy_is_gone_is_shown_without_reasons(tmp_path: Path) -> None:
    steered_run(tmp_path)
    (tmp_path / "policy.safetensors").unlink()
    text = " ".join(shown(tmp_path / "run").split())

    assert "4 decisions" in text
    assert "The decisions cannot be explained: policy: no file" in text


@pytest.mark.parametrize("config", ['{"policy": "none"}', "{", "[]"])
def test_a_run_without_a_policy_needs_no_reasons(tmp_path: Path, config: str) -> None:
    write_run(tmp_path, [decision_record(0)])
    (tmp_path / "config.json").write_text(config, encoding="utf-8")

    assert "Why" not in shown(tmp_path)


def test_the_largest_moves_of_the_rate_and_all_other_changes_are_explained() -> None:
    rates = (4, 6, 0, 5, 6, 3, 2)  # x1.19, x2, x0.5, x1.41, x2, x1, x0.84
    records = [
        decision_record(decision, requested=(rate, *KEEP[1:]), allowed=(rate, *KEEP[1:]))
        for decision, rate in enumerate(rates)
    ]
    double = (3, 2, 0, 0, 0)
    records[5] = replace(records[5], requested=double, allowed=double)
    records[6] = replace(records[6], requested=(2, 2, 0, 0, 0))  # the safety layer let none of it through
    records[6] = replace(records[6], allowed=KEEP)

    # Up x1.19 x 2 = x2.38, down x0.5, up x1.41 x 2 = x2.82; the last move was refused.
    found = [(change.decision, change.control, change.n_decisions) for change in changes_to_explain(records)]
    assert found == [(1, 0, 2), (2, 0, 1), (4, 0, 2), (5, 1, 1)]
    factors = [change.factor for change in changes_to_explain(records)]
    assert factors == pytest.approx([2.38, 0.5, 2.82, 1.0])


@pytest.mark.parametrize(("rate", "factor"), [(0, 2.0**-1000), (6, 2.0**1000)])
def test_a_move_beyond_all_bounds_is_still_a_move(rate: int, factor: float) -> None:
    step = (rate, *KEEP[1:])
    records = [decision_record(decision % 4, requested=step, allowed=step) for decision in range(1500)]
    (move,) = changes_to_explain(records)
    assert (move.n_decisions, move.factor) == (1500, factor)


def test_a_policy_shows_where_it_comes_from_and_what_it_reads(tmp_path: Path) -> None:
    provenance = {
        "recipe": "default",
        "decisions": 40,
        "base_schedule": {"schedule": "wsd", "warmup_share": 0.1},
        "training_cost": {"energy_j": 123456.7, "time_s": 12.5, "simulator": {"decisions": None}},
        "scores": {"compute_multiplier": 0.875, "cases": "8 test cases"},
    }
    PolicyBundle(planted().weights, provenance).save(tmp_path / "p.safetensors")
    text = shown(tmp_path / "p.safetensors")
    rows = {line.split("  ")[0]: line.split("  ")[-1].strip() or line for line in map(str.rstrip, text.splitlines())}

    assert rows["base schedule"] == "wsd, warm-up over 10 % of the budget"
    assert rows["decisions per run"] == "40"
    assert rows["digest"] == policy_digest(tmp_path / "p.safetensors")
    assert rows["energy_j"] == "123,457"
    assert rows["simulator.decisions"] == "unknown"
    assert rows["compute_multiplier"] == "0.875"
    assert rows["recipe"] == "default"
    assert rows["curvature"] == "61.3%", "5 / (5 + sqrt 10)"
    bars = {line.split()[0]: line.count("█") for line in text.splitlines() if "█" in line}
    assert bars == {"curvature": 40, "noise_scale": 25}
    assert max(map(len, text.splitlines())) <= 100


def test_the_shipped_policy_fits_one_screen() -> None:
    texts = {}
    for everything in (False, True):
        console = Console(file=io.StringIO(), width=80)
        inspect_path(Path("default"), console, everything=everything)
        assert isinstance(console.file, io.StringIO)
        texts[everything] = console.file.getvalue()

    assert len(texts[False].splitlines()) <= 50
    assert "more settings of its training: add --all" in texts[False]
    assert "simulator.ppo.gamma" not in texts[False]
    assert "simulator.ppo.gamma" in texts[True]
    assert "add --all" not in texts[True]


def test_a_policy_without_provenance_and_a_terminal_without_unicode_do(tmp_path: Path) -> None:
    PolicyBundle(random_weights()).save(tmp_path / "p.safetensors")
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    inspect_path(tmp_path / "p.safetensors", Console(file=file, width=100))
    file.flush()

    assert isinstance(file.buffer, io.BytesIO)
    said = file.buffer.getvalue()
    assert b"none of its own: linear with 2 % warm-up" in said
    assert b"####" in said


def test_a_name_is_a_policy_that_comes_with_trainpilot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policies, place = tmp_path / "policies", tmp_path / "place"
    policies.mkdir()
    place.mkdir()
    PolicyBundle(random_weights()).save(policies / "default.safetensors")
    monkeypatch.setattr(bundle_module, "POLICIES", policies)
    monkeypatch.chdir(place)

    assert str(policies / "default.safetensors") in shown(Path("default"), width=200)
    with pytest.raises(ValueError, match="got nowhere; policies that come with trainpilot: default"):
        inspect_path(Path("nowhere"), Console(quiet=True))
    write_run(place / "default", [decision_record(0)])
    assert "not finished at 25%" in shown(Path("default")), "what exists comes first"


def test_an_agents_folder_shows_its_policy(tmp_path: Path) -> None:
    PolicyBundle({name: np.zeros_like(value) for name, value in random_weights().items()}).save(
        tmp_path / "policy.safetensors"
    )
    assert f"tensorboard --logdir {tmp_path / 'tb'}" in shown(tmp_path, width=20)
