"""The options of every command, with their help texts. Imports nothing heavy, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from trainpilot.envs.preference import Preference
from trainpilot.llm_runtime.carbon import DEFAULT_GRID_INTENSITY_G_PER_KWH
from trainpilot.llm_runtime.controls import Precision, Pruning
from trainpilot.llm_runtime.run_config import RunConfig
from trainpilot.llm_runtime.schedules import ScheduleName


@dataclass(frozen=True, kw_only=True)
class ReplayOptions:
    """Train a model, steered by a policy, or under its base schedule with `--policy none`.

    Killed at any moment, the same command goes on where it was and ends with the same result.

    Try for instance:

      trainpilot replay --policy none --model llama-micro --out runs/base
      trainpilot replay --policy runs/agent/policy.safetensors --model gpt2-micro --text docs/*.md --out runs/steered
    """

    out: Path
    """Folder for summary.json, telemetry.jsonl, tb/ and model/. An interrupted run in it is resumed."""
    policy: str = "none"
    """`none` for the plain base schedule, or a bundle that train-agent wrote."""
    model: str = "llama-nano"
    """Preset (llama-nano, llama-micro, llama-mini, gpt2-nano, gpt2-micro), config JSON, model folder or Hub id."""
    text: tuple[str, ...] = ("stdlib",)
    """Text: `stdlib`, `stdlib:asyncio,json`, `python-docs`, UTF-8 files, folders, globs, or `hub:OWNER/NAME`."""
    tokens: int = 1_000_000
    """Budget in tokens."""
    batch_size: int = 16
    """Starting batch, in sequences."""
    sequence_length: int = 128
    """Tokens per sequence."""
    base_learning_rate: float = 1e-3
    """Peak learning rate of the base schedule."""
    schedule: ScheduleName = "linear"
    """Base schedule: linear (to zero), cosine (to 10 %), wsd (last 20 % to zero), constant."""
    warmup_tokens: int | None = None
    """Tokens of linear warm-up; 2 % of the budget if not given."""
    precision: Precision = "fp32"
    """Starting precision of the matrix products."""
    pruning: Pruning = "none"
    """What the policy may prune: nothing, weight masks (magnitude or evolution), or feed-forward channels (width)."""
    decisions: int | None = None
    """Decisions per run; by default as many as the policy was trained with, 50 without a policy."""
    preference: str = str(Preference())
    """Weights on quality, energy and time, such as quality=0.5,energy=0.4,time=0.1."""
    seed: int = 0
    """Seeds the initial weights and the data order."""
    device: str = "auto"
    """auto, cpu or cuda."""
    threads: int = 0
    """Torch threads; 0 takes all cores."""
    reference: bool = False
    """Also run the base schedule (once, cached, about 1.75 runs) and report loss, time and energy against it."""
    probe: bool = True
    """Probe the curvature once per decision."""
    grid_intensity: float = DEFAULT_GRID_INTENSITY_G_PER_KWH
    """Grams of CO2e per kWh of your electricity."""

    def run_config(self, decisions: int) -> RunConfig:
        """Return the run, with `decisions` where the option is not given. Raises `ValueError` for a bad setting."""
        return RunConfig(
            model=self.model,
            text=self.text,
            tokens=self.tokens,
            batch_size=self.batch_size,
            sequence_length=self.sequence_length,
            base_learning_rate=self.base_learning_rate,
            schedule=self.schedule,
            warmup_tokens=self.warmup_tokens,
            precision=self.precision,
            pruning=self.pruning,
            decisions=self.decisions if self.decisions is not None else decisions,
            seed=self.seed,
            device=self.device,
        )


@dataclass(frozen=True, kw_only=True)
class TrainAgentOptions:
    """Train a policy with PPO on live training runs, and write it as a bundle.

    Killed at any moment, the same command goes on from the last update. Watch it: tensorboard --logdir OUT/tb

    Try for instance:

      trainpilot train-agent --recipe tiny --out runs/agent
      trainpilot train-agent --recipe tiny --out runs/agent --set ppo.total_decisions=2000 ppo.learning_rate=1e-3
    """

    recipe: str
    """Name of a recipe that comes with trainpilot (demo, tiny), or a YAML file of your own."""
    out: Path
    """Folder for policy.safetensors, recipe.json, checkpoint.pt and tb/."""
    set: tuple[str, ...] = ()
    """Changes to the recipe, as key=value with dots for levels: ppo.seed=1 utility=linear."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """Compare methods over cases and seeds, against baselines that are tuned as hard as they can be, in one report.

    Every finished run is a file of its own: killed at any moment, the same command goes on; with another method or one
    more seed only what is missing is run. The number of processes changes no loss.

    Methods: constant, cosine (the untuned default), linear, wsd, plateau, schedule-free, prodigy, noise-batch, seesaw,
    gradual-pruning, random; tuned (the best static setting a search finds), tuned-linear, tuned-cosine, tuned-wsd,
    tuned-constant, check-self, check-budget, check-rate; tuned-tpe, tuned-halving, nsga2; policy:FILE for a bundle,
    policy:FILE@quality=0.5+energy=0.5 under that preference, open-loop:FILE for its average schedule without feedback.

    Try for instance:

      trainpilot compare --cases quick
      trainpilot compare --cases test --methods cosine,tuned,policy:runs/agent/policy.safetensors --out runs/mine
      trainpilot compare --cases my-cases.yaml --methods default --seeds 5 --out runs/mine
    """

    cases: str = "quick"
    """`quick`, `test` or `train`, which come with trainpilot, or a YAML or JSON file of your own."""
    out: Path | None = None
    """Folder for report.html, three CSV files, JSON, runs/, costs/ and tensorboard/; runs/compare-CASES by default."""
    methods: str = "default"
    """Names with commas between them; `default` is everything but tuned-tpe, tuned-halving, nsga2 and policies."""
    seeds: int = 3
    """Paired seeds per case and method: 3 for a look, 5 for a claim."""
    jobs: int = 0
    """Runs side by side; 0 takes as many as there are cores for."""
    threads: int = 1
    """Torch threads of each run. Unlike jobs it changes the last digits of a loss: keep it within one folder."""
    plan: bool = False
    """Say how many runs and how long, measure the cost tables, and stop."""
    report_only: bool = False
    """Run nothing; write the report from the runs that are there, while others may still be running."""
    tensorboard: bool = True
    """Write the runs for TensorBoard too."""

    @property
    def folder(self) -> Path:
        """Folder for everything."""
        return self.out if self.out is not None else Path("runs") / f"compare-{Path(self.cases).stem}"


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Do the main job once, in at most ten minutes on two cores.

    Reference runs, a short PPO training on live runs of a small Llama, then the trained policy steers a larger model of
    another architecture that it has never seen. What is printed was measured, also where the steered run is worse.
    """

    out: Path = Path("runs/demo")
    """Folder for everything; an interrupted demo in it is resumed."""
    seed: int = 0
    """Seeds the runs and the agent."""


@dataclass(frozen=True)
class DoctorOptions:
    """Say what can be measured and controlled on this machine, and what pays."""

    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class InspectOptions:
    """Show where a bundle comes from, or how a run went, in the terminal; say how to open TensorBoard."""

    path: Annotated[Path, tyro.conf.Positional]
    """A bundle (policy.safetensors) or the folder of a run or of an agent."""
