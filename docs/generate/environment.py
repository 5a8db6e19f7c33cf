"""Print `docs/environment.md`: the decision problem on one page, with tables generated from the code."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from trainpilot.envs.action import ACTION_FIELDS, RULES, SPARSITY_STEP
from trainpilot.envs.decision import N_STACK
from trainpilot.envs.observation import OBSERVATION_FIELDS
from trainpilot.envs.reward import DIVERGED_QUALITY, MAX_QUALITY
from trainpilot.llm_runtime.schedules import BUDGET_SHARES, COOLDOWN_SHARE, EVALUATE_EVERY

ROOT = Path(__file__).parents[2]
N_FIELDS = len(OBSERVATION_FIELDS)
N_CHOICES = sum(len(field.choices) for field in ACTION_FIELDS)


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def action_table() -> str:
    """Return the table of action fields: their choices in the order of their numbers, and the choice that keeps."""
    return table(
        ("Num", "Action", "Choices 0, 1, ...", "Keep", "Meaning"),
        (
            (i, f"`{field.name}`", ", ".join(field.choices), field.keep, field.meaning)
            for i, field in enumerate(ACTION_FIELDS)
        ),
    )


def observation_table() -> str:
    """Return the table of observation fields with unit, range and meaning."""
    return table(
        ("Num", "Field", "Group", "Unit", "Low", "High", "Meaning", "Metered"),
        (
            (
                i,
                f"`{field.name}`",
                field.group,
                field.unit,
                f"{field.low:g}",
                f"{field.high:g}",
                field.meaning,
                "yes" if field.metered else "",
            )
            for i, field in enumerate(OBSERVATION_FIELDS)
        ),
    )


def mask_table() -> str:
    """Return the table of mask rules, with the position of each action's choices in the flat mask."""
    rows, start = [], 0
    for field in ACTION_FIELDS:
        end = start + len(field.choices)
        masked_if = "; ".join(rule.when for rule in RULES if rule.field == field.name)
        rows.append((f"`[{start}:{end}]`", f"`{field.name}`", masked_if))
        start = end
    return table(("Mask", "Action", "A choice other than keep is masked if"), rows)


EXAMPLE = """\
import gymnasium
import numpy as np

import trainpilot.envs  # registers trainpilot/LiveTraining-v0
from trainpilot.envs import ScalarReward
from trainpilot.llm_runtime import RunConfig

case = RunConfig(model="llama-nano", tokens=40_960, batch_size=8, sequence_length=64, decisions=10)
env = ScalarReward(gymnasium.make("trainpilot/LiveTraining-v0", cases=[case]), utility="linear")
env.action_space.seed(0)
observation, info = env.reset(seed=0)
ended, total = False, 0.0
while not ended:
    masks = np.split(env.action_masks().astype(np.int8), np.cumsum(env.action_space.nvec)[:-1])
    action = env.action_space.sample(mask=tuple(masks))
    observation, reward, terminated, truncated, info = env.step(action)
    ended, total = terminated or truncated, total + reward
print(f"loss {info['loss']:.2f} nats/token, utility {total:.2f}")
"""


