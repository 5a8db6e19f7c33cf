"""Measure policies on simulated runs of a published model that was left out of their training.

    python benchmarks/policy_at_scale.py [--policies default,FILE] [--model step-law-429M]

The runs have budgets of 4 to 100 B tokens and an edge at 2, 4 or 16 times the best learning rate. They start at 1/10
to 10 times the best rate, or where Step Law advises, with its advice off by up to 10 times in both directions. Each
method is compared with the tuned static setting (learning rate and batch searched on the plant itself): the share of
the budget that the tuned static needs for the loss reached. Beside the policies stand untuned runs from the same
starts, and the law's static setting: learning rate and batch as advised, with the same errors, and the same schedule.
It takes about ten minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from _common import write_result
from _simulated import by_policy, estimate, expected_loss, held, middle, rounded, steer, tenth

from trainpilot.agents.bundle import PolicyBundle, policy_digest, policy_path
from trainpilot.agents.steering.guarded_controller import GuardedController, RollbackController
from trainpilot.envs.decision import Preference
from trainpilot.envs.reward import compute_equivalent
from trainpilot.llm_runtime.drive import drive
from trainpilot.llm_runtime.process import use_threads
from trainpilot.llm_runtime.schedules import BUDGET_SHARES, ScheduleName, neutral_factor
from trainpilot.llm_runtime.simulator.instances import Widening
from trainpilot.llm_runtime.simulator.records import Bools, ControlBatch, Floats, Ints
from trainpilot.llm_runtime.simulator.references import ScheduleTable, static_losses
from trainpilot.llm_runtime.simulator.runs import OnePlant, Pool, SimulatedRuns, Start
from trainpilot.llm_runtime.simulator.shipped import published_physics, shipped_physics

LEFT_OUT = "step-law-429M"
"""Published model that the default recipe leaves out."""
QUALITY = Preference(quality=1, energy=0, time=0)
TOKENS = (4e9, 1e11)
EDGES = (2.0, 4.0, 16.0)
"""Edge over the best learning rate at the best batch."""
OTHER_BASES: tuple[tuple[ScheduleName, float], ...] = tuple(
    (name, warmup) for name in ("wsd", "cosine", "linear") for warmup in (0.02, 0.1)
)
"""Schedules of the second look, with their shares of warm-up."""
STARTS: Mapping[str, Start] = {
    "off": Start(rates=(0.1, 10.0)),
    "advised": Start(advised=1.0, advice_error=10.0),
    "rightly advised": Start(advised=1.0, advice_error=1.0),
}
POOL_SEED, RUNS_SEED = 20_241, 11
"""No recipe trains or selects with these."""
RIGHT = 2.0
"""Factor of the best learning rate within which a start counts as right."""
DEAD = 0.01
"""Share of the budget: a run whose loss the tuned static reaches with less is counted as diverged."""
MEDIAN, TENTH, DIVERGED, LOST = 0.95, 0.8, 0.005, 0.02
"""Targets: least median and 10th percentile of the multiplier, largest share of diverged runs, and largest loss
against the law's static where its advice is right."""


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Runs under one edge from one kind of start."""

    edge: float
    start: str
    fresh: Callable[[], SimulatedRuns]

    def judged(self, policy: PolicyBundle | None) -> Judged:
        """Steer fresh runs to their end, by a policy or not at all, and compare them with the tuned static."""
        runs = self.fresh()
        over_best = runs.start_rate / runs.best_learning_rate
        outcome = steer(runs, held() if policy is None else by_policy(policy, QUALITY))
        return Judged.of(runs, outcome.loss, outcome.used, over_best, outcome.controls)

    def as_advised(self) -> Judged:
        """Return the law's static setting: the advised learning rate and batch, with the errors of the advice."""
        runs = self.fresh()
        instances, start = runs.instances, runs.instances.start_batch
        rate, wanted = (instances.advice * runs.advice_error).T
        low, high = instances.batch_limits(runs.start.decisions)
        batch = np.clip(np.exp2(np.round(np.log2(wanted))), low, high)
        table = ScheduleTable.of(runs.start.schedule, runs.start.warmup_share, runs.start.decisions)
        loss = static_losses(instances, rate, batch, table)
        over_best = rate / (runs.best_learning_rate * neutral_factor(runs.references.batch.astype(np.float64), start))
        return Judged.of(runs, loss, np.ones(runs.n_runs), over_best, [])

    def best_static(self, bases: Sequence[tuple[ScheduleName, float]]) -> Judged:
        """Return the best static setting of each plant over several schedules, tuned around that of the tuned static.

        Not a method but a second look: how much of a policy's gain is that of another schedule.
        """
        runs = self.fresh()
        instances, start = runs.instances, runs.instances.start_batch
        low, high = instances.batch_limits(runs.start.decisions)
        loss = np.full(runs.n_runs, np.inf)
        for name, warmup_share in bases:
            table = ScheduleTable.of(name, warmup_share, runs.start.decisions)
            for factor in (0.5, 1.0, 2.0):
                batch = np.clip(runs.references.batch * factor, low, high)
                for rate in (0.5, 0.7, 1.0, 1.4, 2.0):
                    at_batch = rate * runs.best_learning_rate * neutral_factor(batch, start)
                    loss = np.minimum(loss, static_losses(instances, at_batch, batch, table))
        ones = np.ones(runs.n_runs)
        return Judged.of(runs, loss, ones, ones, [])

    def guarded(self, policy: PolicyBundle, n_runs: int) -> Judged:
        """Steer some runs one by one within guardrails, as the product ships."""
        common = self.fresh()
        parts = [self._one_guarded(policy, common, row) for row in range(n_runs)]
        return Judged(
            multiplier=np.concatenate([part.multiplier for part in parts]),
            lost=np.concatenate([part.lost for part in parts]),
            over_best=np.concatenate([part.over_best for part in parts]),
            index=np.concatenate([part.index for part in parts]),
            controls=[],
        )

    @staticmethod
    def _one_guarded(policy: PolicyBundle, common: SimulatedRuns, row: int) -> Judged:
        plant = OnePlant(SimulatedRuns(1, common.seed, common.pool, common.start, first_row=row))
        controller = RollbackController(GuardedController.of_bundle(policy, plant.limits(), QUALITY), plant)
        tokens, loss = 0.0, np.full(1, np.inf)
        for interval in drive(
            plant, controller.decide, common.start.decisions, can_roll_back=lambda: controller.can_roll_back
        ):
            tokens += interval.telemetry.interval_tokens
            if interval.telemetry.finished and not interval.telemetry.diverged:
                loss = expected_loss(plant.plants, np.arange(1))
        runs = plant.plants
        assert isinstance(runs, SimulatedRuns)
        budget = runs.instances.sequences * runs.instances.sequence_length
        return Judged.of(runs, loss, tokens / budget, runs.start_rate / runs.best_learning_rate, [])


