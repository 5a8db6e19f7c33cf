"""Measure policies zero-shot on the live test cases at several budgets, against a static setting tuned at each budget.

    python benchmarks/live_budgets.py [--budgets 1 8] [--seconds] [--policies default,greedy,law] [--cases llama,opt]

Around the tuned static of `baselines.py`, learning rate and batch are tuned again at each budget, with the seed of that
search; the best setting is judged with other seeds, at the whole and at half of the budget. Policies start at 0.1, 1
and 10 times the tuned learning rate (`--starts`) at the case's own batch, within guardrails, and are asked for quality
alone; so does `greedy`, transformers' GreedyLR, while `law` is the static setting that Step Law advises. A run's
multiplier is the share of the budget that the tuned static needs for its loss: in the logarithm it is interpolated
between both budgets, and extrapolated beyond them. With `--seconds`, policies (not `greedy` and `law`) are also
compared with the static tuned for seconds: both have the same budget in seconds, those in which that static trains on
the case's tokens in this very command, and both pay for the same evaluations out of it. Runs lie in OUT; the same
command resumes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from _common import write_result
from _simulated import rounded
from rich.console import Console

from trainpilot.agents.bundle import policy_digest, policy_path
from trainpilot.envs.reward import budget_for_loss
from trainpilot.experiments.compare.cases import StaticSetting, load_cases
from trainpilot.experiments.compare.methods import SIMPLE, Method, policy_method
from trainpilot.experiments.compare.scheduler import Program, Scheduler, run_workers
from trainpilot.experiments.compare.search import final_loss
from trainpilot.experiments.progress import progress_bar
from trainpilot.experiments.results import Case, RunResult, RunSpec, SteeringSpec
from trainpilot.experiments.run_store import RunStore
from trainpilot.llm_runtime.process import use_threads
from trainpilot.llm_runtime.schedules import EVALUATE_EVERY, neutral_factor

BASELINES = Path(__file__).parent / "results" / "baselines.json"
SEARCH_SEED = 1_000
RATES = (0.4, 0.63, 1.0)
"""Learning rates of the first tries at a larger budget, over the one tuned at the case's own."""
BATCHES = (1, 2, 4)
"""Batches of the first tries there; the learning rate follows by the neutral rule."""
FINER = (0.8, 1.26)
HALF = 0.5
FARTHEST = (1 / 8, 8.0)
"""Budgets over the whole one that extrapolation is believed up to."""
Wave = Generator[list[RunSpec], list[RunResult], Any]


