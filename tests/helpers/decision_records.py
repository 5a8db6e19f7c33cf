"""Decisions and reference runs made by hand, for tests of what is written and drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainpilot.agents.controller import DecisionRecord
from trainpilot.envs.action import KEEP, Action
from trainpilot.envs.decision import Advice
from trainpilot.envs.observation import OBSERVATION_FIELDS
from trainpilot.envs.reward import Reference, RewardTerms
from trainpilot.llm_runtime.config import Controls
from trainpilot.llm_runtime.telemetry import Telemetry

INTERVAL_TOKENS = 1000


def interval_telemetry(decision: int, n_decisions: int = 4, **changes: Any) -> Telemetry:
    tokens = (decision + 1) * INTERVAL_TOKENS
    values: dict[str, Any] = {
        "decision": decision,
        "budget_used": (decision + 1) / n_decisions,
        "tokens": tokens,
        "interval_tokens": INTERVAL_TOKENS,
        "steps": 10,
        "epochs_seen": 0.1,
        "train_loss": 5.0 - decision,
        "train_loss_std": 0.1,
        "train_loss_max": 5.5 - decision,
        "validation_loss": None if decision == 0 else 5.1 - decision,
        "gradient_norm": 0.8,
        "clipped_share": 0.25,
        "noise_scale": 12.0,
        "relative_update": 1e-3,
        "probe_linear": -0.02,
        "probe_quadratic": 0.01,
        "requested": Controls(batch_size=8, learning_rate_scale=2.0, precision="bf16", sparsity=0.05),
        "learning_rate": 1e-3,
        "batch_size": 7.5,
        "micro_batch_size": 4,
        "precision": "bf16",
        "sparsity": 0.049,
        "finishing": False,
        "finished": decision == n_decisions - 1,
        "diverged": False,
        "time_s": 2.0,
        "probe_time_s": 0.5,
        "switch_time_s": 0.25,
        "evaluation_time_s": 1.0,
        "energy_j": 10.0,
        "energy_source": "measured_counter",
        "power_w": 5.0,
        "memory_share": 0.3,
    }
    return Telemetry(**(values | changes))


def decision_record(
    decision: int,
    *,
    requested: Action = KEEP,
    allowed: Action = KEEP,
    refusals: tuple[str, ...] = (),
    masked: dict[str, str] | None = None,
    advice: Advice | None = None,
    **changes: Any,
) -> DecisionRecord:
    return DecisionRecord(
        telemetry=interval_telemetry(decision, **changes),
        requested=requested,
        allowed=allowed,
        refusals=refusals,
        masked={"precision tf32": "an NVIDIA GPU format"} if masked is None else masked,
        observation={field.name: 0.5 for field in OBSERVATION_FIELDS},
        reward=RewardTerms(quality=0.25, energy=-0.2, time=-0.1),
        advice=advice,
    )


def decision_records(n_decisions: int = 4) -> list[DecisionRecord]:
    return [decision_record(decision, n_decisions=n_decisions) for decision in range(n_decisions)]


def reference_run(n_decisions: int = 4) -> Reference:
    telemetry = tuple(
        interval_telemetry(
            decision,
            n_decisions,
            train_loss=6.0 - decision,
            requested=Controls(batch_size=8),
            precision="fp32",
            energy_j=20.0,
        )
        for decision in range(n_decisions)
    )
    return Reference(
        budgets=(0.5, 1.0),
        losses=(4.0, 3.0),
        initial_loss=6.5,
        time_s=2.0 * n_decisions,
        energy_j=20.0 * n_decisions,
        energy_source="measured_counter",
        telemetry=telemetry,
    )


def write_run(folder: Path, records: list[DecisionRecord]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(record.to_json()) + "\n" for record in records)
    (folder / "telemetry.jsonl").write_text(lines, encoding="utf-8")
