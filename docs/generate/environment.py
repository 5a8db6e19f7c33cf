"""Print `docs/environment.md`: the whole decision problem on one page, with the tables that the code itself uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from trainpilot.envs import action as safety
from trainpilot.envs.action import ACTION_FIELDS, SPARSITY_STEP
from trainpilot.envs.decision import N_STACK
from trainpilot.envs.observation import OBSERVATION_FIELDS
from trainpilot.envs.reward import DIVERGED_QUALITY, MAX_QUALITY
from trainpilot.llm_runtime.schedules import BUDGET_SHARES, COOLDOWN_SHARE, EVALUATE_EVERY

N_FIELDS = len(OBSERVATION_FIELDS)
N_CHOICES = sum(len(field.choices) for field in ACTION_FIELDS)


def table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def action_table() -> str:
    """Return the action components: choices in the order of their numbers, and which of them changes nothing."""
    return table(
        ("Num", "Action", "Choices 0, 1, ...", "Keep", "Meaning"),
        (
            (i, f"`{field.name}`", ", ".join(field.choices), field.keep, field.meaning)
            for i, field in enumerate(ACTION_FIELDS)
        ),
    )


def observation_table() -> str:
    """Return the observation fields with unit, range and meaning."""
    return table(
        ("Num", "Field", "Unit", "Low", "High", "Meaning"),
        (
            (i, f"`{field.name}`", field.unit, f"{field.low:g}", f"{field.high:g}", field.meaning)
            for i, field in enumerate(OBSERVATION_FIELDS)
        ),
    )


def mask_table() -> str:
    """Return the rules of the safety layer, with where each action's choices stand in the flat mask."""
    low, high = safety.LEARNING_RATE_SCALE_RANGE
    window = f"between {safety.PRUNING_WINDOW[0]:.0%} and {safety.PRUNING_WINDOW[1]:.0%} of the budget"
    rules = {
        "learning_rate": f"the scale would leave [1/{1 / low:g}, {high:g}]",
        "batch_size": "the batch would leave the run's limits, or is odd and cannot be halved",
        "precision": "in force already; the device lacks it; measured there as not worth it; "
        f"{safety.MAX_PRECISION_SWITCHES} switches were made",
        "pruning": f"the case does not prune; not {window}; the sparsity would exceed {safety.MAX_SPARSITY:.0%}",
        "finish": f"before {safety.FINISH_FROM:.0%} of the budget; the cool-down has begun",
    }
    rows, start = [], 0
    for field in ACTION_FIELDS:
        end = start + len(field.choices)
        rows.append((f"`[{start}:{end}]`", f"`{field.name}`", rules[field.name]))
        start = end
    return table(("Mask", "Action", "A choice other than keep is masked where"), rows)


EXAMPLE = """\
import gymnasium
import numpy as np

import trainpilot.envs  # registers trainpilot/LiveTraining-v0
from trainpilot.envs.scalarise import ScalarReward
from trainpilot.llm_runtime.run_config import RunConfig

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

Written from the tables in `envs/` by `python -m docs.generate.environment`; change it there.

`trainpilot/LiveTraining-v0` is one training of one language model, cut into `decisions` intervals of equal shares of a
token budget. Between two intervals the agent sets the controls of the next. It *multiplies* the case's base schedule
(warm-up, then linear to zero by default): an agent that always keeps is that base schedule. A case is a
`trainpilot.llm_runtime.config.RunConfig`. Before the first episode of a case, its *reference* is run: the untouched
base schedule at {_shares()} of the budget. Energy, time and quality are told in its units.

```python
{EXAMPLE}```

An episode is real training: the example takes some seconds on a processor. Time and energy are measured, so
two episodes differ in these; everything else repeats under one seed on a processor.

`trainpilot/SimulatedTraining-v0` is the same with a simulated run instead of a real one: same actions, observations,
rewards, masks and ends, from the same code, so that a policy cannot tell which of the two it steers. An episode takes
milliseconds, its run is drawn anew each time, and it repeats exactly under one seed.
`trainpilot.envs.environments.VectorSimulatedTraining` steers thousands of such runs at once, as a Gymnasium
`VectorEnv` with autoreset in the same step: that is what policies are pre-trained in."""


def _shares() -> str:
    *first, last = (f"{share:.0%}" for share in BUDGET_SHARES)
    return f"{', '.join(first)} and {last}"


