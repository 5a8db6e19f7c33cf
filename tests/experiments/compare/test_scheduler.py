"""Programs get the results of their waves in order, whoever runs them; what was run before is not run again."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import pytest
from comparison_runs import CONFIG, made_result
from fake_workers import FakeWorkers

from trainpilot.experiments.compare.execute import failed
from trainpilot.experiments.compare.scheduler import Program, Scheduler
from trainpilot.experiments.results import RunResult, RunSpec
from trainpilot.experiments.run_store import RunStore, run_key


def spec(seed: int) -> RunSpec:
    return RunSpec(config=replace(CONFIG, seed=seed))


def by_seed(spec: RunSpec) -> RunResult:
    """Return a run whose loss is its seed."""
    return made_result(spec, float(spec.config.seed))


def failing(spec: RunSpec) -> RunResult:
    """Return the same, but for the second seed, which fails."""
    return failed(spec, run_key(spec), "a planted failure") if spec.config.seed == 2 else by_seed(spec)


def workers_for(jobs: int = 1, **options: bool) -> FakeWorkers:
    return FakeWorkers(by_seed, jobs, **options)


class Played:
    """Programs carried out together, and what they and the listener were told."""

    def __init__(self, folder: Path, workers: FakeWorkers | None) -> None:
        self.workers = workers
        self.told: list[tuple[int, bool]] = []
        self.seen: dict[str, list[list[float | None]]] = {}
        self.scheduler = Scheduler(workers, RunStore(folder), self._listen)

    def _listen(self, result: RunResult, kept: bool) -> None:
        self.told.append((result.spec.config.seed, kept))

    def program(self, name: str, *waves: list[int]) -> Program:
        """Return a program that asks for the seeds of each wave, and notes the losses that come back."""
        self.seen[name] = []
        for wave in waves:
            results = yield [spec(seed) for seed in wave]
            assert [result.spec.config.seed for result in results] == wave
            self.seen[name].append([result.final_validation_loss for result in results])

    def run(self, **programs: list[list[int]]) -> Played:
        self.scheduler.run([self.program(name, *waves) for name, waves in programs.items()])
        return self


@pytest.mark.parametrize("jobs", [1, 2, 5])
@pytest.mark.parametrize("last_first", [False, True])
def test_waves_come_back_whole_and_in_their_order(tmp_path: Path, jobs: int, last_first: bool) -> None:
    played = Played(tmp_path, workers_for(jobs, last_first=last_first)).run(
        first=[[3, 1, 2], [5, 4]],
        second=[[9], [8], [7, 6]],
    )

    assert played.seen["first"] == [[3, 1, 2], [5, 4]]
    assert played.seen["second"] == [[9], [8], [7, 6]]
    assert played.workers is not None
    assert sorted(played.workers.seeds) == list(range(1, 10))
    assert sorted(played.told) == [(seed, False) for seed in range(1, 10)]


def test_a_program_may_look_at_its_results_before_it_goes_on(tmp_path: Path) -> None:
    found: list[float | None] = []

    def search() -> Generator[list[RunSpec], list[RunResult], None]:
        seed = 8
        while seed > 1:
            [result] = yield [spec(seed)]
            found.append(result.final_validation_loss)
            seed //= 2

    Scheduler(workers_for(), RunStore(tmp_path), lambda result, kept: None).run([search()])
    assert found == [8, 4, 2]


def test_equal_runs_are_run_once_for_all_who_ask(tmp_path: Path) -> None:
    workers = workers_for(2)
    played = Played(tmp_path, workers).run(
        first=[[1, 2], [3]],
        second=[[2, 2, 1], [4]],  # asked for twice in one wave
        third=[[4], [1], [2]],  # and later again
    )

    assert played.seen == {
        "first": [[1, 2], [3]],
        "second": [[2, 2, 1], [4]],
        "third": [[4], [1], [2]],
    }
    assert sorted(workers.seeds) == [1, 2, 3, 4]
    assert sorted(played.told) == [(1, False), (2, False), (3, False), (4, False)]


def test_empty_waves_and_empty_programs_hold_nobody_up(tmp_path: Path) -> None:
    played = Played(tmp_path, workers_for()).run(none=[], empty=[[], []], mixed=[[], [1], [], [], [2], []])

    assert played.seen == {"none": [], "empty": [[], []], "mixed": [[], [1], [], [], [2], []]}


def test_no_programs_at_all(tmp_path: Path) -> None:
    assert Played(tmp_path, workers_for()).run().told == []


def test_what_was_run_before_is_not_run_again(tmp_path: Path) -> None:
    programs = {"first": [[1, 2], [3]], "second": [[2], [4]]}
    Played(tmp_path, workers_for()).run(**programs)

    workers = workers_for()
    again = Played(tmp_path, workers).run(**programs, third=[[4], [5], [1]])

    assert workers.seeds == [5]
    assert again.seen == {"first": [[1, 2], [3]], "second": [[2], [4]], "third": [[4], [5], [1]]}
    assert sorted(again.told) == [(1, True), (2, True), (3, True), (4, True), (5, False)]


def test_an_interrupted_comparison_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    played = Played(tmp_path, workers_for())
    workers = played.workers
    assert workers is not None

    class InterruptedWorkers(FakeWorkers):
        def finished(self) -> list[RunResult]:
            if len(self.started) == 4:
                raise KeyboardInterrupt
            return super().finished()

    first = Played(tmp_path, InterruptedWorkers(by_seed))
    with pytest.raises(KeyboardInterrupt):
        first.run(a=[[1, 2], [3, 4], [5]])
    played.run(a=[[1, 2], [3, 4], [5]])

    assert workers.seeds == [4, 5]  # the fourth was under way
    assert played.seen["a"] == [[1, 2], [3, 4], [5]]


def test_a_run_deleted_from_the_middle_is_the_only_one_run_again(tmp_path: Path) -> None:
    Played(tmp_path, workers_for()).run(a=[[1, 2], [3, 4]])
    (tmp_path / f"{run_key(spec(2))}.json").unlink()
    (tmp_path / f"{run_key(spec(3))}.json").write_text("{")

    workers = workers_for()
    assert Played(tmp_path, workers).run(a=[[1, 2], [3, 4]]).seen["a"] == [[1, 2], [3, 4]]
    assert workers.seeds == [2, 3]


def test_earlier_programs_go_first(tmp_path: Path) -> None:
    workers = workers_for()
    Played(tmp_path, workers).run(first=[[1], [2], [3]], second=[[11], [12]], third=[[21]])

    assert workers.seeds == [1, 2, 3, 11, 12, 21]


def test_later_programs_fill_the_places_that_earlier_ones_leave_free(tmp_path: Path) -> None:
    workers = workers_for(3)
    Played(tmp_path, workers).run(first=[[1], [2]], second=[[11, 12, 13]])

    assert workers.seeds == [1, 11, 12, 2, 13]


def test_a_failed_run_reaches_everyone_once_and_is_tried_again_next_time(tmp_path: Path) -> None:
    workers = FakeWorkers(failing)
    played = Played(tmp_path, workers).run(first=[[1, 2], [3]], second=[[2], [2]], third=[[3], [2]])

    assert played.seen["first"] == [[1, None], [3]]
    assert played.seen["second"] == [[None], [None]]
    assert played.seen["third"] == [[3], [None]]
    assert workers.seeds == [1, 2, 3]
    assert played.told == [(1, False), (2, False), (3, False)]

    workers = workers_for()
    again = Played(tmp_path, workers).run(first=[[1, 2], [3]])
    assert workers.seeds == [2]
    assert again.seen["first"] == [[1, 2], [3]]


def test_without_workers_a_program_goes_as_far_as_there_are_runs(tmp_path: Path) -> None:
    Played(tmp_path, workers_for()).run(a=[[1, 2], [3]])

    played = Played(tmp_path, None).run(a=[[1, 2], [3], [4], [5]], b=[[6]], c=[[3]])

    assert played.seen == {"a": [[1, 2], [3]], "b": [], "c": [[3]]}
    assert sorted(played.told) == [(1, True), (2, True), (3, True)]


def test_a_kept_run_is_described_as_it_is_asked_for(tmp_path: Path) -> None:
    """Its text and model may lie elsewhere now; cost tables are found by the model's place."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "text.txt").write_text("the same text")

    def run_in(folder: str) -> RunResult:
        text = (str(tmp_path / folder / "text.txt"),)
        found: list[RunResult] = []

        def program() -> Program:
            found.extend((yield [RunSpec(config=replace(CONFIG, text=text, seed=3))]))

        listened: list[RunResult] = []
        Scheduler(workers_for(), RunStore(tmp_path / "runs"), lambda r, kept: listened.append(r)).run([program()])
        assert listened == found
        assert found[0].spec.config.text == text
        return found[0]

    here, there = run_in("here"), run_in("there")
    assert here.key == there.key
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_a_fault_in_a_program_is_not_swallowed(tmp_path: Path) -> None:
    def broken() -> Program:
        yield [spec(1)]
        raise ValueError("methods must be better than this")

    with pytest.raises(ValueError, match="better than this"):
        Scheduler(workers_for(), RunStore(tmp_path), lambda result, kept: None).run([broken()])