@dataclass(frozen=True, kw_only=True)
class Judged:
    """Figures of many runs of one method, arrays of shape (n_runs,)."""

    multiplier: Floats
    lost: Bools
    over_best: Floats
    """Starting learning rate over the tuned one."""
    index: Ints
    """Instance of each run, by which the bootstrap resamples."""
    controls: list[ControlBatch]
    """Controls of every decision."""

    @classmethod
    def of(
        cls, runs: SimulatedRuns, loss: Floats, used: Floats, over_best: Floats, controls: list[ControlBatch]
    ) -> Judged:
        """Compare final losses of runs that used a share of their budgets with the tuned static.

        A run that ends where the tuned static is with hardly any budget counts as diverged, too.
        """
        equivalent = compute_equivalent(loss, BUDGET_SHARES, runs.reference_losses)
        return cls(
            multiplier=np.where(np.isfinite(loss), equivalent / used, 0.0),
            lost=~np.isfinite(loss) | (equivalent < DEAD),
            over_best=over_best,
            index=runs.index.copy(),
            controls=controls,
        )

    @classmethod
    def pooled(cls, parts: list[Judged]) -> dict[str, Floats]:
        """Return multiplier, lost runs, starts and instances of several sets of runs together."""
        offset = 1 + max(int(part.index.max()) for part in parts)
        return {
            "multiplier": np.concatenate([part.multiplier for part in parts]),
            "lost": np.concatenate([part.lost for part in parts]),
            "over_best": np.concatenate([part.over_best for part in parts]),
            "index": np.concatenate([part.index + number * offset for number, part in enumerate(parts)]),
        }


