"""Steer a model that several processes train together, and the parts that the adapters of all frameworks share.

DistributedDataParallel, `fully_shard` (FSDP2) and Accelerate work with `ProcessGroupRanks`:

    dist.init_process_group("nccl")                  # under torchrun, one process for each device
    model = DistributedDataParallel(model)           # or fully_shard(model); then make the optimiser
    steering = Steering(model, optimizer, settings, ranks=ProcessGroupRanks())

The batch size in the settings counts the sequences of all processes together. `step.batch_size` is the share of this
process, and each process must draw data of its own. Rank 0 decides and broadcasts. Each process saves its own
`steering.state_dict()` and loads it again. Where every process holds all weights, the state of rank 0 will do for all;
one that was saved within an interval holds only that process's losses and joules, so all processes then measure the
rest of the interval anew.

A step in which only one process raises an exception cannot be repeated: the others wait for its gradients.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from trainpilot.agents.steering.settings import SteeringSettings
from trainpilot.agents.steering.steering import Steering
from trainpilot.llm_runtime.energy.meter import EnergyMeter, sum_known
from trainpilot.llm_runtime.optimizer import full_tensor
from trainpilot.llm_runtime.probe import mean_probe
from trainpilot.llm_runtime.process_group import Content, IntervalShare, OneProcess, ProcessGroup

if TYPE_CHECKING:
    from accelerate import Accelerator


EnergyOf = Literal["process", "node"]
Joules = tuple[str, float | None]
"""Name of what was counted, the same in all processes that count it, and its joules."""
_AND = " + "


class ProcessGroupRanks:
    """Collective operations over the default process group of `torch.distributed`, for data-parallel training.

    Args:
        energy_of: What the meters count: a device that only its process uses, or the same for all processes of a node.
            The default follows the scope of the meters: GPUs count once each, RAPL counters once per node, the
            estimate for CPUs once per process with its idle draw once per node, other meters once per process.

    Raises:
        ValueError: there is no process group.
    """

    def __init__(self, energy_of: EnergyOf | None = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "ProcessGroupRanks needs a process group, got none; call torch.distributed.init_process_group before, "
                "or leave `ranks` out in a single process"
            )
        self.world_size, self.rank = dist.get_world_size(), dist.get_rank()
        self.is_first = self.rank == 0
        self._energy_of = energy_of
        on_gpu = "nccl" in str(dist.get_backend())
        self._device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        self._known: tuple[nn.Module, list[DistributedDataParallel | FSDPModule]] | None = None

    def all_reduce_mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean over the processes."""
        total = values.detach().to(self._device, copy=True)
        dist.all_reduce(total)
        return (total / self.world_size).to(values.device)

    def all_gather(self, content: Content) -> list[Content]:
        """Return what each process holds, the first one's first."""
        everyone: list[Content] = [content] * self.world_size
        dist.all_gather_object(everyone, content)
        return everyone

    def all_reduce_interval(self, share: IntervalShare, meter: EnergyMeter) -> IntervalShare:
        """Return an interval in all processes: mean losses, the longest time, joules of which each is counted once."""
        process = f"process {self.rank}"
        joules = counted(share.energy_j, share.time_s, meter, process=process, energy_of=self._energy_of)
        everyone = self.all_gather((share, joules))
        shares = [each for each, _ in everyone]
        return IntervalShare(
            losses=[sum(losses) / len(losses) for losses in zip(*(each.losses for each in shares), strict=True)],
            probe=mean_probe([each.probe for each in shares if each.probe is not None]),
            time_s=max(each.time_s for each in shares),
            energy_j=sum_once(part for _, parts in everyone for part in parts),
        )

    def broadcast(self, content: Content) -> Content:
        """Return what the first process holds."""
        held = [content if self.is_first else None]
        dist.broadcast_object_list(held, src=0)
        return held[0]  # type: ignore[return-value]

    def full_tensor(self, norm: torch.Tensor) -> torch.Tensor:
        """Return a norm over all parameters, wherever their parts lie, as a plain tensor."""
        return full_tensor(norm)

    def set_requires_gradient_sync(self, model: nn.Module, required: bool) -> None:
        """Exchange gradients in the next backward pass, or gather them here until one that does.

        Raises:
            ValueError: nothing in the model exchanges gradients.
        """
        exchanging = self._exchanging(model)
        for module in exchanging:
            if isinstance(module, DistributedDataParallel):
                module.require_backward_grad_sync = required
            else:
                module.set_requires_gradient_sync(required, recurse=False)
        if not exchanging and self.world_size > 1:
            raise ValueError(
                "model must exchange its gradients: wrap it in DistributedDataParallel or fully_shard and give "
                f"Steering what comes of that, got {type(model).__name__}; FSDP1 and DeepSpeed are not supported"
            )

    def reshard(self, model: nn.Module) -> None:
        """Drop the whole weights that `fully_shard` keeps after a forward pass: shards may change under them."""
        for module in self._exchanging(model):
            if isinstance(module, FSDPModule):
                module.reshard()

    def _exchanging(self, model: nn.Module) -> list[DistributedDataParallel | FSDPModule]:
        """Return the modules that exchange gradients; searched for once, as a large model has thousands of modules."""
        if self._known is None or self._known[0] is not model:
            kinds = (DistributedDataParallel, FSDPModule)
            self._known = model, [module for module in model.modules() if isinstance(module, kinds)]
        return self._known[1]


