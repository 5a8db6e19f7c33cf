"""Run a population by Ray Tune's Population Based Training, each member on a machine of the cluster.

Tune decides who copies whom and how learning rate and batch are perturbed; what is here lets our runs be its trials.
"""

from __future__ import annotations

import math
import os
import random
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

from ray import tune
from ray.exceptions import RayTaskError
from ray.tune.schedulers import PopulationBasedTraining

from trainpilot.experiments.compare.execute import FAILURES, check_files, failed, said
from trainpilot.experiments.compare.population import (
    SCALES,
    Member,
    Stretch,
    allowed,
    batches_of,
    population_result,
)
from trainpilot.experiments.elsewhere import Home
from trainpilot.experiments.results import RunResult, RunSpec
from trainpilot.llm_runtime.files import cache_dir

QUIET = {"TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_AIR_NEW_OUTPUT": "0"}
"""Variables by which Tune writes no logs of its own and leaves the working directory alone."""
QUANTILE = 0.25
"""Share of the members that copy at a milestone, and share of those that are copied."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every member is given."""

    home: Home
    spec: RunSpec
    key: str
    energy_shared: bool


class Trial(tune.Trainable):  # type: ignore[misc]
    """A member as a trial of Tune. It begins when it is first asked, so that its errors are those of its run."""

    def setup(self, config: dict[str, Any], work: Work) -> None:
        """Take the work."""
        self.work = work
        self._begun: Member | None = None

    @property
    def member(self) -> Member:
        """The member, in this process."""
        if self._begun is None:
            work = self.work
            work.home.enter()
            check_files(work.spec, work.key)
            self._begun = Member(work.spec, work.key, energy_shared=work.energy_shared)
        return self._begun

    def step(self) -> dict[str, Any]:
        """Train up to the next milestone. A copy has its donor's settings, whose member's number is not its own."""
        own = int(self.trial_id.rpartition("_")[2])
        stretch = self.member.train(**self.config | {"member": own})
        return {"loss": stretch.score, "stretch": stretch, "done": stretch.result is not None}

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Return the member's state."""
        return self.member.state()

    def load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on from a state."""
        self.member.restore(checkpoint)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Become another trial, which begins anew unless a state follows."""
        self.member.restart()
        return True


class _Gathered(tune.Callback):  # type: ignore[misc]
    """Keeps what the members report."""

    def __init__(self) -> None:
        self.stretches: list[Stretch] = []

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        """Keep a stretch."""
        self.stretches.append(result["stretch"])


def train_population(spec: RunSpec, key: str, *, energy_shared: bool, threads: int, gpus: float) -> RunResult:
    """Train a population on the Ray cluster that this process belongs to, and return its result.

    Members wait for each other at every milestone, so that the result depends neither on their number side by side nor
    on their speed. Their states go from one to another by `TRAINPILOT_CACHE`.

    Args:
        spec: The run; its steering says how many members and milestones.
        key: Name of the run's file.
        energy_shared: Whether other runs share the energy meter and the cores.
        threads: Torch threads of each member, and the cores that it occupies.
        gpus: GPUs of each member.

    Raises:
        ValueError: a machine lacks the files or the versions of home.
        BrokenExecutor: a member's process or machine has died.
    """
    os.environ |= QUIET
    random.seed(spec.config.seed)  # the generator that Tune's scheduler draws from
    work = Work(home=Home.here(threads), spec=spec, key=key, energy_shared=energy_shared)
    scheduler = PopulationBasedTraining(
        time_attr="training_iteration",
        metric="loss",
        mode="min",
        perturbation_interval=1,
        quantile_fraction=QUANTILE,
        hyperparam_mutations={"learning_rate_scale": _scale, "batch_size": batches_of(spec.config)},
        custom_explore_fn=allowed,
        log_config=False,
        synch=True,
    )
    gathered = _Gathered()
    place = cache_dir() / "populations"
    place.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{key}-", dir=place) as folder:
        tuner = tune.Tuner(
            tune.with_resources(tune.with_parameters(Trial, work=work), {"cpu": threads, "gpu": gpus}),
            param_space={"member": tune.grid_search(list(range(spec.members)))},
            tune_config=tune.TuneConfig(scheduler=scheduler, reuse_actors=True),
            run_config=tune.RunConfig(
                name="trials",
                storage_path=os.path.abspath(folder),
                verbose=0,
                callbacks=[gathered],
                failure_config=tune.FailureConfig(fail_fast=True),
                checkpoint_config=tune.CheckpointConfig(num_to_keep=3),
            ),
        )
        errors = tuner.fit().errors
    return _failed(spec, key, errors[0]) if errors else population_result(spec, gathered.stretches)


def _scale() -> float:
    """Draw a factor on the learning rate, evenly on a logarithmic axis."""
    low, high = map(math.log, SCALES)
    return float(allowed({"learning_rate_scale": math.exp(random.uniform(low, high))})["learning_rate_scale"])


def _failed(spec: RunSpec, key: str, error: BaseException) -> RunResult:
    """Return the result of a population of which a run failed. Raises what ends the command, or has it tried again."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    if cause is None:
        raise BrokenExecutor(str(error))
    if not isinstance(cause, FAILURES) or str(cause).startswith("on: "):
        raise cause
    return failed(spec, key, said(cause))
