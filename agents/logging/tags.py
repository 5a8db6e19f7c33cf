"""Define every TensorBoard tag with its unit and meaning, in one table.

The writers (`run_log`, `training_log`) take their tag names from this table, and `docs/metrics.md` is printed from it:
`python -m trainpilot.agents.logging.tags > docs/metrics.md`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import quote

from trainpilot.envs.action import ACTION_FIELDS, ActionField
from trainpilot.envs.observation import OBSERVATION_FIELDS
from trainpilot.envs.reward import OBJECTIVES
from trainpilot.llm_runtime.config import PRECISIONS

Writer = Literal["run", "agent", "simulator"]


@dataclass(frozen=True)
class Tag:
    """A TensorBoard tag with its unit and meaning."""

    name: str
    unit: str
    """SI unit, `text` or `picture`."""
    meaning: str


@dataclass(frozen=True)
class Group:
    """All tags that share a prefix."""

    prefix: str
    written_by: Writer
    """Where the tags are written: in a steered run, in any training of a policy, or only in its simulator stage."""
    about: str
    tags: tuple[Tag, ...]


def choice_tag(field: ActionField, choice: int) -> str:
    """Return the tag of one choice of an action field, for example `action/batch_size/double`."""
    slug = re.sub(r"[^\w.]+", "_", field.choices[choice].replace("+", "plus_").replace("%", "percent"))
    return f"action/{field.name}/{slug}"


def multiline(*names: str) -> list[object]:
    """Return a multi-line chart of these tags for TensorBoard's custom scalars (which expect regular expressions)."""
    return ["Multiline", [f"^{re.escape(TAGS[name].name)}$" for name in names]]


def _group(prefix: str, written_by: Writer, about: str, *rows: tuple[str, ...]) -> Group:
    return Group(prefix, written_by, about, tuple(Tag(f"{prefix}/{name}", *rest) for name, *rest in rows))


_CODE = ", ".join(f"{index} {name}" for index, name in enumerate(PRECISIONS))
_NATS = "nats/token"
_SHARE = "share"
_REFERENCE = "share of the reference"

_CONTROLS = (
    ("learning_rate_scale", "ratio", "factor on the base schedule at the starting batch"),
    ("batch_size", "sequences", "sequences per optimiser step"),
    ("precision", "code", f"number format of the matrix products: {_CODE}"),
    ("sparsity", _SHARE, "zero weights or removed channels to reach by the interval's end"),
    ("finish", "0 or 1", "1 asks for the cool-down"),
)
"""The fields of `Controls`. The effective values have the names of `Telemetry`."""

