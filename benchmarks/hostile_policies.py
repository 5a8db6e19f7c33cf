"""Measure what hostile policies can do to a run within guardrails, with and without a quality contract.

    python benchmarks/hostile_policies.py [--seeds 2] [--policies "always up,flips"] [--contracts none,reference]

Every policy of `_hostile.HOSTILE` steers a run of seconds (`_hostile.SmallRun`), once without a contract and once under
each kind of contract. Figures are validation losses minus that of the base schedule of the same seed, in nats/token;
what a paired contract trains twice is a share of the plain run's sequences and seconds. The shipped policy steers the
same runs, and runs that start at a tenth of the tuned rate and at ten times it. `--tune` searches the rate. It takes
about half an hour.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

import torch
from _common import RESULTS, write_result
from _hostile import HOSTILE, SEQUENCES, TUNED_RATE, SmallRun, default

from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.steering.contract import QualityContract

MAX_LOSS_INCREASE = 0.01
NO_LIMIT = 1e9
"""Bound on the slowdown: seconds are left out, as the processor is shared."""

Records = Sequence[DecisionRecord]


def _terms(**terms: Any) -> dict[str, Any]:
    return {"max_loss_increase": MAX_LOSS_INCREASE, "max_slowdown": NO_LIMIT, **terms}


def _against(base: Records, **terms: Any) -> QualityContract:
    return QualityContract.against(base, **_terms(reference_s_per_token=None, **terms))


CONTRACTS: Mapping[str, tuple[Callable[[Records], QualityContract | None], bool]] = {
    "none": (lambda base: None, False),
    "reference": (_against, False),
    "reference, data": (_against, True),
    "reference, from_start, data": (lambda base: _against(base, from_start=True), True),
    "own evidence": (lambda base: QualityContract(**_terms()), False),
    "paired 0.2": (lambda base: QualityContract(paired=0.2, **_terms()), True),
    "paired 0.5": (lambda base: QualityContract(paired=0.5, **_terms()), True),
}
"""By name: the contract, from the records of the base schedule's run; and whether a rollback takes the data back."""
SHIPPED = {
    "shipped_policy": "none",
    "shipped_policy_under_contract": "reference",
    "shipped_policy_paired_0.2": "paired 0.2",
    "shipped_policy_paired_0.5": "paired 0.5",
}
"""By its name in the result: the kind of contract under which the shipped policy steers."""
RATES = (0.1, 1.0, 10.0)
"""Starts of the shipped policy over the tuned rate."""
RATES_TRIED = tuple(1e-3 * 2.0**power for power in range(8))
DIGITS = 4