def _spaces() -> str:
    nvec = [len(field.choices) for field in ACTION_FIELDS]
    keep = [field.keep for field in ACTION_FIELDS]
    return f"""\
## Actions

`MultiDiscrete({nvec})`, one choice per control. `{keep}` changes nothing. Doubling the batch
multiplies the learning rate by sqrt 2 and keeps the half-life of Adam's second moment in tokens, halving does the
reverse: the choice is one of efficiency. One pruning step is {SPARSITY_STEP:.0%} of the prunable weights or channels.
A cool-down lasts {COOLDOWN_SHARE:.0%} of the tokens so far, then the run ends.

{action_table()}

## Masks

`env.action_masks()` returns bool of shape ({N_CHOICES},), action after action, as MaskablePPO of sb3-contrib wants
it. The choice that keeps is always allowed. A masked choice that is taken nevertheless is treated as keep;
`info["refusals"]` says which, and why.

{mask_table()}

## Observations

`Box(-1, 1, ({N_STACK} * {N_FIELDS},), float32)`: the last {N_STACK} observations, of which
`observation.reshape({N_STACK}, {N_FIELDS})[-1]` is the newest. At the start of an episode the first one fills all.
Every field is a ratio or a logarithm, so that it means the same on every model, and none needs the reference. A raw
value x is clipped to [low, high] and scaled by 2 (x - low)/(high - low) - 1. What is unknown, or not a number,
becomes 0, the middle of the range.

{observation_table()}"""


def _reward() -> str:
    return f"""\
## Reward

A vector, float32 of shape (3,), by MO-Gymnasium's convention (`reward_space`, `reward_dim`). With gamma = 1 an
episode sums to (quality, -energy, -time) in units of the reference: always keeping brings about (1, -1, -1), and
1 % of each is the same size on every model.

| Num | Objective | Per interval |
| --- | --- | --- |
| 0 | quality | Q(loss now) - Q(loss before), with Q = 0 at the start |
| 1 | energy | -joules / joules of the reference; 0 while unknown |
| 2 | time | -seconds / seconds of the reference |

Q(loss) is what the compute-equivalent c, the share of the budget that the reference needs for this loss, is worth: c
up to 1 and 1 + log(c) above, so that a badly tuned base schedule does not make waste look like a bargain. The final
losses of the reference at its budgets are points of a curve. Between them log(budget) is linear in log(loss), beyond
them the end pieces go on, up to c = {MAX_QUALITY:g}. Points out of order are left out, never the full run's: the
reference's own final loss is worth 1. The loss is the interval's mean training loss, and in the last interval the
validation loss. A diverged run ends with Q = {DIVERGED_QUALITY:g}. Seconds include the curvature probe and the
switching of controls, not the evaluation, which takes place every {EVALUATE_EVERY} decisions and at the end.

`ScalarReward(env, utility)` turns the vector into one number per interval: the change of a utility of the run so
far, so that an episode sums to the utility of its outcome. The weights w are the episode's preference; f is the sum
of the vectors.

| Utility | Formula |
| --- | --- |
| `linear` | w'f |
| `tchebycheff` | -(max_i w_i (z_i - f_i) + 0.05 sum_i w_i (z_i - f_i)), z = (1, -0.5, -0.5) |
| `constrained` | saving of energy and time, less 10 x what exceeds 0.01 nats/token of loss and 5 % of time |
| `product` | -P^1.5 (a T + b E): perplexity, time and energy over the reference's (Wallace et al. 2025) |

## Episode

`reset` draws a case and a preference (quality weighs at least half), or takes
`options={{"case": i, "preference": Preference(...)}}`. The run starts with the case's own seed for weights and data.

`trainpilot/SimulatedTraining-v0` draws a run of the simulator instead, or takes `"plant_seed": i`.

* **Terminated**: the run diverged (its loss is not finite), or a cool-down that the agent began is complete.
* **Truncated**: the budget is used up.

`info` of a step: `requested` and `effective` controls, `refusals`, `reward_terms`, `preference` (w), `loss` and
`loss_increase` over the reference's final loss in nats/token (10 if diverged), `time_s`, `energy_j`, `energy_source`
(`measured_counter`, `measured_power`, `estimated` or `None`), `diverged`. `ScalarReward` adds `vector_reward` and
`reward_weights`."""


def markdown() -> str:
    """Return the page."""
    return "\n\n".join([_introduction(), _spaces(), _reward()]) + "\n"


def main() -> None:
    """Print the page."""
    print(markdown(), end="")


if __name__ == "__main__":
    main()
