"""Train a tiny model in two processes, each job as its name says, and leave what came of it in files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
from fakes import PassClock
from live_runs import live_run
from steering_loops import Script
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from trainpilot.agents.bundle import BaseSchedule
from trainpilot.agents.controller import keep
from trainpilot.agents.integrations.common import ProcessGroupRanks, accelerated, present_ranks
from trainpilot.agents.steering.guardrails import GuardrailSettings
from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.envs.action import Action
from trainpilot.llm_runtime.config import RunConfig
from trainpilot.llm_runtime.data.batches import BatchStream
from trainpilot.llm_runtime.energy.meter import EnergyReading, RecordedMeter
from trainpilot.llm_runtime.masks import Criterion, WeightMasks
from trainpilot.llm_runtime.optimizer import full_tensor, make_optimizer

PROCESSES = 2
UP, DOWN, PRUNE, FASTER = (3, 2, 0, 0, 0), (3, 0, 0, 0, 0), (2, 1, 0, 1, 0), (4, 1, 0, 0, 0)
AROUND: list[Action] = [UP, DOWN, DOWN, UP]
CHANGES: list[Action] = [*AROUND, *AROUND, PRUNE, *AROUND, PRUNE, *AROUND, *AROUND, FASTER]
"""Twenty changes of the batch among 2, 4 and 8, and some of learning rate and sparsity."""
INTERVAL = 8
"""Sequences of an interval."""
SAVED_AT = 28
"""Steps after which a run is saved and killed: in the midst of an interval, before a probe."""
SPOILT_AT = 20
"""The step in which one process gets a loss that is no number."""
SECONDS = 3
"""Budget of a run in seconds."""
JOULES = (10.0, 30.0)
"""What the meter of each process counts between two readings."""


class SharedLoop:
    """A plain loop, alone or as one of the processes that share its batches."""

    def __init__(
        self,
        config: RunConfig,
        kind: str,
        rank: int = 0,
        *,
        energy_of: Any = None,
        budget: str | None = None,
        clock: Callable[[], float] = time.perf_counter,
        **settings: Any,
    ) -> None:
        run = live_run(config)
        self.rank, self.kind = rank, kind
        self.stream = BatchStream(run.corpus.train, config.sequence_length, config.seed)
        self.model, self.steps, self.spoilt_at = run.loaded.model.train(), 0, -1
        usual: dict[str, Any] = {
            "sequences": config.n_sequences(),
            "budget": budget,
            "batch_size": config.batch_size,
            "sequence_length": config.sequence_length,
            "policy": Script(CHANGES) if rank == 0 else Script([FASTER] * len(CHANGES)),
            "decisions": config.decisions,
            "base_schedule": BaseSchedule(schedule=config.schedule, warmup_share=0.02),
            "max_batch_size": 8,
            "pruning": "magnitude",
            "guardrails": GuardrailSettings(max_reversals=99, spike=99),
        }
        self.settings = SteeringSettings(**usual | settings)
        self.meter = RecordedMeter([_reading(i * JOULES[rank]) for i in range(10_000)])
        self.steering = self._steer(config, energy_of, clock)

    def _steer(self, config: RunConfig, energy_of: Any, clock: Callable[[], float]) -> Steering:
        options: dict[str, Any] = {
            "meter": self.meter, "data": self.stream, "validate": lambda: float(self.rank), "clock": clock,
        }  # fmt: skip
        if self.kind.startswith("accelerate"):
            accelerator = _accelerator(sharded=self.kind.endswith("fsdp"))
            model, optimizer = accelerator.prepare(self.model, make_optimizer(self.model, config))
            self.model = model
            return accelerated(accelerator, model, optimizer, self.settings, **options)
        if self.kind == "ddp":
            self.model = DistributedDataParallel(self.model)
        if self.kind == "fsdp":  # embedding, last norm and head stay with the root, which is gathered otherwise
            for layer in self.model.model.layers:
                fully_shard(layer)
            fully_shard(self.model)
        ranks = ProcessGroupRanks(energy_of) if self.kind != "alone" else present_ranks()
        return Steering(self.model, make_optimizer(self.model, config), self.settings, ranks=ranks, **options)

    def loss(self, batch: torch.Tensor, factor: float) -> torch.Tensor:
        logits = self.model(input_ids=batch[:, :-1], use_cache=False).logits
        return factor * F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    def one_step(self) -> None:
        self.steps += 1
        factor = float("nan") if self.steps == self.spoilt_at and self.rank == 1 else 1.0
        with self.steering.step() as step:
            world = self.steering.ranks.world_size
            batch = torch.from_numpy(self.stream.take(step.batch_size * world))
            mine = batch[self.rank * step.batch_size : (self.rank + 1) * step.batch_size]
            for part in torch.split(mine, max(1, len(mine) // 2)):
                step.backward(partial(self.loss, part, factor), sequences=len(part))

    def train(self, steps: int = 10**9) -> None:
        while not self.steering.finished and steps:
            self.one_step()
            steps -= 1

    def outcome(self) -> dict[str, Any]:
        return {
            "weights": [full_tensor(p.detach()).clone() for p in self.model.parameters()],
            "records": [record.to_json() for record in self.steering.records],
            "summary": self.steering.summary(),
            "asked": getattr(self.settings.policy, "at", None),
        }

    def save(self, path: Path) -> None:
        parts = {"model": self.model, "optimizer": self.steering.loop.optimizer, "stream": self.stream}
        state = {name: part.state_dict() for name, part in parts.items()}
        torch.save(state | {"steering": self.steering.state_dict(), "at": self.settings.policy.at}, path)  # type: ignore[union-attr]

    def load(self, path: Path) -> None:
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        self.steering.loop.optimizer.load_state_dict(state["optimizer"])
        self.stream.load_state_dict(state["stream"])
        self.steering.load_state_dict(state["steering"])
        self.settings.policy.at = state["at"]  # type: ignore[union-attr]


def _accelerator(*, sharded: bool) -> Any:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state()  # each of a process's jobs has its own
    accelerator = Accelerator(cpu=True)
    if sharded:  # Accelerate asks for it on GPUs only, but shards on CPUs as well
        layers = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"]}
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **layers)
        accelerator.state.distributed_type = DistributedType.FSDP
    return accelerator


def _reading(energy_j: float) -> EnergyReading:
    return EnergyReading(time_s=0.0, energy_j=energy_j, source="measured_counter")


def whole_run(kind: str, config: RunConfig, rank: int, folder: Path) -> dict[str, Any]:
    loop = SharedLoop(config, kind, rank, energy_of="node" if kind == "fsdp" else None)
    loop.train()
    return loop.outcome()


def first_half(kind: str, config: RunConfig, rank: int, folder: Path) -> dict[str, Any]:
    loop = SharedLoop(config, kind, rank)
    loop.train(SAVED_AT)
    assert loop.steering.sequences % INTERVAL, "in the midst of an interval"
    loop.save(folder / f"saved-{kind}-{rank}.pt")
    return {}


def second_half(kind: str, config: RunConfig, rank: int, folder: Path) -> dict[str, Any]:
    loop = SharedLoop(config, kind, rank)
    loop.load(folder / f"saved-{kind}-{rank}.pt")
    loop.train()
    return loop.outcome()


def spoilt(kind: str, config: RunConfig, rank: int, folder: Path) -> dict[str, Any]:
    loop = SharedLoop(config, kind, rank)
    loop.spoilt_at = SPOILT_AT
    loop.train()
    return loop.outcome()


def advised(kind: str, config: RunConfig, rank: int, folder: Path) -> dict[str, Any]:
    """Train under a policy that only advises."""
    loop = SharedLoop(config, kind, rank, mode="advise")
    loop.train()
    return loop.outcome()


def untouched(kind: str, config: RunConfig, rank: int, folder: Path) -> dict[str, Any]:
    """Train without a policy."""
    loop = SharedLoop(config, kind, rank, policy="none")
    loop.train()
    return loop.outcome()


def timed(kind: str, config: RunConfig, rank: int, folder: Path) -> dict[str, Any]:
    """Train for so many seconds, by clocks of which the second process' goes faster."""
    with PassClock(0.01 + 0.01 * rank) as clock:
        loop = SharedLoop(config, kind, rank, budget=f"{SECONDS}s", clock=clock)
        while not loop.steering.finished:
            loop.one_step()
    return loop.outcome() | {"wall_s": clock.now_s, "steps": loop.steps}


