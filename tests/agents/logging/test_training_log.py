from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from decision_records import decision_record, decision_records, reference_run
from fake_plant_batch import ToyPlants
from gymnasium import spaces
from sb3_contrib import MaskablePPO
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from trainpilot.agents.logging.run_figure import run_figure
from trainpilot.agents.logging.tags import TAGS, tags_of
from trainpilot.agents.logging.training_log import Episode, EventLog, TrainingLog, means
from trainpilot.agents.sb3_env import ScalarVecEnv
from trainpilot.envs.action import ACTION_FIELDS
from trainpilot.envs.decision import Preference
from trainpilot.envs.vector import VectorSimulatedTraining

LENGTH = 5


def info(quality: float = 0.2, energy_j: float | None = 3.0, weight: float = 0.8, **more: Any) -> dict[str, Any]:
    energy = -0.1 if energy_j is not None else 0.0
    return {
        "reward_terms": {"quality": quality, "energy": energy, "time": -0.3},
        "preference": np.array([weight, 0.1, 0.1]),
        "energy_j": energy_j,
        "loss_increase": 0.05,
        "diverged": False,
        **more,
    }


class Steered(gymnasium.Env[np.ndarray, np.ndarray]):
    """An episode of five decisions with a known outcome; only 'keep' is ever allowed."""

    def __init__(self) -> None:
        self.action_space = spaces.MultiDiscrete([len(field.choices) for field in ACTION_FIELDS])
        self.observation_space = spaces.Box(-1.0, 1.0, (4,), np.float32)

    def reset(self, **_options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        self.decision = 0
        return np.zeros(4, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.decision += 1
        return np.zeros(4, np.float32), 0.5, False, self.decision == LENGTH, info()

    def action_masks(self) -> np.ndarray:
        return np.concatenate([np.arange(len(field.choices)) == field.keep for field in ACTION_FIELDS])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> EventAccumulator:
    folder = tmp_path_factory.mktemp("tb")
    model = MaskablePPO("MlpPolicy", VecMonitor(DummyVecEnv([Steered, Steered])), n_steps=10, batch_size=20, n_epochs=1)
    model.set_logger(Logger(str(folder), [EventLog(folder)]))
    log = TrainingLog({"ppo": {"n_steps": 10}, "recipe": "demo"})
    model.learn(40, callback=log)
    log.log_greedy_run(decision_records(), reference_run())
    model.logger.close()
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def values(events: EventAccumulator, tag: str) -> list[Any]:
    return [pytest.approx(event.value, rel=1e-6) for event in events.Scalars(tag)]


def test_outcomes_are_means_over_the_episodes_of_a_rollout(trained: EventAccumulator) -> None:
    assert values(trained, "agent/quality") == [1.0, 1.0]
    assert values(trained, "agent/energy_over_reference") == [0.5, 0.5]
    assert values(trained, "agent/time_over_reference") == [1.5, 1.5]
    assert values(trained, "agent/energy_j") == [15.0, 15.0]
    assert values(trained, "agent/return") == [2.5, 2.5]
    assert values(trained, "agent/length") == [5.0, 5.0]
    assert values(trained, "agent/episodes") == [4.0, 4.0], "two environments, two episodes each"
    assert values(trained, "agent/diverged_share") == [0.0, 0.0]
    assert values(trained, "agent/quality_first/quality") == [1.0, 1.0]
    assert "agent/saving_first/quality" not in trained.Tags()["scalars"]
    assert [event.step for event in trained.Scalars("agent/quality")] == [20, 40], "decisions over all environments"


def test_actions_are_shares_of_each_choice(trained: EventAccumulator) -> None:
    assert values(trained, "action/learning_rate/x1") == [1.0, 1.0]
    assert values(trained, "action/learning_rate/x2") == [0.0, 0.0]
    for field in ACTION_FIELDS:
        tags = [tag for tag in TAGS if tag.startswith(f"action/{field.name}/")]
        assert sum(trained.Scalars(tag)[0].value for tag in tags) == pytest.approx(1.0)


def test_every_tag_of_a_training_is_in_the_table(trained: EventAccumulator) -> None:
    written = set(trained.Tags()["scalars"]) | set(trained.Tags()["images"])
    table = {tag.name for tag in tags_of("agent")}

    assert written <= table
    assert table - written == {
        "agent/saving_first/quality",
        "agent/saving_first/energy_over_reference",
        "train/clip_range_vf",
    }


def test_hparams_and_layout_are_written(trained: EventAccumulator) -> None:
    start = plugin_data_pb2.HParamsPluginData.FromString(
        trained.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    )
    assert start.session_start_info.hparams["ppo.n_steps"].number_value == 10
    assert start.session_start_info.hparams["recipe"].string_value == "demo"
    [event] = trained.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [part.title for part in layout.category] == ["Outcome", "Actions", "Learning"]
    assert [len(chart.multiline.tag) for chart in layout.category[1].chart] == [7, 3, 5, 2, 2]


def test_a_greedy_run_is_a_picture(trained: EventAccumulator) -> None:
    [image] = trained.Images("agent/greedy_run")

    assert image.step == 40
    assert (image.width, image.height) == (1100, 825)


def episode(*infos: Mapping[str, Any]) -> Episode:
    summed = Episode()
    for one in infos:
        summed.add(0.5, one)
    return summed


def test_an_interval_of_unknown_energy_makes_the_episode_unknown() -> None:
    result = means([episode(info(), info(energy_j=None)), episode(info(), info())])

    assert result["agent/energy_j"] == 6.0, "the mean of the one that is known"
    assert result["agent/energy_over_reference"] == pytest.approx(0.2)
    assert "agent/energy_j" not in means([episode(info(energy_j=None))])


def at_end(length: int, value: float, **more: Any) -> dict[str, Any]:
    return info(**more) | {"episode": {"r": value, "l": length, "t": 1.0}}


def test_sums_told_at_the_end_are_a_whole_episode() -> None:
    summed = Episode.of_sums(at_end(5, 2.5, quality=1.0, energy_j=15.0))

    assert (summed.quality, summed.energy, summed.time, summed.energy_j) == (1.0, 0.1, 0.3, 15.0)
    assert (summed.value, summed.length, summed.quality_weight) == (2.5, 5, 0.8)
    assert (summed.diverged, summed.loss_increase) == (False, 0.05)
    unknown = Episode.of_sums(at_end(5, 2.5, energy_j=None))
    assert (unknown.energy, unknown.energy_j) == (None, None)


def take_in(log: TrainingLog, infos: Sequence[Mapping[str, Any]]) -> None:
    keep = [[field.keep for field in ACTION_FIELDS]] * len(infos)
    dones = np.array(["episode" in each for each in infos])
    log.locals = {"rewards": np.full(len(infos), 0.5), "infos": infos, "dones": dones, "actions": np.array(keep)}
    assert log._on_step()


def test_empty_infos_are_passed_over_even_where_all_episodes_end_at_once() -> None:
    log = TrainingLog()
    for _ in range(4):
        take_in(log, [{}, {}, {}])
    assert log._finished == []
    take_in(log, [{}, at_end(5, 2.0), {}])
    take_in(log, [{}, {}, {}])
    take_in(log, [at_end(7, 1.0), at_end(2, 1.5), at_end(7, 1.0, diverged=True)])

    assert [episode.length for episode in log._finished] == [5, 7, 2, 7]
    assert [episode.value for episode in log._finished] == [2.0, 1.0, 1.5, 1.0]
    assert means(log._finished)["agent/diverged_share"] == 0.25
    assert log._counts[0].sum() == 7 * 3, "every choice counts, whoever was told of it"


@pytest.mark.parametrize("monitored", [False, True])
def test_simulated_runs_are_logged_like_others(tmp_path: Path, monitored: bool) -> None:
    preference = Preference(quality=0.6, energy=0.3, time=0.1)
    env = ScalarVecEnv(VectorSimulatedTraining(ToyPlants(4, seed=1), preference))
    vec_env = VecMonitor(env) if monitored else env
    model = MaskablePPO("MlpPolicy", vec_env, n_steps=40, batch_size=160, n_epochs=1, seed=0)
    model.set_logger(Logger(str(tmp_path), [EventLog(tmp_path)]))
    model.learn(160, callback=TrainingLog())
    model.logger.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    told = {tag: events.Scalars(f"agent/{tag}")[0].value for tag in ("episodes", "length", "return", "quality")}

    assert told["episodes"] >= 8, "of 40 decisions each run takes 20 at most"
    assert 1 <= told["length"] <= 20
    cost = [events.Scalars(f"agent/{tag}_over_reference")[0].value for tag in ("energy", "time")]
    assert told["return"] == pytest.approx(0.6 * told["quality"] - 0.3 * cost[0] - 0.1 * cost[1], abs=1e-5)


def test_preferences_split_the_outcome() -> None:
    result = means([episode(info(quality=0.9, weight=0.75)), episode(info(quality=0.5, weight=0.74))])

    assert result["agent/quality"] == pytest.approx(0.7)
    assert result["agent/quality_first/quality"] == 0.9
    assert result["agent/saving_first/quality"] == 0.5


def test_a_diverged_episode_counts_but_not_in_the_loss() -> None:
    result = means([episode(info()), episode(info(quality=-1.0, diverged=True, loss_increase=10.0))])

    assert result["agent/diverged_share"] == 0.5
    assert result["agent/loss_increase"] == 0.05
    assert result["agent/quality"] == pytest.approx(-0.4)


def test_no_finished_episode_no_means() -> None:
    assert means([]) == {}


def test_a_log_that_never_trained_writes_nothing() -> None:
    TrainingLog().log_greedy_run(decision_records())


def test_the_picture_says_what_was_reached_and_paid() -> None:
    figure = run_figure(decision_records(), reference_run())

    assert figure.get_suptitle().strip() == (
        "loss 2.100 nats/token (reference 3.000), 50% of the reference's energy, 100% of its time"
    )
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "training loss, nats/token",
        "learning rate",
        "batch, sequences",
        "precision of the matrix products",
        "sparsity, %",
        "energy, mJ/token",
    ]


def test_the_picture_does_without_reference_energy_or_progress(tmp_path: Path) -> None:
    run = [decision_record(0, energy_j=None, energy_source=None, train_loss=float("nan"), diverged=True)]

    figure = run_figure(run)
    figure.savefig(tmp_path / "run.png")

    assert figure.axes[5].get_title(loc="left") == "speed, tokens/s (energy unknown)"
    assert figure.get_suptitle().strip() == "diverged"
    with pytest.raises(ValueError, match="at least one decision"):
        run_figure([])


def test_a_full_disk_costs_the_charts_and_not_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = MaskablePPO("MlpPolicy", DummyVecEnv([Steered]), n_steps=10, batch_size=10, n_epochs=1)
    events = EventLog(tmp_path)
    model.set_logger(Logger(str(tmp_path), [events]))

    def full(*_args: object, **_options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(events.writer, "flush", full)
    log = TrainingLog({"recipe": "demo"})
    with pytest.warns(UserWarning, match="no more TensorBoard events are written to .*No space left") as warned:
        model.learn(30, callback=log)
    log.log_greedy_run(decision_records(), reference_run())
    model.logger.close()
    assert model.num_timesteps == 30
    assert len(warned) == 1
