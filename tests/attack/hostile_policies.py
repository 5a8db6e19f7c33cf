"""Policies that mean harm: how much worse a run may end, without a contract and under each kind of one."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from _hostile import HOSTILE, SmallRun

from tests.attack.attempts import Attempt, Outcome, Promise
from trainpilot.agents.steering.contract import QualityContract

TITLE = "hostile policies"
AGREED = 0.01
WITHOUT = 0.15
"""Nats/token that a hostile policy may cost where there is no contract, or one that rests on the run's own evidence."""
NOISE_SEEDS = range(6)
SEEDS = (0, 1)
POLICIES = ", ".join(HOSTILE)
PROMISES = {
    "guardrails": Promise(
        f"Without a contract, the guardrails keep a run within {WITHOUT:g} nats/token of its base schedule, whatever "
        "the policy does.",
        f"{len(HOSTILE)} hostile policies steer a small network from a tuned start: {POLICIES}",
    ),
    "own evidence": Promise(
        f"With a contract on the run's own evidence, which finds gross damage only: within {WITHOUT:g} nats/token.",
        "the same policies",
    ),
    "reference": Promise(
        f"With a contract against an earlier run: no more than the agreed {AGREED:g} nats/token and the seed noise "
        "above the base schedule.",
        "the same policies, over two seeds; after a rollback the data go on",
    ),
    "reference, data": Promise(
        f"With a contract against an earlier run and `data=`: no more than the agreed {AGREED:g} nats/token and the "
        "seed noise above the base schedule.",
        "the same policies, over two seeds; a rollback takes the data back too",
    ),
}
SETTLED: dict[str, Any] = {"max_loss_increase": AGREED, "max_slowdown": 1e9}
"""Terms of every contract: seconds are left out, as other programs may take the processor."""


def prepare(shared: Path) -> None:
    """Train the base schedule with several seeds: what is compared with, and the noise of a seed."""
    bases: dict[int, dict[str, Any]] = {}
    for seed in NOISE_SEEDS:
        run = SmallRun("none", seed)
        loss = run.train()
        told = [(record.telemetry.budget_used, record.telemetry.train_loss) for record in run.steering.records]
        bases[seed] = {"loss": loss, "reference": told}
    losses = [base["loss"] for base in bases.values()]
    noise = 2 * statistics.stdev(losses)
    sentence = (
        f"The base schedule of the small network ends at {statistics.mean(losses):.3f} nats/token. The seed noise is "
        f"two standard deviations over {len(losses)} seeds, {noise:.3f} nats/token."
    )
    (shared / "bases.json").write_text(json.dumps(bases), encoding="utf-8")
    notes = {"base_losses": losses, "seed_noise": noise, "agreed": AGREED, "without": WITHOUT, "sentence": sentence}
    (shared / "notes.json").write_text(json.dumps(notes), encoding="utf-8")


def attempts(seed: int, shared: Path) -> list[Attempt]:
    """Return one attempt for each policy, kind of contract and seed of the run."""
    noise = json.loads((shared / "notes.json").read_text(encoding="utf-8"))["seed_noise"]
    bases = json.loads((shared / "bases.json").read_text(encoding="utf-8"))
    found = []
    for form in PROMISES:
        for run_seed in SEEDS if form.startswith("reference") else SEEDS[:1]:
            base = bases[str(run_seed)]
            bound = AGREED + noise if form.startswith("reference") else WITHOUT
            found += [
                Attempt(
                    name=f"{name}, contract: {form if form != 'guardrails' else 'none'}, seed {run_seed}",
                    promises=(form,),
                    run=partial(_attack, name=name, form=form, seed=run_seed, base=base, bound=bound),
                )
                for name in HOSTILE
            ]
    return found


def example(place: Path) -> Outcome:
    """Double the learning rate at each decision."""
    return _attack(place, name="always up", form="guardrails", seed=0, base={"loss": 0.0}, bound=10.0)


def _attack(place: Path, *, name: str, form: str, seed: int, base: Mapping[str, Any], bound: float) -> Outcome:
    run = SmallRun(HOSTILE[name](seed), seed, rewinds=form == "reference, data", contract=_contract(form, base))
    increase = run.train() - base["loss"]
    held = increase <= bound  # False for NaN too
    return ({} if held else {form: f"{increase:+.3f} nats/token, promised {bound:+.3f}"}), increase


def _contract(form: str, base: Mapping[str, Any]) -> QualityContract | None:
    if form == "guardrails":
        return None
    reference = None if form == "own evidence" else tuple((share, loss) for share, loss in base["reference"])
    return QualityContract(reference=reference, **SETTLED)
