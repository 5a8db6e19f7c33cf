"""Give a decision as numbers, for the logs that a framework keeps itself."""

from __future__ import annotations

import math

from trainpilot.agents.run_record import DecisionRecord
from trainpilot.agents.tags import TAGS
from trainpilot.llm_runtime.config import PRECISIONS


def scalars(record: DecisionRecord) -> dict[str, float]:
    """Return what is logged of a decision, under the names of the table in `docs/metrics.md`."""
    told, asked = record.telemetry, record.telemetry.requested
    values: dict[str, float | None] = {
        "loss/train": told.train_loss,
        "loss/validation": told.validation_loss,
        "controls_requested/learning_rate_scale": asked.learning_rate_scale,
        "controls_requested/batch_size": asked.batch_size,
        "controls_requested/precision": PRECISIONS.index(asked.precision),
        "controls_requested/sparsity": asked.sparsity,
        "controls_effective/learning_rate": told.learning_rate,
        "controls_effective/batch_size": told.batch_size,
        "controls_effective/sparsity": told.sparsity,
        "controls_effective/finishing": told.finishing,
        "gradient/norm": told.gradient_norm,
        "gradient/noise_scale": told.noise_scale,
        "energy/interval": told.energy_j,
        "energy/power": told.power_w,
        "speed/interval": told.time_s,
        "speed/tokens_per_s": told.tokens_per_s,
        "run/budget_used": told.budget_used,
        "run/decision": told.decision,
    }
    known = {TAGS[name].name: float(value) for name, value in values.items() if value is not None}
    return {name: value for name, value in known.items() if math.isfinite(value)}
