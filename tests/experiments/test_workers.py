"""Runs side by side in processes: a process that dies costs its own run and no other, and leaves nothing behind."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from comparison_runs import CONFIG, made_result
from live_runs import case
from loky import BrokenProcessPool, ProcessPoolExecutor

from trainpilot.experiments.compare.execute import execute
from trainpilot.experiments.compare.scheduler import ATTEMPTS, run_workers
from trainpilot.experiments.results import RunResult, RunSpec, SteeringSpec
from trainpilot.experiments.workers import Workers, report
from trainpilot.llm_runtime.energy.meter import NoMeter
from trainpilot.llm_runtime.process import use_threads

DIES = "dies"
ENDLESS = 10**9


def spec(seed: int) -> RunSpec:
    return RunSpec(config=replace(CONFIG, seed=seed))


# With processes that are not there


class FakeExecutor(ProcessPoolExecutor):  # type: ignore[misc]
    """Runs nothing: every submission gets the next of `fates`, a process's death or a result."""

    def __init__(self, fates: list[str]) -> None:
        self.fates = fates
        self.closed = False

    def submit(self, function: Any, /, *arguments: Any, **options: Any) -> Future[Any]:
        fate = self.fates.pop(0) if self.fates else ""
        if fate == "died before":
            raise BrokenProcessPool
        future: Future[Any] = Future()
        if fate == DIES:
            future.set_exception(BrokenProcessPool())
        else:
            run, key = arguments
            future.set_result(made_result(run, key=key, energy_shared=function.keywords["energy_shared"]))
        return future

    def shutdown(self, wait: bool = True, kill_workers: bool = False) -> None:
        self.closed = True