_RUN_GROUPS = (
    _group(
        "loss", "run", "Mean cross-entropy of the next token.",
        ("train", _NATS, "mean training loss over the interval"),
        ("train_std", _NATS, "spread of the per-step training loss around its trend"),
        ("train_max", _NATS, "largest per-step training loss of the interval"),
        ("validation", _NATS, "validation loss in float32 on fixed windows; repeats until it is measured again"),
    ),
    _group(
        "decision", "run", "The choices that the policy requested and those that the action masks allowed, counted "
        "from 'keep' in the order of the table of choices: 0 changes nothing.",
        *((field.name, "choices", f"requested; {field.meaning}") for field in ACTION_FIELDS),
        *((f"{field.name}_allowed", "choices", "allowed") for field in ACTION_FIELDS),
    ),
    _group(
        "controls_requested", "run", "Controls requested for the interval.",
        *_CONTROLS,
    ),
    _group(
        "controls_effective", "run", "The same controls, read back from optimiser, batches and model.",
        ("learning_rate", "1", "learning rate of the last step: base schedule x scale x the batch's neutral factor"),
        ("batch_size", "sequences", "mean sequences per step, from the tokens really consumed"),
        ("micro_batch_size", "sequences", "sequences that go through the model at once"),
        ("precision", "code", f"read from the output of a matrix product: {_CODE}"),
        ("sparsity", _SHARE, "zero weights or removed channels, counted in the model"),
        ("finishing", "0 or 1", "1 once the cool-down has begun"),
    ),
    _group(
        "advice", "run", "Written only where the policy advises and does not steer: the controls that its choices "
        "would have made of those in force. `controls_requested` are then those of the base schedule.",
        *_CONTROLS,
    ),
    _group(
        "energy", "run", "Joules; missing while unknown, never 0.",
        ("interval", "J", "energy of the interval, evaluation apart"),
        ("total", "J", "sum over the run; ends where an interval's energy is unknown"),
        ("power", "W", "mean draw over the interval"),
        ("per_token", "J/token", "energy of the interval over its tokens"),
        ("source", "text", "measured_counter, measured_power or estimated; written when it changes"),
    ),
    _group(
        "speed", "run", "Time, and where it goes.",
        ("tokens_per_s", "tokens/s", "tokens of the interval over its seconds"),
        ("interval", "s", "seconds of the interval, probe and switching included, evaluation apart"),
        ("total", "s", "sum over the run"),
        ("probe", "s", "seconds of the interval spent on the curvature probe"),
        ("switch", "s", "seconds of the interval spent on changing controls"),
        ("evaluation", "s", "seconds spent on evaluation since the last interval, not part of the interval"),
    ),
    _group(
        "gradient", "run", "Gradient norms, gradient noise and the last update.",
        ("norm", "1", "mean Euclidean norm of the gradient before clipping"),
        ("clipped_share", _SHARE, "steps whose gradient was clipped"),
        ("noise_scale", "sequences", "gradient noise scale, variance over squared mean (McCandlish et al. 2018)"),
        ("relative_update", "ratio", "norm of the last update over the norm of the weights"),
        ("probe_linear", _NATS, "loss change along the last update predicted by the slope; negative is downhill"),
        ("probe_quadratic", _NATS, "curvature term of that loss change"),
    ),
    _group(
        "reward", "run", "Written only if a reference run is known. The totals at the end are the outcome of the run.",
        ("quality", _REFERENCE, "change of the quality: compute-equivalent of the loss (logarithmic above 1)"),
        ("energy", _REFERENCE, "joules of the interval, negative; 0 while unknown"),
        ("time", _REFERENCE, "seconds of the interval, negative"),
        ("quality_total", _REFERENCE, "quality of the current loss; 1 equals the reference"),
        ("energy_total", _REFERENCE, "sum so far; -1 equals the reference's energy"),
        ("time_total", _REFERENCE, "sum so far; -1 equals the reference's time"),
    ),
    _group(
        "observation", "run", "The policy's input: the newest of the stacked observations. Each field is clipped to "
        "the range given here and scaled to [-1, 1]; unknown is 0.",
        *((f.name, f"{f.unit} in [{f.low:g}, {f.high:g}]", f.meaning) for f in OBSERVATION_FIELDS),
    ),
    _group(
        "masks", "run", "Choices that were not allowed.",
        ("masked", "choices", "choices that were masked at the decision"),
        ("refused", "choices", "choices that were requested and replaced by 'keep'"),
        ("masked_reasons", "text", "every masked choice with its reason; written when they change"),
        ("refused_reasons", "text", "every refused choice with its reason; written when there are any"),
    ),
    _group(
        "run", "run", "Progress of the run.",
        ("budget_used", _SHARE, "share of the budget that is used: of its tokens, or of its seconds or joules"),
        ("decision", "count", "number of the interval, from 0"),
        ("steps", "count", "optimiser steps in the interval"),
        ("epochs", "passes", "passes over the training split since the start"),
        ("memory_share", _SHARE, "peak memory over the device's memory"),
        ("diverged", "0 or 1", "1 where the training loss was not finite"),
        ("summary", "text", "the run's summary as a table, at its end"),
    ),
    _group(
        "final", "run", "Figures of the whole run, written once at its end; the metrics of the HPARAMS tab.",
        ("validation_loss", _NATS, "validation loss at the end"),
        ("test_loss", _NATS, "loss on the test split, which no decision uses"),
        ("quality", _REFERENCE, "compute-equivalent of the final validation loss"),
        ("energy_j", "J", "energy of the run, evaluation apart"),
        ("energy_over_reference", "ratio", "energy over the reference run's"),
        ("time_s", "s", "time of the run, evaluation apart"),
        ("time_over_reference", "ratio", "time over the reference run's"),
        ("tokens", "tokens", "tokens trained on"),
    ),
)  # fmt: skip