@dataclass
class CaseAtBudget:
    """A test case at a multiple of its budget: its tuned static, and the policies' runs."""

    case: Case
    budget: float
    seeds: Sequence[int]
    first: StaticSetting
    """Setting that was tuned at the case's own budget."""
    policies: Mapping[str, Mapping[float, Method]]
    """Methods by policy and start."""
    seconds: float | None = None
    """Budget in seconds, where it is not in tokens: what the tuned static takes for the case's tokens."""
    in_seconds: bool = False
    known: StaticSetting | None = None
    """Setting that an earlier search found at this budget."""
    tuned: StaticSetting | None = None
    tried: dict[StaticSetting, float] = field(default_factory=dict)
    """Losses of the search."""
    static: dict[float, list[float]] = field(default_factory=dict)
    """Losses of the tuned static by share of the budget, in the order of the seeds."""
    steered: dict[str, dict[float, list[RunResult]]] = field(default_factory=dict)

    @property
    def axis(self) -> str:
        """What the budget is counted in."""
        return "time_s" if self.in_seconds else "tokens"

    @property
    def estimated_runs(self) -> int:
        """Number of runs, where the search moves once."""
        starts = sum(len(methods) for methods in self.policies.values())
        searched = self.budget != 1 and self.known is None
        return len(self.seeds) * (2 + self.in_seconds + starts) + searched * (len(RATES) * len(BATCHES) + 4)

    def program(self) -> Program:
        """Tune, judge the tuned static, and run the policies from every start."""
        self.tuned = yield from self._tune()
        if self.in_seconds:
            results = yield [self._spec(self.tuned, seed, 1.0) for seed in self.seeds]
            self.seconds = median(seconds_of(result) for result in results)
        for share in (HALF, 1.0):
            results = yield [self._within(self._spec(self.tuned, seed, share), share) for seed in self.seeds]
            self.static[share] = [final_loss(result) for result in results]
        for policy, methods in self.policies.items():
            for start, method in methods.items():
                placed = method if method.start is None else method.placed(self.first)
                specs = [self._within(placed.spec(self.case, seed)) for seed in self.seeds]
                results = yield specs
                self.steered.setdefault(policy, {})[start] = results

    def _within(self, spec: RunSpec, share: float = 1.0) -> RunSpec:
        """Return a run with a share of the budget in seconds, where there is one, and everybody's evaluations."""
        if self.seconds is None:
            return spec
        warmup_share = spec.config.warmup() / spec.config.tokens
        budget = f"{share * self.seconds:.2f}s"
        config = replace(spec.config, budget=budget, warmup_tokens=None, warmup_share=warmup_share)
        return replace(spec, config=config, steering=replace(spec.steering, evaluate_every=EVALUATE_EVERY))

    def _tune(self) -> Wave:
        if self.budget == 1 or self.known is not None:
            return self.known or self.first
        yield from self._try(
            replace(
                self.first,
                batch_size=self.first.batch_size * factor,
                learning_rate=float(self.first.learning_rate * rate * neutral_factor(float(factor), 1.0)),
            )
            for factor in BATCHES
            for rate in RATES
        )
        for _ in range(3):
            best = min(self.tried, key=self.tried.__getitem__)
            yield from self._try(replace(best, learning_rate=best.learning_rate * factor) for factor in FINER)
            if min(self.tried, key=self.tried.__getitem__) == best:
                break
        return min(self.tried, key=self.tried.__getitem__)

    def _try(self, settings: Any) -> Wave:
        wanted = [each for each in settings if each not in self.tried]
        results = yield [self._spec(each, SEARCH_SEED, 1.0) for each in wanted]
        self.tried |= dict(zip(wanted, map(final_loss, results), strict=True))

    def _spec(self, setting: StaticSetting, seed: int, share: float) -> RunSpec:
        config = setting.on(self.case.config, budget=share, seed=seed)
        return RunSpec(config=config, steering=SteeringSpec(evaluate_every=config.decisions))

    def multiplier(self, result: RunResult) -> float:
        """Return the share of the budget that the tuned static needs for a run's loss; 0 for a run without one."""
        if result.final_validation_loss is None:
            return 0.0
        shares, losses = (HALF, 1.0), [fmean(self.static[share]) for share in (HALF, 1.0)]
        needed = float(budget_for_loss(result.final_validation_loss, shares, losses, limits=FARTHEST))
        if self.seconds is not None:
            return needed  # it was given all of them
        return needed * self.case.config.tokens / result.tokens

    def figures(self) -> dict[str, Any]:
        """Return the tuned static and every policy's runs."""
        assert self.tuned is not None
        return {
            "case": self.case.name,
            "budget": self.budget,
            "axis": self.axis,
            "tokens": self.case.config.tokens,
            "seconds": None if self.seconds is None else rounded(self.seconds),
            "tuned": {
                "learning_rate": rounded(self.tuned.learning_rate),
                "batch_size": self.tuned.batch_size,
                "schedule": self.tuned.schedule,
                "warmup_share": self.tuned.warmup_share,
                "n_tried": len(self.tried) or None,
            },
            "static_losses": {f"{share:g}": [rounded(x) for x in found] for share, found in self.static.items()},
            "policies": {
                policy: {f"{start:g}": [self._run(each) for each in found] for start, found in starts.items()}
                for policy, starts in self.steered.items()
            },
        }

    def _run(self, result: RunResult) -> dict[str, Any]:
        loss = result.final_validation_loss
        did = result.guardrails or {}
        return {
            "loss": None if loss is None else rounded(loss),
            "multiplier": rounded(self.multiplier(result)),
            "refusals": sum(did.get("refusals", {}).values()),
            "rollbacks": len(did.get("rollbacks", ())),
            "fallen_back": bool(did.get("fallen_back")),
            "end_batch_size": result.intervals[-1].batch_size if result.intervals else None,
        }


def seconds_of(result: RunResult) -> float:
    """Return the seconds of a run, evaluation apart."""
    return sum(interval.time_s for interval in result.intervals)


def first_setting(baselines: Mapping[str, Any], case: Case, axis: str = "tokens") -> StaticSetting:
    """Return the setting that was tuned at the case's own budget, for tokens or for seconds (`time_s`)."""
    found = next(each for each in baselines["tuned"][case.name] if each["axis"] == axis)
    return StaticSetting(
        learning_rate=float(found["base_learning_rate"]),
        batch_size=found["batch_size"],
        schedule=found["schedule"],
        warmup_share=found["warmup_share"],
        precision=found["precision"],
    )


def known_settings(path: Path | None) -> dict[tuple[str, float], StaticSetting]:
    """Return the settings for tokens that a result of this benchmark holds, by case and budget."""
    if path is None:
        return {}
    cases = [case for case in json.loads(path.read_text(encoding="utf-8"))["cases"] if case["axis"] == "tokens"]
    names = ("learning_rate", "batch_size", "schedule", "warmup_share")
    return {
        (case["case"], case["budget"]): StaticSetting(**{name: case["tuned"][name] for name in names}, precision="fp32")
        for case in cases
    }


def methods_of(name: str, starts: Sequence[float]) -> dict[float, Method]:
    """Return the methods of a row by their starts: a policy, a rule, or a static setting that has its own."""
    if name not in SIMPLE:
        return {start: policy_method(f"policy:{name}@quality=1@start={start:g}") for start in starts}
    method = SIMPLE[name]
    return {1.0: method} if method.note.kind == "untuned" else {start: replace(method, start=start) for start in starts}


