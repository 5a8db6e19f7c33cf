"""Two processes that train one model take the same steps, decided once, and end where one process does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from distributed_worker import CHANGES, INTERVAL, PROCESSES, SECONDS, SharedLoop, in_two_processes
from fake_nvml import UUIDS, FakeNvml
from live_runs import LLAMA, case
from torch import nn

from trainpilot.agents.integrations.common import ProcessGroupRanks, accelerated, counted, sum_once
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.llm_runtime.energy.host import CpuEstimateMeter, RaplMeter
from trainpilot.llm_runtime.energy.meter import NoMeter
from trainpilot.llm_runtime.energy.nvml import NvmlMeter
from trainpilot.llm_runtime.masks import Criterion

Outcome = dict[str, Any]
MOST_SEQUENCES = 16
"""Largest batch of a step, in both processes together."""
JOBS = (
    [
        "whole ddp",
        "first ddp",
        "whole fsdp",
        "first fsdp",
        "spoilt fsdp",
        "whole accelerate",
        "whole accelerate-fsdp",
        "timed ddp",
        "advised ddp",
        "untouched ddp",
        "advised fsdp",
        "untouched fsdp",
        "misused fsdp",
        "pruned fsdp",
    ],
    ["second ddp", "second fsdp"],
)
"""What a first pair of processes does, and a second pair after the first is gone."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Outcome]]:
    """Return what came of a job, by process; `alone` is one process with the whole batch."""
    folder = tmp_path_factory.mktemp("distributed")
    decisions = len(CHANGES) + 1
    config = case(folder, LLAMA, tokens=16 * INTERVAL * decisions, batch_size=4, decisions=decisions)
    for number, jobs in enumerate(JOBS):
        in_two_processes(config, folder, jobs, f"meeting-{number}")
    alone = SharedLoop(config, "alone")
    alone.train()
    done = {"alone": [alone.outcome()]}
    return lambda job: (
        done.get(job) or [torch.load(folder / f"{job.replace(' ', '-')}-{rank}.pt") for rank in range(PROCESSES)]
    )


Results = Callable[[str], list[Outcome]]


