"""Measure the zero-shot table of one model on a GPU, and fine-tune a policy on live runs of a larger model.

The table compares steered and untouched runs, started from good and bad learning rates, with a learning-rate sweep
whose costs are recorded. Fine-tuning is the default recipe's live stage, started from a given bundle.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu.models import STARTS, GpuSetup, TimeIsUpError, used
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecMonitor

from trainpilot.agents.bundle import PolicyBundle
from trainpilot.agents.logging.training_log import TrainingLog
from trainpilot.agents.ppo import PPOConfig, bundle_of, make_ppo, train
from trainpilot.envs.environments import LiveTraining
from trainpilot.envs.observation import OBSERVATION_FIELDS, ObservationField
from trainpilot.envs.reference import live_reference
from trainpilot.envs.reward import ScalarReward
from trainpilot.experiments.analysis.figures import AXES
from trainpilot.experiments.analysis.multiplier import Curve, CurveRun, compute_multiplier, fit_curve
from trainpilot.experiments.analysis.statistics import over_seeds
from trainpilot.experiments.compare.cases import StaticSetting, rounded
from trainpilot.experiments.compare.methods import SIMPLE, policy_method
from trainpilot.experiments.recipe import load_recipe
from trainpilot.experiments.results import UNTUNED, Case, RunResult, RunSpec
from trainpilot.experiments.train_agent import total_cost
from trainpilot.llm_runtime.config import Precision, RunConfig
from trainpilot.llm_runtime.energy.meter import sum_known

Get = Callable[[str, RunSpec], RunResult]
"""Takes a run's name and specification and returns its result."""