def summary(cases: Sequence[Mapping[str, Any]], policy: str) -> dict[str, Any]:
    """Return medians of the multipliers of a policy: over all cases, by start and by case, and the lost runs."""

    def by_case(start: str | None) -> dict[str, float]:
        found = {}
        for case in cases:
            starts = case["policies"][policy]
            runs = [run for name, each in starts.items() if start in (None, name) for run in each]
            found[case["case"]] = median(run["multiplier"] for run in runs)
        return found

    names = list(cases[0]["policies"][policy])
    starts = {name: rounded(median(by_case(name).values())) for name in names}
    each = by_case(None)
    runs = [run for case in cases for found in case["policies"][policy].values() for run in found]
    return {
        "n_runs": len(runs),
        "median": rounded(float(np.median([run["multiplier"] for run in runs]))),
        "by_start": starts,
        "worst_start": min(starts.values()),
        "by_case": {name: rounded(value) for name, value in each.items()},
        "worst_case": rounded(min(each.values())),
        "n_without_loss": sum(run["loss"] is None for run in runs),
        "n_fallen_back": sum(run["fallen_back"] for run in runs),
    }


def main() -> None:
    """Run what is missing, and write `results/live_budgets.json`, or another name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=float, nargs="*", default=[1.0, 8.0])
    parser.add_argument("--seconds", action="store_true", help="budgets in seconds too, at the cases' own size")
    parser.add_argument("--policies", default="default", help="policies' names or files, greedy, law; may be empty")
    parser.add_argument("--set", dest="cases", default="test", help="case set of `trainpilot compare`, or a file")
    parser.add_argument("--cases", dest="names", default="", help="names of some cases, with commas between them")
    parser.add_argument("--starts", type=float, nargs="+", default=[0.1, 1.0, 10.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tuned", type=Path, help="an earlier result whose tuned settings are taken, without a search")
    parser.add_argument("--out", type=Path, default=Path("runs/live_budgets"))
    parser.add_argument("--name", default="live_budgets", help="name of the result's file")
    parser.add_argument("--dry", action="store_true", help="write no result")
    options = parser.parse_args()
    use_threads(1)
    baselines = json.loads(BASELINES.read_text(encoding="utf-8"))
    policies = [name for name in options.policies.split(",") if name]
    chosen = [case for case in load_cases(options.cases) if not options.names or case.name in options.names.split(",")]
    programs, known = [], known_settings(options.tuned)
    kinds = [(budget, "tokens") for budget in options.budgets] + [(1.0, "time_s")] * options.seconds
    for budget, axis in kinds:
        for case in chosen:
            config = replace(case.config, tokens=round(case.config.tokens * budget))
            named = policies if axis == "tokens" else [name for name in policies if name not in SIMPLE]
            methods = {name: methods_of(name, options.starts) for name in named}
            setting, longer = first_setting(baselines, case, axis), replace(case, config=config)
            programs.append(
                CaseAtBudget(
                    case=longer,
                    budget=budget,
                    seeds=range(options.seeds),
                    first=setting,
                    policies=methods,
                    in_seconds=axis == "time_s",
                    known=known.get((case.name, budget)) if axis == "tokens" else None,
                )
            )
    run(programs, options.out, options.jobs)
    found = [each.figures() for each in programs]
    result = {
        "seeds": options.seeds,
        "starts": options.starts,
        "policies": {name: None if name in SIMPLE else policy_digest(policy_path(name)) for name in policies},
        "summary": {
            f"{budget:g} x {axis}": {
                name: summary(
                    [c for c, p in zip(found, programs, strict=True) if (p.budget, p.axis) == (budget, axis)], name
                )
                for name in policies
                if axis == "tokens" or name not in SIMPLE
            }
            for budget, axis in kinds
        },
        "cases": found,
    }
    print(json.dumps(result["summary"], indent=2))
    if not options.dry:
        print(write_result(options.name, result, torch.device("cuda" if torch.cuda.is_available() else "cpu")))


def run(programs: Sequence[CaseAtBudget], out: Path, jobs: int) -> None:
    """Execute the runs of all cases that are not in the folder yet."""
    console, store = Console(), RunStore(out / "runs")
    total = sum(each.estimated_runs for each in programs)
    with progress_bar(console, "runs", total) as advance, run_workers(jobs, 1) as workers:
        seen = 0

        def take(result: RunResult, kept: bool) -> None:
            nonlocal seen
            seen += 1
            ended = "diverged" if result.final_validation_loss is None else f"loss {result.final_validation_loss:.3f}"
            advance(
                min(seen, total),
                f"{seen} runs  {result.failure or ended}{' (kept)' * kept}",
            )

        Scheduler(workers, store, take).run([each.program() for each in programs])


if __name__ == "__main__":
    main()
