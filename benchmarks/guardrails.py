"""Compare the shipped policy within guardrails with the same policy without them, run by run.

    python benchmarks/guardrails.py [--policy default] [--out runs/guardrails] [--preferences quality=1] [--seeds 3]

Both steer the test cases from 0.1 to 10 times the tuned learning rate in `results/baselines.json`, with the same seeds.
Final losses are compared pair by pair. They are also converted to tokens by the tuned static's budget curve of the same
file: the budget at which the tuned setting reaches the one loss, over the budget for the other. If the guardrails
refused nothing, a pair differs only because the policy observes measured time and power.

If the command is interrupted, the same command resumes it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml
from _common import RESULTS, write_result
from zero_shot import PREFERENCES, STARTS, load

from trainpilot.agents.bundle import policy_digest, policy_path
from trainpilot.experiments.analysis.modelled_cost import Runs
from trainpilot.llm_runtime.files import whole_file

DIGITS = 5


def main() -> None:
    """Run both forms of the policy and write `results/guardrails.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="default", help="a bundle's file, or the name of one that is shipped")
    parser.add_argument("--out", type=Path, default=Path("runs/guardrails"))
    parser.add_argument("--cases", nargs="*", help="names of test cases; all of them by default")
    parser.add_argument("--preferences", nargs="+", default=list(dict.fromkeys(PREFERENCES.values())))
    parser.add_argument("--starts", nargs="+", default=STARTS, help="factors of the tuned learning rate")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=0)
    parser.add_argument("--name", default="guardrails", help="name of the result file")
    options = parser.parse_args()
    baselines = json.loads((RESULTS / "baselines.json").read_text(encoding="utf-8"))
    cases = options.cases or list(baselines["tuned"])
    write_cases(options.out / "cases.yaml", baselines, cases, options.starts)
    methods = [f"policy:{options.policy}@{p}{form}" for p in options.preferences for form in ("", "@unguarded")]
    command = ["compare", "--cases", str(options.out / "cases.yaml"), "--methods", ",".join(methods)]
    command += ["--out", str(options.out), "--seeds", str(options.seeds), "--jobs", str(options.jobs)]
    subprocess.run([sys.executable, "-m", "trainpilot.experiments.cli", *command], check=True)
    runs = load(options.out)
    result = {
        "policy": {"name": options.policy, "digest": policy_digest(policy_path(options.policy))},
        "compare": {"cases": cases, "starts": options.starts, "seeds": list(runs.comparison.seeds)},
        "preferences": {
            preference: compared(runs, baselines, cases, options.starts, f"policy:{options.policy}@{preference}")
            for preference in options.preferences
        },
    }
    print(write_result(options.name, result, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    for preference, found in result["preferences"].items():
        print(f"{preference}: {found['all']}")


def write_cases(path: Path, baselines: dict[str, Any], names: Sequence[str], starts: Sequence[str]) -> None:
    """Write the test cases once for each start, with the corresponding learning rates."""
    text = files("trainpilot.experiments.compare").joinpath("sets/test.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    content["cases"] = [
        {
            **case,
            "name": f"{case['name']}.start-{start}",
            "base_learning_rate": float(start) * tuned_rate(baselines, name),
        }
        for case in content["cases"]
        if (name := case["name"]) in names
        for start in starts
    ]
    with whole_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def tuned_rate(baselines: dict[str, Any], case: str) -> float:
    """Return the learning rate of the tuned static at equal tokens."""
    return next(float(found["base_learning_rate"]) for found in baselines["tuned"][case] if found["axis"] == "tokens")


def compared(
    runs: Runs, baselines: dict[str, Any], cases: Sequence[str], starts: Sequence[str], method: str
) -> dict[str, Any]:
    """Return all pairs of runs, with summaries by start, with and without an intervention, and over all."""
    pairs = []
    for case in cases:
        curve = next(
            c for c in baselines["curves"] if (c["case"], c["baseline"], c["axis"]) == (case, "tuned", "tokens")
        )
        for start in starts:
            forms = (method, f"{method}@unguarded")
            held, bare = ({run.row.seed: run.result for run in runs.of(f"{case}.start-{start}", m)} for m in forms)
            pairs += [
                {"case": case, "start": start, "seed": seed, **pair(held[seed], bare[seed], curve)}
                for seed in sorted(held.keys() & bare.keys())
            ]
    interventions = {
        "refused or rolled back": [p for p in pairs if p["refusals"] or p["rollbacks"]],
        "nothing refused": [p for p in pairs if not (p["refusals"] or p["rollbacks"])],
    }
    return {
        "all": summary(pairs),
        "by_start": {start: summary([p for p in pairs if p["start"] == start]) for start in starts},
        "by_intervention": {name: summary(found) for name, found in interventions.items()},
        "pairs": pairs,
    }


def pair(held: Any, bare: Any, curve: dict[str, Any]) -> dict[str, Any]:
    """Return both final losses, their difference, the ratio of their budgets, and the guardrails' interventions."""
    did = held.guardrails or {}
    losses = {"guarded": held.final_validation_loss, "unguarded": bare.final_validation_loss}
    known = None not in losses.values()
    return {
        "loss": {name: rounded(value) for name, value in losses.items()},
        "nats_saved": rounded(losses["unguarded"] - losses["guarded"]) if known else None,
        "tokens_ratio": (
            rounded(
                budget_of(losses["guarded"], curve) / budget_of(losses["unguarded"], curve) * bare.tokens / held.tokens
            )
            if known
            else None
        ),
        "refusals": sum(did.get("refusals", {}).values()),
        "rollbacks": len(did.get("rollbacks", ())),
        "fallen_back": bool(did.get("fallen_back")),
    }


def budget_of(loss: float, curve: dict[str, Any]) -> float:
    """Return the tokens at which the tuned static reaches a loss; log-log interpolation, extrapolated at both ends."""
    x, y = np.log(curve["budgets"]), np.log(curve["losses"])
    place = int(np.clip(np.searchsorted(-y, -np.log(loss)), 1, len(x) - 1))
    slope = (x[place] - x[place - 1]) / (y[place] - y[place - 1])
    return float(np.exp(x[place - 1] + slope * (np.log(loss) - y[place - 1])))


def summary(pairs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return medians over the pairs, and how often each form had the lower loss or failed."""
    saved = [p["nats_saved"] for p in pairs if p["nats_saved"] is not None]
    return {
        "n_pairs": len(pairs),
        "n_failed": {form: sum(p["loss"][form] is None for p in pairs) for form in ("guarded", "unguarded")},
        "median_nats_saved": rounded(median(saved)) if saved else None,
        "quartiles_nats_saved": [rounded(q) for q in np.quantile(saved, (0.25, 0.75))] if saved else None,
        "median_tokens_ratio": rounded(median([p["tokens_ratio"] for p in pairs if p["tokens_ratio"]]))
        if saved
        else None,
        "guarded_lower": sum(value > 0 for value in saved),
        "n_with_intervention": sum(bool(p["refusals"] or p["rollbacks"]) for p in pairs),
    }


def rounded(value: float | None) -> float | None:
    """Round a number to a few significant digits."""
    return None if value is None else float(f"{value:.{DIGITS}g}")


if __name__ == "__main__":
    main()