class Made:
    """Workers whose processes are fake; `fates` go to the executors in the order in which they are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, jobs: int, *fates: Iterable[str]) -> None:
        self.executors: list[FakeExecutor] = []
        planned = [list(fate) for fate in fates]

        def make(workers: Workers[RunResult], slot: int) -> FakeExecutor:
            self.executors.append(FakeExecutor(planned.pop(0) if planned else []))
            return self.executors[-1]

        monkeypatch.setattr(Workers, "_executor", make)
        self.workers = run_workers(jobs, 1)

    def run(self, *seeds: int) -> dict[str, RunResult]:
        """Start the runs, as many at once as go, and return the results by key."""
        waiting = list(seeds)
        found: dict[str, RunResult] = {}
        while waiting or self.workers.busy:
            while waiting and self.workers.free:
                seed = waiting.pop(0)
                self.workers.start(spec(seed), f"run {seed}")
            found |= {result.key: result for result in self.workers.finished()}
        return found


def test_worker_processes_spin_briefly_unless_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # what is set in this test does not outlive it
        monkeypatch.delenv(name)
    Made(monkeypatch, 1)
    assert os.environ["GOMP_SPINCOUNT"] == "10000"

    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    Made(monkeypatch, 1)
    assert os.environ["GOMP_SPINCOUNT"] == "5"


@pytest.mark.parametrize(("name", "arguments"), [("jobs", (0, 1)), ("threads", (1, 0)), ("jobs", (-2, 1))])
def test_there_must_be_a_process_and_a_thread(name: str, arguments: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got"):
        run_workers(*arguments)


def test_as_many_runs_begin_as_there_are_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Made(monkeypatch, 2).workers
    assert not workers.busy
    assert workers.finished() == []
    for seed in (1, 2):
        assert workers.free
        workers.start(spec(seed), f"run {seed}")

    assert not workers.free
    assert workers.busy
    assert {result.key for result in workers.finished()} == {"run 1", "run 2"}
    assert workers.free
    assert not workers.busy


@pytest.mark.parametrize(("jobs", "shared"), [(1, False), (2, True)])
def test_runs_side_by_side_share_their_meter(monkeypatch: pytest.MonkeyPatch, jobs: int, shared: bool) -> None:
    found = Made(monkeypatch, jobs).run(1, 2, 3)

    assert [result.energy_shared for result in found.values()] == [shared] * 3


def test_a_run_whose_process_dies_is_tried_again_in_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(monkeypatch, 1, [DIES])
    found = made.run(1, 2)

    assert all(result.usable for result in found.values())
    assert set(found) == {"run 1", "run 2"}
    assert [executor.closed for executor in made.executors] == [True, False]


def test_a_run_whose_process_dies_again_has_failed_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(monkeypatch, 2, [DIES], [], *([[DIES]] * (ATTEMPTS - 1)))
    found = made.run(1, 2, 3, 4)

    assert {key: result.failure for key, result in found.items()} == {
        "run 1": f"its process was killed {ATTEMPTS} times, perhaps for lack of memory",
        "run 2": None,
        "run 3": None,
        "run 4": None,
    }
    assert found["run 1"].spec == spec(1)
    assert not found["run 1"].usable
    assert not found["run 1"].diverged


def test_deaths_are_counted_for_each_run_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(monkeypatch, 1, [DIES], ["", DIES], ["", DIES])
    found = made.run(1, 2, 3)

    assert all(result.usable for result in found.values())
    assert len(made.executors) == 4


def test_a_process_that_dies_between_two_runs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(monkeypatch, 1, ["", "died before"])
    found = made.run(1, 2)

    assert all(result.usable for result in found.values())
    assert [executor.closed for executor in made.executors] == [True, False]


def test_a_process_is_replaced_after_so_many_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainpilot.experiments.workers.TASKS_PER_PROCESS", 2)
    made = Made(monkeypatch, 1)
    found = made.run(1, 2, 3, 4, 5)

    assert len(found) == 5
    assert [executor.closed for executor in made.executors] == [True, True, False]


def test_leaving_closes_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Made(monkeypatch, 3)
    with made.workers:
        pass

    assert [executor.closed for executor in made.executors] == [True] * 3


# Any function


def half(number: int) -> float:
    if number == DEADLY:
        os.kill(os.getpid(), signal.SIGKILL)
    report(number / 4)
    report(number)
    if number < 0:
        raise ValueError(f"number must be positive, got {number}")
    return number / 2


DEADLY = 13


def test_a_function_is_called_with_every_task_and_its_reports_add_up() -> None:
    before, reports = children(), list[float]()
    with Workers(half, 1, on_death=lambda number: 0.0) as workers:
        results = workers.run([(number,) for number in (2, DEADLY, 4, -1)], reports.append)
        assert list(itertools.islice(results, 3)) == [((2,), 1), ((DEADLY,), 0), ((4,), 2)]
        assert reports == sorted(reports)
        assert reports[-1] == 2  # looked at after a result has been taken
        with pytest.raises(ValueError, match="number must be positive, got -1"):
            next(results)

    assert wait_until(lambda: children() == before, 30)
    report(1.0)  # outside of a worker nobody listens


def test_a_death_is_one_clear_line_where_nothing_else_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "_executor", lambda workers, slot: FakeExecutor([DIES]))
    workers = Workers(half, 1)
    workers.start(1)
    with pytest.raises(ValueError, match="jobs: a worker process was killed, perhaps for lack of memory, got 1; fewer"):
        workers.finished()


# What goes wrong inside a run


@pytest.mark.parametrize(
    ("changes", "steering", "reason"),
    [
        ({"sequence_length": 128, "tokens": 25_600}, SteeringSpec(), "ValueError: sequence_length must not exceed"),
        ({}, SteeringSpec(kind="flying"), "ValueError: steering must be one of keep, plateau"),
        ({"text": ("nowhere.txt",)}, SteeringSpec(), "ValueError: text"),
        ({"device": "cuda:99"}, SteeringSpec(), "ValueError: device"),
        ({}, SteeringSpec(kind="seesaw"), "ValueError: schedule must be constant for Seesaw"),
        (
            {},
            SteeringSpec(kind="policy", settings={"path": "nowhere", "preference": "quality=1"}),
            "ValueError: policy: no file nowhere",
        ),
    ],
)
def test_a_fault_becomes_the_reason_of_a_failure_in_one_line(
    tmp_path: Path, changes: dict[str, Any], steering: SteeringSpec, reason: str
) -> None:
    asked = RunSpec(config=case(tmp_path, **changes), steering=steering)
    result = execute(asked, "ab", meter=NoMeter("a test"))

    assert result.failure is not None
    assert result.failure.startswith(reason)
    assert "\n" not in result.failure
    assert (result.key, result.spec) == ("ab", asked)
    assert not result.usable
    assert not result.diverged


def test_a_run_that_diverges_has_ended_without_a_loss(tmp_path: Path) -> None:
    result = execute(RunSpec(config=case(tmp_path, base_learning_rate=1e30)), "ab", meter=NoMeter("a test"))

    assert result.diverged
    assert result.failure is None
    assert result.final_validation_loss is None
    assert result.final_test_loss is None
    assert RunResult.from_json(result.to_json()).intervals[-1].validation_loss is None


# With processes


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/status")
    return not (status.exists() and "State:\tZ" in status.read_text())


def wait_until(happened: Callable[[], bool], limit_s: float) -> bool:
    end = time.monotonic() + limit_s
    while not happened() and time.monotonic() < end:
        time.sleep(0.05)
    return happened()


def children() -> set[int]:
    return {child.pid for child in multiprocessing.active_children() if child.pid is not None}


def new_child(before: set[int]) -> int:
    assert wait_until(lambda: bool(children() - before), 30)
    return (children() - before).pop()


def test_an_interrupt_ends_the_runs_under_way(tmp_path: Path) -> None:
    known = children()
    started: set[int] = set()

    def interrupted() -> None:
        with run_workers(1, 1) as workers:
            workers.start(RunSpec(config=case(tmp_path, tokens=ENDLESS)), "endless")
            started.add(new_child(known))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert started
    assert wait_until(lambda: not any(map(alive, started)), 30)


@pytest.mark.slow
def test_killed_process_costs_its_own_run_and_jobs_change_no_loss(tmp_path: Path) -> None:
    good = [RunSpec(config=case(tmp_path, seed=seed)) for seed in (0, 1)]
    bad = RunSpec(config=case(tmp_path), steering=SteeringSpec(kind="flying"))
    before = children()
    with run_workers(2, 1) as workers:
        workers.start(RunSpec(config=case(tmp_path, tokens=ENDLESS)), "endless")
        first = new_child(before)
        workers.start(good[0], "good 0")
        known = children()
        os.kill(first, signal.SIGKILL)
        [found] = workers.finished()
        assert found.key == "good 0"

        os.kill(new_child(known), signal.SIGKILL)
        [killed] = workers.finished()
        assert killed.key == "endless"
        assert killed.failure == "its process was killed 2 times, perhaps for lack of memory"

        workers.start(bad, "bad")
        workers.start(good[1], "good 1")
        rest: dict[str, RunResult] = {}
        while workers.busy:
            rest |= {result.key: result for result in workers.finished()}

    assert rest["bad"].failure is not None
    assert rest["bad"].failure.startswith("ValueError: steering must be one of keep")
    use_threads(1)  # as in the processes
    for result, asked in ((found, good[0]), (rest["good 1"], good[1])):
        alone = execute(asked, result.key, meter=NoMeter("a test"))
        assert result.energy_shared
        assert result.final_validation_loss == alone.final_validation_loss
        assert result.final_test_loss == alone.final_test_loss
        assert [one.train_loss for one in result.intervals] == [one.train_loss for one in alone.intervals]


KILLED = """
import multiprocessing, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from live_runs import case
from loky import BrokenProcessPool, ProcessPoolExecutor
from trainpilot.experiments.results import RunSpec
from trainpilot.experiments.compare.scheduler import run_workers

if __name__ == "__main__":
    workers = run_workers(1, 1)
    workers.start(RunSpec(config=case(Path(sys.argv[2]), tokens=10**9)), "endless")
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_comparison_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tmp_path / "cache" / "tokens"
    monkeypatch.setenv("TRAINPILOT_CACHE", str(tokens.parent))
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, str(script), str(Path(__file__).parents[1] / "helpers"), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            assert wait_until(tokens.exists, 120)  # the run has begun
            assert alive(child)
        finally:
            parent.kill()

    assert wait_until(lambda: not alive(child), 120)