def misused(kind: str, config: RunConfig, rank: int, folder: Path) -> dict[str, Any]:
    """Return what is said to bad uses."""
    says: dict[str, Any] = {}
    plain = nn.Linear(2, 2)
    for name, model, batch_size in (("odd batch", plain, 3), ("not wrapped", plain, 2)):
        optimizer = torch.optim.AdamW(model.parameters())
        settings = SteeringSettings(sequences=100, batch_size=batch_size, decisions=5, policy=keep)
        try:
            with Steering(model, optimizer, settings, ranks=ProcessGroupRanks()).step() as step:
                step.backward(lambda: plain(torch.ones(1, 2)).sum())
        except ValueError as error:
            says[name] = str(error)
    loop = SharedLoop(config, "fsdp", rank)
    state = loop.steering.state_dict()
    state["process"] = [1 - rank, PROCESSES]
    try:
        loop.steering.load_state_dict(state)
    except ValueError as error:
        says["the other's state"] = str(error)
    return says


def pruned(kind: str, config: RunConfig, rank: int, folder: Path) -> dict[str, Any]:
    """Prune a sharded model and a whole one alike; return both, by criterion."""
    found: dict[str, Any] = {}
    for criterion in get_args(Criterion):
        for name in ("whole", "shards"):
            model = live_run(config).loaded.model
            if name == "shards":
                fully_shard(model)
            masks = WeightMasks(model, criterion)
            for sparsity in (0.2, 0.3):
                with torch.no_grad():
                    for i, weight in enumerate(model.parameters()):
                        weight.mul_(1 + 0.1 * i)
                masks.observe()
                masks.prune_to(sparsity)
            kept = masks.state_dict()
            masks.prune_to(0.5)
            masks.load_state_dict(kept)
            weights = [full_tensor(weight.detach()).clone() for weight in model.parameters()]
            found[f"{name} {criterion}"] = weights, masks.sparsity(), [full_tensor(m) for m in kept["masks"].values()]
    return found


