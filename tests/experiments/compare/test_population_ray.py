"""Population Based Training by Ray Tune itself, on a cluster of this machine.

Needs the extra `ray`, which `make setup` does not install; the file is skipped without.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from live_runs import case

from trainpilot.experiments.compare.methods import population_method
from trainpilot.experiments.compare.scheduler import run_workers
from trainpilot.experiments.results import Case, RunResult, RunSpec
from trainpilot.experiments.run_store import run_key

pytest.importorskip("ray.tune")

from trainpilot.experiments.workers_ray import RayEngine

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def engine() -> Iterator[RayEngine]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", str(ROOT)))
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        with closing(RayEngine()) as engine:
            yield engine


def train(engine: RayEngine, spec: RunSpec) -> RunResult:
    with run_workers(1, 1, engine) as workers:
        workers.start(spec, run_key(spec))
        [result] = workers.finished()
    return result


def test_a_population_trains_copies_and_pays_for_all(
    engine: RayEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = population_method("pbt").spec(Case(name="a", config=case(tmp_path), architecture="llama"), 0)
    result = train(engine, spec)
    stand = [interval for interval in result.intervals if not interval.rolled_back]

    assert result.failure is None
    assert result.spec == spec
    assert result.tokens == sum(round(each.batch_size * each.steps) for each in result.intervals) * 16
    assert 4 * 3_200 <= result.tokens <= 4 * 3_200 * 1.1
    assert len(result.intervals) == 40
    assert len(stand) == 10
    assert stand[-1].validation_loss == result.final_validation_loss
    assert result.final_validation_loss < result.initial_validation_loss  # type: ignore[operator]
    assert result.final_validation_loss == min(each.validation_loss or 99 for each in result.intervals[-8:])
    assert len({each.learning_rate_scale for each in result.intervals}) > 4, "nothing was perturbed"

    bad = replace(spec, config=replace(spec.config, sequence_length=65))  # more than the model's context
    failed = train(engine, bad)
    assert "sequence_length must not exceed the model's context" in (failed.failure or "")