def _introduction() -> str:
    return f"""\
# The environment

Generated from the tables in `envs/` by `python -m docs.generate.environment`; edit it there.

An episode of `trainpilot/LiveTraining-v0` is one training run of one language model. Its budget is divided into
`decisions` intervals of equal length, and before each interval the agent sets the controls. The agent *multiplies* the
case's base schedule (by default warm-up, then linear to zero): an agent that always keeps reproduces that schedule. A
case is a `trainpilot.llm_runtime.RunConfig`. Before the first episode of a case, its *reference* is run: the untouched
base schedule at {_shares()} of the budget. Energy, time and quality are given relative to it.

```python
{EXAMPLE}```

An episode is real training: the example takes a few seconds on a CPU. Time and energy are measured, so they differ
between two episodes; on a CPU everything else is reproducible with the same seed.

`trainpilot/SimulatedTraining-v0` replaces the real run by a simulated one. Actions, observations, rewards, masks and
episode ends come from the same code, so a policy works in both. Every episode draws a new simulated run, and is exactly
reproducible with the same seed. {_speed()}

## How to make it

| Name | Run | Reward |
| --- | --- | --- |
| `trainpilot/LiveTraining-v0` | real | vector |
| `trainpilot/LiveTraining-Scalar-v0` | real | scalar |
| `trainpilot/SimulatedTraining-v0` | simulated | vector |
| `trainpilot/SimulatedTraining-Scalar-v0` | simulated | scalar |

`import trainpilot.envs` registers these ids. Worker processes that do not import it, as those of `AsyncVectorEnv`, take
`trainpilot.envs:trainpilot/SimulatedTraining-Scalar-v0`. Gymnasium's `check_env` finds nothing in the scalar ids; of
the others it says that their reward is a vector, which is MO-Gymnasium's convention.

```python
import gymnasium

import trainpilot.envs

env = gymnasium.make(
    "trainpilot/SimulatedTraining-Scalar-v0",
    preference=(0.7, 0.15, 0.15),  # or "quality=1", or {{"quality": 1}}; by default drawn for each episode
    utility="linear",
    finish=False,
    render_mode="rgb_array",
)
env.reset(seed=0)
env.step(env.action_space.sample())
picture = env.render()

many = gymnasium.make_vec("trainpilot/SimulatedTraining-Scalar-v0", num_envs=64, autoreset_mode="NextStep")
observations, infos = many.reset(seed=0)
```

* **`finish=False`** masks the early cool-down. An untrained policy of random choices begins it after a fifth of the
  budget, and so ends its episodes after a dozen of 50 decisions: it learns in a part of the problem. Either leave it
  out, or start with a policy that rarely chooses it and mostly keeps, as [examples/ppo.py](examples/ppo.py) and
  `trainpilot train-agent` do.
* **`render_mode="rgb_array"`** draws the run so far: loss, learning rate and batch against the share of the budget.
* **`gymnasium.make_vec`** makes `VectorSimulatedTraining`, which steps thousands of runs as arrays. A run that ends is
  replaced in the same step; with `autoreset_mode="NextStep"` in the next one.
* **Stable-Baselines3**: `make_vec_env("trainpilot/SimulatedTraining-Scalar-v0", 8)`, or for speed
  `trainpilot.agents.sb3_env.ScalarVecEnv(VectorSimulatedTraining(64))`. MaskablePPO finds the masks in both. For
  algorithms with `Discrete` actions alone, such as DQN, `trainpilot.envs.OneControl` changes one control at a time.
* **rl-baselines3-zoo** reads the settings in `docs/examples/rl_zoo/`, which are not tuned: `python -m rl_zoo3.train
  --algo ppo --env trainpilot/SimulatedTraining-Scalar-v0 --gym-packages trainpilot.envs --conf-file
  docs/examples/rl_zoo/ppo.yml`.
* **CleanRL's style**: [examples/ppo.py](examples/ppo.py) is PPO in one file, with torch and Gymnasium alone. What it
  reaches, and what other learners and fixed rules do, is on the page [Baselines](benchmark.md).
* **RLlib**: [examples/rllib_ppo.py](examples/rllib_ppo.py) is its PPO on runs that are stepped as arrays. RLlib pins an
  older Gymnasium: install it without `constraints.txt`, in an environment of its own."""


def _speed() -> str:
    """Return the measured speed in a sentence."""
    found = json.loads((ROOT / "benchmarks/results/environment_speed.json").read_text(encoding="utf-8"))
    step, reset, load = found["step_ms"], found["reset_ms"], found["load_of_the_machine"][0]
    return f"""\
A step takes {step["least"]:.1f} ms of
CPU and a reset {reset["least"]:.1f} ms at the least of {found["episodes"]} episodes, and {step["median"]:.1f} and \
{reset["median"]:.1f} ms at the median, on a machine
with a load of {load:.0f} on {found["machine"]["cores"]} cores \
([environment_speed.json](../benchmarks/results/environment_speed.json))."""


def _shares() -> str:
    *first, last = (f"{share:.0%}" for share in BUDGET_SHARES)
    return f"{', '.join(first)} and {last}"


def _spaces() -> str:
    nvec = [len(field.choices) for field in ACTION_FIELDS]
    keep = [field.keep for field in ACTION_FIELDS]
    return f"""\
## Actions

`MultiDiscrete({nvec})`, one choice per control. `{keep}` changes nothing. Doubling the batch
multiplies the learning rate by sqrt 2 and keeps the half-life of Adam's second moment in tokens; halving does the
reverse. A change of batch is therefore mainly a choice of efficiency. One pruning step removes {SPARSITY_STEP:.0%} of
the prunable weights or channels. A cool-down lasts {COOLDOWN_SHARE:.0%} of the tokens so far; then the run ends.

{action_table()}

## Masks

`env.action_masks()` returns a bool array of shape ({N_CHOICES},), action after action, in the format of sb3-contrib's
MaskablePPO. The choice that keeps is always allowed. A masked choice that is taken nevertheless is replaced by keep;
`info["refusals"]` lists these choices with their reasons.

{mask_table()}

## Observations

`Box(-1, 1, ({N_STACK} * {N_FIELDS},), float32)`: the last {N_STACK} observations, of which
`observation.reshape({N_STACK}, {N_FIELDS})[-1]` is the newest. At the start of an episode all are equal to the first.
Every field is a ratio or a logarithm, so that it means the same on every model, and no field needs the reference. A
raw value x is clipped to [low, high] and scaled by 2 (x - low)/(high - low) - 1. A value that is unknown or not finite
becomes 0, the middle of the range.

The argument `fields` selects some of the fields; a policy bundle lists those that it sees. A *metered* field depends on
a clock, an energy meter or the memory in use, which never repeat exactly. A run under a token budget with a preference
for quality alone is blind to these: they are encoded as unknown, and no precision is offered that a clock had to judge.

{observation_table()}"""


