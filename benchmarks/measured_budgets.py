"""Measure how near runs under budgets in seconds and joules end, by a clock and a meter beside the run's own.

Each run is steered by the shipped policy within its guardrails, or goes under its base schedule. What is measured lies
between the first interval and the evaluation after the last one. The target is 2 % of the budget.

    python benchmarks/measured_budgets.py [--models llama-nano gpt2-micro] [--budgets 10s 60s 300J] [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from _common import write_result

from trainpilot.agents.bundle import PolicyBundle, policy_path
from trainpilot.agents.controller import Controller, keep
from trainpilot.agents.steering.guarded_controller import GuardedController, RollbackController
from trainpilot.agents.steering.guardrails import UNGUARDED, Guardrails
from trainpilot.envs.decision import Preference
from trainpilot.llm_runtime.budget import Budget
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.drive import drive
from trainpilot.llm_runtime.live_run import LiveRun
from trainpilot.llm_runtime.process import use_threads

TARGET = 0.02
POLICIES = ("none", "default")


def measure(model: str, budget: str, policy: str) -> dict[str, Any]:
    """Train one run to its end, and return how near it ended."""
    bundle = PolicyBundle.load(policy_path(policy)) if policy != "none" else None
    config = RunConfig(model=model, budget=budget, batch_size=8, sequence_length=64, warmup_share=0.1)
    if bundle is not None and bundle.base_schedule is not None:
        config = bundle.base_schedule.on(config)
    run = LiveRun(config)
    if bundle is not None:
        guarded = GuardedController.of_bundle(bundle, run.limits(), Preference())
    else:
        guarded = GuardedController(Controller(keep, run.base_limits(), Preference()), Guardrails(UNGUARDED))
    controller = RollbackController(guarded, run)
    run.evaluate()
    start_s, before = time.perf_counter(), run.meter.read().energy_j
    last = None
    for interval in drive(run, controller.decide, config.decisions, can_roll_back=lambda: controller.can_roll_back):
        last = guarded.record(interval.telemetry).telemetry
    time_s, after = time.perf_counter() - start_s, run.meter.read().energy_j
    asked = Budget.parse(budget)
    energy_j = None if before is None or after is None else after - before
    used = time_s if asked.currency == "time_s" else energy_j
    assert last is not None
    assert used is not None
    return {
        "model": model,
        "budget": budget,
        "policy": policy,
        "used": used,
        "relative_error": used / asked.amount - 1,
        "counted_by_the_run": run.spent,
        "decisions": last.decision + 1,
        "tokens": last.tokens,
        "expected_tokens": run.tokens,
        "last_over_highest_learning_rate": last.learning_rate
        / max(record.telemetry.learning_rate for record in guarded.records),
        "time_s": time_s,
        "energy_j": energy_j,
        "energy_source": last.energy_source,
    }


def main() -> None:
    """Measure the runs named on the command line and write `results/measured_budgets.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["llama-nano", "gpt2-micro"])
    parser.add_argument("--budgets", nargs="+", default=["10s", "60s", "300J"])
    parser.add_argument("--threads", type=int, default=1, help="torch threads, 0 for all cores")
    options = parser.parse_args()
    use_threads(options.threads)
    results = []
    for model in options.models:
        for budget in options.budgets:
            for policy in POLICIES:
                results.append(measure(model, budget, policy))
                error = results[-1]["relative_error"]
                print(f"{model}, {budget}, policy {policy}: {error:+.2%} (target {TARGET:.0%})", flush=True)
    worst = max(abs(result["relative_error"]) for result in results)
    figures = {"target": TARGET, "worst": worst, "target_met": worst <= TARGET, "results": results}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(write_result("measured_budgets", figures, device))


if __name__ == "__main__":
    main()