def main() -> None:
    """Make the runs and write `results/hostile_policies.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--contract-seeds", type=int, default=1, help="seeds of the runs under a contract")
    parser.add_argument("--policies", help="names of hostile policies with commas between them; by default all")
    parser.add_argument("--contracts", default=";".join(CONTRACTS), help="kinds of contract with semicolons between")
    parser.add_argument("--tune", action="store_true", help="search the learning rate instead")
    parser.add_argument("--add", action="store_true", help="keep what else the result holds")
    parser.add_argument("--dry", action="store_true", help="write no result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seeds = range(options.seeds)
    if options.tune:
        for rate in RATES_TRIED:
            print(f"{rate:.4g}: {median(SmallRun('none', seed, rate=rate / TUNED_RATE).train() for seed in seeds):.4f}")
        return
    names = list(HOSTILE) if options.policies is None else [name.strip() for name in options.policies.split(",")]
    contracts = [name.strip() for name in options.contracts.split(";")]
    bases = [base_run(seed) for seed in seeds]
    path = RESULTS / "hostile_policies.json"
    before = json.loads(path.read_text(encoding="utf-8")) if options.add and path.exists() else {}
    hostile = before.get("runs", {}) | {
        kind: [
            attack(name, kind, *bases[seed], seed)
            for name in names
            for seed in (seeds if kind == "none" else seeds[: options.contract_seeds])
        ]
        for kind in contracts
    }
    noise = seed_noise([loss for loss, _ in bases])
    result = {
        "run": {"tuned_rate": TUNED_RATE, "seeds": options.seeds, "policies": names},
        "base": [rounded(loss) for loss, _ in bases],
        "summary": {kind: summary(runs, noise) for kind, runs in hostile.items()},
        "seed_noise": rounded(noise),
        **{
            name: before.get(name) or {f"{rate:g}": [shipped(rate, seed, kind) for seed in seeds] for rate in RATES}
            for name, kind in SHIPPED.items()
        },
        "runs": hostile,
    }
    print(json.dumps({name: result[name] for name in ("summary", *SHIPPED)}, indent=1))
    if not options.dry:
        print(write_result("hostile_policies", result, torch.device("cpu")))


def base_run(seed: int) -> tuple[float, Records]:
    """Return validation loss and records of the base schedule."""
    run = SmallRun("none", seed)
    return run.train(), run.steering.records


def attack(name: str, kind: str, base_loss: float, base: Records, seed: int) -> dict[str, Any]:
    """Return what one hostile policy has done to one run."""
    contract, rewinds = CONTRACTS[kind][0](base), CONTRACTS[kind][1]
    run = SmallRun(HOSTILE[name](seed), seed, rewinds=rewinds, contract=contract)
    found = outcome(run, run.train())
    print(f"{kind:28} {name:20} {seed}  {found['loss'] - base_loss:+.3f}  {found}", flush=True)
    return {"policy": name, "seed": seed, "increase": rounded(found["loss"] - base_loss), **found}


def shipped(rate: float, seed: int, kind: str = "none") -> dict[str, Any]:
    """Return how the shipped policy does from a start at `rate` times the tuned rate, under a kind of contract."""
    base: Records = ()
    if kind == "reference":
        plain = SmallRun("none", seed, rate=rate)
        plain.train()
        base = plain.steering.records
    make, rewinds = CONTRACTS[kind]
    run = SmallRun(default(seed), seed, rate=rate, rewinds=rewinds, contract=make(base))
    return {"seed": seed, **outcome(run, run.train())}


def outcome(run: SmallRun, loss: float) -> dict[str, Any]:
    """Return loss, cost and what the guardrails did."""
    told = run.steering.summary()
    contract = told["contract"]
    return {
        "loss": rounded(loss),
        "sequences_trained": run.taken,
        "held": None if contract is None else contract["held"],
        "rollbacks": len(told["rollbacks"]),
        "refusals": sum(told["refusals"].values()),
        "fallen_back_at": told["fallen_back_at_decision"],
        **({} if contract is None or "paired" not in contract else trials(contract["paired"], told)),
    }


def trials(paired: Mapping[str, Any], told: Mapping[str, Any]) -> dict[str, Any]:
    """Return the trials of a run under a paired contract, and their cost over that of the rest of the run."""
    return {
        "trials_passed": paired["passed"],
        "trials_lost": paired["lost"],
        "extra_sequences": rounded(paired["sequences"] / SEQUENCES),
        "extra_seconds": rounded(paired["time_s"] / (told["time_s"] - paired["time_s"])),
    }


def summary(runs: Sequence[Mapping[str, Any]], noise: float) -> dict[str, Any]:
    """Return median, worst and the number of runs worse than agreed, and than that and the noise of a seed."""
    increases = [run["increase"] for run in runs]
    worst = max(runs, key=lambda run: run["increase"])
    return {
        "n_runs": len(runs),
        "median": rounded(median(increases)),
        "worst": worst["increase"],
        "worst_policy": worst["policy"],
        "over_agreed": sum(increase > MAX_LOSS_INCREASE for increase in increases),
        "over_agreed_and_noise": sum(increase > MAX_LOSS_INCREASE + noise for increase in increases),
        "most_sequences": max(run["sequences_trained"] for run in runs),
        **{
            f"{which}_{name}": rounded(figure(run[name] for run in runs))
            for name in ("extra_sequences", "extra_seconds")
            for which, figure in (("mean", fmean), ("most", max))
            if name in runs[0]
        },
    }


def seed_noise(losses: Sequence[float]) -> float:
    """Return the largest difference between two seeds of the base schedule."""
    return max(losses) - min(losses)


def rounded(value: float) -> float:
    """Round to a few decimals."""
    return round(value, DIGITS)


if __name__ == "__main__":
    main()