def _reward() -> str:
    return f"""\
## Reward

A vector, float32 of shape (3,), by MO-Gymnasium's convention (`reward_space`, `reward_dim`). With gamma = 1 the
rewards of an episode sum to (quality, -energy, -time) relative to the reference, so that 1 % of each means the same on
every model. In a live run, always keeping yields about (1, -1, -1). The reference of a simulated run is a tuned static
schedule, which its own base schedule falls short of ([Baselines](benchmark.md)).

| Num | Objective | Per interval |
| --- | --- | --- |
| 0 | quality | Q(loss now) - Q(loss before), with Q = 0 at the start |
| 1 | energy | -joules / joules of the reference; 0 while unknown |
| 2 | time | -seconds / seconds of the reference |

The quality Q(loss) is a function of the compute-equivalent c, the share of the budget that the reference needs for the
same loss: Q = c up to 1 and Q = 1 + log(c) above, so that a badly tuned base schedule does not make a costly run look
good. c is read from a curve through the reference's final losses at its budgets: log(budget) is linear in log(loss)
between the points and is extrapolated beyond them, up to c = {MAX_QUALITY:g}. Points that are not in descending order
are dropped, but never that of the full budget: the reference's own final loss has Q = 1. The loss is the interval's
mean training loss, and in the last interval the validation loss. A diverged run ends with Q = {DIVERGED_QUALITY:g}.
Seconds include the curvature probe and changes of controls, but not the evaluation, which takes place every
{EVALUATE_EVERY} decisions and at the end.

The argument `utility`, and the wrapper `ScalarReward(env, utility)`, make it a scalar reward: the change of a utility
of the run so far, so that the rewards of an episode sum to the utility of its outcome. The weights w are the episode's
preference; f is the sum of the reward vectors.

| Utility | Formula |
| --- | --- |
| `linear` | w'f |
| `logarithmic` | w_q log c - w_e E - w_t T, with E and T energy and time over the reference's |
| `tchebycheff` | -(max_i w_i (z_i - f_i) + 0.05 sum_i w_i (z_i - f_i)), z = (1, -0.5, -0.5) |
| `constrained` | saving of energy and time, minus 10 x the excess over 0.01 nats/token of loss and 5 % of time |
| `product` | -P^1.5 (a T + b E): perplexity, time and energy over the reference's (Wallace et al. 2025) |

Where quality and costs grow alike, `linear` is a knife's edge: the best length of a run jumps from the shortest to the
whole budget as the weight of quality crosses a half. Under `logarithmic` it is w_q / (1 - w_q) of the budget, at most
all. A budget in the currency that is cared for needs neither: quality alone, under `RunConfig(budget="600s")`.

## Episode

`reset` draws a case and a preference (with a quality weight of at least a half), or uses
`options={{"case": i, "preference": "quality=1"}}`. Weights and data are initialised with the case's own seed.

`trainpilot/SimulatedTraining-v0` draws a simulated run instead, or uses `"plant_seed": i`.

* **Terminated**: the run diverged (its loss is not finite), or a cool-down that the agent started is complete.
* **Truncated**: the budget is used up. Every run ends there, and observations say how near that is. Without discount an
  algorithm should treat it as an end, as `ScalarVecEnv` and the examples do: a value expected behind it has no anchor.

`info` of a step: `requested` and `effective` controls, `refusals`, `reward_terms`, `preference` (w), `loss` and
`loss_increase` over the reference's final loss in nats/token (10 if diverged), `time_s`, `energy_j`, `energy_source`
(`measured_counter`, `measured_power`, `estimated` or `None`), `diverged`. Scalar rewards add `vector_reward` and
`reward_weights`."""


def markdown() -> str:
    """Return the page."""
    return "\n\n".join([_introduction(), _spaces(), _reward()]) + "\n"


def main() -> None:
    """Print the page."""
    print(markdown(), end="")


if __name__ == "__main__":
    main()
