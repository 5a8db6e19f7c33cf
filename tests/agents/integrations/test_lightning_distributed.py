"""Two processes that Lightning trains together make the same steps, on whatever batches each has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed_worker import in_two_processes

pytest.importorskip("lightning.pytorch")
from lightning_worker import BATCHES, JOULES, SIZES, STEP, Numbers

pytestmark = pytest.mark.slow
Outcomes = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Return what came of each job, by process."""
    folder, jobs = tmp_path_factory.mktemp("lightning"), ["lightning uneven", "lightning resumed"]
    in_two_processes(None, folder, jobs, "meeting")
    return {job: [torch.load(folder / f"{job.replace(' ', '-')}-{rank}.pt") for rank in (0, 1)] for job in jobs}


def test_processes_with_batches_of_different_sizes_make_the_same_steps(results: Outcomes) -> None:
    first, second = results["lightning uneven"]
    assert first["weight"] == second["weight"]
    assert first["told"] == second["told"]
    assert first["budget"] == second["budget"] == 2 * sum(SIZES[0])  # as the first sees it
    assert first["summary"]["sequences"] == second["summary"]["sequences"] == sum(SIZES[0]) + sum(SIZES[1])


def test_their_gradient_is_the_mean_over_the_sequences_of_both(results: Outcomes) -> None:
    batches = [Numbers(rank, SIZES[rank]).numbers for rank in (0, 1)]
    steps = [[numbers for mine in batches for numbers in mine[i : i + STEP]] for i in range(0, BATCHES, STEP)]
    for outcome in results["lightning uneven"]:
        assert outcome["gradients"] == pytest.approx([float(torch.cat(step).mean()) for step in steps])


def test_processes_that_go_on_within_an_interval_measure_it_anew(results: Outcomes) -> None:
    first, second = (each["late"] for each in results["lightning resumed"])
    whole = results["lightning resumed"][0]["whole"]
    assert first["weight"] == second["weight"] == whole["weight"]
    assert first["told"] == second["told"]
    assert [steps for steps, _, _ in whole["told"]] == [3, 3, 3, 3]
    assert [steps for steps, _, _ in first["told"]] == [3, 2, 3, 3]
    assert first["told"][1][2] == sum(JOULES)
    assert first["told"][2:] == whole["told"][2:]