def counted(
    energy_j: float | None, time_s: float, meter: EnergyMeter, *, process: str, energy_of: EnergyOf | None = None
) -> list[Joules]:
    """Return the joules of a process's meter, by the names of what was counted.

    Args:
        energy_j: Joules.
        time_s: Seconds in which they were counted.
        meter: The meter.
        process: Name of the process, different from that of every other process.
        energy_of: Overrides the meter's scope.
    """
    if energy_of == "process":
        return [(process, energy_j)]
    if energy_of == "node" or meter.scope == "machine":
        return [(_node(), energy_j)]
    if meter.scope == "device":
        return [(_AND.join(sorted(meter.uuids)), energy_j)]
    if meter.idle_w and energy_j is not None:
        idle_j = min(meter.idle_w * time_s, energy_j)
        return [(f"{_node()} idle {_threads()}", idle_j), (process, energy_j - idle_j)]
    return [(process, energy_j)]


def sum_once(parts: Iterable[Joules]) -> float | None:
    """Return the sum of joules, where the same name counts once, with its largest value; `None` if one is unknown.

    Raises:
        ValueError: a GPU was counted both alone and among others.
    """
    largest: dict[str, float | None] = {}
    for name, energy_j in parts:
        before = largest.get(name, 0.0)
        largest[name] = None if before is None or energy_j is None else max(before, energy_j)
    things = Counter(thing for name in largest for thing in name.split(_AND))
    if twice := [thing for thing, times in things.items() if times > 1]:
        raise ValueError(
            f"meter must count a GPU in one process, or the same GPUs in several, got {twice[0]} in different sums; "
            "give each process Steering(meter=NvmlMeter([its own]))"
        )
    return sum_known(largest.values())


def _node() -> str:
    """Return this machine's name, the same in all containers on it."""
    try:
        return "node " + Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "node " + socket.gethostname()


def _threads() -> str:
    """Return the hardware threads that this process may use, as text."""
    threads = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else "all"
    return f"of threads {threads}"


def present_ranks() -> ProcessGroup:
    """Return the processes of the process group, or a single process if there is none; one script then does both."""
    return ProcessGroupRanks() if dist.is_available() and dist.is_initialized() else OneProcess()


def ranks_of(world_size: int) -> ProcessGroup:
    """Return the processes of a Trainer that counts `world_size` of them."""
    return OneProcess() if world_size == 1 else ProcessGroupRanks()


