"""Log the training of a policy to TensorBoard: quality, energy and time of its episodes, and how often it chose what.

`TrainingLog` is a Stable-Baselines3 callback. The tags are explained in `tags`; `run_figure` draws a single run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import HParam, TensorBoardOutputFormat

from trainpilot.agents.controller import DecisionRecord
from trainpilot.agents.logging.run_figure import run_figure
from trainpilot.agents.logging.run_log import hparams
from trainpilot.agents.logging.tags import TAGS, choice_tag, multiline
from trainpilot.envs.action import ACTION_FIELDS
from trainpilot.envs.reward import Reference

QUALITY_FIRST = 0.75
"""Preferences with at least this weight on quality count as 'quality first': half of those drawn for training."""
METRICS = (
    "agent/return",
    "agent/quality",
    "agent/energy_over_reference",
    "agent/time_over_reference",
    "agent/diverged_share",
)
"""Tags that the HPARAMS tab shows as metrics."""


@dataclass
class Episode:
    """Running sums over the decisions of one steered run."""

    quality: float = 0.0
    energy: float | None = 0.0
    """Energy relative to the reference run; `None` once the energy of an interval is unknown."""
    time: float = 0.0
    """Time relative to the reference run."""
    energy_j: float | None = 0.0
    value: float = 0.0
    """Sum of the scalar rewards."""
    length: int = 0
    diverged: bool = False
    loss_increase: float = math.nan
    quality_weight: float = math.nan

    def add(self, reward: float, info: Mapping[str, Any]) -> None:
        """Add the reward and info of one step."""
        terms = info["reward_terms"]
        energy_j = info.get("energy_j")
        self.quality += terms["quality"]
        self.energy = self.energy - terms["energy"] if self.energy is not None and energy_j is not None else None
        self.time -= terms["time"]
        self.energy_j = self.energy_j + energy_j if self.energy_j is not None and energy_j is not None else None
        self.value += reward
        self.length += 1
        self.diverged = self.diverged or bool(info.get("diverged", False))
        self.loss_increase = info.get("loss_increase", math.nan)
        self.quality_weight = float(info["preference"][0])

    @classmethod
    def of_sums(cls, info: Mapping[str, Any]) -> Episode:
        """Build a finished episode from its last info, which holds sums over the episode (`ScalarVecEnv`)."""
        episode = cls()
        episode.add(info["episode"]["r"], info)
        episode.length = info["episode"]["l"]
        return episode


class EventLog(TensorBoardOutputFormat):
    """SB3's TensorBoard events. A write error ends the logging with a warning, and not the training.

    Args:
        folder: Folder of the events.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder
        self._failed = False

    def attempt(self, write: Callable[[], object]) -> None:
        """Call a function that writes events, unless an earlier one has failed."""
        if self._failed:
            return
        try:
            write()
        except OSError as error:
            self._failed = True
            warnings.warn(f"no more TensorBoard events are written to {self.folder}: {error}", stacklevel=2)

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Write the values of SB3's logger."""
        write = super().write
        self.attempt(lambda: write(key_values, key_excluded, step))

    def close(self) -> None:
        """Close the file."""
        self.attempt(super().close)