def figures(runs: Mapping[str, Floats]) -> dict[str, Any]:
    """Return median and 10th percentile of the multiplier with bootstrap intervals, and the share of lost runs."""
    return {
        "n_runs": len(runs["multiplier"]),
        "median": estimate(runs["multiplier"], runs["index"]),
        "p10": estimate(runs["multiplier"], runs["index"], tenth),
        "diverged": rounded(float(np.mean(runs["lost"]))),
        "by_start": {
            name: {"n_runs": int(mine.sum()), "median": rounded(middle(runs["multiplier"][mine]))}
            for name, mine in _groups(runs["over_best"]).items()
            if mine.any()
        },
    }


def _groups(over_best: Floats) -> dict[str, Bools]:
    """Return which runs start far below, below, near, above and far above the best learning rate."""
    ends = (0.0, 0.2, 0.5, 2.0, 5.0, np.inf)
    names = ("below 0.2", "0.2 to 0.5", "0.5 to 2", "2 to 5", "above 5")
    return {name: (over_best >= ends[i]) & (over_best < ends[i + 1]) for i, name in enumerate(names)}


def controls(judged: Judged, runs: SimulatedRuns) -> dict[str, Any]:
    """Return medians of learning rate and batch over the tuned ones at every tenth decision."""
    found: dict[str, Any] = {"decisions": [], "learning_rate_over_best": [], "batch_over_best": []}
    best_batch = runs.references.batch
    for decision in range(0, len(judged.controls), 10):
        control = judged.controls[decision]
        found["decisions"].append(decision)
        found["learning_rate_over_best"].append(rounded(middle(judged.over_best * control.learning_rate_scale)))
        found["batch_over_best"].append(rounded(middle(control.batch_size / best_batch)))
    return found


def against_law(policy: list[Judged], law: list[Judged]) -> dict[str, Any]:
    """Return medians of policy and law's static where the advice is right and where it is off, and their ratio."""
    mine, theirs = Judged.pooled(policy), Judged.pooled(law)
    off = np.abs(np.log(theirs["over_best"])) > np.log(RIGHT)
    found = {}
    for name, rows in (("right", ~off), ("off", off)):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(
                theirs["multiplier"] > 0, mine["multiplier"] / theirs["multiplier"], np.where(mine["lost"], 1.0, 10.0)
            )
        found[name] = {
            "n_runs": int(rows.sum()),
            "policy": rounded(middle(mine["multiplier"][rows])),
            "law": rounded(middle(theirs["multiplier"][rows])),
            "ratio": estimate(ratio[rows], mine["index"][rows].astype(np.int64)),
        }
    return found


