"""Drive the rules that steer a run through telemetry made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fakes import make_telemetry

from trainpilot.llm_runtime.config import Controls, RunConfig
from trainpilot.llm_runtime.drive import RunController

CONSTANT = RunConfig(
    tokens=100_000, batch_size=8, sequence_length=10, decisions=100, schedule="constant", warmup_tokens=0
)


def steer(controller: RunController, n: int, **series: Sequence[Any]) -> list[Controls]:
    """Return the controls of `n` decisions of a run of `n`; `series` gives telemetry fields, interval by interval."""
    decided: list[Controls] = []
    telemetry = None
    for decision in range(n):
        controls = controller.decide(telemetry)
        if controls is None:
            break
        decided.append(controls)
        measured = {name: values[min(decision, len(values) - 1)] for name, values in series.items()}
        share = (decision + 1) / n
        place = {"decision": decision, "budget_used": share, "tokens": round(share * CONSTANT.tokens)}
        telemetry = make_telemetry(**place, requested=controls, **measured)
    return decided


def scales(decided: list[Controls]) -> list[float]:
    return [controls.learning_rate_scale for controls in decided]


def batches(decided: list[Controls]) -> list[int]:
    return [controls.batch_size for controls in decided]