def far(one: Outcome, other: Outcome) -> float:
    """Return the largest difference between the weights."""
    pairs = zip(one["weights"], other["weights"], strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


def told(outcome: Outcome, name: str) -> list[Any]:
    return [record["telemetry"][name] for record in outcome["records"]]


KINDS = ["ddp", "fsdp", "accelerate", "accelerate-fsdp"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_end_where_one_does_that_has_the_whole_batch(results: Results, kind: str) -> None:
    first, second = results(f"whole {kind}")
    assert far(first, second) == 0.0
    assert far(first, results("alone")[0]) < 1e-4
    sizes = [asked["batch_size"] for asked in told(first, "requested")]
    assert sum(a != b for a, b in zip([4, *sizes], sizes, strict=False)) == 20
    assert told(first, "batch_size") == sizes
    assert first["summary"]["sequences"] == INTERVAL * len(sizes)
    assert told(first, "sparsity")[-1] == pytest.approx(0.1, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_process_decides_for_all_and_all_tell_the_same(results: Results, kind: str) -> None:
    first, second = results(f"whole {kind}")
    assert first["records"] == second["records"]
    assert (first["asked"], second["asked"]) == (len(CHANGES) + 1, 0)
    assert told(first, "requested") == told(results("alone")[0], "requested")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_measured_is_that_of_the_whole_batch(results: Results, kind: str) -> None:
    here, alone = results(f"whole {kind}")[0], results("alone")[0]
    for name in ("train_loss", "gradient_norm", "noise_scale"):
        # A noise scale near zero is the difference of two norms that are equal up to a few float32 roundings.
        rounding = 4 * MOST_SEQUENCES * torch.finfo(torch.float32).eps if name == "noise_scale" else 0.0
        assert told(here, name) == pytest.approx(told(alone, name), rel=1e-3, abs=rounding), name
    assert set(told(here, "validation_loss")) == {None, 0.5}  # the processes say 0 and 1


@pytest.mark.slow
def test_the_probe_sees_shards_as_it_sees_whole_weights(results: Results) -> None:
    whole, shards = results("whole ddp")[0], results("whole fsdp")[0]
    for name in ("relative_update", "probe_linear", "probe_quadratic"):
        pairs = [(a, b) for a, b in zip(told(whole, name), told(shards, name), strict=True) if a is not None]
        assert len(pairs) > 5
        assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=1e-2, abs=1e-5), name
    assert any(abs(value) > 1e-3 for value in told(shards, "probe_linear") if value is not None)


@pytest.mark.slow
def test_joules_are_counted_once(results: Results) -> None:
    assert set(told(results("whole ddp")[0], "energy_j")) == {40.0}  # 10 + 30: each process its own device
    assert set(told(results("whole fsdp")[0], "energy_j")) == {30.0}  # both look at one
    assert results("whole ddp")[0]["summary"]["energy_j"] == 40.0 * (len(CHANGES) + 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_killed_run_goes_on_bit_for_bit(results: Results, kind: str) -> None:
    resumed, whole = results(f"second {kind}"), results(f"whole {kind}")
    for mine, theirs in zip(resumed, whole, strict=True):
        assert far(mine, theirs) == 0.0
        for name in ("requested", "train_loss", "gradient_norm", "probe_linear", "noise_scale"):
            assert told(mine, name) == told(theirs, name), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_policy_that_only_advises_changes_no_bit_in_two_processes(results: Results, kind: str) -> None:
    (first, second), (base, _) = results(f"advised {kind}"), results(f"untouched {kind}")
    assert far(first, base) == 0.0
    assert far(first, second) == 0.0
    assert first["records"] == second["records"]
    assert told(first, "requested") == told(base, "requested")
    assert told(first, "train_loss") == told(base, "train_loss")
    assert first["summary"]["advice"]["batch_size double"] > 3
    assert second["asked"] == 0  # rank 0 decides


@pytest.mark.slow
def test_a_loss_that_one_process_cannot_compute_is_skipped_by_all(results: Results) -> None:
    first, second = results("spoilt fsdp")
    assert first["summary"]["skipped_steps"] == 1
    assert first["summary"]["rollbacks"] == []
    assert first["summary"] == second["summary"]
    assert far(first, second) == 0.0
    assert all(weights.isfinite().all() for weights in first["weights"])
    assert first["summary"]["sequences"] == INTERVAL * (len(CHANGES) + 1)


@pytest.mark.slow
def test_a_budget_in_seconds_ends_all_processes_at_the_same_step(results: Results) -> None:
    first, second = results("timed ddp")
    assert first["records"] == second["records"]
    assert first["steps"] == second["steps"]
    assert far(first, second) == 0.0
    assert first["summary"]["budget_used"] == pytest.approx(1.0, abs=0.02)
    assert second["wall_s"] == pytest.approx(SECONDS, rel=0.02)  # the longest time counts


@pytest.mark.slow
def test_shards_are_pruned_as_whole_matrices_are(results: Results) -> None:
    for found in results("pruned fsdp"):
        for criterion in get_args(Criterion):
            (weights, sparsity, masks), (others, other_sparsity, other_masks) = (
                found[f"{name} {criterion}"] for name in ("whole", "shards")
            )
            assert all(map(torch.equal, masks, other_masks))
            assert all(map(torch.equal, weights, others))
            assert sparsity == other_sparsity == pytest.approx(0.5, abs=1e-3)
            assert sum(int((~mask).sum()) for mask in masks) / sum(m.numel() for m in masks) == pytest.approx(
                0.3, abs=1e-3
            )


@pytest.mark.slow
def test_bad_uses_get_one_clear_line(results: Results) -> None:
    for says in results("misused fsdp"):
        assert "batch_size must be a multiple of the 2 processes, got 3" in says["odd batch"]
        assert "wrap it in DistributedDataParallel" in says["not wrapped"]
        assert "by the process that saved it" in says["the other's state"]
        assert not any("\n" in line for line in says.values())


def test_without_a_process_group_there_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match="needs a process group"):
        ProcessGroupRanks()


# What a meter counts ----------------------------------------------------------------------------------------------


def of_both(meters: list[Any], joules: list[float | None], **options: Any) -> float | None:
    """Return the sum over two processes that counted for two seconds."""
    pairs = enumerate(zip(meters, joules, strict=True))
    return sum_once(part for i, (m, j) in pairs for part in counted(j, 2.0, m, process=f"process {i}", **options))


def test_gpus_count_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNvml(monkeypatch).reset(2)
    one, other = NvmlMeter([0]), NvmlMeter([1])
    assert counted(5.0, 1.0, one, process="process 0") == [(UUIDS[0], 5.0)]
    assert of_both([one, other], [5.0, 7.0]) == 12.0
    assert of_both([one, one], [5.0, 6.0]) == 6.0  # two processes share a GPU
    all_of_them, turned = NvmlMeter([0, 1]), NvmlMeter([1, 0])
    assert of_both([all_of_them, turned], [11.0, 12.0]) == 12.0
    with pytest.raises(ValueError, match=f"got {UUIDS[1]} in different sums"):
        of_both([all_of_them, other], [12.0, 7.0])
    for meter in (one, other, all_of_them, turned):
        meter.close()


def test_counters_of_the_host_count_once_per_node(tmp_path: Path) -> None:
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    for name, text in (("name", "package-0"), ("energy_uj", "0"), ("max_energy_range_uj", "1000000")):
        (zone / name).write_text(text, encoding="ascii")
    meter = RaplMeter(tmp_path)
    assert of_both([meter, meter], [50.0, 50.5]) == 50.5
    meter.close()


def test_estimate_counts_each_process_and_the_idle_draw_once() -> None:
    meter = CpuEstimateMeter(idle_w=3.0, watts_per_busy_core=4.0)
    assert of_both([meter, meter], [3.0 * 2 + 8.0, 3.0 * 2 + 4.0]) == pytest.approx(6.0 + 8.0 + 4.0)


def test_what_one_process_does_not_know_is_not_known() -> None:
    meter = NoMeter("a test")
    assert of_both([meter, meter], [5.0, None]) is None
    assert of_both([meter, meter], [None, 5.0], energy_of="node") is None
    assert of_both([meter, meter], [4.0, 5.0], energy_of="node") == 5.0
    assert of_both([meter, meter], [4.0, 5.0]) == 9.0


def test_accelerate_must_leave_precision_and_gradients_alone() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    settings = SteeringSettings(sequences=100, batch_size=2)
    fixed: Any = SimpleNamespace(mixed_precision="bf16")
    with pytest.raises(ValueError, match="mixed_precision of the Accelerator must be 'no', got 'bf16'"):
        accelerated(fixed, model, optimizer, settings)
    for kind in (SimpleNamespace(value="DEEPSPEED"), SimpleNamespace(value="FSDP")):
        other: Any = SimpleNamespace(mixed_precision="no", distributed_type=kind, is_fsdp2=False)
        with pytest.raises(ValueError, match="distributed_type of the Accelerator must be"):
            accelerated(other, model, optimizer, settings)