MAX_FURTHER = 4
"""Largest number of further rates to try if the best one lies on the edge of the sweep."""
SHARES = (0.25, 0.5, 2.0)
"""Further budgets of the baseline, for the curve that converts a loss to a budget."""
WARMUP_SHARE = 0.1
DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Requests the runs of one model."""

    name: str
    config: RunConfig
    seeds: tuple[int, ...]
    get: Get

    def static(self, what: str, rate: float, *, seed: int, budget: float = 1.0) -> RunResult:
        """Return an unsteered run under WSD, the policy's own base schedule, at a learning rate."""
        setting = StaticSetting(
            learning_rate=rate,
            batch_size=self.config.batch_size,
            schedule="wsd",
            warmup_share=WARMUP_SHARE,
            precision=self.config.precision,
        )
        config = setting.on(self.config, budget=budget, seed=seed)
        return self.get(f"{self.name} {what} {rate:g} seed {seed}", RunSpec(config=config))

    def started(self, what: str, method: str, rate: float) -> list[RunResult]:
        """Return a method's runs from a learning rate, one per seed."""
        found = policy_method(method) if method.startswith("policy:") else SIMPLE[method]
        case = Case(name=self.name, config=replace(self.config, base_learning_rate=rate), architecture="")
        return [self.get(f"{self.name} {what} {rate:g} seed {seed}", found.spec(case, seed)) for seed in self.seeds]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Learning rates tried with the first seed, with their results."""

    runs: Mapping[float, RunResult]

    @property
    def best(self) -> float | None:
        """The rate with the lowest validation loss; `None` if no run has a final loss."""
        ended = {rate: run.final_validation_loss for rate, run in self.runs.items()}
        known = {rate: loss for rate, loss in ended.items() if loss is not None}
        return min(known, key=lambda rate: known[rate], default=None)

    @property
    def beyond(self) -> float | None:
        """The next rate to try if the best one lies on the edge, else `None`."""
        rates, best = sorted(self.runs), self.best
        if best == rates[-1]:
            return rounded(best * 2)
        return rounded(best / 2) if best == rates[0] else None

    def cost(self) -> dict[str, float | None]:
        """Return tokens, time and energy of all runs of the sweep."""
        each = [used(run) for run in self.runs.values()]
        return {axis: sum_known(cost[axis] for cost in each) for axis in AXES}


def sweep(ask: Ask, rates: Sequence[float]) -> Sweep:
    """Run the learning rates, and further ones as long as the best lies on the edge."""
    runs = {rate: ask.static("sweep", rate, seed=ask.seeds[0]) for rate in rates}
    for _ in range(MAX_FURTHER):
        beyond = Sweep(runs=runs).beyond
        if beyond is None:
            break
        runs[beyond] = ask.static("sweep", beyond, seed=ask.seeds[0])
    return Sweep(runs=runs)


def table(ask: Ask, rates: Sequence[float], policies: Mapping[str, str], found: dict[str, Any]) -> None:
    """Fill `found` with the figures of one model, part by part, so that an error leaves the parts measured so far.

    Args:
        ask: Requests the runs of the model.
        rates: Initial learning rates of the sweep.
        policies: Bundles as methods, `policy:FILE@PREFERENCE`, by their names in the table.
        found: Mapping to which the figures are added.

    Raises:
        ValueError: no run of the sweep has a final loss.
    """
    tried = sweep(ask, rates)
    found |= {"precision": ask.config.precision, "tokens": ask.config.tokens, "sweep": _told_sweep(tried)}
    found["n_parameters"] = max(run.n_parameters for run in tried.runs.values())
    best = tried.best
    if best is None:
        reasons = {run.failure or "diverged" for run in tried.runs.values()}
        raise ValueError(f"{ask.name}: no run of the sweep came to an end: {'; '.join(sorted(reasons))}")
    baseline = [(seed, 1.0, ask.static("best", best, seed=seed)) for seed in ask.seeds]
    baseline += [(ask.seeds[0], share, ask.static(f"best x{share:g}", best, seed=ask.seeds[0], budget=share))
                 for share in SHARES]  # fmt: skip
    found["best"] = [{"share": share, **run_record(run, seed)} for seed, share, run in baseline]
    curves = {axis: _curve(baseline, axis) for axis in AXES}
    found["untuned"], found["steered"] = [], {name: [] for name in policies}
    for rows, what, method in [
        (found["untuned"], "untuned", UNTUNED),
        *((found["steered"][name], f"steered {name}", method) for name, method in policies.items()),
    ]:
        for start in STARTS:
            runs = ask.started(what, method, rounded(best * start))
            rows.append({"start": start, **_row(ask, runs, curves, tried)})


def _curve(baseline: Sequence[tuple[int, float, RunResult]], axis: str) -> Curve | None:
    runs = []
    for seed, share, run in baseline:
        cost = used(run)[axis]
        if cost is None:
            return None
        runs.append(CurveRun(seed=seed, share=share, used=cost, loss=run.final_validation_loss))
    return fit_curve(runs)


def _row(ask: Ask, runs: Sequence[RunResult], curves: Mapping[str, Curve | None], tried: Sweep) -> dict[str, Any]:
    return {
        "learning_rate": runs[0].spec.config.base_learning_rate,
        "multiplier": {axis: _multiplier(ask, runs, curves, axis, 0.0) for axis in AXES},
        "multiplier_with_sweep": {axis: _multiplier(ask, runs, curves, axis, tried.cost()[axis]) for axis in AXES},
        "runs": [run_record(run, seed) for run, seed in zip(runs, ask.seeds, strict=True)],
    }


def _multiplier(
    ask: Ask, runs: Sequence[RunResult], curves: Mapping[str, Curve | None], axis: str, search: float | None
) -> dict[str, Any] | None:
    """Return the median multiplier over seeds against the sweep's best; `None` if the energy is unknown."""
    curve, costs = curves[axis], [used(run)[axis] for run in runs]
    if curve is None or search is None or (axis == "energy_j" and None in costs):
        return None
    values = [
        compute_multiplier(run.final_validation_loss, cost or 1.0, curve, seed=seed, search=search)
        for run, cost, seed in zip(runs, costs, ask.seeds, strict=True)
    ]
    return {name: _short(value) for name, value in asdict(over_seeds(values)).items()}


def run_record(run: RunResult, seed: int) -> dict[str, Any]:
    """Return a run's entry in the result file."""
    last = run.intervals[-1] if run.intervals else None
    return {
        "seed": seed,
        "validation_loss": _short(run.final_validation_loss),
        "test_loss": _short(run.final_test_loss),
        "diverged": run.diverged,
        "failure": run.failure,
        **{axis: _short(value) for axis, value in used(run).items()},
        "energy_source": run.energy_source,
        "final": None if last is None else _final(last),
    }


def _final(last: Any) -> dict[str, Any]:
    names = ("learning_rate_scale", "batch_size", "precision", "finishing")
    return {name: _short(getattr(last, name)) for name in names}


def _told_sweep(tried: Sweep) -> dict[str, Any]:
    rates = sorted(tried.runs)
    return {
        "best_learning_rate": tried.best,
        "on_edge": tried.beyond is not None,
        "n_runs": len(rates),
        **{axis: _short(value) for axis, value in tried.cost().items()},
        "losses": {f"{rate:g}": _short(tried.runs[rate].final_validation_loss) for rate in rates},
    }


