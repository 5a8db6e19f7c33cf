"""Compare simulated instances of 10 M to 10 B weights with published sweeps: best settings, and costs of leaving them.

python benchmarks/instances_at_scale.py [--instances 400] [--physics FILE]
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _common import write_result

from trainpilot.llm_runtime.process import use_threads
from trainpilot.llm_runtime.schedules import neutral_factor
from trainpilot.llm_runtime.simulator.fitting import FittedPhysics
from trainpilot.llm_runtime.simulator.instances import Instances, Widening
from trainpilot.llm_runtime.simulator.records import Floats
from trainpilot.llm_runtime.simulator.references import References, ScheduleTable, static_losses
from trainpilot.llm_runtime.simulator.runs import Pool
from trainpilot.llm_runtime.simulator.shipped import published_sweeps, shipped_physics

SIZES = (1e7, 1e8, 1e9, 1e10)
LOST = 1.0
"""Runs this far above the tuned static, in nats/token, are lost."""
TUNED_AGAIN = np.geomspace(1 / 16, 16, 17)
PUBLISHED = {
    "rate x0.25": 0.024, "rate x0.5": 0.009, "rate x2": 0.020, "rate x4": 0.070, "batch x0.25": 0.022,
    "batch x4": 0.030, "batch x8": 0.069, "batch x4 at the same rate": 0.032,
}  # fmt: skip
"""Medians over 17 cells of Step Law's sweeps (Li et al. 2025, arXiv 2503.04715), in nats/token."""


def best_settings(instances: Instances, references: References, best: Floats) -> dict[str, Any]:
    """Return medians of the best learning rate and batch, and of both over Step Law's, by size, and their exponents."""
    tokens, batch = instances.sequences * instances.sequence_length, references.batch * instances.sequence_length
    over_rate, over_batch = best / instances.advice[:, 0], references.batch / instances.advice[:, 1]
    columns = {"tokens": tokens, "rate": best, "rate_over_law": over_rate, "batch_tokens": batch}
    columns["batch_over_law"] = over_batch
    found: dict[str, Any] = {}
    for low, high in pairwise(SIZES):
        mine = (instances.n_parameters >= low) & (instances.n_parameters < high)
        medians = {name: float(np.median(values[mine])) for name, values in columns.items()}
        found[f"{low:.0e} to {high:.0e}"] = {"instances": int(mine.sum()), **medians}
    logs = np.stack([np.ones(len(tokens)), np.log(instances.n_parameters), np.log(tokens)], axis=1)
    for name, values in (("rate", best), ("batch", batch)):
        exponents = np.linalg.lstsq(logs, np.log(values), rcond=None)[0]
        found[f"{name} exponents"] = {"weights": float(exponents[1]), "tokens": float(exponents[2])}
    return found


def penalties(instances: Instances, references: References, best: Floats) -> dict[str, Any]:
    """Return what leaving the best setting costs: median over the runs that are not lost, and the share that is."""
    table = ScheduleTable.of("wsd", 0.1, 50)

    def cost(rates: Floats, batch: float) -> dict[str, float]:
        size = np.maximum(references.batch * batch, 1.0)
        losses = [static_losses(instances, best * rate, size, table) for rate in rates]
        higher = np.minimum.reduce(losses) - references.losses[:, -1]
        return {"median": float(np.median(higher[higher < LOST])), "lost": float((higher >= LOST).mean())}

    found = {f"rate x{factor:g}": cost(np.array([factor]), 1.0) for factor in (0.25, 0.5, 2.0, 4.0)}
    found |= {f"batch x{factor:g}": cost(TUNED_AGAIN, factor) for factor in (0.25, 4.0, 8.0)}
    found["batch x4 at the same rate"] = cost(np.ones(1), 4.0)
    return {name: {**values, "published": PUBLISHED[name]} for name, values in found.items()}


def main() -> None:
    """Draw instances, compare them, and write `results/instances_at_scale.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=400)
    parser.add_argument("--physics", type=Path, help="published physics to draw around; by default those shipped")
    options = parser.parse_args()
    use_threads(1)
    if options.physics is None:
        published = published_sweeps()
    else:
        models = json.loads(options.physics.read_text(encoding="utf-8"))["models"]
        published = tuple(FittedPhysics.from_json(models[name]) for name in models if name.startswith("step-law"))
    widening = Widening(scratch=1.0, edges=1.0)
    pool = Pool.draw(options.instances, 0, shipped_physics(), widening, published=published)
    instances, references = pool.instances, pool.references
    best = references.rate * neutral_factor(references.batch.astype(np.float64), instances.start_batch)
    result = {
        "instances": options.instances,
        "best": best_settings(instances, references, best),
        "penalties": penalties(instances, references, best),
    }
    print(json.dumps(result, indent=2))
    print(write_result("instances_at_scale", result, torch.device("cpu")))


if __name__ == "__main__":
    main()