_EPISODE = (
    ("quality", _REFERENCE, "quality of the final loss: the sum of the quality terms"),
    ("energy_over_reference", "ratio", "joules over the reference run's"),
)
_AGENT_GROUPS = (
    _group(
        "agent", "agent", "Means over the episodes (steered runs) that ended in the rollout. 'quality_first' are those "
        "whose preference gives quality a weight of at least 3/4, 'saving_first' the others; the difference between "
        "the two shows how much the policy follows the preference.",
        *_EPISODE,
        ("time_over_reference", "ratio", "seconds over the reference run's"),
        ("energy_j", "J", "joules of an episode; missing while unknown"),
        ("return", "1", "sum of the scalar rewards: the utility of the outcome"),
        ("length", "decisions", "decisions per episode"),
        ("loss_increase", _NATS, "final loss minus the reference's final loss; negative is better"),
        ("diverged_share", _SHARE, "episodes that ended with a loss that is not finite"),
        ("episodes", "count", "episodes that ended in the rollout"),
        *((f"{half}/{name}", *rest) for half in ("quality_first", "saving_first") for name, *rest in _EPISODE),
        ("greedy_run", "picture", "controls and loss over one run of the policy without exploration"),
    ),
    Group(
        "action", "agent", "How often each choice was taken in the rollout; per field the shares sum to 1.",
        tuple(
            Tag(choice_tag(field, choice), _SHARE, f"{field.name}: {name}")
            for field in ACTION_FIELDS for choice, name in enumerate(field.choices)
        ),
    ),
    _group(
        "rollout", "agent", "Written by Stable-Baselines3, over the last 100 episodes.",
        ("ep_rew_mean", "1", "mean return; only where the environments are monitored"),
        ("ep_len_mean", "decisions", "mean length of an episode; only where the environments are monitored"),
    ),
    _group(
        "train", "agent", "Written by Stable-Baselines3 after each update of the policy.",
        ("loss", "1", "last minibatch's loss: policy + ent_coef x entropy + vf_coef x value"),
        ("policy_gradient_loss", "1", "clipped surrogate loss; small and mostly negative"),
        ("value_loss", "1", "squared error of the predicted return; should fall"),
        ("explained_variance", _SHARE, "variance of the returns that the value network explains; 1 is perfect"),
        ("entropy_loss", "nats", "minus the policy's entropy; rises towards 0 as the policy becomes deterministic"),
        ("approx_kl", "nats", "how far an update moved the policy; above about 0.03 lower the learning rate"),
        ("clip_fraction", _SHARE, "decisions whose probability ratio was clipped; 0.05 to 0.2 is usual"),
        ("clip_range", "ratio", "bound on the probability ratio"),
        ("clip_range_vf", "1", "bound on the change of the value; only where one is set"),
        ("learning_rate", "1", "learning rate of the policy's optimiser"),
    ),
    _group(
        "time", "agent", "Written by Stable-Baselines3.",
        ("fps", "decisions/s", "environment steps per second since the start, updates included"),
    ),
)  # fmt: skip

_SIMULATOR_GROUPS = (
    _group(
        "validation", "simulator", "The policy without exploration, with all preference on quality, on simulated runs "
        "that are never used for training; medians over the runs. The multiplier is the share of the budget that the "
        "tuned static setting needs for the same loss.",
        ("multiplier", "ratio", "of all runs; 1 is as good as the best static setting of each run"),
        ("multiplier_p10", "ratio", "10th percentile over the runs"),
        ("score", "ratio", "mean of the two; the weights with the highest score are kept"),
        ("best_score", "ratio", "highest score so far"),
        ("from_far_below", "ratio", "multiplier of runs started below 0.18 times the best learning rate"),
        ("from_below", "ratio", "the same, 0.18 to 0.56 times"),
        ("from_near", "ratio", "the same, 0.56 to 1.8 times"),
        ("from_above", "ratio", "the same, 1.8 to 5.6 times"),
        ("from_far_above", "ratio", "the same, above 5.6 times"),
        ("time_over_reference", "ratio", "seconds over the tuned static setting's"),
        ("energy_over_reference", "ratio", "joules over the tuned static setting's"),
        ("diverged_share", _SHARE, "runs that diverged"),
    ),
)  # fmt: skip

GROUPS: tuple[Group, ...] = _RUN_GROUPS + _AGENT_GROUPS + _SIMULATOR_GROUPS
TAGS: dict[str, Tag] = {tag.name: tag for group in GROUPS for tag in group.tags}
"""Every tag by its name; looking up an unknown name raises `KeyError`."""
NAMES: dict[str, tuple[str, ...]] = {
    group.prefix: tuple(tag.name.removeprefix(f"{group.prefix}/") for tag in group.tags) for group in GROUPS
}
"""The tags of each prefix, without it."""


