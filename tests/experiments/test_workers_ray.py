"""Runs on a Ray cluster of two machines (raylets): the results of this machine, also when one of them is killed midway.

Needs the extra `ray`, which `make setup` does not install; the file is skipped without.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor
from contextlib import closing
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from elsewhere_tasks import DEADLY, Counter, beginnings, broken, endings, half, marked
from live_runs import case

from trainpilot.experiments.compare.execute import execute
from trainpilot.experiments.compare.scheduler import run_workers
from trainpilot.experiments.results import RunSpec, SteeringSpec
from trainpilot.experiments.run_store import run_key
from trainpilot.experiments.workers import Workers
from trainpilot.llm_runtime.energy.meter import NoMeter
from trainpilot.llm_runtime.process import use_threads

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

from trainpilot.experiments.workers_ray import RayEngine  # noqa: E402, it imports ray

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
NODE = {"num_cpus": 1, "object_store_memory": 100_000_000}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two machines with one core each."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield from made_cluster(monkeypatch)


def made_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")])
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    made = cluster_utils.Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    made.add_node(**NODE)
    made.wait_for_nodes()
    yield made
    made.shutdown()


@pytest.fixture
def engine(cluster: Any) -> Iterator[RayEngine]:
    engine = RayEngine(cluster.address)
    yield engine
    engine.close()


def wait_until(happened: Callable[[], bool], limit_s: float = 120) -> bool:
    end = time.monotonic() + limit_s
    while not happened() and time.monotonic() < end:
        time.sleep(0.05)
    return happened()


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_tasks_return_and_raise_as_here_and_a_death_is_tried_again(engine: RayEngine) -> None:
    assert (engine.jobs, engine.share_meter) == (2, 1)
    with Workers(half, engine.jobs, attempts=2, on_death=lambda _: -1.0, executor=engine) as workers:
        found = dict(workers.run([(number,) for number in (2, DEADLY, 4)]))
        assert found == {(2,): 1, (DEADLY,): -1, (4,): 2}
        workers.start(-3)
        with pytest.raises(ValueError, match=r"^number must be positive, got -3$"):
            workers.finished()


def test_a_machine_that_dies_costs_no_run_and_none_ends_twice(cluster: Any, tmp_path: Path) -> None:
    numbers = range(6)
    doomed = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    engine = RayEngine(cluster.address)
    assert engine.jobs == 3

    def kill() -> None:
        """Kill the third machine, its raylet and its workers, while each has a task under way; let the others go on."""
        assert wait_until(lambda: all(beginnings(tmp_path, number) for number in range(3)))
        raylet = doomed.all_processes["raylet"][0].process.pid
        workers = [pid for number in range(3) for pid in beginnings(tmp_path, number) if parent(pid) == raylet]
        assert len(workers) == 1
        cluster.remove_node(doomed, allow_graceful=False)
        os.kill(workers[0], signal.SIGKILL)
        (tmp_path / "go").touch()

    killer = Thread(target=kill)
    killer.start()
    with closing(engine), Workers(marked, engine.jobs, attempts=2, executor=engine) as workers:
        found = [result for _, result in workers.run([(tmp_path, number) for number in numbers])]
    killer.join()

    assert sorted(found) == list(numbers)
    assert [len(endings(tmp_path, number)) for number in numbers] == [1] * 6
    assert sorted(len(beginnings(tmp_path, number)) for number in numbers) == [1, 1, 1, 1, 1, 2]


def test_losses_are_those_of_this_machine_and_faults_too(engine: RayEngine, tmp_path: Path) -> None:
    specs = [RunSpec(config=case(tmp_path, seed=seed)) for seed in (0, 1)]
    specs.append(RunSpec(config=case(tmp_path), steering=SteeringSpec(kind="flying")))
    with run_workers(engine.jobs, 1, engine) as workers:
        found = {given[1]: result for given, result in workers.run((spec, run_key(spec)) for spec in specs)}

    use_threads(1)  # as there
    for spec in specs:
        there, here = found[run_key(spec)], execute(spec, run_key(spec), meter=NoMeter("a test"))
        assert there.failure == here.failure
        assert there.final_validation_loss == here.final_validation_loss
        assert there.final_test_loss == here.final_test_loss
        assert [one.train_loss for one in there.intervals] == [one.train_loss for one in here.intervals]


def test_an_object_keeps_its_state_in_a_process_of_its_own(engine: RayEngine) -> None:
    one, other = engine.begin(Counter), engine.begin(Counter)
    sums = [each.call("add", 2).result() for each in (one, other, one)]
    assert [total for total, _ in sums] == [2, 2, 4]
    assert sums[0][1] == sums[2][1]
    assert len({pid for _, pid in sums} | {os.getpid()}) == 3
    with pytest.raises(ValueError, match=r"^number must be positive, got -1$"):
        one.call("add", -1).result()
    assert one.call("add", 1).result()[0] == 5
    with pytest.raises(BrokenExecutor):
        one.call("add", DEADLY).result()
    del one
    with pytest.raises(ValueError, match="there is nothing to count"):
        engine.begin(broken).call("add", 1).result()


def test_other_files_there_are_one_clear_error(engine: RayEngine, tmp_path: Path) -> None:
    spec = RunSpec(config=case(tmp_path))
    with run_workers(1, 1, engine) as workers:
        workers.start(spec, "the name of a run on another text")
        with pytest.raises(
            ValueError, match=r"on: every machine needs the same files under the same paths.* has others$"
        ):
            workers.finished()


def test_an_interrupt_kills_what_runs_there(engine: RayEngine, tmp_path: Path) -> None:
    def interrupted() -> None:
        with Workers(marked, 1, executor=engine) as workers:
            workers.start(tmp_path, 0)
            assert wait_until(lambda: bool(beginnings(tmp_path, 0)))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()

    assert wait_until(lambda: not any(map(alive, beginnings(tmp_path, 0))))
    assert endings(tmp_path, 0) == []


def test_room_is_counted_and_its_lack_is_one_line(cluster: Any) -> None:
    for asked, words in (({"threads": 2}, "2 cores and 0 GPUs"), ({"gpus": 0.5}, "1 cores and 0.5 GPUs")):
        with pytest.raises(ValueError, match=f"on: no machine of the Ray cluster has room for a run of {words}; start"):
            RayEngine(cluster.address, **asked)


CASES = """
cases:
  - {name: one, text: [TEXT], model: llama-nano, tokens: 640, batch_size: 2, sequence_length: 16, decisions: 5,
     base_learning_rate: 0.01, device: cpu}