def _short(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


POLICY = "policy.safetensors"
RECIPE = "default"


def cases_for(bundle: PolicyBundle, setup: GpuSetup, precision: Precision) -> tuple[RunConfig, ...]:
    """Return live runs with the policy's base schedule and decisions, started too low, about right and too high."""
    config = replace(setup.tuning_config(precision), decisions=bundle.decisions)
    base = bundle.base_schedule
    if base is not None:
        config = replace(config, schedule=base.schedule, warmup_tokens=base.warmup_tokens(config.tokens))
    return tuple(replace(config, base_learning_rate=config.base_learning_rate * start) for start in STARTS)


def fine_tune(bundle: PolicyBundle, setup: GpuSetup, precision: Precision, folder: Path, end_s: float) -> PolicyBundle:
    """Fine-tune the policy on live runs, or load the stored result; an interrupted training is resumed.

    Raises:
        TimeIsUpError: the time limit `end_s` (of `time.monotonic`) has passed before the training was complete.
    """
    if (folder / POLICY).is_file():
        return PolicyBundle.load(folder / POLICY)
    left_s = end_s - time.monotonic()
    if left_s <= 0:
        raise TimeIsUpError
    cases = cases_for(bundle, setup, precision)
    against = replace(cases[0], base_learning_rate=setup.tuning.learning_rate)
    config = ppo_config(bundle, setup, left_s)
    env = one_live_env(cases, against, bundle.fields)
    log = TrainingLog({"recipe": RECIPE, **asdict(config)})
    start = weights_from(bundle, make_ppo(env, config))
    model, cost = train(env, config, folder, callbacks=[log], progress=_say(config), start=start)
    if model.num_timesteps < config.total_decisions:
        raise TimeIsUpError
    provenance = _provenance(bundle, setup, cases=cases, config=config, cost=cost, against=against)
    tuned = bundle_of(model, provenance, bundle.fields)
    tuned.save(folder / POLICY)
    return tuned


def ppo_config(bundle: PolicyBundle, setup: GpuSetup, time_limit_s: float) -> PPOConfig:
    """Return the PPO settings of the default recipe's live stage, adapted to a small training."""
    widths = [
        len(bundle.weights[f"hidden.{i}.bias"]) for i in range(sum(".bias" in name for name in bundle.weights) - 1)
    ]
    return replace(
        load_recipe(RECIPE, ["ppo.total_decisions=1"]).ppo,
        total_decisions=setup.tuning.decisions,
        n_steps=setup.tuning.n_steps,
        batch_size=setup.tuning.n_steps,
        hidden=tuple(widths),
        time_limit_s=time_limit_s if time_limit_s < float("inf") else None,
    )


def one_live_env(
    cases: tuple[RunConfig, ...], against: RunConfig, fields: Sequence[ObservationField] = OBSERVATION_FIELDS
) -> VecEnv:
    """Return one environment in this process; with two runs on one GPU, each would measure the other's energy, too."""
    make = partial(LiveTraining, cases, reference_cases=[against] * len(cases), fields=fields)
    return VecMonitor(DummyVecEnv([lambda: ScalarReward(make(), "linear")]))


def weights_from(bundle: PolicyBundle, model: Any) -> Mapping[str, torch.Tensor]:
    """Return an agent's weights with the policy network of a bundle and a newly initialised value network."""
    weights = dict(model.policy.state_dict())
    for name, value in bundle.weights.items():
        layer, _, kind = name.rpartition(".")
        place = "action_net" if layer == "action" else f"mlp_extractor.policy_net.{2 * int(layer.partition('.')[2])}"
        assert weights[f"{place}.{kind}"].shape == value.shape
        weights[f"{place}.{kind}"] = torch.from_numpy(value.copy())
    return weights


def _say(config: PPOConfig) -> Any:
    def say(decisions: int) -> None:
        if decisions % config.n_steps == 0:
            print(f"fine-tuning: {decisions} of {config.total_decisions} decisions", flush=True)

    return say


def _provenance(
    bundle: PolicyBundle,
    setup: GpuSetup,
    *,
    cases: tuple[RunConfig, ...],
    config: PPOConfig,
    cost: Mapping[str, float],
    against: RunConfig,
) -> dict[str, Any]:
    """Return the provenance of the policy; the cost of the three reference runs is stated separately."""
    live = total_cost([cost])
    reference = live_reference(against)  # cached by the training
    full = reference.energy_j
    before = bundle.provenance.get("training_cost")
    return {
        **bundle.provenance,
        "training_cost": total_cost([before, live]) if before else live,
        "fine_tuned": {
            "model": dict(setup.tuning.model),
            "text": setup.tuning.text,
            "tokens": cases[0].tokens,
            "precision": cases[0].precision,
            "learning_rates": [case.base_learning_rate for case in cases],
            "reference_learning_rate": against.base_learning_rate,
            "ppo": asdict(replace(config, time_limit_s=None)),
            "cost": live,
            "reference_energy_j": None if full is None else full * sum(reference.budgets),
        },
    }