def targets(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return every target with what was found."""
    everything, law = found["all"], found["against_law"]
    wanted = [
        ("median multiplier", everything["median"]["value"], MEDIAN, True),
        ("10th percentile of the multiplier", everything["p10"]["value"], TENTH, True),
        ("share of diverged runs", everything["diverged"], DIVERGED, False),
        ("policy over the law's static, advice off by more than 2x", law["off"]["ratio"]["value"], 1.0, True),
        ("policy over the law's static, advice right", law["right"]["ratio"]["value"], 1.0 - LOST, True),
    ]
    return [
        {
            "what": what,
            "at_least" if least else "at_most": limit,
            "found": value,
            "reached": value >= limit if least else value <= limit,
        }
        for what, value, limit, least in wanted
    ]


def judge(
    policy: PolicyBundle | None, sets: list[Runs], law: list[Judged] | None, n_guarded: int = 0
) -> dict[str, Any]:
    """Return the figures of one method: a policy, or no steering at all."""
    judged = [runs.judged(policy) for runs in sets]
    by_set = list(zip(sets, judged, strict=True))
    found: dict[str, Any] = {
        "all": figures(Judged.pooled(judged)),
        "by_edge": {
            f"{edge:g}": figures(Judged.pooled([one for runs, one in by_set if runs.edge == edge])) for edge in EDGES
        },
        "by_kind_of_start": {
            start: figures(Judged.pooled([one for runs, one in by_set if runs.start == start])) for start in STARTS
        },
        "controls": {
            start: controls(one, runs.fresh())
            for runs, one in by_set
            if runs.edge == EDGES[1]
            for start in [runs.start]
        },
    }
    if law is not None:
        found["against_law"] = against_law([one for runs, one in by_set if runs.start != "off"], law)
        found["targets"] = targets(found)
    if policy is not None and n_guarded:
        found["guarded"] = figures(Judged.pooled([runs.guarded(policy, n_guarded) for runs in sets]))
    return found


def main() -> None:
    """Draw the plants, steer them, and write `results/policy_at_scale.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default="default", help="names or files, with commas between them")
    parser.add_argument("--model", default=LEFT_OUT, help="published model that the plants are drawn around")
    parser.add_argument("--instances", type=int, default=300, help="plants per edge")
    parser.add_argument("--runs", type=int, default=600, help="runs per edge and kind of start")
    parser.add_argument("--guarded", type=int, default=50, help="runs per edge and kind of start within guardrails")
    parser.add_argument("--dry", action="store_true", help="write no result")
    options = parser.parse_args()
    use_threads(1)
    result: dict[str, Any] = {
        "plants": {"model": options.model, "tokens": list(TOKENS), "edges": list(EDGES)},
        "instances": options.instances,
        "runs": options.runs,
        "policies": {},
    }
    sets = run_sets(options.model, options.instances, options.runs)
    law = [runs.as_advised() for runs in sets if runs.start != "off"]
    result["law"] = {"all": figures(Judged.pooled(law))}
    result["untuned"] = judge(None, sets, None)
    result["best static of several schedules"] = {
        "schedules": [list(base) for base in OTHER_BASES],
        "all": figures(Judged.pooled([runs.best_static(OTHER_BASES) for runs in sets])),
    }
    for name in ("law", "untuned", "best static of several schedules"):
        print(line(name, result[name]))
    for name in options.policies.split(","):
        path = policy_path(name)
        found = judge(PolicyBundle.load(path), sets, law, options.guarded)
        result["policies"][name] = {"digest": policy_digest(path), **found}
        print(line(name, found))
        if "guarded" in found:
            print(line("  within guardrails", {"all": found["guarded"]}))
        for wanted in found["targets"]:
            print(f"    {'yes' if wanted['reached'] else 'NO ':3}  {wanted['what']}: {wanted['found']:.4g}")
    if not options.dry:
        print(write_result("policy_at_scale", result, torch.device("cpu")))


def run_sets(model: str, n_instances: int, n_runs: int) -> list[Runs]:
    """Return the runs under every edge from every kind of start, on plants drawn around one published model."""
    sets = []
    for number, over in enumerate(EDGES):
        pool = Pool.draw(n_instances, POOL_SEED + number, shipped_physics(), at_scale(model, (over, over)))
        for name, start in STARTS.items():

            def fresh(pool: Pool = pool, start: Start = start) -> SimulatedRuns:
                return SimulatedRuns(n_runs, RUNS_SEED, pool, start)

            sets.append(Runs(edge=over, start=name, fresh=fresh))
    return sets


def at_scale(model: str, edge_over_best: tuple[float, float]) -> Widening:
    """Return plants of a published model's size with an edge, drawn around this model alone."""
    weights = float(published_physics()[model].n_parameters or 0)
    return Widening(
        scratch=1.0,
        edges=1.0,
        edge_over_best=edge_over_best,
        weights=(weights, weights),
        tokens_per_weight=(TOKENS[0] / weights, TOKENS[1] / weights),
        published=(model,),
    )


def line(name: str, found: Mapping[str, Any]) -> str:
    """Format a method's figures as one line of text."""
    everything = found["all"]
    starts = "  ".join(f"{each['median']:.2f}" for each in everything["by_start"].values())
    median, p10 = everything["median"]["value"], everything["p10"]["value"]
    return f"{name:28} {median:.3f}  p10 {p10:.3f}  diverged {everything['diverged']:.3f}  | {starts}"


if __name__ == "__main__":
    main()
