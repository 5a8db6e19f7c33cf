"""Runs elsewhere: which options go together, what is missing in one line, and what a machine of its own must have."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comparison_runs import made_result
from live_runs import case

from trainpilot.experiments import cli
from trainpilot.experiments.calibrate import command as calibrate
from trainpilot.experiments.calibrate.design import CalibrationSetting
from trainpilot.experiments.calibrate.runs import RunFile
from trainpilot.experiments.calibrate.runs import run_key as setting_key
from trainpilot.experiments.compare import scheduler
from trainpilot.experiments.compare.scheduler import execute_elsewhere, run_workers
from trainpilot.experiments.elsewhere import ATTEMPTS, Home, call, check_same
from trainpilot.experiments.engines import engine_of
from trainpilot.experiments.options import CalibrateOptions, CompareOptions
from trainpilot.experiments.results import RunSpec, SteeringSpec
from trainpilot.experiments.run_store import run_key
from trainpilot.experiments.workers import Workers
from trainpilot.llm_runtime.data.text_sources import content_digest

DIES = "dies"


class FakeEngine:
    """Carries tasks out in this process, by `call`, or has them die; of the engines' interface.

    Args:
        fates: For each task in turn, whether it dies; those after the last one live.
        share_meter: Runs that share a meter.
    """

    def __init__(self, *fates: str, jobs: int = 1, share_meter: int | None = 1) -> None:
        self.fates, self.jobs, self.share_meter, self.gpus = list(fates), jobs, share_meter, 0.0
        self.began = 0
        self.killed = False

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.began += 1
        if self.fates and self.fates.pop(0) == DIES:
            future.set_exception(BrokenExecutor("the machine is gone"))
        else:
            call(Home.here(1), function, *arguments).settle(future)
        return future

    def shutdown(self, wait: bool = True, kill_workers: bool = False) -> None:
        self.killed = self.killed or kill_workers

    def close(self) -> None:
        self.killed = True


def half(number: int) -> float:
    if number < 0:
        raise ValueError(f"number must be positive, got {number}")
    return number / 2


# Options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ray-address", "auto"], "ray_address needs --on ray, got --on local"),
        (["--on", "slurm", "--ray-address", "auto"], "ray_address needs --on ray, got --on slurm"),
        (["--on", "ray", "--slurm-minutes", "5"], "slurm_minutes needs --on slurm, got --on ray"),
        (["--gpus-per-run", "1"], "gpus_per_run needs --on ray or --on slurm, got --on local"),
        (["--on", "ray"], 'this command needs ray, which is not installed; pip install "trainpilot[ray]"'),
        (["--on", "slurm"], 'this command needs submitit, which is not installed; pip install "trainpilot[slurm]"'),
        (["--on", "cloud"], "invalid choice"),
        (["--on", "slurm", "--slurm-minutes", "0"], "slurm_minutes must be"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "calibrate"])
def test_what_cannot_be_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    *,
    command: str,
    arguments: list[str],
    message: str,
) -> None:
    for package in ("ray", "submitit"):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.delitem(sys.modules, f"trainpilot.experiments.workers_{package}", raising=False)
    monkeypatch.delitem(sys.modules, "trainpilot.experiments.workers_slurm", raising=False)
    monkeypatch.setattr(calibrate, "measure_cost_table", None)
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["trainpilot", command, "--out", str(out), *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()

    said = capfd.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("trainpilot: ")
    assert message in said
    assert said.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "methods: pbt needs --on ray, got --on local; "),
        (["--on", "slurm"], "methods: pbt needs --on ray, got --on slurm; "),
        (["--on", "ray"], "methods: pbt needs Ray Tune, which is not installed; "),
    ],
)
def test_a_population_without_ray_is_one_line_that_names_the_extra(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "trainpilot.experiments.compare.population_ray", raising=False)
    arguments = ["trainpilot", "compare", "--methods", "cosine,pbt", "--out", str(tmp_path / "out"), *arguments]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main()

    said = capfd.readouterr().err
    assert stop.value.code == 2
    assert message in said
    assert "trainpilot[ray]" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--on", "slurm"], "on: train-agent must be on local or ray, got slurm: PPO waits for all environments"),
        (["--on", "ray"], 'this command needs ray, which is not installed; pip install "trainpilot[ray]"'),
        (["--ray-address", "auto"], "ray_address needs --on ray, got --on local"),
    ],
)
def test_environments_elsewhere_are_refused_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "trainpilot.experiments.workers_ray", raising=False)
    arguments = ["trainpilot", "train-agent", "--recipe", "tiny", "--out", str(tmp_path / "out"), *arguments]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        cli.main()

    said = capfd.readouterr().err
    assert stop.value.code == 2
    assert message in said
    assert said.count("\n") == 1


def test_by_default_runs_stay_on_this_machine() -> None:
    for options in (CompareOptions(), CalibrateOptions(out=Path("out"))):
        assert options.on == "local"
        assert engine_of(options, ["cpu"], Path("out")) is None


# Tasks


def test_a_task_whose_machine_dies_is_begun_again_and_ends_once() -> None:
    engine = FakeEngine("", DIES, DIES, "")
    with Workers(half, 1, attempts=3, executor=engine) as workers:
        assert list(workers.run([(2,), (4,), (6,)])) == [((2,), 1), ((4,), 2), ((6,), 3)]

    assert engine.began == 5
    assert not engine.killed


def test_an_error_of_a_task_is_raised_here_as_it_was_there() -> None:
    engine = FakeEngine(jobs=2)
    with Workers(half, 2, executor=engine) as workers, pytest.raises(ValueError, match="must be positive, got -1"):
        list(workers.run([(-1,), (2,)]))

    assert engine.began == 2


def test_a_run_that_dies_everywhere_has_failed(tmp_path: Path) -> None:
    spec = RunSpec(config=case(tmp_path))
    engine = FakeEngine(*[DIES] * ATTEMPTS)
    with run_workers(1, 1, engine) as workers:
        workers.start(spec, "its key")
        [result] = workers.finished()

    assert engine.began == ATTEMPTS
    assert result.failure == f"its process was killed {ATTEMPTS} times, perhaps for lack of memory"
    assert (result.key, result.spec) == ("its key", spec)


@pytest.mark.parametrize(("share_meter", "shared"), [(1, False), (8, True), (None, True)])
def test_runs_elsewhere_share_a_meter_as_their_machines_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share_meter: int | None, shared: bool
) -> None:
    monkeypatch.setattr(scheduler, "execute", lambda spec, key, **more: made_result(spec, key=key, **more))
    spec = RunSpec(config=case(tmp_path))
    with run_workers(9, 1, FakeEngine(jobs=9, share_meter=share_meter)) as workers:
        workers.start(spec, run_key(spec))
        assert [result.energy_shared for result in workers.finished()] == [shared]


# What the machine of a run must have


def test_other_versions_or_no_such_folder_are_one_line(tmp_path: Path) -> None:
    home = Home.here(1)
    other = call(replace(home, versions={**home.versions, "torch": "1.0"}), half, 2)
    assert str(other.error).startswith("on: ")
    assert " has torch " in str(other.error)
    assert str(other.error).endswith("this machine 1.0; install the same versions on both")

    nowhere = call(replace(home, folder=str(tmp_path / "nowhere")), half, 2)
    assert f"has no folder {tmp_path / 'nowhere'}; give the command in a folder that every machine has" in str(
        nowhere.error
    )
    assert call(home, half, 2).result == 1


def test_relative_paths_begin_where_the_command_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRAINPILOT_CACHE", "here")
    home = Home.here(1)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    monkeypatch.setenv("TRAINPILOT_CACHE", "there")

    assert call(home, os.getcwd).result == str(tmp_path)
    assert os.environ["TRAINPILOT_CACHE"] == "here"


def test_another_text_or_policy_ends_the_command(tmp_path: Path) -> None:
    spec = RunSpec(config=case(tmp_path))
    key = run_key(spec)
    with pytest.raises(
        ValueError, match=r"same files under the same paths, .* of the text .*text.txt and .* has others$"
    ):
        execute_elsewhere(spec, f"{key}0", energy_shared=False)

    policy = RunSpec(config=spec.config, steering=SteeringSpec(kind="policy", settings={"path": "no", "digest": "a"}))
    with pytest.raises(ValueError, match=r"of the policy no, .* cannot read them \(.*No such file"):
        execute_elsewhere(policy, run_key(policy), energy_shared=False)
    check_same(lambda: "a", "a", "nothing")


def test_calibration_runs_elsewhere_check_the_text_and_know_their_joules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = CalibrationSetting(name="one", config=case(tmp_path), role="fit")
    key = setting_key(setting, content_digest(setting.config))
    shares = list[int | None]()

    def carry_out(setting: CalibrationSetting, key: str, *, jobs: int | None) -> RunFile:
        shares.append(jobs)
        raise ValueError("no run")

    monkeypatch.setattr(calibrate, "carry_out", carry_out)
    for share_meter in (None, 3):
        engine = FakeEngine(jobs=8, share_meter=share_meter)
        assert list(calibrate.run_all([(setting, key)], 8, engine)) == [(setting, "ValueError: no run")]
    assert shares == [None, 3]
    with pytest.raises(ValueError, match="same files under the same paths"):
        list(calibrate.run_all([(setting, "another key")], 8, FakeEngine()))


def test_a_process_that_dies_again_and_again_ends_a_calibration(tmp_path: Path) -> None:
    setting = CalibrationSetting(name="one", config=case(tmp_path), role="fit")
    engine = FakeEngine(*[DIES] * ATTEMPTS)
    with suppress(ValueError):
        list(calibrate.run_all([(setting, "key")], 1, engine))
    assert engine.began == ATTEMPTS
    assert engine.killed
