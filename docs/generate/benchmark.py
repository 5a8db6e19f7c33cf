"""Print `docs/benchmark.md`: what rules and learners reach, from `benchmarks/results/rl_baselines.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from docs.generate.environment import table

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "rl_baselines.json"
RULES = {
    "random": "any allowed choice of every control, with the same probability",
    "random, finish=False": "the same, without the early cool-down",
    "keep": "the base schedule (`wsd`), untouched",
    "law": "the learning rate that a scaling law advises, whose advice is off by up to ten times in these runs",
    "greedy": "GreedyLR: raises the rate while the loss falls, lowers it otherwise",
    "noise-batch": "the batch follows the gradient noise scale, on a linear schedule",
    "plateau": "a constant schedule, halved when the validation loss stalls",
    "shipped policy": "`default`, trained by `trainpilot train-agent` on many more decisions and wider instances",
}
LEARNERS = {
    "PPO": "Stable-Baselines3",
    "PPO, finish=False": "the same, without the early cool-down",
    "recurrent PPO": "sb3-contrib, with an LSTM",
    "DQN": "Stable-Baselines3, one change of one control at a time (`trainpilot.envs.OneControl`)",
}


def _cells(found: Mapping[str, Any]) -> tuple[str, ...]:
    one = found["return"]
    shares = (f"{found[name]:.2f}" for name in ("quality", "energy", "time"))
    return (f"{one['value']:.2f} [{one['low']:.2f}, {one['high']:.2f}]", *shares, f"{found['diverged']:.0%}")


def _means(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the mean return over the seeds at each point of the curves."""
    return [
        f"{fmean(value for _, value in points):.2f}" for points in zip(*(run["curve"] for run in runs), strict=True)
    ]


def _learned(result: Mapping[str, Any]) -> str:
    columns = ("Learner", "Return, lowest and highest seed", "Quality", "Energy", "Time", "Diverged", "What it is")
    if not result["learners"]:
        return "Not measured yet: `python benchmarks/rl_baselines.py` takes about twenty minutes of one core."
    rows = [(name, *_cells(result["learners"][name]), meaning) for name, meaning in LEARNERS.items()]
    points = [at for at, _ in result["learners"]["PPO"]["runs"][0]["curve"]]
    curves = [(name, *_means(found["runs"])) for name, found in result["learners"].items()]
    return f"""\
{table(columns, rows)}

![Learning curves: mean return on the scored runs by decisions, each seed and their mean](images/rl_baselines.png)

Each agent learned from about {result["decisions_of_each_agent"]:,} decisions, with {result["seeds"]} seeds (thin
lines; their mean is thick). That is little: published results of such algorithms take millions. The settings, in
`docs/examples/rl_zoo/`, were not tuned. The means by decisions so far:

{table(("Learner", *(f"{at:,}" for at in points)), curves)}"""


def markdown() -> str:
    """Return the page."""
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    rules = [(name, *_cells(result["rules"][name]), meaning) for name, meaning in RULES.items()]
    columns = ("Rule", "Return, 95 % interval", "Quality", "Energy", "Time", "Diverged", "What it does")
    return f"""\
# Baselines of reinforcement learning

Generated from [rl_baselines.json](../benchmarks/results/rl_baselines.json) by `python -m docs.generate.benchmark`.

Everybody steers the same {result["n_runs"]} simulated runs, drawn from 512 instances that no agent was trained on, in
`trainpilot/SimulatedTraining-Scalar-v0`: starting learning rates are 1/30 to 10 times the tuned one, and a preference
is drawn for each run. The return is the sum of an episode's rewards under the utility `linear`. Quality, energy and
time are relative to the tuned static schedule, which has 1 each. The interval is a bootstrap over instances.

{table(columns, rules)}

`seesaw` and `gradual-pruning` are left out: they need settings of a live run.

## Learners

{_learned(result)}

## One file

[examples/ppo.py](examples/ppo.py) is PPO with torch and Gymnasium alone. It masks what is not allowed and starts near
the base schedule, both of which the PPO of the table does not, and has `finish=False`.
`python docs/examples/ppo.py --decisions 400000` printed:

```text
{CURVE}```

## RLlib

[examples/rllib_ppo.py](examples/rllib_ppo.py) is PPO of RLlib, in an environment of its own (its first lines say how to
install it), also with `finish=False` and without masks. `python docs/examples/rllib_ppo.py` printed with RLlib 2.60 and
Gymnasium 1.2.2, with other lines between:

```text
{RLLIB_CURVE}```

These are returns of the runs that it learned from, whose choices are drawn. With the end of the budget left a
truncation, behind which a value is expected, the same agent had 0.01 between 64,000 and 80,000 decisions, not 0.10
(means of five lines, one seed each).
"""


CURVE = """\
    3,200 decisions,    1 s: return -0.052
   19,200 decisions,    4 s: return 0.010
   38,400 decisions,    7 s: return 0.096
   57,600 decisions,   10 s: return 0.130
   76,800 decisions,   14 s: return 0.198
   96,000 decisions,   17 s: return 0.217
  115,200 decisions,   21 s: return 0.318
  134,400 decisions,   24 s: return 0.309
  153,600 decisions,   27 s: return 0.257
  172,800 decisions,   31 s: return 0.282
  192,000 decisions,   34 s: return 0.298
  211,200 decisions,   38 s: return 0.322
  230,400 decisions,   41 s: return 0.327
  249,600 decisions,   44 s: return 0.255
  268,800 decisions,   46 s: return 0.276
  288,000 decisions,   50 s: return 0.368
  307,200 decisions,   53 s: return 0.351
  326,400 decisions,   56 s: return 0.293
  345,600 decisions,   60 s: return 0.312
  364,800 decisions,   63 s: return 0.308
  384,000 decisions,   67 s: return 0.348
new runs, keeping the base schedule: 0.020
new runs, the agent's likeliest action: 0.278
"""


RLLIB_CURVE = """\
    3,200 decisions: return -0.080
   32,000 decisions: return 0.028
   64,000 decisions: return 0.169
   96,000 decisions: return 0.131
  128,000 decisions: return 0.213
"""


def main() -> None:
    """Print the page."""
    print(markdown(), end="")


if __name__ == "__main__":
    main()
