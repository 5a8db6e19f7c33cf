"""One run of a comparison: a policy is judged within the guardrails that replay puts around it, or without them."""

from __future__ import annotations

import io
import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from live_runs import case
from policies import zigzag_bundle
from rich.console import Console

from trainpilot.agents.steering.guardrails import GuardrailSettings
from trainpilot.experiments.compare.execute import execute
from trainpilot.experiments.options import ReplayOptions
from trainpilot.experiments.replay import replay
from trainpilot.experiments.results import RunResult, RunSpec, SteeringSpec
from trainpilot.llm_runtime.config import Controls
from trainpilot.llm_runtime.energy.meter import NoMeter
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.telemetry import Telemetry

DECISIONS = 5
SHORT: dict[str, Any] = {"tokens": 6_400, "batch_size": 4, "sequence_length": 64, "decisions": DECISIONS}


@pytest.fixture(autouse=True)
def one_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the tests the measurement of which number formats pay."""
    monkeypatch.setattr(LiveRun, "_masked_precisions", lambda run: dict.fromkeys(("tf32", "bf16", "fp16"), "a test"))


def policy_run(folder: Path, *, guarded: bool) -> RunResult:
    zigzag_bundle(folder / "policy.safetensors")
    settings: dict[str, Any] = {"path": str(folder / "policy.safetensors"), "preference": "quality=1"}
    if guarded:
        settings["guardrails"] = asdict(GuardrailSettings())
    steering = SteeringSpec(kind="policy", settings=settings, probe=True)
    return execute(RunSpec(config=case(folder, **SHORT), steering=steering), "ab", meter=NoMeter("a test"))


def test_a_policy_does_in_a_comparison_what_it_does_in_a_replay(tmp_path: Path) -> None:
    judged = policy_run(tmp_path, guarded=True)
    config = judged.spec.config
    options = ReplayOptions(
        out=tmp_path / "replayed", policy=str(tmp_path / "policy.safetensors"), preference="quality=1",
        model=config.model, text=config.text, tokens=config.tokens, batch_size=config.batch_size,
        sequence_length=config.sequence_length, decisions=config.decisions, schedule=config.schedule,
        warmup_tokens=config.warmup_tokens, base_learning_rate=config.base_learning_rate, device=config.device,
    )  # fmt: skip
    replayed = replay(options, Console(file=io.StringIO()))
    lines = (options.out / "telemetry.jsonl").read_text().splitlines()
    telemetry = [json.loads(line)["telemetry"] for line in lines]

    assert judged.failure is None
    assert judged.guardrails == {name: replayed[name] for name in judged.guardrails or ()}
    assert [each["train_loss"] for each in telemetry] == [interval.train_loss for interval in judged.intervals]
    assert [each["learning_rate"] for each in telemetry] == [interval.learning_rate for interval in judged.intervals]
    assert replayed["final_validation_loss"] == judged.final_validation_loss
    assert replayed["final_test_loss"] == judged.final_test_loss


def broken_once(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Let the interval that is trained as the `call`-th lose its loss."""
    advance, calls = LiveRun.advance, 0

    def broken(run: LiveRun, controls: Controls, share: float) -> Telemetry:
        nonlocal calls
        calls += 1
        telemetry = advance(run, controls, share)
        return replace(telemetry, train_loss=math.nan, diverged=True) if calls == call else telemetry

    monkeypatch.setattr(LiveRun, "advance", broken)


def test_what_was_rolled_back_is_marked_and_paid_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_once(monkeypatch, call=3)
    result = policy_run(tmp_path, guarded=True)
    undone = [interval for interval in result.intervals if interval.rolled_back]

    assert not result.diverged
    assert result.usable
    assert result.guardrails is not None
    assert [each["reason"] for each in result.guardrails["rollbacks"]] == ["training loss is not finite"]
    assert undone[-1].train_loss is None
    assert len(result.intervals) == DECISIONS + len(undone)
    extra = len(undone) * result.spec.config.tokens // DECISIONS
    assert result.tokens == result.spec.config.tokens + extra
    tokens = [interval.tokens for interval in result.intervals]
    assert tokens == sorted(set(tokens))
    assert RunResult.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_without_guardrails_a_run_that_diverges_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_once(monkeypatch, call=3)
    result = policy_run(tmp_path, guarded=False)

    assert result.diverged
    assert not result.usable
    assert result.guardrails is None
    assert len(result.intervals) == 3
    assert not any(interval.rolled_back for interval in result.intervals)