"""


def test_the_command_ends_by_sigterm_goes_on_and_finds_the_same(cluster: Any, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 400)
    (tmp_path / "cases.yaml").write_text(CASES.replace("TEXT", str(text)))
    command = [sys.executable, "-m", "trainpilot.experiments.cli", "compare", "--cases", str(tmp_path / "cases.yaml"),
               "--methods", "constant,cosine", "--seeds", "3", "--no-tensorboard", "--out"]  # fmt: skip
    remote = ["--on", "ray", "--ray-address", cluster.address]
    environment = os.environ | {"TRAINPILOT_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}

    def losses(folder: Path) -> dict[str, Any]:
        runs = [json.loads(path.read_text()) for path in (folder / "runs").glob("*.json")]
        return {run["key"]: (run["final_validation_loss"], run["intervals"]["train_loss"]) for run in runs}

    there, here = tmp_path / "there", tmp_path / "here"
    with subprocess.Popen([*command, there, *remote], env=environment, stderr=subprocess.PIPE, text=True) as first:
        assert wait_until(lambda: bool(losses(there)))
        first.send_signal(signal.SIGTERM)
        _, said = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM
    assert "trainpilot: ended by SIGTERM; run the same command again to resume" in said
    kept = losses(there)
    assert kept

    subprocess.run([*command, there, *remote], env=environment, check=True)
    subprocess.run([*command, here, "--jobs", "1"], env=environment, check=True)
    assert losses(there) == losses(here)
    assert losses(there).items() >= kept.items()
