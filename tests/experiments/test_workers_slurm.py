"""Runs as jobs of submitit, whose local executor stands in for Slurm.

Needs the extra `slurm`, which `make setup` does not install; the file is skipped without.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from elsewhere_tasks import DEADLY, beginnings, endings, half, marked
from live_runs import case

from trainpilot.experiments.compare.execute import execute
from trainpilot.experiments.compare.scheduler import run_workers
from trainpilot.experiments.results import RunSpec
from trainpilot.experiments.run_store import run_key
from trainpilot.experiments.workers import Workers
from trainpilot.llm_runtime.energy.meter import NoMeter
from trainpilot.llm_runtime.process import use_threads

pytest.importorskip("submitit")

from trainpilot.experiments import workers_slurm
from trainpilot.experiments.workers_slurm import SlurmEngine

HELPERS = str(Path(__file__).resolve().parents[1] / "helpers")


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmEngine]:
    monkeypatch.setattr(workers_slurm, "CLUSTER", "local")
    monkeypatch.setenv("PYTHONPATH", HELPERS, prepend=":")
    with closing(SlurmEngine(tmp_path / "slurm", jobs=2, partition="any", minutes=5)) as engine:
        yield engine


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_what_slurm_cannot_do_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"jobs must be given for --on slurm, .* got 0"):
        SlurmEngine(tmp_path, jobs=0)
    with pytest.raises(ValueError, match=r"gpus_per_run must be a whole number for --on slurm, got 0.5"):
        SlurmEngine(tmp_path, jobs=1, gpus=0.5)
    with pytest.raises(ValueError, match="on: slurm needs the command sbatch, which this machine has not"):
        SlurmEngine(tmp_path, jobs=1)


@pytest.mark.slow
def test_jobs_return_and_raise_as_here_and_a_death_is_tried_again(engine: SlurmEngine) -> None:
    with Workers(half, engine.jobs, attempts=2, on_death=lambda _: -1.0, executor=engine) as workers:
        assert dict(workers.run([(number,) for number in (2, DEADLY)])) == {(2,): 1, (DEADLY,): -1}
        workers.start(-3)
        with pytest.raises(ValueError, match=r"^number must be positive, got -3$"):
            workers.finished()


@pytest.mark.slow
def test_losses_are_those_of_this_machine(engine: SlurmEngine, tmp_path: Path) -> None:
    spec = RunSpec(config=case(tmp_path))
    with run_workers(engine.jobs, 1, engine) as workers:
        workers.start(spec, run_key(spec))
        [there] = workers.finished()

    use_threads(1)  # as there
    here = execute(spec, run_key(spec), meter=NoMeter("a test"))
    assert there.failure is None
    assert there.energy_shared
    assert there.final_test_loss == here.final_test_loss
    assert [one.train_loss for one in there.intervals] == [one.train_loss for one in here.intervals]


@pytest.mark.slow
def test_an_interrupt_cancels_the_jobs(engine: SlurmEngine, tmp_path: Path) -> None:
    with Workers(marked, 1, executor=engine) as workers:
        workers.start(tmp_path, 0)
        end = time.monotonic() + 120
        while not beginnings(tmp_path, 0) and time.monotonic() < end:
            time.sleep(0.05)
        [pid] = beginnings(tmp_path, 0)
        engine.close()
        while alive(pid) and time.monotonic() < end:
            time.sleep(0.05)
        assert not alive(pid)
        workers._running.clear()

    assert endings(tmp_path, 0) == []