def accelerated(
    accelerator: Accelerator, model: nn.Module, optimizer: Optimizer, settings: SteeringSettings, **options: Any
) -> Steering:
    """Return the steering of a loop that uses Accelerate.

        accelerator = Accelerator()                                   # mixed_precision "no": steering opens autocast
        model, optimizer = accelerator.prepare(model, optimizer)      # no scheduler
        steering = accelerated(accelerator, model, optimizer, settings)

    Then loop over `steering.step()`, with `step.backward` in place of `accelerator.backward` and `accumulate`.

    Args:
        accelerator: Has prepared model and optimizer.
        model: As `prepare` returned it, not unwrapped.
        optimizer: As `prepare` returned it.
        settings: Budget, start, policy and bounds.
        options: Further arguments of `Steering`.

    Raises:
        ValueError: Accelerate was set up in a way that cannot be steered.
    """
    _check_accelerator(accelerator)
    return Steering(model, optimizer, settings, ranks=present_ranks(), **options)


def _check_accelerator(accelerator: Accelerator) -> None:
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f"mixed_precision of the Accelerator must be 'no', got {accelerator.mixed_precision!r}: prepare would fix "
            "it for good; list what may be used in SteeringSettings(precisions=...)"
        )
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP") or (kind == "FSDP" and not accelerator.is_fsdp2):
        raise ValueError(
            f"distributed_type of the Accelerator must be NO, MULTI_CPU, MULTI_GPU or FSDP in version 2, got {kind}"
        )


GivenSettings = SteeringSettings | Mapping[str, Any] | None
"""What the user of an adapter passes: settings, or some of their fields; the framework's arguments give the rest."""


@dataclass(frozen=True, kw_only=True)
class Accumulation:
    """How many micro-batches make up an optimiser step when a run starts."""

    micro_batch_size: int
    """Sequences that a process puts through the model at once."""
    world_size: int
    """Processes."""
    accumulate: int
    """Micro-batches of an optimiser step."""

    @property
    def unit(self) -> int:
        """Sequences of one micro-batch of every process."""
        return self.micro_batch_size * self.world_size

    @property
    def batch_size(self) -> int:
        """Sequences of an optimiser step."""
        return self.unit * self.accumulate


def settings_fields(given: GivenSettings) -> dict[str, Any]:
    """Return the fields of `SteeringSettings` that are given.

    Raises:
        ValueError: one of them is unknown.
    """
    names = [field.name for field in fields(SteeringSettings)]
    if isinstance(given, SteeringSettings):
        return {name: getattr(given, name) for name in names}
    wanted = dict(given or {})
    if unknown := sorted(set(wanted) - set(names)):
        raise ValueError(f"steering settings must be fields of SteeringSettings, got {', '.join(unknown)}")
    return wanted


def merge_settings(
    given: GivenSettings, steps: Accumulation, *, batch_rule: str, clip: float | None, clip_rule: str
) -> dict[str, Any]:
    """Return the given fields with the batch size and the gradient clipping, which a framework's arguments set too.

    Args:
        given: Settings, or some of their fields.
        steps: Micro-batches of a step, from the framework's arguments.
        batch_rule: How the framework's arguments make up the batch size, for the error message.
        clip: Largest gradient norm that the framework clips to; `None` where it does not.
        clip_rule: Where the framework takes that norm from, for the error message.

    Raises:
        ValueError: what is given contradicts the framework's arguments.
    """
    wanted = settings_fields(given)
    if done := wanted.get("sequences_done"):
        raise ValueError(
            f"sequences_done must be 0 under a framework's Trainer, which begins and resumes runs itself, got {done}; "
            "a plain loop takes it: Steering(model, optimizer, SteeringSettings(...))"
        )
    batch_size, gradient_clip = wanted.get("batch_size"), wanted.get("gradient_clip")
    if batch_size is not None and batch_size != steps.batch_size and steps.accumulate != 1:
        raise ValueError(
            f"batch_size must be {batch_rule} = {steps.batch_size}, got {batch_size}; leave one of the two out"
        )
    if gradient_clip is not None and gradient_clip != clip:
        raise ValueError(
            f"gradient_clip must be {clip_rule}, {clip}, got {gradient_clip}; set it there, and leave gradient_clip out"
        )
    return wanted | {"batch_size": batch_size or steps.batch_size, "gradient_clip": clip}