def run_layout() -> dict[str, dict[str, list[object]]]:
    """Return the layout of TensorBoard's tab Custom scalars for a run."""
    requested, effective = "controls_requested", "controls_effective"
    return {
        "Loss": {
            "loss, training and validation (nats/token)": multiline("loss/train", "loss/validation"),
            "spread and largest step loss (nats/token)": multiline("loss/train_std", "loss/train_max"),
        },
        "Controls": {
            "learning-rate scale requested, and advised": multiline(
                f"{requested}/learning_rate_scale", "advice/learning_rate_scale"
            ),
            "learning rate in force": multiline(f"{effective}/learning_rate"),
            "batch requested and in force (sequences)": multiline(f"{requested}/batch_size", f"{effective}/batch_size"),
            f"precision ({_CODE})": multiline(f"{requested}/precision", f"{effective}/precision"),
            "sparsity requested and counted (share)": multiline(f"{requested}/sparsity", f"{effective}/sparsity"),
        },
        "Energy and time": {
            "energy so far (J)": multiline("energy/total"),
            "power (W)": multiline("energy/power"),
            "energy per token (J/token)": multiline("energy/per_token"),
            "time so far (s)": multiline("speed/total"),
        },
        "Reward": {
            "per interval": multiline(*(f"reward/{name}" for name in OBJECTIVES)),
            "so far": multiline(*(f"reward/{name}_total" for name in OBJECTIVES)),
        },
    }


OPENING = ("loss/train", "loss/validation", "controls_effective/learning_rate", "controls_effective/batch_size")
"""What a link to TensorBoard opens on: loss and controls, before the tags in the order of the alphabet."""


def opening_link() -> str:
    """Return the address at which a local TensorBoard shows the charts of `OPENING` first."""
    cards = [{"plugin": "scalars", "tag": TAGS[name].name} for name in OPENING]
    pinned = quote(json.dumps(cards, separators=(",", ":")), safe="")
    return f"http://localhost:6006/?pinnedCards={pinned}#timeseries"


def tags_of(writer: Writer) -> list[Tag]:
    """Return all tags with the given writer."""
    return [tag for group in GROUPS if group.written_by == writer for tag in group.tags]


_HEAD = f"""\
# What TensorBoard shows

Written from `agents/logging/tags.py` by `make docs`; change it there.

    tensorboard --logdir DIR

DIR is the `tb` folder of a run or of an agent's training, or any folder above several of them. Then open
<http://localhost:6006>, for a run [with loss, learning rate and batch on top]({opening_link()}). Everything is
served from this machine.

* **Time series, Scalars**: the tags below. Tick several runs to lay them over each other.
* **Custom scalars**: ready-made charts (loss, controls requested and effective, energy, reward; actions).
* **Text**: why choices were masked or refused, and the summary. **HPARAMS**: settings against final metrics.
* **Images**: the greedy run of an agent.

The same numbers are in the run's folder as `telemetry.jsonl`.
"""

_ABOUT: dict[Writer, str] = {
    "run": """\
## A steered run

The x-axis counts **tokens trained on**. The run is `steered`. Where the reference run is known (the same case under its
untouched base schedule), it is written as the run `reference` under the same tags, so that one chart shows both; it
has no `decision`, `reward`, `observation`, `masks` and `final`. Values that are unknown or not finite are not written.
""",
    "agent": """\
## The training of an agent

The x-axis counts **decisions** over all environments. A rollout is the data collected between two policy updates.
""",
    "simulator": """\
## The simulator stage of an agent's training

Written to OUT/simulator/SEED/tb, one run for each policy that is trained, with all the tags above and these.
""",
}


def markdown() -> str:
    """Return the page `docs/metrics.md`."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield _HEAD
    for writer, about in _ABOUT.items():
        yield about
        for group in GROUPS:
            if group.written_by == writer:
                yield f"### {group.prefix}/\n\n{group.about}\n\n| Tag | Unit | Meaning |\n|---|---|---|"
                yield from (f"| `{tag.name}` | {tag.unit} | {tag.meaning} |" for tag in group.tags)
                yield ""


if __name__ == "__main__":
    print(markdown().rstrip())