class TrainingLog(BaseCallback):
    """Logs means over the episodes of a rollout under `agent/`, and the share of each choice under `action/`.

    An environment may return a full info at every step, or empty infos and one with the episode's sums at its end.

    Args:
        config: Settings of the training, flat or nested, for the HPARAMS tab.
    """

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.config = dict(config or {})
        self._running: list[Episode] = []
        self._sums_at_end = False
        self._finished: list[Episode] = []
        self._counts = [np.zeros(len(field.choices)) for field in ACTION_FIELDS]
        self._last: dict[str, float] = {}

    def log_greedy_run(self, records: Sequence[DecisionRecord], reference: Reference | None = None) -> None:
        """Log a figure of one run of the policy without exploration."""
        if (events := self._events()) is not None:
            figure = run_figure(records, reference)
            events.attempt(lambda: events.writer.add_figure(TAGS["agent/greedy_run"].name, figure, self.num_timesteps))
            events.attempt(events.writer.flush)

    def _on_training_start(self) -> None:
        self._running = [Episode() for _ in range(self.training_env.num_envs)]
        self._sums_at_end = False
        if (events := self._events()) is not None:
            events.attempt(lambda: events.writer.add_custom_scalars(layout()))

    def _on_step(self) -> bool:
        """Record one step of every environment."""
        infos, dones = self.locals["infos"], self.locals["dones"]
        self._sums_at_end = self._sums_at_end or not all(infos)
        if not self._sums_at_end:
            self._add_intervals(self.locals["rewards"], infos, dones)
        elif np.any(dones):
            self._finished += [Episode.of_sums(info) for info in infos if info]
        for counts, choices in zip(self._counts, np.asarray(self.locals["actions"]).T, strict=True):
            np.add.at(counts, choices.astype(int), 1)
        return True

    def _add_intervals(self, rewards: np.ndarray, infos: Sequence[Mapping[str, Any]], dones: np.ndarray) -> None:
        for index, (reward, info, done) in enumerate(zip(rewards, infos, dones, strict=True)):
            self._running[index].add(float(reward), info)
            if done:
                self._finished.append(self._running[index])
                self._running[index] = Episode()

    def _on_rollout_end(self) -> None:
        """Record the rollout's means with Stable-Baselines3's logger."""
        values = means(self._finished)
        self._last |= values
        for tag, value in values.items():
            self.logger.record(TAGS[tag].name, value)
        for field, counts in zip(ACTION_FIELDS, self._counts, strict=True):
            for choice, share in enumerate(counts / max(counts.sum(), 1.0)):
                self.logger.record(TAGS[choice_tag(field, choice)].name, float(share), exclude="stdout")
            counts[:] = 0
        self._finished = []

    def _on_training_end(self) -> None:
        """Write the settings and the names of the metric tags for the HPARAMS tab."""
        if (events := self._events()) is not None and self.config:
            metrics = {TAGS[tag].name: self._last.get(tag, math.nan) for tag in METRICS}
            events.write({"hparams": HParam(hparams(self.config), metrics)}, {"hparams": ("",)}, self.num_timesteps)

    def _events(self) -> EventLog | None:
        formats = self.logger.output_formats if hasattr(self, "model") else []  # no model before the training starts
        return next((each for each in formats if isinstance(each, EventLog)), None)


def means(episodes: Sequence[Episode]) -> dict[str, float]:
    """Return means over finished episodes by tag, without the tags whose value is unknown in all of them."""
    if not episodes:
        return {}
    first = [episode for episode in episodes if episode.quality_weight >= QUALITY_FIRST]
    saving = [episode for episode in episodes if episode.quality_weight < QUALITY_FIRST]
    values = {
        **_outcome("agent", episodes),
        "agent/time_over_reference": _mean(e.time for e in episodes),
        "agent/energy_j": _mean(e.energy_j for e in episodes),
        "agent/return": _mean(e.value for e in episodes),
        "agent/length": _mean(e.length for e in episodes),
        "agent/loss_increase": _mean(e.loss_increase for e in episodes if not e.diverged),
        "agent/diverged_share": _mean(e.diverged for e in episodes),
        "agent/episodes": float(len(episodes)),
        **_outcome("agent/quality_first", first),
        **_outcome("agent/saving_first", saving),
    }
    return {tag: value for tag, value in values.items() if value is not None}


def _outcome(prefix: str, episodes: Sequence[Episode]) -> dict[str, float | None]:
    return {
        f"{prefix}/quality": _mean(e.quality for e in episodes),
        f"{prefix}/energy_over_reference": _mean(e.energy for e in episodes),
    }


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return float(np.mean(known)) if known else None


def layout() -> dict[str, dict[str, list[object]]]:
    """Return the layout of TensorBoard's tab Custom scalars."""
    actions = {
        f"{field.name}: share of each choice": multiline(*(choice_tag(field, c) for c in range(len(field.choices))))
        for field in ACTION_FIELDS
    }
    halves = ("agent/quality_first", "agent/saving_first")
    return {
        "Outcome": {
            "quality, energy and time over the reference": multiline(
                "agent/quality", "agent/energy_over_reference", "agent/time_over_reference"
            ),
            "return": multiline("agent/return"),
            "quality by preference": multiline(*(f"{half}/quality" for half in halves)),
            "energy by preference": multiline(*(f"{half}/energy_over_reference" for half in halves)),
            "diverged share": multiline("agent/diverged_share"),
        },
        "Actions": actions,
        "Learning": {
            "size of an update (nats; share)": multiline("train/approx_kl", "train/clip_fraction"),
            "explained variance": multiline("train/explained_variance"),
            "entropy loss (nats)": multiline("train/entropy_loss"),
        },
    }