def lightning(kind: str, config: RunConfig, rank: int, folder: Path) -> dict[str, Any]:
    """Fit under Lightning; only these processes import it."""
    import lightning_worker

    found: dict[str, Any] = getattr(lightning_worker, kind)(rank, folder)
    return found


JOBS = {
    "whole": whole_run, "first": first_half, "second": second_half, "spoilt": spoilt, "timed": timed,
    "advised": advised, "untouched": untouched, "misused": misused,
    "pruned": pruned, "lightning": lightning,
}  # fmt: skip


def work(rank: int, config: RunConfig, folder: Path, jobs: list[str], name: str) -> None:
    """Do the jobs as one of two processes, and go down without a word."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # asked for, the file is used
    meeting = f"file://{folder / name}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=PROCESSES, timeout=timedelta(seconds=60))
    for job in jobs:
        what, kind = job.split()
        torch.save(JOBS[what](kind, config, rank, folder), folder / f"{what}-{kind}-{rank}.pt")
    dist.barrier()
    os._exit(0)


TIMEOUT_S = 400
"""On a machine that is busy with other things."""


def in_two_processes(*arguments: Any) -> None:
    end = time.monotonic() + TIMEOUT_S
    context = spawn(work, arguments, nprocs=PROCESSES, join=False)  # type: ignore[no-untyped-call]
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"two processes took more than {TIMEOUT_S} s"
    finally:
        for process in context.processes:
            process.kill()
